"""What a view looks like on terminals of different widths, and that nothing can break them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.unit.top_box import URL, sight, view, waiting, worker_view
from tinfer.top import words
from tinfer.top.drawing import Picture
from tinfer.top.view import Handoffs, Lengths, Requests, Sight, Timing

WIDTHS = (40, 80, 140)
NO_TIME = Timing(num=0, mean_s=None, p50_s=None, p99_s=None)


def drawn(seen: Sight, width: int, hint: str = "") -> list[str]:
    """Its lines, of which none is wider than the terminal."""
    console = Console(
        width=width, height=50, file=io.StringIO(), record=True, highlight=False, color_system=None
    )
    console.print(Picture(seen, hint))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(len(line) for line in lines) <= width, lines
    return lines


def row(lines: list[str], begin: str) -> list[str]:
    """The words of the one line that begins so."""
    (found,) = [line for line in lines if line.startswith(begin)]
    return found.split()


def test_a_wide_terminal_shows_all() -> None:
    lines = drawn(sight(), 140)
    assert lines[0] == f"tinfer-tiny  {URL}  tinfer 0.1.0  up 1 day, 2:03:04  ok"
    assert row(lines, "requests") == "requests 12.0/s in 11.5/s answered".split()
    assert "3 refused (queue-full 3)  0 failed" in "\n".join(lines)
    assert row(lines, "tokens") == "tokens 1,234/s output 4,568/s prompt".split()
    told = "in flight 34 queued 1 prefilling 2 hand-off 12 decoding"
    assert row(lines, "in flight") == told.split()
    (handoffs,) = [line for line in lines if line.startswith("hand-offs")]
    assert "2.00/s  1.2 MB/s  copy 3.20 ms  1 recomputed" in handoffs
    assert "leases 2 waiting, 1 reading  pulls 1" in handoffs
    (lengths,) = [line for line in lines if line.startswith("lengths")]
    assert "78% of 12 in the predicted interval  error 14.0 tokens" in lengths
    assert lengths.endswith("so far 81% of 1,200, 12.5 tokens")
    assert row(lines, "TTFT") == "TTFT 12 13.4 ms 13.4 ms 40.2 ms".split()
    assert row(lines, "loop lag") == "loop lag 200 0.40 ms 0.40 ms 1.20 ms".split()
    heads = "worker role state run wait KV prefill busy deaths gen preempted device"
    assert row(lines, "worker") == heads.split()
    bar = "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 3 + "\N{BOX DRAWINGS HEAVY LEFT}"
    first = f"prefill-0 prefill ready 3 1 45% {bar} 1,536 80% 0 1 77 core 0"
    assert row(lines, "prefill-0") == first.split()
    assert row(lines, "decode-0")[5:7] == ["100%", "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 8]
    assert lines[-3].split() == "waiting phase waited prompt expected reason".split()
    told = "0badcafe-17 queued 1.25 s 4,321 100 prefill-0 has 1536 prompt tokens to do"
    assert lines[-2].split() == told.split()
    assert lines[-1] == "and 35 more"


def test_80_columns_leave_out_what_matters_least() -> None:
    lines = drawn(sight(), 80)
    heads = "worker role state run wait KV prefill busy deaths gen"
    assert row(lines, "worker") == heads.split()
    assert row(lines, "TTFT") == "TTFT 12 13.4 ms 13.4 ms 40.2 ms".split()
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in "".join(lines)


def test_40_columns_show_each_worker_and_what_it_has_to_do() -> None:
    lines = drawn(sight(), 40)
    assert row(lines, "worker") == "worker state run wait KV busy".split()
    assert row(lines, "prefill-0") == "prefill-0 ready 3 1 45% 80%".split()
    assert row(lines, "E2EL") == "E2EL 1.25 s 1.25 s 3.75 s".split()
    assert "0badcafe-17" in "\n".join(lines)


@pytest.mark.parametrize("width", [*range(1, 40), *WIDTHS, 400])
def test_no_width_breaks_it(width: int) -> None:
    seen = sight(
        workers=[worker_view(id=f"prefill-{n}", state="restarting") for n in range(20)],
        waiting=[waiting(reason="x" * 300), waiting(reason="\N{CJK UNIFIED IDEOGRAPH-597D}" * 90)],
    )
    assert drawn(seen, width, hint="q leaves")


@pytest.mark.parametrize("width", WIDTHS)
def test_where_nothing_happened_there_is_a_dash(width: int) -> None:
    dash = words.NOTHING
    requests = Requests(
        accepted_per_s=None,
        answered_per_s=None,
        num_accepted=0,
        num_answered=0,
        num_aborted=0,
        num_refused=0,
        num_failed=0,
        refused={},
        failed={},
    )
    handoffs = Handoffs(
        per_s=None,
        bytes_per_s=None,
        mean_copy_s=None,
        num_recomputed=0,
        leases={},
        num_pulls=0,
        num_zombies=0,
    )
    down = worker_view(
        state="dead",
        reason="killed by SIGKILL",
        kv_bytes=None,
        kv_used_bytes=None,
        kv_share=None,
        outstanding_prefill_tokens=None,
        busy_share=None,
    )
    none = Lengths(num=0, within_share=None, mean_error_tokens=None)
    lines = drawn(
        sight(
            requests=requests,
            output_tokens_per_s=None,
            uptime_s=None,
            ttft=NO_TIME,
            handoffs=handoffs,
            lengths=none,
            lengths_so_far=none,
            workers=[down],
            num_waiting=0,
            waiting=[],
        ),
        width,
    )
    assert row(lines, "requests") == [*f"requests {dash} in {dash} answered".split()]
    assert set(row(lines, "TTFT")[1:]) <= {"0", dash} and dash in row(lines, "TTFT")
    assert dash in row(lines, "prefill-0 ")
    assert "prefill-0: killed by SIGKILL" in lines
    assert lines[-1] == "no request waits"


def test_words_of_the_server_are_only_text() -> None:
    evil = "\x1b[2J[bold]a[/nothing]\rb\x07"
    lines = drawn(
        sight(
            model=evil,
            status=evil,
            is_healthy=False,
            workers=[worker_view(id=evil, reason=evil)],
            waiting=[waiting(reason=evil)],
        ),
        140,
    )
    shown = "\n".join(lines)
    assert shown.count("\N{REPLACEMENT CHARACTER}[2J[bold]a[/nothing]") == 6
    assert "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_a_server_that_is_gone(width: int) -> None:
    why = "nothing answers at it (Connection refused)"
    before = drawn(Sight(url=URL, view=None, trouble=why), width, hint="q leaves")
    assert before[0].startswith(URL) and before[0].endswith("q leaves")
    assert " ".join(before[1:]) == f"{why}; trying on"
    after = drawn(Sight(url=URL, view=view(), trouble=why, lost_s=3.21), width)
    assert f"{why}; last seen 3.21 s ago; trying on" in " ".join(after)
    assert row(after, "prefill-0"), "what was seen last stays"
    assert "ok" not in " ".join(after).split(), "but not how well it was"


def test_a_server_that_is_another_one_now() -> None:
    assert drawn(sight(was_restarted=True), 140)[0].endswith("ok  restarted")
    assert drawn(sight(is_healthy=False, status="draining"), 140)[0].endswith("draining")


def test_more_that_wait_than_are_shown() -> None:
    assert drawn(sight(waiting=[], num_waiting=36), 80)[-1] == "waiting: 36"
    assert drawn(sight(waiting=[waiting()], num_waiting=1), 140)[-1].startswith("0badcafe-17")


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_the_consoles_choice(no_color: bool) -> None:
    file = io.StringIO()
    console = Console(
        width=100,
        file=file,
        force_terminal=True,
        no_color=no_color,
        color_system="truecolor",
    )
    console.print(Picture(sight(workers=[worker_view(state="dead")])))
    assert ("\x1b[1;31m" in file.getvalue()) is not no_color
    assert "dead" in file.getvalue()


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (words.seconds(0.0), "0 ms"),
        (words.seconds(0.00004), "0.04 ms"),
        (words.seconds(0.0134), "13.4 ms"),
        (words.seconds(0.9994), "999 ms"),
        (words.seconds(0.9996), "1.00 s"),
        (words.seconds(12.34), "12.3 s"),
        (words.seconds(2560.0), "2,560 s"),
        (words.rate(0.0), "0/s"),
        (words.rate(9.996), "10.0/s"),
        (words.rate(123456.7), "123,457/s"),
        (words.share(0.999), "100%"),
        (words.size(0.0), "0 bytes"),
        (words.size(1.5e9), "1.5 GB"),
        (words.duration(59.9), "0:00:59"),
        (words.count(1234567), "1,234,567"),
    ],
)
def test_figures_in_words(shown: str, text: str) -> None:
    assert shown == text
