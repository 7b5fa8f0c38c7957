"""Policies by name: what a `SchedulerConfig` may say, and the objects that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tinfer.core.demand import Demand
from tinfer.core.fleet import Fleet
from tinfer.core.policies.admission import Greedy, Peak, ReserveDynamic, ReserveStatic
from tinfer.core.policies.auto import AutoPlacer
from tinfer.core.policies.budgets import Slack, WholeChunks
from tinfer.core.policies.decode import LeastKv, PowerOfTwo, Projected
from tinfer.core.policies.flips import Off, Reactive, Watchdog
from tinfer.core.policies.interfaces import (
    BudgetPolicy,
    DecodeAdmission,
    FlipPolicy,
    Placer,
    PreemptionPolicy,
    PrefillOrder,
    ReaderChoice,
    WorkerChoice,
)
from tinfer.core.policies.orders import Batched, ByPriority, Fcfs, Srpt
from tinfer.core.policies.placers import SplitPlacer, WholePlacer
from tinfer.core.policies.preemption import Cheapest, Elsewhere, Here
from tinfer.core.policies.prefill import EarliestFinish, LeastLoaded
from tinfer.core.types import Route, SchedulerConfig

T = TypeVar("T")
Factory = Callable[[SchedulerConfig], T]
OrderFactory = Callable[[SchedulerConfig, Fleet], PrefillOrder]

ROUTES: dict[str, Route | None] = {"auto": None, "split": Route.SPLIT, "whole": Route.WHOLE}
DISPATCHES = ("first-token", "first-chunk")
PREFILL_ORDERS: dict[str, OrderFactory] = {
    "fcfs": lambda config, fleet: Fcfs(),
    "sjf": lambda config, fleet: Batched(config.prefill_sched_batch, 1),
    "ljf": lambda config, fleet: Batched(config.prefill_sched_batch, -1),
    "srpt": lambda config, fleet: Srpt(config.costs, config.ageing, config.ttft_deadline_s, fleet),
}
START_CHOICES: dict[str, Factory[WorkerChoice]] = {
    "least-loaded": lambda config: LeastLoaded(),
    "earliest-finish": lambda config: EarliestFinish(),
}
DECODE_CHOICES: dict[str, Factory[ReaderChoice]] = {
    "least-kv": lambda config: LeastKv(),
    "power-of-two": lambda config: PowerOfTwo(config.seed),
    "projected": lambda config: Projected(),
}
DECODE_ADMISSIONS: dict[str, Factory[DecodeAdmission]] = {
    "greedy": lambda config: Greedy(),
    "reserve-static": lambda config: ReserveStatic(),
    "reserve-dynamic": lambda config: ReserveDynamic(),
    "peak": lambda config: Peak(),
}
PREEMPTIONS: dict[str, Factory[PreemptionPolicy]] = {
    "auto": lambda config: Cheapest(),
    "here": lambda config: Here(),
    "elsewhere": lambda config: Elsewhere(),
}
BUDGETS: dict[str, Callable[[SchedulerConfig, Fleet], BudgetPolicy]] = {
    "whole-chunks": lambda config, fleet: WholeChunks(),
    "slack": lambda config, fleet: Slack(config.itl_slack, fleet),
}
FLIPS: dict[str, Factory[FlipPolicy]] = {
    "off": lambda config: Off(),
    "watchdog": lambda config: Watchdog(),
    "reactive": lambda config: Reactive(),
}


class UnknownPolicy(ValueError):
    """The config names a policy that is not registered; the message lists those that are."""


@dataclass(frozen=True, slots=True)
class Policies:
    """One policy per decision; requests of each wish (None: no wish) have a queue and a placer."""

    wish: Route | None
    queues: Mapping[Route | None, PrefillOrder]
    placers: Mapping[Route | None, Placer]
    decode_choice: ReaderChoice
    decode_admission: DecodeAdmission
    preemption: PreemptionPolicy
    budget: BudgetPolicy
    flip: FlipPolicy
    settles_early: bool


def build_policies(config: SchedulerConfig, fleet: Fleet, demand: Demand) -> Policies:
    """The policies that the config names. Raises `UnknownPolicy`."""

    def found(table: Mapping[str, T], option: str) -> T:
        name: str = getattr(config, option)
        if name not in table:
            raise UnknownPolicy(f"unknown {option} {name!r}; one of: {', '.join(sorted(table))}")
        return table[name]

    wishes = (Route.SPLIT, Route.WHOLE, None)
    order = found(PREFILL_ORDERS, "prefill_order")
    admission = found(DECODE_ADMISSIONS, "decode_admission")(config)
    whole = WholePlacer(found(START_CHOICES, "whole_choice")(config))
    split = SplitPlacer(found(START_CHOICES, "prefill_choice")(config), whole)
    return Policies(
        wish=found(ROUTES, "route"),
        queues={wish: ByPriority(lambda: order(config, fleet)) for wish in wishes},
        placers={
            Route.SPLIT: split,
            Route.WHOLE: whole,
            None: AutoPlacer(admission, demand, config.prefill_order == "srpt"),
        },
        decode_choice=found(DECODE_CHOICES, "decode_choice")(config),
        decode_admission=admission,
        preemption=found(PREEMPTIONS, "preemption")(config),
        budget=found(BUDGETS, "prefill_budget")(config, fleet),
        flip=found(FLIPS, "flip")(config),
        settles_early=found({name: name for name in DISPATCHES}, "dispatch") == "first-chunk",
    )
