"""Where the MLP of a layer is: the matrices into its neurons, and the one out of them.

A neuron is a row of the former and a column of the latter, and between them each neuron is on its
own: an activation, or one that is multiplied with another. So neurons may be left out, and stand in
any order. Known are the names that families give to plain linear layers which do just that;
experts, matrices that are stored transposed or as one, and norms between them are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from common.errors import CheckpointError

KNOWN = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, …
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),  # OPT has them in the layer itself
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon
)


@dataclass(frozen=True, slots=True)
class Mlp:
    """The matrices of one layer. `owner` is where they are in it."""

    owner: str
    into_names: tuple[str, ...]
    out_name: str
    width: int  # neurons

    def name(self, matrix: str) -> str:
        """A matrix's name in the layer."""
        return f"{self.owner}.{matrix}" if self.owner else matrix

    def into(self, layer: nn.Module) -> list[nn.Linear]:
        """Those that give the neurons' values, of shape (width, hidden)."""
        return [_linear(layer, self.name(name)) for name in self.into_names]

    def out(self, layer: nn.Module) -> nn.Linear:
        """The one that takes them, of shape (hidden, width)."""
        return _linear(layer, self.name(self.out_name))


def find_mlp(layer: nn.Module, index: int) -> Mlp:
    """Raises CheckpointError for a layer without an MLP that is known."""
    names = [name for name, _ in layer.named_modules()]
    if any("experts" in name.rpartition(".")[2] for name in names):
        raise CheckpointError(f"layer {index} has experts; neurons are chosen in plain MLPs only")
    found = list(_find_all(layer))
    if len(found) != 1:
        raise CheckpointError(
            f"layer {index} has {len(found)} MLPs of linear layers that are known by name "
            f"({', '.join(into[0] for into, _ in KNOWN)}); expected one"
        )
    return found[0]


def _find_all(layer: nn.Module) -> Iterator[Mlp]:
    for owner, module in layer.named_modules():
        children = dict(module.named_children())
        for into_names, out_name in KNOWN:
            matrices = [children.get(name) for name in (*into_names, out_name)]
            if all(isinstance(matrix, nn.Linear) for matrix in matrices):
                *into, out = (matrix for matrix in matrices if isinstance(matrix, nn.Linear))
                others = [name for name, _ in module.named_parameters()]
                known = tuple(f"{name}." for name in (*into_names, out_name))
                fits = {matrix.out_features for matrix in into} == {out.in_features}
                if fits and (not owner or all(name.startswith(known) for name in others)):
                    yield Mlp(owner, into_names, out_name, out.in_features)
                break


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
