"""`tinfer.LLM` without its server: what is asked, what is made of an answer, what is passed on."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tinfer
from tinfer import config
from tinfer.cli import serve
from tinfer.client.params import CHAT_NAMES, COMPLETION_NAMES
from tinfer.client.results import ChatCompletion, Completion
from tinfer.errors import StartError
from tinfer.offline import Logprob, SamplingParams
from tinfer.offline.outputs import of_chat, of_completion
from tinfer.offline.params import (
    as_conversations,
    as_prompts,
    chat_fields,
    completion_fields,
    per_input,
)
from tinfer.offline.serve_words import NAMES, serve_words

USER = {"role": "user", "content": "hi"}
IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


def test_importing_tinfer_loads_nothing_of_it() -> None:
    script = (
        "import sys, tinfer\n"
        "print(*sorted(name for name in sys.modules if name.startswith('tinfer')))\n"
        "tinfer.LLM, tinfer.SamplingParams, tinfer.Client\n"
        "print(*sorted(sys.modules.keys() & {'torch', 'vllm', 'transformers', 'zmq'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("tinfer\n\n", "")
    assert set(tinfer.__all__) >= {"LLM", "SamplingParams"}


# --- what is asked -------------------------------------------------------------------------------


def test_every_sampling_parameter_is_one_of_both_endpoints() -> None:
    names = set(SamplingParams.__struct_fields__)
    assert names <= COMPLETION_NAMES and names <= CHAT_NAMES
    assert all(value is None for value in msgspec.structs.asdict(SamplingParams()).values())


def test_what_is_not_given_is_not_sent() -> None:
    params = SamplingParams(n=2, temperature=0.0, ignore_eos=False, logprobs=3)
    given = {"n": 2, "temperature": 0.0, "ignore_eos": False}
    assert completion_fields(params) == {**given, "logprobs": 3, **IDS}
    chat = {**given, "logprobs": True, "top_logprobs": 3, **IDS, "return_prompt_text": True}
    assert chat_fields(params) == chat
    assert completion_fields(None) == IDS
    assert "logprobs" not in chat_fields(SamplingParams())


def test_a_mapping_is_sent_as_it_is() -> None:
    assert completion_fields({"later": 1, "n": None}) == {"later": 1, "n": None, **IDS}
    assert completion_fields({"return_token_ids": False}) == IDS
    for name in ("prompt", "messages", "stream", "stream_options"):
        with pytest.raises(ValueError, match=f"{name} is no sampling parameter"):
            chat_fields({name: 1})
    with pytest.raises(TypeError, match="neither SamplingParams nor a mapping"):
        completion_fields(3)  # type: ignore[arg-type]


def test_sampling_parameters_for_all_or_for_each() -> None:
    one, other = SamplingParams(n=1), {"n": 2}
    assert per_input(None, 2) == [None, None]
    assert per_input(one, 2) == [one, one]
    assert per_input([one, other], 2) == [one, other]
    with pytest.raises(ValueError, match="2 sampling parameters for 3 inputs"):
        per_input([one, other], 3)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt_token_ids": (1,), "prompt": "a"}, [[1]]),
        (["a", [1, 2], {"prompt": "b"}, {"prompt_token_ids": [3]}], ["a", [1, 2], "b", [3]]),
        ([], []),
    ],
)
def test_prompts(given: Any, prompts: list[Any]) -> None:
    assert as_prompts(given) == prompts


@pytest.mark.parametrize("given", [7, None, [7, "a"], [None], {"text": "a"}, [b"a"], [[]]])
def test_what_is_no_prompt(given: Any) -> None:
    with pytest.raises(TypeError, match="not a prompt"):
        as_prompts(given)


@pytest.mark.parametrize(
    ("given", "conversations"),
    [
        ("hi", [[USER]]),
        ([USER], [[USER]]),
        ([USER, USER], [[USER, USER]]),
        ([[USER], "hi", (USER, USER)], [[USER], [USER], (USER, USER)]),
        ([], []),
    ],
)
def test_conversations(given: Any, conversations: list[Any]) -> None:
    assert as_conversations(given) == conversations


def test_messages_and_conversations_do_not_mix() -> None:
    with pytest.raises(TypeError, match="messages and conversations in one list"):
        as_conversations([[USER], USER])  # type: ignore[arg-type]


# --- what is made of an answer -------------------------------------------------------------------


def completion(**choice: Any) -> Completion:
    first = {"text": "x", "token_ids": [5, 6], "prompt_token_ids": [1, 2], **choice}
    second = {"index": 1, "text": "y", "token_ids": [7], "finish_reason": "stop"}
    return msgspec.convert({"id": "cmpl-1", "choices": [first, second]}, Completion)


def test_a_completion() -> None:
    found = of_completion("ab", completion(finish_reason="length"))
    assert (found.request_id, found.prompt, found.prompt_token_ids) == ("cmpl-1", "ab", [1, 2])
    told = [(one.index, one.text, one.token_ids, one.finish_reason) for one in found.outputs]
    assert told == [(0, "x", [5, 6], "length"), (1, "y", [7], "stop")]
    assert (found.outputs[0].logprobs, found.outputs[0].cumulative_logprob) == (None, None)
    assert found.prompt_logprobs is None
    assert of_completion([1, 2], completion()).prompt is None


def test_log_probabilities_of_a_completion_are_known_by_id() -> None:
    tops = [{"token_id:5": -0.5, "token_id:9": -0.25}, {"token_id:6": -1.0}]
    (first, _) = of_completion("ab", completion(logprobs={"top_logprobs": tops})).outputs
    assert first.logprobs == [{5: Logprob(-0.5), 9: Logprob(-0.25)}, {6: Logprob(-1.0)}]
    assert [next(iter(position)) for position in first.logprobs] == first.token_ids
    assert first.cumulative_logprob == -1.5


def test_log_probabilities_of_a_prompt() -> None:
    told = [None, {"2": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]
    found = of_completion("ab", completion(prompt_logprobs=told))
    assert found.prompt_logprobs == [None, {2: Logprob(-0.5, 1, "b")}]


def test_a_chat() -> None:
    others = [
        {"token": "token_id:9", "logprob": -0.25, "bytes": [*b"token_id:9"]},
        {"token": "token_id:5", "logprob": -0.5, "bytes": [*b"token_id:5"]},
    ]
    entry = {"token": "token_id:5", "logprob": -0.5, "bytes": [*b"Hi"], "top_logprobs": others}
    choice = {
        "message": {"content": "Hi"},
        "token_ids": [5],
        "finish_reason": "stop",
        "logprobs": {"content": [entry]},
    }
    said = {"id": "chat-1", "choices": [choice], "prompt_token_ids": [1], "prompt_text": "<u>hi"}
    found = of_chat(msgspec.convert(said, ChatCompletion))
    assert (found.request_id, found.prompt, found.prompt_token_ids) == ("chat-1", "<u>hi", [1])
    (output,) = found.outputs
    assert (output.text, output.token_ids, output.finish_reason) == ("Hi", [5], "stop")
    assert output.logprobs == [{5: Logprob(-0.5, decoded_token="Hi"), 9: Logprob(-0.25)}]
    assert output.cumulative_logprob == -0.5


# --- what is passed on ---------------------------------------------------------------------------


def parsed(words: list[str]) -> config.ServeConfig:
    """What `tinfer serve` makes of these arguments."""
    with serve.command.make_context("tinfer serve", [*words]) as context:
        names = config.ServeConfig.__struct_fields__
        values = {n: v for n, v in context.params.items() if n in names}
    return config.load(values)


OTHER: dict[str, Any] = {
    "slo": ("ttft:500", "tpot:50.5"),
    "fake_engine": {"step_s": 0.5, "num_blocks": 8.0},
    "engine_arg": {"max_logprobs": 8, "hf_overrides": {"a": None}},
    "default_chat_template_kwargs": {"enable_thinking": False, "version": "1", "tone": "dry"},
    "served_model_name": ("a", "b/c"),
    "chunk_size": "384",
    "gpu_memory_utilization": 0.5,
    "overflow_risk": 0.25,
    "predictor_accuracy": 0.5,
    "seed": -3,
    "dtype": "half",
}


def other_value(name: str) -> Any:
    """A value that is not the option's default."""
    default = getattr(config.ServeConfig(), name)
    hint = typing.get_type_hints(config.ServeConfig)[name]
    if name in OTHER:
        return OTHER[name]
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[-1]
    if isinstance(default, bool):
        return not default
    if default is None:
        return 12 if int in typing.get_args(hint) or float in typing.get_args(hint) else "/some"
    return default + 1


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_option_reaches_the_server(name: str) -> None:
    value = other_value(name)
    found = parsed(serve_words("/a/model", {name: value}))
    assert found == msgspec.structs.replace(config.ServeConfig(model="/a/model"), **{name: value})
    assert found != config.ServeConfig(model="/a/model")


def test_none_is_the_default_and_paths_are_text() -> None:
    words = serve_words(Path("/a/model"), {"prefill": None, "log_dir": Path("/b")})
    assert words == ["/a/model", "--log-dir=/b"]
    assert serve_words(None, {}) == []


@pytest.mark.parametrize("name", ["engin", "port", "host", "uds", "api_key", "ssl_certfile"])
def test_what_is_no_option_of_it(name: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{name}'"):
        serve_words(None, {name: "x"})


def test_a_bad_value_is_named_before_anything_starts() -> None:
    with pytest.raises(StartError, match="bad option --prefill"):
        serve_words(None, {"prefill": "two"})
