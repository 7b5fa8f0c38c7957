"""A live server's predictor is told of every request's end, once and for what it was; what it has
learnt outlives the server in a file."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from tests.unit.core_box import PLAIN
from tests.unit.master_box import D, DispatcherBox, P
from tests.unit.predict_box import ask, serve, traffic
from tinfer.api.service import Generation, Hints
from tinfer.config import load
from tinfer.core.events import Action, Arrived, Event
from tinfer.core.lengths import Lengths, certain
from tinfer.core.sampling import SamplingSpec
from tinfer.core.scheduler import Scheduler
from tinfer.core.types import SchedulerConfig
from tinfer.errors import EngineFailed, NoWorker, Overloaded, StartError
from tinfer.master.predictor_state import PredictorState, check_state_option
from tinfer.master.scheduling import predictor_of
from tinfer.master.streams import RequestStream
from tinfer.predict.asked import Asked, End, Features
from tinfer.predict.features import features_of_tokens
from tinfer.predict.hashes import hashed, head_of
from tinfer.predict.online import OnlinePredictor
from tinfer.predict.online_state import to_bytes
from tinfer.predict.predictors import MaxTokens, Prior
from tinfer.wire import messages as wire
from tinfer.wire.links import Incarnation
from tinfer.worker.fake_model import prompt_bytes


class Listener:
    """Remembers what it is asked and told."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.told: list[tuple[str, int, End]] = []

    def predict(self, asked: Asked) -> Lengths:
        self.asked.append(asked)
        return certain(5)

    def observe(self, asked: Asked, output_tokens: int, end: End) -> None:
        assert asked in self.asked
        self.told.append((asked.request_id, output_tokens, end))


@pytest.fixture
def heard() -> Listener:
    return Listener()


@pytest.fixture
def box(heard: Listener) -> DispatcherBox:
    return DispatcherBox(predictor=heard)


async def test_what_a_predictor_is_asked(box: DispatcherBox, heard: Listener) -> None:
    box.submit("r", num_prompt=20)
    box.submit("all", num_prompt=20, ignore_eos=True)
    box.submit("stops", num_prompt=20, ignore_eos=True, stop=["x"])
    features = features_of_tokens(prompt_bytes(range(20)), "m")
    assert heard.asked == [
        Asked("r", 20, 8, features=features),
        Asked("all", 20, 8, 8, runs_to_bound=True, features=features),
        Asked("stops", 20, 8, features=features),
    ]
    assert features.model == hashed(b"m")


async def test_no_prompt_is_hashed_for_who_does_not_learn() -> None:
    class Deaf(MaxTokens):
        def predict(self, asked: Asked) -> Lengths:
            assert asked.features == Features()
            return super().predict(asked)

    box = DispatcherBox(predictor=Deaf())
    box.submit().cancel()


@pytest.mark.parametrize(
    ("reason", "end"), [("stop", End.STOP), ("length", End.LENGTH), ("abort", End.ABORT)]
)
async def test_the_engines_word(box: DispatcherBox, heard: Listener, reason: str, end: End) -> None:
    box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18, 19], 3, "c", 3)
    assert heard.told == []
    box.step(D, [20], 4, "d", 4, finish_reason=reason)
    assert heard.told == [("r", 4, end)]
    box.lease_ended(0)
    assert heard.told == [("r", 4, end)]


async def test_a_client_that_leaves_has_cut_its_answer(box: DispatcherBox, heard: Listener) -> None:
    stream = box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "c", 3)
    stream.cancel()
    box.step(D, [19], 3, "d", 4)  # on its way
    box.say(D, wire.Aborted(["r"]))
    assert heard.told == [("r", 3, End.ABORT)]


async def test_an_answer_that_ended_before_the_abort_came_has_its_length(
    box: DispatcherBox, heard: Listener
) -> None:
    stream = box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    stream.cancel()
    box.step(D, [18], 2, "c", 3, finish_reason="stop")
    assert heard.told == [("r", 2, End.STOP)]


async def test_failures_cut_too(box: DispatcherBox, heard: Listener) -> None:
    box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [], 1, "", 2, finish_reason="error")
    assert heard.told == [("r", 1, End.ERROR)]
    box.submit("waits")
    box.dispatcher.fail_all(EngineFailed("over"))
    box.down(P)
    box.down(D)
    assert heard.told == [("r", 1, End.ERROR), ("waits", 0, End.ERROR)]


async def test_one_that_is_refused_never_was(heard: Listener) -> None:
    box = DispatcherBox(roles="", predictor=heard)
    with pytest.raises((NoWorker, Overloaded)):
        box.submit()
    assert heard.told == []


async def test_a_served_answer_is_learnt(box: DispatcherBox) -> None:
    predictor = OnlinePredictor()
    box = DispatcherBox(predictor=predictor)
    box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18], 2, "d", 3, finish_reason="stop")
    assert predictor.num_observed == 1


# --- hints ----------------------------------------------------------------------------------------


