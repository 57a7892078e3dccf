"""Run some of a model's layers inside the model's own forward.

A part keeps the whole model, so that each of its layers has its own index and the configuration
stays true. The layers of other parts are hollow: they hand on what they are given. Boundary rows
enter at the part's first layer, in place of whatever came to it, and leave behind its last. So what
the model does before its first layer counts in the head alone, what it does after its last in the
tail alone, and midspan need not know what that is.

Which modules run before, and which after, a rehearsal shows: the model runs once on the CPU with
all its layers hollow and a stand-in for every other module that has weights.

Letters: T tokens (rows), D width of a row.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, in_one_line
from common.spans.cut import Span

TOKENS = 11  # of the rehearsal; no model has another axis of this size
# what a model's loop takes from a layer: the rows, or a tuple that begins with them
FORMS: tuple[Callable[[Any], Any], ...] = (
    lambda rows: rows,
    lambda rows: (rows,),
    lambda rows: (rows, None),
    lambda rows: (rows, None, None),
)


@dataclass(frozen=True, slots=True)
class BoundaryShape:
    """What crosses a layer's border: `around` without the tokens, whose axis is `axis`."""

    axis: int
    around: tuple[int, ...]

    @property
    def width(self) -> int:
        return math.prod(self.around)

    def flatten(self, states: Tensor) -> Tensor:
        """A layer's states to boundary rows, (T, D)."""
        return states.movedim(self.axis, 0).reshape(states.shape[self.axis], -1)

    def restore(self, rows: Tensor) -> Tensor:
        """Boundary rows (T, D) to what a layer takes."""
        return rows.reshape(rows.shape[0], *self.around).movedim(0, self.axis)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a model does outside its layers, by the names of its modules."""

    before: frozenset[str]  # those that have weights
    after: frozenset[str]
    ran: frozenset[str]  # all that took part; others are for pictures and sounds
    boundary: BoundaryShape
    form: Callable[[Any], Any]


class _Passing(threading.local):
    """What is on its way through a gate, in each thread's own pass."""

    entering: Tensor | None = None
    left: Tensor | None = None


class Gate:
    """Where boundary rows pass into a part and out of it.

    The library's forward has no argument that would carry them.
    """

    def __init__(self, boundary: BoundaryShape) -> None:
        self.boundary = boundary
        self._passing = _Passing()

    def enter(self, rows: Tensor) -> None:
        """This thread's next pass goes on with these rows (T, D) at the part's first layer."""
        self._passing.entering = self.boundary.restore(rows)

    def take(self) -> Tensor:
        """The rows (T, D) that this thread's last pass left behind the part's last layer."""
        states, self._passing.left = self._passing.left, None
        assert states is not None, "the model has not passed the gate"
        return self.boundary.flatten(states)

    def put_before(self, layer: nn.Module) -> None:
        """Let rows enter in front of a layer."""
        inner = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            states, self._passing.entering = self._passing.entering, None
            if states is None:
                return inner(*args, **kwargs)
            if args:
                return inner(states, *args[1:], **kwargs)
            return inner(**kwargs | {"hidden_states": states})

        layer.forward = forward

    def put_behind(self, layer: nn.Module) -> None:
        """Let rows leave behind a layer."""
        inner = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self._passing.left = result[0] if isinstance(result, tuple) else result
            return result

        layer.forward = forward


def rehearse(causal_lm: Any, layers: nn.ModuleList) -> Rehearsal:
    """Run a model that is on the meta device, without its weights.

    Buffers outside the layers must have been filled. Raises CheckpointError if it cannot be run.
    """
    error: Exception | None = None
    for form in FORMS:
        try:
            with (
                _noting_names(causal_lm, layers) as ran,
                _only_stand_ins(causal_lm, layers, form) as (before, after, shapes),
            ):
                arguments = choose_arguments(causal_lm, TOKENS) | {"use_cache": False}
                output = causal_lm(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), **arguments)
            if output.logits.shape[:-1] == (1, TOKENS):
                ran += before + after
                return Rehearsal(
                    frozenset(before), frozenset(after), frozenset(ran), _boundary(shapes), form
                )
        except Exception as caught:  # whatever a foreign model's code raises
            error = error or caught
    what = in_one_line(error) if error else "its layers give something else than rows"
    raise CheckpointError(
        f"{causal_lm.config.model_type} models do something outside their layers that midspan does "
        f"not know, so they cannot be cut: {what}"
    )


def choose_arguments(model: Any, rows: int, start: int = 0) -> dict[str, Any]:
    """Those of the usual arguments of a forward that a model takes."""
    positions = torch.arange(start, start + rows)[None]
    return {"position_ids": positions} if takes(model, "position_ids") else {}


def takes(model: Any, name: str) -> bool:
    """Whether a model's forward, or the one it hands its further arguments to, names this one."""
    names = inspect.signature(type(model).forward).parameters
    if name in names:
        return True
    hands_on = any(p.kind is p.VAR_KEYWORD for p in names.values())
    base = getattr(model, "base_model", model)
    return hands_on and base is not model and takes(base, name)


def name_cache(model: Any) -> str:
    """What a model's forward calls its cache."""
    names = ("past_key_values", "cache_params")  # the second in models of state spaces alone
    return next((name for name in names if takes(model, name)), names[0])


