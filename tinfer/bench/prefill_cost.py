"""How many decode steps a 1K-token prefill costs on this box: of a server that is otherwise idle.

It is what decides whether splitting the two phases can pay, and it differs by model and machine.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import statistics

import uvloop
from msgspec import Struct

from tinfer.bench.options import BenchOptions
from tinfer.bench.outcome import Outcome
from tinfer.bench.plan import check_fits, plan_of, requests_of, warm_ups_of
from tinfer.bench.sender import Sender, open_session
from tinfer.bench.target import TokenRange, find_target, vocab_size_of
from tinfer.errors import StartError

PROMPT_TOKENS = 1024
OUTPUT_TOKENS = 64
NUM_REPEATS = 5


class PrefillCost(Struct, frozen=True, kw_only=True):
    """What one request at a time sees, in milliseconds at the client.

    `prefill_ms`: median TTFT of prompts of `prompt_tokens`, none of which a prefix cache knows.
    `decode_step_ms`: median ITL of their answers of `output_tokens`, a batch of one.
    `ratio`: the first divided by the second. `ttft_ms` and `itl_ms` have one value per request, of
    ITL its median, to judge by how far they lie apart.
    """

    prompt_tokens: int
    output_tokens: int
    num_repeats: int
    prefill_ms: float
    decode_step_ms: float
    ratio: float
    ttft_ms: list[float]
    itl_ms: list[float]

    def line(self) -> str:
        """For a person."""
        return (
            f"1K-token prefill {self.prefill_ms:.1f} ms, decode step {self.decode_step_ms:.2f} ms: "
            f"ratio {self.ratio:.1f}"
        )


def measure(url: str, num_repeats: int = NUM_REPEATS) -> PrefillCost:
    """Ask the server at `url`, one request after the other, the first one of which is not counted.

    Raises `StartError` where an answer fails or the model is too short for it, and
    `TinferClientError` where no server is.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return cost_of(runner.run(_ask(url, num_repeats)))


def cost_of(answers: list[Outcome]) -> PrefillCost:
    """From whole answers, at least one, of two tokens or more each. Raises `StartError`."""
    for answer in answers:
        if not answer.ok or not answer.itls_s:
            reason = answer.error or f"{answer.output_tokens} tokens instead of {OUTPUT_TOKENS}"
            raise StartError(f"cannot measure: {reason}")
    ttft_ms = [1000 * answer.ttft_s for answer in answers]
    prefill_ms = statistics.median(ttft_ms)
    step_ms = 1000 * statistics.median(gap_s for answer in answers for gap_s in answer.itls_s)
    return PrefillCost(
        prompt_tokens=answers[0].prompt_tokens,
        output_tokens=answers[0].output_tokens,
        num_repeats=len(answers),
        prefill_ms=prefill_ms,
        decode_step_ms=step_ms,
        ratio=prefill_ms / step_ms,
        ttft_ms=ttft_ms,
        itl_ms=[1000 * statistics.median(answer.itls_s) for answer in answers],
    )


async def _ask(url: str, num_repeats: int) -> list[Outcome]:
    options = BenchOptions(
        base_url=url,
        input_len=PROMPT_TOKENS,
        output_len=OUTPUT_TOKENS,
        request_rate=math.inf,
        burstiness=1.0,
        num_prompts=num_repeats,
        num_warmups=1,
        max_concurrency=1,
        temperature=0.0,
        # Other prompts each time: a server measured before has the earlier ones in its cache.
        salt=secrets.token_hex(8),
    )
    target = await find_target(url, None, {}, 0.0)
    requests = requests_of(options)
    check_fits(requests, target)
    tokens = TokenRange.within(vocab_size_of(target)[0])
    async with open_session({}, 1) as session:
        sender = Sender(session, url + options.endpoint, 1)
        await sender.run(warm_ups_of(requests, target, tokens, options))
        return (await sender.run(plan_of(requests, target, tokens, options))).outcomes
