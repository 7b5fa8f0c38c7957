"""The KV format of a vLLM worker, read from what it publishes to its peers."""

from __future__ import annotations

import msgspec

from tinfer.worker.handoff_scheduler import PublishedExport
from tinfer.worker.handoff_worker import RankExport
from tinfer.worker.kv.format import kv_format


def published_format(export: bytes) -> dict[str, str]:
    """The format of the worker that has published `export`."""
    published = msgspec.msgpack.decode(export, type=PublishedExport)
    ranks = [msgspec.msgpack.decode(rank, type=RankExport) for rank in published.ranks]
    return kv_format([rank.geometry for rank in ranks])
