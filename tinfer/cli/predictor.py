"""`tinfer predictor`: read the options, evaluate or train, turn the end into an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from tinfer.cli.ending import ended
from tinfer.cli.outputs import check_writable, json_option, plot_option

_EPILOG = """
\b
Beside each other: online (as --predictor online), max-tokens, prior,
prompt-length (online with nothing but the prompt's length), tenant-mean,
and shuffled (online, where each request got another one's answer).
\b
acc. N   share of answers in the bucket of N tokens that was predicted
tau      Kendall's tau-b of predicted and true order
MAE      mean absolute error of the predicted median, in tokens
pinball  mean pinball loss of five quantiles, in tokens
in 80 %  share of answers within the interval that is to hold 80 %
width    mean width of that interval, in tokens
us       median time of a prediction
\b
Scored are answers that ended by themselves or at their bound; aborted and
failed ones are observed for the tokens that they had.
\b
Exit status: 0 when all was evaluated; 2 for a bad option or log; 130 after
Ctrl-C.
\b
The result of --json is one object; tinfer/sim/predictor_app.py says what
its keys mean.
"""


@click.group("predictor", no_args_is_help=True)
def command() -> None:
    """Look at what predicts how long answers will be, and teach it."""


@command.command("eval", epilog=_EPILOG)
@click.option(
    "--from",
    "log",
    required=True,
    type=click.Path(dir_okay=False, exists=True),
    metavar="LOG",
    help="Request log (JSONL of `tinfer serve --request-log` or `tinfer bench`).",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Take whole answers as ended by themselves under this bound: for logs of clients that ask "
    "for exactly what they get, as the load generator does.",
)
@click.option(
    "--skip",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="First requests that are learnt from and not scored.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the shuffling.")
@json_option()
@plot_option("Draw order, error and calibration.")
def evaluate(**given: Any) -> None:
    """Predict each request of a log as it arrives, observe it as it ends, and score that.

    No model and no GPU: what is there to learn from is what a server would have seen.
    """

    def evaluated() -> int:
        check_writable(given["json_path"], given["plot_dir"])
        from tinfer.sim.predictor_app import EvalOptions, run

        return run(EvalOptions(**given))

    sys.exit(ended(evaluated))


_TRAIN_EPILOG = """
\b
The state is made anew from all logs, in the order of time; what FILE held
before is gone. Start with it by
    tinfer serve --predictor online --predictor-state FILE
under the model name that the log has.
\b
Exit status: 0 when the state is written; 2 for a bad option or log, or
where there is nothing to learn; 130 after Ctrl-C.
\b
The result of --json is one object; tinfer/sim/predictor_train.py says what
its keys mean.
"""


@command.command("train", epilog=_TRAIN_EPILOG)
@click.option(
    "--from",
    "logs",
    required=True,
    multiple=True,
    type=click.Path(dir_okay=False, exists=True),
    metavar="LOG",
    help="Request log of `tinfer serve --request-log`; repeatable, in any order.",
)
@click.option("--out", required=True, metavar="FILE", help="The state to write.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Take whole answers as ended by themselves under this bound, as in eval.",
)
@json_option()
def train(**given: Any) -> None:
    """Teach the online predictor from request logs, so that a new server knows its traffic.

    Hashes and lengths are enough: the logs need no text.
    """

    def trained() -> int:
        check_writable(given["json_path"], None)
        check_writable(given["out"], None)
        from tinfer.sim.predictor_train import TrainOptions, run

        return run(TrainOptions(**given))

    sys.exit(ended(trained))
