"""Compute the buffers that no checkpoint holds (rotary frequencies, masks), as the library does.

A model that is built on the meta device has none of them; the library fills them with the code that
also draws initial weights. So that code runs with a module's weights hidden, and twice, over
different values: what is the same both times was filled. What it does not fill may have been
computed as the model was built (common/weights/shapes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError
from common.weights.shapes import COMPUTED


@torch.no_grad()
def fill_buffers(
    causal_lm: Any,
    modules: Iterable[tuple[str, nn.Module]],
    device: torch.device | str,
    leave_unknown: bool = False,
) -> None:
    """Fill the empty buffers of some modules.

    One that the library does not fill stays on the meta device, or raises CheckpointError.
    """
    for name, module in modules:
        computed = module.__dict__.get(COMPUTED, {})
        if not leave_unknown:  # nobody asks again
            module.__dict__.pop(COMPUTED, None)
        empty = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not empty:
            continue
        once, again = (_fill(causal_lm, module, empty, device, value) for value in (0, 1))
        for buffer_name in empty:
            if _equal(once[buffer_name], again[buffer_name]):
                continue
            if buffer_name in computed:
                module._buffers[buffer_name] = computed[buffer_name].to(device)
                continue
            module._buffers[buffer_name] = torch.empty_like(once[buffer_name], device="meta")
            if not leave_unknown:
                raise CheckpointError(
                    f"{causal_lm.config.model_type} models have a buffer {name}.{buffer_name} that "
                    "midspan does not know how to fill"
                )


def move_buffers(root: nn.Module, device: torch.device | str) -> None:
    """Those that a rehearsal needed have been filled on the CPU."""
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _fill(
    causal_lm: Any, module: nn.Module, empty: list[str], device: torch.device | str, value: int
) -> dict[str, Tensor]:
    """The module's buffers after the library's initializer has gone over them."""
    others = {n: b for n, b in module._buffers.items() if n not in empty}
    for name in empty:
        buffer = module._buffers[name]
        assert buffer is not None
        shape, dtype = buffer.shape, buffer.dtype
        module._buffers[name] = torch.full(shape, value, dtype=dtype, device=device)
    with _weights_hidden(module):
        causal_lm._init_weights(module)
    module._buffers.update(others)
    return {name: buffer for name in empty if (buffer := module._buffers[name]) is not None}


@contextmanager
def _weights_hidden(root: nn.Module) -> Iterator[None]:
    """Empty parameters in the place of those of a module and of what is in it."""
    hidden = [(module, dict(module._parameters)) for module in root.modules()]
    for module, parameters in hidden:
        for name, parameter in parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for module, parameters in hidden:
            module._parameters.update(parameters)
