"""Workers that say what makes no sense, whole in form and wrong in meaning.

The dispatcher takes any message of any worker at any moment; only the ledger may say no, where
leases and blocks would no longer add up. Names and numbers are drawn from those that exist about
as often as from all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.master_box import D, DispatcherBox, P
from tests.wire import strategies
from tinfer.core.ledger import LedgerError
from tinfer.wire.messages import ToMaster

NAMES = ["r", "before", "p", "d"]
PHASES = ["to_queued", "submit", "to_waiting", "to_decoding"]


@pytest.fixture
def known_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    leaves: dict[Any, st.SearchStrategy[Any]] = {
        str: st.sampled_from(NAMES) | st.text(max_size=4),
        int: st.integers(0, 3) | st.integers(-(2**31), 2**40),
    }
    for kind, drawn in leaves.items():
        monkeypatch.setitem(strategies._LEAVES, kind, drawn)
    strategies.instances.cache_clear()
    yield
    strategies.instances.cache_clear()


@pytest.mark.usefixtures("known_names")
@pytest.mark.parametrize("phase", PHASES)
async def test_the_dispatcher_takes_any_words(phase: str) -> None:
    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.sampled_from([P, D]), strategies.any_of(ToMaster)), max_size=6))
    def check(words: list[tuple[Any, ToMaster]]) -> None:
        box = DispatcherBox()
        getattr(box, phase)()
        for sender, message in words:
            with contextlib.suppress(LedgerError):
                box.say(sender, message)

    check()
