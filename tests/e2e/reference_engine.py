"""One plain vLLM engine: no connector, no logits processor, no tinfer server.

`python -m tests.e2e.reference_engine MODEL DTYPE` reads requests from its standard input, a JSON
list per line, computes those of a line all at once, and writes to its standard output, a line each,
what each one emitted, step by step. The engine has the worker's chunk size and thread count, and
the patch that keeps CPU generators alive through a chunked prefill (`tinfer.worker.seeded_chunks`):
without it a seeded request with a chunked prompt kills a CPU engine.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tinfer.worker.environment import VLLM_ENVIRONMENT

CHUNK_TOKENS = 512


def main(model_dir: str, dtype: str) -> None:
    # What vLLM prints is none of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(VLLM_ENVIRONMENT)
    engine = make_engine(model_dir, dtype)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), file=answers, flush=True)


def make_engine(model_dir: str, dtype: Any) -> Any:
    from vllm import LLMEngine
    from vllm.engine.arg_utils import EngineArgs

    from tinfer.worker.eager import compute_eagerly
    from tinfer.worker.seeded_chunks import patch_cpu_runner

    compute_eagerly()
    patch_cpu_runner()
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=model_dir,
            dtype=dtype,
            max_num_batched_tokens=CHUNK_TOKENS,
            max_num_seqs=256,
            kv_cache_memory_bytes=256 << 20,
            enforce_eager=True,
            async_scheduling=False,
            disable_log_stats=True,
            generation_config="vllm",
        )
    )


def run(engine: Any, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Per request and choice: token ids, text, the text after each step, finish and stop reason,
    logprobs of the sampled tokens and of the top ones by id."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    choices: dict[str, list[dict[str, Any]]] = {}
    for number, request in enumerate(requests):
        params = {"temperature": 0.0, **request["params"]}
        structured = params.pop("structured_outputs", None)
        if structured:
            params["structured_outputs"] = StructuredOutputsParams(**structured)
        if "logit_bias" in params:  # JSON has no integer keys
            params["logit_bias"] = {int(k): v for k, v in params["logit_bias"].items()}
        sampling = SamplingParams(**params, output_kind=RequestOutputKind.DELTA)
        choices[str(number)] = [_empty() for _ in range(sampling.n)]
        engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            for completion in output.outputs:
                _add(choices[output.request_id][completion.index], completion)
    return [choices[str(number)] for number in range(len(requests))]


def _empty() -> dict[str, Any]:
    return {
        "token_ids": [],
        "text": "",
        "prefixes": [],
        "logprobs": [],
        "top": [],
        "finish_reason": None,
        "stop_reason": None,
    }


def _add(choice: dict[str, Any], completion: Any) -> None:
    choice["token_ids"] += list(completion.token_ids)
    choice["text"] += completion.text
    choice["prefixes"].append(choice["text"])
    for token_id, position in zip(
        completion.token_ids, completion.logprobs or (), strict=bool(completion.logprobs)
    ):
        choice["logprobs"].append(position[token_id].logprob)
        choice["top"].append({str(t): entry.logprob for t, entry in position.items()})
    if completion.finish_reason is not None:
        choice["finish_reason"] = completion.finish_reason
        choice["stop_reason"] = completion.stop_reason


if __name__ == "__main__":
    main(*sys.argv[1:])
