"""The client without a socket: bodies, addresses, waits between attempts, sums over a stream."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinfer
from tinfer.api.schemas import ChatRequest, CompletionRequest
from tinfer.client import errors, results
from tinfer.client.connection import server_url
from tinfer.client.params import CHAT_NAMES, COMPLETION_NAMES, ChatParams, as_messages, body
from tinfer.client.retries import MAX_DELAY_S, MAX_RETRY_AFTER_S, Retries, retry_after_s
from tinfer.client.stream import StreamedAnswer

NOW = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_what_is_not_given_is_not_sent() -> None:
    assert body({"prompt": "a"}, {}, COMPLETION_NAMES, None) == {"prompt": "a"}
    params = {"max_tokens": 0, "stop": None, "temperature": 0.0, "ignore_eos": False}
    assert body({"prompt": "a"}, params, COMPLETION_NAMES, None) == {
        "prompt": "a",
        "max_tokens": 0,
        "temperature": 0.0,
        "ignore_eos": False,
    }


def test_extra_fields_win_and_are_sent_as_they_are() -> None:
    extra = {"new_field": [1], "model": "b", "stop": None}
    asked = body({"prompt": "a"}, {"model": "a"}, COMPLETION_NAMES, extra)
    assert asked == {"prompt": "a", "model": "b", "new_field": [1], "stop": None}


def test_a_wrong_name_is_an_error_with_a_hint() -> None:
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        body({}, {"temprature": 1.0}, CHAT_NAMES, None)
    with pytest.raises(TypeError, match=r"'zzz' \(other fields"):
        body({}, {"zzz": 1.0}, CHAT_NAMES, None)


@pytest.mark.parametrize(
    ("request_type", "names"), [(CompletionRequest, COMPLETION_NAMES), (ChatRequest, CHAT_NAMES)]
)
def test_every_parameter_is_one_of_the_server(request_type: Any, names: frozenset[str]) -> None:
    """Of the server's fields, only those that the client sets itself are missing."""
    served = {field.encode_name for field in msgspec.structs.fields(request_type)}
    own = {"prompt", "messages", "stream", "stream_options", "return_prompt_text"}
    assert names <= served
    assert served - names <= own
    assert set(get_type_hints(ChatParams)) == CHAT_NAMES


