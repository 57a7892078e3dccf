"""Cut a Hugging Face decoder-only model: load one span of it and run rows through.

A span is the model's own class with its layer list cut short. The head keeps the input embeddings
(and what is added to them), the tail keeps the final norm and the LM head; elsewhere these are
replaced by modules that change nothing. The arithmetic of the layers, rotary embeddings included,
is the library's own code.

The model is built on the meta device and only the tensors of the span are read. Because a model
may do something to its hidden states outside its layers that we do not know of, every part but
the head is checked once: with no layers at all it must return its input unchanged.

Letters: T tokens (rows), D hidden.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from common.errors import CheckpointError, SettingsError, in_one_line
from common.spans.attention import ATTENTION_NAME, register_attention
from common.spans.cut import Span
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")
Part = Literal["head", "middle", "tail"]
LAYER_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
MAX_LAYERS = 1024  # eight times what the deepest models have
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


class Zeros(nn.Module):
    """Stands for learned positions where they were added already: adding it changes nothing."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(1)


def parse_dtype(name: str) -> torch.dtype:
    """float32, float16 or bfloat16. Raises SettingsError."""
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def check_device(name: str) -> torch.device:
    """A torch device that is there. Raises SettingsError."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} cannot be used: {reason}") from error
    return device


def read_config(checkpoint: Checkpoint) -> Any:
    """The model's transformers configuration. Raises CheckpointError for what cannot be cut."""
    _check_layer_counts(checkpoint, checkpoint.config_json)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a foreign class raises for values of wrong types
        kind = str(checkpoint.config_json.get("model_type"))[:100]
        raise CheckpointError(
            f"{checkpoint.directory}: transformers cannot read model type {kind!r}: "
            f"{in_one_line(error)}"
        ) from error
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise CheckpointError(
            f"{checkpoint.directory} holds a {config.model_type} model; "
            "midspan cuts decoder-only language models"
        )
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{checkpoint.directory} holds quantized weights; midspan reads plain ones, for a "
            "weight without its scale is another number"
        )
    _refuse_what_depends_on_the_whole_text(checkpoint, config)
    return config


