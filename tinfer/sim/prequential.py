"""A request log once more, for predictors alone: each is asked at every arrival and told of every
end, in the order in which they came, so that no answer is predicted from itself or from later ones.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from msgspec import Struct
from msgspec.structs import replace

from tinfer.core.lengths import Lengths, certain
from tinfer.predict.asked import Asked, End, Features, LearningPredictor, Predictor
from tinfer.predict.features import SIGNATURE_BYTES, features_of_segments
from tinfer.predict.hashes import from_hex, hashed
from tinfer.predict.hints import Hints
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.predictors import MaxTokens, Prior
from tinfer.workloads import LogRecord

# More than any answer has.
NO_BOUND = 1 << 20
_ENDS = {end.value: end for end in End}


class Trial(Struct, frozen=True):
    """One request of a log: what was known at `arrives_s`, and what came of it by `ends_s`."""

    asked: Asked
    output_tokens: int
    end: End
    arrives_s: float
    ends_s: float

    @property
    def is_whole(self) -> bool:
        """Whether it was served as long as it was to be: until it ended, or to its bound."""
        return self.end in (End.STOP, End.LENGTH)


class Told(Struct, frozen=True):
    """What a predictor said of one trial, and how long that took."""

    lengths: Lengths
    predict_s: float


class TenantMean:
    """The mean of what the same tenant's answers had so far, of all while there is none."""

    def __init__(self) -> None:
        self._sums: dict[int | None, tuple[int, int]] = {}

    def predict(self, asked: Asked) -> Lengths:
        seen = self._sums.get(asked.features.head) or self._sums.get(None)
        if seen is None:
            return certain(asked.max_output_tokens)
        return certain(min(asked.max_output_tokens, round(seen[1] / seen[0])))

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        for key in (asked.features.head, None):
            num, total = self._sums.get(key, (0, 0))
            self._sums[key] = (num + 1, total + output_tokens)


class PromptLengthOnly:
    """The online predictor with nothing to go by but how long a prompt is."""

    def __init__(self) -> None:
        self._online = OnlinePredictor()

    def predict(self, asked: Asked) -> Lengths:
        return self._online.predict(_blinded(asked)).up_to(asked.max_output_tokens)

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        self._online.observe(_blinded(asked), output_tokens, end)


class Hinted:
    """The online predictor with what clients say of the lengths of their answers, as a server has
    it."""

    def __init__(self) -> None:
        self._online = OnlinePredictor()
        self._hints = Hints()
        # By request, what was predicted without its hint; until it is observed.
        self._said: dict[str, Lengths] = {}

    def predict(self, asked: Asked) -> Lengths:
        self._said[asked.request_id] = lengths = self._online.predict(asked)
        return self._hints.blended(asked, lengths)

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        said = self._said.pop(asked.request_id, None) or self._online.predict(asked)
        self._hints.observe(asked, said, output_tokens, end)
        self._online.observe(asked, output_tokens, end)


# What stands beside each other; the shuffled check is `online` on other answers.
ARMS: dict[str, Callable[[], Predictor]] = {
    "online": OnlinePredictor,
    "max-tokens": MaxTokens,
    "prior": Prior,
    "prompt-length": PromptLengthOnly,
    "tenant-mean": TenantMean,
}
SHUFFLED = "shuffled"
# Beside the others where clients have said how long they expect answers to be.
HINTED = "online+hints"


def trials_of(records: Iterable[LogRecord], max_tokens: int | None = None) -> list[Trial]:
    """The requests of a log by arrival.

    With `max_tokens`, answers that were served to their end or bound count as ended by themselves
    under this bound, and as cut where they are longer: for logs of clients that ask for exactly the
    answer that they get. Of a prompt that is known a predictor sees what a server's would, of any
    other whose it is.
    """
    trials = [_trial(record, max_tokens) for record in records]
    return sorted(trials, key=lambda trial: trial.arrives_s)


def play(predictor: Predictor, trials: Sequence[Trial]) -> list[Told]:
    """What a new predictor says of each trial; they are in order of arrival. In the end it has seen
    the ends of all."""
    learner = predictor if isinstance(predictor, LearningPredictor) else None
    running: list[tuple[float, int]] = []
    told: list[Told] = []
    for number, trial in enumerate(trials):
        while running and running[0][0] <= trial.arrives_s:
            _observe(learner, trials[heapq.heappop(running)[1]])
        start_s = time.perf_counter()
        lengths = predictor.predict(trial.asked)
        told.append(Told(lengths, time.perf_counter() - start_s))
        heapq.heappush(running, (trial.ends_s, number))
    while running:
        _observe(learner, trials[heapq.heappop(running)[1]])
    return told


def shuffled(trials: Sequence[Trial], seed: int) -> list[Trial]:
    """The same requests, each with another one's answer, cut at its own bound: nothing that is
    known of a request says anything about its answer but that bound."""
    outcomes = [(trial.output_tokens, trial.end) for trial in trials]
    random.Random(f"shuffled answers {seed}").shuffle(outcomes)
    return [_with(trial, *outcome) for trial, outcome in zip(trials, outcomes, strict=True)]


def mean_tokens(trials: Sequence[Trial]) -> float:
    """Of the answers that were served whole."""
    return fmean(trial.output_tokens for trial in trials if trial.is_whole)


def _blinded(asked: Asked) -> Asked:
    return Asked(asked.request_id, asked.prompt_tokens, NO_BOUND)


def _observe(learner: LearningPredictor | None, trial: Trial) -> None:
    if learner is not None:
        learner.observe(trial.asked, trial.output_tokens, trial.end)


def _with(trial: Trial, output_tokens: int, end: End) -> Trial:
    bound = trial.asked.max_output_tokens
    if output_tokens > bound:
        return replace(trial, output_tokens=bound, end=End.LENGTH)
    return replace(trial, output_tokens=output_tokens, end=end)


def _trial(record: LogRecord, max_tokens: int | None) -> Trial:
    asked = Asked(
        record.request_id,
        prompt_tokens=record.prompt_tokens,
        max_output_tokens=max_tokens or record.max_output_tokens,
        # Under another bound it would have been another one.
        runs_to_bound=record.runs_to_bound and max_tokens is None,
        features=_features(record),
        expected_output_tokens=record.expected_output_tokens,
    )
    arrives_s = record.arrival_s if record.sent_s is None else record.sent_s
    # Whoever does not say when an answer ended has it known before the next request comes.
    ends_s = arrives_s + (record.e2el_s or 0.0)
    trial = Trial(asked, record.output_tokens, _end_of(record), arrives_s, ends_s)
    if max_tokens is None or not trial.is_whole:
        return trial
    return _with(trial, trial.output_tokens, End.STOP)


def _features(record: LogRecord) -> Features:
    """What a server has kept of the prompt, or would have kept."""
    if not record.prompt_head:
        segments = record.segments or ()
        return features_of_segments(segments, "" if segments else record.tenant)
    signature = record.prompt_signature
    return Features(
        model=hashed(record.model.encode()),
        head=from_hex(record.prompt_head),
        # One of another version says nothing here.
        signature=signature if len(signature) == SIGNATURE_BYTES else b"",
    )


def _end_of(record: LogRecord) -> End:
    if record.error is not None:
        return End.ERROR
    if record.finish_reason in _ENDS:
        return _ENDS[record.finish_reason]
    is_cut = record.output_tokens >= record.max_output_tokens
    return End.LENGTH if is_cut else End.STOP
