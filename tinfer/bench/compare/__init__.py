"""`tinfer bench compare`: tinfer beside plain vLLM on the same devices, interleaved in one run.

What is measured is data before it happens: `arms` says which servers each arm has, `steps` which
runs there are and in which order. `session` does all I/O, with `servers` (processes), `guard` (what
ends them) and `balancer` (the replicas' load balancer); `journal` keeps what is `recorded` on disk
as it comes. What came back becomes numbers in pure code: `capacity` (what 100 % load is), `limits`
(the SLOs), `samples` and `metrics` (figures), `bootstrap` (intervals), `comparison` (ratios and
verdicts), and `report` or `charts` show them.
"""

from __future__ import annotations
