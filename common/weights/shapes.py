"""Build a model's modules with shapes and without values.

That is what torch's meta device is for. But what torch computes on it is in part its compiler's
(two seconds and a hundred megabytes): the drawing of weights, which goes nowhere, and rotary
frequencies. So only what is made empty, as all large weights are, is made on the meta device, and
nothing is drawn; the rest is computed like any tensor, and loses its values at the end, those of
buffers to a place of their own. Where the two meet in a way that torch refuses, everything is on
the meta device after all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

COMPUTED = "computed_buffers"  # of a module: those that were made as it was built, by name
DRAWN = {
    "kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_",
    "xavier_normal_", "xavier_uniform_",
}  # fmt: skip


def build_without_values(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, with all that it has on the meta device."""
    try:
        with _EmptyIsMeta():
            module = build()
    except Exception:  # what is wrong with the model is said again
        with torch.device("meta"):
            return build()
    _forget_values(module)
    return module


class _EmptyIsMeta(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is torch.empty and named.get("device") is None:
            return func(*args, **{**named, "device": "meta"})
        if getattr(func, "__name__", "") in DRAWN:
            tensor: Tensor = named["tensor"] if "tensor" in named else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **named)


@torch.no_grad()
def _forget_values(model: nn.Module) -> None:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not weight.is_meta:
                module._parameters[name] = nn.Parameter(weight.to("meta"), weight.requires_grad)
        computed = {}
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if not buffer.is_meta:
                    computed[name] = buffer
                module._buffers[name] = buffer.to("meta")
        if computed:
            module.__dict__[COMPUTED] = computed
