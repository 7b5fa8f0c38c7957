"""What the online predictor has learnt, as bytes: for a file that outlives the server.

MessagePack, of this version only. Hashes and counts, no text; nothing in it is executed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from tinfer.predict.curves import EDGES, NUM_BINS
from tinfer.predict.features import NUM_SLOTS
from tinfer.predict.online import RUNGS, Key, OnlinePredictor

FORMAT = "tinfer online predictor"
VERSION = 1


class BadState(ValueError):
    """Bytes from which no predictor can be made; the message says why."""


class _Named(Struct):
    """The two fields that are read before the rest, which may be of another shape."""

    format: str
    version: int


class _State(_Named, kw_only=True, forbid_unknown_fields=True):
    """Arrays are little-endian and in the order of memory; see `OnlinePredictor`, `Neighbours`."""

    edges: tuple[int, ...]
    num_slots: int
    keys: tuple[tuple[int, ...], ...]
    counts: bytes
    heads: tuple[int, ...]
    slots: bytes
    places: bytes
    ended: bytes
    shares: bytes
    next: int
    num_observed: int


def to_bytes(predictor: OnlinePredictor) -> bytes:
    """All that was learnt, by the rung that was used longest ago first; at most about as large as
    the predictor."""
    near = predictor.neighbours
    num = near.num_filled
    state = _State(
        format=FORMAT,
        version=VERSION,
        edges=EDGES,
        num_slots=NUM_SLOTS,
        keys=tuple(predictor.places),
        counts=predictor.counts[list(predictor.places.values())].astype("<f4").tobytes(),
        heads=tuple(predictor.heads),
        slots=near.slots[:, :num].astype("<u2").tobytes(),
        places=near.places[:num].astype("<u2").tobytes(),
        ended=near.ended[:num].astype("<f4").tobytes(),
        shares=near.shares[:num].astype("<f4").tobytes(),
        next=near.next,
        num_observed=predictor.num_observed,
    )
    return msgspec.msgpack.encode(state)


def restore(predictor: OnlinePredictor, data: bytes) -> None:
    """Put what was learnt into a predictor that has learnt nothing yet.

    Of more rungs or prompts than it keeps it takes the latest. Raises `BadState` for what is
    damaged, of another version or something else, and leaves the predictor as it was.
    """
    state = _decoded(data)
    num_rungs, num_recent = len(state.keys), len(state.places) // 2
    counts = _array(state.counts, "<f4", (num_rungs, 2, NUM_BINS))
    slots = _array(state.slots, "<u2", (NUM_SLOTS, num_recent))
    places = _array(state.places, "<u2", (num_recent,))
    ended = _array(state.ended, "<f4", (num_recent,))
    shares = _array(state.shares, "<f4", (num_recent,))
    _check(state, counts, places, ended, shares)
    settings, near = predictor.settings, predictor.neighbours
    keys = state.keys[-settings.num_rungs :]
    predictor.counts[: len(keys)] = counts[num_rungs - len(keys) :]
    predictor.places = OrderedDict((key, place) for place, key in enumerate(keys))
    predictor.heads = OrderedDict.fromkeys(state.heads[-2 * settings.num_rungs :])
    # The oldest first; a ring that is not full begins with it.
    order = np.roll(np.arange(num_recent), -state.next if num_recent else 0)
    order = order[-near.num_kept :]
    num = len(order)
    near.slots[:, :num] = slots[:, order]
    near.places[:num], near.ended[:num], near.shares[:num] = (
        places[order],
        ended[order],
        shares[order],
    )
    near.num_filled, near.next = num, num % near.num_kept
    predictor.num_observed = state.num_observed


def _decoded(data: bytes) -> _State:
    try:
        named = msgspec.msgpack.decode(data, type=_Named)
        if named.format != FORMAT:
            raise BadState("it is something else than a predictor's state")
        if named.version != VERSION:
            raise BadState(f"it is of version {named.version}, not {VERSION}")
        state = msgspec.msgpack.decode(data, type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadState(f"it is damaged or something else: {error}") from error
    if state.edges != EDGES or state.num_slots != NUM_SLOTS:
        raise BadState("its bins or signatures are others than this version's")
    return state


def _array(data: bytes, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if len(data) != math.prod(shape) * np.dtype(kind).itemsize:
        raise BadState("it is damaged: its rows are not as long as they should be")
    return np.frombuffer(data, dtype=kind).reshape(shape)


def _check(
    state: _State,
    counts: NDArray[Any],
    places: NDArray[Any],
    ended: NDArray[Any],
    shares: NDArray[Any],
) -> None:
    """What would make predictions wrong without anybody noticing."""
    ends, there = counts[:, 0], counts[:, 1]
    is_sound = (
        all(map(_is_key, state.keys))
        and len(set(state.keys)) == len(state.keys)
        and bool(np.isfinite(counts).all() and (ends >= 0.0).all())
        # A row of counts that fade together rounds by far less than that.
        and bool((ends <= there * 1.001 + 1e-3).all())
        and bool((places < NUM_BINS).all() and np.isin(ended, (0.0, 1.0)).all())
        and bool(((shares >= 0.0) & (shares <= 1.0)).all())
        and 0 <= state.next <= len(places)
        and state.num_observed >= 0
    )
    if not is_sound:
        raise BadState("it is damaged: its counts do not add up")


def _is_key(key: Key) -> bool:
    return bool(key) and 0 <= key[0] < len(RUNGS) and len(key) == 1 + len(RUNGS[key[0]])
