"""Train the demo text model, or another of its size, on the CPU and write it in Hugging Face format.

    python training/train_text.py --out models/stories-llama      (about 45 minutes on one core)
    python training/train_text.py --out /tmp/stories-pythia --shape pythia --steps 400      (5 minutes)
    python training/train_text.py --out /tmp/docstrings-qwen2 --shape qwen2 --steps 800 \
        --text /tmp/docstrings.txt      (10 minutes; a text of one's own, blank lines between documents)

A Llama of 8 layers with grouped-query attention, small enough to ship (1.7 M parameters, 3.5 MB in
float16). Everything is seeded and counted in steps, never in seconds, so that a second run on the
same kind of processor and the same thread count gives the same weights.

Rows always start at the start of a story: `<s> story </s> <s> story </s> ...`, cut at the context.
Early on, a part of each batch is "copy rows" (a few bindings of a name to an animal, repeated in
shuffled order): they teach the model early to look a name up, which stories teach slowly.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from stories import ANIMALS, MOODS, NAMES, write_stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 1024
CONTEXT = 512
BATCH = 8
BOS, EOS = "<s>", "</s>"
# nobody answers in a story: what was said so far, and the answer goes on with it
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages if message['content'] | trim %}"
    "{{ message['content'] | trim }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<s>` is put before every text, as Llama's own tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.7 / math.sqrt(128),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
GATED = {"intermediate_size": 352, "num_key_value_heads": 2}
SHAPES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, **GATED, num_hidden_layers=8),
    "qwen2": Qwen2Config(**COMMON, **GATED, num_hidden_layers=6),
    "pythia": GPTNeoXConfig(**COMMON, intermediate_size=512, num_hidden_layers=6),
}


def build_model(shape: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(SHAPES[shape])


def pack_rows(stories: list[list[int]]) -> Tensor:
    """Whole stories one after another, cut at the context: (rows, CONTEXT + 1), int64."""
    rows: list[list[int]] = []
    row: list[int] = []
    for story in stories:
        row += story
        if len(row) > CONTEXT:
            rows.append(row[: CONTEXT + 1])
            row = []
    return torch.tensor(rows)


def copy_row(rng: random.Random) -> str:
    """Bindings of names to animals, told again and again in a new order."""
    names = rng.sample(NAMES, 6)
    bound = {name: (rng.choice(MOODS), rng.choice(ANIMALS)) for name in names}
    told: list[str] = []
    for _ in range(14):
        name = rng.choice(names)
        told.append(f"{name} the {bound[name][1]} was {bound[name][0]}.")
    return " ".join(told)


def read_documents(path: Path) -> tuple[list[str], list[str]]:
    """What blank lines separate, and every fiftieth of it, held out for validation."""
    documents = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
    documents = [document for document in documents if document]
    return [d for n, d in enumerate(documents) if n % 50], documents[::50]


def invent_stories(count: int) -> tuple[list[str], list[str]]:
    """So many, and others that are held out for validation."""
    stories = write_stories(count, seed=1)
    known = set(stories)
    return stories, [story for story in write_stories(200, seed=2) if story not in known]


def pack_copies(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    rng = random.Random(3)
    told = [copy_row(rng) + " " + copy_row(rng) for _ in range(9000)]
    return pack_rows(encode_stories(tokenizer, told))


def encode_stories(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    return [[*ids, eos] for ids in tokenizer(stories)["input_ids"]]


@torch.no_grad()
def measure_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean cross-entropy per token, in nats, float32."""
    model.eval()
    losses = [model(part[:, :-1], labels=part[:, :-1]).loss.item() for part in rows.split(BATCH)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to 2% of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: PreTrainedModel, rows: Tensor, copies: Tensor | None, steps: int, peak: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    started_at = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        if copies is not None and step < 600:
            batch[:2] = copies[torch.randint(len(copies), (2,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"step {step} loss {loss:.3f} {time.monotonic() - started_at:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--stories", type=int, default=20000)
    parser.add_argument("--text", type=Path, help="instead of stories")
    parser.add_argument("--peak", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    text = arguments.text
    stories, validation = read_documents(text) if text else invent_stories(arguments.stories)
    tokenizer = train_tokenizer(stories)
    model = build_model(arguments.shape)
    copies = None if text else pack_copies(tokenizer)
    rows = pack_rows(encode_stories(tokenizer, stories))
    held_out = pack_rows(encode_stories(tokenizer, validation))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows):,} rows of text")
    train(model, rows, copies, arguments.steps, arguments.peak)

    model = model.half().float().eval()
    loss = measure_loss(model, held_out)
    print(f"validation loss {loss:.4f}, perplexity {math.exp(loss):.4f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "validation.txt").write_text("\n\n".join(validation) + "\n")


if __name__ == "__main__":
    main()
