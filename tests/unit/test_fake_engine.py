"""The fake engine's hand-off, leases, settings and ways to fail."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

from tests.unit.fake_box import ROOMY, boxed, spec_of
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import (
    Aborted,
    LeaseId,
    LeasesEnded,
    LeasesOverdue,
    PullDone,
    Start,
)
from tinfer.worker.adapter import EngineRefusal
from tinfer.worker.fake_engine import EXIT_CHAOS, FakeEngine
from tinfer.worker.fake_kv import FakeKV
from tinfer.worker.fake_model import DIGEST_BYTES


def test_a_handoff_moves_blocks_and_ends_its_lease_once() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill()
        source = client.source
        assert source is not None
        assert (source.num_tokens, source.num_blocks, source.worker_id) == (10, 3, "p")
        assert box.p.stats().num_used_blocks == 3
        assert box.p.has_requests()
        box.decode("r")
        box.drain()
        assert client.answer == box.expected(client)
        assert client.cached == [0, 5]
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (True, 3 * DIGEST_BYTES)
        (ended,) = box.seen(LeasesEnded)
        assert ended.leases == [source.lease]
        assert ended.stats.num_used_blocks == 0
        stats = box.d.stats()
        assert (stats.num_pulls, stats.num_failed_pulls, stats.num_mapped_peers) == (1, 0, 1)
        assert (stats.num_computed_prompt_tokens, stats.num_recomputed_pulled_tokens) == (1, 0)
        box.assert_zero()


def test_the_pull_is_reported_before_the_first_output() -> None:
    with boxed(**ROOMY) as box:
        box.prefill()
        box.decode("r")
        assert box.d.step() == []
        assert [type(notice) for notice in box.d.take_notices()] == [PullDone]
        assert not box.d.was_idle_step()
        assert [output.num_output_tokens for output in box.d.step()] == [1]
        box.d.abort(["r"])


def test_a_prefill_that_ends_with_its_first_token() -> None:
    with boxed(**ROOMY) as box:
        every = list(range(512))
        assert box.prefill("t", stop_token_ids=every).end == ("stop", box.clients["t"].token_ids[0])
        assert box.p.stats().num_open_leases == 0
        letters = list("abcdefghijklmnoprstu ") + [chr(0x4E00 + n) for n in range(512)]
        stopped = box.prefill("s", stop=letters, seed=1)
        for seed in range(2, 50):  # until a first token has text of its own
            if stopped.end is not None:
                break
            assert stopped.source is not None
            box.p.release_lease(stopped.source.lease)
            stopped = box.prefill("s", stop=letters, seed=seed)
        assert stopped.end is not None
        assert stopped.end[0] == "stop"
        assert box.p.stats().num_open_leases > 0, "held, until the master releases it"
        box.drain()
        box.assert_zero()


def test_a_wrong_block_under_a_valid_lease_gives_a_wrong_answer() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill(max_tokens=20)
        assert client.source is not None
        box.spoil(client.source)
        box.decode("r")
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert not pulled.ok
        assert box.d.stats().num_failed_pulls == 1
        right = box.expected(client)
        assert client.token_ids[0] == right[0][0]
        assert client.token_ids[1:] != right[0][1:]
        box.assert_zero()


def test_a_reused_block_is_a_failed_load_and_a_recompute() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill()
        assert client.source is not None
        box.p.release_lease(client.source.lease)
        box.step(box.p)
        other = box.prefill("other", seed=3)  # the same blocks and slot table, another lease
        box.decode("r")
        while client.end is None:
            box.step(box.d)
        assert client.answer == box.expected(client)
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (False, 0)
        assert box.d.stats().num_recomputed_pulled_tokens == 9
        assert box.p.stats().num_open_leases == 1, "a late mark does not end the next lease"
        assert other.source is not None
        box.decode("other")
        box.drain()
        assert other.answer == box.expected(other)
        box.assert_zero()


def wait_for_wake(engine: FakeEngine) -> None:
    assert select.select([engine.wake_fd()], [], [], 20.0)[0], "the wake descriptor stays silent"


def test_a_lease_that_ends_during_the_copy_is_a_failed_load() -> None:
    with boxed(pull_block_s=0.01, **ROOMY) as box:
        client = box.prefill()
        assert client.source is not None
        box.decode("r")
        box.step(box.d)
        assert box.d.was_idle_step()
        box.p.release_lease(client.source.lease)
        box.step(box.p)
        wait_for_wake(box.d)
        box.d.clear_wake()
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.reason) == (False, "the lease ended during the copy")
        assert pulled.copy_s > 0
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_a_pull_runs_beside_the_steps() -> None:
    with boxed(pull_block_s=0.002, step_s=0.004, **ROOMY) as box:
        client = box.prefill()
        box.start("w", "whole", [1, 2, 3], SamplingSpec(max_tokens=40, ignore_eos=True))
        box.decode("r")
        box.drain()
        assert box.seen(PullDone)[0].ok
        assert client.answer == box.expected(client)
        assert box.clients["w"].answer == box.expected(box.clients["w"])


def test_an_abort_during_the_pull_keeps_the_blocks_until_it_ends() -> None:
    with boxed(pull_block_s=0.01, **ROOMY) as box:
        for request_id in ("r", "queued"):
            box.prefill(request_id)
            box.decode(request_id)
        box.step(box.d)
        box.d.abort(["r", "queued"])
        box.step(box.d)
        assert box.d.stats().num_used_blocks == 3, "the copy that runs still writes"
        assert box.seen(Aborted)[0].request_ids == ["r", "queued"]
        wait_for_wake(box.d)
        box.drain()
        assert {done.request_id: done.ok for done in box.seen(PullDone)} == {
            "r": True,
            "queued": False,
        }
        box.assert_zero()


def test_an_abort_or_refusal_before_the_pull_ends_the_lease() -> None:
    with boxed(refuse_prompt_tokens=10, **ROOMY) as box:
        first = box.prefill("r")
        box.decode("r")
        box.d.abort(["r"])
        second = box.prefill("too-long")
        second.prompt.append(1)
        with pytest.raises(EngineRefusal, match="refuse_prompt_tokens 10"):
            box.decode("too-long")
        box.drain()
        assert first.source is not None
        assert second.source is not None
        ended = [lease for notice in box.seen(LeasesEnded) for lease in notice.leases]
        assert sorted(ended, key=lambda lease: lease.slot) == [
            first.source.lease,
            second.source.lease,
        ]
        assert box.d.stats().num_pulls == 0
        box.assert_zero()


def test_injected_pull_failures_recompute() -> None:
    with boxed(fail_pull_rate=1.0, **ROOMY) as box:
        client = box.prefill()
        box.decode("r")
        box.drain()
        assert [done.ok for done in box.seen(PullDone)] == [False]
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_a_shorter_source_gives_its_whole_blocks() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill()
        client.prompt.extend([7, 7, 7])
        box.decode("r")
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (True, 2 * DIGEST_BYTES)
        assert box.d.stats().num_computed_prompt_tokens == 5
        box.assert_zero()


def test_a_source_of_less_than_a_block_is_let_go_of() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill()
        source = client.source
        assert source is not None
        box.decode("r", msgspec.structs.replace(source, num_tokens=3))
        box.drain()
        (pulled,) = box.seen(PullDone)
        assert (pulled.ok, pulled.num_bytes) == (False, 0)
        assert client.answer == box.expected(client)
        box.assert_zero()


def test_a_block_is_scrubbed_and_owned_once() -> None:
    kv = FakeKV(2)
    blocks = kv.allocate(1)
    assert blocks is not None
    kv.write(blocks[0], b"x" * DIGEST_BYTES)
    kv.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        kv.free(blocks)
    assert kv.allocate(3) is None
    assert kv.allocate(2) is not None
    assert [kv.read(block) for block in range(2)] == [bytes(DIGEST_BYTES)] * 2
    kv.close()


# --- leases and peers


def test_overdue_leases_are_reported_once_per_deadline_and_free_nothing() -> None:
    with boxed(ttl_s=0.0, **ROOMY) as box:
        client = box.prefill()
        assert client.source is not None
        lease = client.source.lease
        for _ in range(3):
            box.step(box.p)
        assert [notice.leases for notice in box.seen(LeasesOverdue)] == [[lease]]
        assert box.p.stats().num_used_blocks == 3
        box.p.extend_lease(lease, -1.0)
        box.step(box.p)
        assert len(box.seen(LeasesOverdue)) == 2
        box.p.extend_lease(lease, 60.0)
        box.p.release_lease(LeaseId(lease.slot, lease.generation + 1))
        box.step(box.p)
        assert box.p.stats().num_open_leases == 1
        box.p.release_lease(lease)
        box.drain()
        box.p.release_lease(lease)
        box.assert_zero()


def test_a_dropped_peer_is_unmapped_after_its_pulls() -> None:
    with boxed(pull_block_s=0.01, **ROOMY) as box:
        client = box.prefill()
        box.decode("r")
        box.step(box.d)
        box.d.drop_peer("p", 0)
        stats = box.d.stats()
        assert (stats.num_mapped_peers, stats.num_stale_mappings) == (1, 1)
        wait_for_wake(box.d)
        box.drain()
        stats = box.d.stats()
        assert (stats.num_mapped_peers, stats.num_stale_mappings) == (0, 0)
        assert client.answer == box.expected(client)
        assert box.seen(PullDone)[0].ok


def test_a_pull_from_an_unknown_peer_recomputes() -> None:
    with boxed(**ROOMY) as box:
        client = box.prefill()
        assert client.source is not None
        box.d.drop_peer("p", 0)
        box.decode("r")
        box.p.release_lease(client.source.lease)
        box.drain()
        assert client.answer == box.expected(client)
        assert "no worker p of generation 0" in box.seen(PullDone)[0].reason
        box.assert_zero()


def test_a_peer_with_other_blocks_is_not_read() -> None:
    with boxed(**ROOMY) as box:
        other = FakeEngine(spec_of({"block_tokens": 8}, "p", 1))
        box.d.add_peer("p", 1, other.ready().export)
        client = box.prefill()
        assert client.source is not None
        box.decode("r", msgspec.structs.replace(client.source, worker_generation=1))
        box.p.release_lease(client.source.lease)
        box.drain()
        other.close()
        assert "block_tokens" in box.seen(PullDone)[0].reason
        assert client.answer == box.expected(client)


# --- settings, refusals, chaos


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ({"num_blokcs": 3}, "num_blokcs"),
        ({"fail_pull_rate": 1.5}, "fail_pull_rate"),
        ({"num_blocks": 2.5}, "num_blocks"),
        ({"num_blocks": 2, "max_model_len": 100}, "hold no request of max_model_len 100"),
    ],
)
def test_bad_settings_are_refused_by_name(fake: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FakeEngine(spec_of(fake))


def test_settings_come_from_both_places() -> None:
    spec = spec_of({"num_blocks": 512.0})
    spec.engine_args.update(block_size=32, max_model_len=100)
    engine = FakeEngine(spec)
    ready = engine.ready()
    engine.close()
    assert (ready.num_blocks, ready.block_tokens, ready.max_model_len) == (512, 32, 100)
    assert (ready.max_num_seqs, ready.chunk_tokens, ready.engine) == (8, 16, "fake")


def test_refusals_say_whose_fault_it_is() -> None:
    with boxed(**ROOMY) as box:
        box.start("r", "whole", [1], SamplingSpec(max_tokens=3))
        bad: list[tuple[str, bytes, int, bool]] = [
            ("r", bytes(8), 3, False),
            ("empty", b"", 3, True),
            ("odd", bytes(6), 3, True),
            ("none", bytes(8), 0, True),
            ("long", bytes(4 * 512 * 4), 3, True),
        ]
        for request_id, prompt, max_tokens, client_fault in bad:
            with pytest.raises(EngineRefusal) as caught:
                box.d.start(Start(request_id, "whole", prompt, SamplingSpec(max_tokens=max_tokens)))
            assert caught.value.client_fault is client_fault
        box.drain()
        assert box.clients["r"].answer == box.expected(box.clients["r"])


def run_child(body: Callable[[], None]) -> int:
    """The exit code of a forked child that runs `body`."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_die_after_steps_ends_the_process_in_a_computing_step() -> None:
    def body() -> None:
        engine = FakeEngine(spec_of({"die_after_steps": 3}))
        for _ in range(5):
            engine.step()  # nothing to compute: these do not count
        engine.start(Start("r", "whole", bytes(8), SamplingSpec(max_tokens=9, ignore_eos=True)))
        num_outputs = sum(len(engine.step()) for _ in range(2))
        assert num_outputs == 2
        engine.step()

    assert run_child(body) == EXIT_CHAOS


def test_the_engine_needs_neither_torch_nor_vllm_nor_numpy() -> None:
    code = (
        "import sys, tinfer.worker.fake_engine\n"
        "print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
