"""Cut models against the whole ones, for every architecture that midspan names."""

import json
import re
from pathlib import Path

import pytest
import torch
from random_models import save_random_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from common.errors import CheckpointError
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import context_length, read_config
from common.weights.loading import Part, load_span

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED = SIZE | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "llama-tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GATED, sliding_window=None),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "gpt-neox": GPTNeoXConfig(**SIZE, intermediate_size=64),
    "falcon-new": FalconConfig(**SIZE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-multi-query": FalconConfig(**SIZE, new_decoder_architecture=False, multi_query=True),
    "falcon-alibi": FalconConfig(
        **SIZE, new_decoder_architecture=False, multi_query=False, alibi=True
    ),
    "opt": OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32),
    "opt-projected": OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=16),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=6, n_head=4, n_positions=64),
    "phi": PhiConfig(**SIZE, intermediate_size=64),
    "gemma": GemmaConfig(**GATED, head_dim=8),
    "granite-moe": GraniteMoeConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "bloom": BloomConfig(vocab_size=99, hidden_size=32, n_layer=6, n_head=4),
    "diffllama": DiffLlamaConfig(**GATED),
    "deepseek-v3": DeepseekV3Config(
        **GATED | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=3,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    ),
}  # fmt: skip
# with a window the library builds a mask where we slice the keys: other kernels, other last bits
WINDOWED: dict[str, PretrainedConfig] = {
    "mistral-window": MistralConfig(**GATED, sliding_window=5),
    "qwen2-window": Qwen2Config(
        **GATED, use_sliding_window=True, sliding_window=6, max_window_layers=3
    ),
    "llama4-chunks": Llama4TextConfig(
        **GATED, intermediate_size_mlp=64, head_dim=8, num_local_experts=4, attention_chunk_size=5
    ),
    "gemma2-cap": Gemma2Config(**GATED, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0),
    "gpt-oss-sinks": GptOssConfig(**GATED, head_dim=8, num_local_experts=4, sliding_window=6),
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
PROMPT, LENGTH = 12, 20


class Cut:
    """Head 0-2, middle 2-4 and tail 4-6 of one model, with a fresh KV for each."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint(directory)
        self.parts: list[SpanModel] = [
            load_span(checkpoint, Span(0, 2), part="head"),
            load_span(checkpoint, Span(2, 4)),
            load_span(checkpoint, Span(4, 6), part="tail"),
        ]
        self.new_session()

    def new_session(self) -> None:
        self.kv = [part.new_kv() for part in self.parts]

    def run(self, ids: torch.Tensor, start: int, end: int) -> torch.Tensor:
        head, middle, tail = self.parts
        segments = [Segment(kv, start, end - start) for kv in self.kv]
        rows = head.embed_and_run(ids[start:end], [segments[0]])
        return tail.logits(middle.run(rows, [segments[1]]), segments[2])[-1]


@torch.no_grad()
def run_whole(directory: Path, config: PretrainedConfig, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits after the prompt and after each further token, from the unsplit model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):  # aligned memory, as ours
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(parameter.clone())
        model.tie_weights()
    cache = DynamicCache(config=config)
    logits = [model(ids[None, :PROMPT], past_key_values=cache, logits_to_keep=1).logits[0, -1]]
    for at in range(PROMPT, LENGTH):
        logits.append(model(ids[None, at : at + 1], past_key_values=cache).logits[0, -1])
    return logits


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, 99, (LENGTH,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CONFIGS)
def test_head_middle_and_tail_equal_the_whole_model_to_the_last_bit(
    name: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = save_random_model(CONFIGS[name], tmp_path)
    cut = Cut(directory)
    ours = [cut.run(ids, 0, PROMPT)] + [cut.run(ids, at, at + 1) for at in range(PROMPT, LENGTH)]
    for got, want in zip(ours, run_whole(directory, CONFIGS[name], ids), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows_see_what_the_whole_model_sees(
    name: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    directory = save_random_model(WINDOWED[name], tmp_path)
    cut = Cut(directory)
    ours = [cut.run(ids, 0, PROMPT)] + [cut.run(ids, at, at + 1) for at in range(PROMPT, LENGTH)]
    for got, want in zip(ours, run_whole(directory, WINDOWED[name], ids), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # logits of size 1, in float32


@pytest.mark.parametrize("name", CONFIGS | WINDOWED)
def test_a_prompt_in_two_chunks_gives_what_one_chunk_gives(
    name: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    cut = Cut(save_random_model((CONFIGS | WINDOWED)[name], tmp_path))
    whole = cut.run(ids, 0, LENGTH)
    cut.new_session()
    cut.run(ids, 0, 7)
    torch.testing.assert_close(cut.run(ids, 7, LENGTH), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS | WINDOWED)
def test_a_batch_of_ragged_sessions_gives_what_each_gives_alone(
    name: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    middle = load_span(
        Checkpoint(save_random_model((CONFIGS | WINDOWED)[name], tmp_path)), Span(2, 4)
    )
    lengths = [(0, 9), (4, 1), (3, 5)]  # rows that are there, rows that come
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    alone, batch_segments, batch_rows = [], [], []
    for start, count in lengths:
        kv, batch_kv = middle.new_kv(), middle.new_kv()
        if start:
            middle.run(rows[:start], [Segment(kv, 0, start)])
            middle.run(rows[:start], [Segment(batch_kv, 0, start)])
        new_rows = rows[start : start + count]
        alone.append(middle.run(new_rows, [Segment(kv, start, count)]))
        batch_segments.append(Segment(batch_kv, start, count))
        batch_rows.append(new_rows)
    together = middle.run(torch.cat(batch_rows), batch_segments)
    # float32, values of size 1: another number of rows adds in another order
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gemma2-cap", "gpt-oss-sinks", "llama4-chunks", "deepseek-v3", "diffllama"]
)
def test_sessions_share_a_pass_through_caps_sinks_chunks_and_latents(
    name: str, tmp_path: Path
) -> None:
    directory = save_random_model((CONFIGS | WINDOWED)[name], tmp_path)
    assert load_span(Checkpoint(directory), Span(2, 4)).packs_sessions
    assert not load_span(Checkpoint(directory), Span(2, 4), packs=False).packs_sessions


def test_latent_attention_keeps_latents_and_not_what_is_made_of_them(tmp_path: Path) -> None:
    config = CONFIGS["deepseek-v3"]
    middle = load_span(Checkpoint(save_random_model(config, tmp_path)), Span(2, 4))
    assert middle.layout.row_values == 2 * (config.kv_lora_rank + config.qk_rope_head_dim)


def test_a_worker_reads_only_its_span(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    middle = load_span(Checkpoint(directory), Span(2, 4))
    layer = {
        "input_layernorm.weight": 32, "post_attention_layernorm.weight": 32,
        "mlp.down_proj.weight": 32 * 64, "mlp.gate_proj.weight": 32 * 64,
        "mlp.up_proj.weight": 32 * 64, "self_attn.k_proj.weight": 32 * 16,
        "self_attn.o_proj.weight": 32 * 32, "self_attn.q_proj.weight": 32 * 32,
        "self_attn.v_proj.weight": 32 * 16,
    }  # fmt: skip
    want = {f"model.layers.{i}.{name}": 4 * n for i in (2, 3) for name, n in layer.items()}
    assert middle.bytes_read == want


def test_a_sharded_checkpoint_opens_only_the_shards_of_the_span(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path, max_shard_size="40KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint(directory)
    middle = load_span(checkpoint, Span(2, 3))
    assert len(set(index.values())) > 3
    assert set(checkpoint.opened_files) == {index[name] for name in middle.bytes_read}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=["one", "sharded"])
def test_a_directory_of_the_base_model_alone_is_read_as_the_library_reads_it(
    name: str, options: dict[str, str], ids: torch.Tensor, tmp_path: Path
) -> None:
    """Without an LM head, and without the prefix that a causal model's names have."""
    config = CONFIGS[name].__class__(**CONFIGS[name].to_dict() | {"tie_word_embeddings": True})
    model = save_random_model(config, tmp_path / "causal")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model
    base.save_pretrained(tmp_path / "base", **options)
    assert not any(
        stored.startswith(("model.", "transformer."))
        for stored in Checkpoint(tmp_path / "base").tensor_names
    )
    got = Cut(tmp_path / "base").run(ids, 0, PROMPT)
    assert torch.equal(got, run_whole(model, config, ids)[0])


def test_sharded_and_single_files_have_the_same_fingerprint(tmp_path: Path) -> None:
    single = save_random_model(CONFIGS["llama"], tmp_path / "single")
    sharded = save_random_model(CONFIGS["llama"], tmp_path / "sharded", max_shard_size="40KB")
    assert Checkpoint(single).fingerprint() == Checkpoint(sharded).fingerprint()


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    one = save_random_model(CONFIGS["llama"], tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.001)  # as a fine-tuning step would
    model.save_pretrained(tmp_path / "other")
    assert Checkpoint(one).fingerprint() != Checkpoint(tmp_path / "other").fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_span_computes_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    middle = load_span(Checkpoint(save_random_model(CONFIGS["llama"], tmp_path)), Span(2, 4), dtype)
    rows = torch.randn(3, 32).to(dtype)
    assert middle.run(rows, [Segment(middle.new_kv(), 0, 3)]).dtype == dtype
    assert middle.layout.row_bytes == 2 * 2 * 16 * 2  # layers, keys and values, 2 heads x 8, bytes


@pytest.mark.parametrize("part", ["head", "middle", "tail"])
def test_all_of_a_part_is_on_the_device_that_it_was_asked_for(part: Part, tmp_path: Path) -> None:
    """The meta device stands for one that is not the CPU: whoever mixes the two, fails."""
    checkpoint = Checkpoint(save_random_model(CONFIGS["llama"], tmp_path))
    span = {"head": Span(0, 2), "middle": Span(2, 4), "tail": Span(4, 6)}[part]
    model = load_span(checkpoint, span, device="meta", part=part)._causal_lm
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_every_layer_can_be_in_the_middle(ids: torch.Tensor, tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    checkpoint = Checkpoint(directory)
    head = load_span(checkpoint, Span(0, 0), part="head")
    middle = load_span(checkpoint, Span(0, 6))
    tail = load_span(checkpoint, Span(6, 6), part="tail")
    rows = head.embed_and_run(ids[:PROMPT], [Segment(head.new_kv(), 0, PROMPT)])
    rows = middle.run(rows, [Segment(middle.new_kv(), 0, PROMPT)])
    logits = tail.logits(rows, Segment(tail.new_kv(), 0, PROMPT))
    assert torch.equal(logits[-1], run_whole(directory, CONFIGS["llama"], ids)[0])
    assert "model.embed_tokens.weight" not in middle.bytes_read


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            Gemma4TextConfig(**GATED, head_dim=8, vocab_size_per_layer_input=99),
            "each layer embeddings of the tokens cannot be",
        ),
        (
            LlamaConfig(**GATED, layer_types=["linear_attention"] * 6),
            "layer 2 keeps its state elsewhere than in the library's cache",
        ),
        (OpenAIGPTConfig(n_embd=32, n_layer=6, n_head=4), "keep nothing of a text"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(
    config: PretrainedConfig, words: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(save_random_model(config, tmp_path))
    with pytest.raises(CheckpointError, match=words):
        load_span(checkpoint, Span(2, 4))


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (DYNAMIC, 64),
        (
            {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4, "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_a_text_ends_where_its_rotary_frequencies_would_change(
    rope: dict[str, object], length: int, tmp_path: Path
) -> None:
    config = LlamaConfig(**GATED, rope_parameters=rope)
    directory = save_random_model(config, tmp_path)
    assert context_length(read_config(Checkpoint(directory))) == length
    text = torch.randint(2, 99, (length,), generator=torch.Generator().manual_seed(5))
    cut = Cut(directory)
    cut.run(text, 0, 7)
    cut.run(text, 7, length - 1)
    got = cut.run(text, length - 1, length)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(text[None], logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # logits of size 1, in float32


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    save_random_model(CONFIGS["llama"], tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="t5 model; midspan cuts decoder-only"):
        read_config(Checkpoint(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.6\."):
        load_span(Checkpoint(directory), Span(5, 7))


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_a_tensor_of_numbers_that_are_no_plain_weights_is_named(
    tmp_path: Path, kind: torch.dtype
) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    path, name = directory / "model.safetensors", "model.layers.3.self_attn.q_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(kind)}, path)
    stored = str(kind).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)} is stored as {stored};"):
        load_span(Checkpoint(directory), Span(2, 4))


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(
        CheckpointError, match=r"shape \(64, 32\); its config.json needs \(65, 32\)"
    ):
        load_span(Checkpoint(directory), Span(2, 4))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"config.json does not exist"),
        ({"config.json": "{"}, r"config.json cannot be read"),
        ({"config.json": "{}"}, "names no model_type"),
        ({"config.json": '{"model_type": "llama"}'}, r"has none of model\.safetensors"),
        (
            {"config.json": '{"model_type": "llama"}', "pytorch_model.bin": "x"},
            "cannot be read as weights only",
        ),
        (
            {"config.json": '{"model_type": "llama"}', "model.safetensors": "garbage"},
            "not a readable safetensors file",
        ),
    ],
)
def test_a_wrong_checkpoint_folder_says_what_is_wrong(
    files: dict[str, str], words: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' is not a directory"):
        Checkpoint(tmp_path / "nowhere")


def test_older_weight_files_are_read_without_running_their_code(
    demo_directory: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(demo_directory)
    tensors = checkpoint.read(checkpoint.tensor_names, torch.float16)
    (tmp_path / "config.json").write_bytes((demo_directory / "config.json").read_bytes())
    for name, options in (("pytorch_model.bin", {}), ("pytorch_model.pth", {"old": True})):
        path = tmp_path / name
        torch.save(tensors, path, _use_new_zipfile_serialization="old" not in options)
        older = Checkpoint(tmp_path)
        assert older.fingerprint() == checkpoint.fingerprint()
        head = load_span(older, Span(0, 2), part="head")
        want = load_span(checkpoint, Span(0, 2), part="head")
        ids = torch.tensor([1, 2, 3])
        assert torch.equal(
            *(m.embed_and_run(ids, [Segment(m.new_kv(), 0, 3)]) for m in (head, want))
        )
        path.unlink()

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("code was run",)

    torch.save({"weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"weights only: torch\.save has not") as raised:
        Checkpoint(tmp_path)
    assert "likely succeed" not in str(raised.value)