def make_part(
    causal_lm: Any,
    layers: nn.ModuleList,
    span: Span,
    part: str,
    rehearsal: Rehearsal,
    device: torch.device | str,
) -> Gate:
    """Hollow out all of a model that is not of this part. What is left on meta is to be filled."""
    kept: frozenset[str] = frozenset()
    if part == "head":
        kept |= rehearsal.before
    if part == "tail":
        kept |= rehearsal.after
    for name, module in outside(causal_lm, layers):
        holds_one = any(_is_within(other, {name}) for other in rehearsal.ran)
        if not holds_one and not _is_within(name, rehearsal.ran):
            _strip(module, device)
    for name, module in weighted_modules(causal_lm, layers):
        if not _is_within(name, kept):
            module.forward = _stand_in(module)
            _strip(module, device)
    for index, layer in enumerate(layers):
        if not span.first <= index < span.last:
            layer.forward = _hollow(rehearsal.form)
            for module in layer.modules():
                _strip(module, device)
    gate = Gate(rehearsal.boundary)
    if part != "head":
        gate.put_before(layers[min(span.first, len(layers) - 1)])
    if part != "tail":
        gate.put_behind(layers[max(span.last - 1, 0)])
        del layers[max(span.last, 1) :]
    return gate


def weighted_modules(root: nn.Module, layers: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """The modules outside the layers that have weights of their own."""
    return [
        (name, module)
        for name, module in outside(root, layers)
        if any(parameter is not None for parameter in module._parameters.values())
    ]


def outside(root: nn.Module, layers: nn.ModuleList) -> list[tuple[str, nn.Module]]:
    """The modules outside the layers, by name."""
    inside = {id(module) for module in layers.modules()}
    return [(name, module) for name, module in root.named_modules() if id(module) not in inside]


def _is_within(name: str, roots: Set[str]) -> bool:
    """Whether a module is one of these or a part of one, which has run where that ran."""
    return any(not root or name == root or name.startswith(f"{root}.") for root in roots)


@contextmanager
def _noting_names(root: nn.Module, layers: nn.ModuleList) -> Iterator[list[str]]:
    """The names of the innermost modules outside the layers that are called."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in outside(root, layers)
        if not any(True for _ in module.children())
    ]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only_stand_ins(
    causal_lm: Any, layers: nn.ModuleList, form: Callable[[Any], Any]
) -> Iterator[tuple[list[str], list[str], list[Sequence[int]]]]:
    """Names of the stand-ins that run before and after the layers, and the shapes of the states."""
    before: list[str] = []
    after: list[str] = []
    shapes: list[Sequence[int]] = []
    weighted = weighted_modules(causal_lm, layers)
    weights = [(module, dict(module._parameters)) for _, module in weighted]
    for name, module in weighted:
        inner = _stand_in(module)
        module._parameters.update(_placeholders(module, "cpu"))
        module.forward = _noted(inner, name, lambda: after if shapes else before)
    for layer in layers:
        layer.forward = _hollow(form, shapes)
    try:
        yield before, after, shapes
    finally:
        for module in [*(module for _, module in weighted), *layers]:
            module.__dict__.pop("forward", None)
        for module, parameters in weights:
            module._parameters.update(parameters)


def _noted(
    inner: Callable[..., Any], name: str, where: Callable[[], list[str]]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        where().append(name)
        return inner(*args, **kwargs)

    return forward


def _hollow(
    form: Callable[[Any], Any], shapes: list[Sequence[int]] | None = None
) -> Callable[..., Any]:
    """The forward of a layer that hands on what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if shapes is not None:
            shapes.append(tuple(states.shape))
        return form(states)

    return forward


def _stand_in(module: nn.Module) -> Callable[..., Tensor]:
    """A forward that gives zeros of the shape that the module's own would.

    Embeddings that are given something else than ids (OPT's positions, a mask of all the text) give
    what can be added to any rows.
    """
    dtype = next(p.dtype for p in module._parameters.values() if p is not None)
    width = getattr(module, "embedding_dim", None) or getattr(module, "out_features", None)
    width = width or getattr(module, "nf", None)
    takes_ids = next(iter(inspect.signature(module.forward).parameters)) in ("input", "input_ids")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given: Tensor = next(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
        if isinstance(module, nn.Embedding):
            shape = (*given.shape, width) if takes_ids else (1, 1, width)
        else:
            shape = (*given.shape[:-1], width or given.shape[-1])
        return torch.zeros(shape, dtype=dtype, device=given.device)

    return forward


def forget_parameters(module: nn.Module, device: torch.device | str) -> None:
    """What is left of a module's own parameters says type and place, and has no values."""
    module._parameters.update(_placeholders(module, device))


def _strip(module: nn.Module, device: torch.device | str) -> None:
    """Forget a module's weights and buffers."""
    forget_parameters(module, device)
    module._buffers.update(dict.fromkeys(module._buffers))


def _placeholders(module: nn.Module, device: torch.device | str) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.empty(0, dtype=p.dtype, device=device), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    }


def _boundary(shapes: list[Sequence[int]]) -> BoundaryShape:
    shape = list(shapes[0])
    if TOKENS not in shape:
        raise CheckpointError(f"its layers take {shape}, which are not rows of tokens")
    axis = shape.index(TOKENS)
    return BoundaryShape(axis, tuple(shape[:axis] + shape[axis + 1 :]))
