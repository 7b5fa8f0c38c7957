"""`tinfer.LLM` on real vLLM: the answers of the built-in model, with ids and log probabilities."""

from __future__ import annotations

import math

import tinfer


def test_a_script(model_dir: str) -> None:
    greedy = tinfer.SamplingParams(temperature=0, max_tokens=32, logprobs=2)
    with tinfer.LLM(model_dir, cpu_threads=1) as llm:
        (chat,) = llm.chat("Count from 7 to 11.", greedy, use_tqdm=False)
        (answer,) = chat.outputs
        assert (answer.text, answer.finish_reason) == ("7 8 9 10 11", "stop")
        assert chat.prompt is not None and "Count from 7 to 11." in chat.prompt
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
        for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True):
            assert next(iter(position)) == token_id
            assert 2 <= len(position) <= 3
            assert all(found.logprob <= position[token_id].logprob for found in position.values())
        texts = [p[i].decoded_token for i, p in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert "".join(text or "" for text in texts).startswith(answer.text)

        # The same prompt by its ids, as `generate` takes it.
        ids = chat.prompt_token_ids
        assert ids is not None
        again = tinfer.SamplingParams(temperature=0, max_tokens=32, logprobs=2, prompt_logprobs=1)
        (output,) = llm.generate([ids], again, use_tqdm=False)
        (first,) = output.outputs
        assert first.token_ids == answer.token_ids
        assert first.cumulative_logprob is not None and answer.cumulative_logprob is not None
        assert math.isclose(first.cumulative_logprob, answer.cumulative_logprob, abs_tol=1e-2)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        for token_id, told in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
            assert told is not None and told[token_id].rank is not None
