"""Workloads as code: which requests arrive when, of what length, sharing which prefixes.

The load generator and the simulator both start here: `make(WorkloadSpec(...))` gives the requests
of a run, `prompt_token_ids` the tokens of one, `write_log`/`read_log`/`from_log` turn what happened
into the next run's workload. Everything is drawn from `random.Random(text).random()` alone, see
`draws`: a spec stands for the same list on every machine and Python version.
"""

from __future__ import annotations

from tinfer.workloads.catalogue import WORKLOADS, Workload, make
from tinfer.workloads.lengths import Limits
from tinfer.workloads.log import SCHEMA_VERSION, LogRecord, encode_record, read_log, write_log
from tinfer.workloads.prefixes import prefix_segments
from tinfer.workloads.replay import from_log
from tinfer.workloads.requests import Request, Segment, prompt_token_ids
from tinfer.workloads.spec import WorkloadSpec
from tinfer.workloads.summary import LengthSummary, WorkloadSummary, percentile, summarise

__all__ = [
    "SCHEMA_VERSION",
    "WORKLOADS",
    "LengthSummary",
    "Limits",
    "LogRecord",
    "Request",
    "Segment",
    "Workload",
    "WorkloadSpec",
    "WorkloadSummary",
    "encode_record",
    "from_log",
    "make",
    "percentile",
    "prefix_segments",
    "prompt_token_ids",
    "read_log",
    "summarise",
    "write_log",
]
