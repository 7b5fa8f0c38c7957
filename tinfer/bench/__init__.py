"""`tinfer bench`: offer load to a running server, measure what its clients see, and draw it.

A workload becomes a plan (`plan`), the plan is sent on time whatever the server does (`sender`,
which alone does I/O), what came back becomes figures (`metrics`, pure), and figures become a table
(`report`) or pictures (`figures` prepares them, `plots` draws them).
"""

from __future__ import annotations
