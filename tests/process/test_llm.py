"""`tinfer.LLM` with a real server of the fake engine: answers, errors, and its end in every way."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import psutil
import pytest

import tinfer
from tests.e2e.serving import STOP_DEADLINE_S, wait_gone
from tinfer.client import BadRequest, ConnectionFailed
from tinfer.core.sampling import SamplingSpec
from tinfer.offline import RequestOutput
from tinfer.offline.params import Prompt
from tinfer.worker.fake_model import expected_answer
from tinfer.worker.fake_settings import FakeSettings

SETTINGS = FakeSettings(mean_output_tokens=1_000_000)
FAKE: dict[str, Any] = {
    "engine": "fake",
    "fake_engine": {"step_s": 0.002, "mean_output_tokens": 1_000_000},
    "route": "split",
    "trust_request_chat_template": True,
}


@pytest.fixture
def others() -> Set[psutil.Process]:
    """Servers that other tests keep for theirs."""
    return frozenset(psutil.Process().children())


@pytest.fixture
def llm(others: Set[psutil.Process]) -> Iterator[tinfer.LLM]:
    with tinfer.LLM(**FAKE) as made:
        family = family_here(others)
        yield made
    assert wait_gone(family) == []
    assert not [one for one in threading.enumerate() if one.name.startswith("tinfer")]


def family_here(
    others: Set[psutil.Process] = frozenset(), pid: int | None = None
) -> list[psutil.Process]:
    """The servers of a process but `others`: children that are no helpers of Python itself."""
    children = psutil.Process(pid).children()
    masters = [one for one in children if one not in others and "serve" in one.cmdline()]
    return [one for master in masters for one in (master, *master.children(recursive=True))]


def expect(output: RequestOutput, max_tokens: int, index: int = 0, **sampling: Any) -> None:
    """It is the answer to its prompt."""
    assert output.prompt_token_ids is not None
    spec = SamplingSpec(max_tokens=max_tokens, **sampling)
    token_ids, text, finish, _ = expected_answer(output.prompt_token_ids, spec, SETTINGS)
    found = output.outputs[index]
    assert (found.token_ids, found.text, found.finish_reason) == (token_ids, text, finish)


def test_prompts_of_every_kind_in_their_order(
    llm: tinfer.LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [40, 3, 20, 1]
    prompts: list[Prompt] = ["long", [1, 2, 3], {"prompt": "middle"}, {"prompt_token_ids": [9]}]
    params = [tinfer.SamplingParams(max_tokens=n, temperature=0) for n in lengths]
    outputs = llm.generate(prompts, params)
    assert "4/4" in capsys.readouterr().err, "no progress bar"
    for output, length in zip(outputs, lengths, strict=True):
        expect(output, length)
    assert [output.prompt for output in outputs] == ["long", None, "middle", None]
    assert [output.prompt_token_ids for output in outputs][1::2] == [[1, 2, 3], [9]]

    several = tinfer.SamplingParams(n=2, seed=5, max_tokens=4, logprobs=1, prompt_logprobs=0)
    (output,) = llm.generate("x y", several, use_tqdm=False)
    assert [one.index for one in output.outputs] == [0, 1]
    for index, one in enumerate(output.outputs):
        expect(output, 4, index, seed=5 + index)
        assert one.logprobs is not None
        assert [next(iter(position)) for position in one.logprobs] == one.token_ids
    assert output.prompt_logprobs is not None
    assert [output.prompt_logprobs[0], len(output.prompt_logprobs)] == [None, 3]

    user = {"role": "user", "content": "hi"}
    chats = llm.chat([[user], [user, user]], {"max_tokens": 6, "logprobs": True}, use_tqdm=False)
    for output in chats:
        expect(output, 6)
        assert output.prompt is not None and "hi" in output.prompt
        assert output.outputs[0].logprobs is not None
    assert len(chats[1].prompt_token_ids or ()) > len(chats[0].prompt_token_ids or ())
    now = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    shown = "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    (called,) = llm.chat("hi", {"max_tokens": 2}, tools=[now], chat_template=shown, use_tqdm=False)
    assert called.prompt == "now hi"
    expect(called, 2)
    assert llm.generate([]) == llm.chat([]) == []
    assert capsys.readouterr().err == ""

    with pytest.raises(BadRequest, match="temperature"):
        llm.generate(["fine", "fine"], [{"max_tokens": 20_000}, {"temperature": 99}])
    expect(llm.generate("after an error", {"max_tokens": 2})[0], 2)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(llm.generate, str(i), {"max_tokens": 5}) for i in range(4)]
        for i, future in enumerate(asked):
            (output,) = future.result()
            assert output.prompt == str(i)
            expect(output, 5)


def test_a_server_that_dies_is_told_of(others: Set[psutil.Process]) -> None:
    with tinfer.LLM(**FAKE) as llm:
        master, *rest = family_here(others)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asking = pool.submit(llm.generate, ["a", "b"], {"max_tokens": 30_000}, use_tqdm=False)
            master.kill()
            with pytest.raises(ConnectionFailed, match="the server has ended with signal SIGKILL"):
                asking.result()
    assert wait_gone([master, *rest]) == []
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        llm.generate("a", use_tqdm=False)
    llm.close()


def test_it_outlives_the_thread_that_made_it_and_ends_with_the_object(
    others: Set[psutil.Process],
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        llm = pool.submit(lambda: tinfer.LLM(**FAKE)).result()
    family = family_here(others)
    expect(llm.generate("a", {"max_tokens": 3}, use_tqdm=False)[0], 3)
    del llm
    assert wait_gone(family) == []


SCRIPT = """
import os, sys, tinfer
llm = tinfer.LLM(engine="fake", fake_engine={"step_s": 0.002, "mean_output_tokens": 1_000_000})
if sys.argv[1] == "fork":
    child = os.fork()
    if not child:
        sys.exit(0)  # with all that is done at the end of a program
    os.waitpid(child, 0)
    assert len(llm.generate("a", {"max_tokens": 3}, use_tqdm=False)[0].outputs[0].token_ids) == 3
print("ready", flush=True)
if sys.argv[1] in ("answer", "fork"):
    sys.stdin.read()
else:
    llm.generate("a", {"max_tokens": 30_000}, use_tqdm=False)
"""


@pytest.mark.parametrize(
    ("way", "number", "codes"),
    [
        ("answer", None, {0}),
        ("fork", None, {0}),
        ("generate", signal.SIGINT, {-signal.SIGINT}),
        ("generate", signal.SIGTERM, {-signal.SIGTERM}),
        ("generate", signal.SIGKILL, {-signal.SIGKILL}),
    ],
)
def test_it_ends_with_its_script(
    tmp_path: Path, way: str, number: signal.Signals | None, codes: set[int]
) -> None:
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            env={**os.environ, "PYTHONWARNINGS": "error"},
        )
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n", (tmp_path / "err").read_text()
        family = family_here(pid=process.pid)
        assert len(family) >= 3
        assert not any("KEY" in word for one in family for word in one.cmdline())
        if number is not None:
            process.send_signal(number)
        process.stdin.close()
        assert process.wait(STOP_DEADLINE_S) in codes, (tmp_path / "err").read_text()
    assert wait_gone(family) == []
