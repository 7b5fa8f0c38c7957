"""The simulator: discrete events in virtual time, deciding by the same core as the live server.

`simulate(SimSpec(...))` runs tinfer's own scheduler over simulated engines; `simulate_replicas` and
`simulate_hybrid` run what it is compared with over the same engines. Requests come from
`sim_requests`, engines and workers from `presets`, figures from `figures_of`. Everything is
deterministic: equal specs give equal runs.
"""

from __future__ import annotations

from tinfer.sim.baselines import (
    HybridSpec,
    ReplicasSpec,
    simulate_hybrid,
    simulate_replicas,
    unloaded_slos,
)
from tinfer.sim.cluster import simulate
from tinfer.sim.results import (
    RequestResult,
    SimRun,
    Slo,
    WorkerResult,
    figures_of,
    ratios_of,
)
from tinfer.sim.spec import (
    EngineSpec,
    Oracle,
    Predictor,
    SimRequest,
    SimSpec,
    WorkerSpec,
)
from tinfer.sim.workload import sim_requests
from tinfer.sim.world import SimulationError

__all__ = [
    "EngineSpec",
    "HybridSpec",
    "Oracle",
    "Predictor",
    "ReplicasSpec",
    "RequestResult",
    "SimRequest",
    "SimRun",
    "SimSpec",
    "SimulationError",
    "Slo",
    "WorkerResult",
    "WorkerSpec",
    "figures_of",
    "ratios_of",
    "sim_requests",
    "simulate",
    "simulate_hybrid",
    "simulate_replicas",
    "unloaded_slos",
]
