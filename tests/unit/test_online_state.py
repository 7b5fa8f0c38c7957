"""What was learnt survives as bytes, and bytes that are no such thing are refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.predict_box import ask, middle, serve, traffic
from tinfer.predict.online import OnlinePredictor, OnlineSettings
from tinfer.predict.online_state import BadState, restore, to_bytes


def learnt(num: int = 400, seed: int = 0, **settings: Any) -> OnlinePredictor:
    predictor = OnlinePredictor(OnlineSettings(**settings))
    for asked, tokens in traffic(num, seed):
        serve(predictor, asked, tokens)
    return predictor


def same(one: OnlinePredictor, other: OnlinePredictor) -> bool:
    return all(
        one.predict(ask(9, tenant, most=most)) == other.predict(ask(9, tenant, most=most))
        for tenant in range(6)
        for most in (16, 300, 4096)
    )


@pytest.mark.parametrize("num", [0, 1, 400, 1500])
def test_there_and_back(num: int) -> None:
    before = learnt(num)
    after = OnlinePredictor()
    restore(after, to_bytes(before))
    assert same(before, after)
    assert to_bytes(after) == to_bytes(before) or num > 1024  # a full ring begins anew
    for asked, tokens in traffic(200, seed=3):
        for predictor in (before, after):
            serve(predictor, asked, tokens)
    assert same(before, after)
    assert after.num_observed == num + 200


def test_a_smaller_one_takes_the_latest() -> None:
    small = OnlinePredictor(OnlineSettings(num_rungs=16, num_recent=8))
    restore(small, to_bytes(learnt(600)))
    assert len(small.places) <= 16
    assert small.neighbours.num_filled == 8
    assert middle(small.predict(ask(1, 3))) > middle(small.predict(ask(1, 0)))
    serve(small, ask(1, 3), 500)


def test_no_token_of_a_prompt_is_in_it() -> None:
    predictor = OnlinePredictor()
    for number in range(5):
        serve(predictor, ask(number, head=777), 20)
    data = to_bytes(predictor)
    for token in range(777 * 40, 778 * 40 - 3):
        four = b"".join((token + i).to_bytes(4, "little") for i in range(3))
        assert four not in data


def broken(**changes: Any) -> bytes:
    state = msgspec.msgpack.decode(to_bytes(learnt(50)))
    return msgspec.msgpack.encode({**state, **changes})


def nan_counts() -> bytes:
    state = msgspec.msgpack.decode(to_bytes(learnt(50)))
    return bytes(broken(counts=b"\x00\x00\xc0\x7f" * (len(state["counts"]) // 4)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"hello", "damaged"),
        (b"\x93\x01\x02\x03", "damaged"),
        (b"\x81" * 100_000, "damaged"),
        (msgspec.msgpack.encode({"format": "other", "version": 1}), "something else"),
        (broken(version=2), "version 2"),
        (broken(edges=[0, 1, 2]), "bins"),
        (broken(num_slots=8), "signatures"),
        (broken(counts=b"123"), "not as long"),
        (broken(next=-1), "add up"),
        (broken(next=4000), "add up"),
        (broken(keys=[[9, 9]] * 5), "not as long"),
        (broken(unknown=1), "damaged"),
        (nan_counts(), "add up"),
    ],
)
def test_what_is_no_state_is_refused(data: bytes, words: str) -> None:
    predictor = OnlinePredictor()
    with pytest.raises(BadState, match=words):
        restore(predictor, data)
    assert predictor.num_observed == 0
    assert same(predictor, OnlinePredictor())


def test_no_damage_goes_unseen_that_would_break_a_prediction() -> None:
    """Cut anywhere, or with a byte changed, it is refused, or its predictions are lengths."""
    data = to_bytes(learnt(30, num_rungs=8, num_recent=4))
    step = max(1, len(data) // 150)
    for place in range(0, len(data), step):
        with pytest.raises(BadState):
            restore(OnlinePredictor(), data[:place])
        changed = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        predictor = OnlinePredictor()
        try:
            restore(predictor, changed)
        except BadState:
            continue
        points = predictor.predict(ask(1, 1, most=100)).points
        assert list(points) == sorted(points)
        assert 1 <= points[0] <= points[-1] <= 100
        serve(predictor, ask(1, 1), 50)
