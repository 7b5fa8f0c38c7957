"""A dispatcher whose clock a test moves, with all that a scrape reads."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

from prometheus_client import CollectorRegistry

from tests.unit.master_box import DispatcherBox
from tests.wire.samples import TO_MASTER
from tinfer.core.types import Role
from tinfer.master.lag import LagMeter
from tinfer.master.metrics.collector import Sources, registry_of
from tinfer.master.placement import Placement
from tinfer.master.supervisor import Life, Supervisor, WorkerSlot
from tinfer.wire.messages import Ready

(READY,) = [message for message in TO_MASTER if isinstance(message, Ready)]
MODEL = "m"
MAX_MODEL_LEN = 100


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


class Workers:
    """Stands in for the supervisor: `p` and `d` serve, in the box's own incarnations."""

    def __init__(self) -> None:
        self.deaths: Counter[tuple[str, str]] = Counter()
        self.slots: dict[str, WorkerSlot] = {}
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
            slot = self.slots[name] = WorkerSlot(Placement(worker_id=name, role=role, device="cpu"))
            slot.life, slot.ready = Life.READY, READY


class MeteredBox(DispatcherBox):
    """`registry` is what `/metrics` shows of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clock = Clock()
        self.dispatcher._clock = self.clock
        self.workers = Workers()
        self.lag = LagMeter(lambda: True)
        self.is_healthy = True
        self.registry: CollectorRegistry = registry_of(
            Sources(
                self.dispatcher,
                self.scheduler,
                cast(Supervisor, self.workers),
                self.lag,
                MODEL,
                MAX_MODEL_LEN,
                lambda: self.is_healthy,
            )
        )

    def value(self, series: str, **labels: str) -> float:
        """One value; of the server's own labels none has to be named."""
        common = {"model_name": MODEL}
        if series.startswith("vllm:") and "admission" not in series:
            common["engine"] = "0"
        found = self.registry.get_sample_value(series, {**common, **labels})
        assert found is not None, (series, labels)
        return found

    def histogram(self, name: str) -> tuple[float, float]:
        """How many values it has, and their sum."""
        return self.value(f"{name}_count"), self.value(f"{name}_sum")

    def within(self, name: str, bound: str) -> float:
        """How many values are at most that bound."""
        return self.value(f"{name}_bucket", le=bound)
