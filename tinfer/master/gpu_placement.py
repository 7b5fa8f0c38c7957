"""Which worker gets which GPUs, and why.

Only GPUs whose KV blocks look alike are paired, since blocks move between them as bytes. The split
is even, with the odd group of GPUs for prefill: a GPU decodes many sequences for little more than
the price of one, so prefill saturates first, and an answer cannot start before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from tinfer.config import ServeConfig
from tinfer.core.types import Role
from tinfer.errors import StartError
from tinfer.master.gpus import Gpu, select
from tinfer.master.pairing import pair
from tinfer.master.placement import Placement, named

Format = dict[str, str]


class GpuLayout(Struct, frozen=True):
    """The workers, each one's own GPUs, and the reasons in whole sentences."""

    placements: list[Placement]
    groups: list[list[Gpu]]
    reasons: list[str]


def on_gpus(config: ServeConfig, gpus: Sequence[Gpu], dtype_of: Callable[[Gpu], str]) -> GpuLayout:
    """Place all workers on `gpus`; `dtype_of` is the type that a GPU will compute in.

    Raises `StartError` if they do not fit, or if `--route split` has no pair to split over.
    """
    reasons: list[str] = []
    if config.prefill_devices is not None or config.decode_devices is not None:
        roles, groups = _as_named(config, gpus, reasons)
    else:
        groups = _groups(config, gpus, dtype_of, reasons)
        roles = _roles(config, groups, reasons)
    share = config.gpu_memory_utilization
    if len(groups) == 1 and len(roles) > 1:
        groups = groups * len(roles)
        share /= len(roles)
        reasons.append(
            f"{len(roles)} workers share {_called(groups[0])}: each takes {share:.0%} of the memory"
        )
    if unused := [gpu for group in groups[len(roles) :] for gpu in group]:
        groups = groups[: len(roles)]
        reasons.append(f"{_called(unused)} not used: no worker is left for it")
    formats = [_format(group, dtype_of) for group in groups]
    pairs = pair([(w, r, f) for (w, r), f in zip(named(roles), formats, strict=True)])
    if config.route == "split" and not pairs.can_split:
        raise StartError(f"--route split: {pairs.why_not}")
    reasons += pairs.notes
    visible = list(dict.fromkeys(gpu for group in groups for gpu in group))
    placements = [
        Placement(
            worker_id=worker_id,
            role=role,
            device="cuda",
            devices=_own_first(group, visible),
            gpu_names=tuple(gpu.name for gpu in group),
            tensor_parallel_size=config.tensor_parallel_size,
            memory_share=share,
            kv_bytes=config.kv_cache_memory_bytes,
        )
        for (worker_id, role), group in zip(named(roles), groups, strict=True)
    ]
    return GpuLayout(placements, groups, reasons)


def _own_first(own: Sequence[Gpu], all_gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """A peer's GPU has to be visible to open its memory, so a worker sees all that have workers.

    CUDA gives a process one slice of a GPU, and slices cannot open each other's memory.
    """
    if own[0].is_slice:
        return tuple(gpu.uuid for gpu in own)
    return tuple(gpu.uuid for gpu in (*own, *(g for g in all_gpus if g not in own)))


def _format(group: Sequence[Gpu], dtype_of: Callable[[Gpu], str]) -> Format:
    """What can be told before the start of how a GPU's KV blocks look.

    Source: on compute capability 10.x vLLM 0.32 prefers FlashInfer, whose blocks keep heads before
    tokens; elsewhere FlashAttention and Triton keep tokens first.
    """
    backend = "of compute capability 10" if group[0].capability[0] == 10 else "default"
    return {"dtype": dtype_of(group[0]), "layout": backend}


def _as_named(
    config: ServeConfig, gpus: Sequence[Gpu], reasons: list[str]
) -> tuple[list[Role], list[list[Gpu]]]:
    """The GPUs that the user named for a phase; a phase without names gets those that are left."""
    wanted: dict[Role, list[Gpu]] = {}
    flags = {Role.PREFILL: "--prefill-devices", Role.DECODE: "--decode-devices"}
    for role, text in (
        (Role.PREFILL, config.prefill_devices),
        (Role.DECODE, config.decode_devices),
    ):
        if text is not None:
            wanted[role] = select([n.strip() for n in text.split(",")], gpus, flags[role])
    for gpu in wanted.get(Role.PREFILL, []):
        if gpu in wanted.get(Role.DECODE, []):
            raise StartError(
                f"GPU {gpu.name} is in --prefill-devices and in --decode-devices; "
                "to share one GPU: --prefill 1 --decode 1"
            )
    taken = [gpu for chosen in wanted.values() for gpu in chosen]
    left = [gpu for gpu in gpus if gpu not in taken]
    roles: list[Role] = []
    groups: list[list[Gpu]] = []
    for role, asked in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode)):
        chosen = wanted.get(role)
        if chosen is None:
            cut = _cut(left, config.tensor_parallel_size)
            cut = cut if asked is None else cut[:asked]
            reasons.append(f"{len(cut)} {role.value} workers get the GPUs that are not named")
        else:
            cut = _checked_cut(flags[role], chosen, config.tensor_parallel_size)
        if asked is not None and asked != len(cut):
            raise StartError(f"--{role.value} {asked} and the GPUs for {len(cut)} such workers")
        roles += [role] * len(cut)
        groups += cut
    return roles, groups


