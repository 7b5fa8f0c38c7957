"""The options of `tinfer serve`, as declared: described, bounded, checked together, and strict."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest
from msgspec import Meta

from tinfer.config import ServeConfig, load
from tinfer.errors import StartError

FIELDS = [field.name for field in msgspec.structs.fields(ServeConfig)]


def metas(hint: Any) -> list[Meta]:
    """Every `Meta` of a type, however deep."""
    found = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Meta)]
    return found + [meta for argument in typing.get_args(hint) for meta in metas(argument)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_described_in_one_sentence_or_two(name: str) -> None:
    hint = typing.get_type_hints(ServeConfig, include_extras=True)[name]
    (description,) = [meta.description for meta in metas(hint) if meta.description]
    assert description[0].isupper() or description.split()[0].rstrip(":") in description
    assert description.endswith(".")
    assert len(description) <= 120


def test_the_defaults_are_a_configuration() -> None:
    assert load({}) == ServeConfig()
    assert load(msgspec.structs.asdict(ServeConfig())) == ServeConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("ssl_cert_reqs", 3),
        ("ssl_cert_reqs", -1),
        ("uds", 1),
        ("api_key", "one"),
        ("prefill", -1),
        ("decode", -1),
        ("tensor_parallel_size", 0),
        ("cpu_threads", 0),
        ("prefill_devices", 0),
        ("revision", 1),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("block_size", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("kv_cache_memory_bytes", 0),
        ("max_num_queued_reqs", 0),
        ("shutdown_timeout", -0.1),
        ("shutdown_timeout", float("nan")),
        ("start_timeout", 0.0),
        ("lease_ttl", 0.0),
        ("lease_ttl", float("nan")),
        ("lease_ttl", float("inf")),
        ("ttft_deadline", float("inf")),
        ("itl_slack", float("nan")),
        ("chunk_size", "0"),
        ("max_worker_restarts", -1),
        ("route", "both"),
        ("kv_transport", "tcp"),
        ("engine", "none"),
        ("dtype", "int8"),
        ("prefill", "1"),
        ("fake_engine", {"step_s": "fast"}),
        ("served_model_name", "one"),
        ("chat_template", 1),
    ],
)
def test_a_bad_value_names_its_option(name: str, value: object) -> None:
    with pytest.raises(StartError, match="--" + name.replace("_", "-")) as caught:
        load({name: value})
    assert "\n" not in caught.value.message


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(StartError, match="num_gpus"):
        load({"num_gpus": 1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefill": 0, "decode": 0}, "no worker"),
        ({"prefill": 0, "route": "split"}, "--route split"),
        ({"decode": 0, "route": "split"}, "--route split"),
    ],
)
def test_options_that_contradict_each_other(values: dict[str, Any], words: str) -> None:
    with pytest.raises(StartError, match=words):
        load(values)


@pytest.mark.parametrize("name", ["allowed_origins", "allowed_methods", "allowed_headers"])
def test_lists_as_vllm_takes_them(name: str) -> None:
    """One JSON list, or the option several times, or both."""
    config = load({name: ('["a", "b"]', "c", " []")})
    assert getattr(config, name) == ("a", "b", "c")
    for bad in ('["a"', "[1]", '[["a"]]'):
        with pytest.raises(StartError, match=f"--{name.replace('_', '-')}: .* no JSON list"):
            load({name: (bad,)})


@pytest.mark.parametrize("route", ["auto", "whole"])
@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (1, 0)])
def test_one_kind_of_worker_is_enough_to_serve_whole(route: str, prefill: int, decode: int) -> None:
    config = load({"prefill": prefill, "decode": decode, "route": route})
    assert (config.prefill, config.decode) == (prefill, decode)


def test_a_configuration_does_not_change() -> None:
    config = ServeConfig()
    with pytest.raises(AttributeError):
        config.port = 1  # type: ignore[misc]
