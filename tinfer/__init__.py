"""tinfer: one command turns one multi-GPU box into a disaggregated LLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from tinfer.client import AsyncClient, Client
    from tinfer.offline import LLM, SamplingParams
else:
    _CLIENTS = ("AsyncClient", "Client")
    _OFFLINE = ("LLM", "SamplingParams")

    def __getattr__(name: str) -> object:
        """Imported when they are first asked for: `import tinfer` stays instant."""
        if name in _CLIENTS:
            from tinfer import client

            return getattr(client, name)
        if name in _OFFLINE:
            from tinfer import offline

            return getattr(offline, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
