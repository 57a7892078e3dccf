"""What drafting brings: tokens per round trip, and tokens/s against not drafting and `generate`.

    python benchmarks/round_trips.py [--tokens 128] [--prompts 6] [--json]

Three kinds of text. Stories are what the demo model was trained on, with beginnings that it was
not. Texts that it has never seen are this project's documentation. Copies are written by models
that are made on the spot, of the demo model's shape and of one with 56 M parameters: they compute
as others do, and say their prompt again with one token in twenty another one.

All ways write on from the same prompts, one after another, in this one call, with one thread for
each process: `generate` unsplit, `generate(prompt_lookup_num_tokens=8)`, and split over loopback
with each drafter. Medians over prompts; tokens/s are without the prompt's step. `same` says whether
all tokens were those that are written without guesses.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from overhead import make_model
from report import tell_rows
from transformers import AutoConfig, AutoModelForCausalLM

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.weights.demo_model import find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.drafting.choice import Drafters, Kind
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

EDITED = 0.05  # of the tokens of a copy
COPIED = 300  # tokens
BEGINNING = 12  # tokens of a story, or of what was never seen
LOOKUP = 8  # guesses of generate's own
GENERATE, GENERATE_LOOKUP = "generate", f"generate, lookup of {LOOKUP}"


@dataclass(slots=True)
class Measured:
    """One way of writing the prompts of one kind."""

    tokens_per_s: list[float] = field(default_factory=list)
    tokens: int = 0
    round_trips: int = 0
    drafted: int = 0
    accepted: int = 0
    same: bool = True

    @property
    def per_trip(self) -> float:
        return self.tokens / self.round_trips if self.round_trips else 1.0


def make_copier(directory: Path, shape: Path, copied: int = COPIED, seed: int = 0) -> list[int]:
    """A model of that shape that says a prompt again, with edits; the prompt.

    Its layers compute what they would and add next to nothing; its LM head takes each token of the
    text to the next.
    """
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(shape)
    config.tie_word_embeddings, config.eos_token_id = False, None
    model = AutoModelForCausalLM.from_config(config)
    rng = random.Random(seed)
    count = min(copied, config.max_position_embeddings // 2 - 8)
    ids = rng.sample(range(3, config.vocab_size), 2 * count)
    prompt, others = ids[:count], iter(ids[count:])
    said = [token if rng.random() > EDITED else next(others) for token in prompt]
    embedding = torch.nn.functional.normalize(torch.randn(config.vocab_size, config.hidden_size))
    head = torch.zeros_like(embedding)
    for token, following in zip(said, [*said[1:], said[0]], strict=True):
        head[following] = embedding[token]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)
            layer.mlp.down_proj.weight.mul_(1e-4)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(directory)
    return [*prompt, said[0]]


def list_kinds(scratch: Path, prompts: int) -> Iterator[tuple[str, Path, list[list[int]]]]:
    """Kinds of text: a name, the model that writes it, and what it goes on from."""
    demo = find_model(None)
    tokenizer = TextTokenizer(demo)
    stories = (demo / "validation.txt").read_text().split("\n\n")
    yield "stories", demo, [tokenizer.encode(s)[:BEGINNING] for s in stories[:prompts]]
    shape = scratch / "56M"
    make_model(shape)
    for name, of in (("copies", demo), ("copies, 56 M", shape)):
        made = scratch / f"copier-{of.name}"
        yield name, made, [make_copier(made, of)] * max(1, prompts // 2)
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    unseen = [tokenizer.encode(page.read_text()[400:1000])[:BEGINNING] for page in pages]
    yield "never seen", demo, unseen[:prompts]


def write_whole(
    model: Any, prompt: list[int], tokens: int, **options: Any
) -> tuple[float, list[int]]:
    """Tokens/s of transformers' generate after the first token, and the tokens."""
    ids = torch.tensor([prompt])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    begun_at = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **settings)
    first_at = time.perf_counter()
    output = model.generate(ids, max_new_tokens=tokens, **settings, **options)
    decode_s = time.perf_counter() - first_at - (first_at - begun_at)
    written = output[0, len(prompt) :].tolist()
    return (len(written) - 1) / decode_s, written


def write_split(
    ends: ModelEnds, endpoint: str, prompt: list[int], tokens: int, codec: str, kind: Kind
) -> tuple[Session, list[int]]:
    client = BrokerClient([endpoint])
    drafters = None if kind == "off" else Drafters(kind)
    session = Session(ends, client, uniform_settings(codec), drafters=drafters)
    written = list(session.generate(prompt, tokens, SamplingSettings()))
    client.close()
    return session, written


def measure(
    directory: Path, prompts: list[list[int]], tokens: int, codec: str
) -> dict[str, Measured]:
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ends = load_ends(directory)
    kinds: list[Kind] = ["off", "lookup", "auto"]
    if (directory / "drafting").is_dir():
        kinds[2:2] = ["ngram", "model"]
    ways = {name: Measured() for name in (GENERATE, GENERATE_LOOKUP, *kinds)}
    with LocalPool(PoolSettings(workers=1, model=str(directory), threads=1)) as pool:
        write_split(ends, pool.edge_endpoint, prompts[0], 8, codec, "auto")
        write_whole(whole, prompts[0], 8)
        freeze_loaded_objects()
        for prompt in prompts:
            speed, wanted = write_whole(whole, prompt, tokens)
            ways[GENERATE].tokens_per_s.append(speed)
            speed, written = write_whole(whole, prompt, tokens, prompt_lookup_num_tokens=LOOKUP)
            ways[GENERATE_LOOKUP].tokens_per_s.append(speed)
            ways[GENERATE_LOOKUP].same &= written == wanted
            undrafted: list[int] = []
            for kind in kinds:
                session, written = write_split(
                    ends, pool.edge_endpoint, prompt, tokens, codec, kind
                )
                undrafted = undrafted or written
                note(ways[kind], session, written == undrafted)
    return ways


def note(way: Measured, session: Session, same: bool) -> None:
    stats = session.stats
    way.tokens_per_s.append(stats.to_json()["tokens_per_s"])
    way.tokens += stats.new_tokens - 1
    way.round_trips += stats.round_trips
    way.drafted += sum(stats.drafted.values())
    way.accepted += sum(stats.accepted.values())
    way.same &= same


def summarize(kind: str, ways: dict[str, Measured]) -> list[dict[str, Any]]:
    def ratio(way: Measured, to: str) -> float:
        pairs = zip(way.tokens_per_s, ways[to].tokens_per_s, strict=True)
        return round(statistics.median(ours / theirs for ours, theirs in pairs), 2)

    return [
        {
            "text": kind,
            "way": name,
            "tokens_per_round_trip": round(way.per_trip, 2),
            "drafted": way.drafted,
            "accepted": way.accepted,
            "tokens_per_s": round(statistics.median(way.tokens_per_s), 1),
            "to_generate": ratio(way, GENERATE),
            "to_off": ratio(way, "off"),
            "same": way.same,
        }
        for name, way in ways.items()
    ]


@click.command()
@click.option("--tokens", default=128, show_default=True)
@click.option("--prompts", default=6, show_default=True)
@click.option("--codec", default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(tokens: int, prompts: int, codec: str, as_json: bool) -> None:
    set_up_torch(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, directory, texts in list_kinds(Path(scratch), prompts):
            rows += summarize(kind, measure(directory, texts, tokens, codec))
    tell_rows(rows, as_json)


if __name__ == "__main__":
    main()
