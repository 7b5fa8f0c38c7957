"""What happens before any process of ours is started: decide, say it, download."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click
import msgspec

from tinfer.config import ServeConfig
from tinfer.master import hub, plan
from tinfer.master.conflicts import check_gpus
from tinfer.master.cores import CoreClaims
from tinfer.master.event_log import check_writable
from tinfer.master.front import open_front
from tinfer.master.hub_fetch import fetch
from tinfer.master.limits import client_descriptors, raise_descriptor_limit
from tinfer.master.otlp import check_otlp_option
from tinfer.master.parsers import check_parsers
from tinfer.master.plan import Decision, Plan
from tinfer.master.predictor_state import check_state_option
from tinfer.master.request_log import check_request_log_options
from tinfer.master.tuned import stored_tuning


def prepare(config: ServeConfig, claims: CoreClaims) -> tuple[ServeConfig, Decision]:
    """Decide, print the plan on standard error, and have the model's files in place.

    Returns the options with what a tuning settles, and the decision. Blocks; a Ctrl-C ends it at
    once. Raises `StartError`.
    """
    config, decision = _decide(config, claims)
    click.echo(plan.text_of(decision.plan), err=True)
    model = decision.model
    if model.hub is None or not model.hub.missing:
        return config, decision
    size = hub.gb(model.hub.missing_bytes)
    click.echo(f"downloading {len(model.hub.missing)} files, {size} (Ctrl-C is safe)", err=True)
    there = msgspec.structs.replace(model, directory=fetch(model.hub))
    return config, msgspec.structs.replace(decision, model=there)


def dry_run(config: ServeConfig) -> Plan:
    """The plan, with nothing started and no weights downloaded.

    Raises `StartError` where a start would end with one before its first process.
    """
    with (
        open_front(config, dict(os.environ)) as (config, _),
        contextlib.closing(CoreClaims()) as claims,
    ):
        _, decision = _decide(config, claims)
        raise_descriptor_limit()
        client_descriptors(len(decision.placements))
        return decision.plan


def _decide(config: ServeConfig, claims: CoreClaims) -> tuple[ServeConfig, Decision]:
    if config.event_log is not None:
        check_writable(Path(config.event_log))
    check_state_option(config)
    check_parsers(config)
    check_request_log_options(config)
    check_otlp_option(config)
    around = plan.look_around(config, claims)
    decision = plan.decide(config, around)
    tuning = stored_tuning(config, decision, around.gpus)
    decision = msgspec.structs.replace(decision, tuning=tuning)
    tuned = config.with_measured_chunk(None if tuning is None else tuning.chunk.chunk_tokens)
    if tuned != config:
        config = tuned
        if around.gpus:  # a larger step leaves less room for KV
            decision = plan.decide(config, around)
        reason = (
            f"chunks of {config.chunk_size} tokens and the costs of a step are what tune measured"
        )
        shown = msgspec.structs.replace(decision.plan, reasons=(*decision.plan.reasons, reason))
        decision = msgspec.structs.replace(decision, plan=shown, tuning=tuning)
    check_gpus(decision.placements)
    return config, decision
