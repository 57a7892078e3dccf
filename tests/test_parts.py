"""Parts of a model by their names, and as files: a folder of one's own part is enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from forks import error_line, run_midspan
from pools import reference_tokens
from random_models import save_random_model
from safetensors.torch import load_file, save_file
from test_span_model import CONFIGS, PROMPT, run_whole

import common.formats.export
from common.errors import CheckpointError, SettingsError
from common.formats.export import export
from common.formats.part_folder import write_parts
from common.spans.attention import Segment
from common.spans.cut import Cut, Span
from common.spans.parts import Parts, ends_of, full, middle_of, name_layer, read_parts
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span
from common.weights.manifest import MANIFEST
from common.weights.needs import measure_needs
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import load_ends
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.families import PAGE, read_page
from evaluation.small_models import write_small

CUT = Cut(2, 4)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("b", Parts(True, (), False)),
        ("e", Parts(False, (), True)),
        ("f", Parts(True, (Span(0, 80),), True)),
        ("0-5", Parts(False, (Span(0, 5),), False)),
        ("75-80 e", Parts(False, (Span(75, 80),), True)),
        ("0-5 30-35", Parts(False, (Span(0, 5), Span(30, 35)), False)),
        ("b 0-5 5-8 75-80 e", Parts(True, (Span(0, 8), Span(75, 80)), True)),
        ("  b   e ", Parts(True, (), True)),
    ],
)
def test_parts_are_read_from_words(text: str, parts: Parts) -> None:
    assert read_parts(text, 80) == parts
    assert read_parts(str(parts), 80) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name nothing"),
        ("b x 0-5", "'x' is no part"),
        ("0:5", "'0:5' is no part"),
        ("-1-5", "'-1-5' is no part"),
        ("0-5,8-9", "'0-5,8-9' is no part"),
        ("B", "'B' is no part"),
        ("\N{ARABIC-INDIC DIGIT ONE}-5", "is no part"),
        ("0-81", "'0-81' is out of range; the model has 80 layers"),
        ("5-5", "'5-5' is out of range"),
        ("7-5", "'7-5' is out of range"),
        ("5-9 0-3", "'0-3' begins before layer 9"),
        ("0-5 4-8", "'4-8' begins before layer 5"),
        ("0-5 b", "'b' comes once, before all others"),
        ("b b", "'b' comes once"),
        ("e 0-5", "'e' comes once, after all others"),
        ("e e", "'e' comes once"),
        ("f e", "'f' is the whole model and stands alone"),
        ("b f", "'f' is the whole model"),
    ],
)
def test_words_that_are_no_parts_are_named(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_parts(text, 80)


def test_the_files_of_parts_are_named_by_layer() -> None:
    names = Parts(True, (Span(0, 2), Span(7, 8)), True).file_names()
    assert names == ["begin", "mid.00000", "mid.00001", "mid.00007", "end"]


@pytest.mark.parametrize(
    ("text", "around", "only"),
    [
        ("b 0-2 6-8 e", "2-6", None),
        ("b e", None, None),
        ("b 0-2", "2-8e", "0-2"),
        ("b 6-8 e", "0-6", "6-8"),
        ("2-6", None, "2-6"),
        ("2-4 5-6", None, None),
        ("f", None, None),
    ],
)
def test_the_layers_that_a_folder_is_for(text: str, around: str | None, only: str | None) -> None:
    parts = read_parts(text, 8)
    spans = (parts.around(8), parts.only_span(8))
    assert tuple(str(span) if span else None for span in spans) == (around, only)


def run_cut(
    device: Path, worker: Path, cut: Cut = CUT, num_layers: int = 6, packs: bool = True
) -> torch.Tensor:
    """Logits after a prompt, head and tail of one folder and the middle of another."""
    ends, middle = Checkpoint(device), Checkpoint(worker)
    parts = [
        load_span(ends, cut.head(), part="head", packs=packs),
        load_span(middle, cut.middle, packs=packs),
        load_span(ends, cut.tail(num_layers), part="tail", packs=packs),
    ]
    head, inner, tail = (Segment(part.new_kv(), 0, PROMPT) for part in parts)
    rows = parts[1].run(parts[0].embed_and_run(make_ids(), [head]), [inner])
    return parts[2].logits(rows, tail)[-1]


def make_ids() -> torch.Tensor:
    return torch.randint(2, 99, (PROMPT + 8,), generator=torch.Generator().manual_seed(5))[:PROMPT]


def split(model: Path, target: Path, cut: Cut = CUT, num_layers: int = 6) -> tuple[Path, Path]:
    """The folders of a device and a worker, the one of safetensors and the other for exchange."""
    checkpoint = Checkpoint(model)
    write_parts(checkpoint, ends_of(cut, num_layers), target / "device")
    write_parts(checkpoint, middle_of(cut), target / "worker", "pth")
    return target / "device", target / "worker"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "opt-projected"])
def test_folders_of_parts_compute_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    model = save_random_model(CONFIGS[name], tmp_path / "model", max_shard_size="40KB")
    ids = torch.cat([make_ids(), make_ids()])[:20]
    want = run_whole(model, CONFIGS[name], ids)[0]
    fingerprint = Checkpoint(model).fingerprint()
    device, worker = split(model, tmp_path)
    shutil.rmtree(model)
    assert torch.equal(run_cut(device, worker), want)
    assert {Checkpoint(device).fingerprint(), Checkpoint(worker).fingerprint()} == {fingerprint}
    assert {Checkpoint(device).name, Checkpoint(worker).name} == {"model"}


@pytest.mark.long
@pytest.mark.parametrize("family", [f.family for f in read_page(PAGE.read_text()) if f.is_right])
def test_every_family_that_is_computed_right_is_taken_apart(family: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_small(family, model)
    num_layers = read_config(Checkpoint(model)).num_hidden_layers
    cut = Cut(1, num_layers - 1)
    device, worker = split(model, tmp_path, cut, num_layers)
    whole = run_cut(model, model, cut, num_layers, packs=False)
    assert torch.equal(run_cut(device, worker, cut, num_layers, packs=False), whole)
    fingerprints = {Checkpoint(path).fingerprint() for path in (model, device, worker)}
    assert len(fingerprints) == 1


def test_a_folder_of_parts_has_the_files_of_its_parts_only(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    for name in ("tokenizer.json", "merges.txt", "README.md", "code.py"):
        (model / name).write_text("{}")
    (model / "drafting").mkdir()
    (model / "drafting" / "ngrams.safetensors").touch()
    device, worker = split(model, tmp_path)
    common = {"config.json", MANIFEST}
    ends = {f"{name}.safetensors" for name in ("begin", "end", *map(name_layer, (0, 1, 4, 5)))}
    beside = {"generation_config.json", "tokenizer.json", "merges.txt", "drafting"}
    assert {path.name for path in device.iterdir()} == common | ends | beside
    assert {path.name for path in worker.iterdir()} == common | {"mid.00002.pth", "mid.00003.pth"}


def test_every_tensor_is_in_one_file_so_folders_can_be_put_together(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama-tied"], tmp_path / "model")
    write_parts(Checkpoint(model), full(6), tmp_path / "whole")
    device, _ = split(model, tmp_path)
    stored = [n for file in (tmp_path / "whole").glob("*.safetensors") for n in load_file(file)]
    assert sorted(stored) == Checkpoint(model).tensor_names
    for file in device.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_the_end_of_a_tied_model_comes_with_the_embeddings(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama-tied"], tmp_path / "model")
    written = write_parts(Checkpoint(model), read_parts("4-6 e", 6), tmp_path / "end")
    assert str(written.parts) == "b 4-6 e"
    load_span(Checkpoint(tmp_path / "end"), Span(4, 6), part="tail")


def test_what_no_part_needs_is_kept_beside_a_whole_model(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    file = model / "model.safetensors"
    save_file(load_file(file) | {"vision.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    write_parts(Checkpoint(model), full(6), tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "rest.safetensors").keys() == {"vision.weight"}
    device, _ = split(model, tmp_path)
    assert not (device / "rest.safetensors").exists()
    want = Checkpoint(model).fingerprint()
    assert Checkpoint(device).fingerprint() == Checkpoint(tmp_path / "whole").fingerprint() == want


def test_layers_that_are_not_in_a_folder_are_named_with_those_that_are(tmp_path: Path) -> None:
    device, worker = split(save_random_model(CONFIGS["llama"], tmp_path / "model"), tmp_path)
    with pytest.raises(CheckpointError, match=r"b 0-2 4-6 e of model, and not mid\.00002"):
        load_span(Checkpoint(device), Span(2, 4))
    with pytest.raises(CheckpointError, match=r"holds 2-4 of model, and not begin\.saf"):
        load_span(Checkpoint(worker), Span(0, 2), part="head")


def test_a_file_of_other_weights_is_found_by_its_digest(tmp_path: Path) -> None:
    device, _ = split(save_random_model(CONFIGS["llama"], tmp_path / "model"), tmp_path)
    file = device / "mid.00001.safetensors"
    other = {name: tensor * 1.001 for name, tensor in load_file(file).items()}
    save_file(other, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mid\.00001.*the file is of other weights"):
        Checkpoint(device).fingerprint()


def test_a_manifest_of_other_weights_has_another_fingerprint(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    device, _ = split(model, tmp_path)
    manifest = json.loads((device / MANIFEST).read_text())
    manifest["tensors"]["model.layers.3.mlp.up_proj.weight"]["digest"] = "0" * 16
    (device / MANIFEST).write_text(json.dumps(manifest))
    assert Checkpoint(device).fingerprint() != Checkpoint(model).fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "midspan-parts/9"}, "of kind 'midspan-parts/9'; expected 'midspan-parts/1'"),
        ({"layers": 0}, "cannot be used: .*layers"),
        ({"tensors": {"a": {"file": "begin"}}}, "cannot be used: .*dtype"),
        (
            {"tensors": {"a": {"file": "../x", "dtype": "F32", "shape": [1], "digest": ""}}},
            r"names a file '\.\./x'",
        ),
    ],
)
def test_a_broken_manifest_is_refused(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    device, _ = split(save_random_model(CONFIGS["llama"], tmp_path / "model"), tmp_path)
    manifest = json.loads((device / MANIFEST).read_text())
    (device / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(device)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_any_part_tells_what_the_whole_model_needs(name: str, tmp_path: Path) -> None:
    model = save_random_model(CONFIGS[name], tmp_path / "model")
    device, worker = split(model, tmp_path)
    want = measure_needs(Checkpoint(model), torch.float32)
    for part in (device, worker):
        assert measure_needs(Checkpoint(part), torch.float32) == want


def test_a_device_joins_a_pool_that_has_more_than_it_lacks(
    tmp_path: Path, demo_directory: Path
) -> None:
    checkpoint = Checkpoint(demo_directory)
    write_parts(checkpoint, ends_of(Cut(3, 5), 8), tmp_path / "device")
    service = {"model": checkpoint.fingerprint(), "part": "2-6"}
    report = {"workers": [{"state": "ready", "services": [service]}]}
    assert load_ends(tmp_path / "device", report=report).cut == Cut(2, 6)
    service["part"] = "4-8"
    assert load_ends(tmp_path / "device", report=report).cut == Cut(3, 5)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(SettingsError, match="model is not empty"):
        write_parts(Checkpoint(model), full(6), model)


def test_device_and_worker_start_from_folders_of_their_own(
    tmp_path: Path, demo_directory: Path, whole_model: torch.nn.Module
) -> None:
    prompt = "Once upon a time, there was a brave fox."
    holds = {"device": "b 0-3 5-8 e", "worker": "3-5"}
    for side, parts in holds.items():
        done = run_midspan(
            "model", "part", "stories-llama", "--span", "3-5", "--side", side,
            "-o", str(tmp_path / side),
        )  # fmt: skip
        assert f"holds {parts} of stories-llama" in done.stdout, done.stderr
    assert load_ends(tmp_path / "device").cut == Cut(3, 5)
    with LocalPool(PoolSettings(workers=1, model=str(tmp_path / "worker"))) as pool:
        options = ["--broker", pool.edge_endpoint, "--json", "-n", "24", "-t", "0"]
        options += ["--codec", "fp32", "--no-serve"]
        asked = run_midspan("ask", prompt, "--model", str(tmp_path / "device"), *options)
    assert asked.returncode == 0, asked.stderr
    tokenizer = TextTokenizer(demo_directory)
    want = reference_tokens(whole_model, tokenizer, [prompt], 24)[0]
    assert json.loads(asked.stdout)["token_ids"] == want


def test_a_part_is_taken_from_a_folder_that_has_it(tmp_path: Path) -> None:
    device, _ = split(save_random_model(CONFIGS["llama"], tmp_path / "model"), tmp_path)
    written = write_parts(Checkpoint(device), ends_of(Cut(1, 5), 6), tmp_path / "less")
    assert str(written.parts) == "b 0-1 5-6 e"
    line = error_line("model", "part", str(device), "--span", "3-4", "-o", str(tmp_path / "more"))
    assert "holds b 0-2 4-6 e of model, and not mid.00002.safetensors" in line


def test_what_could_not_be_written_whole_leaves_an_empty_folder(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    (model / "calibration").mkdir()
    (model / "calibration" / "2-4").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"calibration/2-4 cannot be written: .*No such file"):
        write_parts(Checkpoint(model), full(6), tmp_path / "whole")
    assert list((tmp_path / "whole").iterdir()) == []


STORED = {
    "safetensors": {},
    "shards": {"max_shard_size": "40KB"},
    "bin": {},
    "bin-shards": {},
    "pth": {},
}


def store_as(form: str, model: Path) -> Path:
    """Rewrite a model's directory, as older libraries stored it."""
    file = model / "model.safetensors"
    if form in ("bin", "pth"):
        torch.save(load_file(file), model / f"pytorch_model.{form}")
        file.unlink()
    if form == "bin-shards":
        tensors, weight_map = load_file(file), {}
        for index, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
            shard = f"pytorch_model-{index}.bin"
            torch.save({name: tensors[name] for name in names}, model / shard)
            weight_map |= dict.fromkeys(names, shard)
        index_file = model / "pytorch_model.bin.index.json"
        index_file.write_text(json.dumps({"weight_map": weight_map}))
        file.unlink()
    return model


