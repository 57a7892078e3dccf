"""Lists of active neurons: measured, written, read, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from random_models import save_random_model
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

from common.errors import CheckpointError, SettingsError
from common.neurons.lists import NeuronLists, read_lists, write_lists
from deploy.cli import midspan
from edge_agent.text.tasks import TASKS
from evaluation.neuron_profile import Activity, draw_lists, load_whole, profile_texts
from evaluation.neurons import SHARES, describe, overlap

SIZE = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, intermediate_size=24, num_key_value_heads=2),
    "opt": OPTConfig(**SIZE, ffn_dim=24, word_embed_proj_dim=16),
    "neox": GPTNeoXConfig(**SIZE, intermediate_size=24),
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(midspan, ["neurons", *arguments])


@torch.inference_mode()
def expected_activity(
    model: torch.nn.Module, name: str, texts: list[list[int]]
) -> list[np.ndarray]:
    """By hand: gather what goes into the last matrix of one pass over each whole text."""
    caught: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith(name):
            module.register_forward_pre_hook(
                lambda _, given, path=path: caught.update({path: given[0]})
            )
    means: dict[str, list[torch.Tensor]] = {}
    for ids in texts:
        model(input_ids=torch.tensor([ids]))
        for path, given in caught.items():
            means.setdefault(path, []).append(given.flatten(0, -2).abs().mean(0))
    return [torch.stack(each).mean(0).numpy() for _, each in sorted(means.items())]


@pytest.mark.parametrize(
    ("family", "out"), [("llama", "down_proj"), ("opt", "fc2"), ("neox", "dense_4h_to_h")]
)
def test_the_most_active_neurons_over_prompt_and_answer_come_first(
    family: str, out: str, tmp_path: Path
) -> None:
    directory = save_random_model(CONFIGS[family], tmp_path)
    model, layers = load_whole(directory)
    activity = Activity(layers)
    prompts = [[1, 2, 3, 4, 5], [7, 8]]
    profile_texts(model, activity, prompts, 4)
    lists = activity.lists("lists", "about")
    texts = [model.generate(torch.tensor([ids]), max_new_tokens=4)[0].tolist() for ids in prompts]
    wanted = expected_activity(model, out, [ids[:-1] for ids in texts])  # the last one is not run
    for ids, mass, means in zip(lists.layers, lists.mass, wanted, strict=True):
        np.testing.assert_allclose(mass, means[ids], rtol=1e-4)  # single rows add otherwise
        assert list(mass) == sorted(mass, reverse=True)


def test_layers_with_experts_are_refused_by_their_number(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZE, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)
    _, layers = load_whole(save_random_model(config, tmp_path))
    with pytest.raises(CheckpointError, match="layer 0 has experts"):
        Activity(layers)


def test_lists_come_back_from_their_file(tmp_path: Path) -> None:
    lists = NeuronLists("a", [np.array([2, 0, 1]), np.array([1, 2, 0])], [[3.0, 2, 1]] * 2, "what")
    write_lists(tmp_path / "a", lists)
    back = read_lists(tmp_path / "a")
    assert [ids.tolist() for ids in back.layers] == [[2, 0, 1], [1, 2, 0]]
    assert (back.mass, back.about, back.digest()) == (lists.mass, "what", lists.digest())
    other = NeuronLists("a", [np.array([2, 0, 1]), np.array([1, 0, 2])])
    assert other.digest() != lists.digest()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as lists of neurons"),
        ('{"neuron": [[1]]}', "unknown field `neuron`"),
        ('{"neurons": [[1, -1]]}', "Expected `int` >= 0"),
        ('{"neurons": [[1, 2], [3, 1, 3]]}', "layer 1 names neuron 3 twice"),
        ('{"neurons": [[1, 2]], "mass": [[1.0]]}', "a mass for other neurons than it lists"),
        ('{"neurons": []}', "cannot be read as lists"),
    ],
    ids=range(6),
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "lists.json").write_text(text)
    with pytest.raises(SettingsError, match=words.replace("[", r"\[")):
        read_lists(tmp_path / "lists.json")


def test_lists_of_another_model_are_refused() -> None:
    lists = NeuronLists("a.json", [np.array([2, 30, 1])])
    with pytest.raises(SettingsError, match="layer 0 names neuron 30; the model's has 0 to 23"):
        lists.of_layer(0, 24)
    with pytest.raises(SettingsError, match=r"a\.json has lists for 1 layers; the model has more"):
        lists.of_layer(1, 24)


def test_random_lists_have_each_neuron_once_and_share_what_chance_gives(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZE | {"num_hidden_layers": 1}, intermediate_size=2000)
    _, layers = load_whole(save_random_model(config, tmp_path))
    one, same, other = (draw_lists(layers, seed, "r") for seed in (1, 1, 2))
    assert sorted(one.layers[0].tolist()) == list(range(2000))
    assert one.digest() == same.digest() != other.digest()
    shared = overlap(one.layers[0], other.layers[0], 0.5)
    assert shared is not None
    assert abs(shared - 0.5) < 0.06  # five standard deviations of drawing 1000 of 2000


def test_shares_are_of_the_first_neurons() -> None:
    one = NeuronLists("a", [np.arange(10)], [[4.0, 2, 1, 1, 1, 1, 0, 0, 0, 0]])
    two = NeuronLists("b", [np.array([0, 5, 6, 1, 2, 3, 4, 7, 8, 9])])
    figures = describe([one, two])
    assert figures["mass of a"] == [[0.4, 0.7, 0.9, 1.0]]
    assert figures["a in b"] == [[1.0, 1 / 3, 3 / 5, 1.0]]
    assert len(SHARES) == 4


def test_commands_measure_compare_and_draw(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("qa.json", "random.json")]
    measured = run("profile", "stories-llama", "--task", "qa", "-n", "2", "-o", files[0],
                   "--threads", "1")  # fmt: skip
    assert measured.output.splitlines()[-1] == f"{files[0]}: 8 layers of 352 neurons"
    assert run("profile", "stories-llama", "--random", "-o", files[1]).exit_code == 0
    shown = json.loads(run("show", *files, "--json").output)
    assert set(shown) == {"mass of qa.json", "qa.json in random.json"}
    mass = np.array(shown["mass of qa.json"])
    assert mass.shape == (8, len(SHARES))
    assert (mass > np.array(SHARES)).all()  # the active ones have more than their share
    assert "mass of qa.json\nlayer  10%    30%" in run("show", *files).output
    assert run("mask", *files, "-o", str(tmp_path / "lists.png")).exit_code == 0
    assert (tmp_path / "lists.png").read_bytes().startswith(b"\x89PNG")
    both = run("profile", "stories-llama", "--random", "--task", "qa", "-o", files[1])
    assert "three sources of lists; give one" in both.output


def test_tasks_have_examples_that_are_asked_for_by_number() -> None:
    for task in TASKS.values():
        assert len(task.examples) == 5
        assert task.example(1).given in task.ask(task.example(1).given)
        with pytest.raises(SettingsError, match="examples 1 to 5"):
            task.example(6)
