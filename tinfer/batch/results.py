"""The output file: what it has already, and one line more per result, whole or not at all.

Invariants: one process writes it; every line but the last is a whole result; a `custom_id` has one
result, and only a failed one is ever taken out again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from tinfer.batch.lines import LINE_PREFIX, Result
from tinfer.errors import StartError


class _Status(Struct):
    status_code: int


class _Reason(Struct):
    code: str
    line: int | None = None


class _Told(Struct):
    """A result as far as it matters for going on."""

    custom_id: str | None
    response: _Status | None
    error: _Reason | None

    @property
    def is_answer(self) -> bool:
        return self.response is not None and 200 <= self.response.status_code < 300


class Results:
    """Opened, locked and, where its last line is half a one, cut. Use it as a context manager."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._answered: set[str] = set()
        self._failed: set[str] = set()
        self._bad_lines: set[int] = set()

    def outcome(self, custom_id: str) -> bool | None:
        """Whether it was answered; None where there is no result of it yet."""
        if custom_id in self._answered:
            return True
        return False if custom_id in self._failed else None

    def tells_of(self, line: int) -> bool:
        """Whether this line of the input, which has no `custom_id` of its own, has its error."""
        return line in self._bad_lines

    def write(self, result: Result) -> None:
        """Append one line. Raises `OSError`; what is written by then is cut off by the next run."""
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()

    def load(self) -> None:
        """Read what is there. Raises `StartError` for a line that is no result."""
        for number, line in _lines(self._file):
            if not line.endswith(b"\n"):
                self._cut(line)
                return
            told = self._read(number, line)
            if told.is_answer:
                self._answered.add(str(told.custom_id))
            elif told.custom_id is not None and not _is_duplicate(told):
                self._failed.add(told.custom_id)
            elif told.error is not None and told.error.line is not None:
                self._bad_lines.add(told.error.line)
        self._failed -= self._answered

    def drop_failed(self) -> None:
        """Take out every failure, all or none of them, to have these lines asked again."""
        if not self._failed and not self._bad_lines:
            return
        new = self._path.with_name(self._path.name + ".new")
        with _made(new) as file:
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            _lock(file, new)
            for number, line in _lines(self._file):
                if self._read(number, line).is_answer:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
            new.rename(self._path)
        self._file.close()
        self._file = file
        self._failed.clear()
        self._bad_lines.clear()

    def close(self) -> None:
        self._file.close()

    def _read(self, number: int, line: bytes) -> _Told:
        try:
            return msgspec.json.decode(line, type=_Told)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = f"line {number} of {self._path} is no result of a batch: {error}"
            raise StartError(reason) from error

    def _cut(self, half: bytes) -> None:
        """Where a run was killed as it wrote. Raises `StartError` where it was none of ours."""
        if half[: len(LINE_PREFIX)] != LINE_PREFIX[: len(half)]:
            raise StartError(f"the last line of {self._path} is no result of a batch")
        self._file.truncate(os.fstat(self._file.fileno()).st_size - len(half))


@contextmanager
def opened(path: Path, retry_failed: bool) -> Iterator[Results]:
    """The results in this file, made where it is not there; failed ones dropped on wish.

    An empty one that was made here is removed again. Raises `StartError` for a file that another
    run writes or that holds anything else, `OSError`.
    """
    # A link stays one.
    path = Path(os.path.realpath(path))
    is_new = not path.exists()
    results = Results(path, _opened(path))
    try:
        results.load()
        if retry_failed:
            results.drop_failed()
        yield results
    finally:
        if is_new and path.stat().st_size == 0:
            path.unlink()
        results.close()


def _opened(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise StartError(f"{path} is no file, and a batch that is to be resumed needs one")
    file = path.open("a+b")
    try:
        _lock(file, path)
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise StartError(f"another run has just replaced {path}")
    except BaseException:
        file.close()
        raise
    return file


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError(f"another run writes {path}") from error


@contextmanager
def _made(path: Path) -> Iterator[BinaryIO]:
    """An empty file, open for appending; closed and removed where the block fails."""
    path.unlink(missing_ok=True)
    file = path.open("a+b")
    try:
        yield file
    except BaseException:
        file.close()
        path.unlink(missing_ok=True)
        raise


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    file.seek(0)
    yield from enumerate(file, 1)


def _is_duplicate(told: _Told) -> bool:
    return told.error is not None and told.error.code == "duplicate_custom_id"
