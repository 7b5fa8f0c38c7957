"""Workloads of independent requests: one arrival process, one or more classes of lengths."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tinfer.workloads import draws
from tinfer.workloads.lengths import Lengths
from tinfer.workloads.requests import Request, Segment
from tinfer.workloads.spec import ArrivalProcess, WorkloadSpec, on_the_grid


class RequestClass(Struct, frozen=True):
    """A task and its lengths; `weight` is its share among the classes of a mix."""

    task: str
    prompt: Lengths
    output: Lengths
    weight: float = 1.0


def single_turn(
    spec: WorkloadSpec, classes: Sequence[RequestClass], own: ArrivalProcess
) -> list[Request]:
    """`spec.num_requests` requests, each of a class drawn by weight, none sharing a prefix."""
    lengths = spec.stream("lengths")
    weights = [each.weight for each in classes]
    requests = []
    for index, arrival_s in enumerate(spec.arrive(own, spec.num_requests, spec.rate_rps)):
        drawn = classes[draws.pick(lengths, weights)]
        request_id = f"{spec.name}-{spec.seed}-{index:06d}"
        prompt_tokens = spec.limits.prompt(drawn.prompt.draw(lengths))
        requests.append(
            Request(
                request_id=request_id,
                arrival_s=on_the_grid(arrival_s),
                task=drawn.task,
                segments=(Segment(request_id, prompt_tokens),),
                output_tokens=spec.limits.output(drawn.output.draw(lengths)),
            )
        )
    return requests
