"""The jobs of an engine that lost their blocks: who of them is to be told of, and who waits.

A preemption is part of the step that it makes room for, and is known when that step is over.
"""

from __future__ import annotations

from tinfer.sim.jobs import Job


class Preempted:
    """`waiting`, by id, are those that go on only when they are told how; none where `parks` is
    false. `num` are all preemptions so far."""

    def __init__(self, parks: bool) -> None:
        self.parks = parks
        self.waiting: dict[str, Job] = {}
        self.num = 0
        self._in_step: list[str] = []
        self._known: list[str] = []

    def add(self, job: Job) -> None:
        """The next step begins without this job."""
        job.ticket.num_preemptions += 1
        self.num += 1
        self._in_step.append(job.id)
        if self.parks:
            self.waiting[job.id] = job

    @property
    def must_be_heard(self) -> bool:
        """Whether somebody would not be heard of if no step came."""
        return bool(self._in_step)

    def step_over(self) -> None:
        """What happened with the step that is over, or with none, is known from now on."""
        if self._in_step:
            self._known += self._in_step
            self._in_step.clear()

    @property
    def has_news(self) -> bool:
        """Whether `take` has anything to tell."""
        return bool(self._known)

    def take(self) -> tuple[str, ...]:
        """Those that became known since the last call."""
        known, self._known = tuple(self._known), []
        return known
