"""lm-evaluation-harness finds the same through endpoint or engine as for the unsplit model.

It runs as its users run it: from the command line, tasks in files. `make test-long` installs it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, open_endpoint

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-eval is not installed; make test-long does, or pip install '.[harness]'",
    ),
]

CONTEXT = 512  # of the demo model
TASKS = Path(__file__).resolve().parent.parent / "evaluation" / "tasks"  # midspan's own
TOLERANCE = 1e-3  # of a log-likelihood
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{more}
"""
CHOICE = """
doc_to_text: "{{story}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, demo_directory: Path) -> Path:
    """Stories whose end is to be found among others', long texts, and beginnings to go on with."""
    directory = tmp_path_factory.mktemp("tasks")
    stories = (demo_directory / "validation.txt").read_text().split("\n\n")[:12]
    halves = [story.split(". ", 4) for story in stories]
    ends = [half[-1] for half in halves]
    choices = [
        {
            "story": ". ".join(half[:-1]) + ".",
            "endings": [ends[(index + other) % len(ends)] for other in (1, 0, 2)],
            "label": 1,
        }
        for index, half in enumerate(halves)
    ]
    texts = [{"text": text} for text in (stories[0], "\n\n".join(stories[:5]), "The end.")]
    begun = [{"text": half[0]} for half in halves[:6]]
    for name, kind, more, rows in (
        ("choice", "multiple_choice", CHOICE, choices),
        ("rolling", "loglikelihood_rolling", ROLLING, texts),
        ("writing", "generate_until", WRITING, begun),
    ):
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = TASK.format(name=name, kind=kind, more=more, data=data)
        (directory / f"{name}.yaml").write_text(task)
    return directory


def run_harness(
    tasks: Path,
    directory: Path,
    kind: str,
    *options: str,
    names: Sequence[str] = ("choice", "rolling", "writing"),
    **values: object,
) -> Samples:
    """The samples of all tasks, by task. `values` are those of --model_args."""
    directory.mkdir(exist_ok=True)
    arguments = ",".join(f"{name}={value}" for name, value in values.items())
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    module = "evaluation.harness" if kind == "midspan" else "lm_eval"
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, "--model", kind, "--model_args", arguments,
         "--tasks", ",".join(names), "--include_path", str(tasks), "--log_samples",
         "--output_path", str(directory), *options],
        cwd=directory, env=os.environ | offline, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found: Samples = {}
    for name in names:
        (file,) = directory.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return found


@pytest.fixture(scope="module")
def wanted(tasks: Path, tmp_path_factory: pytest.TempPathFactory, demo_directory: Path) -> Samples:
    """What lm-eval finds with the unsplit model.

    Of its context lm-eval leaves two tokens for the answer where it asks an endpoint, so here too:
    long texts are cut into the same windows.
    """
    return run_harness(
        tasks, tmp_path_factory.mktemp("whole"), "hf", "--device", "cpu", "--batch_size", "1",
        pretrained=demo_directory, dtype="float32", add_bos_token=True, max_length=CONTEXT - 2,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["local-completions", "midspan"])
def found(
    request: pytest.FixtureRequest,
    tasks: Path,
    tmp_path_factory: pytest.TempPathFactory,
    demo_ends: ModelEnds,
) -> Iterator[Samples]:
    """What it finds through the endpoint, or an engine: several requests at once."""
    directory = tmp_path_factory.mktemp("split")
    with LocalPool(PoolSettings(workers=2)) as pool:
        if request.param == "midspan":
            yield run_harness(
                tasks, directory, "midspan", pretrained=demo_ends.directory,
                broker=pool.edge_endpoint, max_length=CONTEXT - 2,
            )  # fmt: skip
            return
        with open_endpoint(pool, demo_ends) as endpoint:
            yield run_harness(
                tasks, directory, "local-completions", "--batch_size", "3",
                base_url=f"{endpoint.url}/v1/completions", model=MODEL,
                tokenizer=demo_ends.directory, tokenizer_backend="huggingface",
                add_bos_token=True, max_length=CONTEXT, num_concurrent=2, max_retries=1,
            )  # fmt: skip


def test_each_choice_is_as_likely_as_with_the_unsplit_model(
    found: Samples, wanted: Samples
) -> None:
    assert len(found["choice"]) == 12
    for ours, theirs in zip(found["choice"], wanted["choice"], strict=True):
        assert ours["arguments"] == theirs["arguments"]
        assert ours["acc"] == theirs["acc"]
        for (mine,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
            assert float(mine[0]) == pytest.approx(float(other[0]), rel=0, abs=TOLERANCE)
            assert mine[1] == other[1]  # whether it is what greedy decoding would write
    assert sum(sample["acc"] for sample in wanted["choice"]) > 0


def test_texts_longer_than_the_context_have_the_same_perplexity(
    found: Samples, wanted: Samples
) -> None:
    assert len(found["rolling"]) == 3
    for ours, theirs in zip(found["rolling"], wanted["rolling"], strict=True):
        assert float(ours["resps"][0][0]) == pytest.approx(
            float(theirs["resps"][0][0]), rel=0, abs=TOLERANCE
        )


def test_what_it_lets_the_model_write_is_the_same_text(found: Samples, wanted: Samples) -> None:
    texts = [sample["resps"] for sample in wanted["writing"]]
    assert [sample["resps"] for sample in found["writing"]] == texts
    assert all(len(text[0][0]) > 20 for text in texts)


def test_the_tasks_that_come_with_midspan_have_the_unsplit_models_figures(
    tmp_path: Path, demo_directory: Path
) -> None:
    names = ("midspan_choice", "midspan_ending", "midspan_summary")
    whole = run_harness(
        TASKS, tmp_path / "whole", "hf", "--device", "cpu", "--batch_size", "1", names=names,
        pretrained=demo_directory, dtype="float32", add_bos_token=True, max_length=CONTEXT - 2,
    )  # fmt: skip
    with LocalPool(PoolSettings(workers=1)) as pool:
        split = run_harness(
            TASKS, tmp_path / "split", "midspan", names=names,
            pretrained="stories-llama", broker=pool.edge_endpoint,
        )  # fmt: skip
    for name, score in zip(names, ("acc", "exact_match", "rougeL"), strict=True):
        assert len(split[name]) == 12
        assert [each[score] for each in split[name]] == [each[score] for each in whole[name]]
        assert sum(each[score] for each in split[name]) > 0
    texts = [each["resps"] for each in whole["midspan_summary"]]
    assert [each["resps"] for each in split["midspan_summary"]] == texts


def test_what_midspan_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="Error: --model_args has 'speed', which midspan does"):
        run_harness(TASKS, tmp_path, "midspan", names=["midspan_choice"], speed=3)


AS_A_PLUGIN = """
from importlib.metadata import entry_points
from lm_eval.api.registry import get_model, model_registry
(entry,) = entry_points(group="lm_eval.models", name="midspan")
model_registry.register("midspan", target=entry)
print(get_model("midspan").__name__)
"""


def test_lm_eval_finds_the_model_where_later_releases_look_for_it() -> None:
    found = subprocess.check_output([sys.executable, "-P", "-c", AS_A_PLUGIN], text=True)
    assert found.split() == ["MidspanLM"]