@pytest.mark.parametrize("format_", ["parts", "pth", "safetensors"])
@pytest.mark.parametrize("form", STORED)
def test_what_is_exported_is_the_model_in_whatever_way_it_was_stored(
    form: str, format_: str, tmp_path: Path
) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model", **STORED[form])
    checkpoint = Checkpoint(store_as(form, model))
    export(checkpoint, full(6), format_, tmp_path / "out")
    exported = Checkpoint(tmp_path / "out")
    assert exported.fingerprint() == checkpoint.fingerprint()
    for name in checkpoint.tensor_names:
        assert torch.equal(exported.read_stored(name), checkpoint.read_stored(name))


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_a_model_comes_back_from_its_parts_as_transformers_reads_it(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.formats.export, "MAX_SHARD_BYTES", limit)
    model = save_random_model(CONFIGS["llama-tied"], tmp_path / "model")
    ids = torch.cat([make_ids(), make_ids()])[:20]
    want = run_whole(model, CONFIGS["llama-tied"], ids)
    export(Checkpoint(model), full(6), "pth", tmp_path / "parts")
    shutil.rmtree(model)
    export(Checkpoint(tmp_path / "parts"), full(6), "safetensors", tmp_path / "back")
    got = run_whole(tmp_path / "back", CONFIGS["llama-tied"], ids)
    files = list((tmp_path / "back").glob("model*.safetensors"))
    assert (len(files) > 1) is (limit == 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_directory_of_some_parts_only_is_not_written(tmp_path: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(SettingsError, match="safetensors is the whole model; 0-3 is not"):
        export(Checkpoint(model), read_parts("0-3", 6), "safetensors", tmp_path / "x")
    device, _ = split(model, tmp_path)
    line = error_line(
        "model", "export", str(device), "--format", "safetensors", "-o", str(tmp_path / "y")
    )
    assert "holds b 0-2 4-6 e of model, and not mid.0000" in line


def test_the_command_exports_the_parts_that_words_name(tmp_path: Path) -> None:
    done = run_midspan(
        "model", "export", "stories-llama", "--parts", "0-2 4-5", "--format", "pth",
        "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert "holds 0-2 4-5 of stories-llama" in done.stdout, done.stderr
    files = {path.name for path in (tmp_path / "out").glob("*.pth")}
    assert files == {"mid.00000.pth", "mid.00001.pth", "mid.00004.pth"}
    line = error_line("model", "export", "stories-llama", "--parts", "0-9", "-o", str(tmp_path))
    assert "'0-9' is out of range; the model has 8 layers" in line


def test_others_may_read_weights_as_they_may_other_files(
    demo_directory: Path, tmp_path: Path
) -> None:
    write_parts(Checkpoint(demo_directory), read_parts("2-3", 8), tmp_path / "part")
    files = [tmp_path / "part" / name for name in ("mid.00002.safetensors", "parts.json")]
    assert len({path.stat().st_mode for path in files}) == 1
