"""The guard that no family slips past: a small twin, cut and whole, before a model is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import save_random_model
from test_span_model import CONFIGS, GATED, WINDOWED
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    DynamicCache,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MiniMaxConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cloud_worker.serving import ServingSettings, load_text_service
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.stage_cache import CacheBudget
from common.errors import CheckpointError
from common.spans import twin_check
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.twin_check import TOLERANCE, check_twin
from common.spans.twin_config import keep_layers, layers_name, narrow, pick_layers
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span
from edge_agent.text.ends import load_ends

LLAMA = CONFIGS["llama"]
DIFF_LLAMA = DiffLlamaConfig(**GATED)
NEMOTRON = NemotronConfig(**GATED, head_dim=8)
PROMPT, LENGTH = 12, 18


def break_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a layer's result depend on whose cache it is given."""
    forward = LlamaDecoderLayer.forward

    def broken(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_cut = hasattr(kwargs["past_key_values"], "segments")
        return forward(self, *args, **kwargs) * (1 + 0.1 * is_cut)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", broken)


def count_judgements(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    judged: list[object] = []
    judge = twin_check._judge

    def counted(config: object) -> object:
        judged.append(config)
        return judge(config)

    monkeypatch.setattr(twin_check, "_judge", counted)
    return judged


@torch.inference_mode()
def compare_cut_and_whole(
    config: PretrainedConfig, directory: Path, cut: Span, packs: bool
) -> float:
    """The largest difference of logits as a share of the largest, by code of the tests' own."""
    save_random_model(config, directory)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config, checkpoint = whole.config, Checkpoint(directory)
    parts = [
        load_span(checkpoint, Span(0, cut.first), part="head", packs=packs),
        load_span(checkpoint, cut, packs=packs),
        load_span(checkpoint, Span(cut.last, config.num_hidden_layers), part="tail", packs=packs),
    ]
    caches, whole_cache = [part.new_kv() for part in parts], DynamicCache(config=config)
    takes = inspect.signature(whole.forward).parameters
    given = {"cache_params" if "cache_params" in takes else "past_key_values": whole_cache}
    ids = torch.randint(2, 90, (LENGTH,), generator=torch.Generator().manual_seed(9))
    worst = 0.0
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))]:
        segments = [Segment(kv, start, end - start) for kv in caches]
        rows = parts[1].run(parts[0].embed_and_run(ids[start:end], [segments[0]]), [segments[1]])
        got = parts[2].logits(rows, segments[2], last=end - start)
        want = whole(ids[None, start:end], use_cache=True, **given).logits[0]
        worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    return worst


@pytest.mark.parametrize("name", CONFIGS | WINDOWED)
def test_every_family_that_is_tested_passes(name: str, tmp_path: Path) -> None:
    check_twin((CONFIGS | WINDOWED)[name], tmp_path)
    (verdict,) = tmp_path.iterdir()
    assert json.loads(verdict.read_text())["refusal"] is None


@pytest.mark.parametrize("config", [DIFF_LLAMA, NEMOTRON], ids=["diffllama", "nemotron"])
def test_a_family_known_to_come_out_differently_is_computed_right_or_refused(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    try:
        packs = check_twin(config, tmp_path / "cache")
    except CheckpointError as refusal:
        words = str(refusal)
        assert f"{config.model_type} models would be computed wrongly" in words
    else:
        # of the largest logit, as the guard allows
        assert compare_cut_and_whole(config, tmp_path / "model", Span(2, 4), packs) <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, DIFF_LLAMA], ids=["llama", "diffllama"])
