"""A PEFT folder changes a language model as merging it by hand does, in every part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from forks import run_midspan
from pools import PROMPTS, generate
from random_models import save_random_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from common.adapters.choice import LoraChoice
from common.adapters.peft import adapt_text_model
from common.errors import CheckpointError, MidspanError, NoWorker
from common.weights.checkpoint import Checkpoint
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.question import describe_source
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.tokenizer import TextTokenizer

RANK, ALPHA = 2, 6.0
BASE = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
    "target_modules": ["q_proj"], "lora_dropout": 0.1, "bias": "none", "inference_mode": True,
    "fan_in_fan_out": False, "init_lora_weights": True, "base_model_name_or_path": "/somewhere",
}  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=3, n_head=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(GPT2, tmp_path_factory.mktemp("gpt2"))


def low_rank(out: int, inner: int, rank: int = RANK, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A and B."""
    generator = torch.Generator().manual_seed(seed)
    made = (
        torch.randn(rank, inner, generator=generator),
        torch.randn(out, rank, generator=generator),
    )
    return made[0] * 0.3, made[1] * 0.3


def save_lora(
    directory: Path, tensors: dict[str, Tensor], changes: dict[str, Any] | None = None
) -> LoraChoice:
    directory.mkdir(exist_ok=True)
    save_file(
        {BASE + name: tensor for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | (changes or {})))
    return LoraChoice(directory)


def pair(module: str, factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": factors[0], f"{module}.lora_B.weight": factors[1]}


def read(directory: Path, choice: LoraChoice, name: str) -> Tensor:
    checkpoint = Checkpoint(directory)
    adapt_text_model(checkpoint, [choice])
    return checkpoint.read([name], torch.float32)[name]


def stored(directory: Path, name: str) -> Tensor:
    return Checkpoint(directory).read([name], torch.float32)[name]


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"r": 9, "rank_pattern": {"q_proj": RANK}}, ALPHA / RANK),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 1.0}}, 1 / RANK),
        ({"alpha_pattern": {"k_proj": 1.0}}, ALPHA / RANK),
    ],
    ids=str,
)  # fmt: skip
def test_the_scale_is_pefts(
    llama: Path, tmp_path: Path, changes: dict[str, Any], scale: float
) -> None:
    down, up = low_rank(16, 16)
    choice = save_lora(tmp_path, pair(Q_PROJ, (down, up)), changes)
    wanted = stored(llama, f"{Q_PROJ}.weight") + scale * (up @ down)
    assert torch.allclose(read(llama, choice, f"{Q_PROJ}.weight"), wanted, atol=1e-6)  # last bits


