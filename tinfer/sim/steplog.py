"""When every decode step of an engine ended, kept as rows of steps and written out once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tinfer.sim.batch import Stretch

Floats = npt.NDArray[np.float64]


class StepLog:
    """The decode steps of one engine, in order."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, float, float]] = []

    def add(self, stretch: Stretch) -> None:
        """All steps of a finished stretch that decoded."""
        if stretch.ends_s is not None:
            self._rows += [(1, 0.0, end_s, 0.0) for end_s in stretch.ends_s[: stretch.num_steps]]
        else:
            row = (stretch.num_steps, stretch.start_s, stretch.first_s, stretch.more_s)
            self._rows.append(row)

    def ends_s(self) -> Floats:
        """The end of each step: [num_steps], the same numbers as `Stretch.end_s` gives."""
        if not self._rows:
            return np.empty(0)
        table = np.array(self._rows, dtype=np.float64)
        lengths = table[:, 0].astype(np.int64)
        start_s, first_s, more_s = (np.repeat(table[:, i], lengths) for i in (1, 2, 3))
        behind = np.cumsum(lengths)
        number = np.arange(1, behind[-1] + 1) - np.repeat(behind - lengths, lengths)
        bends = number * (number - 1) // 2
        return np.asarray(start_s + (number * first_s + more_s * bends), dtype=np.float64)
