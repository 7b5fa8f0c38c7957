"""The load generator against a real server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.api.wayward import (
    DONE,
    Wayward,
    event,
    hang,
    piece,
    refuse,
    reset,
    status,
    stream,
    usage,
    wayward,
)
from tinfer.bench.outcome import LoadRun, Outcome, Planned
from tinfer.bench.sender import Sender, open_session


@pytest.fixture
async def server() -> AsyncIterator[Wayward]:
    async with wayward() as made:
        yield made


def planned(request_id: str, at_s: float = 0.0, after: str | None = None) -> Planned:
    return Planned(
        request_id=request_id,
        planned_s=at_s,
        body=b'{"id":"%b"}' % request_id.encode(),
        prompt_tokens=3,
        output_tokens=2,
        after=after,
    )


async def sent(
    server: Wayward,
    *plan: Planned,
    max_concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    ended: list[Outcome] | None = None,
) -> LoadRun:
    told: list[Outcome] = [] if ended is None else ended
    async with open_session({"X-Mine": "1"}, max_concurrency) as session:
        sender = Sender(session, server.url + "/v1/completions", max_concurrency, told.append)
        return await sender.run(plan, stop)


async def one(server: Wayward) -> Outcome:
    (outcome,) = (await sent(server, planned("a"))).outcomes
    assert outcome.end_s >= outcome.sent_s >= outcome.due_s == 0.0
    return outcome


GOOD = stream(piece("x"), piece("y", finish_reason="length"), usage(2), DONE)


async def test_a_whole_answer(server: Wayward) -> None:
    server.does(GOOD)
    ended: list[Outcome] = []
    run = await sent(server, planned("a"), ended=ended)
    (outcome,) = run.outcomes
    assert ended == [outcome]
    assert outcome.ok and outcome.status == 200 and outcome.finish_reason == "length"
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.has_usage) == (2, 2, True)
    assert len(outcome.chunk_s) == 2
    assert outcome.sent_s < outcome.chunk_s[0] <= outcome.chunk_s[1] <= outcome.end_s
    assert outcome.end_s <= run.duration_s
    assert run.cpu_s > 0 and not run.interrupted and run.num_not_sent == 0
    (seen,) = server.seen
    assert (seen.method, seen.path, seen.body) == ("POST", "/v1/completions", {"id": "a"})
    assert seen.headers["X-Mine"] == "1"
    assert seen.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_pieces_may_be_cut_anywhere(server: Wayward, size: int) -> None:
    said = b": ping\r\n\r\n" + piece('ü "choices":[]\n\n') + piece("y").replace(b"\n", b"\r\n")
    said += b"event: message\n" + usage(5) + DONE
    server.does(stream(*(said[at : at + size] for at in range(0, len(said), size))))
    outcome = await one(server)
    assert (outcome.error, outcome.output_tokens, len(outcome.chunk_s)) == (None, 5, 2)


async def test_usage_may_come_with_the_last_token_and_the_last_line_may_lack_its_end(
    server: Wayward,
) -> None:
    last = event(
        choices=[{"index": 0, "text": "y", "finish_reason": "stop"}],
        usage={
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    )
    server.does(stream(piece("x"), last, DONE.rstrip()))
    outcome = await one(server)
    assert outcome.ok
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (7, 2, 4)


async def test_without_usage_chunks_are_counted_and_it_is_said(server: Wayward) -> None:
    server.does(stream(piece("x"), piece("y"), piece("z"), DONE))
    outcome = await one(server)
    assert outcome.ok and not outcome.has_usage
    assert (outcome.prompt_tokens, outcome.output_tokens) == (3, 3)


async def test_the_trace_is_kept(server: Wayward) -> None:
    server.does(stream(piece("x"), event(choices=[{}], tinfer={"route": "split"}), DONE))
    assert (await one(server)).trace == {"route": "split"}


@pytest.mark.parametrize("number", [429, 503])
async def test_a_refusal_is_kept_in_the_servers_words(server: Wayward, number: int) -> None:
    server.does(refuse(number, "come  back\nlater", "TooManyRequestsError"))
    outcome = await one(server)
    assert (outcome.ok, outcome.status, outcome.error) == (False, number, "come back later")


@pytest.mark.parametrize(
    ("text", "error"), [("<b>Bad</b> gateway", "<b>Bad</b> gateway"), ("", "Bad Gateway")]
)
async def test_a_refusal_without_openais_shape(server: Wayward, text: str, error: str) -> None:
    server.does(status(502, text))
    outcome = await one(server)
    assert (outcome.status, outcome.error) == (502, error)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ((piece("x"), event(error={"message": "the engine broke"}), DONE), "the engine broke"),
        ((event(error={"message": "at once"}), DONE), "at once"),
        ((b"data: {]\n\n",), "no completion chunk"),
        ((b'data: {"choices": 5}\n\n',), "no completion chunk"),
        ((b"data: \xff\n\n",), "no completion chunk"),
        ((DONE,), "before the first token"),
        ((), "before the first token"),
        ((piece("x"),), "before the answer did"),
        ((piece("x"), usage(1)), "before the answer did"),
        ((piece("x"), None), "ClientPayloadError"),
    ],
)
async def test_a_stream_that_fails_midway_is_no_answer(
    server: Wayward, said: tuple[bytes | None, ...], error: str
) -> None:
    server.does(stream(*said))
    outcome = await one(server)
    assert outcome.status == 200 and not outcome.ok and not outcome.interrupted
    assert error in (outcome.error or "")


async def test_an_event_that_never_ends_is_given_up(
    server: Wayward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinfer.bench.stream.MAX_EVENT_BYTES", 1000)
    server.does(stream(b"data: " + b"x" * 2000, None))
    assert "more than 1000 bytes" in ((await one(server)).error or "")


async def test_a_connection_that_breaks_at_once(server: Wayward) -> None:
    server.does(reset)
    outcome = await one(server)
    assert outcome.status is None and "ServerDisconnectedError" in (outcome.error or "")


async def test_nobody_there() -> None:
    async with open_session({}, None) as session:
        run = await Sender(session, "http://127.0.0.1:9/v1/completions").run([planned("a")])
    (outcome,) = run.outcomes
    assert outcome.status is None and "ClientConnectorError" in (outcome.error or "")


async def test_an_unanswered_request_holds_no_other_one_back(server: Wayward) -> None:
    gate = asyncio.Event()
    server.does(stream(gate, piece("x"), DONE), GOOD, GOOD)
    task = asyncio.create_task(sent(server, *(planned(str(i), at_s=0.01 * i) for i in range(3))))
    for _ in range(3):
        await server.arrived.get()
    gate.set()
    run = await task
    assert [outcome.ok for outcome in run.outcomes] == [True] * 3
    assert [outcome.due_s for outcome in run.outcomes] == [0.0, 0.01, 0.02]
    assert all(outcome.lag_s >= 0 and outcome.queue_s < 0.5 for outcome in run.outcomes)


async def test_the_wait_for_a_place_is_queue_time_and_not_lag(server: Wayward) -> None:
    gate = asyncio.Event()
    server.does(stream(gate, piece("x"), DONE), GOOD)
    task = asyncio.create_task(sent(server, planned("a"), planned("b"), max_concurrency=1))
    await server.arrived.get()
    assert server.arrived.empty()
    gate.set()
    first, second = (await task).outcomes
    assert second.sent_s >= first.end_s
    assert second.queue_s == pytest.approx(second.sent_s - second.due_s - second.lag_s)
    assert second.queue_s >= first.e2el_s - second.lag_s - first.lag_s


async def test_a_later_turn_waits_for_the_one_before(server: Wayward) -> None:
    server.does(GOOD, status(500, "no"), GOOD)
    run = await sent(server, planned("c", 0.0, "b"), planned("b", 0.0, "a"), planned("a", 0.0))
    third, second, first = run.outcomes
    assert [seen.body["id"] for seen in server.seen] == ["a", "b", "c"]
    assert (first.due_s, second.due_s, third.due_s) == (0.0, first.end_s, second.end_s)
    assert not second.ok and third.ok


async def test_a_later_turn_is_not_due_before_its_time(server: Wayward) -> None:
    server.does(GOOD, GOOD)
    run = await sent(server, planned("a"), planned("b", 0.3, "a"))
    assert run.outcomes[1].due_s == 0.3 <= run.outcomes[1].sent_s


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        ((planned("a"), planned("a")), "same id"),
        ((planned("a", 0.0, "z"),), "'z'"),
        ((planned("a", 0.0, "b"), planned("b", 0.0, "a")), "each other"),
    ],
)
async def test_a_plan_that_does_not_add_up(plan: tuple[Planned, ...], word: str) -> None:
    async with open_session({}, None) as session:
        with pytest.raises(ValueError, match=word):
            await Sender(session, "http://127.0.0.1:9/").run(plan)


async def test_a_stop_keeps_what_came(server: Wayward) -> None:
    server.does(GOOD, stream(piece("x"), asyncio.Event()), hang)
    stop = asyncio.Event()
    ended: list[Outcome] = []
    plan = [*(planned(name, 0.05 * i) for i, name in enumerate("abc")), planned("later", 3600.0)]
    task = asyncio.create_task(sent(server, *plan, planned("d", 0.0, "b"), stop=stop, ended=ended))
    for _ in range(3):
        last = await server.arrived.get()
    stop.set()
    run = await task
    whole, cut, unanswered = run.outcomes
    assert run.interrupted and run.num_not_sent == 2
    assert whole.ok and not whole.interrupted and ended == [whole]
    assert cut.interrupted and unanswered.interrupted and not cut.ok
    assert cut.error is unanswered.error is None
    await last.left.wait()


async def test_an_outer_cancellation_passes_through(server: Wayward) -> None:
    server.does(hang)
    task = asyncio.create_task(sent(server, planned("a")))
    seen = await server.arrived.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await seen.left.wait()


async def test_a_fault_of_ours_is_no_failed_request(server: Wayward) -> None:
    def broken(outcome: Outcome) -> None:
        raise RuntimeError("a bug")

    server.does(GOOD)
    async with open_session({}, None) as session:
        with pytest.raises(ExceptionGroup):
            await Sender(session, server.url + "/v1/completions", None, broken).run([planned("a")])
