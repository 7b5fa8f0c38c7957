"""The options of `tinfer serve`, each declared once: name, type, bounds, default, meaning.

The command line and `--help` are derived from this struct. Names are those of `vllm serve` where
the meaning is the same.
"""

from __future__ import annotations

import math
import re
import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tinfer.engine_args import refusal
from tinfer.errors import StartError
from tinfer.slo import slo_bounds_s

Positive = Annotated[int, Meta(ge=1)]
# Of which vLLM takes all at once, as '["a", "b"]', where here each can be given alone.
JSON_LISTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
# Who may ask a server, and where: of no use to one that a program starts for itself.
ACCESS = frozenset(
    {
        *("host", "port", "uds", "api_key", "api_key_file"),
        *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"),
        *("allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"),
    }
)
# The paper's, for OPT-13B on V100s (arXiv 2401.11181, section 3.3.2).
DEFAULT_CHUNK_TOKENS = 512
DEFAULT_MAX_LOGPROBS = 20  # Source: vLLM --max-logprobs


class ServeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """What one server does; never changed after the start."""

    model: Annotated[
        str | None,
        Meta(description="Directory of a Hugging Face model, or its name (org/name) on the hub."),
    ] = None
    revision: Annotated[
        str | None, Meta(description="Branch, tag or commit of a model from the hub.")
    ] = None
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port; 0 takes a free one.")] = 8000
    uds: Annotated[
        str | None,
        Meta(description="Listen on this Unix socket, for this user only, instead of an address."),
    ] = None
    served_model_name: Annotated[
        tuple[str, ...],
        Meta(description="Name(s) that clients use; the first is reported. Default: MODEL."),
    ] = ()

    api_key: Annotated[
        tuple[str, ...],
        Meta(
            description="Key that clients must show; `ps` shows it to all users, "
            "--api-key-file does not."
        ),
    ] = ()
    api_key_file: Annotated[
        str | None,
        Meta(description="File with such keys, one per line, that others cannot read."),
    ] = None
    ssl_keyfile: Annotated[
        str | None, Meta(description="Private key of the certificate (PEM), where not in its file.")
    ] = None
    ssl_certfile: Annotated[
        str | None, Meta(description="Certificate chain (PEM); with it the server speaks HTTPS.")
    ] = None
    ssl_ca_certs: Annotated[
        str | None, Meta(description="Certificates (PEM) that clients' own must be signed by.")
    ] = None
    ssl_cert_reqs: Annotated[
        int,
        Meta(ge=0, le=2, description="Client certificates: 0 none, 1 checked if sent, 2 required."),
    ] = 0
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(description="Web origins whose pages may ask (CORS); * for all, JSON list for many."),
    ] = ()
    allowed_methods: Annotated[
        tuple[str, ...], Meta(description="Methods that such pages may use.")
    ] = ("*",)
    allowed_headers: Annotated[
        tuple[str, ...], Meta(description="Request headers that such pages may send.")
    ] = ("*",)
    allow_credentials: Annotated[
        bool, Meta(description="Let such pages send the browser's cookies and certificates.")
    ] = False

    prefill: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of prefill workers. Default: half of the GPUs; 1 on a CPU."),
    ] = None
    decode: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of decode workers. Default: the GPUs that are left; 1 on a CPU."),
    ] = None
    prefill_devices: Annotated[
        str | None,
        Meta(description="GPUs of the prefill workers: indices or UUIDs, comma-separated."),
    ] = None
    decode_devices: Annotated[
        str | None,
        Meta(description="GPUs of the decode workers: indices or UUIDs, comma-separated."),
    ] = None
    route: Annotated[
        Literal["auto", "split", "whole"],
        Meta(
            description="split: prefill and decode on two workers; whole: on one; "
            "auto: what costs least, decided per request."
        ),
    ] = "auto"
    kv_transport: Annotated[
        Literal["auto", "cuda-ipc", "host", "shm"],
        Meta(description="How KV blocks move; auto takes what a probe shows to work."),
    ] = "auto"
    prefill_policy: Annotated[
        Literal["srpt", "fcfs", "sjf", "ljf"],
        Meta(
            description="Order in which queued prompts start: shortest remaining first, with "
            "ageing; or the paper's three."
        ),
    ] = "srpt"
    prefill_sched_batch: Annotated[
        Positive,
        Meta(
            description="Prompts that sjf and ljf sort at a time; nothing overtakes such a batch."
        ),
    ] = 16
    prefill_ageing: Annotated[
        float,
        Meta(gt=0, description="Seconds of prefill that a second of waiting is worth under srpt."),
    ] = 0.002
    ttft_deadline: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Seconds to the first token for which srpt lets a prompt go first."),
    ] = None
    prefill_choice: Annotated[
        Literal["earliest-finish", "least-loaded"],
        Meta(description="Where a prompt is computed; earliest-finish counts cached prefixes."),
    ] = "earliest-finish"
    prefill_budget: Annotated[
        Literal["slack", "whole-chunks"],
        Meta(description="How much prompt a step has where something decodes: see --itl-slack."),
    ] = "slack"
    itl_slack: Annotated[
        float,
        Meta(
            gt=0,
            description="How many times its own length a decode step gives to prompts, and as much "
            "again for every one that waits.",
        ),
    ] = 4.0
    decode_policy: Annotated[
        Literal["projected", "power-of-two", "least-kv"],
        Meta(description="How a decode worker is chosen; power-of-two is the paper's."),
    ] = "projected"
    dispatch: Annotated[
        Literal["first-token", "first-chunk"],
        Meta(
            description="When a split request's decode worker is settled; the paper: first-chunk."
        ),
    ] = "first-token"
    decode_admission: Annotated[
        Literal["peak", "greedy", "reserve-static", "reserve-dynamic"],
        Meta(description="When a decode worker takes a request, by the KV it is going to need."),
    ] = "peak"
    preemption: Annotated[
        Literal["auto", "here", "elsewhere"],
        Meta(
            description="Where a request that lost its KV has it computed again: where it decodes, "
            "on a prefill worker, or what costs least."
        ),
    ] = "auto"
    overflow_risk: Annotated[
        float,
        Meta(gt=0, le=0.5, description="Chance of running out of KV that peak admission takes."),
    ] = 0.3
    predictor: Annotated[
        Literal["prior", "online", "max-tokens", "oracle", "noisy-oracle"],
        Meta(
            description="What says how long an answer will be; online learns it from what is "
            "served, oracles know it under ignore_eos."
        ),
    ] = "prior"
    predictor_state: Annotated[
        str | None,
        Meta(description="File that keeps what the online predictor has learnt, between starts."),
    ] = None
    predictor_state_interval: Annotated[
        float, Meta(gt=0, description="Seconds after which that file is written anew.")
    ] = 300.0
    predictor_accuracy: Annotated[
        float, Meta(ge=0, le=1, description="Share of noisy-oracle's buckets that are right.")
    ] = 0.749
    predictor_granularity: Annotated[
        Positive, Meta(description="Tokens per bucket of noisy-oracle.")
    ] = 200
    flip: Annotated[
        Literal["off", "watchdog", "reactive"],
        Meta(description="When workers change roles: never, once idle (the paper), or by demand."),
    ] = "off"

    tensor_parallel_size: Annotated[
        Positive, Meta(description="GPUs (or groups of CPU cores) that share one worker's model.")
    ] = 1
    cpu_threads: Annotated[
        Positive | None,
        Meta(description="CPU threads of a rank. Default: equal shares; 1 for the built-in model."),
    ] = None

    dtype: Annotated[
        Literal["auto", "half", "float16", "bfloat16", "float", "float32"],
        Meta(description="Data type of weights and activations."),
    ] = "auto"
    quantization: Annotated[
        str | None, Meta(description="How weights are quantized (vLLM's names). Default: as found.")
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"],
        Meta(description="Data type of KV blocks; auto: the model's. fp8 is fp8_e4m3."),
    ] = "auto"
    max_model_len: Annotated[
        Positive | None, Meta(description="Longest prompt plus answer. Default: the model's.")
    ] = None
    max_num_seqs: Annotated[Positive, Meta(description="Sequences per worker and step.")] = 256
    chunk_size: Annotated[
        str,
        Meta(
            pattern=r"^(auto|[1-9][0-9]*)$",
            title="auto or a number of tokens",
            description="Prompt tokens per worker and step; auto: as `tinfer tune` measured, "
            "else 512.",
        ),
    ] = "auto"
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(
            description="Tokens per worker and step, of prompts and answers. Default: --chunk-size."
        ),
    ] = None
    block_size: Annotated[
        Positive | None, Meta(description="Tokens per KV block. Default: vLLM's choice.")
    ] = None
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="Share of a GPU's memory for one worker.")
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        Positive | None, Meta(description="KV cache on each rank of a worker. Default: by device.")
    ] = None
    enable_prefix_caching: Annotated[
        bool, Meta(description="Reuse KV blocks of equal prompt prefixes.")
    ] = True
    enforce_eager: Annotated[bool, Meta(description="No CUDA graphs (always so on a CPU).")] = False
    trust_remote_code: Annotated[
        bool, Meta(description="Run code that the model's directory brings along.")
    ] = False
    seed: Annotated[int, Meta(description="Seed of the engines' own random generators.")] = 0
    engine_arg: Annotated[
        dict[str, Any],
        Meta(description="Any other engine argument of vLLM, for all workers."),
    ] = {}

    chat_template: Annotated[
        str | None, Meta(description="Chat template: a file, or the template itself.")
    ] = None
    trust_request_chat_template: Annotated[
        bool, Meta(description="Let a request bring a chat template, which is a program, along.")
    ] = False
    default_chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(description="What chat templates are given where a request does not say otherwise."),
    ] = {}
    enable_auto_tool_choice: Annotated[
        bool, Meta(description="Let models call the tools of a chat: see --tool-call-parser.")
    ] = False
    tool_call_parser: Annotated[
        str | None,
        Meta(description="vLLM's parser that finds a model's tool calls, such as hermes."),
    ] = None
    tool_strict_level: Annotated[
        Literal["auto", "function", "parameter"],
        Meta(
            description="What a grammar holds calls to at least: what tool_choice and strict ask; "
            "the form of a call; its arguments too."
        ),
    ] = "auto"
    exclude_tools_when_tool_choice_none: Annotated[
        bool, Meta(description="Keep tools that may not be called out of the prompt.")
    ] = False
    reasoning_parser: Annotated[
        str | None,
        Meta(description="vLLM's parser that tells reasoning from the answer, such as qwen3."),
    ] = None
    strict_params: Annotated[
        bool, Meta(description="Answer unknown request fields with 400 instead of ignoring them.")
    ] = False
    max_num_queued_reqs: Annotated[
        Positive, Meta(description="Queued requests beyond which new ones get 429.")
    ] = 4096
    max_num_queued_tokens: Annotated[
        Positive | None,
        Meta(description="Prompt tokens in the queue beyond which new requests get 429."),
    ] = None
    slo: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^(ttft|tpot):[0-9.]+(,(ttft|tpot):[0-9.]+)*$")], ...],
        Meta(
            description="ttft:MS, tpot:MS or both with a comma: requests that are predicted to "
            "take longer get 429 at once."
        ),
    ] = ()
    request_timeout: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="Seconds that an answer may take. Default: as long as it takes."),
    ] = None
    shutdown_timeout: Annotated[
        float,
        Meta(ge=0, description="Seconds that running requests get to finish after a stop signal."),
    ] = 30.0
    start_timeout: Annotated[
        float, Meta(gt=0, description="Seconds that a worker gets to become ready.")
    ] = 600.0
    lease_ttl: Annotated[
        float, Meta(gt=0, description="Seconds before a held block's owner asks about its reader.")
    ] = 10.0
    hang_timeout: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds that a step of a worker may take before it is killed as hung.",
        ),
    ] = 120.0
    max_worker_restarts: Annotated[
        int, Meta(ge=0, description="Deaths in a row after which a worker is given up.")
    ] = 5
    max_request_restarts: Annotated[
        int,
        Meta(
            ge=0,
            description="Workers in a row that may die while they compute a request, with no token "
            "more, before it is answered with an error.",
        ),
    ] = 3
    log_dir: Annotated[
        str | None, Meta(description="Keep the workers' logs here. Default: with the sockets.")
    ] = None
    event_log: Annotated[
        str | None,
        Meta(description="Write every scheduling event and decision to this file, to replay them."),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="What the log has, from here up; info has a line for every request."),
    ] = "warning"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(description="Of the log on standard error; json: one object per line."),
    ] = "text"
    request_log: Annotated[
        str | None,
        Meta(
            description="Write a line of JSON to this file for every request that ends: hashes, "
            "lengths, times; no text."
        ),
    ] = None
    request_log_max_bytes: Annotated[
        Positive, Meta(description="Size beyond which the request log is put aside as FILE.1.")
    ] = 64 * 1024 * 1024
    request_log_files: Annotated[
        Positive, Meta(description="Such files that are kept: FILE.1, the latest, to FILE.N.")
    ] = 4
    log_prompts: Annotated[
        bool, Meta(description="Have the request log hold prompts as well, as text or token ids.")
    ] = False
    otlp_traces_endpoint: Annotated[
        str | None,
        Meta(description="Send spans of every request to this OpenTelemetry collector."),
    ] = None
    verbose: Annotated[
        bool,
        Meta(description="--log-level info, and more in the workers' logs; never a text."),
    ] = False
    engine: Annotated[
        Literal["vllm", "fake"],
        Meta(description="fake: no model, seeded nonsense at set speeds, to test the server."),
    ] = "vllm"
    fake_engine: Annotated[
        dict[str, float], Meta(description="Settings of the fake engine, name=value.")
    ] = {}

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens per step, as far as the options alone say."""
        named = DEFAULT_CHUNK_TOKENS if self.chunk_size == "auto" else int(self.chunk_size)
        return self.max_num_batched_tokens or named

    @property
    def slo_s(self) -> dict[str, float]:
        """The bounds of `slo` in seconds, by metric."""
        return slo_bounds_s(self.slo)

    @property
    def max_logprobs(self) -> int:
        """Most likely tokens that a request may ask for; vLLM's engine argument and its default."""
        given = self.engine_arg.get("max_logprobs")
        return given if isinstance(given, int) else DEFAULT_MAX_LOGPROBS

    @property
    def step_tokens(self) -> int:
        """Tokens per step: room for one of every sequence."""
        return max(self.chunk_tokens, self.max_num_seqs)

    def with_measured_chunk(self, chunk_tokens: int | None) -> ServeConfig:
        """The same with that chunk size, where one was measured and the options name none."""
        if chunk_tokens is None or self.chunk_size != "auto" or self.max_num_batched_tokens:
            return self
        return msgspec.structs.replace(self, chunk_size=str(chunk_tokens))