def test_a_string_is_one_message_of_the_user() -> None:
    assert as_messages("hi") == [{"role": "user", "content": "hi"}]
    assert as_messages(({"role": "system", "content": "x"},)) == [
        {"role": "system", "content": "x"}
    ]


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://host/prefix/v1/", "https://host/prefix"),
        ("localhost:80", "http://localhost:80"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(given_url: str, url: str) -> None:
    assert server_url(given_url) == url
    assert tinfer.Client(given_url).base_url == tinfer.AsyncClient(given_url).base_url == url


@pytest.mark.parametrize(
    "bad", ["", "http://", "ftp://host", "http://[::1", "http://a b", "http://h:99999", "h:x"]
)
def test_what_is_no_address(bad: str) -> None:
    with pytest.raises(ValueError, match="not the address of a server"):
        server_url(bad)


RETRIED = [
    errors.ConnectionFailed("refused", retryable=True),
    errors.RequestTimeout("connect"),
    errors.Overloaded(429, "full"),
    errors.ServerUnavailable(502, "down"),
    errors.ServerUnavailable(503, "down"),
]
NOT_RETRIED = [
    errors.ConnectionFailed("broke in the middle"),
    errors.RequestTimeout("total"),
    errors.RequestTimeout("first token"),
    errors.ApiError(500, "worker lost"),
    errors.BadRequest(400, "no", retry_after_s=1.0),
    errors.NotFound(404, "no"),
    errors.StreamBroken("broke", "text"),
    errors.UnexpectedAnswer("html"),
]


@pytest.mark.parametrize("error", RETRIED, ids=repr)
def test_waits_double_up_to_a_bound(error: errors.TinferClientError) -> None:
    retries = Retries(num_retries=2000, base_delay_s=0.5, rng=random.Random(1))
    for attempt in (0, 1, 2, 3, 4, 10, 1999):
        longest = min(MAX_DELAY_S, 0.5 * 2 ** min(attempt, 10))
        waits = [retries.delay_s(attempt, error) for _ in range(20)]
        assert all(wait is not None and longest / 2 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 1, "no jitter"
    assert retries.delay_s(2000, error) is None
    assert Retries(num_retries=0).delay_s(0, error) is None


@pytest.mark.parametrize("error", NOT_RETRIED, ids=repr)
def test_what_may_have_begun_or_cannot_succeed_is_not_repeated(
    error: errors.TinferClientError,
) -> None:
    assert Retries(num_retries=5).delay_s(0, error) is None


@given(st.floats(0, MAX_RETRY_AFTER_S), st.integers())
def test_a_server_is_not_asked_before_the_time_it_names(wait_s: float, seed: int) -> None:
    retries = Retries(rng=random.Random(seed))
    delay_s = retries.delay_s(0, errors.Overloaded(429, "full", retry_after_s=wait_s))
    assert delay_s is not None and wait_s <= delay_s <= wait_s * 1.1


def test_a_server_that_names_a_far_time_is_not_asked_again() -> None:
    error = errors.Overloaded(429, "full", retry_after_s=MAX_RETRY_AFTER_S + 1)
    assert Retries().delay_s(0, error) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.25", 0.25),
        ("-3", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("Sat, 02 Jan 2027 03:04:35 GMT", 30.0),
        ("Sat, 02 Jan 2027 03:04:35 -0000", 30.0),
        ("Fri, 01 Jan 2027 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, NOW) == seconds
    assert retry_after_s(header, NOW + timedelta(days=999)) in (seconds, 0.0)


def test_every_status_has_its_class() -> None:
    known = {status: errors.error_class(status).__name__ for status in range(300, 600)}
    assert {status: name for status, name in known.items() if name != "ApiError"} == {
        400: "BadRequest",
        401: "Unauthorized",
        403: "Unauthorized",
        404: "NotFound",
        413: "BadRequest",
        422: "BadRequest",
        429: "Overloaded",
        502: "ServerUnavailable",
        503: "ServerUnavailable",
        504: "ServerUnavailable",
    }


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    doc = errors.__doc__ or ""
    classes = [
        found
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.TinferClientError)
    ]
    assert len(classes) == 11
    for found in classes:
        assert found.__name__ in doc
        assert getattr(tinfer.client, found.__name__) is found


def chunk(**fields: Any) -> results.CompletionDelta:
    return results.CompletionDelta(**fields)


def test_times_of_an_answer() -> None:
    answer = StreamedAnswer()
    answer.add(chunk(), 0.5)  # a role, or a comment: no token
    assert msgspec.to_builtins(answer)["ttft_s"] is None
    answer.add(chunk(text="a"), 1.0)
    answer.add(chunk(token_ids=[5]), 1.5)  # a token whose text is still held back
    answer.add(chunk(text="bc", token_ids=[6, 7]), 3.5)
    answer.add(chunk(finish_reason="stop", stop_reason=9), 4.0)
    assert (answer.text, answer.token_ids) == ("abc", [5, 6, 7])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", 9)
    assert (answer.ttft_s, answer.last_s, answer.itl_s) == (1.0, 3.5, [0.5, 2.0])


def test_an_answer_without_tokens_has_the_time_of_its_end() -> None:
    answer = StreamedAnswer()
    answer.add(chunk(finish_reason="stop"), 2.0)
    assert (answer.text, answer.ttft_s, answer.last_s, answer.itl_s) == ("", 2.0, 2.0, [])


def test_a_newer_and_an_older_server_can_be_read() -> None:
    said = b'{"choices":[{"text":"a","new":1}],"tinfer":{"route":"split"},"later":{}}'
    newer = msgspec.json.decode(said, type=results.Completion)
    assert (newer.text, newer.tinfer, newer.usage) == ("a", {"route": "split"}, None)
    said = b'{"choices":[{"message":{"content":null}}],"usage":{"completion_tokens":null}}'
    chat = msgspec.json.decode(said, type=results.ChatCompletion)
    assert (chat.text, chat.message.role, chat.finish_reason) == ("", "assistant", None)
    none = msgspec.json.decode(b'{"choices":[]}', type=results.ChatCompletion)
    assert (none.text, none.token_ids) == ("", None)


def test_the_clients_are_imported_when_first_asked_for() -> None:
    script = (
        "import sys, tinfer; before = {'aiohttp', 'msgspec', 'asyncio'} & sys.modules.keys();"
        "tinfer.Client, tinfer.AsyncClient;"
        "print(before, 'aiohttp' in sys.modules, {'torch', 'vllm'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set() True set()"
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        tinfer.Clint  # type: ignore[attr-defined]  # noqa: B018
