"""A server whose options come from a file, the environment and flags; some that do not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.serving import get_json, run_to_end, serving
from tests.unit.model_box import SMALL, write_model

FILE = """
engine = "fake"
route = "split"
served_model_name = "of-the-file"
max_model_len = 64
shutdown_timeout = 5

[fake_engine]
num_blocks = 50
block_tokens = 4
"""


def file_in(folder: Path, more: str = "") -> Path:
    path = folder / "options.toml"
    path.write_text(more + FILE)
    path.chmod(0o600)
    return path


async def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    environment = {
        "TINFER_CONFIG": str(file_in(tmp_path)),
        "TINFER_MAX_MODEL_LEN": "128",
        "TINFER_SERVED_MODEL_NAME": "of-the-environment",
        "TINFER_FAKE_ENGINE": "num_blocks=60",
        "TINFER_PORT": "1",  # --port 0 is a flag here
    }
    flags = ("--served-model-name", "of-the-flag", "--fake-engine", "mean_output_tokens=4")
    with serving(tmp_path, *flags, environment=environment) as server:
        (model,) = (await get_json(f"{server.url}/v1/models"))["data"]
        assert (model["id"], model["max_model_len"]) == ("of-the-flag", 128)
        workers = (await get_json(f"{server.url}/debug/state"))["workers"]
        assert [worker["num_blocks"] for worker in workers] == [60, 60]
        assert server.interrupt() == 0


@pytest.mark.parametrize("from_environment", [False, True])
async def test_keys_of_a_file_protect_the_server(tmp_path: Path, from_environment: bool) -> None:
    path = file_in(tmp_path, 'api_key = ["sk-file"]\n')
    environment = {"TINFER_API_KEY": "sk-env"} if from_environment else {}
    valid, other = ("sk-env", "sk-file") if from_environment else ("sk-file", "sk-env")
    with serving(tmp_path, "--config", str(path), environment=environment) as server:
        async with aiohttp.ClientSession(server.url) as session:
            for key, status in ((valid, 200), (other, 401)):
                headers = {"Authorization": f"Bearer {key}"}
                async with session.get("/v1/models", headers=headers) as got:
                    assert got.status == status
        assert "sk-" not in server.output


def test_a_mistake_in_the_file_is_one_line(tmp_path: Path) -> None:
    path = file_in(tmp_path, "prt = 1\n")
    code, line = run_to_end(tmp_path, "--config", str(path))
    assert code == 2
    assert line.startswith(f"tinfer: {path}: prt: ") and line.endswith("did you mean port?")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_CUDA_ALLOC_CONF has"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_ALLOC_CONF has"),
        ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, "VLLM_USE_V2_MODEL_RUNNER asks for"),
        ({"TINFER_ENGINE_ARG": "spec_tokens=1"}, "bad option --engine-arg spec_tokens: no specul"),
    ],
)
def test_what_a_split_cannot_have_ends_the_start(
    tmp_path: Path, environment: dict[str, str], told: str
) -> None:
    """Before anything is imported: the real engine is asked for."""
    code, line = run_to_end(tmp_path, environment=environment)
    assert code == 2
    assert line.startswith(f"tinfer: {told}")


def test_a_model_that_speculates_by_itself_is_not_served(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {**SMALL, "speculators_config": {}})
    code, line = run_to_end(tmp_path, str(model))
    assert code == 2
    assert line.startswith("tinfer: config.json of the model has a speculators_config")


def test_showing_the_configuration_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinfer", "serve", "--print-config", "--config"]
    done = subprocess.run(
        [*command, str(file_in(tmp_path))], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"max_model_len 64 (file {tmp_path}/options.toml)" in lines
    assert "port 8000 (default)" in lines
