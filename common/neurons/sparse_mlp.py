"""An MLP that has some of its neurons, and computes some of those.

Only its matrices are replaced; what lies between them is the library's own code, which treats each
neuron alone. The matrices agree for each batch on which neurons they mean (`Way`):

- ALL that are loaded: rows of prompts;
- ALWAYS: those that every token has, a prefix of the memory, so nothing is copied;
- OWN: these and the cores of a few sessions, whose weights are gathered once for each session;
- MASKED: all that are loaded, and what a session does not want is zero: for many sessions at once,
  and where some rows are of prompts. Reading the weights once for all is then the faster way.

Letters: T tokens (rows) of a batch, D hidden, M loaded neurons, A of them for every token, C of a
session's core.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from common.neurons.choice import LayerChoice
from common.neurons.core import count_votes, pick_core
from common.neurons.passing import NeuronPass, Passing, Run

# what a row's product with its own core takes, as a part of what one of many rows with as many
# neurons does: benchmarks/neurons.py, where up to seven sessions are faster with their own
OWN_COST = 0.55


class Way(Enum):
    """Which neurons a batch computes."""

    ALL = "all"
    ALWAYS = "always"
    OWN = "own"
    MASKED = "masked"


@dataclass(slots=True, eq=False)
class Core:
    """A session's own neurons in one layer, among those behind the first A."""

    votes: Tensor  # from which it was picked
    places: Tensor  # (C,), from 0 on for the neuron behind the first A
    left_out: Tensor  # bool (M - A,)
    gathered: list[tuple[Tensor, Tensor | None]] | None = None  # of each matrix, with its bias

    @property
    def size(self) -> int:
        """Bytes."""
        tensors = [self.left_out, self.places]
        for weight, _ in self.gathered or []:
            tensors.append(weight)
        return sum(tensor.nbytes for tensor in tensors)


class LayerNeurons:
    """The loaded neurons of one layer: what its matrices share."""

    def __init__(
        self, layer: int, choice: LayerChoice, token_sparsity: float, passing: Passing
    ) -> None:
        self.layer = layer
        self.always, self.core = len(choice.always), choice.core
        self.loaded = len(choice.ranks)
        self.matrices: list[LoadedInto | LoadedOut] = []
        self._token_sparsity = token_sparsity
        self._passing = passing
        self._ranks = torch.from_numpy(choice.ranks[self.always :])

    @property
    def others(self) -> int:
        """Loaded neurons that only some sessions compute: each has a number of votes."""
        return self.loaded - self.always

    @property
    def batch(self) -> NeuronPass:
        batch = self._passing.batch
        assert batch is not None
        return batch

    def way(self) -> Way:
        """How the batch that is on its way is computed."""
        batch = self._passing.batch
        if batch is None or not self.others:
            return Way.ALL
        if batch.has_prompt:
            return Way.MASKED
        if not self.core:
            return Way.ALWAYS
        own = self.always + OWN_COST * batch.sessions * self.core
        return Way.OWN if own <= self.loaded else Way.MASKED

    def cores(self) -> list[tuple[Run, Core]]:
        """Of each session of a batch without prompts, with its weights."""
        found = self.batch.cores.get(self.layer)
        if found is None:
            found = self.batch.cores[self.layer] = self._find_cores()
        return found

    def _find_cores(self) -> list[tuple[Run, Core]]:
        found = []
        for run in self.batch.runs():
            core = self.core_of(run.session)
            if core.gathered is None:
                core.gathered = [matrix.gather(core.places) for matrix in self.matrices]
                self.batch.states(run.session).note_core(self.layer, core)
            found.append((run, core))
        return found

    def core_of(self, session: int) -> Core:
        """A session's, picked anew if it has other votes than when it was."""
        states, votes = self.batch.states(session), self.votes_of(session)
        core = states.cores.get(self.layer)
        if not isinstance(core, Core) or core.votes is not votes:
            core = self._pick(votes)
            states.note_core(self.layer, core)
        return core

    def votes_of(self, session: int) -> Tensor:
        votes = self.batch.votes(session, self.layer)
        if votes is None:
            votes = self.no_votes()
            self.batch.put_votes(session, self.layer, votes)
        return votes

    def no_votes(self) -> Tensor:
        """Of a session that has seen no prompt."""
        return torch.zeros(self.others, dtype=torch.int32, device=self._ranks.device)

    def to(self, device: torch.device | str) -> None:
        self._ranks = self._ranks.to(device)

    def _pick(self, votes: Tensor) -> Core:
        places = pick_core(votes, self._ranks, self.core)
        left_out = torch.ones(self.others, dtype=torch.bool, device=votes.device)
        left_out[places] = False
        return Core(votes, places, left_out)

    def mask(self, values: Tensor) -> None:
        """Take the votes of rows of prompts, and set what other rows leave out to zero; (T, M)."""
        for run in self.batch.runs():
            own = values[run.place]
            if not run.of_prompt and self.core:
                own[:, self.always :].masked_fill_(self.core_of(run.session).left_out, 0)
            elif not run.of_prompt:
                own[:, self.always :] = 0
            elif self.core:
                votes = count_votes(own, self._token_sparsity)[self.always :]
                self.batch.put_votes(run.session, self.layer, self.votes_of(run.session) + votes)

    def mask_rows(self, values: Tensor) -> None:
        """The same for a batch of single rows of answers, in one go."""
        drop = torch.stack([self.core_of(n).left_out for n in range(self.batch.sessions)])
        values[:, self.always :].masked_fill_(drop, 0)


