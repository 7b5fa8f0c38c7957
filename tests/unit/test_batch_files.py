"""The files of a batch: what a line asks for, what the output has already, and what is left."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tinfer.batch import requests, results
from tinfer.batch.lines import BadLine, Failure, Request, Response, Result, request_of
from tinfer.batch.requests import STANDARD_INPUT, Skipped, sorted_out, survey
from tinfer.errors import StartError

GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "x", "stream": False},
}
ANSWER = Response(200, "r", msgspec.Raw(b'{"id":"r"}'))
REFUSAL = Response(400, None, msgspec.Raw(b'{"error":{}}'))


def line(**changes: Any) -> bytes:
    """A good line with other fields; None leaves one out."""
    fields = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    return json.dumps(fields).encode() + b"\n"


def result(custom_id: str | None, response: Response | None = ANSWER, at: int = 0) -> bytes:
    """A line of output; without a response it is the error of line `at`, or a time-out."""
    error = None
    if response is None:
        error = Failure("invalid_method", "m", at) if at else Failure("timeout", "m")
    made = Result(f"batch_req_{custom_id}{at}", custom_id, response, error)
    return msgspec.json.encode(made) + b"\n"


def test_a_request_keeps_its_body_as_it_was_written() -> None:
    text = b'{"custom_id":"a","method":"POST","url":"/v1/a/b-c","body": {"n": 1.50, "x" : [1]}}'
    found = request_of(3, text)
    assert isinstance(found, Request)
    assert (found.line, found.custom_id, found.url) == (3, "a", "/v1/a/b-c")
    assert bytes(found.body) == b'{"n": 1.50, "x" : [1]}'


@pytest.mark.parametrize(
    ("text", "custom_id", "code"),
    [
        (b"nonsense", None, "invalid_json_line"),
        (b'{"custom_id":"a"', None, "invalid_json_line"),
        (b'{"custom_id":"\xff"}', None, "invalid_json_line"),
        (b'["a"]', None, "invalid_json_line"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "invalid_json_line"),
        (line(custom_id=None), None, "missing_required_parameter"),
        (line(custom_id=""), None, "invalid_parameter"),
        (line(custom_id=7), None, "invalid_parameter"),
        (line(method=None), "a", "missing_required_parameter"),
        (line(method="GET"), "a", "invalid_method"),
        (line(method="post"), "a", "invalid_method"),
        (line(url=None), "a", "missing_required_parameter"),
        (line(url=5), "a", "invalid_parameter"),
        (line(url="/health"), "a", "invalid_url"),
        (line(url="/v1"), "a", "invalid_url"),
        (line(url="/v1/"), "a", "invalid_url"),
        (line(url="/v1/../admin/drain"), "a", "invalid_url"),
        (line(url="/v1/%2e%2e/admin"), "a", "invalid_url"),
        (line(url="/v1/completions?x=1"), "a", "invalid_url"),
        (line(url="//evil/v1/completions"), "a", "invalid_url"),
        (line(url="http://evil/v1/completions"), "a", "invalid_url"),
        (line(url="/v1/completions\n"), "a", "invalid_url"),
        (line(body=None), "a", "missing_required_parameter"),
        (line(body=[1]), "a", "invalid_parameter"),
        (line(body="{}"), "a", "invalid_parameter"),
        (line(body={"stream": True}), "a", "stream_unsupported"),
    ],
)
def test_a_line_that_is_no_request_says_why(text: bytes, custom_id: str | None, code: str) -> None:
    found = request_of(9, text)
    assert isinstance(found, BadLine)
    assert (found.line, found.custom_id, found.code) == (9, custom_id, code)
    assert found.message.startswith("line 9: ") and len(found.message) < 300


def left(path: Path, text: bytes, retry_failed: bool = False) -> list[Any]:
    """What is to be done of this input with this output: ids, codes of errors, and what is not."""
    with results.opened(path, retry_failed) as record:
        found = [*sorted_out(io.BytesIO(text), record)]
        counts = survey(io.BytesIO(text), record)
    assert counts.num_requests == len(found)
    assert counts.num_skipped == sum(isinstance(one, Skipped) for one in found)
    assert counts.num_skipped_failed == found.count(Skipped(False))
    assert counts.num_to_send == sum(isinstance(one, Request) for one in found)
    return [
        one.custom_id
        if isinstance(one, Request)
        else one.code
        if isinstance(one, BadLine)
        else one.answered
        for one in found
    ]


INPUT = b"".join(
    [
        line(custom_id="a"),
        b"\n",
        line(custom_id="b"),
        line(custom_id="c", method="GET"),
        line(custom_id="a"),
        b"nonsense\n",
        line(custom_id="d").rstrip(),
    ]
)


def test_everything_is_left_of_no_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    wanted = ["a", "b", "invalid_method", "duplicate_custom_id", "invalid_json_line", "d"]
    assert left(path, INPUT) == wanted
    assert not path.exists(), "an empty output stays behind"


def test_what_has_a_result_is_skipped_and_failures_are_done_again_on_wish(tmp_path: Path) -> None:
    path = tmp_path / "out"
    duplicate = Result("batch_req_9", "a", None, Failure("duplicate_custom_id", "m", 5))
    written = [
        result("a"),
        result("b", REFUSAL),
        result("c", None, at=4),
        msgspec.json.encode(duplicate) + b"\n",
        result(None, None, at=6),
    ]
    path.write_bytes(b"".join(written))
    path.chmod(0o640)
    assert left(path, INPUT) == [True, False, False, False, False, "d"]
    assert path.read_bytes() == b"".join(written)
    again = [True, "b", "invalid_method", "duplicate_custom_id", "invalid_json_line", "d"]
    assert left(path, INPUT, retry_failed=True) == again
    assert path.read_bytes() == written[0], "answers stay, failures go"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


def test_an_error_of_another_line_without_an_id_is_not_this_ones(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(result(None, None, at=1))
    assert left(path, b"nonsense\nnonsense\n") == [False, "invalid_json_line"]


def test_a_line_that_has_been_put_right_counts_by_its_id(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(result("c", None, at=1))
    assert left(path, line(custom_id="c")) == [False]
    assert left(path, line(custom_id="c"), retry_failed=True) == ["c"]


def test_a_line_that_was_answered_and_is_broken_now_has_its_result(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(result("c"))
    assert left(path, line(custom_id="c", method="GET")) == [True]


@pytest.mark.parametrize("num_bytes", [1, 7, 30, len(result("b")) - 1])
def test_a_line_that_was_cut_short_is_done_again(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(result("a") + result("b")[:num_bytes])
    assert left(path, line(custom_id="a") + line(custom_id="b")) == [True, "b"]
    assert path.read_bytes() == result("a")


def test_results_are_appended_behind_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(result("a") + result("b")[:40])
    with results.opened(path, False) as record:
        record.write(Result("batch_req_c0", "c", ANSWER, None))
        assert path.read_bytes() == result("a") + result("c"), "each is there at once"


@pytest.mark.parametrize(
    "text",
    [
        b"my precious notes",
        b'{"precious": 1}',
        b"nonsense\n",
        b"{}\n",
        result("a") + b"\n" + result("b"),
        result("a") + b'{"custom_id": 1, "response": null, "error": null}\n',
    ],
)
def test_a_file_that_is_no_output_stays_as_it_is(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(text)
    for retry_failed in (False, True):
        with pytest.raises(StartError, match=f"{path} is no result of a batch"):
            left(path, INPUT, retry_failed)
        assert path.read_bytes() == text


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(result("a") + result("b", REFUSAL))
    with results.opened(path, True) as record:
        for retry_failed in (False, True):
            with pytest.raises(StartError, match="another run writes"):
                left(path, INPUT, retry_failed)
        record.write(Result("batch_req_c0", "c", ANSWER, None))
    assert path.read_bytes() == result("a") + result("c")


def test_a_link_to_the_output_stays_one(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "out"
    path.write_bytes(result("a") + result("b", REFUSAL))
    link.symlink_to(path)
    assert left(link, INPUT, retry_failed=True)[:2] == [True, "b"]
    assert link.is_symlink() and path.read_bytes() == result("a")


def test_what_is_no_file_cannot_be_an_output() -> None:
    with pytest.raises(StartError, match="/dev/null is no file"):
        left(Path("/dev/null"), INPUT)


def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(INPUT)))
    with requests.opened(STANDARD_INPUT) as file:
        assert [file.seek(0), file.read()] == [file.seek(0), file.read()] == [0, INPUT]
