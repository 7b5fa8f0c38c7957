"""`tinfer batch` as a whole against servers of the fake engine: its end, its interruption, its
resumption, and the server that it starts for itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.serving import START_DEADLINE_S, STOP_DEADLINE_S, until_idle, wait_gone
from tests.process.box import Server, running
from tests.process.terminal import CTRL_C, on_terminal

BATCH = ("-m", "tinfer", "batch")
# Slow enough that a batch of some lines is still under way when it is looked at.
FAKE = {"step_s": 0.005, "mean_output_tokens": 1_000_000}
OWN = ("--", "--engine", "fake", *(f"--fake-engine={name}={FAKE[name]}" for name in FAKE))
NUM_LINES = 24
TOKENS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), FAKE, route="split") as made:
        yield made
        made.stop()


def request(custom_id: str, chat: bool = False, **body: Any) -> dict[str, Any]:
    """One line of input."""
    asked: dict[str, Any] = (
        {"messages": [{"role": "user", "content": custom_id}]} if chat else {"prompt": custom_id}
    )
    url = "/v1/chat/completions" if chat else "/v1/completions"
    body = {**asked, "max_tokens": TOKENS, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


class Batch:
    """The files of one batch, and runs of it."""

    def __init__(self, folder: Path, *lines: object) -> None:
        self.folder = folder
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.write(*lines)

    def write(self, *lines: object) -> None:
        texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
        self.input.write_text("".join(text + "\n" for text in texts))

    def words(self, *arguments: str) -> list[str]:
        return [*BATCH, str(self.input), str(self.output), *arguments]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *self.words(*arguments)]
        # A file, since a pipe would be held open by a server that outlives the batch.
        with (self.folder / "err").open("w+") as err:
            done = subprocess.run(
                words, text=True, check=False, stdout=subprocess.PIPE, stderr=err, **options
            )
        done.stderr = (self.folder / "err").read_text()
        return done

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("w") as log:
            words = [sys.executable, *self.words(*arguments)]
            return subprocess.Popen(words, stdout=log, stderr=log)

    def results(self) -> list[dict[str, Any]]:
        """What is in the output, which has whole lines only."""
        text = self.output.read_text()
        assert not text or text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def ids(self) -> list[Any]:
        return sorted(result["custom_id"] for result in self.results())

    def until_results(self, number: int) -> None:
        """Wait until so many lines are there."""
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < number:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)


def numbered(**body: Any) -> list[dict[str, Any]]:
    return [request(f"line-{i:02}", chat=i % 2 == 0, **body) for i in range(NUM_LINES)]


ALL = [f"line-{i:02}" for i in range(NUM_LINES)]


def test_a_whole_batch_and_its_summary(server: Server, tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered())
    done = batch.run("--base-url", server.url, "--json", "-", "--max-concurrency", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert batch.ids() == ALL
    results = batch.results()
    for result in results:
        assert result.keys() == {"id", "custom_id", "response", "error"}
        assert result["error"] is None and result["response"]["status_code"] == 200
        body = result["response"]["body"]
        assert body["id"].endswith("-" + result["response"]["request_id"])
        is_chat = int(result["custom_id"][-2:]) % 2 == 0
        assert body["object"] == ("chat.completion" if is_chat else "text_completion")
    assert len({result["id"] for result in results}) == NUM_LINES
    usages = [result["response"]["body"]["usage"] for result in results]
    summary = json.loads(done.stdout)
    assert summary["completion_tokens"] == NUM_LINES * TOKENS
    assert summary["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    counts = {name: summary[f"num_{name}"] for name in ("requests", "answered", "failed", "open")}
    assert counts == {"requests": NUM_LINES, "answered": NUM_LINES, "failed": 0, "open": 0}
    assert (summary["num_skipped"], summary["interrupted"]) == (0, False)
    rate = summary["completion_tokens"] / summary["duration_s"]
    assert summary["completion_tokens_per_s"] == pytest.approx(rate)
    asyncio.run(server.idle())


def test_errors_of_lines_stay_with_their_lines(server: Server, tmp_path: Path) -> None:
    batch = Batch(
        tmp_path,
        request("good"),
        "nonsense",
        request("hot", temperature=99),
        {**request("elsewhere"), "url": "/admin/drain"},
        {**request("unknown"), "url": "/v1/nothing"},
        request("good"),
        {**request("get"), "method": "GET"},
        request("stream", stream=True),
    )
    done = batch.run("--base-url", server.url, "--json", str(tmp_path / "summary"))
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("1 of 8 requests are answered, 7 failed\n")
    summary = json.loads((tmp_path / "summary").read_text())
    assert (summary["num_answered"], summary["num_failed"], summary["num_open"]) == (1, 7, 0)
    found = [
        (
            result["custom_id"],
            result["error"]["code"] if result["error"] else result["response"]["status_code"],
        )
        for result in batch.results()
    ]
    assert sorted(found, key=str) == [
        ("elsewhere", "invalid_url"),
        ("get", "invalid_method"),
        ("good", "duplicate_custom_id"),
        ("good", 200),
        ("hot", 400),
        ("stream", "stream_unsupported"),
        ("unknown", 404),
        (None, "invalid_json_line"),
    ]
    before = batch.output.read_bytes()
    done = batch.run("--base-url", server.url)
    assert done.returncode == 1 and "8 from an earlier run" in done.stdout
    assert batch.output.read_bytes() == before
    batch.write(request("good"), request("hot", temperature=1))
    done = batch.run("--base-url", server.url, "--retry-failed")
    assert done.returncode == 0, done.stderr
    assert batch.ids() == ["good", "hot"]


def test_standard_input_and_a_progress_bar(server: Server, tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    text = "".join(json.dumps(one) + "\n" for one in numbered()[:3])
    words = [*BATCH, "-", str(batch.output), "--base-url", server.url, "--progress"]
    done = subprocess.run(
        [sys.executable, *words], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "requests: 100%" in done.stderr and "3/3" in done.stderr and "failed=0" in done.stderr
    assert batch.ids() == ALL[:3]


def test_a_batch_that_was_killed_is_resumed(server: Server, tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered())
    one_by_one = ("--base-url", server.url, "--max-concurrency", "2")
    with batch.begin(*one_by_one) as process:
        batch.until_results(5)
        process.kill()
    asyncio.run(until_idle(server.url))
    found = batch.output.read_bytes()
    assert 5 <= found.count(b"\n") < NUM_LINES
    # As if it had been killed in the middle of a line.
    batch.output.write_bytes(found[:-20])
    num_whole = found[:-20].count(b"\n")
    done = batch.run(*one_by_one, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_skipped"] == num_whole
    assert batch.ids() == ALL, "each of them once"
    assert all(result["response"]["status_code"] == 200 for result in batch.results())
    done = batch.run("--base-url", "http://127.0.0.1:9")
    assert done.returncode == 0, "nothing is left to ask a server for"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--base-url", "http://127.0.0.1:9", "--max-retries=0"), "nothing answers at"),
        (("--", "--engine", "fake", "--route", "split", "--decode", "0"), "--route split needs"),
        (("--json", "/no/such/folder/x"), "cannot write /no/such/folder/x"),
    ],
)
def test_what_cannot_be_begun_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    batch = Batch(tmp_path, request("a"))
    done = batch.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinfer: ") and words in line
    assert not batch.output.exists()


# --- a server of its own -------------------------------------------------------------------------


def family_of(pid: int) -> list[psutil.Process]:
    """The batch's server with all that belongs to it."""
    children = psutil.Process(pid).children(recursive=True)
    assert len(children) >= 3
    return children


