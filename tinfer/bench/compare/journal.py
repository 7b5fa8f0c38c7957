"""What a comparison has measured so far, on disk: a comparison that ends early loses nothing.

With `--json FILE` every measurement is a line of FILE.journal as soon as it is there, and on the
disk before the next one begins. `--resume` goes on from there; once the whole result is written,
the journal goes. A line is one JSON object; one that was cut by its writer's end is left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec
import numpy as np
from msgspec import Struct

from tinfer.bench.compare.arms import Arm
from tinfer.bench.compare.hardware import hardware_of, versions
from tinfer.bench.compare.limits import Unloaded
from tinfer.bench.compare.options import CompareOptions
from tinfer.bench.compare.recorded import FullLoad, Recorded, Run
from tinfer.bench.target import Target
from tinfer.errors import StartError

# What may differ between the parts of one comparison: none of it is in a measurement.
_FREE = frozenset(
    ("baseline", "num_resamples", "start_timeout_s", "json_path", "plot_dir", "log_dir")
    + ("dry_run", "resume")
)


class Begun(Struct, tag=True, frozen=True, kw_only=True):
    """The first line of each part: when it began, and all that the measurements follow from."""

    date: str
    asked: dict[str, Any]


class Alone(Struct, tag=True, frozen=True, kw_only=True):
    """Unloaded times, and what the first server said of the model."""

    target: Target | None
    vocab_size: int | None
    unloaded: dict[str, Unloaded]


class Found(Struct, tag=True, frozen=True, kw_only=True):
    """The full load of a workload."""

    workload: str
    full_load: FullLoad


class Ended(Struct, tag=True, frozen=True, kw_only=True):
    """A run to its end."""

    run: Run


Entry = Begun | Alone | Found | Ended


class Journal:
    """Lines that are added to one file; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._has_measured = False

    def begin(self, entries: Sequence[Entry]) -> None:
        """Have these entries, and no others, in the file. Raises `StartError`."""
        if self._path is None:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            self._file = fresh.open("wb")
            for entry in entries:
                self.add(entry)
            fresh.replace(self._path)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def add(self, entry: Entry) -> None:
        """Returns when it is on the disk. Raises `StartError`."""
        if self._path is None or self._file is None:
            return
        try:
            self._file.write(msgspec.json.encode(entry, enc_hook=_encoded) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._has_measured |= not isinstance(entry, Begun)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self, remove: bool) -> None:
        """`remove` it where nothing in it is needed any more; one without measurements goes too."""
        if self._path is None or self._file is None:
            return
        self._file.close()
        if remove or not self._has_measured:
            self._path.unlink(missing_ok=True)


def journal_path(options: CompareOptions) -> Path | None:
    """None where the result goes to no file."""
    if options.json_path in (None, "-"):
        return None
    return Path(f"{options.json_path}.journal")


def opened(options: CompareOptions, arms: Sequence[Arm], date: str) -> tuple[Journal, Recorded]:
    """The journal of this comparison, and what earlier parts of it have measured.

    Raises `StartError` where there is a journal and nobody asked to go on from it, and where it is
    of a comparison that measured something else.
    """
    path = journal_path(options)
    if options.resume and path is None:
        raise StartError("--resume goes on with what --json FILE left, and there is no FILE")
    begun = Begun(date=date, asked=_asked(options, arms))
    entries: list[Entry] = []
    if path is not None and path.exists():
        entries = _read(path)
        if all(isinstance(one, Begun) for one in entries):
            entries = []
        elif not options.resume:
            raise StartError(
                f"{path} is what a comparison measured that did not end: "
                "--resume goes on with it, or remove it"
            )
        _check_same(path, entries, begun)
        entries = _kept(entries, len(arms), options.residency == "together")
    journal = Journal(path)
    journal.begin([*entries, begun])
    return journal, _recorded(entries)


def _asked(options: CompareOptions, arms: Sequence[Arm]) -> dict[str, Any]:
    """By name, all that has to be the same in every part, as it is read back from a journal."""
    settings = msgspec.json.decode(msgspec.json.encode(options, enc_hook=str))
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    hardware = hardware_of(options.device, options.cores, options.gpus)
    return {
        **kept,
        "arms": [f"{arm.kind}={arm.name}" for arm in arms],
        "processor": hardware["processor"],
        **{f"version of {name}": version for name, version in versions().items()},
    }


def _check_same(path: Path, entries: Sequence[Entry], begun: Begun) -> None:
    for entry in entries:
        if isinstance(entry, Begun) and (told := _difference(entry.asked, begun.asked)):
            raise StartError(f"{path} is of another comparison: {told}")


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    for name in [*there, *(name for name in here if name not in there)]:
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)} there, and {here.get(name)} here"
    return None


def _read(path: Path) -> list[Entry]:
    """All whole lines. Raises `StartError` for what is no journal."""
    try:
        lines = path.read_bytes().split(b"\n")
        # What follows the last line end is a line that was cut.
        return [_DECODER.decode(line) for line in lines[:-1]]
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise StartError(f"{path} is no journal of a comparison: {error}") from error


def _kept(entries: Sequence[Entry], num_arms: int, together: bool) -> list[Entry]:
    """Without the runs of a repetition that was cut, where its arms follow each other directly.

    The arms would not be measured one directly after the other, were it gone on with.
    """
    ended = Counter(
        (one.run.step.point, one.run.step.repetition) for one in entries if isinstance(one, Ended)
    )
    return [
        one
        for one in entries
        if not (together and isinstance(one, Ended))
        or ended[one.run.step.point, one.run.step.repetition] == num_arms
    ]


def _recorded(entries: Sequence[Entry]) -> Recorded:
    recorded = Recorded()
    for entry in entries:
        match entry:
            case Begun():
                recorded.resumed.append(entry.date)
            case Alone():
                recorded.target, recorded.vocab_size = entry.target, entry.vocab_size
                recorded.unloaded = entry.unloaded
            case Found():
                recorded.full_load[entry.workload] = entry.full_load
            case Ended():
                recorded.runs.append(entry.run)
    return recorded


def _cannot_write(path: Path, error: OSError) -> StartError:
    return StartError(f"cannot write {path}: {error.strerror}")


def _encoded(value: Any) -> bytes:
    """An array as its bytes, which keep NaN and every digit."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a journal has no {type(value).__name__}")
    return value.astype(value.dtype.newbyteorder("<")).tobytes()


def _decoded(kind: Any, value: Any) -> Any:
    """`kind` is the annotation of an array of one dimension, which names its type of numbers."""
    (number,) = get_args(get_args(kind)[1])
    raw = msgspec.convert(value, bytes, strict=False)
    return np.frombuffer(raw, np.dtype(number).newbyteorder("<")).astype(number)


_DECODER = msgspec.json.Decoder(Entry, dec_hook=_decoded)
