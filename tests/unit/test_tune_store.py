"""Tunings are found again for the same device and model, and only then."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.tune_box import IDENTITY, tuning
from tinfer.errors import StartError
from tinfer.tune import store
from tinfer.tune.identity import cpu_name, hash_of_model, identity_of


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = store.save(tuning(), tmp_path)
    assert path.name == IDENTITY.file_name and list(tmp_path.iterdir()) == [path]
    assert store.load_for(IDENTITY, tmp_path) == tuning() == store.read(path)


def test_a_newer_one_replaces_it(tmp_path: Path) -> None:
    store.save(tuning(), tmp_path)
    newer = msgspec.structs.replace(tuning(), date="2027-01-01T00:00:00+00:00")
    store.save(newer, tmp_path)
    assert store.load_for(IDENTITY, tmp_path) == newer
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"device": "Another CPU"},
        {"num_threads": 2},
        {"model_hash": "0"},
        {"weights_bytes": 124},
        {"dtype": "float32"},
        {"tensor_parallel_size": 2},
        {"is_eager": False},
    ],
)
def test_another_box_or_model_has_none(tmp_path: Path, other: dict[str, Any]) -> None:
    path = store.save(tuning(), tmp_path)
    asked = msgspec.structs.replace(IDENTITY, **other)
    assert asked.file_name != path.name
    assert store.load_for(asked, tmp_path) is None
    # Not even where the file got another one's name.
    path.rename(tmp_path / asked.file_name)
    assert store.load_for(asked, tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: text.replace('"chunk_tokens"', '"chunks"'), "damaged"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "version 99, not 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_none_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, words: str
) -> None:
    path = store.save(tuning(), tmp_path)
    text = damage(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert [store.load_for(IDENTITY, tmp_path) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert words in record.getMessage() and str(path) in record.getMessage()
    with pytest.raises(StartError, match=words):
        store.read(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"version": 1, "model": "\xff\xfe"}')
    with pytest.raises(StartError, match="damaged"):
        store.read(path)


def test_no_file_is_no_error_and_a_folder_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.load_for(IDENTITY, tmp_path / "nothing") is None
    assert caplog.records == []
    with pytest.raises(FileNotFoundError):
        store.read(tmp_path / "nothing")
    with pytest.raises(StartError, match="cannot read"):
        store.read(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(tuning(), tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(msgspec.structs.replace(tuning(), seed=7), tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    assert store.load_for(IDENTITY, tmp_path) == tuning()


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_folder() == tmp_path / "tinfer" / "tune"
    assert store.save(tuning()).parent == tmp_path / "tinfer" / "tune"
    assert store.load_for(IDENTITY) == tuning()
    monkeypatch.setenv("HOME", "/home/someone")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert store.default_folder() == Path("/home/someone/.cache/tinfer/tune")


def test_the_file_is_plain_json() -> None:
    plain = json.loads(store.encode(tuning()))
    assert plain["version"] == 1 and plain["identity"]["device"] == IDENTITY.device
    assert plain["fit"]["costs"]["base_s"] == tuning().costs.base_s
    assert set(plain) == set(tuning().__struct_fields__)


def test_who_a_model_and_a_processor_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = hash_of_model(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len(first) == 16 and hash_of_model(tmp_path) != first
    with pytest.raises(StartError, match=r"cannot read .*config\.json"):
        hash_of_model(tmp_path / "nothing")
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Fast One\nmodel name\t: A Fast One\n")
    assert cpu_name(info) == "A Fast One"
    info.write_text("processor\t: 0\n")
    assert cpu_name(info) and cpu_name(tmp_path / "nothing") == cpu_name(info)


def test_an_identity_from_what_is_known_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    known: dict[str, Any] = {
        "num_threads": 1,
        "directory": tmp_path,
        "weights_bytes": 5,
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
    }
    gpu = identity_of(gpu_model="NVIDIA H200", enforce_eager=False, **known)
    assert (gpu.device, gpu.is_eager, gpu.tensor_parallel_size) == ("NVIDIA H200", False, 2)
    assert identity_of(gpu_model="NVIDIA H200", enforce_eager=True, **known) != gpu
    cpu = identity_of(gpu_model=None, enforce_eager=False, **known)
    assert (cpu.device, cpu.is_eager) == (cpu_name(), True)
    fake = identity_of(gpu_model=None, enforce_eager=False, is_fake=True, **known)
    assert fake.device == "fake engine" and fake.model_hash == cpu.model_hash
