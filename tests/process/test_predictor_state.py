"""A live server learns from all that it serves, whoever cuts an answer, and knows it at the next
start."""

from __future__ import annotations

from pathlib import Path

from tests.process.box import running
from tests.process.load import Choice, Request
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import restore

FAKE = {"step_s": 0.0005, "mean_output_tokens": 12, "seed": 3}
PROMPT = list(range(7, 40))


def completion(**body: object) -> Request:
    whole = {"prompt": PROMPT, "max_tokens": 400, "stream": False, **body}
    return Request("/v1/completions", whole, [Choice()])


def learnt(path: Path) -> OnlinePredictor:
    predictor = OnlinePredictor()
    restore(predictor, path.read_bytes())
    return predictor


def states(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if "state" in one.name]


async def test_what_was_learnt_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state"
    options = {"predictor": "online", "predictor_state": path, "prefill": 1, "decode": 1}
    with running(tmp_path, FAKE, **options) as server:
        requests = [completion(seed=i) for i in range(6)]
        requests += [completion(seed=i, max_tokens=3) for i in range(3)]
        requests.append(completion(ignore_eos=True, max_tokens=20))
        await server.answer(*requests)
        await server.idle(10)
        assert not path.exists()
        server.stop()
    first = learnt(path)
    assert first.num_observed == 9  # not the one that was not to end by itself
    with running(tmp_path, FAKE, **options) as server:
        await server.answer(completion(seed=50))
        await server.idle(1)
        server.stop()
    assert learnt(path).num_observed == 10
    assert states(tmp_path) == ["state"]
