"""What the local tasks ask about: stories of the demo model's validation text, and ROUGE-L.

lm-eval loads it by its file, not as a part of a package.
"""

from __future__ import annotations

from typing import Any

from common.weights.demo_model import DEMO_TEXT_MODEL, find_model

COUNT = 12


def load_choices(**_: Any) -> dict[str, Any]:
    """Which of three ends is that of a story; the others are other stories'."""
    stories = [story.split(". ", 4) for story in _read()]
    ends = [story[-1] for story in stories]
    rows = [
        {
            "story": ". ".join(story[:-1]) + ".",
            "endings": [ends[(index + other) % len(ends)] for other in (1, 0, 2)],
            "label": 1,
        }
        for index, story in enumerate(stories)
    ]
    return _as_test(rows)


def load_endings(**_: Any) -> dict[str, Any]:
    """Each story without its last sentence, which is the same in all."""
    return _as_test([_divide(story, 1) for story in _read()])


def load_morals(**_: Any) -> dict[str, Any]:
    """Each story without its last two sentences: what was learned, in short."""
    return _as_test([_divide(story, 2) for story in _read()])


def score_summary(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L's F-measure of what was written, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return {"rougeL": 100 * scorer.score(document["rest"], results[0])["rougeL"].fmeasure}


def _read() -> list[str]:
    path = find_model(DEMO_TEXT_MODEL) / "validation.txt"
    texts = path.read_text(encoding="utf-8").split("\n\n")
    return [text.strip() for text in texts if text.strip()][:COUNT]


def _divide(story: str, sentences: int) -> dict[str, str]:
    parts = story.split(". ")
    return {"story": ". ".join(parts[:-sentences]) + ".", "rest": ". ".join(parts[-sentences:])}


def _as_test(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
