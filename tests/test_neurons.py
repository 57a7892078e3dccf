"""Models with some of their neurons compute what the whole one does with the others at zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import save_random_model
from test_text_lora import low_rank, pair, save_lora
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)

from common.adapters.peft import adapt_text_model
from common.errors import CheckpointError, SettingsError
from common.neurons.choice import choose_neurons
from common.neurons.core import count_votes, pick_core
from common.neurons.lists import NeuronLists, write_lists
from common.neurons.settings import NeuronSettings
from common.neurons.sparse_mlp import LayerNeurons, Way
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.kv_rows import KvRows
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span
from common.weights.safetensors_places import Place, PlaceReader

WIDTH, LAYERS = 40, 4
WHOLE = Span(0, LAYERS)
SIZE = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": None,
}  # fmt: skip
GATED = SIZE | {"intermediate_size": WIDTH, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "llama-biases": LlamaConfig(**GATED, mlp_bias=True),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "opt": OPTConfig(**SIZE, ffn_dim=WIDTH, word_embed_proj_dim=16),
    "neox": GPTNeoXConfig(**SIZE, intermediate_size=WIDTH),
    "falcon": FalconConfig(**SIZE, ffn_hidden_size=WIDTH),  # one session at a time
}
OUT = {"opt": "fc2", "neox": "dense_4h_to_h", "falcon": "dense_4h_to_h"}
COVERED = (1, 2)  # of the settings' 0:3
PROMPT, LENGTH = 9, 14
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # sums of other lengths and orders, in float32


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the models above, drawn."""
    directory = tmp_path_factory.mktemp("lists")
    paths = []
    for seed in (1, 2):
        generator = np.random.default_rng(seed)
        layers = [generator.permutation(WIDTH) for _ in range(LAYERS)]
        paths.append(directory / f"{seed}.json")
        write_lists(paths[-1], NeuronLists("lists", layers))
    return paths


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved models, by name."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = save_random_model(CONFIGS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return find


@pytest.fixture(scope="module")
def settings(lists: list[Path]) -> NeuronSettings:
    return NeuronSettings(tuple(lists), start=0, end=3)


def load(directory: Path, settings: NeuronSettings | None, span: Span = WHOLE) -> SpanModel:
    checkpoint = Checkpoint(directory)
    checkpoint.choose(settings)
    return load_span(checkpoint, span)