def _check_layer_counts(checkpoint: Checkpoint, values: dict[str, Any]) -> None:
    """Raise CheckpointError for a number of layers that a configuration would spend hours on."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_layer_counts(checkpoint, value)
        elif name in LAYER_COUNTS and (type(value) is not int or not 0 < value <= MAX_LAYERS):
            raise CheckpointError(
                f"{checkpoint.directory}: config.json gives {name} as {str(value)[:40]}; "
                f"expected 1 to {MAX_LAYERS}"
            )


def _refuse_what_depends_on_the_whole_text(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for attention that our packed and chunked steps would get wrong."""
    layer_types = set(getattr(config, "layer_types", None) or ())
    foreign = layer_types - {"full_attention", "sliding_attention"}
    if foreign:
        raise CheckpointError(
            f"{checkpoint.directory}: {config.model_type} models with {', '.join(sorted(foreign))} "
            "layers cannot be cut yet"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [v.get("rope_type") for v in (rope, *rope.values()) if isinstance(v, dict)]
    for kind in ("longrope", "dynamic"):
        if kind in kinds:
            raise CheckpointError(
                f"{checkpoint.directory}: rope type {kind!r} depends on the length of the whole "
                "text, so a session's numbers would depend on how its steps are cut"
            )


def context_length(config: Any) -> int | None:
    """How many tokens the model was made for, or None if its configuration does not say."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def load_span(
    checkpoint: Checkpoint,
    span: Span,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    part: Part = "middle",
) -> SpanModel:
    """Build the layers of `span`, as the head with the embeddings, as the tail with the LM head.

    Raises CheckpointError when the model's kind cannot be cut or a tensor is missing.
    """
    config = copy.deepcopy(read_config(checkpoint))
    num_layers = config.num_hidden_layers
    causal_lm = _build_on_meta(checkpoint, config, dtype)
    decoder, layers_name = find_decoder(causal_lm, num_layers)
    packs = bool(getattr(causal_lm, "_supports_attention_backend", False))
    if packs:
        register_attention()
        config._attn_implementation = ATTENTION_NAME
    embedding = causal_lm.get_input_embeddings()
    if embedding is None:
        raise CheckpointError(f"{config.model_type} models have no input embedding to keep")
    norm_name = _keep_ends(decoder, layers_name, embedding, part, config.model_type)
    layers = getattr(decoder, layers_name)
    setattr(decoder, layers_name, nn.ModuleList(layers[span.first : span.last]))
    for index, layer in enumerate(getattr(decoder, layers_name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(span)
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == num_layers:
            setattr(config, name, values[span.first : span.last])

    kept = causal_lm if part == "tail" else decoder
    prefix = "" if part == "tail" else _name_of(causal_lm, decoder) + "."
    bytes_read = _load_weights(
        checkpoint, causal_lm, kept, prefix, f"{layers_name}.", span.first, dtype, device
    )
    _fill_buffers(causal_lm, kept, device, config.model_type)
    causal_lm.eval()
    if part != "head":
        _check_identity(
            decoder, layers_name, norm_name if part == "tail" else None, config, dtype, device
        )
    return SpanModel(
        decoder,
        causal_lm if part == "tail" else None,
        embedding if part == "head" else None,
        span,
        config.hidden_size,
        dtype,
        packs,
        bytes_read,
    )


def _build_on_meta(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: no causal language model can be built for model type "
            f"{config.model_type!r}: {str(error).splitlines()[0]}"
        ) from error


def find_decoder(causal_lm: Any, num_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's name in it."""
    for module in causal_lm.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, name
    raise CheckpointError(f"{type(causal_lm).__name__} has no list of {num_layers} decoder layers")


def _keep_ends(
    decoder: nn.Module,
    layers_name: str,
    embedding: nn.Module,
    part: Part,
    model_type: str,
) -> str | None:
    """Replace what belongs to an end that this part is not. Returns the final norm's name."""
    norm_name = None
    for name, child in list(decoder.named_children()):
        if name == layers_name or not list(child.parameters()):
            continue
        if child is embedding:
            if part != "head":
                setattr(decoder, name, nn.Identity())
        elif name in FINAL_NORMS:
            norm_name = name
            if part != "tail":
                setattr(decoder, name, nn.Identity())
        elif isinstance(child, nn.Embedding):  # learned positions
            if part != "head":
                setattr(decoder, name, Zeros())
        elif name == "project_in":  # OPT-350m: between the embeddings and the first layer
            if part != "head":
                decoder.project_in = None  # type: ignore[assignment]
        elif name == "project_out":
            if part != "tail":
                decoder.project_out = None  # type: ignore[assignment]
        else:
            raise CheckpointError(
                f"{model_type} models have a module {name!r} outside their layers, and midspan "
                "does not know on which side of a cut it belongs"
            )
    return norm_name


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in root.named_modules()}
    return names[id(wanted)]


def _load_weights(
    checkpoint: Checkpoint,
    causal_lm: Any,
    kept: nn.Module,
    prefix: str,
    layers_prefix: str,
    first_layer: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, int]:
    """Fill every parameter of `kept` from the checkpoint. Returns bytes by tensor name."""
    tied = getattr(causal_lm, "_tied_weights_keys", None) or {}
    stored_as = _map_stored_names(checkpoint, causal_lm)
    base_prefix = causal_lm.base_model_prefix + "."
    decoder_prefix = prefix or _name_of(causal_lm, _owner_of_layers(kept, layers_prefix)) + "."
    sources: dict[str, str] = {}  # by the parameter's name in `kept`
    for name, parameter in kept.named_parameters(remove_duplicate=False):
        full_name = _renumber(prefix + name, decoder_prefix + layers_prefix, first_layer)
        candidates = [full_name, full_name.removeprefix(base_prefix)]
        if full_name in tied and causal_lm.config.tie_word_embeddings:
            candidates += [tied[full_name], tied[full_name].removeprefix(base_prefix)]
        source = next((stored_as[c] for c in candidates if c in stored_as), None)
        if source is None:
            raise CheckpointError(f"{checkpoint.directory} has no tensor {full_name}")
        if checkpoint.shape(source) != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {source} has shape {checkpoint.shape(source)}; "
                f"its config.json needs {tuple(parameter.shape)}"
            )
        sources[name] = source
    tensors = checkpoint.read(sources.values(), dtype)
    for name, source in sources.items():
        owner, _, leaf = name.rpartition(".")
        weight = nn.Parameter(tensors[source].to(device), requires_grad=False)
        kept.get_submodule(owner)._parameters[leaf] = weight
    return {source: tensor.nbytes for source, tensor in tensors.items()}


