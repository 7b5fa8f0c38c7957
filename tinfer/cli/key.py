"""The key that a command shows to the server it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

# The option of a server for such keys, and where a key is found that no option names; the second is
# what users of vLLM have set.
KEY_OPTION = "api_key"
KEY_VARIABLES = ("TINFER_API_KEY", "VLLM_API_KEY")


def api_key_option() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--api-key`, as `api_key`; empty counts as none."""
    return click.option(
        "--api-key",
        metavar="KEY",
        envvar=list(KEY_VARIABLES),
        help="Key that the server wants to see. Better in TINFER_API_KEY: `ps` does not show that.",
    )
