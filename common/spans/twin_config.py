"""A model's configuration made small: the same class and the same switches, few narrow layers.

What a configuration calls its sizes is known by name, for no two families agree. Which kinds of
layer a family has (by lists, by intervals, or "the first three are dense") is not read from the
configuration but seen on the model itself, built on the meta device: a layer's kind is its modules,
the shapes of their parameters and their own switches. Whoever builds the small model checks that
it has every kind.

Numbers with a fraction do not make a kind, or a constant that changes from layer to layer would
make each layer a kind of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn

from common.errors import CheckpointError

HEADS, HEAD_SIZE, WIDTH, VOCABULARY = 4, 16, 32, 128
EXPERTS, CHOSEN = 8, 2
WINDOW = 5  # tokens; fewer than the check's prompt has, so that windows are felt
POSITIONS = 256  # tokens; learned positions are a table
AS_IT_IS = 1 << 62
KV_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_head_kv"}
ROTATED_PARTS = ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_pct")
# what the name of a whole number ends with -> the largest value that is kept; the first that fits
LIMITS = [
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"vocab_size", VOCABULARY),
        (r"(_token_id|_token_index)$", VOCABULARY - 1),
        (r"(sliding_window(_size)?|window_size|attention_chunk_size)$", WINDOW),
        (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?)$", POSITIONS),
        (r"(experts_per_tok(en)?|top_?k|topk_experts|^n_group|^num_expert_group)$", CHOSEN),
        (r"^topk_group$", 1),
        (r"^(num|n|num_local|n_routed|num_routed|moe_num)_experts$", EXPERTS),
        (r"(rotary_dim|rope_head_dim)$", HEAD_SIZE // 2),
        (r"(head_dim|head_size)$", HEAD_SIZE),
        (r"(kernel|patch|group|block|chunk)_size$", AS_IT_IS),
        (r"(_size|_dim|_inner|_rank|_width)$|^dim_", WIDTH),
    )
]
# heads of a state space, their size, and by how much all are wider than the model
MIXERS = (
    ("num_heads", "head_dim", "expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
)
UNTOUCHED = {"rope_parameters", "rope_scaling", "id2label", "label2id", "per_layer_config"}
EXCEPTIONS = "per_layer_config"  # what single layers have otherwise, by index
LAYER_LIST = "layers_block_type"  # says how many there are where no number does
LAYER_INDICES = re.compile(r"(layers|layer_ids|idxs|indices|layer_idx)$")
# says where a layer is, or of how many, not what it is
INDEX_NAME = re.compile(r"(^|_)(idx|id|index|number|layers)$")

Values = dict[str, Any]
Kind = Hashable


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that depend on each other."""

    heads: int
    hidden: int
    head_size: int


def narrow(config: Any) -> Values:
    """A configuration's values with narrow layers, as many as there were.

    Raises CheckpointError for a configuration whose sizes are not known.
    """
    values: Values = copy.deepcopy(config.to_dict())
    old = _read_sizes(config)
    new = _choose_sizes(old, values)
    names = config.attribute_map
    exact = {
        names.get("num_attention_heads", "num_attention_heads"): new.heads,
        names.get("hidden_size", "hidden_size"): new.hidden,
    }
    if values.get("head_dim") == old.head_size:
        exact["head_dim"] = new.head_size
    small = _limit_all(values, exact, old, new)
    if isinstance(values.get(EXCEPTIONS), dict):
        small[EXCEPTIONS] = _narrow_exceptions(values, small)
    for rope in _ropes(small):
        _shorten_factors(rope, new.head_size)
    if "qk_rope_head_dim" in small and "qk_nope_head_dim" in small:
        _agree_on_split_heads(values, small)
    _agree_on_mixers(values, small, old, new)
    return small


def layers_name(config: Any) -> str:
    """What the configuration itself calls its number of layers."""
    name: str = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return name


def keep_layers(values: Values, name: str, kept: Sequence[int]) -> Values:
    """The same configuration with these layers only, by its lists of and about layers."""
    count = values.get(name) or len(values[LAYER_LIST])
    cut = {key: _keep_in(key, value, kept, count) for key, value in values.items()}
    if isinstance(values.get(EXCEPTIONS), dict):
        given = {int(index): value for index, value in values[EXCEPTIONS].items()}
        cut[EXCEPTIONS] = {new: given[old] for new, old in enumerate(kept) if old in given}
    if "attention_types" in cut and "attention_layers" in cut:  # GPT-Neo says it twice
        cut["attention_types"] = [[cut["attention_layers"], 1]]
    return cut | ({name: len(kept)} if name in values else {})


def _keep_in(name: str, value: Any, kept: Sequence[int], count: int) -> Any:
    if not isinstance(value, list) or name.endswith("_token_id"):
        return value
    if LAYER_INDICES.search(name) and _are_indices(value, count):
        return [new for new, old in enumerate(kept) if old in value]
    return [value[index] for index in kept] if len(value) == count else value


def _are_indices(values: list[Any], count: int) -> bool:
    """Whether a list names layers, rather than saying something of each: `moe_layers`."""
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < count for v in values):
        return False
    return values == sorted(set(values))


def pick_layers(kinds: Sequence[Kind], count: int) -> list[int]:
    """`count` layers: the first and the last of each kind as far as they go, then the earliest."""
    first: dict[Kind, int] = {}
    last: dict[Kind, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
        last[kind] = index
    order = [*first.values(), *last.values(), *range(len(kinds))]
    return sorted(list(dict.fromkeys(order))[:count])


def kind_of(layer: nn.Module) -> Kind:
    """What tells one kind of layer from another: modules, shapes, and what they were told."""
    return tuple(
        (name, type(module).__name__, _shapes(module), _switches(module))
        for name, module in layer.named_modules()
    )


def _shapes(module: nn.Module) -> Kind:
    return tuple((n, tuple(p.shape)) for n, p in module._parameters.items() if p is not None)


def _switches(module: nn.Module) -> Kind:
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | str | None) and not INDEX_NAME.search(name)
    )


