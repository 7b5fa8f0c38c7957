"""A file of lines that is put aside when it is full, whole lines only, whatever the disk does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tinfer.master.rotating_file import LinesLost, RotatingFile


def lines(*numbers: int) -> list[bytes]:
    """Of ten bytes each."""
    return [b"line %04d\n" % number for number in numbers]


def found(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(folder.iterdir())}


def test_full_files_are_put_aside_and_the_oldest_go(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "log", 25, 2)
    for number in range(9):
        file.write(lines(number))
    file.close()
    file.close()
    assert found(tmp_path) == {
        "log": b"".join(lines(8)),
        "log.1": b"".join(lines(6, 7)),
        "log.2": b"".join(lines(4, 5)),
    }
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o600}


def test_many_lines_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "log", 25, 2)
    file.write(lines(*range(9)))
    file.close()
    assert list(found(tmp_path).values()) == [
        b"".join(lines(8)),
        b"".join(lines(6, 7)),
        b"".join(lines(4, 5)),
    ]


def test_a_line_that_is_longer_than_a_file_has_one_alone(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "log", 25, 3)
    longer = b"x" * 30 + b"\n"
    file.write([*lines(1), longer, *lines(2)])
    file.close()
    assert list(found(tmp_path).values()) == [lines(2)[0], longer, lines(1)[0]]


@pytest.mark.parametrize("torn", [b"", b"line", b"line 0002" + b"y" * 200_000])
def test_a_file_that_is_there_goes_on_behind_its_last_whole_line(
    tmp_path: Path, torn: bytes
) -> None:
    path = tmp_path / "log"
    path.write_bytes(lines(1)[0] + torn)
    path.chmod(0o644)
    file = RotatingFile(path, 30, 1)
    file.write(lines(2))
    file.close()
    assert found(tmp_path) == {"log": b"".join(lines(1, 2))}
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "log", 25, 1)
    with pytest.raises(BlockingIOError):
        RotatingFile(tmp_path / "log", 25, 1)
    file.write(lines(1, 2, 3))
    with pytest.raises(BlockingIOError):
        RotatingFile(tmp_path / "log", 25, 1)
    file.close()
    RotatingFile(tmp_path / "log", 25, 1).close()


def test_a_write_that_fails_half_way_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    file = RotatingFile(path, 1000, 1)
    file.write(lines(1))
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if path.stat().st_size >= 13:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:3])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(LinesLost, match="No space") as lost:
            file.write(lines(2, 3))
    assert lost.value.num == 2
    file.write(lines(4))
    file.close()
    assert path.read_bytes() == b"".join(lines(1, 4))


def test_what_was_written_before_the_disk_was_full_is_not_lost(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "log", 25, 1)
    file.write(lines(1, 2))
    (tmp_path / "log.1").mkdir()  # nothing can take its place
    with pytest.raises(LinesLost) as lost:
        file.write(lines(3, 4, 5))
    assert lost.value.num == 3
    (tmp_path / "log.1").rmdir()
    file.write(lines(6))
    file.close()
    assert found(tmp_path) == {"log": lines(6)[0], "log.1": b"".join(lines(1, 2))}


def test_what_is_no_file_is_only_written_to() -> None:
    file = RotatingFile(Path("/dev/full"), 25, 1)
    mode = os.stat("/dev/full").st_mode
    with pytest.raises(LinesLost) as lost:
        file.write(lines(1, 2, 3, 4))
    assert lost.value.num == 4
    file.close()
    assert os.stat("/dev/full").st_mode == mode
