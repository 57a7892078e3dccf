"""Make a model's drafters of texts that it writes itself, and measure them on some held out.

What a drafter should know is what this model would say, not what others have written: a table of
half a million tokens of stories guessed 4.4 tokens a round trip of the demo model, one of a fifth
as many of its own 5.6. So the text of a user gives beginnings only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from common.errors import SettingsError
from edge_agent.text.drafting.choice import DraftFiles, Kind, why_no_layer
from edge_agent.text.drafting.layer_model import LayerModel, shape_for
from edge_agent.text.drafting.ngram_table import NgramTable, build_table
from edge_agent.text.ends import load_ends
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.drafting.held_out import know_texts, measure_drafter
from evaluation.drafting.layer_training import TrainingSettings, train_layer
from evaluation.drafting.whole_model import WholeModel
from evaluation.texts import read_prompts

BEGINNING = 24  # tokens of a text that the model goes on from
TEXT = 256  # tokens of it in all, at most
AT_ONCE = 64  # texts that are written in a batch
HELD_OUT = 20  # one text in so many
MEASURED = 20  # held-out texts at most
LIMITS = (4, 8)  # drafts at once


class Workshop:
    """One model at one cut. Raises CheckpointError or SettingsError."""

    def __init__(self, directory: Path, span_text: str | None, wants_layer: bool) -> None:
        self.ends = load_ends(directory, span_text)
        reason = why_no_layer(self.ends)
        if wants_layer and reason is not None:
            raise SettingsError(f"no layer can draft for {self.ends.name}: {reason}; --kind ngram")
        self._model = WholeModel(directory, self.ends.cut)

    def read_beginnings(
        self, text: Path, documents: bool, count: int, seed: int
    ) -> list[list[int]]:
        """Up to `count` of a text, drawn. Raises SettingsError for a text that has too few."""
        tokenizer = TextTokenizer(self.ends.directory)
        prompts = read_prompts(text, tokenizer, documents, BEGINNING)
        whole = [prompt for prompt in prompts if len(prompt) == BEGINNING]
        if len(whole) < HELD_OUT:
            raise SettingsError(
                f"--text {text} has {len(whole)} beginnings of {BEGINNING} tokens; "
                f"at least {HELD_OUT} are needed"
            )
        random.Random(seed).shuffle(whole)
        return whole[:count]

    def write_texts(
        self, beginnings: Sequence[list[int]], on_written: Callable[[int], None]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Beginnings and what the model says after them: to learn from, and held out."""
        texts: list[list[int]] = []
        room = min(TEXT, self.ends.context or TEXT) - BEGINNING
        for at in range(0, len(beginnings), AT_ONCE):
            batch = beginnings[at : at + AT_ONCE]
            answers = self._model.write(batch, room, self.ends.eos_ids)
            texts += [[*prompt, *answer] for prompt, answer in zip(batch, answers, strict=True)]
            on_written(len(batch))
        held_out = texts[::HELD_OUT][:MEASURED]
        del texts[::HELD_OUT]
        return texts, held_out

    def make_table(self, texts: Sequence[list[int]]) -> NgramTable:
        pairs = [(text[:-1], text[1:]) for text in texts]
        return build_table(pairs, self.ends.vocabulary)

    def train(
        self,
        texts: Sequence[list[int]],
        steps: int,
        seed: int,
        on_step: Callable[[], None],
    ) -> LayerModel:
        torch.manual_seed(seed)
        layer = LayerModel(shape_for(self.ends.hidden))
        settings = TrainingSettings(steps=steps, seed=seed)
        train_layer(layer, self._model, texts, settings, lambda _: on_step())
        return layer.requires_grad_(False).eval()

    def measure(
        self, table: NgramTable | None, layer: LayerModel | None, held_out: Sequence[list[int]]
    ) -> list[tuple[str, float, float]]:
        """By kind of drafter: tokens per round trip with the numbers of drafts in LIMITS.

        Without auto, which does what the time of a round trip makes worth while.
        """
        kinds: dict[Kind, bool] = {
            "lookup": True, "ngram": table is not None, "model": layer is not None,
        }  # fmt: skip
        known = know_texts(self._model, held_out, BEGINNING)
        rows: list[tuple[str, float, float]] = []
        for kind in [kind for kind, is_there in kinds.items() if is_there]:
            files = DraftFiles(kind, table, layer)
            few, many = (
                round(measure_drafter(files.open, self.ends, known, limit), 2) for limit in LIMITS
            )
            rows.append((kind, few, many))
        return rows