class LoadedInto(nn.Module):
    """A matrix into the loaded neurons, (M, D): rows (…, D) to the values of some of them."""

    def __init__(self, neurons: LayerNeurons, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # plain attributes: filled already
        self._neurons = neurons
        self._number = len(neurons.matrices)
        neurons.matrices.append(self)

    def forward(self, rows: Tensor) -> Tensor:
        neurons, always = self._neurons, self._neurons.always
        way = neurons.way()
        if way in (Way.ALL, Way.MASKED):
            return linear(rows, self.weight, self.bias)
        bias = None if self.bias is None else self.bias[:always]
        first = linear(rows, self.weight[:always], bias)
        return first if way is Way.ALWAYS else self._append_cores(rows, first)

    def _append_cores(self, rows: Tensor, first: Tensor) -> Tensor:
        """The values of each session's core behind those that all have, (…, A + C)."""
        cores = self._neurons.cores()
        if len(cores) == 1:
            return torch.cat([first, linear(rows, *self._own(cores[0][1]))], dim=-1)
        flat = rows.reshape(-1, rows.shape[-1])
        own = torch.cat([linear(flat[run.place], *self._own(core)) for run, core in cores])
        return torch.cat([first, own.view(*rows.shape[:-1], -1)], dim=-1)

    def _own(self, core: Core) -> tuple[Tensor, Tensor | None]:
        assert core.gathered is not None
        return core.gathered[self._number]

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of neurons behind the first A."""
        always = self._neurons.always
        bias = None if self.bias is None else self.bias[always:].index_select(0, places)
        return self.weight[always:].index_select(0, places), bias


class LoadedOut(nn.Module):
    """The matrix out of the loaded neurons, stored as (M, D): values (…, K) to rows (…, D)."""

    def __init__(self, neurons: LayerNeurons, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._neurons = neurons
        self._number = len(neurons.matrices)
        neurons.matrices.append(self)

    def forward(self, values: Tensor) -> Tensor:
        neurons = self._neurons
        flat = values.reshape(-1, values.shape[-1])
        match neurons.way():
            case Way.ALL:
                rows = flat @ self.weight
            case Way.ALWAYS:
                rows = flat @ self.weight[: neurons.always]
            case Way.MASKED:
                self._mask(flat)
                rows = flat @ self.weight
            case Way.OWN:
                rows = self._add_cores(flat)
        if self.bias is not None:
            rows = rows + self.bias
        return rows.view(*values.shape[:-1], -1)

    def _mask(self, values: Tensor) -> None:
        neurons = self._neurons
        is_single = len(values) == neurons.batch.sessions and not neurons.batch.has_prompt
        if is_single and neurons.core:
            neurons.mask_rows(values)
        else:
            neurons.mask(values)

    def _add_cores(self, values: Tensor) -> Tensor:
        always = self._neurons.always
        rows = values[:, :always] @ self.weight[:always]
        for run, core in self._neurons.cores():
            assert core.gathered is not None
            rows[run.place] += values[run.place, always:] @ core.gathered[self._number][0]
        return rows

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of neurons behind the first A, as rows."""
        return self.weight[self._neurons.always :].index_select(0, places), None
