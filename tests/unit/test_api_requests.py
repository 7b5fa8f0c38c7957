"""Bodies to sampling specs: what passes, what is refused, and under which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tinfer.api.decode import BodyDecoder
from tinfer.api.fields import MAX_NAMES_IN_HEADER, NO_EFFECT, REFUSED, IgnoredLog, ignored_header
from tinfer.api.sampling import (
    ModelLimits,
    SamplingDefaults,
    base_spec,
    children,
    fit,
    load_sampling_defaults,
)
from tinfer.api.schemas import ChatRequest, CompletionRequest
from tinfer.core.sampling import SamplingSpec, StructuredSpec
from tinfer.errors import InvalidRequest, PromptTooLong, StartError

NEUTRAL = SamplingDefaults()
LIMITS = ModelLimits(max_model_len=100, vocab_size=50, max_logprobs=20)
COMPLETIONS = BodyDecoder(CompletionRequest, strict=False)
CHATS = BodyDecoder(ChatRequest, strict=False)


def spec_of(defaults: SamplingDefaults = NEUTRAL, /, **body: Any) -> SamplingSpec:
    parsed, _ = COMPLETIONS.decode(msgspec.json.encode({"prompt": "x", **body}))
    return base_spec(parsed, defaults, LIMITS, parsed.logprobs, parsed.prompt_logprobs)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt":', None),
        (b"[1]", None),
        (b'{"prompt":"\xff"}', None),
        (b'{"n":1.5}', "n"),
        (b'{"temperature":"hot"}', "temperature"),
        (b'{"stream":1}', "stream"),
        (b'{"prompt":[1,true]}', "prompt[1]"),
        (b'{"stop":["a",2]}', "stop[1]"),
        (b'{"logit_bias":{"1":"x"}}', "logit_bias[...]"),
        (b'{"stream_options":{"include_usage":3}}', "stream_options.include_usage"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ],
)
def test_bad_bodies_name_the_field(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        COMPLETIONS.decode(body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "messages"),
        (b'{"messages":[{"content":"x"}]}', "messages[0].role"),
        (b'{"messages":[{"role":"user","content":3}]}', "messages[0].content"),
    ],
)
def test_bad_chats_name_the_field(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        CHATS.decode(body)
    assert caught.value.param == param


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_known_but_unsupported_fields_pass_only_when_off(name: str) -> None:
    decoder = BodyDecoder(CompletionRequest, strict=True)
    if name == "echo":
        decoder = BodyDecoder(ChatRequest, strict=True)  # type: ignore[arg-type]
    base: dict[str, Any] = {"messages": []} if name == "echo" else {}
    for harmless in REFUSED[name]:
        decoder.decode(msgspec.json.encode({**base, name: harmless}))
    with pytest.raises(InvalidRequest) as caught:
        decoder.decode(msgspec.json.encode({**base, name: {"on": [7]}}))
    assert caught.value.param == name


def test_fields_without_effect_are_silent() -> None:
    body = msgspec.json.encode({"prompt": "x", **dict.fromkeys(NO_EFFECT, "v")})
    assert COMPLETIONS.decode(body)[1] == []


def test_unknown_fields_are_listed_and_strict_refuses_them() -> None:
    body = b'{"prompt":"x","zap":1,"a\\r\\nSet-Cookie: b":2}'
    assert COMPLETIONS.decode(body)[1] == ["zap", "a??Set-Cookie??b"]
    with pytest.raises(InvalidRequest) as caught:
        BodyDecoder(CompletionRequest, strict=True).decode(body)
    assert caught.value.param == "zap"


def test_the_header_is_bounded() -> None:
    many = {f"f{i}" + "x" * 100: 1 for i in range(MAX_NAMES_IN_HEADER + 5)}
    _, unknown = COMPLETIONS.decode(msgspec.json.encode(many))
    (value,) = ignored_header(unknown).values()
    assert value.endswith(",+5") and len(value) < 1000
    assert ignored_header([]) == {}


def test_each_unknown_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ignored = IgnoredLog()
    ignored.note(["zap"])
    ignored.note(["zap", "zip"])
    assert [r.__dict__["field"] for r in caplog.records] == ["zap", "zip"]
    ignored.note([f"n{i}" for i in range(1000)])
    assert len(ignored.seen) <= 256


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**63),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("min_tokens", -1),
    ("n", 0),
    ("n", 16385),
    ("logprobs", -2),
    ("logprobs", 21),
    ("logprobs", -1),
    ("prompt_logprobs", 21),
    ("stop", ["a"] * 5),
    ("stop", [""]),
    ("stop", ""),
    ("bad_words", [""]),
    ("bad_words", [str(i) for i in range(129)]),
    ("stop_token_ids", [50]),
    ("stop_token_ids", [-1]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [50]),
    ("logit_bias", {"50": 1}),
    ("logit_bias", {"x": 1}),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_ranges(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(**{name: value})
    assert caught.value.param == name


def test_greedy_takes_one_answer() -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(n=2, temperature=0)
    assert caught.value.param == "n"
    assert spec_of(n=1, temperature=0).temperature == 0


def test_null_means_the_default() -> None:
    names = {f.encode_name for f in msgspec.structs.fields(CompletionRequest)} - {"prompt"}
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert spec_of(**nulls) == spec_of()


def test_values_as_vllm_normalises_them() -> None:
    spec = spec_of(
        seed=-1,
        stop="x",
        stop_token_ids=[3, 3, 4],
        bad_words=["a", "a"],
        logit_bias={"7": 1000, "8": -1000.5},
        skip_special_tokens=False,
        top_k=-1,
    )
    assert (spec.seed, spec.stop, spec.stop_token_ids, spec.bad_words, spec.top_k) == (
        None,
        ["x"],
        [3, 4],
        ["a"],
        -1,
    )
    assert spec.logit_bias == {7: 100.0, 8: -100.0}
    assert not spec.skip_special_tokens


def test_request_before_generation_config_before_neutral() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    spec = spec_of(defaults, temperature=0.9)
    assert (spec.temperature, spec.top_k, spec.top_p) == (0.9, 20, 1.0)


def test_generation_config_is_read_from_the_model(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path) == SamplingDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "top_p": null, "eos_token_id": [1], "do_sample": true}')
    assert load_sampling_defaults(tmp_path) == SamplingDefaults(temperature=0.6)
    path.write_text('{"temperature": "hot"}')
    with pytest.raises(StartError):
        load_sampling_defaults(tmp_path)


def test_max_tokens_is_cut_to_what_is_left() -> None:
    spec = spec_of()
    assert fit(spec, 90, 16, LIMITS, "prompt").max_tokens == 10
    assert fit(spec, 90, 4, LIMITS, "prompt").max_tokens == 4
    assert fit(spec, 90, None, LIMITS, "prompt").max_tokens == 10
    assert fit(spec, 99, None, LIMITS, "prompt").max_tokens == 1


@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "error", "param"),
    [
        (100, None, PromptTooLong, "prompt"),
        (101, 1, PromptTooLong, "prompt"),
        (1, 101, PromptTooLong, "max_tokens"),
        (1, 0, InvalidRequest, "max_tokens"),
        (0, 1, InvalidRequest, "prompt"),
        (98, 50, InvalidRequest, "min_tokens"),
    ],
)
def test_lengths_that_do_not_fit(
    prompt_tokens: int, asked: int | None, error: type[InvalidRequest], param: str
) -> None:
    with pytest.raises(error) as caught:
        fit(spec_of(min_tokens=3), prompt_tokens, asked, LIMITS, "prompt")
    assert caught.value.param == param


def test_children_have_their_own_seeds() -> None:
    assert [c.seed for c in children(spec_of(seed=5), 3)] == [5, 6, 7]
    assert [c.seed for c in children(spec_of(), 2)] == [None, None]


SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredSpec(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {}},
                }
            },
            StructuredSpec(json="{}"),
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"x": 1}}},
            StructuredSpec(structural_tag='{"type":"structural_tag","format":{"x":1}}'),
        ),
        ({"structured_outputs": {"regex": "a+"}}, StructuredSpec(regex="a+")),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            StructuredSpec(json=msgspec.json.encode(SCHEMA).decode(), disable_any_whitespace=True),
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "text"}},
            StructuredSpec(choice=["a"]),
        ),
    ],
)
def test_structured_outputs(body: dict[str, Any], want: StructuredSpec | None) -> None:
    assert spec_of(**body).structured == want


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": nested(65)}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a\x00"}}, "structured_outputs"),
        (
            {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
            "structured_outputs.disable_additional_properties",
        ),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)  # fmt: skip
def test_structured_outputs_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(**body)
    assert caught.value.param == param


def test_the_deepest_schema_passes() -> None:
    assert spec_of(structured_outputs={"json": nested(63)}).structured is not None
