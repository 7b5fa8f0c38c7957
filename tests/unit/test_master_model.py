"""From MODEL to files: what is in a directory, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.model_box import SMALL, write_model, write_weights
from tinfer.config import load
from tinfer.errors import StartError
from tinfer.master import hub
from tinfer.master import model as module
from tinfer.master.hub import HubModel, is_hub_name
from tinfer.master.model import Model, resolve
from tinfer.master.model_files import (
    Weights,
    engine_names,
    loaded_bytes,
    local_weights,
    weight_names,
)


def resolved(model: str | None, **values: Any) -> Model:
    return resolve(load({"model": model, **values}))


def test_a_directory_is_served_under_the_name_it_was_given_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "m", SMALL, 100)
    monkeypatch.chdir(tmp_path)
    found = resolved("m")
    assert (found.directory, found.names) == (str(tmp_path / "m"), ("m",))
    assert (found.weights, found.config) == (Weights({"BF16": 100}), SMALL)
    assert (found.is_built_in, found.hub) == (False, None)
    assert resolved("m", served_model_name=("a", "b")).names == ("a", "b")


def test_the_built_in_model_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, SMALL)
    monkeypatch.setattr(module, "MODEL_DIR", folder)
    found = resolved(None)
    assert (found.directory, found.names) == (str(folder), ("tinfer-tiny",))
    assert found.is_built_in


def test_a_name_of_the_hub_stays_the_served_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "snapshot", SMALL)
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []

    def look(*arguments: object) -> HubModel:
        asked.append(arguments)
        return HubModel("org/name", "v1", str(folder), Weights({"": 7}), ["x"], {"x": 7})

    monkeypatch.setattr(hub, "look", look)
    found = resolved("org/name", revision="v1", trust_remote_code=True)
    assert asked == [("org/name", "v1", True)]
    assert (found.names, found.directory) == (("org/name",), str(folder))
    assert found.hub is not None
    assert found.hub.missing_bytes == 7


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("name", False),
        ("/a/b", False),
        ("./a", False),
        ("../a", False),
        ("a/b/c", False),
        ("a b/c", False),
        ("org/", False),
    ],
)
def test_what_looks_like_a_name_of_the_hub(name: str, is_one: bool) -> None:
    assert is_hub_name(name) is is_one


@pytest.mark.parametrize(
    ("files", "values", "words"),
    [
        (None, {}, "no such model directory"),
        ({}, {}, "config.json is missing"),
        ({"config.json": "{"}, {}, "cannot read config.json"),
        ({"config.json": "[]"}, {}, "is not a JSON object"),
        ({"config.json": "{}"}, {}, "no weights in"),
        ({"config.json": "{}", "model.safetensors": "12"}, {}, "it is cut off"),
        ({"config.json": "{}", "model.safetensors": "z" * 64}, {}, "it is no safetensors file"),
        (
            {"config.json": "{}", "model.safetensors.index.json": "{"},
            {},
            "model.safetensors.index.json",
        ),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors",'
                ' "b": "2.safetensors"}}',
            },
            {},
            "incomplete model, 1.safetensors and 1 more missing",
        ),
        ({"config.json": "{}"}, {"revision": "v1"}, "--revision is for models of the hub"),
    ],
)
def test_what_is_wrong_with_a_directory_is_one_line(
    tmp_path: Path, files: dict[str, str] | None, values: dict[str, Any], words: str
) -> None:
    folder = tmp_path / "m"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(StartError) as caught:
        resolved(str(folder), **values)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_revision_without_a_model() -> None:
    with pytest.raises(StartError, match="no MODEL is given"):
        resolved(None, revision="main")


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_weights(path, a=("BF16", 1000))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(StartError, match="it is cut off"):
        local_weights(tmp_path)


def test_weights_are_counted_by_type_over_all_shards(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.safetensors", x=("F32", 400), y=("I32", 8))
    write_weights(tmp_path / "b.safetensors", z=("F32", 40))
    write_weights(tmp_path / "old.safetensors", z=("F32", 4000))
    index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = local_weights(tmp_path)
    assert weights == Weights({"F32": 440, "I32": 8})
    assert loaded_bytes(weights, 2, 4) == 228


def test_old_files_count_by_what_config_json_says() -> None:
    assert loaded_bytes(Weights({"": 400}), 2, 4) == 200
    assert loaded_bytes(Weights({"": 400}), 2, 2) == 400


NAMES = [
    "config.json",
    "README.md",
    "LICENSE",
    "tokenizer.model",
    "chat_template.jinja",
    "modeling_odd.py",
    "model-1.safetensors",
    "model-2.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "onnx/model.safetensors",
    "original/params.json",
    "model.gguf",
]


def test_a_download_takes_one_copy_of_the_weights_and_no_other_format() -> None:
    weights = weight_names(NAMES, None)
    assert weights == ["model-1.safetensors", "model-2.safetensors"]
    names = engine_names(NAMES, weights, with_code=False)
    assert names == sorted(
        ["config.json", "LICENSE", "tokenizer.model", "chat_template.jinja", *weights]
    )
    assert "modeling_odd.py" in engine_names(NAMES, weights, with_code=True)


def test_without_safetensors_there_are_the_old_files() -> None:
    assert weight_names(["pytorch_model.bin", "training_args.bin"], None) == ["pytorch_model.bin"]
    assert weight_names(["flax_model.msgpack"], None) == []


def test_an_index_has_the_last_word() -> None:
    assert weight_names(NAMES, {"weight_map": {"a": "model-2.safetensors"}}) == [
        "model-2.safetensors"
    ]