def test_transposed_weights_embeddings_and_tensors_trained_as_a_whole(
    llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    down, up = low_rank(48, 16)
    conv1d = save_lora(
        tmp_path / "a", pair("transformer.h.1.attn.c_attn", (down, up)), {"fan_in_fan_out": True}
    )
    name = next(n for n in Checkpoint(gpt2).tensor_names if n.endswith("h.1.attn.c_attn.weight"))
    wanted = stored(gpt2, name) + ALPHA / RANK * (up @ down).T
    assert torch.allclose(read(gpt2, conv1d, name), wanted, atol=1e-6)
    down, up = low_rank(16, 48)
    names = ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B")
    beside = {"model.embed_tokens.base_layer.weight": torch.randn(48, 16)}  # as PEFT saves it
    embedding = save_lora(tmp_path / "b", dict(zip(names, (down, up), strict=True)) | beside)
    (base,) = beside.values()
    wanted = base + ALPHA / RANK * (up @ down).T
    assert torch.allclose(read(llama, embedding, "model.embed_tokens.weight"), wanted, atol=1e-6)
    head = torch.randn(48, 16)
    whole = save_lora(tmp_path / "c", {"lm_head.modules_to_save.default.weight": head})
    assert torch.equal(read(llama, whole, "lm_head.weight"), head)


def test_a_bin_file_is_read_as_weights_only(llama: Path, tmp_path: Path) -> None:
    choice = save_lora(tmp_path, pair(Q_PROJ, low_rank(16, 16)))
    wanted = read(llama, choice, f"{Q_PROJ}.weight")
    (tmp_path / "adapter_model.safetensors").unlink()
    tensors = {BASE + name: tensor for name, tensor in pair(Q_PROJ, low_rank(16, 16)).items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(read(llama, choice, f"{Q_PROJ}.weight"), wanted)


def no_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def name_case(value: object) -> str:
    """The same words in every process, which may share the tests among them."""
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        ({}, {"use_dora": True}, "has use_dora: a DoRA cannot be merged here"),
        ({}, {"peft_type": "LOHA"}, "is of type LOHA; expected LORA"),
        ({}, {"layer_replication": [[0, 2]]}, r"has layer_replication ..0, 2.., which is"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "changes the base as well"),
        ({}, {"fan_in_fan_out": True}, "weights of llama are not stored transposed"),
        ({}, {"r": 4}, "says rank 4 for model.layers.0.self_attn.q_proj, which has 2"),
        ({}, {"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({}, {"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({}, {"lora_alpha": "much"}, "has alpha 'much'; expected a number"),
        ({f"{Q_PROJ}.lora_magnitude_vector": (16,)}, {}, "is a DoRA"),
        ({f"{Q_PROJ}.lora_B.bias": (16,)}, {}, r"q_proj\.lora_B\.bias, which nothing"),
        ({"model.layers.9.mlp.up_proj.weight": (2, 2)}, {}, "of which the checkpoint has 0"),
        ({"lm_head.weight": (49, 16)}, {}, r"shape \[49, 16\]; the checkpoint has"),
        (no_config, {}, r"has no adapter_config\.json; expected a folder that PEFT saved"),
    ],
    ids=name_case,
)  # fmt: skip
def test_what_a_lora_asks_for_that_is_not_done_is_named(
    llama: Path,
    tmp_path: Path,
    tensors: dict[str, tuple[int, ...]] | Callable[[Path], None],
    changes: dict[str, Any],
    words: str,
) -> None:
    others = tensors if isinstance(tensors, dict) else {}
    more = {name: torch.ones(shape) for name, shape in others.items()}
    choice = save_lora(tmp_path, pair(Q_PROJ, low_rank(16, 16)) | more, changes)
    if callable(tensors):
        tensors(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read(llama, choice, f"{Q_PROJ}.weight")


def test_embeddings_that_are_the_head_as_well_are_not_changed_in_one_of_their_uses(
    gpt2: Path, tmp_path: Path
) -> None:
    name = next(n for n in Checkpoint(gpt2).tensor_names if n.endswith("wte.weight"))
    choice = save_lora(tmp_path, {name: torch.ones(48, 16)}, {"fan_in_fan_out": True})
    with pytest.raises(MidspanError, match="uses as embeddings and as LM head"):
        read(gpt2, choice, name)


# --- through a pool


@pytest.fixture(scope="module")
def lora(whole_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> LoraChoice:
    """Of every linear layer of the demo model but its head."""
    tensors = {}
    for index, (name, module) in enumerate(whole_model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            tensors |= pair(name, low_rank(*module.weight.shape, seed=index))
    return save_lora(tmp_path_factory.mktemp("lora"), tensors, {"lora_alpha": 1.5})


@pytest.fixture(scope="module")
def pool(lora: LoraChoice) -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1, loras=[f"{lora.path}@0.5"])) as running:
        yield running


@pytest.fixture(scope="module")
def merged(demo_directory: Path, lora: LoraChoice) -> torch.nn.Module:
    """The unsplit model, with the LoRA merged by hand, at half of it."""
    model = AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.float32).eval()
    for index, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            down, up = low_rank(*module.weight.shape, seed=index)
            module.weight.data += 0.5 * 1.5 / RANK * (up @ down)
    return model


def test_tokens_are_those_of_the_merged_model(
    pool: LocalPool,
    lora: LoraChoice,
    merged: torch.nn.Module,
    whole_model: torch.nn.Module,
    demo_directory: Path,
    demo_ends: ModelEnds,
) -> None:
    ends = load_ends(demo_directory, loras=[LoraChoice(lora.path, 0.5)])
    ids = TextTokenizer(demo_directory).encode(PROMPTS[0])
    tokens, _ = generate(pool, ends, ids, 30)
    prompt = torch.tensor([ids])
    for model, is_same in ((merged, True), (whole_model, False)):
        said = model.generate(prompt, max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()
        assert (said == tokens) is is_same
    with pytest.raises(NoWorker, match="no worker serves"):
        generate(pool, demo_ends, ids, 2)


def test_commands_take_a_lora_and_say_what_does_not_fit(
    pool: LocalPool, lora: LoraChoice, tmp_path: Path
) -> None:
    done = run_midspan(
        "ask", "Once upon a time", "-n", "3", "-t", "0", "--lora", f"{lora.path}@0.5",
        "--json", "--threads", "1", "--broker", pool.edge_endpoint,
    )  # fmt: skip
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    bad = save_lora(tmp_path / "bad", pair("model.layers.99.mlp.up_proj", low_rank(4, 4)))
    checked = CliRunner().invoke(midspan, ["check", "--lora", str(bad.path)])
    assert checked.exit_code == 1
    assert "changes model.layers.99.mlp.up_proj.weight" in checked.output
    worker = ["worker", "--image-model", "landscapes-sdxl", "--lora", str(lora.path)]
    unused = CliRunner().invoke(midspan, worker)
    assert unused.exit_code == 1
    assert "--lora changes a model that is not served here; name it: --model" in unused.output


def test_a_serve_with_another_lora_is_not_asked(lora: LoraChoice, demo_directory: Path) -> None:
    sources = [
        describe_source(demo_directory, "float32", CodecChoice("int8"), loras)
        for loras in ([], [lora], [LoraChoice(lora.path, 0.5)], [lora])
    ]
    assert sources[1] == sources[3]
    assert len(set(sources)) == 3
