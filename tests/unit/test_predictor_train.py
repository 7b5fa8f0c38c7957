"""`tinfer predictor train`: what it learns from a server's log is what that server has learnt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.unit.predict_box import serve, traffic
from tinfer.cli import main
from tinfer.predict.asked import Asked
from tinfer.predict.hashes import as_hex
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import restore, to_bytes
from tinfer.workloads import LogRecord, write_log


def line(number: int, asked: Asked, tokens: int, **changes: Any) -> LogRecord:
    """What a server writes of an answer that came at once."""
    is_cut = tokens > asked.max_output_tokens
    given: dict[str, Any] = {
        "request_id": asked.request_id,
        "arrival_s": float(number),
        "prompt_tokens": asked.prompt_tokens,
        "max_output_tokens": asked.max_output_tokens,
        "output_tokens": min(tokens, asked.max_output_tokens),
        "finish_reason": "length" if is_cut else "stop",
        "e2el_s": 0.5,
        "model": "m",
        "prompt_head": as_hex(asked.features.head),
        "prompt_signature": asked.features.signature,
        **changes,
    }
    return LogRecord(**given)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["predictor", "train", *words])


def test_a_trained_state_is_the_one_that_serving_leaves(tmp_path: Path) -> None:
    served = OnlinePredictor()
    answers = traffic(80, most=200)
    for asked, tokens in answers:
        serve(served, asked, tokens)
    lines = [line(number, *one) for number, one in enumerate(answers)]
    # The files of a rotated log, the older one last.
    write_log(tmp_path / "log", lines[50:])
    write_log(tmp_path / "log.1", lines[:50])
    out = tmp_path / "state"
    logs = ("--from", str(tmp_path / "log"), "--from", str(tmp_path / "log.1"))
    done = invoke(*logs, "--out", str(out), "--json", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == to_bytes(served)
    assert out.stat().st_mode & 0o077 == 0
    assert "80 requests, 80 answers learnt" in done.stdout
    assert "no server's log" not in done.stdout
    result = msgspec.json.decode((tmp_path / "r.json").read_bytes())
    assert result["settings"] == {"logs": ["log", "log.1"], "max_tokens": None}
    assert (result["num_learnt"], result["num_hashed"]) == (80, 80)
    assert result["online"]["mae_tokens"] > 0
    again = OnlinePredictor()
    restore(again, out.read_bytes())
    asked = answers[-1][0]
    assert again.predict(asked) == served.predict(asked)


def test_what_teaches_nothing_is_not_learnt(tmp_path: Path) -> None:
    asked, tokens = traffic(1)[0]
    path, out = tmp_path / "log", tmp_path / "state"
    idle = [
        line(0, asked, tokens, runs_to_bound=True),
        line(1, asked, 0, finish_reason="error", error="503", request_id="other"),
    ]
    write_log(path, idle)
    done = invoke("--from", str(path), "--out", str(out))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no answer in the logs" in done.stderr
    assert not out.exists()
    # A log that knows no prompts: lengths alone.
    write_log(path, [*idle, line(2, asked, 9, request_id="r3", prompt_head="", model="")])
    done = invoke("--from", str(path), "--out", str(out), "--json", "-")
    assert msgspec.json.decode(done.stdout)["num_hashed"] == 2
    done = invoke("--from", str(path), "--out", str(out))
    assert "1 requests are of no server's log" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "x"), "--from"),
        (("--from", "/no/such/log", "--out", "x"), "/no/such/log"),
        (("--from", os.devnull), "--out"),
        (("--from", os.devnull, "--out", "/no/such/folder/x"), "/no/such/folder/x"),
        (("--from", os.devnull, "--out", "/"), "cannot write /"),
        (("--from", os.devnull, "--out", "x", "--max-tokens", "0"), "--max-tokens"),
        (("--from", os.devnull, "--out", "x"), "no answer in the logs"),
        (("--from", os.devnull, "--out", "x", "--json", "/"), "cannot write /"),
        (("--from", __file__, "--out", "x"), "line 1 of the request log"),
    ],
)
def test_bad_options_are_named(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert told in done.stderr
    assert not list(tmp_path.iterdir())
