"""Between the live requests and the length predictor: asked at arrival, told at every end."""

from __future__ import annotations

from collections.abc import Callable

from tinfer.api.service import Generation
from tinfer.api.trace import INTERVAL, Predicted
from tinfer.core.lengths import Lengths
from tinfer.master.live import LiveRequest
from tinfer.predict.asked import Asked, End, Features, LearningPredictor, Predictor
from tinfer.predict.hashes import head_of
from tinfer.predict.hints import Hints

# What an engine says of an answer's end, where it says anything.
_ENDS = {"stop": End.STOP, "length": End.LENGTH, "abort": End.ABORT, "error": End.ERROR}


class Prediction:
    """The predictor of one server, by its name, and the name of the model that it serves.

    A prompt is hashed for a predictor that learns, or after `keep_hashes`, and only then; of one
    with a hint, its beginning.
    """

    def __init__(self, predictor: Predictor, model: str = "", name: str = "") -> None:
        self._predictor = predictor
        self._learner = predictor if isinstance(predictor, LearningPredictor) else None
        self._hints = Hints()
        self._features_of: Callable[[bytes, str], Features] | None = None
        self.model = model
        self.name = name
        if self._learner is not None:
            self.keep_hashes()

    def keep_hashes(self) -> None:
        """From now on, hash every prompt."""
        # With numpy, which the others do without, and which no request is to wait for.
        from tinfer.predict.features import features_of_tokens

        self._features_of = features_of_tokens

    def asked(self, request_id: str, generation: Generation, prompt: bytes) -> Asked:
        """What a predictor is asked of a request; `prompt` is int32 token ids."""
        sampling = generation.sampling
        runs_to_bound = sampling.ignore_eos and not sampling.stop
        expected = generation.hints.expected_output_tokens
        return Asked(
            request_id,
            prompt_tokens=len(generation.prompt_token_ids),
            max_output_tokens=sampling.max_tokens,
            output_tokens=sampling.max_tokens if runs_to_bound else None,
            runs_to_bound=runs_to_bound,
            features=self._features(prompt, expected is not None),
            expected_output_tokens=expected,
        )

    def predict(self, asked: Asked) -> tuple[Lengths, Lengths]:
        """How long its answer will be: by the predictor, and with the client's word in it."""
        lengths = self._predictor.predict(asked)
        return lengths, self._hints.blended(asked, lengths)

    def over(self, live: LiveRequest) -> None:
        """A request has ended: what it has and how its answer ended. Said once for each.

        Whatever is no end of the answer's own cut it, a client that left as well as a dead worker.
        """
        end = end_of(live)
        self._hints.observe(live.asked, live.unhinted, live.delivered_tokens, end)
        if self._learner is not None:
            self._learner.observe(live.asked, live.delivered_tokens, end)

    def _features(self, prompt: bytes, is_hinted: bool) -> Features:
        if self._features_of is not None:
            return self._features_of(prompt, self.model)
        return Features(head=head_of(prompt)) if is_hinted else Features()


def end_of(live: LiveRequest) -> End:
    """How the answer of a request that is over ended."""
    if live.finish_reason is not None:
        return _ENDS.get(live.finish_reason, End.ERROR)
    return End.ABORT if live.stream.failure is None else End.ERROR


def told(lengths: Lengths, predictor: str) -> Predicted:
    """A prediction as a client and the request log have it."""
    low, high = lengths.interval(INTERVAL)
    return Predicted(predictor, round(lengths.quantile(0.5), 1), round(low, 1), round(high, 1))
