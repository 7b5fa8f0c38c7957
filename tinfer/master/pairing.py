"""Which workers may hand KV blocks to each other: those whose blocks look alike, byte for byte.

Decided twice: before the start from what GPUs and config.json tell, after it from what the workers'
engines have really built (`Ready.kv_format`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from tinfer.core.types import Role

Worker = tuple[str, Role, Mapping[str, str]]


class Pairs(Struct, frozen=True):
    """The role that each worker really has, and a sentence per worker that is not paired.

    `kv_format` is that of the workers that are. `why_not` is set where no two workers can split.
    """

    roles: dict[str, Role]
    kv_format: Mapping[str, str]
    notes: list[str] = []
    why_not: str = ""

    @property
    def can_split(self) -> bool:
        return not self.why_not

    def role_of(self, planned: Role, kv_format: Mapping[str, str]) -> Role:
        """The role of a worker's next incarnation."""
        return planned if kv_format == self.kv_format else Role.WHOLE


def pair(workers: Sequence[Worker]) -> Pairs:
    """Pair the largest set of workers with like blocks that has both phases; the rest computes
    whole requests only."""
    kinds: list[list[Worker]] = []
    for worker in workers:
        like = next((kind for kind in kinds if kind[0][2] == worker[2]), None)
        if like is None:
            kinds.append([worker])
        else:
            like.append(worker)
    able = [kind for kind in kinds if _has_both(kind)]
    best = max(able or kinds, key=len)
    roles, notes = {}, []
    for worker_id, role, kv_format in workers:
        is_like = kv_format == best[0][2]
        roles[worker_id] = role if is_like else Role.WHOLE
        if not is_like and able:
            notes.append(
                f"{worker_id} is not paired and computes whole requests only: "
                f"{difference(best[0][2], kv_format)}"
            )
    why_not = "" if able else _why_not(workers, kinds)
    if why_not and len(kinds) > 1:
        notes.append(f"every worker computes whole requests: {why_not}")
    return Pairs(roles, best[0][2], notes, why_not)


def _has_both(kind: Sequence[Worker]) -> bool:
    """Whether one of them can hand off to another; two that do both phases do not."""
    roles = [role for _, role, _ in kind]
    return any(
        r is not Role.DECODE and s is not Role.PREFILL and (r, s) != (Role.BOTH, Role.BOTH)
        for i, r in enumerate(roles)
        for j, s in enumerate(roles)
        if i != j
    )


def _why_not(workers: Sequence[Worker], kinds: Sequence[Sequence[Worker]]) -> str:
    if len(kinds) > 1 and _has_both(workers):
        (one, _, first), (other, _, second) = kinds[0][0], kinds[1][0]
        return f"KV blocks of {one} and {other} do not fit: {difference(first, second)}"
    return "it needs a prefill and a decode worker"


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first thing in which two formats differ."""
    for name in (*ours, *theirs):
        mine, other = ours.get(name, "unknown"), theirs.get(name, "unknown")
        if mine != other:
            return f"{name.replace('_', ' ')} {other}, not {mine}"
    return "no difference"
