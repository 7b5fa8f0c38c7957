"""A model by its name: found, downloaded once, served; and what is said when that cannot be.

The hub is a small server on this machine; the engine is the fake one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from huggingface_hub import close_session, constants

from tests.e2e.serving import ServeProcess, get_json, serving, wait_gone
from tests.process.fake_hub import COMMIT, TOKEN, FakeHub, fake_hub
from tests.unit.model_box import write_weights
from tinfer.errors import StartError
from tinfer.master.hub import check_disk, look
from tinfer.tiny_model import MODEL_DIR

FAKE = ("--engine", "fake")
MODEL = "org/name"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The built-in model's files without its weights, and two other formats of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in MODEL_DIR.iterdir():
        if path.is_file() and path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    write_weights(folder / "model.safetensors", w=("BF16", 1 << 20))
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "README.md").write_text("read me")
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    with fake_hub(source) as hub:
        yield hub


def dry_run(hub: FakeHub, home: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Exit code, standard output and the last line of standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "tinfer", "serve", "--port", "0", "--dry-run", *FAKE, *arguments],
        env={**os.environ, **hub.environment(home), **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, "".join(done.stderr.splitlines()[-1:])


def cached(home: Path) -> set[str]:
    """Names of the files in the cache's snapshots."""
    return {path.name for path in (home / "hub").glob("models--*/snapshots/*/*")}


def test_a_dry_run_reads_what_it_needs_and_no_more(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, out, err = dry_run(hub, home, MODEL, "--json", "-")
    assert (code, err) == (0, "")
    plan: dict[str, Any] = msgspec.json.decode(out)
    assert plan["model"] == MODEL
    assert plan["directory"].endswith(f"models--org--name/snapshots/{COMMIT}")
    assert plan["download_bytes"] > 1 << 20
    assert cached(home) == {"config.json"}


async def test_a_name_is_downloaded_once_and_served_under_it(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = hub.environment(home, HF_TOKEN=TOKEN)
    hub.is_gated = True
    with serving(tmp_path, MODEL, *FAKE, environment=environment) as server:
        (card,) = (await get_json(f"{server.url}/v1/models"))["data"]
        assert card["id"] == MODEL
        assert card["root"].endswith(f"snapshots/{COMMIT}")
        assert "downloading" in server.output
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= cached(home)
    assert cached(home).isdisjoint({"pytorch_model.bin", "README.md"})
    num_sent = len(hub.sent)
    code, out, _ = dry_run(hub, home, MODEL, HF_TOKEN=TOKEN)
    assert (code, "from the hub" in out) == (0, False)
    assert len(hub.sent) == num_sent
    code, out, _ = dry_run(hub, home, MODEL, HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE is set: the cached copy is used" in out) == (0, True)
    code, _, err = dry_run(hub, tmp_path, MODEL, HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE is set and" in err) == (2, True)
    code, out, _ = dry_run(hub, home, MODEL, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0
    assert "cannot reach http://127.0.0.1:9" in out
    assert "the cached copy is used" in out


@pytest.fixture
def asking(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., StartError | None]]:
    """Look for a model and its room on the disk, in this process: what is said if it cannot be."""
    home = tmp_path / "home"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def ask(
        model: str = MODEL, revision: str | None = None, url: str = hub.url, **environ: str
    ) -> StartError | None:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            try:
                check_disk(look(model, revision, with_code=False))
            except StartError as error:
                return error
        return None

    yield ask
    close_session()


Asking = Callable[..., StartError | None]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"model": "org/other"}, "has no model org/other (it may be private: set HF_TOKEN)"),
        ({"model": "org/other", "HF_TOKEN": TOKEN}, "(your token may not see it)"),
        ({"HF_TOKEN": "hf_wrong"}, "does not accept your token (HF_TOKEN)"),
        ({"revision": "v9"}, "org/name has no revision v9"),
        ({"url": "http://127.0.0.1:9"}, "cannot reach http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    asking: Asking, question: dict[str, Any], words: str
) -> None:
    error = asking(**question)
    assert error is not None
    assert words in error.message
    assert "\n" not in error.message


def test_what_the_hub_says_of_a_model(
    hub: FakeHub, asking: Asking, source: Path, tmp_path: Path
) -> None:
    assert asking() is None
    assert asking(revision="v1") is None
    hub.sizes["model.safetensors"] = 10**18
    error = str(asking())
    assert "not enough disk space for org/name: 1000000000.0 GB needed, " in error
    assert str(tmp_path / "home") in error
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").unlink()
    assert "no weights in org/name" in str(asking())
    (source / "config.json").unlink()
    assert "config.json is missing: org/name" in str(asking())


def test_a_model_that_is_not_for_everyone(hub: FakeHub, asking: Asking) -> None:
    hub.is_gated = True
    assert "org/name is gated: accept its terms at" in str(asking())
    assert asking(HF_TOKEN=TOKEN) is None
    hub.status = 403
    assert "your token (HF_TOKEN) may not read org/name" in str(asking())
    hub.status = 502
    assert "answers 502 for org/name" in str(asking())


def test_a_name_that_is_unknown_ends_the_command_with_one_line(
    hub: FakeHub, tmp_path: Path
) -> None:
    code, out, err = dry_run(hub, tmp_path / "home", "org/other")
    assert (code, out) == (2, "")
    assert err.startswith("tinfer: no such directory, and ")


def test_ctrl_c_ends_a_download_at_once_and_the_next_start_goes_on(
    hub: FakeHub, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    hub.stalled = {"model.safetensors"}
    server = ServeProcess(tmp_path, MODEL, *FAKE, environment=hub.environment(home))
    try:
        server.wait_progress("downloading")
        family = server.family()
        assert server.interrupt() == 130
    finally:
        server.stop()
    assert wait_gone(family) == []
    assert "model.safetensors" not in cached(home)
    assert "Traceback" not in server.output
    hub.stalled = set()
    with serving(tmp_path, MODEL, *FAKE, environment=hub.environment(home)) as again:
        assert "downloading" in again.output


def test_a_master_that_is_killed_takes_its_download_along(hub: FakeHub, tmp_path: Path) -> None:
    hub.stalled = {"model.safetensors"}
    environment = hub.environment(tmp_path / "home")
    server = ServeProcess(tmp_path, MODEL, *FAKE, environment=environment)
    try:
        server.wait_progress("downloading")
        children: list[psutil.Process] = []
        while "model.safetensors" not in hub.sent:
            assert server.process.poll() is None, server.output
            children = server.family()[1:]
        children = server.family()[1:]
        assert children
    finally:
        server.kill()
    assert wait_gone(children) == []
