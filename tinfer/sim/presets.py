"""Boxes by name: engines whose cost models and capacities have a source, said with each.

The paper's testbed (arXiv 2401.11181, section 5): OPT-13B with TP=2, so two V100-32GB per engine.
"""

from __future__ import annotations

from msgspec.structs import replace

from tinfer.core.costs import CostModel
from tinfer.core.types import Role
from tinfer.sim.spec import EngineSpec, WorkerSpec

# --- the paper's testbed -------------------------------------------------------------------------

# A linear fit to its figure 2, within 9 % of every point but the smallest: `CostModel`'s defaults.
OPT_13B_KV_BYTES_PER_TOKEN = 820_000  # 2 x 40 layers x 5120 x 2 bytes
# What two V100-32GB hold beside 26 GB of weights; an estimate, the paper does not say.
OPT_13B_KV_TOKENS = 35_000
# Source: section 5.1, the accelerator-saturate threshold of OPT-13B.
PAPER_CHUNK_TOKENS = 512
# Its vLLM fits a batch of 16 sequences (section 5.2.1 says so of figure 16).
PAPER_VLLM_NUM_SEQS = 16
# The largest decode batch that its figures show (section 2.2.3).
PAPER_DECODE_NUM_SEQS = 128
# The predictor beside the prompts: prefill throughput falls from about 3470 to 3080 tokens/s
# (section 5.2.2, at chunks of 512).
PAPER_PREDICTOR_TAX = 3470 / 3080 - 1
# The two emulated links of section 5.1, in bytes per second.
PAPER_LINKS = {"roce": 25e9, "nvlink": 300e9}

PAPER_ENGINE = EngineSpec(
    costs=CostModel(),
    num_blocks=OPT_13B_KV_TOKENS // 16,
    block_tokens=16,
    max_num_seqs=PAPER_DECODE_NUM_SEQS,
    max_num_batched_tokens=PAPER_CHUNK_TOKENS,
    prefix_caching=False,
    num_devices=2,
)
# vLLM as it was when the paper was written: prompts whole and in steps of their own, 2560 tokens
# of prompts per step at most, 1 % of the blocks kept free on admission.
PAPER_VLLM = replace(
    PAPER_ENGINE,
    max_num_seqs=PAPER_VLLM_NUM_SEQS,
    max_num_batched_tokens=2560,
    chunked_prefill=False,
    watermark=0.01,
)
# The honest baseline on the same devices: today's plain engine, chunked and uncapped.
PAPER_REPLICA = replace(PAPER_ENGINE, max_num_seqs=256, max_num_batched_tokens=2048)


def paper_workers(
    num_prefill: int = 1, num_decode: int = 1, link: str = "nvlink", with_predictor: bool = True
) -> tuple[WorkerSpec, ...]:
    """The paper's instances, two V100 each; `link` is `nvlink` or `roce` (`ValueError` else).

    With the predictor the prompts of a prefill worker take as much longer as the paper measured.
    """
    if link not in PAPER_LINKS:
        raise ValueError(f"no link {link!r}; there are {', '.join(PAPER_LINKS)}")
    costs = replace(
        PAPER_ENGINE.costs,
        handoff_s=0.0,
        handoff_token_s=OPT_13B_KV_BYTES_PER_TOKEN / PAPER_LINKS[link],
    )
    decode = replace(PAPER_ENGINE, costs=costs)
    tax = PAPER_PREDICTOR_TAX if with_predictor else 0.0
    return workers(replace(decode, prefill_tax=tax), num_prefill, decode, num_decode)


# --- a GPU ---------------------------------------------------------------------------------------

# Nothing of this was measured. An 8B model in bf16 on an H200 (989 TF/s, 4.8 TB/s, 141 GB): a
# prompt token is 16 GFLOP at 55 % of the peak, a step reads 16 GB of weights and 128 KiB of KV per
# token (32 layers, 8 KV heads of 128) at 77 % of the bandwidth, attention over a prompt takes half
# a MFLOP per pair of tokens. A sequence's own share of a step and the fixed part of a hand-off are
# guesses; the link is NVLink at 80 % of 450 GB/s.
GPU_ESTIMATE = EngineSpec(
    costs=CostModel(
        base_s=4.3e-3,
        prefill_token_s=29.5e-6,
        prefill_context_s=1e-9,
        decode_seq_s=10e-6,
        kv_token_s=35e-9,
        handoff_s=1e-3,
        handoff_token_s=0.36e-6,
        source="estimate, not measured: 8B bf16 on one H200",
    ),
    # What 90 % of the memory holds beside the weights.
    num_blocks=847_000 // 16,
    block_tokens=16,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    victim="least-progress",
)

# --- this project's CPU box ----------------------------------------------------------------------

# The model of `tinfer bench model` (Llama, 51.7 M parameters, bf16) on one AMD EPYC core, vLLM
# 0.32.0, as `tinfer tune --cpu-threads 1` measured it on 2026-11-22, rounded. KV is 2.5 KiB per
# token, in 512 MiB; the hand-off goes through shared memory.
CPU_52M = EngineSpec(
    costs=CostModel(
        base_s=5.9e-3,
        prefill_token_s=0.30e-3,
        prefill_context_s=0.12e-6,
        decode_seq_s=0.35e-3,
        kv_token_s=0.46e-6,
        handoff_s=3.8e-3,
        handoff_token_s=2.9e-6,
        source="Llama 52M bf16 on one AMD EPYC core, 2026-11-22",
    ),
    num_blocks=209_664 // 128,
    block_tokens=128,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    victim="least-progress",
)

ENGINES = {"paper": PAPER_ENGINE, "gpu-estimate": GPU_ESTIMATE, "cpu-52m": CPU_52M}


def workers(
    prefill: EngineSpec, num_prefill: int, decode: EngineSpec, num_decode: int
) -> tuple[WorkerSpec, ...]:
    """So many workers of each role, called p000, p001 ... and d000, d001 ..."""
    return tuple(
        WorkerSpec(worker_id=f"{letter}{number:03d}", role=role, engine=engine)
        for letter, role, engine, num in (
            ("p", Role.PREFILL, prefill, num_prefill),
            ("d", Role.DECODE, decode, num_decode),
        )
        for number in range(num)
    )


def replica_of(engine: EngineSpec, max_num_batched_tokens: int | None = None) -> EngineSpec:
    """A plain replica on the same device: vLLM's own victim, and another step budget if given."""
    budget = max_num_batched_tokens or engine.max_num_batched_tokens
    return replace(
        engine,
        victim="newest",
        max_num_batched_tokens=budget,
        max_num_seqs=min(engine.max_num_seqs, budget),
    )