def test_its_own_server_comes_and_goes_with_it(tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered())
    # The key of somebody else's server is of no use to its own.
    environment = {**os.environ, "TINFER_API_KEY": "another", "VLLM_API_KEY": "third"}
    with subprocess.Popen(
        [sys.executable, *batch.words("--max-concurrency", "2", *OWN)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        batch.until_results(3)
        family = family_of(process.pid)
        assert not any("KEY" in word for one in family for word in one.cmdline())
        assert process.wait(STOP_DEADLINE_S) == 0
    assert wait_gone(family) == []
    assert batch.ids() == ALL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_its_server_and_the_batch_goes_on_later(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    batch = Batch(tmp_path, *numbered())
    few = ("--max-concurrency", "2", "--json", str(tmp_path / "summary"))
    with batch.begin(*few, *OWN) as process:
        batch.until_results(3)
        family = family_of(process.pid)
        process.send_signal(number)
        code = process.wait(STOP_DEADLINE_S)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert wait_gone(family) == []
    done = batch.output.read_bytes().count(b"\n")
    if number != signal.SIGKILL:
        summary = json.loads((tmp_path / "summary").read_text())
        assert (summary["interrupted"], summary["num_answered"]) == (True, done)
        assert summary["num_open"] == NUM_LINES - done > 0
        assert "the same command again sends what is open" in (tmp_path / "log").read_text()
    after = batch.run("--base-url", server.url)
    assert after.returncode == 0, after.stderr
    assert batch.ids() == ALL, "each of them once"


def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered(max_tokens=20_000))
    with on_terminal(tmp_path, *batch.words(*OWN)) as program:
        program.see("requests:   0%")
        family = family_of(program.process.pid)
        program.type(CTRL_C)
        assert program.wait_end() == 130, program.screen
        assert "Traceback" not in program.screen
    assert wait_gone(family) == []
    assert not batch.output.exists(), "nothing was answered"


def test_ctrl_c_during_the_start(tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered())
    with on_terminal(tmp_path, *batch.words(*OWN, "--fake-engine", "start_s=1000")) as program:
        program.see("starting workers")
        family = family_of(program.process.pid)
        program.type(CTRL_C)
        assert program.wait_end() == 130
    assert wait_gone(family) == []
    assert not batch.output.exists()


def test_its_server_dies(tmp_path: Path) -> None:
    batch = Batch(tmp_path, *numbered())
    with batch.begin("--max-concurrency", "2", *OWN) as process:
        batch.until_results(3)
        master, *rest = family_of(process.pid)
        master.kill()
        assert process.wait(STOP_DEADLINE_S) == 1
    assert wait_gone([master, *rest]) == []
    said = (tmp_path / "log").read_text()
    assert "tinfer: the server has ended with signal SIGKILL" in said
    assert 3 <= len(batch.results()) < NUM_LINES
    assert all(result["error"] is None for result in batch.results()), "what is open has no error"
