"""Bad values of the options about scheduling, simulating, planning and tuning: code 2, one line
that names the option or the file, and nothing is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import tinfer.master.app
import tinfer.tuner.app
from tests.unit.tune_box import tuning
from tinfer.cli import batch, main, plan, serve, sim_options, simulate, top, tune
from tinfer.config import ServeConfig
from tinfer.sim import parallel
from tinfer.tune import store

COUNT = ("0", "-1", "1.5", "nan", "inf", "many", "")
ABOVE_ZERO = ("0", "-1", "nan", "inf", "-inf", "much", "")
SHARE = ("-0.1", "1.1", "nan", "inf", "half")
NAME = ("best", "0", "PEAK ", "")
WHOLE_NUMBER = ("1.5", "nan", "x", "")
# Of `tinfer serve`, and of the simulator alike.
POLICIES = {
    "--route": NAME,
    "--prefill-policy": NAME,
    "--prefill-sched-batch": COUNT,
    "--prefill-ageing": ABOVE_ZERO,
    "--ttft-deadline": ABOVE_ZERO,
    "--prefill-choice": NAME,
    "--prefill-budget": NAME,
    "--itl-slack": ABOVE_ZERO,
    "--decode-policy": NAME,
    "--dispatch": NAME,
    "--decode-admission": NAME,
    "--preemption": NAME,
    "--overflow-risk": (*ABOVE_ZERO, "0.6"),
    "--predictor": NAME,
    "--predictor-accuracy": SHARE,
    "--predictor-granularity": COUNT,
    "--flip": NAME,
    "--chunk-size": (*COUNT, "autos"),
    "--max-num-batched-tokens": COUNT,
}
SOURCE = {
    "--workload": ("best", "0", ""),
    "--log": ("/no/such/file", "/"),
    "--num-prompts": COUNT,
    "--seed": WHOLE_NUMBER,
    "--burstiness": ABOVE_ZERO,
    "--length-scale": ABOVE_ZERO,
    "--max-prompt-tokens": COUNT,
    "--max-output-tokens": COUNT,
    "--workload-option": ("cv", "cv=", "=1", "cv=much"),
    "--max-tokens": COUNT,
}
RESULT = {"--json": ("/no/such/folder/x.json", "/"), "--plot": ("/dev/null", "/dev/null/x")}
BOX = {"--preset": ("best", ""), "--tuned": ("/no/such/file", "/")}
BAD: dict[str, dict[str, tuple[str, ...]]] = {
    "serve": {
        **POLICIES,
        "--config": ("", "/", "/no/such/file.toml", "/dev/null", "options.json"),
        "--engine-arg": ("", "x", "=1", "--=1", "model=/m", "port=1", "kv_transfer_config={}"),
        "--kv-cache-dtype": (*NAME, "int8"),
        "--event-log": ("/no/such/folder/log", "/"),
        "--request-log": ("/no/such/folder/log", "/", ""),
        "--request-log-max-bytes": COUNT,
        "--request-log-files": COUNT,
        "--predictor-state": ("/no/such/folder/state", "/", "alone"),
        "--predictor-state-interval": ABOVE_ZERO,
        "--hang-timeout": ("0", "-1", "nan", "x"),
        "--max-request-restarts": ("-1", "1.5", "x"),
        "--max-num-queued-tokens": ("0", "-1", "x"),
        "--request-timeout": ("0", "-1", "nan", "x"),
        "--slo": ("ttft", "ttft:", "ttft:x", "e2el:5", "ttft:0", "ttft:1.2.3", "ttft:1,ttft:2", ""),
        "--uds": ("", "/no/such/folder/s.sock", "/" + "x" * 120, "/"),
        "--api-key": ("", "two words", "\u00e9"),
        "--api-key-file": ("/no/such/file", "/", "/dev/null"),
        "--ssl-certfile": ("/no/such/file", "/", "/dev/null"),
        "--ssl-keyfile": ("alone",),
        "--ssl-ca-certs": ("alone",),
        "--ssl-cert-reqs": ("-1", "3", "x", "1"),
        "--allowed-origins": ("", "example.org", "https://a/b", "null", '["https://a"', "[1]"),
        "--allowed-methods": ("[1]", '["GET"'),
        "--allowed-headers": ("[1]", '["X-A"'),
    },
    "simulate": {
        **POLICIES,
        **SOURCE,
        **BOX,
        **RESULT,
        "--request-rate": ("0", "-1", "nan", "-inf", "much", ""),
        "--baseline": ("best", "replicas-0", "replicas-", "hybrid-2"),
        "--split-from": ("-1", "1.5", "nan", "x"),
        "--predictor-tax": ("0.9", "-1", "nan", "inf", "much"),
        "--noise": ("-0.1", "nan", "inf", "much"),
    },
    "plan": {
        **POLICIES,
        **SOURCE,
        **BOX,
        **RESULT,
        "--gpus": COUNT,
        "--slo": ("best", "ttft", "ttft:", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "itl:5"),
        "--target": ("0", "-1", "1.1", "nan", "inf", "all"),
        "--sweep": ("route", "route=", "=1", "none=1", "port=1", "prefill=1", "itl-slack=nan"),
        "--num-draws": COUNT,
        "--jobs": COUNT,
    },
    "tune": {
        **RESULT,
        "--max-chunk": ("15", "-1", "1.5", "nan", "x"),
        "--repeats": COUNT,
        "--seed": ("-1", *WHOLE_NUMBER),
    },
    "batch": {
        "--base-url": ("", "not a url", "ftp://x", "http://x:0"),
        "--max-concurrency": COUNT,
        "--max-retries": ("-1", "1.5", "nan", "x", ""),
        "--request-timeout": ABOVE_ZERO,
        "--json": RESULT["--json"],
    },
    "top": {
        "--url": ("", "not a url", "ftp://x", "http://x:0"),
        "--interval": (*ABOVE_ZERO, "0.09", "3601"),
        "--waiting": ("-1", "201", *WHOLE_NUMBER),
        "--json": RESULT["--json"],
    },
}
COMMANDS: dict[str, click.Command] = {
    "serve": serve.command,
    "simulate": simulate.command,
    "plan": plan.command,
    "tune": tune.command,
    "batch": batch.command,
    "top": top.command,
}
# A run that a bad value does not stop is small; one that stands for all is enough for a plan.
PREFIX = {
    "serve": ["serve", "--dry-run", "--engine", "fake", "--port", "0"],
    "simulate": ["simulate", "--num-requests", "2"],
    "plan": ["plan", "--gpus", "2", "--num-requests", "2"],
    "tune": ["tune", "--engine", "fake"],
    "batch": ["batch", "/dev/null", "/no/such/folder/out"],
    "top": ["top", "--once"],
}
# What an option's message calls it, where it is not the flag.
CALLED = {
    "--workload": "no workload is called",
    "--preset": "no preset is called",
    "--baseline": "no baseline is called",
    "--json": "cannot write",
    "--sweep": "--sweep|--itl-slack",
}


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing long begins: where it would, the command fails with another code."""

    def begun(*_: Any) -> Any:
        raise AssertionError("a bad value was accepted")

    monkeypatch.setattr(tinfer.master.app, "run", begun)
    monkeypatch.setattr(tinfer.tuner.app, "tune", begun)
    monkeypatch.setattr(parallel, "done_in_parallel", begun)
    monkeypatch.setattr("tinfer.sim.plan_app.done_in_parallel", begun)
    monkeypatch.setattr("tinfer.top.app.once", begun)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def error_line(result: Result) -> str:
    """The one line that says what is wrong; click puts the usage before its own."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    *usage, line = result.stderr.splitlines()
    assert line.startswith(("Error: ", "tinfer: "))
    assert all(text.startswith(("Usage: ", "Try ")) or not text for text in usage)
    return line


BAD_VALUES = [
    (command, flag, value)
    for command, options in BAD.items()
    for flag, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("command", "flag", "value"), BAD_VALUES)
def test_a_bad_value_is_named_in_one_line(command: str, flag: str, value: str) -> None:
    line = error_line(invoke(*PREFIX[command], flag, value))
    told = re.search(f"{flag}\\b|{CALLED.get(flag, flag)}", line)
    assert told or (flag == "--plot" and f"cannot write to {value}" in line), line


@pytest.mark.parametrize("command", BAD)
def test_every_option_that_takes_a_value_is_among_them(command: str) -> None:
    """But for those of `tinfer serve` that have nothing to do with scheduling."""
    others = {"--" + name.replace("_", "-") for name in ServeConfig.__struct_fields__}
    others -= BAD[command].keys()
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            flag = parameter.opts[0]
            assert flag in BAD[command] or flag in others or (command, flag) == ("serve", "--json")


def test_every_policy_is_among_them() -> None:
    """The simulator has the options that decide something, and two that say how many workers."""
    taken = set(sim_options.policy_names())
    engines = {"prefill", "decode", "max_num_seqs", "enable_prefix_caching"}
    engines |= {"max_num_queued_reqs", "max_num_queued_tokens"}
    named = {flag[2:].replace("-", "_") for flag in POLICIES}
    assert taken - engines == named


# --- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("serve --route split --prefill 0", "--route split"),
        ("serve --route split --decode 0", "--route split"),
        ("serve --prefill 0 --decode 0", "--prefill and --decode"),
        ("serve --engine fake --dry-run --log-prompts", "--log-prompts needs --request-log"),
        ("simulate --route split --prefill 0", "--route split"),
        ("simulate --prefill 0 --decode 2 --baseline hybrid --num-requests 2", "hybrid needs"),
        ("simulate --workload-option cv=2", "cv"),
        ("simulate --workload burst --workload-option cv=nan", "cv"),
        ("simulate --workload burst --workload-option cv=inf", "cv"),
        ("simulate --workload Mixed --burstiness 0.5", "burstiness"),
        ("plan --gpus 1 --preset paper", "--gpus"),
        ("plan --gpus 2 --preset cpu-52m --preset gpu-estimate", "same number of GPUs"),
        ("plan --gpus 2 --slo ttft:5 ttft:6", "--slo"),
        ("plan --gpus 2 --slo loose tight", "--slo"),
        ("plan --gpus 2 ttft:5", "ttft:5"),
        ("plan --gpus 2 --prefill 1", "--prefill"),
        ("plan", "--gpus"),
        ("tune --stored /no/such/model", "/no/such/model"),
        ("batch", "IN"),
        ("batch /dev/null", "OUT"),
        ("batch /dev/null /no/such/folder/out", "/no/such/folder/out"),
        ("batch /no/such/file out", "/no/such/file"),
        ("batch /dev/null /dev/null", "is the input"),
        ("batch /dev/null out more", "more"),
        ("batch /dev/null out --api-key k", "--api-key goes with --base-url"),
        ("batch /dev/null out --base-url http://x --model y", "--model"),
        ("batch /dev/null out --base-url http://x -- --prefill 1", "--base-url"),
        ("batch /dev/null out -- --port 1", "--port"),
        ("batch /dev/null out -- --api-key k", "--api-key"),
        ("batch /dev/null out -- --dry-run", "--dry-run"),
        ("batch /dev/null out -- --prefill -1", "--prefill"),
        ("batch /dev/null out -- --no-such-option", "--no-such-option"),
        ("batch /dev/null out -- --route split --decode 0", "--route split"),
        ("batch /dev/null out -- --prefill 1 m", "--model m"),
        ("top http://x --url http://y", "one server at a time"),
        ("top http://x:0", "URL"),
        ("top http://x http://y", "http://y"),
    ],
)
def test_what_contradicts_is_named(words: str, told: str) -> None:
    assert told in error_line(invoke(*words.split()))


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_options_of_a_workload_do_not_go_with_a_log(command: str, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    log.write_text(record("a"))
    for words in (["--workload", "Mixed"], ["--workload-option", "cv=1"], ["--burstiness", "2"]):
        line = error_line(invoke(*PREFIX[command], "--log", str(log), *words))
        assert words[0] in line and "--log" in line


def test_a_preset_does_not_go_with_a_tuning(tmp_path: Path) -> None:
    path = str(store.save(tuning(), tmp_path))
    line = error_line(invoke("simulate", "--preset", "paper", "--tuned", path))
    assert "--preset and --tuned" in line


# --- files ---------------------------------------------------------------------------------------


def record(name: str, arrival_s: str = "0", prompt: str = "5", outputs: str = "5") -> str:
    return (
        f'{{"request_id":"{name}","arrival_s":{arrival_s},"task":"chat","prompt_tokens":{prompt},'
        f'"output_tokens":5,"max_output_tokens":{outputs}}}\n'
    )


GOOD = store.encode(tuning()).decode()
COST = r'"(base_s|prefill_token_s|prefill_context_s|decode_seq_s|kv_token_s)": [^,]*'


def with_value(name: str, value: str) -> str:
    """The good tuning with another value of the first field of that name."""
    text, num = re.subn(f'"{name}": [^,\n]*', f'"{name}": {value}', GOOD, count=1)
    assert num == 1
    return text


TUNINGS = {
    "empty": "",
    "binary": "\0\xff",
    "torn": GOOD[: len(GOOD) // 2],
    "array": "[]",
    "another object": "{}",
    "another version": with_value("version", "0"),
    "unknown key": GOOD.replace('"repeats"', '"repetitions"'),
    "no blocks": with_value("num_blocks", "0"),
    "fewer than no blocks": with_value("num_blocks", "-5"),
    "blocks in text": with_value("num_blocks", '"511"'),
    "empty blocks": with_value("block_tokens", "0"),
    "no chunk": with_value("chunk_tokens", "0"),
    "no devices": with_value("tensor_parallel_size", "0"),
    "negative cost": with_value("base_s", "-0.1"),
    "cost that is no number": with_value("base_s", "NaN"),
    "infinite cost": with_value("base_s", "1e999"),
    "nothing costs": re.sub(COST, r'"\1": 0.0', GOOD),
}
LOGS = {
    "empty": "",
    "binary": "\0\xff\n",
    "torn": record("a") + record("b")[:40],
    "array": "[]\n",
    "another object": "{}\n",
    "negative time": record("a", arrival_s="-1"),
    "time that is no number": record("a", arrival_s="NaN"),
    "infinite time": record("a", arrival_s="1e999"),
    "negative prompt": record("a", prompt="-5"),
    "prompt in text": record("a", prompt='"5"'),
    "no answer": record("a", outputs="0"),
    "a request twice": record("a") + record("a", arrival_s="1"),
}


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize("damage", TUNINGS)
def test_a_damaged_tuning_is_named(command: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(TUNINGS[damage], encoding="latin-1")
    assert str(path) in error_line(invoke(*PREFIX[command], "--tuned", str(path)))


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_is_named(command: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(LOGS[damage], encoding="latin-1")
    assert path.name in error_line(invoke(*PREFIX[command], "--log", str(path)))


@pytest.mark.parametrize("flag", ["--tuned", "--log"])
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_a_file_that_cannot_be_read_is_named(command: str, flag: str) -> None:
    path = "/proc/self/mem"  # there, and of no use to any user
    assert path in error_line(invoke(*PREFIX[command], flag, path))