def draw_rows(count: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def run(model: SpanModel, rows: Tensor, prompt: int = PROMPT) -> Tensor:
    """A prompt, then one row after another."""
    kv = model.new_kv()
    outputs = [model.run(rows[:prompt], [Segment(kv, 0, prompt, ((prompt, True),))])]
    for at in range(prompt, len(rows)):
        outputs.append(model.run(rows[at : at + 1], [Segment(kv, at, 1)]))
    return torch.cat(outputs)


# --- an independent reference: the whole model, whose neurons are set to zero from outside


def votes_by_hand(values: Tensor, share: float) -> list[int]:
    votes = [0] * values.shape[-1]
    for row in values.tolist():
        positive = sum(value > 0 for value in row)
        order = sorted(range(len(row)), key=lambda index: -row[index])
        for index in order[: int(share * positive)]:
            votes[index] += 1
    return votes


def loaded_by_hand(settings: NeuronSettings, layer: int) -> list[int]:
    """In the order of their rank."""
    first, last = (choose_neurons(settings).lists[at].layers[layer].tolist() for at in (0, -1))
    chosen = first[: round(settings.base * WIDTH)]
    for neuron in last:
        if len(chosen) < round(settings.loaded * WIDTH) and neuron not in chosen:
            chosen.append(neuron)
    return chosen


def computed_by_hand(settings: NeuronSettings, layer: int, values: Tensor) -> list[int]:
    """The neurons of an answer, by those of its prompt (T, N)."""
    loaded = loaded_by_hand(settings, layer)
    wanted = round(settings.sparsity * WIDTH)
    votes = votes_by_hand(values, settings.token_sparsity)
    core = sorted(loaded, key=lambda neuron: (-votes[neuron], loaded.index(neuron)))
    match settings.method:
        case "dense":
            return loaded
        case "coreinfer":
            return core[:wanted]
        case _:
            base = loaded[: min(wanted, round(settings.base * WIDTH))]
            others = [neuron for neuron in core if neuron not in base]
            return base + others[: wanted - len(base)]


@contextmanager
def neurons_by_hand(model: Any, name: str, settings: NeuronSettings, prompt: int) -> Iterator[None]:
    """What goes into the last matrix of each covered MLP is zero where it is left out."""

    def limit(layer: int, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = given[0].clone()
        flat = values.view(-1, WIDTH)
        loaded = loaded_by_hand(settings, layer)
        flat[:, [n for n in range(WIDTH) if n not in loaded]] = 0
        computed = computed_by_hand(settings, layer, flat[:prompt])
        flat[prompt:, [n for n in range(WIDTH) if n not in computed]] = 0
        return (values,)

    modules = [m for path, m in model.named_modules() if path.endswith(name)]
    hooks = [
        modules[layer].register_forward_pre_hook(lambda _, given, layer=layer: limit(layer, given))
        for layer in COVERED
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def logits_by_hand(
    directory: Path, name: str, settings: NeuronSettings, ids: Tensor, prompt: int = PROMPT
) -> Tensor:
    """Logits after each token of one pass over a text."""
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with neurons_by_hand(whole, OUT.get(name, "down_proj"), settings, prompt):
        logits: Tensor = whole(input_ids=ids[None], use_cache=False).logits[0]
    return logits


class Ends:
    """A model in three parts, each with some of its neurons."""

    def __init__(self, directory: Path, settings: NeuronSettings) -> None:
        checkpoint = Checkpoint(directory)
        checkpoint.choose(settings)
        self.head = load_span(checkpoint, Span(0, 1), part="head")
        self.middle = load_span(checkpoint, Span(1, 2))
        self.tail = load_span(checkpoint, Span(2, 4), part="tail")

    def run(self, ids: Tensor, pieces: Sequence[int]) -> Tensor:
        """Logits after each token: pieces of the prompt, then of the answer."""
        caches = [part.new_kv() for part in (self.head, self.middle, self.tail)]
        at, logits = 0, []
        for rows in pieces:
            marks = [(min(rows, max(0, PROMPT - at)), True), (max(0, at + rows - PROMPT), False)]
            marked = tuple((count, mark) for count, mark in marks if count)
            segments = [Segment(kv, at, rows, marked) for kv in caches]
            states = self.head.embed_and_run(ids[at : at + rows], segments[:1])
            states = self.middle.run(states, segments[1:2])
            logits.append(self.tail.logits(states, segments[2], last=rows))
            at += rows
        return torch.cat(logits)


def draw_ids() -> Tensor:
    return torch.randint(1, 48, (LENGTH,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("method", ["dense", "partinfer", "coreinfer"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_left_out_neurons_are_as_zeros_in_the_whole_model(
    name: str, method: str, directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    chosen = replace(settings, method=method)
    wanted = logits_by_hand(directories(name), name, chosen, draw_ids())
    ends = Ends(directories(name), chosen)
    got = ends.run(draw_ids(), [PROMPT] + [1] * (LENGTH - PROMPT))
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("pieces", [[LENGTH], [4, 4, 1, 2, 3], [3, 11]], ids=str)
def test_prompts_in_pieces_and_replays_have_the_same_core(
    pieces: list[int], directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    ends = Ends(directories("llama"), settings)
    wanted = ends.run(draw_ids(), [PROMPT] + [1] * (LENGTH - PROMPT))
    torch.testing.assert_close(ends.run(draw_ids(), pieces), wanted, **CLOSE)


def test_two_files_are_the_base_and_the_others(settings: NeuronSettings) -> None:
    choice = choose_neurons(settings).of_layer(1, WIDTH)
    first, last = (each.layers[1].tolist() for each in choose_neurons(settings).lists)
    assert set(choice.always.tolist()) == set(first[:12])
    others = [neuron for neuron in last if neuron not in first[:12]][:16]
    assert choice.others.tolist() == sorted(others)
    assert choice.core == 4
    assert choice.ranks[12:].tolist() == [12 + others.index(n) for n in choice.others]


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (12, 16, 4)),
        ({"method": "coreinfer"}, (0, 28, 16)),
        ({"method": "dense"}, (28, 0, 0)),
        ({"method": "random"}, (16, 12, 0)),
        ({"sparsity": 0.2}, (8, 20, 0)),  # less than the base
        ({"sparsity": 0.7}, (28, 0, 0)),
        ({"loaded": 1.0, "base": 0.5, "sparsity": 0.6}, (20, 20, 4)),
    ],
    ids=str,
)
def test_how_many_neurons_are_computed_always_sometimes_and_by_a_core(
    settings: NeuronSettings, changes: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    choice = choose_neurons(replace(settings, **changes)).of_layer(2, WIDTH)
    assert (len(choice.always), len(choice.others), choice.core) == sizes


def test_random_neurons_are_the_same_each_time(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    chosen = replace(settings, method="random")
    one, other = (load(directories("llama"), chosen) for _ in range(2))
    assert not one.keeps_states
    assert torch.equal(run(one, draw_rows()), run(other, draw_rows()))
    own = run(load(directories("llama"), settings), draw_rows())
    assert not torch.allclose(run(one, draw_rows())[PROMPT:], own[PROMPT:])


@pytest.mark.parametrize("method", ["partinfer", "dense", "random"])
def test_all_neurons_computed_are_the_dense_model_bit_for_bit(
    directories: Callable[[str], Path], settings: NeuronSettings, method: str
) -> None:
    chosen = replace(settings, loaded=1.0, sparsity=1.0, method=method)
    directory = directories("llama")
    plain = load(directory, None)
    assert torch.equal(run(load(directory, chosen), draw_rows()), run(plain, draw_rows()))
    checkpoint = Checkpoint(directory)
    checkpoint.choose(chosen)
    assert checkpoint.fingerprint() == Checkpoint(directory).fingerprint()


# --- batches


def ways(model: SpanModel, monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """What the layers of a model decide from now on."""
    seen: list[Way] = []
    decide = LayerNeurons.way

    def note(neurons: LayerNeurons) -> Way:
        seen.append(decide(neurons))
        return seen[-1]

    monkeypatch.setattr(LayerNeurons, "way", note)
    return seen


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize(("sessions", "way"), [(3, Way.OWN), (8, Way.MASKED)])
def test_a_batch_is_each_session_alone(
    directories: Callable[[str], Path],
    settings: NeuronSettings,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    sessions: int,
    way: Way,
) -> None:
    model = load(directories(name), settings)
    texts = [draw_rows(LENGTH, seed) for seed in range(sessions)]
    lengths = [PROMPT + number % 4 for number in range(sessions)]
    alone = [run(model, rows, count) for rows, count in zip(texts, lengths, strict=True)]
    caches = [model.new_kv() for _ in texts]
    prompts = [rows[:count] for rows, count in zip(texts, lengths, strict=True)]
    segments = [
        Segment(kv, 0, count, ((count, True),)) for kv, count in zip(caches, lengths, strict=True)
    ]
    outputs = [[each] for each in torch.split(model.run(torch.cat(prompts), segments), lengths)]
    seen = ways(model, monkeypatch)
    for _ in range(LENGTH - max(lengths)):
        segments = [Segment(kv, kv.length, 1) for kv in caches]
        rows = torch.stack([rows[kv.length] for rows, kv in zip(texts, caches, strict=True)])
        for each, row in zip(outputs, torch.split(model.run(rows, segments), 1), strict=True):
            each.append(row)
    assert set(seen) == {way}
    for each, wanted in zip(outputs, alone, strict=True):
        got = torch.cat(each)
        torch.testing.assert_close(got, wanted[: len(got)], **CLOSE)


@pytest.mark.parametrize("method", ["partinfer", "random", "dense"])
def test_a_prompt_beside_answers_changes_nobodys_neurons(
    directories: Callable[[str], Path], settings: NeuronSettings, method: str
) -> None:
    model = load(directories("llama"), replace(settings, method=method))
    texts = [draw_rows(LENGTH, seed) for seed in range(2)]
    alone = [run(model, rows) for rows in texts]
    first, second = model.new_kv(), model.new_kv()
    model.run(texts[0][:PROMPT], [Segment(first, 0, PROMPT, ((PROMPT, True),))])
    rows = torch.cat([texts[0][PROMPT : PROMPT + 1], texts[1][:PROMPT]])
    segments = [Segment(first, PROMPT, 1), Segment(second, 0, PROMPT, ((PROMPT, True),))]
    both = model.run(rows, segments)
    wanted = torch.cat([alone[0][PROMPT : PROMPT + 1], alone[1][:PROMPT]])
    torch.testing.assert_close(both, wanted, **CLOSE)
    last = model.run(texts[1][PROMPT : PROMPT + 1], [Segment(second, PROMPT, 1)])
    torch.testing.assert_close(last, alone[1][PROMPT : PROMPT + 1], **CLOSE)


def continue_at(model: SpanModel, kv: KvRows, rows: Tensor) -> Tensor:
    return model.run(rows, [Segment(kv, kv.length, len(rows))])


def test_votes_outlive_a_cut_back_and_come_back_from_their_bytes(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    model, rows = load(directories("llama"), settings), draw_rows()
    wanted = run(model, rows)[PROMPT:]
    kv = model.new_kv()
    model.run(rows[:PROMPT], [Segment(kv, 0, PROMPT, ((PROMPT, True),))])
    continue_at(model, kv, rows[PROMPT:])
    kv.cut_back(PROMPT)
    assert kv.length == PROMPT
    torch.testing.assert_close(continue_at(model, kv, rows[PROMPT:]), wanted, **CLOSE)
    kv.cut_back(PROMPT)
    assert kv.states is not None
    state = kv.states.unpack(kv.states.pack(kv.states.current))
    assert state is not None
    kv.cut_back(PROMPT - 1)  # to nothing
    assert kv.length == 0
    kv.length = PROMPT  # as rows of a store
    kv.states.adopt(state)
    torch.testing.assert_close(continue_at(model, kv, rows[PROMPT:]), wanted, **CLOSE)


def test_another_prompt_after_a_cut_back_has_its_own_core(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    model = load(directories("llama"), settings)
    one, other = draw_rows(LENGTH, 1), draw_rows(LENGTH, 2)
    kv = model.new_kv()
    for rows in (one, other):
        kv.cut_back(0)
        model.run(rows[:PROMPT], [Segment(kv, 0, PROMPT, ((PROMPT, True),))])
        got = continue_at(model, kv, rows[PROMPT:])
    torch.testing.assert_close(got, run(model, other)[PROMPT:], **CLOSE)


def test_the_prompt_of_a_next_turn_votes_as_well(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    model, rows = load(directories("llama"), settings), draw_rows(24)
    turns = ((9, True), (3, False), (8, True), (4, False))
    ends = []
    for forgets in (False, True):
        kv = model.new_kv()
        for count, of_prompt in turns:
            part = rows[kv.length : kv.length + count]
            assert kv.states is not None
            if forgets:
                kv.states.cores.clear()  # so that they are picked anew
            end = model.run(part, [Segment(kv, kv.length, count, ((count, of_prompt),))])
        ends.append(end)
    torch.testing.assert_close(*ends, **CLOSE)
    whole = model.run(rows, [Segment(model.new_kv(), 0, len(rows), turns)])
    torch.testing.assert_close(whole[20:], ends[1], **CLOSE)


def test_what_cores_take_counts_as_the_sessions(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    model, rows = load(directories("llama"), settings), draw_rows()
    kv = model.new_kv()
    model.run(rows[:PROMPT], [Segment(kv, 0, PROMPT, ((PROMPT, True),))])
    before = kv.capacity_bytes
    continue_at(model, kv, rows[PROMPT : PROMPT + 1])
    gathered = 2 * 3 * 4 * 16 * 4  # layers, matrices, neurons, hidden, bytes
    assert kv.capacity_bytes - before >= gathered
    kv.release()
    assert kv.capacity_bytes == 0


# --- the core


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_votes_are_those_of_counting_by_hand(share: float) -> None:
    values = torch.randn(30, 57, generator=torch.Generator().manual_seed(1))
    values[3] = -1.0  # nothing positive
    assert count_votes(values, share).tolist() == votes_by_hand(values, share)


def test_of_equal_votes_the_better_rank_counts() -> None:
    votes, ranks = torch.tensor([1, 0, 1, 2, 1]), torch.tensor([4, 0, 3, 2, 1])
    assert pick_core(votes, ranks, 3).tolist() == [2, 3, 4]


# --- loading


def test_only_what_is_loaded_is_read_and_kept(
    directories: Callable[[str], Path], settings: NeuronSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_into = PlaceReader.read_into

    def note(reader: PlaceReader, memory: Tensor, place: Place) -> None:
        read.append(place.size)
        read_into(reader, memory, place)

    monkeypatch.setattr(PlaceReader, "read_into", note)
    counts = {}
    for chosen in (None, settings):
        model = load(directories("llama"), chosen, Span(1, 3))
        counts[chosen] = sum(read), sum(model.bytes_read.values())
        read.clear()
    matrix = WIDTH * 16 * 4
    left_out = round(0.3 * WIDTH) * 16 * 4
    assert counts[None][1] - counts[settings][1] == 2 * 3 * left_out
    assert counts[None][0] - counts[settings][0] == 2 * 2 * left_out  # columns lie in all rows
    assert model.neurons is not None
    assert model.neurons.bytes_left_out == 2 * 3 * left_out
    assert model.bytes_read["model.layers.1.mlp.down_proj.weight"] == matrix - left_out


@pytest.mark.parametrize("change", ["bfloat16", "bin", "lora"])
def test_weights_that_are_not_stored_as_they_are_used(
    directories: Callable[[str], Path], settings: NeuronSettings, tmp_path: Path, change: str
) -> None:
    directory, dtype = directories("llama"), torch.float32
    loras = []
    if change == "lora":
        down, up = low_rank(WIDTH, 16)
        loras.append(save_lora(tmp_path, pair("model.layers.1.mlp.up_proj", (down, up))))
    elif change == "bin":
        tensors = Checkpoint(directory).read(Checkpoint(directory).tensor_names, torch.float32)
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((directory / "config.json").read_text())
        directory = tmp_path
    else:
        dtype = torch.bfloat16
    checkpoints = [Checkpoint(directory) for _ in range(2)]
    for checkpoint in checkpoints:
        adapt_text_model(checkpoint, loras)
    checkpoints[1].choose(replace(settings, loaded=0.99, base=0.01, sparsity=0.99, method="dense"))
    plain, chosen = (load_span(checkpoint, Span(1, 2), dtype) for checkpoint in checkpoints)
    neurons = choose_neurons(replace(settings, loaded=0.99, base=0.01)).of_layer(1, WIDTH)
    assert len(neurons.loaded) == WIDTH  # all, in another place: round(39.6)
    rows = draw_rows().to(dtype)
    close = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(run(chosen, rows), run(plain, rows), **close)


def test_a_choice_is_part_of_what_a_model_is(
    directories: Callable[[str], Path], settings: NeuronSettings, lists: list[Path]
) -> None:
    others = [
        settings,
        replace(settings, sparsity=0.5),
        replace(settings, token_sparsity=0.3),
        replace(settings, method="coreinfer"),
        replace(settings, end=2),
        replace(settings, files=(lists[0],)),
        replace(settings, files=(lists[1], lists[0])),
        None,
    ]
    prints = []
    for each in [*others, settings]:
        checkpoint = Checkpoint(directories("llama"))
        checkpoint.choose(each)
        prints.append(checkpoint.fingerprint())
    assert prints[-1] == prints[0]
    assert len(set(prints)) == len(others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loaded": 0.0}, "--loaded is 0.0; expected more than 0, 1 at most"),
        ({"sparsity": 0.8}, "--sparsity 0.8 is more than --loaded 0.7"),
        ({"base": 0.8}, "--base 0.8 is more than --loaded 0.7"),
        ({"method": "best"}, "--method is 'best'; expected partinfer, coreinfer, dense, random"),
        ({"start": 3, "end": 4}, "--neuron-layers is 3:4; expected START:END with a layer"),
        ({"files": ()}, "names 0 files; expected one, or two"),
        ({"files": (Path("/nothing"),)}, "/nothing cannot be read as lists of neurons"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_named(
    directories: Callable[[str], Path], settings: NeuronSettings, changes: Any, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        load(directories("llama"), replace(settings, **changes))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([range(WIDTH)] * 3, "has lists for 3 layers; the model has 4"),
        ([range(WIDTH + 1)] * 4, f"layer 1 names neuron {WIDTH}"),
        ([range(20)] * 4, "layer 1 lists too few neurons; 20 of the 28"),
    ],
    ids=["layers", "neurons", "few"],
)
def test_lists_that_do_not_fit_are_named(
    directories: Callable[[str], Path],
    settings: NeuronSettings,
    tmp_path: Path,
    layers: list[range],
    words: str,
) -> None:
    path = tmp_path / "l.json"
    write_lists(path, NeuronLists("l", [np.array(each) for each in layers]))
    with pytest.raises(SettingsError, match=words):
        load(directories("llama"), replace(settings, files=(path,)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MixtralConfig(**GATED, num_local_experts=2), "layer 1 has experts"),
        (Phi3Config(**GATED, pad_token_id=0), "layer 1 has 0 MLPs of linear layers"),
    ],
    ids=["mixtral", "phi3"],
)
def test_mlps_that_are_not_known_are_refused(
    settings: NeuronSettings, tmp_path: Path, config: PretrainedConfig, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(save_random_model(config, tmp_path), settings)


def test_layers_that_take_turns_have_all_their_neurons(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    checkpoint = Checkpoint(directories("llama"))
    checkpoint.choose(settings)
    with pytest.raises(SettingsError, match="--stream-layers and --neurons cannot be combined"):
        load_span(checkpoint, Span(0, 4), resident=2)


def test_no_answer_waits_for_a_prompt(
    directories: Callable[[str], Path], settings: NeuronSettings
) -> None:
    """A worker's own test step has none: its core is of those that rank first."""
    model = load(directories("llama"), settings)
    kv = model.new_kv()
    got = continue_at(model, kv, draw_rows(3))
    assert torch.isfinite(got).all()
