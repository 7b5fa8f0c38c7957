"""`--request-log`: one line per request when it has ended, for `tinfer predictor eval`, `simulate`
and `plan`, and to learn from (docs/prediction.md).

A line is made on the loop's thread and written by another, so that no disk makes a request wait.
What lies between them is bounded: what a slow disk has no room for, or a full one refuses, is lost,
counted, and said once when it begins and in sum at the end. The server goes on.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.master.live import LiveRequest
from tinfer.master.rotating_file import LinesLost, RotatingFile

log = logging.getLogger(__name__)

LineOf = Callable[[LiveRequest, str], bytes]

# Lines that wait for the disk: some ten thousand without prompts.
MAX_WAITING_BYTES = 16 << 20
# Written at once; a stop comes between two such pieces.
_MAX_LINES_AT_ONCE = 512
# How long a stop waits for the disk.
CLOSE_S = 5.0


def check_request_log_options(config: ServeConfig) -> None:
    """Makes nothing yet. Raises `StartError` where the log could not be written."""
    if config.request_log is None:
        if config.log_prompts:
            raise StartError("--log-prompts needs --request-log")
        return
    path = Path(config.request_log)
    folder = path.absolute().parent
    # The folder too, because a full file is put aside there.
    is_writable = os.access(folder, os.W_OK | os.X_OK) and not path.is_dir() and not path.is_fifo()
    if not is_writable or (path.exists() and not os.access(path, os.W_OK)):
        raise StartError(f"cannot write --request-log {path}")


def open_request_log(config: ServeConfig, epoch_s: float) -> RequestLog | None:
    """The log that the options ask for; `epoch_s` is what the dispatcher's clock showed in 1970.

    Raises `StartError`.
    """
    if config.request_log is None:
        return None
    path = Path(config.request_log)
    try:
        file = RotatingFile(path, config.request_log_max_bytes, config.request_log_files)
    except BlockingIOError as error:
        raise StartError(f"--request-log {path} is written by another server") from error
    except OSError as error:
        raise StartError(f"cannot write --request-log {path}: {error.strerror}") from error
    # With the workloads, which a server without a log does without.
    from tinfer.master.request_record import line_of

    return RequestLog(file, functools.partial(line_of, epoch_s, config.log_prompts))


class RequestLog:
    """Owns the file and the thread that writes it. `line_of` makes the line of a request that was
    served by a model; at most `max_waiting_bytes` of lines wait for the disk."""

    def __init__(
        self,
        file: RotatingFile,
        line_of: LineOf,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._file = file
        self._line_of = line_of
        self._max_waiting_bytes = max_waiting_bytes
        # None is the end. Each side counts for itself: bytes put by the loop, taken by the thread.
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._put_bytes = 0
        self._taken_bytes = 0
        self._num_put = 0
        self._num_no_room = 0
        self._num_refused = 0
        self._num_written = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    @property
    def num_written(self) -> int:
        """Lines in the file."""
        return self._num_written

    @property
    def num_lost(self) -> int:
        """Lines that the disk was too slow or too full for."""
        return self._num_no_room + self._num_refused

    def add(self, live: LiveRequest, model: str) -> None:
        """A request has ended. Never blocks, never raises for what the disk does."""
        line = self._line_of(live, model)
        waiting_bytes = self._put_bytes - self._taken_bytes
        if self._is_closed or waiting_bytes + len(line) > self._max_waiting_bytes:
            if not self._num_no_room:
                log.warning("--request-log: the disk is too slow, lines are lost")
            self._num_no_room += 1
            return
        self._put_bytes += len(line)
        self._num_put += 1
        self._waiting.put(line)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, for so long at most, and say what was lost. Idempotent; blocks."""
        if self._is_closed:
            return
        self._is_closed = True
        self._waiting.put(None)
        self._thread.join(timeout_s)
        num_lost = self._num_put - self._num_written + self._num_no_room
        if num_lost:
            log.warning(
                "--request-log lacks %d of %d lines", num_lost, num_lost + self._num_written
            )

    def _run(self) -> None:
        while True:
            lines, is_end = self._taken()
            if lines:
                self._write(lines)
                self._taken_bytes += sum(map(len, lines))
            if is_end:
                return self._file.close()

    def _taken(self) -> tuple[list[bytes], bool]:
        """The next lines, at least one or the end; and whether that is the end."""
        lines: list[bytes] = []
        item = self._waiting.get()
        while item is not None:
            lines.append(item)
            if len(lines) == _MAX_LINES_AT_ONCE:
                return lines, False
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return lines, False
        return lines, True

    def _write(self, lines: list[bytes]) -> None:
        num_lost = 0
        try:
            self._file.write(lines)
        except LinesLost as lost:
            num_lost = lost.num
            if not self._num_refused:
                why = lost.error.strerror
                log.warning("--request-log cannot be written, lines are lost: %s", why)
        self._num_refused += num_lost
        self._num_written += len(lines) - num_lost
