"""A model on the Hugging Face hub: what it is, before anything large is downloaded.

Only config.json and the index of the weights are fetched here. The hub's own library keeps the
cache, reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE; this module turns what it raises
into one line for a person.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from tinfer.errors import StartError
from tinfer.master.model_files import (
    CONFIG_NAME,
    INDEX_NAME,
    Weights,
    engine_names,
    local_weights,
    read_index,
    weight_names,
)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOOK_TIMEOUT_S = 15.0


class HubModel(Struct, frozen=True):
    """What is known of a model by its name.

    `directory` is its snapshot in the cache; `missing` are the files, with their sizes in bytes,
    that are to be downloaded into it. `note` is why a cached copy was taken, if it was.
    """

    repo: str
    revision: str | None
    directory: str
    weights: Weights
    names: list[str] = []
    missing: dict[str, int] = {}
    note: str = ""

    @property
    def missing_bytes(self) -> int:
        return sum(self.missing.values())


def is_hub_name(model: str) -> bool:
    """Whether it has the form org/name."""
    return _NAME.fullmatch(model) is not None


def look(repo: str, revision: str | None, with_code: bool) -> HubModel:
    """Find out about a model; `with_code` if it may bring Python files to be run.

    Raises `StartError`: unknown, gated, no such revision, nobody to ask and no cached copy.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        found = _cached(repo, revision, "HF_HUB_OFFLINE is set: the cached copy is used")
        if found is None:
            cache = constants.HF_HUB_CACHE
            raise StartError(f"HF_HUB_OFFLINE is set and {cache} has no complete copy of {repo}")
        return found
    try:
        return _ask(repo, revision, with_code)
    except StartError:
        raise
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise explain(error, repo, revision) from error
    except Exception as error:
        reason = explain(error, repo, revision)
        found = _cached(repo, revision, f"{reason.message}: the cached copy is used")
        if found is None:
            raise reason from error
        return found


def _ask(repo: str, revision: str | None, with_code: bool) -> HubModel:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # of these two small files; the download itself shows its own
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=LOOK_TIMEOUT_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if CONFIG_NAME not in sizes:
        raise StartError(f"not a Hugging Face model, {CONFIG_NAME} is missing: {repo}")
    directory = Path(hf_hub_download(repo, CONFIG_NAME, revision=revision)).parent
    if INDEX_NAME in sizes:
        hf_hub_download(repo, INDEX_NAME, revision=revision)
    weights = weight_names(sizes, read_index(directory))
    if not weights:
        raise StartError(f"no weights in {repo}: neither *.safetensors nor pytorch_model*.bin")
    if lacking := [name for name in weights if name not in sizes]:
        raise StartError(f"{repo} is incomplete: {lacking[0]} is missing on the hub")
    names = engine_names(sizes, weights, with_code)
    missing = {
        name: sizes[name]
        for name in names
        if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)
    }
    complete = not any(name in missing for name in weights)
    return HubModel(
        repo,
        revision,
        str(directory),
        local_weights(directory) if complete else Weights({"": sum(sizes[n] for n in weights)}),
        names,
        missing,
    )


def _cached(repo: str, revision: str | None, note: str) -> HubModel | None:
    """The copy in the cache, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, CONFIG_NAME, revision=revision)
    if not isinstance(path, str):
        return None
    directory = Path(path).parent
    try:
        return HubModel(repo, revision, str(directory), local_weights(directory), note=note)
    except StartError:
        return None


def check_disk(model: HubModel) -> None:
    """Raises `StartError` if the cache has no room for what is to be downloaded."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if model.missing_bytes > free:
        raise StartError(
            f"not enough disk space for {model.repo}: {gb(model.missing_bytes)} needed, "
            f"{gb(free)} free in {cache} (HF_HOME moves it)"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StartError(f"cannot write to the model cache {cache} (HF_HOME moves it)")


def gb(num_bytes: float) -> str:
    """Bytes as the hub and disks count them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def explain(error: Exception, repo: str, revision: str | None) -> StartError:
    """What the hub's library raised, in one line."""
    from huggingface_hub import constants, errors, get_token

    where = constants.ENDPOINT
    token = "your token may not see it" if get_token() else "it may be private: set HF_TOKEN"
    match error:
        case StartError():
            return error
        case errors.GatedRepoError():
            text = f"{repo} is gated: accept its terms at {where}/{repo} and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            text = f"{repo} has no revision {revision}"
        case errors.DisabledRepoError():
            text = f"{where} has disabled {repo}"
        case errors.RepositoryNotFoundError():
            text = f"no such directory, and {where} has no model {repo} ({token})"
        case errors.HFValidationError():
            text = f"neither a directory nor a model's name: {repo}"
        case errors.HfHubHTTPError():
            text = _http_error(error.response.status_code, where, repo)
        case OSError(errno=errno.ENOSPC):
            text = f"the disk is full: {error.filename or constants.HF_HUB_CACHE}"
        case PermissionError():
            text = f"no permission to write {error.filename or constants.HF_HUB_CACHE}"
        case _:
            text = f"cannot reach {where}: {_one_line(error)}"
    return StartError(text)


def _http_error(status: int, where: str, repo: str) -> str:
    if status == 401:
        return f"{where} does not accept your token (HF_TOKEN)"
    if status == 403:
        return f"your token (HF_TOKEN) may not read {repo}"
    return f"{where} answers {status} for {repo}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def as_order(model: HubModel) -> Mapping[str, Any]:
    """What the download's own process has to know."""
    return {"repo": model.repo, "revision": model.revision, "names": model.names}
