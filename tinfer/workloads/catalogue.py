"""Every workload by name, and `make`, which turns a spec into requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from msgspec.structs import replace

from tinfer.workloads import arrivals, lengths
from tinfer.workloads.chat import TASK as CHAT_TASK
from tinfer.workloads.chat import chat
from tinfer.workloads.requests import Request
from tinfer.workloads.single_turn import RequestClass, single_turn
from tinfer.workloads.spec import WorkloadSpec
from tinfer.workloads.tenants import multi_tenant

Options = Mapping[str, float]


class Option(NamedTuple):
    """A setting of one workload: any number from `low` to `high`."""

    default: float
    low: float
    high: float
    description: str


@dataclass(frozen=True)
class Workload:
    """An entry of the catalogue.

    `tasks` are all the classes its requests can have. `own_rate_rps` is the rate where a spec
    names none; None: everything at t = 0. `build` gets a spec and options that are complete.
    """

    name: str
    description: str
    tasks: tuple[str, ...]
    own_rate_rps: float | None
    build: Callable[[WorkloadSpec, Options], list[Request]]
    options: Mapping[str, Option] = field(default_factory=dict)


LPLD = RequestClass("LPLD", lengths.LIGHT_PROMPT, lengths.LIGHT_DECODE)
LPHD = RequestClass("LPHD", lengths.LIGHT_PROMPT, lengths.HEAVY_DECODE)
HPLD = RequestClass("HPLD", lengths.HEAVY_PROMPT, lengths.LIGHT_DECODE)
HPHD = RequestClass("HPHD", lengths.HEAVY_PROMPT, lengths.HEAVY_DECODE)
CODE = RequestClass("code", lengths.AZURE_CODE_PROMPT, lengths.AZURE_CODE_OUTPUT)
CONVERSATION = RequestClass(
    "conversation", lengths.AZURE_CONVERSATION_PROMPT, lengths.AZURE_CONVERSATION_OUTPUT
)
BURST = RequestClass("burst", lengths.BURSTGPT_PROMPT, lengths.BURSTGPT_OUTPUT)
SUMMARY = RequestClass("summary", lengths.ARXIV_PROMPT, lengths.ARXIV_OUTPUT)
LONG_SUMMARY = RequestClass("long-summary", lengths.LONG_ARXIV_PROMPT, lengths.LONG_ARXIV_OUTPUT)

# Rates as measured on the traces; the processes below stretch with the rate asked for.
AZURE_CODE_RPS = 2.57
AZURE_CONVERSATION_RPS = 5.53
# Sources that state no rate: one request per second, to be scaled by whoever measures.
UNSTATED_RPS = 1.0
# Measured: gaps of CV 1.09, and counts whose variance over mean is 1.4, 4.0 and 20.6 at 1, 10 and
# 60 s. Gamma gaps of CV 1.02 under this sine give 1.09, and 1.4, 4.5 and 21.
CONVERSATION_GAP_CV = 1.02
SWELL_DEPTH = 0.35
SWELL_REQUESTS = 600.0 * AZURE_CONVERSATION_RPS

CV = "coefficient of variation of the gaps between arrivals"
ON_SHARE = Option(0.2, 0.01, 0.99, "share of time in which requests arrive at all")
TENANT_OPTIONS = {
    "num_tenants": Option(8, 1, 1000, "number of tenants"),
    "zipf": Option(1.0, 0.0, 5.0, "tenant rates fall as 1 / rank^zipf"),
    "system_prompt_tokens": Option(256, 0, 1e6, "shared prefix of a tenant's prompts, unscaled"),
}


def _poisson_of(*classes: RequestClass) -> Callable[[WorkloadSpec, Options], list[Request]]:
    return lambda spec, options: single_turn(spec, classes, arrivals.poisson)


def conversation_arrivals(rng: random.Random, rate_rps: float) -> Iterator[float]:
    """Azure's conversations: nearly Poisson from one arrival to the next, under a slow swell."""
    burstiness = arrivals.burstiness_of(CONVERSATION_GAP_CV)
    return arrivals.swelling(rng, rate_rps, burstiness, SWELL_DEPTH, SWELL_REQUESTS)


def _conversation(spec: WorkloadSpec, options: Options) -> list[Request]:
    return single_turn(spec, [CONVERSATION], conversation_arrivals)


def _on_off(spec: WorkloadSpec, options: Options, drawn: RequestClass) -> list[Request]:
    def own(rng: random.Random, rate_rps: float) -> Iterator[float]:
        return arrivals.on_off(rng, rate_rps, options["cv"], options["on_share"])

    return single_turn(spec, [drawn], own)


def _gamma_burst(spec: WorkloadSpec, options: Options) -> list[Request]:
    burstiness = arrivals.burstiness_of(options["cv"])

    def own(rng: random.Random, rate_rps: float) -> Iterator[float]:
        return arrivals.gamma(rng, rate_rps, burstiness)

    return single_turn(spec, [BURST], own)


