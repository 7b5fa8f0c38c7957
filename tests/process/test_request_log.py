"""A live server writes a line per request, and what reads request logs reads it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from click.testing import CliRunner

import tinfer
from tests.process.box import running, until
from tests.process.load import Request, chat, completion
from tinfer.cli import main
from tinfer.client.params import Wishes
from tinfer.predict.asked import Asked, End
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import restore
from tinfer.predict.predictors import Prior
from tinfer.sim.prequential import trials_of
from tinfer.workloads import LogRecord, read_log

FAKE = {"step_s": 0.0005, "mean_output_tokens": 24, "seed": 3}
SYSTEMS = tuple([100 * tenant + i for i in range(80)] for tenant in range(1, 4))


def served_by_tenants(num: int) -> list[Request]:
    rng = random.Random("request log")
    requests: list[Request] = []
    for number in range(num):
        own = [rng.randrange(5, 500) for _ in range(rng.randrange(3, 60))]
        system = SYSTEMS[number % len(SYSTEMS)]
        hint: dict[str, Any] = {"tinfer": {"expected_output_tokens": 24, "priority": number % 2}}
        requests.append(completion(system + own, max_tokens=400, seed=number, **hint))
    return requests


def read(path: Path) -> list[LogRecord]:
    assert path.stat().st_mode & 0o077 == 0
    return read_log(path)


def ran(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def sizes_of(folder: Path) -> dict[str, int]:
    """The files of the log, in bytes."""
    return {one.name: one.stat().st_size for one in sorted(folder.glob("requests.jsonl*"))}


async def until_lines(path: Path, num_lines: int) -> None:
    """Wait until the log has so many: they are written behind the answers."""

    async def look() -> list[bytes]:
        return lines_of(path)

    await until(look, lambda lines: len(lines) == num_lines)


async def test_a_log_under_load_is_evaluated_simulated_and_planned_with(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    options = {"predictor": "online", "request_log": path, "prefill": 1, "decode": 1}
    with running(tmp_path, FAKE, **options) as server:
        requests = served_by_tenants(60)
        await server.answer(*requests, num_connections=8)
        for request in requests:
            request.check_answered(server.settings)
        await server.idle()
        state = await server.state()
        assert state["request_log"]["num_lost"] == 0
        server.stop()
    records = read(path)
    assert len(records) == len({record.request_id for record in records}) == 60
    by_length = sorted(record.output_tokens for record in records)
    assert by_length == sorted(request.num_tokens for request in requests)
    for record in records:
        assert (record.route, record.predictor, record.error) == ("split", "online", None)
        assert record.finish_reason in ("stop", "length") and record.workers
        assert record.ttft_s is not None and record.e2el_s is not None
        assert record.predicted_low_tokens is not None and record.expected_output_tokens == 24
        assert record.segments is not None
        assert sum(one.num_tokens for one in record.segments) == record.prompt_tokens
    assert len({record.prompt_head for record in records}) == len(SYSTEMS)
    assert all(trial.asked.features.signature for trial in trials_of(records))

    result = json.loads(ran("predictor", "eval", "--from", str(path), "--json", "-"))
    assert result["num_requests"] == 60 and "online+hints" in result["predictors"]
    ran("predictor", "train", "--from", str(path), "--out", str(tmp_path / "state"))
    predictor = OnlinePredictor()
    restore(predictor, (tmp_path / "state").read_bytes())
    assert predictor.num_observed == 60
    result = json.loads(ran("simulate", "--log", str(path), "--json", "-"))
    assert result["settings"]
    ran("plan", "--gpus", "2", "--log", str(path), "--num-requests", "8", "--jobs", "1")


async def test_how_requests_end_and_what_is_never_kept(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    text = "the words of a secret plan"
    slow = {**FAKE, "step_s": 0.01, "mean_output_tokens": 1_000_000}
    options = {"request_log": path, "shutdown_timeout": 0.2}
    with running(tmp_path, slow, prefill=1, decode=1, **options) as server:
        await server.answer(chat(text, max_tokens=4))
        await server.answer(completion([1, 2, 3], max_tokens=5, ignore_eos=True))
        late = completion([4, 5, 6], max_tokens=5000, stream=False, tinfer={"deadline_ms": 120})
        await server.answer(late)
        assert late.status == 504
        await server.idle(3)
        await until_lines(path, 3)
        # What a signal cuts is in the log as well.
        cut = asyncio.create_task(server.answer(completion([7, 8, 9], max_tokens=5000)))
        await server.until_phase(decoding=1)
        server.process.process.send_signal(signal.SIGTERM)
        await cut
        assert server.process.process.wait(20) == 0
    chatted, whole, timed_out, stopped = read(path)
    assert (chatted.finish_reason, chatted.output_tokens) == ("length", 4)
    assert whole.runs_to_bound and not chatted.runs_to_bound
    assert timed_out.finish_reason == "abort" and timed_out.deadline_s == 0.12
    assert 0 < timed_out.output_tokens < 5000 and timed_out.e2el_s is not None
    assert (stopped.finish_reason, stopped.error) == ("error", "503 ServiceUnavailableError")
    ends = [trial.end for trial in trials_of([chatted, whole, timed_out, stopped])]
    assert ends == [End.LENGTH, End.LENGTH, End.ABORT, End.ERROR]
    log = path.read_bytes()
    assert b"secret" not in log
    assert b'"prompt_text":null' in log and b'"prompt_token_ids":null' in log


async def test_clients_say_what_they_expect_and_are_told_what_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    wishes: Wishes = {"expected_output_tokens": 3, "include_prediction": True, "priority": 2}
    with running(tmp_path, FAKE, request_log=path, prefill=1, decode=1) as server:
        async with tinfer.AsyncClient(server.url) as client:
            told = await client.chat("hi", max_tokens=300, tinfer=wishes)
            assert told.usage is not None
            predicted = told.usage.tinfer_prediction
            model = told.model
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as stock:
            said = await stock.completions.create(
                model=model, prompt="hi", max_tokens=300, extra_body={"tinfer": wishes}
            )
            assert said.usage is not None and said.usage.model_extra is not None
            shown = said.usage.model_extra["tinfer_prediction"]
            with pytest.raises(openai.BadRequestError, match=r"tinfer\.expected_output_tokens"):
                wrong = {"tinfer": {"expected_output_tokens": -1}}
                await stock.completions.create(model=model, prompt="hi", extra_body=wrong)
        server.stop()
    assert predicted is not None and predicted.predictor == shown["predictor"] == "prior"
    unhinted = Prior().predict(Asked("r", 2, 300)).quantile(0.1)
    assert predicted.low_tokens == shown["low_tokens"] < unhinted
    for record in read(path):
        assert (record.expected_output_tokens, record.priority) == (3, 2)
        assert record.predicted_output_tokens == predicted.median_tokens


async def test_prompts_are_kept_on_request_and_files_are_rotated(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    options = {"request_log": path, "request_log_max_bytes": 2500, "request_log_files": 2}
    flags = {**options, "prefill": 1, "decode": 1}
    (tmp_path / "options.toml").write_text("log_prompts = true\n")
    with running(tmp_path, FAKE, config=tmp_path / "options.toml", **flags) as server:
        for number in range(8):
            await server.answer(chat(f"plan {number}", max_tokens=2))
        await server.answer(completion([5, 6, 7], max_tokens=2))
        server.stop()
    sizes = sizes_of(tmp_path)
    assert list(sizes) == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert max(sizes.values()) <= 2500
    last = msgspec.json.decode(lines_of(path)[-1])
    assert (last["prompt_token_ids"], last["prompt_text"]) == ([5, 6, 7], None)
    older = [msgspec.json.decode(line) for line in lines_of(Path(f"{path}.1"))]
    assert all("plan " in one["prompt_text"] for one in older)
