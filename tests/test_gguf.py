"""GGUF files, packed by the format's own package, against the model whose weights they hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from forks import error_line, run_midspan
from random_models import save_random_model
from transformers import AutoModelForCausalLM, LlamaConfig

from common.errors import CheckpointError, SettingsError
from common.formats.gguf_conversion import import_gguf
from common.spans.attention import Segment
from common.spans.cut import Span
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span
from edge_agent.text.tokenizer import TextTokenizer

CONFIG = LlamaConfig(
    vocab_size=290, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128, bos_token_id=1,
    eos_token_id=2, rms_norm_eps=1e-5,
)  # fmt: skip
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PIECES = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abfox", "▁a", "▁f",
    "ab", "ox", "▁fox", *(chr(0x4E00 + index) for index in range(20)),
]  # fmt: skip
Tensors = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    directory = save_random_model(CONFIG, tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def rename(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, index, inner = stem.split(".", 3)
    return f"blk.{index}.{LAYER_NAMES[inner]}.weight"


def in_neighbours(name: str, value: Any) -> Any:
    """llama.cpp has the rows of queries and keys in the order of Meta's checkpoints."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def write_gguf(
    path: Path,
    weights: Tensors,
    kind: gguf.GGMLQuantizationType | None = None,
    skip: str = "",
    extra: str = "",
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    if extra == "scaling":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(index) for index in range(len(PIECES))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in weights.items():
        stored = in_neighbours(name, value)
        if name == skip:
            continue
        if kind is not None and value.ndim == 2:
            writer.add_tensor(rename(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(rename(name), stored.copy())
    if extra == "rope_freqs.weight":
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_holds_the_weights_that_were_put_into_it(weights: Tensors, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", weights)
    done = run_midspan("model", "convert", str(file), "-o", str(tmp_path / "model"))
    assert "holds b 0-3 e of model" in done.stdout, done.stderr
    checkpoint = Checkpoint(tmp_path / "model")
    assert checkpoint.tensor_names == sorted(weights)
    for name, value in weights.items():
        assert torch.equal(checkpoint.read_stored(name), torch.from_numpy(value)), name
    tokenizer = TextTokenizer(tmp_path / "model")
    assert tokenizer.encode("a fox") == [1, PIECES.index("▁a"), PIECES.index("▁fox")]
    assert tokenizer.decode(tokenizer.encode("a fox, 狐")) == "a fox, 狐"


def test_a_quantized_gguf_is_cut_as_the_model_of_its_values(
    weights: Tensors, tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    import_gguf(write_gguf(tmp_path / "model.gguf", weights, kind), tmp_path / "model")
    reference = AutoModelForCausalLM.from_config(CONFIG).eval()
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        if value.ndim == 2
        else value
        for name, value in weights.items()
    }
    reference.load_state_dict({name: torch.from_numpy(value) for name, value in rounded.items()})
    ids = torch.tensor([1, 260, 270, 280, 5])
    with torch.no_grad():
        want = reference(ids[None]).logits[0, -1]
    checkpoint = Checkpoint(tmp_path / "model")
    parts = [
        load_span(checkpoint, Span(0, 1), part="head"),
        load_span(checkpoint, Span(1, 2)),
        load_span(checkpoint, Span(2, 3), part="tail"),
    ]
    head, middle, tail = (Segment(part.new_kv(), 0, len(ids)) for part in parts)
    rows = parts[1].run(parts[0].embed_and_run(ids, [head]), [middle])
    got = parts[2].logits(rows, tail)[-1]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()  # memory aligned otherwise


@pytest.mark.parametrize("extra", ["rope_freqs.weight", "scaling"])
def test_scaled_frequencies_are_refused(extra: str, weights: Tensors, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", weights, extra=extra)
    with pytest.raises(CheckpointError, match="scales its rotary frequencies"):
        import_gguf(file, tmp_path / "model")


def test_a_gguf_that_lacks_something_is_refused(weights: Tensors, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    file = write_gguf(tmp_path / "model.gguf", weights, skip=name)
    with pytest.raises(CheckpointError, match=name):
        import_gguf(file, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:3000])
    line = error_line("model", "convert", str(tmp_path / "cut.gguf"), "-o", str(tmp_path / "x"))
    assert "cut.gguf is no readable GGUF file" in line
    line = error_line("model", "convert", str(file), "--tokenizer", "t", "-o", str(tmp_path / "x"))
    assert "--tokenizer does not go with" in line


def test_the_missing_package_is_named(
    weights: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "model.gguf", weights)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(SettingsError, match=r"pip install 'midspan\[gguf\]'"):
        import_gguf(file, tmp_path / "model")