def _paper(name: str, description: str, *classes: RequestClass) -> Workload:
    tasks = tuple(each.task for each in classes)
    return Workload(name, f"{description}, all at t = 0", tasks, None, _poisson_of(*classes))


_ALL = (
    _paper("LPLD", "The paper's light prefill, light decode", LPLD),
    _paper("LPHD", "The paper's light prefill, heavy decode", LPHD),
    _paper("HPLD", "The paper's heavy prefill, light decode", HPLD),
    _paper("HPHD", "The paper's heavy prefill, heavy decode", HPHD),
    _paper("Mixed", "The paper's four classes in equal parts", LPLD, LPHD, HPLD, HPHD),
    Workload(
        "azure-code",
        "Azure 2023 code completion: long prompts, short answers, in waves with silence between",
        (CODE.task,),
        AZURE_CODE_RPS,
        lambda spec, options: _on_off(spec, options, CODE),
        {"cv": Option(13.0, 1.01, 100.0, CV), "on_share": ON_SHARE},
    ),
    Workload(
        "azure-conversation",
        "Azure 2023 conversation: 1K prompts, 100 to 400-token answers, a slowly swelling rate",
        (CONVERSATION.task,),
        AZURE_CONVERSATION_RPS,
        _conversation,
    ),
    Workload(
        "burst",
        "BurstGPT lengths, gamma gaps of high variation",
        (BURST.task,),
        UNSTATED_RPS,
        _gamma_burst,
        {"cv": Option(3.0, 0.0, 100.0, CV)},
    ),
    Workload(
        "burst-on-off",
        "BurstGPT lengths, Poisson bursts with silence between",
        (BURST.task,),
        UNSTATED_RPS,
        lambda spec, options: _on_off(spec, options, BURST),
        {"cv": Option(3.0, 1.01, 100.0, CV), "on_share": ON_SHARE},
    ),
    Workload(
        "summarise",
        "arXiv summarising, documents up to 4K tokens",
        (SUMMARY.task,),
        UNSTATED_RPS,
        _poisson_of(SUMMARY),
    ),
    Workload(
        "summarise-long",
        "arXiv summarising, whole documents up to 32K tokens",
        (LONG_SUMMARY.task,),
        UNSTATED_RPS,
        _poisson_of(LONG_SUMMARY),
    ),
    Workload(
        "multi-tenant",
        "Conversation, code and summarising tenants of uneven rates, a system prompt each",
        (CONVERSATION.task, CODE.task, SUMMARY.task),
        UNSTATED_RPS,
        lambda spec, options: multi_tenant(spec, options, [CONVERSATION, CODE, SUMMARY]),
        TENANT_OPTIONS,
    ),
    Workload(
        "chat",
        "Conversations of several turns, each prompt holding all turns before it",
        (CHAT_TASK,),
        UNSTATED_RPS,
        chat,
        {
            **TENANT_OPTIONS,
            "mean_turns": Option(4.0, 1.0, 1000.0, "mean number of turns of a session"),
            "max_turns": Option(16, 1, 1000, "most turns of a session"),
            "think_s": Option(10.0, 0.0, 1e6, "mean time between an answer and the next question"),
            "answer_s_per_token": Option(0.03, 0.0, 1e3, "time an answer is taken to need"),
        },
    ),
)
WORKLOADS: Mapping[str, Workload] = MappingProxyType({each.name: each for each in _ALL})


def make(spec: WorkloadSpec) -> list[Request]:
    """The requests that `spec` stands for, by arrival; exactly `spec.num_requests`.

    Request ids are unique within the list and hold the workload's name and the seed.
    Raises `ValueError` for an unknown workload or option, for an option out of its range, and for
    a burstiness without a rate.
    """
    workload = WORKLOADS.get(spec.name)
    if workload is None:
        raise ValueError(f"no workload {spec.name!r}; there are {', '.join(WORKLOADS)}")
    if spec.rate_rps is None and not spec.at_once:
        if workload.own_rate_rps is None and spec.burstiness is not None:
            raise ValueError(f"{spec.name} arrives at once: burstiness needs a rate_rps")
        spec = replace(spec, rate_rps=workload.own_rate_rps)
    requests = workload.build(spec, _complete(workload, spec.options))
    return sorted(requests, key=lambda request: request.arrival_s)


def _complete(workload: Workload, given: Options) -> dict[str, float]:
    """The options given, checked, and the defaults of the others."""
    for name, value in given.items():
        option = workload.options.get(name)
        if option is None:
            known = ", ".join(workload.options) or "none"
            raise ValueError(f"{workload.name} has no option {name!r}; it has {known}")
        if not option.low <= value <= option.high:
            raise ValueError(f"{name} = {value:g} is outside {option.low:g} to {option.high:g}")
    return {name: option.default for name, option in workload.options.items()} | dict(given)
