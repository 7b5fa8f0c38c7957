"""How deeply JSON is nested, found without recursion, whatever is nested in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw, Struct

_NESTS = (dict, list, Struct)
# Fields whose type is lists of token ids, which are long and cannot nest any deeper.
_FLAT = frozenset({"prompt", "tokens"})


def depth_exceeds(value: Any, limit: int) -> bool:
    """Whether objects and arrays, typed ones and those kept as text too, nest deeper than `limit`.

    Level by level, so that it takes one look at each value and no stack. Text that cannot be
    parsed for its depth counts as too deep.
    """
    level = [value] if _nests(value) else []
    for _ in range(limit):
        try:
            level = [child for node in level for child in _children(node) if _nests(child)]
        except RecursionError:
            return True
        if not level:
            break
    return bool(level)


def _nests(value: Any) -> bool:
    if isinstance(value, Raw):
        return bool(bytes(value))  # nothing where the field is absent
    return isinstance(value, _NESTS)


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, list):
        return node
    if isinstance(node, Raw):
        try:
            inner = msgspec.json.decode(node)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ()  # whoever reads it says so
        return _children(inner) if isinstance(inner, dict | list) else ()
    return (getattr(node, name) for name in node.__struct_fields__ if name not in _FLAT)
