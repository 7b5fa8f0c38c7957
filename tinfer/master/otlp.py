"""`--otlp-traces-endpoint`: what the options ask for, looked at before anything starts.

The packages of OpenTelemetry come with vLLM, and are imported only where the option is given.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from tinfer.clock import Clock
from tinfer.config import ServeConfig
from tinfer.errors import StartError

if TYPE_CHECKING:
    from tinfer.master.tracing.spans import SpanSender

# The SDK's variable, and vLLM's default for it.
PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
GRPC, HTTP = "grpc", "http/protobuf"
_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto")


def check_otlp_option(config: ServeConfig) -> None:
    """Opens nothing. Raises `StartError` where no span could be sent."""
    endpoint = config.otlp_traces_endpoint
    if endpoint is None:
        return
    protocol = _protocol()
    if protocol not in (GRPC, HTTP):
        raise StartError(f"{PROTOCOL_VARIABLE} is {protocol!r}: it takes {GRPC} or {HTTP}")
    is_url = endpoint.startswith(("http://", "https://"))
    if not endpoint.rpartition("//")[2] or not (is_url or (protocol == GRPC and ":" in endpoint)):
        wanted = "an http:// or https:// URL" + (" or HOST:PORT" if protocol == GRPC else "")
        raise StartError(f"--otlp-traces-endpoint takes {wanted}, got {endpoint!r}")
    for name in _PACKAGES:
        if not _is_there(name):
            raise StartError(f"--otlp-traces-endpoint needs the package {name}, which is missing")


def open_spans(config: ServeConfig, clock: Clock, model: str) -> SpanSender | None:
    """What sends a span of every request that ends; None where no option asks for it.

    `clock` is the dispatcher's.
    """
    if config.otlp_traces_endpoint is None:
        return None
    from tinfer.master.tracing.spans import SpanSender, exporter_to

    is_grpc = _protocol() == GRPC
    return SpanSender(exporter_to(config.otlp_traces_endpoint, is_grpc), clock, model)


def _protocol() -> str:
    return os.environ.get(PROTOCOL_VARIABLE) or GRPC


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