def test_edge_and_worker_ask_the_guard_before_they_load(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(twin_check, "TOLERANCE", -1.0)  # what even equal logits do not meet
    directory = save_random_model(config, tmp_path / "model")
    loaders: list[Callable[[], object]] = [
        lambda: load_ends(directory),
        lambda: load_text_service(
            directory, "2-4", None, MemoryKvStore(), ServingSettings(), CacheBudget(0)
        ),
    ]
    for load in loaders:
        with pytest.raises(CheckpointError, match=f"{config.model_type} models would be computed"):
            load()


def test_a_family_whose_layers_depend_on_their_index_is_computed_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaDecoderLayer.forward

    def indexed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs) * (1 + 0.1 * self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", indexed)
    assert check_twin(LLAMA, tmp_path)


def test_a_family_that_comes_out_otherwise_is_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_layers(monkeypatch)
    with pytest.raises(
        CheckpointError,
        match=r"llama models would be computed wrongly: .* differ by \d\.\de[-+]\d\d of",
    ):
        check_twin(LLAMA, tmp_path)


def test_a_family_that_mixes_the_sessions_of_a_batch_is_computed_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaDecoderLayer.forward

    def leaking(self: Any, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_batch = len(getattr(kwargs.get("past_key_values"), "segments", ())) > 1
        return forward(self, rows, *args, **kwargs) + is_batch * rows.mean(1, keepdim=True)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", leaking)
    assert not check_twin(LLAMA, tmp_path)
    assert not check_twin(LLAMA, tmp_path)  # remembered


def test_a_crash_of_the_twin_is_a_refusal_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise ZeroDivisionError("of the third kind\nand a second line")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", fail)
    with pytest.raises(CheckpointError) as caught:
        check_twin(LLAMA, tmp_path)
    assert str(caught.value) == (
        "llama models cannot be cut: a small one fails with ZeroDivisionError: of the third kind "
        "and a second line"
    )


def test_a_verdict_is_computed_once_and_a_refusal_keeps_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = count_judgements(monkeypatch)
    break_layers(monkeypatch)
    messages = []
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            check_twin(LLAMA, tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert judged == [LLAMA]


def test_another_configuration_or_library_is_judged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = count_judgements(monkeypatch)
    other = LlamaConfig(**GATED, attention_bias=True)
    for config in (LLAMA, LLAMA, other, other):
        check_twin(config, tmp_path)
    assert judged == [LLAMA, other]
    monkeypatch.setattr(twin_check.transformers, "__version__", "5.999.0")
    check_twin(LLAMA, tmp_path)
    assert judged == [LLAMA, other, LLAMA]


def test_a_source_that_changed_is_judged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "twin_check.py"
    source.write_text("one")
    monkeypatch.setattr(twin_check, "SOURCES", [tmp_path])
    judged = count_judgements(monkeypatch)
    check_twin(LLAMA, tmp_path / "cache")
    source.write_text("other")
    check_twin(LLAMA, tmp_path / "cache")
    assert judged == [LLAMA, LLAMA]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"refusal": null}', '{"refusal": 3, "packs": true}', "\udc80"]
)
def test_a_broken_verdict_is_computed_again(content: str, tmp_path: Path) -> None:
    check_twin(LLAMA, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content.encode(errors="surrogateescape"))
    check_twin(LLAMA, tmp_path)
    assert json.loads(path.read_text()) == {"refusal": None, "packs": True}


def test_a_cache_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = count_judgements(monkeypatch)
    (tmp_path / "file").write_text("where a directory is needed")
    for _ in range(2):
        check_twin(LLAMA, tmp_path / "file" / "twins")
    assert judged == [LLAMA, LLAMA]


def test_a_user_without_a_home_has_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    judged = count_judgements(monkeypatch)
    for _ in range(2):
        check_twin(LLAMA)
    assert judged == [LLAMA, LLAMA]


def test_a_full_disk_refuses_this_start_and_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(twin_check, "save_random", fail)
        with pytest.raises(CheckpointError, match=r"cannot be checked here: .*No space left"):
            check_twin(LLAMA, tmp_path)
    check_twin(LLAMA, tmp_path)


def test_the_guard_leaves_the_random_numbers_of_the_process_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    check_twin(LLAMA, tmp_path)
    assert torch.equal(torch.rand(4), want)


def test_a_narrow_model_keeps_its_ratios_and_switches() -> None:
    config = Qwen3Config(
        vocab_size=150000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, attention_bias=True,
        eos_token_id=149999,
    )  # fmt: skip
    changed = {k: v for k, v in narrow(config).items() if v != config.to_dict()[k]}
    assert changed == {
        "vocab_size": 128, "hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 127,
        "max_position_embeddings": 256,
    }  # fmt: skip


def test_a_partly_rotated_head_keeps_whole_pairs() -> None:
    values = narrow(GPTNeoXConfig(hidden_size=6144, num_attention_heads=64, rotary_pct=0.25))
    assert (values["hidden_size"], values["num_attention_heads"]) == (64, 4)  # 4 of 16 are rotated
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.1}
    values = narrow(GPTNeoXConfig(hidden_size=6144, num_attention_heads=64, rope_parameters=rope))
    assert values["hidden_size"] == 80  # 2 of 20


