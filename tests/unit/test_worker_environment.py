"""Where the workers' files go: temporary ones with the run directory, caches where they stay."""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path

import pytest

from tinfer.config import load
from tinfer.master.keys import VARIABLES
from tinfer.master.zygote_link import _environment

RUN = Path("/run/here")


def test_temporary_files_go_with_the_run_directory() -> None:
    assert _environment(load({}), RUN)["TMPDIR"] == "/run/here/tmp"


def test_compiled_kernels_stay_where_torch_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: "a/b")
    kept = _environment(load({}), RUN)["TORCHINDUCTOR_CACHE_DIR"]
    assert kept == f"{tempfile.gettempdir()}/torchinductor_a_b"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert _environment(load({}), RUN)["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_a_user_without_an_account_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    kept = _environment(load({}), RUN)["TORCHINDUCTOR_CACHE_DIR"]
    assert kept == f"{tempfile.gettempdir()}/torchinductor_uid_12345"


@pytest.mark.parametrize("name", VARIABLES)
def test_workers_get_no_api_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "sk-secret")
    assert "sk-secret" not in _environment(load({}), RUN).values()
