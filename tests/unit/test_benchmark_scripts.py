"""Parts of benchmark scripts that compute something: flips of roles, and simulated against real."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import flips, sim_reality
from benchmarks.result import heading
from tests.unit.core_box import CAPACITY, PLAIN
from tinfer.cli import main
from tinfer.core import events as ev
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import Role, SchedulerConfig
from tinfer.master.event_log import EventLog


def options(**changes: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "workload": "Mixed",
        "num_requests": 200,
        "length_scale": 0.5,
        "max_prompt_tokens": 768,
        "max_output_tokens": None,
    }
    return argparse.Namespace(**{**given, **changes})


@pytest.mark.parametrize("command", [("bench", "serve"), ("simulate",)])
def test_both_commands_take_the_words_that_name_the_requests(command: tuple[str, ...]) -> None:
    words = sim_reality.asked(options(), 2.5, 7)
    found: click.Command | None = main
    for name in command:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert found is not None
    given = found.make_context("it", list(words)).params
    assert (given["workload"], given["seed"], given["length_scale"]) == ("Mixed", 7, 0.5)
    assert float(given["request_rate"]) == 2.5
    assert (given["max_prompt_tokens"], given["max_output_tokens"]) == (768, None)


def test_ratios_are_of_the_means_over_all_runs() -> None:
    runs = [
        {"figures": sim_reality.beside(dict.fromkeys(sim_reality.FIGURES, ours), theirs)}
        for ours, theirs in (
            (2.0, dict.fromkeys(sim_reality.FIGURES, 1.0)),
            (4.0, dict.fromkeys(sim_reality.FIGURES, 5.0)),
        )
    ]
    assert runs[0]["figures"]["mean_ttft_ms"] == {"real": 1.0, "simulated": 2.0, "ratio": 2.0}
    assert set(sim_reality.ratios(runs).values()) == {1.0}


def test_a_result_names_its_command_but_not_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["x.py", "heavy", "--tuned", "t.json", "--serve", "--a 1", "--json", "o.json", "--seed"]
    monkeypatch.setattr("sys.argv", [*words, "1", "--plot", "p.png"])
    wanted = "python -m benchmarks.some heavy --tuned t.json --serve '--a 1' --seed 1"
    assert heading("some")["command"] == wanted


def test_changes_of_role_are_read_off_an_event_log(tmp_path: Path) -> None:
    config = SchedulerConfig(**PLAIN)
    scheduler, log = Scheduler(config), EventLog(tmp_path / "events", config)
    seen: list[ev.Action] = []

    def on(now_s: float, event: ev.Event) -> list[ev.Action]:
        actions = scheduler.on_event(event, now_s)
        log.add(now_s, event, actions)
        seen.extend(actions)
        return actions

    for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d", Role.DECODE)):
        on(0.0, ev.WorkerUp(name, 0, role, CAPACITY))
    on(0.2, ev.RoleAsked("d", 0, Role.PREFILL))  # the last one: it keeps its role
    (start,) = (one for one in on(0.5, ev.Arrived("r", 20, 8)) if isinstance(one, ev.StartPrefill))
    on(1.0, ev.RoleAsked(start.worker_id, 0, Role.DECODE))
    on(1.5, ev.Cancelled("r"))
    on(2.5, ev.WorkerFinished("r", start.worker_id, 0, answered=False))
    log.close()
    assert [type(one) for one in seen if isinstance(one, ev.RoleRefused)] == [ev.RoleRefused]
    ((worker, role_name, drain_s, turn_s),) = flips.changes(tmp_path / "events")
    assert (worker, role_name, drain_s) == (start.worker_id, "decode", 1.5) and turn_s > 0

    kept = flips.Wish("d", "prefill", 0, is_kept=True)
    wish = flips.Wish(start.worker_id, "decode", 1)
    found = flips.account([kept, wish], [(worker, role_name, drain_s, turn_s)], [])
    assert (found["num_kept"], found["drain_ms"]["max"]) == (1, 1500.0)
    assert found["flips"][0]["num_seqs"] == 1
    with pytest.raises(ValueError, match="other changes"):
        flips.account([kept], [(worker, role_name, drain_s, turn_s)], [])
