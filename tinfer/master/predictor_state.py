"""What the length predictor has learnt, in a file (`--predictor-state`) from one start to the next.

Read once, before anything is served; written as a whole, every so often and at the end, by a thread
while requests are served. A file that cannot be used costs one warning and what was learnt, never
the start; it is put aside before another one takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tinfer.atomic_file import replace_file
from tinfer.config import ServeConfig
from tinfer.errors import StartError
from tinfer.predict.asked import Predictor

if TYPE_CHECKING:
    from tinfer.predict.online import OnlinePredictor

log = logging.getLogger(__name__)

UNUSABLE = ".unusable"


def check_state_option(config: ServeConfig) -> None:
    """Makes nothing yet. Raises `StartError` where the file could not be written, or where nothing
    is learnt that could be."""
    if config.predictor_state is None:
        return
    if config.predictor != "online":
        raise StartError(
            f"--predictor-state needs --predictor online: {config.predictor} learns nothing"
        )
    path = Path(config.predictor_state)
    folder = path.absolute().parent
    # The folder, because a new file takes the old one's place there.
    if path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"cannot write --predictor-state {path}")


class PredictorState:
    """The file of one server's predictor; without a file, or who learns, nothing is done."""

    def __init__(self, predictor: Predictor, path: str | None) -> None:
        self._predictor: OnlinePredictor | None = None
        self._path = Path(path or "")
        self._num_taken = 0
        # Of what is on the disk; the thread and the stop write one after the other.
        self._num_written = 0
        self._is_unusable = False
        self._lock = threading.Lock()
        if path is not None:
            self._load(predictor)

    def _load(self, predictor: Predictor) -> None:
        # With numpy, which a server without such a file does without.
        from tinfer.predict.online import OnlinePredictor
        from tinfer.predict.online_state import BadState, restore

        if not isinstance(predictor, OnlinePredictor):
            return
        self._predictor = predictor
        try:
            restore(predictor, self._path.read_bytes())
        except FileNotFoundError:
            return
        except (BadState, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self._is_unusable = True
            log.warning("--predictor-state %s is not used: %s; learning anew", self._path, reason)
        self._num_taken = predictor.num_observed

    async def keep(self, interval_s: float) -> None:
        """Save every so many seconds, for good."""
        while True:
            await asyncio.sleep(interval_s)
            unsaved = self._unsaved()
            if unsaved is not None:
                await asyncio.to_thread(self._write, *unsaved)

    def save(self) -> None:
        """Save what is not saved; an error is logged."""
        unsaved = self._unsaved()
        if unsaved is not None:
            self._write(*unsaved)

    def _unsaved(self) -> tuple[int, bytes] | None:
        """How many answers were observed, and the state, if there are more than were taken last."""
        predictor = self._predictor
        if predictor is None or predictor.num_observed == self._num_taken:
            return None
        from tinfer.predict.online_state import to_bytes

        self._num_taken = predictor.num_observed
        return self._num_taken, to_bytes(predictor)

    def _write(self, num_observed: int, data: bytes) -> None:
        with self._lock:
            if num_observed < self._num_written:
                return  # a thread that the stop has overtaken
            try:
                if self._is_unusable:
                    os.replace(self._path, f"{self._path}{UNUSABLE}")
                    self._is_unusable = False
                replace_file(self._path, data)
            except OSError as error:
                log.error("cannot write --predictor-state %s: %s", self._path, error.strerror)
            else:
                self._num_written = num_observed
