"""`tinfer predictor eval` from options to exit code: a log, predictors side by side, report.

| key | meaning |
|---|---|
| `date`, `version` | when, and with which tinfer |
| `settings` | `log`, `max_tokens`, `skip`, `seed` as asked for |
| `num_requests` | in the log |
| `num_by_end` | answers: `stop` by themselves, `length` by their bound, `abort`, `error` |
| `mean_output_tokens` | of those that are scored: `stop` and `length` |
| `predictors` | by name: the figures, see `Score` in tinfer/sim/scores.py |

`online+hints` is there where clients said how long they expect answers to be: `online` with that in
it. `shuffled` is the predictor `online` where each request got another one's answer: what it has of
skill there is none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tinfer.errors import StartError
from tinfer.predict.asked import End
from tinfer.sim import report
from tinfer.sim.app import write
from tinfer.sim.prequential import (
    ARMS,
    HINTED,
    SHUFFLED,
    Hinted,
    Trial,
    mean_tokens,
    play,
    shuffled,
    trials_of,
)
from tinfer.sim.scores import GRANULARITIES, Score, score
from tinfer.workloads import read_log

EXIT_OK = 0
ONLINE = "online"


class EvalOptions(Struct, frozen=True, kw_only=True):
    """What `tinfer predictor eval` was asked for. The first `skip` requests are learnt from and not
    scored; `max_tokens` as in `prequential.trials_of`; `seed` is of the shuffling."""

    log: str
    max_tokens: int | None = None
    skip: int = 0
    seed: int = 0
    json_path: str | None = None
    plot_dir: Path | None = None


def run(options: EvalOptions) -> int:
    """Evaluate and report; returns the exit code. Raises `StartError`, `OSError`."""
    result, scores = evaluated(options)
    write(result, options.json_path, text(result))
    if options.plot_dir is not None:
        from tinfer.sim.predictor_plots import draw

        sys.stderr.write(f"drawn: {draw(scores, options.plot_dir)}\n")
    return EXIT_OK


def evaluated(options: EvalOptions) -> tuple[dict[str, Any], dict[str, Score]]:
    """The result without its date, and the scores by predictor. Raises `StartError`."""
    trials = _trials(options)
    scores = scores_of(trials, options.skip, options.seed)
    ends = Counter(trial.end for trial in trials)
    result = {
        "settings": {
            "log": Path(options.log).name,
            "max_tokens": options.max_tokens,
            "skip": options.skip,
            "seed": options.seed,
        },
        "num_requests": len(trials),
        "num_by_end": {end.value: ends[end] for end in End},
        "mean_output_tokens": mean_tokens(trials),
        "predictors": {name: msgspec.to_builtins(one) for name, one in scores.items()},
    }
    return result, scores


def scores_of(trials: Sequence[Trial], num_skipped: int = 0, seed: int = 0) -> dict[str, Score]:
    """Of every arm and of the shuffled check. `ValueError` if there is nothing to score."""
    arms = dict(ARMS)
    if any(trial.asked.expected_output_tokens is not None for trial in trials):
        arms[HINTED] = Hinted
    scores = {name: score(trials, play(make(), trials), num_skipped) for name, make in arms.items()}
    others = shuffled(trials, seed)
    scores[SHUFFLED] = score(others, play(ARMS[ONLINE](), others), num_skipped)
    return scores


def text(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the report."""
    ends = ", ".join(f"{num} {name}" for name, num in result["num_by_end"].items() if num)
    mean = report.number(result["mean_output_tokens"])
    yield f"{result['settings']['log']}: {result['num_requests']} requests ({ends})"
    yield f"mean answer {mean} tokens; each is predicted as it arrives and observed as it ends"
    yield ""
    yield from report.table(_rows(result["predictors"]))
    yield ""
    by_end = result["num_by_end"]
    if by_end["length"] > by_end["stop"]:
        yield "most answers were cut by their bound, which then tells their length: --max-tokens"
        yield "takes them for answers that ended by themselves under another one"
    yield "shuffled: online, where each request got another one's answer; no skill is left to it"


def _rows(predictors: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    buckets = [f"acc. {size}" for size in GRANULARITIES]
    rows = [["", *buckets, "tau", "MAE", "pinball", "in 80 %", "width", "us"]]
    for name, one in predictors.items():
        shares = [*one["bucket_accuracy"].values()]
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells += [report.number(one[key]) for key in ("kendall_tau", "mae_tokens")]
        cells += [report.number(one["pinball_tokens"]), f"{100 * one['coverage']['0.8']:.1f} %"]
        cells += [report.number(one[key]) for key in ("width_80_tokens", "predict_us")]
        rows.append([name, *cells])
    return rows


def _trials(options: EvalOptions) -> list[Trial]:
    try:
        trials = trials_of(read_log(options.log), options.max_tokens)
    except OSError as error:
        raise StartError(f"cannot read {options.log}: {error.strerror}") from error
    except ValueError as error:
        raise StartError(f"{options.log}: {error}") from error
    if not any(trial.is_whole and trial.output_tokens for trial in trials[options.skip :]):
        raise StartError(f"{options.log}: no answer was served to its end, so none can be scored")
    return trials
