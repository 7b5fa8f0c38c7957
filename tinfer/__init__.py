"""tinfer: one command turns one multi-GPU box into a disaggregated LLM server."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]

if TYPE_CHECKING:
    from tinfer.client import AsyncClient, Client
else:

    def __getattr__(name: str) -> object:
        """The clients, imported when they are first asked for: `import tinfer` stays instant."""
        if name not in ("AsyncClient", "Client"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from tinfer import client

        return getattr(client, name)
