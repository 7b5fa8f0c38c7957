"""Whatever is asked of a puller and in whatever order, every pull is answered exactly once."""

from __future__ import annotations

import time
from collections import Counter

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv_box import geometry, open_files, shm_mappings
from tinfer.worker.kv.lease import LeaseTable
from tinfer.worker.kv.puller import PeerInfo, Pull, Puller
from tinfer.worker.kv.shm_transport import ShmTransport
from tinfer.worker.kv.source import SourceBlocks

LAYOUT = geometry(num_blocks=4, num_layers=2, page_bytes=64)
ORDERS = st.lists(
    st.sampled_from(["add", "drop", "pull", "stale", "unready", "bad", "cancel", "unused"]),
    max_size=25,
)


@settings(max_examples=60)
@given(ORDERS, st.integers(1, 5))
def test_every_pull_is_answered_once_and_every_reachable_lease_ends(
    orders: list[str], max_pending: int
) -> None:
    files, mappings = open_files(), shm_mappings()
    owner, table = ShmTransport(), LeaseTable.create(40)
    export = owner.export(owner.allocate(LAYOUT.total_bytes), LAYOUT)
    info = PeerInfo("p", 1, export, LAYOUT, table.descriptor())
    wakes: list[None] = []
    puller = Puller(
        ShmTransport(),
        torch.zeros(LAYOUT.total_bytes, dtype=torch.int8),
        LAYOUT,
        lambda: wakes.append(None),
        max_pending=max_pending,
    )
    puller.add_peer(info)
    submitted, readable, results = [], [], []
    for number, order in enumerate(orders):
        request_id = str(number)
        if order == "add":
            puller.add_peer(info)
        elif order == "drop":
            puller.drop_peer("p", 1)
            puller.add_peer(info)
        elif order == "cancel":
            puller.cancel(str(number - 1))
        else:
            ready = order != "unready"
            lease = table.open_lease(time.monotonic() + 60, ready=ready)
            pull = Pull(request_id, "p", 1, lease, SourceBlocks(((0, 1),)), ((2, 3),))
            if order == "stale":
                table.close_lease(lease)
            else:
                readable.append(lease)
            if order == "bad":
                pull = msgspec.structs.replace(pull, dst_blocks=((2, 9),))
            if order == "unused":
                puller.notify_unused("p", 1, lease)
            else:
                submitted.append(request_id)
                puller.submit(pull)
        results += puller.poll()
    puller.close()
    results += puller.poll()

    assert Counter(result.request_id for result in results) == Counter(submitted)
    assert len(wakes) == len(submitted)
    never_good = {str(i) for i, order in enumerate(orders) if order in ("stale", "bad", "unready")}
    assert not never_good & {result.request_id for result in results if result.ok}
    assert set(table.poll()[0]) == set(readable)
    assert (puller.num_mapped, puller.num_stale, puller.num_pending) == (0, 0, 0)
    table.close()
    owner.close()
    assert (open_files(), shm_mappings()) == (files, mappings)
