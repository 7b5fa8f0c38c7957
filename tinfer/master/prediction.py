"""Between the live requests and the length predictor: asked at arrival, told at every end."""

from __future__ import annotations

from tinfer.api.service import Generation
from tinfer.core.lengths import Lengths
from tinfer.master.live import LiveRequest
from tinfer.predict.asked import Asked, End, Features, LearningPredictor, Predictor

# What an engine says of an answer's end, where it says anything.
_ENDS = {"stop": End.STOP, "length": End.LENGTH, "abort": End.ABORT, "error": End.ERROR}


class Prediction:
    """The predictor of one server, and the name of the model that it serves.

    A prompt is hashed for a predictor that learns, and only for one.
    """

    def __init__(self, predictor: Predictor, model: str = "") -> None:
        self._predictor = predictor
        self._learner = predictor if isinstance(predictor, LearningPredictor) else None
        self.model = model

    def asked(self, request_id: str, generation: Generation, prompt: bytes) -> Asked:
        """What a predictor is asked of a request; `prompt` is int32 token ids."""
        sampling = generation.sampling
        runs_to_bound = sampling.ignore_eos and not sampling.stop
        return Asked(
            request_id,
            prompt_tokens=len(generation.prompt_token_ids),
            max_output_tokens=sampling.max_tokens,
            output_tokens=sampling.max_tokens if runs_to_bound else None,
            runs_to_bound=runs_to_bound,
            features=self._features(prompt),
        )

    def predict(self, asked: Asked) -> Lengths:
        """How long its answer will be."""
        return self._predictor.predict(asked)

    def over(self, live: LiveRequest) -> None:
        """A request has ended, which counts once: what it has and how its answer ended.

        Whatever is no end of the answer's own cut it, a client that left as well as a dead worker.
        """
        asked, live.asked = live.asked, None
        if self._learner is not None and asked is not None:
            self._learner.observe(asked, live.delivered_tokens, _end_of(live))

    def _features(self, prompt: bytes) -> Features:
        if self._learner is None:
            return Features()
        # With numpy, which the others do without.
        from tinfer.predict.features import features_of_tokens

        return features_of_tokens(prompt, self.model)


def _end_of(live: LiveRequest) -> End:
    if live.finish_reason is not None:
        return _ENDS.get(live.finish_reason, End.ERROR)
    return End.ERROR if live.stream.has_failed else End.ABORT
