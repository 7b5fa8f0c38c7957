"""Policies by name: what a `SchedulerConfig` may say, and the objects that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tinfer.core.policies.decode import Greedy, LeastKvLoad
from tinfer.core.policies.interfaces import (
    DecodeAdmission,
    PrefillOrder,
    RoutePolicy,
    WorkerChoice,
)
from tinfer.core.policies.prefill import Fcfs, LeastLoaded
from tinfer.core.policies.route import FixedRoute
from tinfer.core.types import Route, SchedulerConfig

T = TypeVar("T")
Factory = Callable[[SchedulerConfig], T]

ROUTES: dict[str, Factory[RoutePolicy]] = {
    "auto": lambda config: FixedRoute(Route.SPLIT),
    "split": lambda config: FixedRoute(Route.SPLIT),
    "whole": lambda config: FixedRoute(Route.WHOLE),
}
PREFILL_ORDERS: dict[str, Factory[PrefillOrder]] = {"fcfs": lambda config: Fcfs()}
START_CHOICES: dict[str, Factory[WorkerChoice]] = {"least-loaded": lambda config: LeastLoaded()}
DECODE_CHOICES: dict[str, Factory[WorkerChoice]] = {"least-loaded": lambda config: LeastKvLoad()}
DECODE_ADMISSIONS: dict[str, Factory[DecodeAdmission]] = {"greedy": lambda config: Greedy()}


class UnknownPolicy(ValueError):
    """The config names a policy that is not registered; the message lists those that are."""


@dataclass(frozen=True, slots=True)
class Policies:
    """One policy per decision; each wished route has a queue of its own."""

    route: RoutePolicy
    queues: dict[Route, PrefillOrder]
    prefill_choice: WorkerChoice
    whole_choice: WorkerChoice
    decode_choice: WorkerChoice
    decode_admission: DecodeAdmission


def build_policies(config: SchedulerConfig) -> Policies:
    """The policies that the config names. Raises `UnknownPolicy`."""

    def build(table: Mapping[str, Factory[T]], option: str) -> T:
        name: str = getattr(config, option)
        if name not in table:
            raise UnknownPolicy(f"unknown {option} {name!r}; one of: {', '.join(sorted(table))}")
        return table[name](config)

    return Policies(
        route=build(ROUTES, "route"),
        queues={route: build(PREFILL_ORDERS, "prefill_order") for route in Route},
        prefill_choice=build(START_CHOICES, "prefill_choice"),
        whole_choice=build(START_CHOICES, "whole_choice"),
        decode_choice=build(DECODE_CHOICES, "decode_choice"),
        decode_admission=build(DECODE_ADMISSIONS, "decode_admission"),
    )
