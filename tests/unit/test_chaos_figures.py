"""What the chaos benchmark says of answers, stalls and phases."""

from __future__ import annotations

import pytest

from benchmarks.chaos_clients import Answer, Asked, Verdict, compared, judged
from benchmarks.chaos_figures import bucket_name, form_of, stall_s
from benchmarks.chaos_follow import Follower, Loss
from tests.process.load import Choice
from tinfer.core import events as ev
from tinfer.core.types import Capacity, LeaseKey, Role
from tinfer.wire.links import Incarnation

RIGHT: Answer = ([5, 6, 7, 8, 9], "abcde", "length", None)


@pytest.mark.parametrize(
    ("token_ids", "text", "verdict"),
    [
        ([5, 6, 7, 8, 9], "abcde", "right"),
        ([5, 6, 7, 8], "abcd", "lost"),
        ([5, 6, 7, 6, 7, 8, 9], "abcbcde", "repeated"),
        ([5, 6, 7, 7, 8, 9], "abccde", "repeated"),
        ([5, 6, 8, 9], "abde", "changed"),
        ([5, 6, 7, 8, 3], "abcdx", "changed"),
        ([5, 6, 7, 8, 9], "abcd", "text"),
    ],
)
def test_every_way_to_be_wrong_has_a_name(
    token_ids: list[int], text: str, verdict: Verdict
) -> None:
    choice = Choice(token_ids, text, finish_reason="length")
    assert compared(choice, RIGHT, is_cut=False) == verdict


def test_of_an_answer_that_was_left_the_head_is_compared() -> None:
    assert compared(Choice([5, 6], "ab"), RIGHT, is_cut=True) == "right"
    assert compared(Choice([5, 7], "ac"), RIGHT, is_cut=True) == "changed"
    assert compared(Choice([5, 6], "abx"), RIGHT, is_cut=True) == "text"


def answered(**body: object) -> Asked:
    one = Asked("/v1/completions", {"stream": True, **body}, [Choice()], status=200, done=True)
    one.choices[0] = Choice([5, 6, 7, 8, 9], "abcde", "length", None, [1])
    return one


class OneAnswer:
    """A load of which only what is expected is asked."""

    def draw(self, rng: object) -> Asked:
        return answered()

    def expected(self, asked: Asked, index: int) -> Answer:
        return RIGHT


def test_an_answer_counts_as_right_only_with_its_end_and_its_usage() -> None:
    one = answered()
    assert judged(one, OneAnswer()) == "right"
    one.usage = {"completion_tokens": 6}
    assert judged(one, OneAnswer()) == "usage"
    one.done = False
    assert judged(one, OneAnswer()) == "failed"


def test_a_stall_is_between_what_the_client_had_and_what_came_next() -> None:
    one = answered()
    one.seen = [(1.0, 1), (1.1, 2), (3.5, 4), (3.6, 5)]
    assert stall_s(one, 2, 1.2) == pytest.approx(2.4)
    assert stall_s(one, 3, 1.2) == pytest.approx(2.4), "two tokens came at once"
    assert stall_s(one, 0, 0.25) == pytest.approx(0.75)
    assert stall_s(one, 5, 4.0) is None
    one.is_slow = True
    assert stall_s(one, 2, 1.2) is None


def test_buckets_hold_every_number_once() -> None:
    names = [bucket_name(number) for number in range(600)]
    assert list(dict.fromkeys(names)) == ["0", "1-8", "9-32", "33-128", "129-512", "over 512"]
    assert (names[8], names[9], names[512], names[513]) == ("1-8", "9-32", "129-512", "over 512")


def test_a_form_is_told_by_the_request_and_by_how_it_went_on() -> None:
    lost = Loss("r", "decoding", 9, "again")
    assert form_of(lost, answered()) == "fast"
    assert form_of(lost, answered(seed=3)) == "exact"
    assert form_of(Loss("r", "prefilling", 0, "again"), answered()) == "from the start"
    assert form_of(Loss("r", "copying", 1, "held"), answered(seed=3)) == "held"


def test_a_request_is_followed_through_its_phases_and_its_workers_deaths() -> None:
    follower = Follower()
    p, d, e = (Incarnation(name, 1) for name in "pde")
    capacity = Capacity(num_blocks=8, block_tokens=8, max_num_seqs=8, chunk_tokens=8)
    for worker, role in ((p, Role.PREFILL), (d, Role.DECODE), (e, Role.DECODE)):
        follower.take(0.0, ev.WorkerUp(*worker, role, capacity), [])
    lease = LeaseKey("p", 1, 0, 1)
    follower.take(1.0, ev.Arrived("r", 8, 8), [])
    follower.take(2.0, ev.Tick(), [ev.StartPrefill("r", *p)])
    follower.take(3.0, ev.Prefilled("r", *p, lease, 1), [])
    assert [one.request_id for one in follower.ids_on(p)] == ["r"]
    follower.take(4.0, ev.Tick(), [ev.StartDecode("r", *d, lease)])
    follower.take(5.0, ev.WorkerDown(*d), [])
    follower.take(5.5, ev.Tick(), [ev.StartDecode("r", *e, lease)])
    follower.take(6.0, ev.Pulled("r", *e, True), [])
    left = ev.Remainder("r", 8, 8, 5)
    follower.take(7.0, ev.WorkerDown(*e, (left,)), [ev.StartWhole("r", *p)])
    follower.take(8.0, ev.WorkerUp("e", 2, Role.DECODE, capacity), [])
    (request,) = follower.requests.values()
    moments = {0.5: "queued", 2.5: "prefilling", 3.0: "handoff", 4.5: "copying", 6.5: "decoding"}
    assert {at: request.phase_at(at) for at in moments} == moments
    first, second = follower.deaths.values()
    assert first.losses == [Loss("r", "copying", 0, "held")]
    assert second.losses == [Loss("r", "decoding", 5, "again")]
    assert (first.up_s, second.up_s) == (None, 8.0)
    follower.take(9.0, ev.WorkerFinished("r", *p, answered=True), [])
    assert request.is_over and not follower.requests
