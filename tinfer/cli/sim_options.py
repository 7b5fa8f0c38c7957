"""What `tinfer simulate` and `tinfer plan` share: which requests, which box, which policies.

Those of the policies are `tinfer serve`'s own, made from the same struct.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tinfer.cli.options import NumberRange, number_pairs, options_of
from tinfer.config import ServeConfig

if TYPE_CHECKING:
    from tinfer.sim.boxes import Box
    from tinfer.sim.sources import Source

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# What only a real server has. Every other option of `tinfer serve` is simulated.
NOT_SIMULATED = frozenset(
    ("model", "revision", "host", "port", "uds", "served_model_name", "api_key", "api_key_file")
    + ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs")
    + ("allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials")
    + ("prefill_devices", "decode_devices", "kv_transport", "tensor_parallel_size", "cpu_threads")
    + ("dtype", "max_model_len", "block_size", "gpu_memory_utilization", "kv_cache_memory_bytes")
    + ("quantization", "kv_cache_dtype", "engine_arg")
    + ("enforce_eager", "trust_remote_code", "chat_template", "strict_params")
    + ("trust_request_chat_template", "default_chat_template_kwargs", "reasoning_parser")
    + ("enable_auto_tool_choice", "tool_call_parser", "tool_strict_level")
    + ("exclude_tools_when_tool_choice_none",)
    + ("slo", "request_timeout", "shutdown_timeout", "start_timeout", "lease_ttl", "hang_timeout")
    + ("max_worker_restarts", "max_request_restarts")
    + ("predictor_state", "predictor_state_interval")
    + ("request_log", "request_log_max_bytes", "request_log_files", "log_prompts")
    + ("otlp_traces_endpoint",)
    + ("log_dir", "event_log", "log_level", "log_format", "verbose", "engine", "fake_engine")
)
# This one is an option of the workload here; it numbers everything that is drawn.
_SEED = frozenset(("seed",))
POSITIVE = click.IntRange(min=1)
_ABOVE_ZERO = NumberRange(min=0, min_open=True, max=1000)

_SOURCE = (
    click.option(
        "--workload", default="Mixed", show_default=True, help="Of `tinfer.workloads`, by name."
    ),
    click.option(
        "--log",
        type=click.Path(dir_okay=False, exists=True),
        metavar="FILE",
        help="Play this request log (of `tinfer serve --request-log` or `tinfer bench`) instead of "
        "a workload.",
    ),
    click.option(
        "--num-prompts",
        "--num-requests",
        "num_requests",
        type=POSITIVE,
        help="Number of requests. Default: 1000, or all of a log.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Fixes all that is drawn."),
    click.option(
        "--burstiness",
        type=_ABOVE_ZERO,
        help="Shape of the gamma gaps between arrivals: 1 is Poisson, less is burstier. Default: "
        "the workload's own.",
    ),
    click.option("--length-scale", type=_ABOVE_ZERO, default=1.0, help="Factor on all lengths."),
    click.option("--max-prompt-tokens", type=POSITIVE, help="Cuts prompts."),
    click.option("--max-output-tokens", type=POSITIVE, help="Cuts answers."),
    click.option(
        "--workload-option",
        "workload_options",
        multiple=True,
        metavar="NAME=NUMBER",
        callback=number_pairs,
        help="A setting of the workload.",
    ),
    click.option(
        "--max-tokens",
        type=POSITIVE,
        help="What clients allow an answer to have. Default: exactly what it has, as the load "
        "generator asks.",
    ),
)


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say which requests there are."""
    for option in reversed(_SOURCE):
        function = option(function)
    return function


def policy_options(also_skip: frozenset[str] = frozenset()) -> _Decorator:
    """Adds the options of `tinfer serve` that mean something to a simulation."""
    return options_of(ServeConfig, skip=NOT_SIMULATED | _SEED | also_skip)


def policy_names(also_skip: frozenset[str] = frozenset()) -> list[str]:
    """The names of those options' values."""
    skipped = NOT_SIMULATED | _SEED | also_skip
    return [name for name in ServeConfig.__struct_fields__ if name not in skipped]


def taken_source(given: dict[str, Any], rate_rps: float | None) -> Source:
    """The source that the options say; they are taken out of `given`."""
    from tinfer.sim.sources import Source

    log, num_requests = given.pop("log"), given.pop("num_requests")
    workload, settings = given.pop("workload"), given.pop("workload_options")
    if log is not None and _is_given("workload"):
        raise click.UsageError("--workload does not go with --log")
    if log is not None and settings:
        raise click.UsageError("--workload-option does not go with --log")
    if log is not None and given["burstiness"] is not None:
        raise click.UsageError("--burstiness does not go with --log")
    return Source(
        workload=None if log else workload,
        log=log,
        num_requests=num_requests if log else num_requests or 1000,
        rate_rps=rate_rps,
        seed=given["seed"],
        burstiness=given.pop("burstiness"),
        length_scale=given.pop("length_scale"),
        max_prompt_tokens=given.pop("max_prompt_tokens"),
        max_output_tokens=given.pop("max_output_tokens"),
        options=settings,
    )


def _is_given(name: str) -> bool:
    """Whether the command line has that option, whatever its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def box_of(preset: str | None, tuned: Path | None) -> Box:
    """The box of one of the two flags. Raises `StartError`, `click.UsageError` for both."""
    if tuned is None:
        from tinfer.sim.boxes import preset_box

        return preset_box("cpu-52m" if preset is None else preset)
    if preset is not None:
        raise click.UsageError("--preset and --tuned exclude each other")
    return measured(tuned)


def measured(path: Path) -> Box:
    """The box that a file of `tinfer tune` tells of. Raises `StartError`, `FileNotFoundError`."""
    from tinfer.sim.boxes import measured_box
    from tinfer.tune.store import read

    tuning = read(path)
    return measured_box(
        name=f"{tuning.model} on {tuning.identity.device}",
        costs=tuning.costs,
        num_blocks=tuning.kv.num_blocks,
        block_tokens=tuning.kv.block_tokens,
        num_devices=tuning.identity.tensor_parallel_size,
        chunk_tokens=tuning.chunk.chunk_tokens,
    )


def parse_names(text: str) -> tuple[str, ...]:
    """Comma-separated words, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