def load(values: dict[str, Any], strict: bool = True) -> ServeConfig:
    """A checked configuration from plain values, or (not `strict`) from their text.

    Raises `StartError` naming what is wrong.
    """
    try:
        config = msgspec.convert(_flattened(values), ServeConfig, strict=strict)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        raise StartError(f"bad option{_flag(place)}: {reason}") from error
    for name in ServeConfig.__struct_fields__:
        if reason := _fault(name, getattr(config, name)):
            raise StartError(f"bad option{_flag(name)}{reason}")
    if config.prefill == config.decode == 0:
        raise StartError("no worker: --prefill and --decode are both 0")
    if config.route == "split" and 0 in (config.prefill, config.decode):
        raise StartError("--route split needs at least one --prefill and one --decode worker")
    return config


def taken(name: str, value: Any) -> Any:
    """The value of one option as the configuration will have it, of the very type it has to have.

    Raises `ValueError` saying what is wrong with it.
    """
    hint = typing.get_type_hints(ServeConfig, include_extras=True)[name]
    try:
        value = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace(" - at `$", " - at `")) from error
    if reason := _fault(name, value):
        raise ValueError(reason.removeprefix(": ").strip())
    return value


def _fault(name: str, value: Any) -> str:
    """What is wrong with a value of the right type, behind the option's name; empty if nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        return f": {value} is not a finite number"
    if name == "slo":
        try:
            slo_bounds_s(value)
        except ValueError as error:
            return f": {error}"
    if name == "engine_arg":
        for argument, given in value.items():
            if reason := refusal(argument, given, ServeConfig.__struct_fields__):
                return f" {argument}: {reason}"
    return ""


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """With the options of vLLM that take a JSON list as one value each turned into plain ones."""
    flat = dict(values)
    for name in JSON_LISTS & values.keys():
        found: list[Any] = []
        for value in values[name]:
            is_list = isinstance(value, str) and value.lstrip().startswith("[")
            try:
                found += msgspec.json.decode(value, type=list[str]) if is_list else [value]
            except msgspec.MsgspecError as error:
                raise StartError(f"bad option{_flag(name)}: {value!r} is no JSON list") from error
        flat[name] = tuple(found)
    return flat


def _flag(place: str) -> str:
    """Of a place that msgspec names, such as `fake_engine[...]`; empty for the whole struct."""
    name = re.match(r"\w*", place)
    return f" --{name[0].replace('_', '-')}" if name and name[0] else ""
