"""The server's request log: a line for every end, of hashes and counts; never a wait, never more
memory than it may have, and no text that was not asked for."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.master_box import D, DispatcherBox, P
from tinfer.api.service import Generation, Hints
from tinfer.config import load
from tinfer.core.events import WorkerGone
from tinfer.core.sampling import SamplingSpec
from tinfer.errors import EngineFailed, NoWorker, StartError
from tinfer.master.live import LiveRequest
from tinfer.master.request_log import RequestLog, check_request_log_options, open_request_log
from tinfer.master.request_record import ServerRecord
from tinfer.master.rotating_file import RotatingFile
from tinfer.predict.features import features_of_tokens
from tinfer.predict.hashes import as_hex, from_hex, hashed
from tinfer.sim.prequential import trials_of
from tinfer.wire import messages as wire
from tinfer.worker.fake_model import prompt_bytes
from tinfer.workloads import read_log

LINE = b'{"of": "ten"}\n'


def logged(path: Path, **options: Any) -> tuple[DispatcherBox, RequestLog]:
    """A dispatcher whose requests are logged there; its clock stands 1,000 s after 1970."""
    log = open_request_log(load({"request_log": str(path), **options}), -1000.0)
    assert log is not None
    box = DispatcherBox()
    box.dispatcher.request_log = log
    return box, log


def records(log: RequestLog, path: Path) -> list[ServerRecord]:
    log.close()
    lines = path.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=ServerRecord) for line in lines]


async def test_a_request_that_was_answered(tmp_path: Path) -> None:
    box, log = logged(tmp_path / "log")
    box.to_decoding()
    box.step(D, [17], 1, "ab", 2)
    box.step(D, [18, 19], 3, "c", 3, finish_reason="stop")
    box.lease_ended(0)
    (record,) = records(log, tmp_path / "log")
    assert (record.request_id, record.arrival_s, record.model) == ("r", 1000.0, "m")
    assert (record.prompt_tokens, record.max_output_tokens, record.output_tokens) == (20, 8, 3)
    assert (record.finish_reason, record.error, record.route) == ("stop", None, "split")
    assert (record.workers, record.cached_tokens) == (("p", "d"), 16)
    assert (record.ttft_s, record.e2el_s, record.queue_s) == (0.0, 0.0, 0.0)
    assert (record.predicted_output_tokens, record.predicted_low_tokens) == (8.0, 8.0)
    assert (record.prompt_text, record.prompt_token_ids) == (None, None)


async def test_what_was_kept_is_what_online_was_asked(tmp_path: Path) -> None:
    """So what is evaluated is what a server would have predicted."""
    path = tmp_path / "log"
    box, log = logged(path)
    stream = box.submit(num_prompt=100)
    (live,) = box.live.values()
    stream.cancel()
    box.say(P, wire.Aborted(["r"]))
    log.close()
    (trial,) = trials_of(read_log(path))
    assert trial.asked == live.asked
    assert trial.asked.features == features_of_tokens(prompt_bytes(range(100)), "m")
    assert as_hex(0) == "" and from_hex(as_hex(hashed(b"x"))) == hashed(b"x")


async def test_every_end_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    box, log = logged(path)
    box.to_decoding().cancel()
    box.say(D, wire.Aborted(["r"]))
    box.submit("refused")
    box.say(P, wire.Refused("refused", "no grammar of 'my secret'", client_fault=True))
    box.submit("broken")
    box.prefilled("broken", 1)
    box.pulled("broken")
    box.step(D, [], 1, "", 2, "broken", finish_reason="error")
    box.submit("waits")
    box.dispatcher.fail_all(EngineFailed("over"))
    for worker in (P, D):
        box.down(worker)
        box.dispatcher.worker_event(WorkerGone(worker.worker_id))
    with pytest.raises(NoWorker):
        box.submit("never")
    ends = {one.request_id: (one.finish_reason, one.error) for one in records(log, path)}
    assert ends == {
        "r": ("abort", None),
        "refused": ("error", "400 BadRequestError"),
        "broken": ("error", "500 InternalServerError"),
        "waits": ("error", "500 InternalServerError"),
        "never": ("error", "503 ServiceUnavailableError"),
    }
    assert b"secret" not in path.read_bytes()
    assert log.num_written == 5


@pytest.mark.parametrize(
    ("keeps", "text", "expected"),
    [
        (False, "a plan", (None, None)),
        (True, "a plan", ("a plan", None)),
        (True, None, (None, [1, 2, 3])),
    ],
)
async def test_prompts_and_what_a_client_says(
    tmp_path: Path, keeps: bool, text: str | None, expected: Any
) -> None:
    box, log = logged(tmp_path / "log", log_prompts=keeps)
    generation = Generation(
        [1, 2, 3],
        SamplingSpec(max_tokens=8, ignore_eos=True),
        hints=Hints(5, -2, 1.5),
        prompt_text=text,
        response_id="cmpl-7",
    )
    box.dispatcher.submit("r", generation).cancel()
    box.say(P, wire.Aborted(["r"]))
    (record,) = records(log, tmp_path / "log")
    assert (record.prompt_text, record.prompt_token_ids) == expected
    assert (record.expected_output_tokens, record.priority, record.deadline_s) == (5, -2, 1.5)
    assert (record.runs_to_bound, record.response_id) == (True, "cmpl-7")


# --- what the disk does ---------------------------------------------------------------------------


def line_of(live: LiveRequest, model: str) -> bytes:
    return LINE


class SlowFile(RotatingFile):
    """Takes nothing until it may."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1 << 20, 1)
        self.may_write = threading.Event()
        self.is_asked = threading.Event()

    def write(self, lines: Any) -> None:
        self.is_asked.set()
        assert self.may_write.wait(20)
        super().write(lines)


