"""The request log's lines, what is refused, and the way back to a workload."""

from __future__ import annotations

import io
from array import array
from pathlib import Path

import msgspec
import pytest

from tinfer.workloads import (
    SCHEMA_VERSION,
    Limits,
    LogRecord,
    Segment,
    WorkloadSpec,
    encode_record,
    from_log,
    make,
    prefix_segments,
    read_log,
    write_log,
)
from tinfer.workloads.replay import fitted

RECORD = LogRecord(
    request_id="r1",
    arrival_s=2.5,
    task="chat",
    session="s",
    turn=1,
    after="r0",
    segments=(Segment("a", 3), Segment("b", 2)),
    prompt_tokens=5,
    max_output_tokens=9,
    output_tokens=4,
    finish_reason="stop",
    ttft_s=0.25,
    e2el_s=1.0,
    itl_s=(0.25, 0.25, 0.25),
    route="split",
    workers=("w0", "w1"),
)


def bare(request_id: str, arrival_s: float, output_tokens: int = 3) -> LogRecord:
    return LogRecord(
        request_id=request_id,
        arrival_s=arrival_s,
        prompt_tokens=6,
        max_output_tokens=9,
        output_tokens=output_tokens,
    )


def test_a_line_holds_every_key() -> None:
    line = encode_record(RECORD)
    keys = msgspec.json.decode(line)
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    assert list(keys) == list(LogRecord.__struct_fields__)
    assert keys["segments"] == [["a", 3], ["b", 2]]
    assert (keys["schema_version"], keys["handoff_s"]) == (SCHEMA_VERSION, None)


def test_every_key_is_documented() -> None:
    assert LogRecord.__doc__ is not None
    documented = LogRecord.__doc__.split("`")[1::2]
    undocumented = set(LogRecord.__struct_fields__) - set(documented)
    assert undocumented == {"schema_version"}  # the module says what it is


def test_a_path_is_written_over_and_a_file_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    write_log(path, [RECORD, RECORD])
    write_log(str(path), [bare("r2", 0.0)])
    assert read_log(path) == [bare("r2", 0.0)]
    with path.open("ab") as file:
        write_log(file, [RECORD])
    with path.open("rb") as file:
        assert read_log(file) == [bare("r2", 0.0), RECORD]
        assert not file.closed


def test_a_later_version_is_readable() -> None:
    line = b"""
        {"request_id": "r", "arrival_s": 1, "prompt_tokens": 2, "max_output_tokens": 3,
         "output_tokens": 3, "schema_version": 7, "phase_of_the_moon": {"full": [true]}}
    """.replace(b"\n", b" ")
    [record] = read_log(io.BytesIO(b"\n" + line + b"\n\n"))
    assert (record.request_id, record.schema_version, record.ttft_s) == ("r", 7, None)


@pytest.mark.parametrize(
    "broken",
    [
        encode_record(RECORD)[:-20],
        b'{"request_id": "r"}\n',
        encode_record(RECORD).replace(b"2.5", b"-1"),
        b"\xff\n",
        b"[]\n",
    ],
)
def test_a_line_that_is_no_record_is_named(broken: bytes) -> None:
    with pytest.raises(ValueError, match="line 2 of the request log"):
        read_log(io.BytesIO(encode_record(RECORD) + broken))


def test_a_log_becomes_the_workload_that_it_came_from() -> None:
    requests = make(WorkloadSpec(name="chat", num_requests=50))
    records = [
        LogRecord(
            request_id=each.request_id,
            arrival_s=each.arrival_s + 100.0,
            task=each.task,
            tenant=each.tenant,
            session=each.session,
            turn=each.turn,
            after=each.after,
            segments=each.segments,
            prompt_tokens=each.prompt_tokens,
            max_output_tokens=each.output_tokens,
            output_tokens=each.output_tokens,
        )
        for each in reversed(requests)
    ]
    replayed = from_log(records)
    start_s = requests[0].arrival_s
    assert [each.arrival_s for each in replayed] == pytest.approx(
        [each.arrival_s - start_s for each in requests], abs=2e-6
    )
    assert [msgspec.structs.replace(each, arrival_s=0.0) for each in replayed] == [
        msgspec.structs.replace(each, arrival_s=0.0) for each in requests
    ]