def _map_stored_names(checkpoint: Checkpoint, causal_lm: Any) -> dict[str, str]:
    """The library's name of every tensor -> its name in the checkpoint, which may be older."""
    renamings = [
        transform
        for transform in get_model_conversion_mapping(causal_lm)
        if isinstance(transform, WeightRenaming)
    ]
    stored_as = {}
    for stored in checkpoint.tensor_names:
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        stored_as[name] = stored
    return stored_as


def _owner_of_layers(root: nn.Module, layers_prefix: str) -> nn.Module:
    name = layers_prefix.removesuffix(".")
    return next(m for m in root.modules() if isinstance(getattr(m, name, None), nn.ModuleList))


def _renumber(name: str, layers_prefix: str, first_layer: int) -> str:
    """`layers.0.x` in a span that begins at layer 2 is `layers.2.x` in the checkpoint."""
    if not name.startswith(layers_prefix):
        return name
    index, _, rest = name.removeprefix(layers_prefix).partition(".")
    return f"{layers_prefix}{int(index) + first_layer}.{rest}"


@torch.no_grad()
def _fill_buffers(
    causal_lm: Any, kept: nn.Module, device: torch.device | str, model_type: str
) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), as the library does."""
    for name, module in kept.named_modules():
        buffers = [b for b in module._buffers.values() if b is not None and b.is_meta]
        if not buffers:
            continue
        loaded = dict(module._parameters)
        for parameter_name, parameter in loaded.items():  # shielded from the library's initializer
            if parameter is not None:
                module._parameters[parameter_name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
        for buffer_name, buffer in module._buffers.items():
            if buffer is not None:
                nan = torch.nan if buffer.is_floating_point() else 0
                module._buffers[buffer_name] = torch.full_like(buffer, nan, device=device)
        causal_lm._init_weights(module)
        module._parameters.update(loaded)
        for buffer_name, buffer in module._buffers.items():
            if buffer is not None and not (
                buffer.is_floating_point() and torch.isfinite(buffer).all()
            ):
                raise CheckpointError(
                    f"{model_type} models have a buffer {name}.{buffer_name} that midspan "
                    "does not know how to fill"
                )


@torch.inference_mode()
def _check_identity(
    decoder: Any,
    layers_name: str,
    norm_name: str | None,
    config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Raise CheckpointError unless the span without layers and norm returns what it is given."""
    layers, num_layers = getattr(decoder, layers_name), config.num_hidden_layers
    norm = getattr(decoder, norm_name) if norm_name else None
    setattr(decoder, layers_name, nn.ModuleList())
    config.num_hidden_layers = 0
    if norm_name:
        setattr(decoder, norm_name, nn.Identity())
    project_out = getattr(decoder, "project_out", None)
    if project_out is not None:
        decoder.project_out = None
    rows = torch.linspace(-2, 2, 3 * config.hidden_size, dtype=dtype, device=device)
    rows = rows.view(1, 3, -1)
    positions = torch.arange(3, device=device)[None]
    output = decoder(inputs_embeds=rows, position_ids=positions, use_cache=False)
    setattr(decoder, layers_name, layers)
    config.num_hidden_layers = num_layers
    if norm_name:
        setattr(decoder, norm_name, norm)
    if project_out is not None:
        decoder.project_out = project_out
    if not torch.equal(output.last_hidden_state, rows):
        raise CheckpointError(
            f"{config.model_type} models change their hidden states outside their layers in a way "
            "that midspan does not know, so they cannot be cut"
        )