def add(log: RequestLog, num: int) -> None:
    for _ in range(num):
        log.add(None, "m")  # type: ignore[arg-type]  # the line is the same for all


def test_a_slow_disk_costs_lines_and_no_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = SlowFile(tmp_path / "log")
    log = RequestLog(file, line_of, max_waiting_bytes=10 * len(LINE))
    add(log, 1)
    assert file.is_asked.wait(20)
    add(log, 30)
    assert log.num_lost == 21
    file.may_write.set()
    log.close()
    log.close()
    assert (tmp_path / "log").read_bytes() == 10 * LINE
    said = [one.getMessage() for one in caplog.records]
    assert said == [
        "--request-log: the disk is too slow, lines are lost",
        "--request-log lacks 21 of 31 lines",
    ]
    add(log, 1)
    assert log.num_lost == 22


def test_a_disk_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = SlowFile(tmp_path / "log")
    log = RequestLog(file, line_of)
    add(log, 3)
    assert file.is_asked.wait(20)
    log.close(timeout_s=0.01)
    assert [one.getMessage() for one in caplog.records] == ["--request-log lacks 3 of 3 lines"]
    file.may_write.set()
    log._thread.join(20)
    assert (tmp_path / "log").read_bytes() == 3 * LINE


def test_a_full_disk_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(RotatingFile(Path("/dev/full"), 100, 1), line_of)
    with caplog.at_level(logging.WARNING):
        add(log, 2000)
        log.close()
    assert (log.num_lost, log.num_written) == (2000, 0)
    assert [one.getMessage() for one in caplog.records] == [
        "--request-log cannot be written, lines are lost: No space left on device",
        "--request-log lacks 2000 of 2000 lines",
    ]


def test_everything_that_waits_is_written_at_the_end(tmp_path: Path) -> None:
    log = RequestLog(RotatingFile(tmp_path / "log", 1 << 20, 1), line_of)
    add(log, 5000)
    log.close()
    assert (tmp_path / "log").read_bytes() == 5000 * LINE
    assert (log.num_written, log.num_lost) == (5000, 0)


def test_the_options(tmp_path: Path) -> None:
    check_request_log_options(load({}))
    check_request_log_options(load({"request_log": str(tmp_path / "log")}))
    assert not list(tmp_path.iterdir())
    assert open_request_log(load({}), 0.0) is None
    with pytest.raises(StartError, match="--log-prompts needs --request-log"):
        check_request_log_options(load({"log_prompts": True}))
    for wrong in (str(tmp_path), f"{tmp_path}/no/log"):
        with pytest.raises(StartError, match="cannot write --request-log"):
            check_request_log_options(load({"request_log": wrong}))
        with pytest.raises(StartError, match="cannot write --request-log"):
            open_request_log(load({"request_log": wrong}), 0.0)
    log = open_request_log(load({"request_log": str(tmp_path / "log")}), 0.0)
    assert log is not None
    with pytest.raises(StartError, match="written by another server"):
        open_request_log(load({"request_log": str(tmp_path / "log")}), 0.0)
    log.close()
