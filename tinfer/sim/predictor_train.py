"""`tinfer predictor train` from options to exit code: request logs in, what `--predictor online`
has learnt of them out, in the file that `--predictor-state` reads.

| key | meaning |
|---|---|
| `date`, `version` | when, and with which tinfer |
| `settings` | `logs`, `max_tokens` as asked for |
| `num_requests` | in the logs |
| `num_learnt` | answers that are in the state: with a token, and not made to run to their bound |
| `num_hashed` | requests of which a server has kept the prompt's hashes |
| `online` | figures of all answers, each predicted before it was learnt, see `Score` in scores.py;
null where none was served to its end |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.atomic_file import replace_file
from tinfer.errors import StartError
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import to_bytes
from tinfer.sim import report
from tinfer.sim.app import write
from tinfer.sim.prequential import play, trials_of
from tinfer.sim.scores import score
from tinfer.workloads import LogRecord, read_log


class TrainOptions(Struct, frozen=True, kw_only=True):
    """What `tinfer predictor train` was asked for; `max_tokens` as in `prequential.trials_of`."""

    logs: tuple[str, ...]
    out: str
    max_tokens: int | None = None
    json_path: str | None = None


def run(options: TrainOptions) -> int:
    """Learn, write the state, report; returns the exit code. Raises `StartError`, `OSError`."""
    records = [record for log in options.logs for record in _read(log)]
    predictor, result = trained(records, options.max_tokens)
    if not predictor.num_observed:
        raise StartError("no answer in the logs from which anything could be learnt")
    try:
        replace_file(Path(options.out), to_bytes(predictor))
    except OSError as error:
        raise StartError(f"cannot write {options.out}: {error.strerror}") from error
    names = [Path(log).name for log in options.logs]
    settings = {"logs": names, "max_tokens": options.max_tokens}
    write({"settings": settings, **result}, options.json_path, text(result, options.out))
    return 0


def trained(
    records: list[LogRecord], max_tokens: int | None = None
) -> tuple[OnlinePredictor, dict[str, Any]]:
    """A predictor that was asked and told all that the records say, in the order of time, and the
    result but for its settings."""
    trials = trials_of(records, max_tokens)
    predictor = OnlinePredictor()
    told = play(predictor, trials)
    is_scored = any(trial.is_whole and trial.output_tokens for trial in trials)
    return predictor, {
        "num_requests": len(records),
        "num_learnt": predictor.num_observed,
        "num_hashed": sum(bool(record.prompt_head) for record in records),
        "online": msgspec.to_builtins(score(trials, told)) if is_scored else None,
    }


def text(result: Mapping[str, Any], out: str) -> Iterator[str]:
    """The lines of the report."""
    num, learnt = result["num_requests"], result["num_learnt"]
    yield f"{num} requests, {learnt} answers learnt; written to {out}"
    if (figures := result["online"]) is not None:
        error, tau = report.number(figures["mae_tokens"]), report.number(figures["kendall_tau"])
        covered = 100 * figures["coverage"]["0.8"]
        yield f"each predicted before it was learnt: MAE {error} tokens, tau {tau}, "
        yield f"{covered:.1f} % within the interval that is to hold 80 %"
    if result["num_hashed"] < num:
        yield f"{num - result['num_hashed']} requests are of no server's log: of them a server will"
        yield "know the lengths, and not whose they were"


def _read(path: str) -> list[LogRecord]:
    try:
        return read_log(path)
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StartError(f"{path}: {error}") from error