def submit_hinted(box: DispatcherBox, expected: int, request_id: str = "r") -> RequestStream:
    generation = Generation(
        list(range(20)), SamplingSpec(max_tokens=64), hints=Hints(expected, priority=-1)
    )
    return box.dispatcher.submit(request_id, generation)


async def test_the_scheduler_is_told_the_prediction_with_the_hint_in_it() -> None:
    arrived: list[Arrived] = []

    class Heard(Scheduler):
        def on_event(self, event: Event, now_s: float) -> list[Action]:
            if isinstance(event, Arrived):
                arrived.append(event)
            return super().on_event(event, now_s)

    box = DispatcherBox(predictor=Prior())
    box.dispatcher._scheduler = Heard(SchedulerConfig(**PLAIN))
    for worker_id in "pd":
        box.up(Incarnation(worker_id, 0))
    submit_hinted(box, 3)
    (event,) = arrived
    assert event.lengths is not None and event.lengths.points.count(3) == 2
    assert event.priority == -1
    (live,) = box.live.values()
    # A prompt is hashed no further than it takes to know who asks.
    assert live.asked.features == Features(head=head_of(prompt_bytes(range(20))))
    assert live.prediction.low_tokens < live.unhinted.quantile(0.1)


async def test_a_tenant_whose_words_were_right_is_believed_more() -> None:
    box = DispatcherBox(predictor=Prior())
    for number in range(12):
        submit_hinted(box, 2, f"r{number}")
        box.prefilled(f"r{number}", number)
        box.pulled(f"r{number}")
        box.step(D, [17, 18], 2, "abc", 3, f"r{number}", finish_reason="stop")
        box.lease_ended(number)
    submit_hinted(box, 2, "last")
    assert box.live["last"].prediction.median_tokens == 2.0


# --- the file -------------------------------------------------------------------------------------


def learnt() -> OnlinePredictor:
    predictor = OnlinePredictor()
    for asked, tokens in traffic(60):
        serve(predictor, asked, tokens)
    return predictor


def test_it_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = OnlinePredictor()
    state = PredictorState(first, str(path))
    state.save()
    assert not path.exists()  # nothing was learnt
    for asked, tokens in traffic(60):
        serve(first, asked, tokens)
    state.save()
    assert path.stat().st_mode & 0o077 == 0
    assert os.listdir(tmp_path) == ["state"]
    second = OnlinePredictor()
    PredictorState(second, str(path))
    assert to_bytes(second) == to_bytes(first) == path.read_bytes()


async def test_it_is_written_every_so_often(tmp_path: Path) -> None:
    written, loop = asyncio.Event(), asyncio.get_running_loop()

    class Noticed(PredictorState):
        def _write(self, num_observed: int, data: bytes) -> None:
            super()._write(num_observed, data)
            loop.call_soon_threadsafe(written.set)

    path = tmp_path / "state"
    predictor = OnlinePredictor()
    task = asyncio.create_task(Noticed(predictor, str(path)).keep(0.001))
    for num in (1, 2):
        serve(predictor, ask(num), 50)
        await written.wait()
        assert path.read_bytes() == to_bytes(predictor)
        written.clear()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("content", [b"", b"my thesis", to_bytes(learnt())[:-1]])
def test_what_is_no_state_is_one_warning_and_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    predictor = OnlinePredictor()
    with caplog.at_level(logging.WARNING):
        state = PredictorState(predictor, str(path))
    (said,) = caplog.records
    assert "--predictor-state" in said.getMessage()
    assert "learning anew" in said.getMessage()
    assert predictor.num_observed == 0
    assert path.read_bytes() == content
    serve(predictor, ask(1), 50)
    state.save()
    assert (tmp_path / "state.unusable").read_bytes() == content
    assert path.read_bytes() == to_bytes(predictor)


def test_a_disk_that_takes_nothing_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = OnlinePredictor()
    state = PredictorState(predictor, str(tmp_path / "gone" / "state"))
    serve(predictor, ask(1), 50)
    state.save()
    assert [one.levelname for one in caplog.records] == ["ERROR"]


def test_an_older_state_never_takes_a_newer_ones_place(tmp_path: Path) -> None:
    """A thread that was writing when the server stopped comes last."""
    path = tmp_path / "state"
    predictor = OnlinePredictor()
    state = PredictorState(predictor, str(path))
    serve(predictor, ask(1), 50)
    older = state._unsaved()
    assert older is not None
    serve(predictor, ask(2), 60)
    state.save()
    state._write(*older)
    assert path.read_bytes() == to_bytes(predictor)


def test_the_option(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    check_state_option(load({}))
    check_state_option(load({"predictor": "online", "predictor_state": path}))
    assert os.listdir(tmp_path) == []
    with pytest.raises(StartError, match="needs --predictor online: prior learns nothing"):
        check_state_option(load({"predictor_state": path}))
    for wrong in (str(tmp_path), f"{tmp_path}/no/state"):
        with pytest.raises(StartError, match="cannot write --predictor-state"):
            check_state_option(load({"predictor": "online", "predictor_state": wrong}))
    assert isinstance(predictor_of(load({"predictor": "online"})), OnlinePredictor)