def _checked_cut(flag: str, gpus: list[Gpu], size: int) -> list[list[Gpu]]:
    if not gpus or len(gpus) % size:
        raise StartError(f"{flag} names {len(gpus)} GPUs, and each worker takes {size}")
    return _cut(gpus, size)


def _cut(gpus: Sequence[Gpu], size: int) -> list[list[Gpu]]:
    """Groups of `size`; what is left over stays out."""
    return [list(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]


def _groups(
    config: ServeConfig, gpus: Sequence[Gpu], dtype_of: Callable[[Gpu], str], reasons: list[str]
) -> list[list[Gpu]]:
    """GPUs in groups of one worker each, the most alike ones first; only those where the workers
    asked for leave a choice."""
    size = config.tensor_parallel_size
    kinds: dict[tuple[str, ...], list[Gpu]] = {}
    for gpu in gpus:
        kinds.setdefault(tuple(_format([gpu], dtype_of).values()), []).append(gpu)
    alike = sorted(
        kinds.values(), key=lambda kind: (-(len(kind) // size), kind[0].capability < (8, 0))
    )
    if not any(len(kind) >= size for kind in alike):
        raise StartError(f"--tensor-parallel-size {size}: {_have(gpus)}")
    first = _cut(alike[0], size)
    asked = sum(n for n in (config.prefill, config.decode) if n is not None)
    groups = [group for kind in alike for group in _cut(kind, size)]
    if asked <= len(first) or len(groups) == len(first):
        groups = first
        reasons += [
            f"{_called(kind)} left out: {_difference(alike[0][0], kind[0], dtype_of)}, "
            "and KV blocks move as bytes; a second server can use it"
            for kind in alike[1:]
        ]
    used = {gpu.uuid for group in groups for gpu in group}
    spare = [gpu for gpu in gpus if gpu.uuid not in used and gpu in alike[0]]
    if spare:
        reasons.append(f"{_called(spare)} left out: a worker takes {size}")
    return groups


def _difference(ours: Gpu, other: Gpu, dtype_of: Callable[[Gpu], str]) -> str:
    mine, theirs = _format([ours], dtype_of), _format([other], dtype_of)
    name = next(name for name in mine if mine[name] != theirs[name])
    capability = ".".join(map(str, other.capability))
    return f"its KV {name} is {theirs[name]} (compute capability {capability}), not {mine[name]}"


def _roles(config: ServeConfig, groups: list[list[Gpu]], reasons: list[str]) -> list[Role]:
    prefill, decode, num = config.prefill, config.decode, len(groups)
    if prefill is None and decode is None and num == 1 and config.route != "split":
        reasons.append(
            f"one worker does both phases on {_called(groups[0])}: no KV moves "
            "(--prefill 1 --decode 1 puts two on it)"
        )
        return [Role.BOTH]
    if prefill is None and decode is None:
        prefill = max(1, (num + 1) // 2)
        decode = max(1, num - prefill)
        if num > 1:
            reasons.append(f"{num} workers, split evenly; an odd one prefills")
    prefill = max(1, num - (decode or 0)) if prefill is None else prefill
    decode = max(1, num - prefill) if decode is None else decode
    if prefill + decode > num > 1:
        size = len(groups[0])
        raise StartError(
            f"{prefill + decode} workers need {(prefill + decode) * size} GPUs, "
            f"{num * size} can be had: lower --prefill or --decode"
        )
    return [Role.PREFILL] * prefill + [Role.DECODE] * decode


def _have(gpus: Sequence[Gpu]) -> str:
    return "one GPU can be had" if len(gpus) == 1 else f"no {len(gpus)} like GPUs can be had"


def _called(gpus: Sequence[Gpu]) -> str:
    return f"GPU {'+'.join(gpu.name for gpu in gpus)}"
