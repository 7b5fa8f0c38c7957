"""One simulated engine on its own, with shorthand for what is asked of it and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinfer.core.costs import CostModel
from tinfer.core.types import LeaseKey
from tinfer.sim.engine import SimEngine
from tinfer.sim.jobs import Job, Kind, Output, Ticket, What
from tinfer.sim.spec import EngineSpec, SimRequest

# Sums of these are exact in binary, so that times can be compared with ==.
COSTS = CostModel(
    base_s=1.0,
    prefill_token_s=0.125,
    prefill_context_s=0.0,
    decode_seq_s=0.25,
    kv_token_s=0.0,
    handoff_s=0.5,
    handoff_token_s=0.0,
)
SPEC = EngineSpec(
    costs=COSTS,
    num_blocks=100,
    block_tokens=2,
    max_num_seqs=4,
    max_num_batched_tokens=4,
    prefix_caching=False,
)


def request(
    name: str = "a",
    prompt: int = 4,
    out: int = 3,
    at_s: float = 0.0,
    hashes: Sequence[int] = (),
    most: int | None = None,
    task: str = "",
    patience_s: float | None = None,
) -> SimRequest:
    return SimRequest(
        request_id=name,
        arrival_s=at_s,
        prompt_tokens=prompt,
        output_tokens=out,
        max_output_tokens=most or out,
        task=task,
        block_hashes=tuple(hashes),
        patience_s=patience_s,
    )


class Lone:
    """An engine that is told things beforehand and then runs until it is idle."""

    def __init__(self, spec: EngineSpec = SPEC, parks: bool = False) -> None:
        self.engine = SimEngine(spec, parks=parks)
        self.tickets: dict[str, Ticket] = {}
        self.outputs: list[Output] = []
        self.reads: list[tuple[LeaseKey, float]] = []

    def start(
        self,
        name: str,
        prompt: int = 4,
        out: int = 3,
        at_s: float = 0.0,
        kind: Kind = Kind.WHOLE,
        hashes: Sequence[int] = (),
    ) -> None:
        asked = request(name, prompt, out, hashes=hashes)
        ticket = self.tickets.setdefault(name, Ticket(len(self.tickets), asked))
        lease = LeaseKey("p", 0, 0, 0) if kind is Kind.DECODE else None
        self.engine.start(at_s, Job(ticket, kind, lease))

    def run(self, until_s: float = math.inf) -> None:
        """To that time, or until the engine has nothing more to do."""
        while True:
            self.engine.plan()
            self.reads += self.engine.reads
            self.engine.reads.clear()
            if self.engine.next_s > until_s or self.engine.next_s == math.inf:
                return
            self.outputs += self.engine.advance(self.engine.next_s)

    def tokens_s(self, name: str) -> list[float]:
        """When each token of that request came that a client does not have from elsewhere."""
        ends_s = self.engine.log.ends_s()
        times: list[float] = []
        for piece in self.tickets[name].pieces:
            if isinstance(piece, float):
                times.append(piece)
            else:
                times += ends_s[piece[1] : piece[2]].tolist()
        return times

    def said(self, what: What) -> list[tuple[str, float]]:
        """What it said of that kind: of which request, and when."""
        return [(one.job.id, one.at_s) for one in self.outputs if one.what is what]

    @property
    def num_free(self) -> int:
        return self.engine.pool.num_free
