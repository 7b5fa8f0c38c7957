"""One plain vLLM engine: no connector, no logits processor, no tinfer server.

`python -m tests.e2e.reference_engine MODEL IN OUT [DTYPE]` runs the requests of IN (JSON) all at
once and writes what each one emitted, step by step. The engine has the worker's chunk size and
thread count, and the patch that keeps CPU generators alive through a chunked prefill
(`tinfer.worker.seeded_chunks`): without it a seeded request with a chunked prompt kills a CPU
engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tinfer.worker.environment import VLLM_ENVIRONMENT

CHUNK_TOKENS = 512


def main(model_dir: str, requests_file: str, results_file: str, dtype: str = "auto") -> None:
    import os

    os.environ.update(VLLM_ENVIRONMENT)
    requests = json.loads(Path(requests_file).read_text())
    Path(results_file).write_text(json.dumps(run(model_dir, requests, dtype)))


def run(
    model_dir: str, requests: list[dict[str, Any]], dtype: Any = "auto"
) -> list[list[dict[str, Any]]]:
    """Per request and choice: token ids, text, the text after each step, finish and stop reason,
    logprobs of the sampled tokens and of the top ones by id."""
    from vllm import LLMEngine, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from tinfer.worker.seeded_chunks import patch_cpu_runner

    patch_cpu_runner()
    engine = LLMEngine.from_engine_args(
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
            for completion in output.outputs:  # type: ignore[union-attr]
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