def _read_sizes(config: Any) -> Sizes:
    heads = _read(config, "num_attention_heads")
    hidden = _read(config, "hidden_size")
    if heads is None and _is_count(hidden) and set(_layer_types(config)) == {"linear_attention"}:
        return Sizes(1, hidden, hidden)
    if not _is_count(heads) or not _is_count(hidden):
        raise CheckpointError(
            f"{config.model_type} models cannot be checked: their configuration gives no single "
            f"number of attention heads or no width, but {heads!r} and {hidden!r}"
        )
    head_size = _read(config, "head_dim")
    return Sizes(heads, hidden, head_size if _is_count(head_size) else hidden // heads)


def _layer_types(config: Any) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _read(config: Any, name: str) -> Any:
    """A value of a configuration, also where layers may have values of their own."""
    values = config.to_dict()
    if values.get(EXCEPTIONS):  # then the attribute is refused, for it is not that of all layers
        return values.get(config.attribute_map.get(name, name))
    return getattr(config, name, None)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _choose_sizes(old: Sizes, values: Values) -> Sizes:
    """At most four heads. Heads that do not add up to the width keep on not doing so."""
    if old.heads <= HEADS and old.hidden <= HEADS * HEAD_SIZE:
        return old
    size = HEAD_SIZE
    while size < old.head_size and not _rotates_pairs(size, values):
        size += 2
    adds_up = old.heads * old.head_size == old.hidden
    return Sizes(HEADS, HEADS * size if adds_up else HEADS * size * 3 // 4, size)


def _rotates_pairs(size: int, values: Values) -> bool:
    """Whether the rotated part of a head of this size is a whole number of pairs."""
    rope = values.get("rope_parameters") or {}
    parts = [places.get(name) for places in (values, rope) for name in ROTATED_PARTS]
    rotated = [int(size * part) for part in parts if isinstance(part, float)]
    return all(count >= 2 and count % 2 == 0 for count in rotated)


def _narrow_exceptions(values: Values, small: Values) -> Values:
    """What single layers have of their own: the same as the others' or, if it is not, twice that.

    Those that the narrow model would have alike keep on being unlike.
    """
    narrowed = {}
    for index, own in values[EXCEPTIONS].items():
        narrowed[index] = {
            name: small[name] * (1 if value == values[name] else 2)
            for name, value in own.items()
            if _is_count(value) and _is_count(small.get(name))
        }
    return narrowed


def _ropes(values: Values) -> list[Values]:
    """Rope parameters of a configuration: of all layers, or by their type."""
    ropes = [values.get(name) for name in ("rope_parameters", "rope_scaling")]
    found = [rope for rope in ropes if isinstance(rope, dict)]
    return found + [part for rope in found for part in rope.values() if isinstance(part, dict)]


def _shorten_factors(rope: Values, head_size: int) -> None:
    """A factor for each rotated pair, of a narrower head."""
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            part = rope.get("partial_rotary_factor") or 1.0
            rope[name] = rope[name][: int(head_size * part) // 2]


def _limit_all(values: Values, exact: dict[str, int], old: Sizes, new: Sizes) -> Values:
    small: Values = {}
    for name, value in values.items():
        if name in UNTOUCHED:
            small[name] = value
        elif isinstance(value, dict):
            small[name] = _limit_all(value, exact, old, new)
        elif isinstance(value, list) and name.endswith("_token_id"):
            small[name] = [_limit(name, item, old, new) for item in value]
        elif name in exact and _is_count(value):
            small[name] = exact[name]
        else:
            small[name] = _limit(name, value, old, new)
    return small


def _limit(name: str, value: Any, old: Sizes, new: Sizes) -> Any:
    if not _is_count(value):
        return value
    if name in KV_HEADS:
        return _kv_heads(value, old, new)
    limit = next((limit for pattern, limit in LIMITS if pattern.search(name)), AS_IT_IS)
    if value == old.hidden and limit == WIDTH:
        return new.hidden
    return min(value, limit)


def _kv_heads(count: int, old: Sizes, new: Sizes) -> int:
    """Keys and values have as many heads as queries, one, or one for a few of them."""
    if old == new or count == 1:
        return count
    return new.heads if count == old.heads else new.heads // 2


def _agree_on_mixers(values: Values, small: Values, old: Sizes, new: Sizes) -> None:
    """The heads of a state space are as wide as all of it, where they were."""
    for heads, size, factor in MIXERS:
        if not all(_is_count(values.get(name)) for name in (heads, size, factor)):
            continue
        if values[heads] * values[size] == values[factor] * old.hidden:
            small[size] = min(values[size], HEAD_SIZE)
            small[heads] = small[factor] * new.hidden // small[size]


def _agree_on_split_heads(values: Values, small: Values) -> None:
    """Where a head has a rotated and a plain part, other names say their sum or one of them."""
    rotated, plain = values["qk_rope_head_dim"], values["qk_nope_head_dim"]
    new_rotated, new_plain = small["qk_rope_head_dim"], small["qk_nope_head_dim"]
    sums = {rotated + plain: new_rotated + new_plain, rotated: new_rotated}
    for name in ("qk_head_dim", "head_dim"):
        if values.get(name) in sums:
            small[name] = sums[values[name]]
