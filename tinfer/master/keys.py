"""Where the API keys of a server come from: options, a file, or the environment.

They end here: what goes on is their digests, an environment without them, and options without them,
so that no worker, log, plan or report can show one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import MutableMapping

from tinfer.api.keys import ApiKeys
from tinfer.config import ServeConfig
from tinfer.errors import StartError

# The second is what users of vLLM have set. Both hold one key.
VARIABLES = ("TINFER_API_KEY", "VLLM_API_KEY")
MAX_FILE_BYTES = 1 << 20


def take_keys(config: ServeConfig, environment: MutableMapping[str, str]) -> ApiKeys:
    """The keys of the options and their file; the environment's where these name none.

    Takes the variables out of `environment`, which every child process would inherit. Raises
    `StartError`, also for a key that is there and empty: that was meant to protect the server.
    """
    found = {name: environment.pop(name) for name in VARIABLES if name in environment}
    keys = [("--api-key", key) for key in config.api_key]
    if config.api_key_file is not None:
        keys += [("--api-key-file", key) for key in _read(config.api_key_file)]
    chosen = keys or list(found.items())[:1]
    for source, key in chosen:
        # What a header carries unchanged, whoever sends it.
        if not key or not all("!" <= character <= "~" for character in key):
            raise StartError(f"{source}: an API key is one or more printable ASCII characters")
    return ApiKeys(key for _, key in chosen)


def _read(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IRWXO:
                raise StartError(f"--api-key-file: {path} is open to other users; chmod o= it")
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StartError(f"--api-key-file: cannot read {path}: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise StartError(f"--api-key-file: {path} has more than {MAX_FILE_BYTES} bytes")
    keys = [line.strip() for line in text.decode(errors="surrogateescape").splitlines()]
    if not any(keys):
        raise StartError(f"--api-key-file: there is no key in {path}")
    return [key for key in keys if key]
