"""A directory that someone else made: it runs no code, is read within itself, and never hangs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import save_random_model
from test_span_model import CONFIGS

import common.weights.model_files
from common.diffusion.schedulers import read_scheduler_config
from common.diffusion.shapes import read_index
from common.errors import CheckpointError, MidspanError
from common.spans.cut import Span
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span
from edge_agent.text.ends import load_ends
from edge_agent.text.tokenizer import TextTokenizer

LOADERS: dict[str, Callable[[Path], object]] = {
    "ends": load_ends,
    "tokenizer": TextTokenizer,
    "config": lambda directory: read_config(Checkpoint(directory)),
}
pytestmark = pytest.mark.timeout(60)  # what hung, hung for ever


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small Llama in several files."""
    return save_random_model(CONFIGS["llama"], tmp_path / "model", max_shard_size="40KB")


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_one_sentence(error: MidspanError) -> None:
    assert re.fullmatch(r"[^\n]{10,700}", str(error))


@pytest.mark.parametrize("loader", LOADERS)
def test_code_beside_a_model_of_an_unknown_type_is_not_run(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path / "model")
    marker = tmp_path / "it was run"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    change_json(directory / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the user says yes to all that is asked
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(CheckpointError) as caught:
        LOADERS[loader](directory)
    assert_one_sentence(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "a/../../b", "", 3, None])
def test_an_index_names_files_of_its_own_directory_only(place: object, directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = min(weight_map)
    file = next(directory.glob("*.safetensors"))
    (directory.parent / "other.safetensors").write_bytes(file.read_bytes())
    index.write_text(json.dumps({"weight_map": weight_map | {name: place}}))
    with pytest.raises(CheckpointError, match="which is no file name inside its directory"):
        Checkpoint(directory)


def test_links_into_a_cache_of_blobs_are_followed(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        (tmp_path / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    middle = load_span(Checkpoint(snapshot), Span(2, 4))
    assert middle.bytes_read == load_span(Checkpoint(directory), Span(2, 4)).bytes_read


def test_a_tensor_that_is_not_in_the_file_of_the_index_is_named(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    wrong = next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])
    change_json(index, weight_map=weight_map | {"model.norm.weight": wrong})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_span(Checkpoint(directory), Span(4, 6), part="tail")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "generation_config.json",
             "model-00001-of-00005.safetensors", "tokenizer.json", "tokenizer_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("loader", LOADERS)
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, loader: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is no plain file"):
        LOADERS[loader](directory)


def test_a_device_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no plain file"):
        Checkpoint(tmp_path)


def test_a_pipe_deeper_in_the_directory_is_refused(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (directory / "deep").mkdir()
    os.mkfifo(directory / "deep" / "pipe.safetensors")
    moved = dict.fromkeys(weight_map, "deep/pipe.safetensors")
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"pipe\.safetensors is no plain file"):
        load_span(Checkpoint(directory), Span(2, 4))


@pytest.mark.parametrize("count", [10**9, 10**30, -4, 0, 2.5, "6", True, [6], None])
@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer"])
def test_a_number_of_layers_that_no_model_has_is_refused(
    count: object, name: str, directory: Path
) -> None:
    change_json(directory / "config.json", **{name: count})
    with pytest.raises(CheckpointError, match=f"gives {name} as .*; expected 1 to 1024") as caught:
        read_config(Checkpoint(directory))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": ["llama"]}, {"model_type": None}, {"model_type": 3}, {"hidden_size": "big"},
        {"hidden_size": -32}, {"num_attention_heads": 0}, {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": ["default"]}}, {"layer_types": 5}, {"vocab_size": 10**30},
        {"layer_types": [["full_attention"]]}, {"hidden_act": "nothing"}, {"eos_token_id": {}},
        {"eos_token_id": "end"}, {"quantization_config": 3}, {"max_position_embeddings": []},
        {"architectures": 4, "hidden_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_wrong_types_are_refused_in_one_sentence(
    values: dict[str, Any], directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    change_json(directory / "config.json", **values)
    with pytest.raises(CheckpointError) as caught:
        load_ends(directory)
    assert_one_sentence(caught.value)


MALFORMED = {
    "not a map": b"[1]", "not closed": b"{", "no UTF-8": b'{"model_type": "\xff"}',
    "deep": b"[" * 100_000, "a deep value": b'{"model_type": ' + b"[" * 100_000,
    "a long number": b'{"model_type": ' + b"9" * 5000 + b"}", "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", Checkpoint),
        ("model.safetensors.index.json", Checkpoint),
        ("generation_config.json", load_ends),
        ("tokenizer_config.json", TextTokenizer),
        ("tokenizer.json", TextTokenizer),
        ("model_index.json", read_index),
        ("scheduler/scheduler_config.json", read_scheduler_config),
    ],
)
def test_malformed_json_is_refused_in_one_sentence(
    content: bytes, name: str, read: Callable[[Path], object], directory: Path
) -> None:
    (directory / "scheduler").mkdir()
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    assert_one_sentence(caught.value)


def test_json_of_any_size_is_not_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.weights.model_files, "MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes; at most 10 are read"):
        Checkpoint(directory)


def test_a_sound_directory_is_loaded(directory: Path) -> None:
    ends = load_ends(directory)
    assert ends.hidden == 32
    assert ends.head.dtype == torch.float32
