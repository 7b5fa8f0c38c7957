"""The worker's loop between a master's messages and an engine's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from tests.unit.fake_box import ROOMY, spec_of
from tinfer.core.sampling import SamplingSpec
from tinfer.wire.messages import (
    Idle,
    Resume,
    SetBudget,
    Start,
    Step,
    Stop,
    ToMaster,
    ToWorker,
    decode_to_master,
    encode,
)
from tinfer.worker.fake_engine import FakeEngine
from tinfer.worker.fake_model import prompt_bytes
from tinfer.worker.loop import WorkerLoop

DEADLINE_MS = 20_000


class Master:
    """The other end of a worker's socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self._socket.send(encode(message))

    def until(self, is_last: Callable[[ToMaster], bool]) -> list[ToMaster]:
        """All messages up to one."""
        seen: list[ToMaster] = []
        while not seen or not is_last(seen[-1]):
            assert self._socket.poll(DEADLINE_MS), "the worker is silent"
            seen.append(decode_to_master(self._socket.recv()))
        return seen


@contextmanager
def looping(engine: FakeEngine) -> Iterator[Master]:
    """A loop in a thread of its own; it is told to stop at the end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://worker")
    theirs.connect("inproc://worker")
    thread = threading.Thread(target=WorkerLoop(engine, theirs).run)
    thread.start()
    master = Master(ours)
    try:
        yield master
    finally:
        master.send(Stop())
        thread.join()
        ours.close(0)
        theirs.close(0)
        context.term()
        engine.close()


def whole(request_id: str, prompt_tokens: int, max_tokens: int) -> Start:
    prompt = prompt_bytes(list(range(1, prompt_tokens + 1)))
    return Start(request_id, "whole", prompt, SamplingSpec(max_tokens=max_tokens, ignore_eos=True))


def steps_of(messages: list[ToMaster]) -> list[Step]:
    return [message for message in messages if isinstance(message, Step)]


def ends_of(messages: list[ToMaster]) -> list[str]:
    outputs = [output for step in steps_of(messages) for output in step.outputs]
    return [output.request_id for output in outputs if output.finish_reason is not None]


def is_preemption(message: ToMaster) -> bool:
    return isinstance(message, Step) and bool(message.preempted)


def test_a_step_without_outputs_is_sent_for_its_progress() -> None:
    with looping(FakeEngine(spec_of(ROOMY))) as master:
        master.send(SetBudget(4), whole("r", 10, 2))
        messages = master.until(lambda message: isinstance(message, Idle))
        steps = steps_of(messages)
        assert [(len(step.outputs), step.progress) for step in steps] == [
            (0, [("r", 4)]),
            (0, [("r", 8)]),
            (1, []),
            (1, []),
        ]
        assert [step.stats.num_computed_prompt_tokens for step in steps] == [4, 8, 10, 10]
        assert [step.stats.num_steps for step in steps] == [1, 2, 3, 4]
        assert all(
            before.stats.busy_s < after.stats.busy_s
            for before, after in zip(steps, steps[1:], strict=False)
        )


def test_no_budget_lets_nothing_through_until_it_is_lifted() -> None:
    with looping(FakeEngine(spec_of(ROOMY))) as master:
        master.send(SetBudget(0), whole("r", 30, 2), SetBudget(None))
        messages = master.until(lambda message: isinstance(message, Idle))
        assert [step.progress for step in steps_of(messages)] == [[("r", 16)], [], []]


def test_preempted_requests_are_named_in_their_step() -> None:
    tight = {"num_blocks": 8, "block_tokens": 4, "mean_output_tokens": 12}
    with looping(FakeEngine(spec_of(tight))) as master:
        master.send(SetBudget(0), whole("old", 8, 20), whole("young", 8, 20), SetBudget(None))
        messages = master.until(is_preemption)
        # It waits for a word: the other one is computed to its end, and then nothing.
        messages += master.until(lambda message: isinstance(message, Idle))
        assert ends_of(messages) == ["old"]
        assert [name for step in steps_of(messages) for name in step.preempted] == ["young"]
        master.send(Resume("young"))
        messages += master.until(lambda message: isinstance(message, Idle))
        assert ends_of(messages) == ["old", "young"]
        last = messages[-1]
        assert isinstance(last, Idle)
        assert last.stats.num_preemptions == 1
        assert last.stats.num_free_blocks == 8


def test_word_to_an_unknown_request_changes_nothing() -> None:
    with looping(FakeEngine(spec_of(ROOMY))) as master:
        master.send(Resume("nobody"), whole("r", 4, 2))
        messages = master.until(lambda message: isinstance(message, Idle))
        assert ends_of(messages) == ["r"]
