"""The fake engine's time: how long its work takes, and a descriptor to wait for the end of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import time

from tinfer.worker.fake_settings import FakeSettings

_TFD_TIMER_ABSTIME = 1
_NS_PER_S = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class AlarmFd:
    """A Linux timerfd on the monotonic clock; `os` has these calls only from Python 3.13 on."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self.fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, flags)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def set(self, at_s: float) -> None:
        """Become readable at this monotonic time, at once if it is past; replaces what was set."""
        at_ns = max(1, int(at_s * _NS_PER_S))  # all zero would disarm it
        value = _Timespec(at_ns // _NS_PER_S, at_ns % _NS_PER_S)
        spec = _Itimerspec(_Timespec(0, 0), value)
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def clear(self) -> None:
        """Make it unreadable until the next set time."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)


class Pace:
    """How long steps and pulls take, by the settings, with seeded jitter."""

    def __init__(self, settings: FakeSettings, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._ended_s = 0.0

    def step_s(self, num_prompt_tokens: int, num_decoding: int) -> float:
        settings = self._settings
        return self._varied(
            settings.step_s
            + settings.prefill_token_s * num_prompt_tokens
            + settings.decode_seq_s * num_decoding
        )

    def end_s(self, cost_s: float, is_first: bool) -> float:
        """When a step that begins now and takes so long ends, in monotonic time.

        Of steady steps that follow each other, one begins when the last one ended: what this
        process does in between is part of no step. One that is late by more than its own length
        begins later.
        """
        now_s = time.monotonic()
        is_first = is_first or not self._settings.steady
        begun_s = now_s if is_first else max(self._ended_s, now_s - cost_s)
        self._ended_s = begun_s + cost_s
        return self._ended_s

    def pull_s(self, num_blocks: int) -> float:
        return self._varied(self._settings.pull_block_s * num_blocks)

    def _varied(self, duration_s: float) -> float:
        jitter = self._settings.jitter
        return duration_s * (1 + jitter * self._rng.uniform(-1, 1)) if jitter else duration_s


def sleep_until(at_s: float) -> None:
    """Block until a monotonic time."""
    duration_s = at_s - time.monotonic()
    if duration_s > 0:
        time.sleep(duration_s)