def test_lists_of_and_about_layers_are_cut_alike() -> None:
    values = {
        "n_layer": 6, "layer_types": ["s", "s", "f", "s", "s", "f"], "moe_layers": [2, 4, 5],
        "eos_token_id": [1, 2, 3, 4, 5, 6], "mrope_section": [1, 2, 3],
    }  # fmt: skip
    assert keep_layers(values, "n_layer", [0, 2, 4, 5]) == {
        "n_layer": 4, "layer_types": ["s", "f", "s", "f"], "moe_layers": [1, 2, 3],
        "eos_token_id": [1, 2, 3, 4, 5, 6], "mrope_section": [1, 2, 3],
    }  # fmt: skip


def test_the_first_and_the_last_of_each_kind_are_picked() -> None:
    assert pick_layers(["s", "s", "s", "f"] * 3, 4) == [0, 3, 10, 11]
    assert pick_layers(["s"] * 8, 4) == [0, 1, 2, 7]
    assert pick_layers(["s", "f"], 4) == [0, 1]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (Gemma3TextConfig(), {"sliding_attention", "full_attention"}),
        (MiniMaxConfig(), {"linear_attention", "full_attention"}),
    ],
)
def test_a_twin_has_every_type_of_layer(
    config: PretrainedConfig, kinds: set[str], tmp_path: Path
) -> None:
    whole = twin_check.write_twin(config, tmp_path)
    assert set(whole.config.layer_types) == kinds
    assert whole.config.num_hidden_layers < config.num_hidden_layers


def test_a_twin_has_dense_layers_and_experts_where_the_model_has(tmp_path: Path) -> None:
    config = DeepseekV3Config(num_hidden_layers=61, first_k_dense_replace=7)
    whole = twin_check.write_twin(config, tmp_path)
    mlps = [type(layer.mlp).__name__ for layer in whole.model.layers]
    assert mlps == ["DeepseekV3MLP"] * 7 + ["DeepseekV3MoE"]


def test_a_configuration_without_a_width_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = AutoConfig.for_model("rwkv")
    with pytest.raises(CheckpointError, match=r"rwkv models cannot be checked: .* None and 4096"):
        check_twin(config, tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    directory = save_random_model(LLAMA, tmp_path)
    values = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4}
    (directory / "config.json").write_text(
        json.dumps(values | {"quantization_config": quantization})
    )
    with pytest.raises(CheckpointError, match="holds quantized weights"):
        read_config(Checkpoint(directory))


def decoder_families() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def configure_family(family: str) -> Any:
    """The library's example of a family, with what some examples leave out; None if it is none."""
    try:
        config = AutoConfig.for_model(family)
    except Exception:  # an example that its own class refuses
        return None
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        return None
    if config.num_hidden_layers < 4:
        config = AutoConfig.for_model(family, num_hidden_layers=4)
    for name, value in (("head_dim", 16), ("num_key_value_heads", 2), ("n_routed_experts", 8)):
        if name in config.__dict__ and config.__dict__[name] is None:
            setattr(config, name, value)
    return config


@pytest.mark.long
@pytest.mark.parametrize("family", decoder_families())
def test_no_family_of_the_library_that_the_guard_lets_pass_comes_out_differently(
    family: str, tmp_path: Path
) -> None:
    config = configure_family(family)
    if config is None:
        print(family, "no decoder")
        return
    try:
        packs = check_twin(config, tmp_path / "cache")
    except CheckpointError as refusal:
        print(family, "refused:", refusal)
        return
    values = narrow(config)
    name = layers_name(config)
    kept = list(range(min(6, config.num_hidden_layers)))
    (tmp_path / "config").mkdir()
    small = twin_check._configure(config, keep_layers(values, name, kept), tmp_path / "config")
    # another seed, another depth and another cut than the guard's
    worst = compare_cut_and_whole(small, tmp_path / "model", Span(2, len(kept) - 1), packs)
    print(family, f"differs by {worst:.0e}")  # shown by pytest -m long -rP
    assert worst <= TOLERANCE
