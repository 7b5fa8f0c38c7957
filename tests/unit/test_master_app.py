"""What the master makes of workers that come up: pairs, roles, and the longest request."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import pytest

from tests.wire.samples import TO_MASTER
from tinfer.api.cors import Cors
from tinfer.api.keys import ApiKeys
from tinfer.api.service import Generation, ModelCard
from tinfer.config import load
from tinfer.core.sampling import SamplingSpec
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master import app
from tinfer.master.cores import CoreClaims, UsableCores
from tinfer.master.front import Front
from tinfer.master.host_memory import HostMemory
from tinfer.master.listener import bind
from tinfer.master.plan import Surroundings, decide
from tinfer.master.service import MasterService
from tinfer.master.supervisor import Life, WorkerSlot
from tinfer.wire.links import Incarnation
from tinfer.wire.messages import LeaseId, Output, Ready, Source, Step, WorkerStats

(READY,) = [message for message in TO_MASTER if isinstance(message, Ready)]
BF16, FP16 = {"dtype": "bfloat16"}, {"dtype": "float16"}


class NoProcesses:
    """Stands in for the supervisor: workers are ready when a test says so."""

    def __init__(self, config: Any, placements: list[Any], *_: object) -> None:
        self.slots = {p.worker_id: WorkerSlot(p) for p in placements}
        self.deaths: Counter[tuple[str, str]] = Counter()
        self.notes: set[str] = set()
        self.ended: dict[Incarnation, str] = {}
        self.import_s = None
        self.transport = ""

    def start_workers(self, transport: str) -> None:
        self.transport = transport

    def end_worker(self, slot: WorkerSlot, reason: str, cause: str) -> None:
        assert cause == "nonsense"
        self.ended[slot.incarnation] = reason

    def start_imports(self) -> None:
        return

    async def stop(self, _ask: Callable[[Incarnation], None]) -> None:
        return


class Master:
    """A server whose workers are only said to be there."""

    def __init__(self, **values: Any) -> None:
        config = load({"engine": "fake", "port": 0, **values})
        claims = CoreClaims(UsableCores((0,), 1), prefix="tinfer-test-master-app-")
        decision = decide(config, Surroundings(claims, [], HostMemory(1 << 40, 1 << 40)))
        claims.close()
        front = Front(bind("127.0.0.1", 0), None, ApiKeys(), Cors())
        self.server = app.Server(config, decision, front)
        stand_in: Any = self.server._supervisor
        self.slots: dict[str, WorkerSlot] = stand_in.slots
        self.ended: dict[Incarnation, str] = stand_in.ended

    def up(self, worker_id: str, kv_format: Mapping[str, str], max_model_len: int = 64) -> None:
        slot = self.slots[worker_id]
        slot.generation += 1
        slot.life = Life.READY
        slot.ready = msgspec.structs.replace(
            READY, kv_format=dict(kv_format), max_model_len=max_model_len
        )
        self.server._worker_up(slot)

    def down(self, worker_id: str) -> None:
        slot = self.slots[worker_id]
        slot.life = Life.DEAD
        self.server._worker_down(slot.incarnation)

    def roles(self) -> dict[str, str]:
        snapshot = self.server._scheduler.workers_snapshot()
        return {worker.worker_id: worker.role.value for worker in snapshot}


@pytest.fixture
async def masters(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Master]]:
    monkeypatch.setattr(app, "Supervisor", NoProcesses)
    made: list[Master] = []

    def make(**values: Any) -> Master:
        made.append(Master(**values))
        return made[-1]

    yield make
    for master in made:
        await master.server.close()


MakeMaster = Callable[..., Master]


@pytest.mark.parametrize(
    ("asked", "started_before"),
    [
        ({}, True),
        ({"tool_call_parser": "hermes"}, True),
        ({"tool_call_parser": "hermes", "enable_auto_tool_choice": True}, False),
        ({"reasoning_parser": "qwen3"}, False),
    ],
)
async def test_a_parser_that_cannot_be_had_costs_no_start_of_an_engine(
    masters: MakeMaster,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    started_before: bool,
) -> None:
    async def refuse(*_: object) -> None:
        raise StartError("no such parser")

    monkeypatch.setattr(app, "load_parsers", refuse)
    master = masters(**asked)
    with pytest.raises(StartError, match="no such parser"):
        await master.server.start()
    stand_in: Any = master.server._supervisor
    assert bool(stand_in.transport) == started_before


async def test_workers_count_once_all_are_there(masters: MakeMaster) -> None:
    master = masters()
    master.up("prefill-0", BF16)
    assert master.roles() == {}
    assert not master.server._all_ready.done()
    master.up("decode-0", BF16)
    assert master.roles() == {"prefill-0": "prefill", "decode-0": "decode"}
    assert master.server._all_ready.done()
    assert master.server._supervisor.notes == set()


async def test_a_worker_that_dies_before_the_others_are_there(masters: MakeMaster) -> None:
    master = masters()
    master.up("prefill-0", BF16)
    master.down("prefill-0")
    master.up("decode-0", BF16)
    assert master.roles() == {}
    master.up("prefill-0", BF16)
    assert master.roles() == {"prefill-0": "prefill", "decode-0": "decode"}


async def test_workers_whose_blocks_differ_are_not_paired(masters: MakeMaster) -> None:
    master = masters(prefill=2)
    master.up("prefill-0", BF16)
    master.up("prefill-1", FP16)
    master.up("decode-0", BF16)
    assert master.roles() == {"prefill-0": "prefill", "prefill-1": "whole", "decode-0": "decode"}
    (note,) = master.server._supervisor.notes
    assert note.startswith("prefill-1 is not paired and computes whole requests only: dtype")


async def test_no_pair_at_all_serves_whole_requests_unless_asked_to_split(
    masters: MakeMaster,
) -> None:
    master = masters()
    master.up("prefill-0", BF16)
    master.up("decode-0", FP16)
    assert master.server._scheduler._fleet.split_sources == []
    assert any("every worker" in note for note in master.server._supervisor.notes)
    strict = masters(route="split")
    strict.up("prefill-0", BF16)
    strict.up("decode-0", FP16)
    with pytest.raises(StartError, match="--route split: KV blocks of prefill-0 and decode-0"):
        strict.server._all_ready.result()


async def test_the_next_incarnation_is_paired_only_if_it_fits(masters: MakeMaster) -> None:
    master = masters()
    master.up("prefill-0", BF16)
    master.up("decode-0", BF16)
    for kv_format, role in ((FP16, "whole"), (BF16, "decode")):
        master.down("decode-0")
        master.up("decode-0", kv_format)
        assert master.roles()["decode-0"] == role


async def test_a_role_that_was_changed_outlasts_its_worker(masters: MakeMaster) -> None:
    master = masters(prefill=1, decode=2)
    for name in master.slots:
        master.up(name, BF16)
    dispatcher = master.server._dispatcher
    dispatcher.ask_role(master.slots["decode-1"].incarnation, Role.PREFILL)
    for kv_format, role in ((BF16, "prefill"), (FP16, "whole"), (BF16, "decode")):
        master.down("decode-1")
        master.up("decode-1", kv_format)
        assert master.roles()["decode-1"] == role
        shown = dispatcher.changed_roles
        assert shown == ({"decode-1": Role.PREFILL} if role == "prefill" else {})


@pytest.mark.parametrize("has_cache", [True, False])
async def test_without_a_prefix_cache_no_prefix_is_taken_for_cached(
    masters: MakeMaster, has_cache: bool
) -> None:
    master = masters(prefill=1, decode=1, route="split", enable_prefix_caching=has_cache)
    for name in master.slots:
        master.up(name, BF16)
    prompt = list(range(4 * READY.block_tokens))
    for name in ("first", "again"):
        generation = Generation(prompt, SamplingSpec(max_tokens=8))
        master.server._dispatcher.submit(name, generation)
    outstanding = {
        worker.worker_id: worker.outstanding_prefill_tokens
        for worker in master.server._scheduler.workers_snapshot()
    }
    assert outstanding["prefill-0"] == len(prompt) + (1 if has_cache else len(prompt))


async def test_the_longest_request_is_the_least_of_all_workers_also_after_a_restart(
    masters: MakeMaster,
) -> None:
    master = masters()
    server = master.server
    master.up("prefill-0", BF16)
    master.up("decode-0", BF16)
    card = ModelCard(names=("m",), root="/m", max_model_len=64, vocab_size=9, created_s=0)
    server._service = service = MasterService(
        server._dispatcher,
        server._scheduler,
        server._supervisor,
        server._rolling,
        card,
        server._lag,
        server._run_dir.path.name,
    )
    for max_model_len, served in ((100, 64), (48, 48), (64, 48)):
        master.down("decode-0")
        master.up("decode-0", BF16, max_model_len)
        assert service.model.max_model_len == served


async def test_a_worker_whose_words_do_not_add_up_is_ended(masters: MakeMaster) -> None:
    """It opens the same lease twice."""
    master = masters()
    for worker_id in ("prefill-0", "decode-0"):
        master.up(worker_id, BF16)
    server, ended = master.server, master.ended
    prefill = master.slots["prefill-0"].incarnation
    source = Source(*prefill, LeaseId(0, 1), num_tokens=3, num_blocks=1, blocks=b"")
    output = Output("gone", [7], 1, "a", 1, finish_reason="length", source=source)
    server._on_message(prefill, Step([output], WorkerStats()))
    assert ended == {}
    again = Output("other", [7], 1, "a", 1, finish_reason="length", source=source)
    server._on_message(prefill, Step([again], WorkerStats()))
    assert list(ended) == [prefill]
    assert "LedgerError" in ended[prefill]
