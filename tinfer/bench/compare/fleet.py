"""The servers of all arms: which are up, what they use, and their end."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from tinfer.bench.compare.arms import Arm, servers_of
from tinfer.bench.compare.options import VLLM_COMMAND, CompareOptions
from tinfer.bench.compare.servers import Server, stop_all
from tinfer.bench.compare.vllm_command import with_metadata
from tinfer.errors import StartError

Warm = Callable[[Arm, Sequence[str]], Awaitable[None]]


class Fleet:
    """Starts arms when they are needed and ends them all with `stop`.

    With `residency` "together" an arm that is up stays up, but all its processes are stopped (by
    SIGSTOP) while another arm has its turn: an idle engine that only waits still takes 1 to 2 % of
    a core, vLLM's and tinfer's alike (measured), which would add up. With "alone" it goes before
    another one comes. `warm` is awaited once for each start, with the arm and its servers' URLs.
    """

    def __init__(
        self, options: CompareOptions, scratch: Path, say: Callable[[str], None], warm: Warm
    ) -> None:
        self._options = options
        self._log_dir = options.log_dir or scratch
        self._say = say
        self._warm = warm
        self._up: dict[str, list[Server]] = {}
        self._environment: Mapping[str, str] = (
            {"VLLM_LOGGING_LEVEL": "WARNING"} | dict(os.environ) | {"TMPDIR": str(scratch)}
        )
        if options.vllm_command == VLLM_COMMAND:
            self._environment = with_metadata(self._environment, scratch / "metadata")

    async def urls(self, arm: Arm) -> list[str]:
        """The addresses of its servers, which are started and warm if they were not up.

        Raises `StartError`.
        """
        for name, servers in self._up.items():
            for server in servers:
                if name == arm.name:
                    server.thaw()
                elif self._options.residency == "together":
                    server.freeze()
        if arm.name not in self._up:
            if self._options.residency == "alone":
                self.stop()
            await self._start(arm)
        return [server.url for server in self._up[arm.name]]

    async def _start(self, arm: Arm) -> None:
        self._say(f"starting {arm.name}")
        plans = servers_of(arm, self._options)
        # In place before the first start: whatever happens now, `stop` ends what there is.
        servers = self._up[arm.name] = []
        begun_s = time.monotonic()
        for place, plan in enumerate(plans):
            log = self._log_dir / f"{arm.name}-{place}.log"
            servers.append(Server(plan, self._environment, log))
        deadline_s = begun_s + self._options.start_timeout_s
        for server in servers:
            await server.wait_ready(deadline_s)
        await self._warm(arm, [server.url for server in servers])
        self._say(f"{arm.name} is ready after {time.monotonic() - begun_s:.1f} s")

    def cpu_s(self) -> dict[str, float]:
        """Processor time so far of each arm that is up."""
        return {
            name: sum(server.cpu_s() for server in servers) for name, servers in self._up.items()
        }

    def check(self) -> None:
        """Raises `StartError` where a server that should be up has ended."""
        for name, servers in self._up.items():
            for server in servers:
                if (why := server.why_gone()) is not None:
                    raise StartError(f"{name}: {why}")

    def stop(self) -> None:
        """End every server; returns when they are gone. Idempotent."""
        servers = [server for of_arm in self._up.values() for server in of_arm]
        self._up.clear()
        stop_all(servers)
