"""What the real server says of itself, and what it refuses, at start and per request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import tinfer
from tests.e2e.serving import (
    ServeProcess,
    get_json,
    post_json,
    run_to_end,
    until_idle,
)

MAX_MODEL_LEN = 32768
VOCAB_SIZE = 264


async def test_reports(server: ServeProcess) -> None:
    async with aiohttp.ClientSession(server.url) as session:
        for path in ("/health", "/ping"):
            async with session.get(path) as response:
                assert (response.status, await response.read()) == (200, b"")
    assert await get_json(f"{server.url}/version") == {"version": tinfer.__version__}
    models = await get_json(f"{server.url}/v1/models")
    (card,) = models["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", MAX_MODEL_LEN)
    alone = await get_json(f"{server.url}/v1/models/tiny")
    assert {**alone, "permission": []} == {**card, "permission": []}


async def test_state_names_workers_and_phases(server: ServeProcess) -> None:
    await post_json(server.url, {"prompt": "abc", "max_tokens": 3})
    await until_idle(server.url)
    state = await get_json(f"{server.url}/debug/state")
    assert state["status"] == "ok" and state["scheduler"]["costs"]["base_s"] > 0
    assert dict.fromkeys(state["requests_by_phase"]) == dict.fromkeys(
        ("queued", "prefilling", "handoff", "decoding")
    )
    pids = {process.pid for process in server.family()}
    prefill, decode = state["workers"]
    assert (prefill["id"], prefill["role"]) == ("prefill-0", "prefill")
    assert (decode["id"], decode["role"]) == ("decode-0", "decode")
    for worker in (prefill, decode):
        assert worker["pid"] in pids
        assert (worker["state"], worker["generation"], worker["restarts"]) == ("ready", 1, 0)
        assert worker["transport"] == "shm"
        assert worker["engine"]["num_used_blocks"] == 0
        assert worker["scheduled"]["num_seqs"] == 0


BAD_GUIDES: list[dict[str, Any]] = [
    {"regex": "("},
    {"grammar": "not a grammar ::="},
    {"json": {"type": "no-such-type"}},
]
REFUSED: list[tuple[int, dict[str, Any]]] = [
    (404, {"model": "other"}),
    (400, {"prompt": [65] * MAX_MODEL_LEN}),
    (400, {"max_tokens": MAX_MODEL_LEN + 1}),
    (400, {"prompt": [65, VOCAB_SIZE]}),
    (400, {"prompt": [-1]}),
    (400, {"logit_bias": {str(VOCAB_SIZE): 1.0}}),
    (400, {"allowed_token_ids": [VOCAB_SIZE]}),
    *((400, {"structured_outputs": guide}) for guide in BAD_GUIDES),
    *((400, {"structured_outputs": guide, "stream": True}) for guide in BAD_GUIDES),
]


@pytest.mark.parametrize(("status", "change"), REFUSED, ids=lambda value: str(value)[:50])
async def test_refusals(server: ServeProcess, status: int, change: dict[str, Any]) -> None:
    """In OpenAI's shape, with nothing held afterwards, whoever refuses: the API or an engine."""
    async with aiohttp.ClientSession() as session:
        body = {"model": "tiny", "prompt": "abc", **change}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == status, answer
    error = answer["error"]
    assert error["message"] and error["code"] == status
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
    await until_idle(server.url)
    assert (await post_json(server.url, {"prompt": "abc", "max_tokens": 2}))["choices"]


async def test_unknown_fields_are_ignored_and_named(server: ServeProcess) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "colour": "red", "mood": 1}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/completions", json=body) as response,
    ):
        assert response.status == 200
        ignored = response.headers["X-Tinfer-Ignored"]
    assert sorted(name.strip() for name in ignored.split(",")) == ["colour", "mood"]


async def test_strict_params(tight_server: ServeProcess) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
    async with aiohttp.ClientSession(tight_server.url) as session:
        async with session.post("/v1/completions", json={**body, "colour": "red"}) as response:
            assert response.status == 400
            assert "colour" in (await response.json())["error"]["message"]
        async with session.post("/v1/completions", json=body) as response:
            assert response.status == 200


def test_port_that_is_served(server: ServeProcess, model_dir: str, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    code, line = run_to_end(tmp_path, model_dir, "--port", port)
    assert code == 2
    assert f"127.0.0.1:{port} is in use by process {server.process.pid} (" in line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: d / "none", "no such model directory"),
        (lambda d: d, "config.json is missing"),
    ],
    ids=["missing", "empty"],
)
def test_model_that_is_not_there(tmp_path: Path, make: Any, says: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    code, line = run_to_end(tmp_path, str(make(folder)))
    assert code == 2
    assert line.startswith("tinfer: ") and says in line


def test_tokenizer_that_cannot_be_read(model_dir: str, tmp_path: Path) -> None:
    """Seen while the import process still imports: it ends at once, and so does its directory."""
    broken = _copy(model_dir, tmp_path)
    (broken / "tokenizer.json").write_text("{")
    code, line = run_to_end(tmp_path, str(broken))
    assert code == 2
    assert line.startswith("tinfer: ") and "tokenizer" in line


def test_log_directory_that_is_missing(model_dir: str, tmp_path: Path) -> None:
    code, line = run_to_end(tmp_path, model_dir, "--log-dir", str(tmp_path / "none"))
    assert code == 2
    assert line.startswith("tinfer: ") and str(tmp_path / "none") in line


@pytest.mark.timeout(240)
def test_model_that_vllm_does_not_know(model_dir: str, tmp_path: Path) -> None:
    unknown = _copy(model_dir, tmp_path)
    config = json.loads((unknown / "config.json").read_text())
    config["architectures"] = ["NoSuchForCausalLM"]
    (unknown / "config.json").write_text(json.dumps(config))
    code, line = run_to_end(tmp_path, str(unknown))
    assert code == 2
    assert line.startswith("tinfer: worker ") and "NoSuchForCausalLM" in line


def test_model_whose_kv_cache_cannot_be_split(model_dir: str, tmp_path: Path) -> None:
    """The same weights under an architecture with a sliding window: refused, not served wrongly."""
    sliding = _copy(model_dir, tmp_path)
    config = json.loads((sliding / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (sliding / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    code, line = run_to_end(tmp_path, str(sliding))
    assert code == 2
    assert line.endswith(
        "the model's KV cache is SlidingWindowSpec; only full attention can be split"
    )


def test_transport_that_cannot_be_had(model_dir: str, tmp_path: Path) -> None:
    code, line = run_to_end(tmp_path, model_dir, "--kv-transport", "cuda-ipc")
    assert code == 2
    assert line.endswith("it moves GPU memory, and the workers are on CPU")


def test_vllm_that_cannot_be_imported(model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('no such build here')")
    environment = {"PYTHONPATH": str(tmp_path)}
    code, line = run_to_end(tmp_path, model_dir, environment=environment)
    assert code == 2
    assert line.startswith("tinfer: worker ") and "no such build here" in line


def _copy(model_dir: str, folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(model_dir, target)
    return target