def test_what_a_log_does_not_say_is_made_up_from_the_id() -> None:
    first, second = from_log([bare("b", 4.0, output_tokens=0), bare("a", 2.0)], speed=2.0)
    assert (first.request_id, first.arrival_s, first.output_tokens) == ("a", 0.0, 3)
    assert (second.request_id, second.arrival_s, second.output_tokens) == ("b", 1.0, 9)
    assert second.segments == (Segment("b", 6),)


def test_a_failed_request_is_replayed_as_it_was_asked() -> None:
    failed = msgspec.structs.replace(RECORD, error="the worker died", prompt_tokens=0)
    [asked] = from_log([failed])
    assert (asked.segments, asked.output_tokens) == (RECORD.segments, RECORD.max_output_tokens)


def test_an_answer_that_never_came_is_as_long_as_it_was_predicted() -> None:
    for predicted, tokens in ((3.4, 3), (0.2, 1), (700.0, 9), (None, 9)):
        refused = msgspec.structs.replace(
            bare("a", 0.0, output_tokens=0), error="full", predicted_output_tokens=predicted
        )
        [asked] = from_log([refused])
        assert asked.output_tokens == tokens


def tokens(*parts: tuple[int, int]) -> bytes:
    """Rows of (first token, number of tokens)."""
    return array("i", [first + i for first, num in parts for i in range(num)]).tobytes()


def test_prompts_as_hashes_share_what_their_tokens_share() -> None:
    one = prefix_segments(tokens((0, 1000), (5000, 70)), "one")
    other = prefix_segments(tokens((0, 1000), (7000, 300)), "other")
    assert [sum(part.num_tokens for part in parts) for parts in (one, other)] == [1070, 1300]
    shared = [part for part, same in zip(one, other, strict=False) if part == same]
    # To the last cut before the difference; equal seeds are equal tokens.
    assert sum(part.num_tokens for part in shared) == 960
    assert {part.seed for part in one} & {part.seed for part in other} == {
        part.seed for part in shared
    }
    # Nobody shares what lies behind the last cut.
    assert prefix_segments(tokens((0, 40)), "a")[1] == Segment("a", 8)
    assert prefix_segments(tokens((0, 31)), "a") == (Segment("a", 31),)
    assert prefix_segments(b"", "a") == ()


def test_the_number_of_hashes_is_bounded() -> None:
    for num, most in ((256, 8), (4096, 40), (1 << 20, 105)):
        segments = prefix_segments(tokens((0, num)), "own")
        assert sum(part.num_tokens for part in segments) == num
        assert len(segments) <= most


def test_what_is_not_in_the_log_is_not_waited_for() -> None:
    [alone] = from_log([RECORD])
    assert (alone.after, alone.turn) == (None, 1)
    _, later = from_log([bare("r0", 0.0), RECORD])
    assert later.after == "r0"


def test_limits_fit_a_replay_and_keep_what_is_shared() -> None:
    limits = Limits(length_scale=0.5, max_prompt_tokens=6, max_output_tokens=1)
    [fitted_one] = from_log([RECORD], limits=limits)
    assert (fitted_one.prompt_tokens, fitted_one.output_tokens) == (2, 1)
    shared = (Segment("system", 5), Segment("a", 1), Segment("b", 5))
    assert fitted(shared, limits) == (Segment("system", 2), Segment("a", 1), Segment("b", 3))
    assert fitted((Segment("system", 5), Segment("c", 90)), limits)[0] == Segment("system", 2)
    assert sum(part.num_tokens for part in fitted((Segment("c", 90),), limits)) == 6


def test_a_log_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="same request_id"):
        from_log([RECORD, RECORD])
    with pytest.raises(ValueError, match="speed = 0"):
        from_log([RECORD], speed=0.0)
    assert from_log([]) == []
