"""Sessions with some of a model's neurons, through a pool whose workers die."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import test_neurons as by_hand
import torch
from click.testing import CliRunner
from forks import run_midspan
from msgspec import structs
from pools import GREEDY, PROMPTS, generate, generate_together
from random_models import save_random_model
from test_takeover import Server
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_worker.loop.batcher import Task
from cloud_worker.serving import ServingSettings
from cloud_worker.state.redis_store import RedisKvStore
from common.console.neuron_options import NeuronOptions
from common.errors import NoWorker, SettingsError
from common.neurons.lists import NeuronLists, write_lists
from common.neurons.settings import NeuronSettings
from common.protocol.messages import PROMPT, StepReply
from common.spans.twin_check import check_twin
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from deploy.cli import midspan
from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.question import describe_source
from edge_agent.commands.task_options import TaskChoice
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tasks import TASKS
from edge_agent.text.tokenizer import TextTokenizer

LAYERS, WIDTH = 8, 352  # of the demo model
COUNT = 24


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> NeuronSettings:
    """Head, middle and tail have layers of them."""
    path = tmp_path_factory.mktemp("lists") / "lists.json"
    generator = np.random.default_rng(1)
    write_lists(path, NeuronLists("l", [generator.permutation(WIDTH) for _ in range(LAYERS)]))
    return NeuronSettings((path,), start=0, end=LAYERS, sparsity=0.5)


@pytest.fixture(scope="module")
def options(settings: NeuronSettings) -> list[str]:
    return NeuronOptions(
        settings.files, sparsity=settings.sparsity, neuron_layers=f"0:{LAYERS}"
    ).to_words()


@pytest.fixture(scope="module")
def pool(options: list[str]) -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, neuron_options=options)) as running:
        yield running


@pytest.fixture(scope="module")
def ends(demo_directory: Path, settings: NeuronSettings) -> ModelEnds:
    return load_ends(demo_directory, neurons=settings)


@pytest.fixture(scope="module")
def prompts(demo_directory: Path) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_directory)
    return [tokenizer.encode(prompt) for prompt in PROMPTS[:8]]


@pytest.fixture(scope="module")
def reference(
    demo_directory: Path, settings: NeuronSettings, prompts: list[list[int]]
) -> Callable[[int], list[int]]:
    """The likeliest tokens of the whole model, whose neurons are set to zero from outside."""
    whole = AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.float32).eval()
    known: dict[int, list[int]] = {}

    @torch.inference_mode()
    def write(number: int) -> list[int]:
        if number not in known:
            ids = list(prompts[number])
            sizes = (by_hand.WIDTH, by_hand.COVERED)
            by_hand.WIDTH, by_hand.COVERED = WIDTH, tuple(range(1, LAYERS))
            try:
                with by_hand.neurons_by_hand(whole, "down_proj", settings, len(ids)):
                    for _ in range(COUNT):
                        logits = whole(input_ids=torch.tensor([ids]), use_cache=False).logits
                        ids.append(int(logits[0, -1].argmax()))
            finally:
                by_hand.WIDTH, by_hand.COVERED = sizes
            known[number] = ids[len(prompts[number]) :]
        return known[number]

    return write


def test_tokens_are_those_of_the_model_whose_neurons_are_left_out(
    pool: LocalPool,
    ends: ModelEnds,
    prompts: list[list[int]],
    reference: Callable[[int], list[int]],
    whole_model: Any,
) -> None:
    tokens, _ = generate(pool, ends, prompts[0], COUNT)
    assert tokens == reference(0)
    dense = whole_model.generate(torch.tensor([prompts[0]]), max_new_tokens=COUNT, do_sample=False)
    assert tokens != dense[0, len(prompts[0]) :].tolist()
    in_pieces, _ = generate(pool, ends, prompts[0], COUNT, prefill_rows=4)
    assert in_pieces == tokens


def test_eight_sessions_at_once_each_have_their_own_core(
    pool: LocalPool,
    ends: ModelEnds,
    prompts: list[list[int]],
    reference: Callable[[int], list[int]],
) -> None:
    assert generate_together(pool, ends, prompts, COUNT) == [reference(n) for n in range(8)]


def test_an_engine_runs_heads_and_tails_with_their_cores(
    pool: LocalPool,
    ends: ModelEnds,
    prompts: list[list[int]],
    reference: Callable[[int], list[int]],
) -> None:
    with Engine(ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        streams = [engine.submit(ids, COUNT, GREEDY) for ids in prompts[:3]]
        written = [[token.token_id for token in stream] for stream in streams]
    assert written == [reference(n) for n in range(3)]


@pytest.mark.parametrize("store", ["kept", "emptied"])
def test_a_session_keeps_its_core_when_its_worker_is_killed(
    pool: LocalPool,
    ends: ModelEnds,
    prompts: list[list[int]],
    reference: Callable[[int], list[int]],
    store: str,
) -> None:
    def harm(count: int, session: Session) -> None:
        if count in (1, 9):
            pool.kill_worker(session.last_worker_id)
            if store == "emptied":
                redis.Redis.from_url(pool.redis_url).flushall()
            pool.start_worker()

    tokens, session = generate(pool, ends, prompts[1], COUNT, on_token=harm)
    assert tokens == reference(1)
    assert len(session.stats.tokens_by_worker) > 1
    pool.wait_for_workers(2)


def test_a_next_turn_has_the_core_of_both_prompts_on_any_worker(
    pool: LocalPool, ends: ModelEnds, prompts: list[list[int]]
) -> None:
    def talk(kills: bool) -> list[list[int]]:
        client = pool.connect()
        session = Session(ends, client, uniform_settings("fp32"))
        said: list[list[int]] = []
        ids: list[int] = []
        for prompt in prompts[2:5]:
            ids += prompt
            answer = []
            for token in session.generate(ids, 10, GREEDY, keep_open=True):
                answer.append(token)
                if kills and len(said) and len(answer) == 4:
                    pool.kill_worker(session.last_worker_id)
                    redis.Redis.from_url(pool.redis_url).flushall()
                    pool.start_worker()
            ids += answer
            said.append(answer)
        session.end()
        client.close()
        return said

    assert talk(kills=True) == talk(kills=False)
    pool.wait_for_workers(2)


def test_who_chooses_otherwise_does_not_meet_these_workers(
    pool: LocalPool, demo_directory: Path, demo_ends: ModelEnds, settings: NeuronSettings
) -> None:
    other = load_ends(demo_directory, neurons=replace(settings, sparsity=0.4))
    for ends in (demo_ends, other):
        with pytest.raises(NoWorker, match="no worker serves") as refused:
            generate(pool, ends, [1, 2, 3], 2)
    words = f"--span 2-6 --neurons {settings.files[0]} --neuron-layers 0:{LAYERS}`"
    assert words in str(refused.value)  # the command that would serve it


def test_votes_are_taken_over_from_the_store(
    demo_directory: Path, settings: NeuronSettings, redis_server: EmbeddedRedis
) -> None:
    redis.Redis.from_url(redis_server.url).flushall()
    first, second = (
        Server(
            demo_directory, RedisKvStore(redis_server.url, timeout_s=10), name,
            ServingSettings(neurons=settings),
        )
        for name in ("w1", "w2")
    )  # fmt: skip
    rows = 40
    assert isinstance(first.compute(of_prompt(first.task(0, 0, rows)))[0], StepReply)
    first.commit_all()
    task = first.task(1, rows, 1)
    reply, body = second.compute(task)
    assert isinstance(reply, StepReply)
    assert (second.service.stats["rows_pulled"], second.service.stats["rows_asked"]) == (rows, 0)
    assert body == first.compute(task)[1]
    unmarked = second.task(2, 0, rows)
    second.compute(unmarked)
    assert second.compute(second.task(3, rows, 1))[1] != body  # a prompt makes the difference


def of_prompt(task: Task) -> Task:
    parts = [structs.replace(part, name=PROMPT) for part in task.step.parts]
    task.step = structs.replace(task.step, parts=parts)
    return task


def read_memory_mb(pid: int) -> dict[str, float]:
    """What is resident now, and the most that ever was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM")}


def test_a_workers_memory_is_smaller_by_what_is_not_loaded(tmp_path: Path) -> None:
    width, layers = 8192, 4
    config = LlamaConfig(
        vocab_size=48, hidden_size=256, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1,
    )  # fmt: skip
    save_random_model(config, tmp_path)
    check_twin(read_config(Checkpoint(tmp_path)))  # which takes memory of its own, once
    write_lists(tmp_path / "l.json", NeuronLists("l", [np.arange(width)[::-1].copy()] * layers))
    options = NeuronOptions(
        (tmp_path / "l.json",), loaded=0.3, sparsity=0.3, neuron_layers=f"0:{layers}"
    )
    memory = []
    for words in ([], options.to_words()):
        settings = PoolSettings(
            workers=1, model=str(tmp_path), span="1-4", neuron_options=words,
            worker_options=["--cache-mb", "1"],
        )  # fmt: skip
        with LocalPool(settings) as pool:
            memory.append(read_memory_mb(pool.workers["w1"].pid))
    left_out_mb = 3 * 3 * (width - round(0.3 * width)) * 256 * 4 / 1e6
    for name in ("VmRSS", "VmHWM"):
        saved = memory[0][name] - memory[1][name]
        # the same worker differs by some MB from one start to the next
        assert 0.75 < saved / left_out_mb < 1.25, (name, saved, left_out_mb)


# --- commands


def test_ask_and_score_take_neurons(pool: LocalPool, options: list[str]) -> None:
    more = [*options, "--threads", "1", "--json", "--broker", pool.edge_endpoint]
    asked = run_midspan("ask", PROMPTS[0], "-n", "3", "-t", "0", *more)
    assert len(json.loads(asked.stdout)["token_ids"]) == 3, asked.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "hi", "--loaded", "0.5"], "--loaded 0.5 would do nothing: name lists with"),
        (["ask", "hi", "--neurons", "/nothing", "--neuron-layers", "3"], "expected START:END"),
        (["up", "--neurons", "/nothing"], "--neurons /nothing cannot be read: there"),
        (["chat", "--neurons", "/nothing"], "--neurons /nothing cannot be read: there"),
        (["worker", "--image-model", "landscapes-sdxl", "--neurons", "/x"], "name it: --model"),
        (["ask", "hi", "--neurons", "/x", "--sparsity", "0"], "0.0 is not in the range 0<x<=1"),
        (["score", "a", "--option", "b", "--neurons", "/x", "--base", "0.9"], "more than --loaded"),
    ],
    ids=range(7),
)  # fmt: skip
def test_options_that_make_no_sense_are_named(arguments: list[str], words: str) -> None:
    said = CliRunner().invoke(midspan, arguments)
    assert said.exit_code != 0
    assert words in said.output


def test_options_say_what_was_said() -> None:
    given = NeuronOptions((Path("a"), Path("b")), loaded=0.5, neuron_layers="1:7")
    assert given.to_words() == [
        "--neurons", "a", "--neurons", "b", "--loaded", "0.5", "--neuron-layers", "1:7"
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="would do nothing"):
        replace(given, neuron_files=()).read()
    settings = given.read()
    assert settings is not None
    assert (settings.files, settings.start, settings.end) == ((Path("a"), Path("b")), 1, 7)
    assert settings.to_words() == given.to_words()


def test_a_serve_with_other_neurons_is_not_asked(
    settings: NeuronSettings, demo_directory: Path
) -> None:
    sources = [
        describe_source(demo_directory, "float32", CodecChoice("int8"), (), chosen)
        for chosen in (None, settings, replace(settings, loaded=0.6), settings)
    ]
    assert sources[1] == sources[3]
    assert len(set(sources)) == 3


def test_a_task_puts_its_words_around_a_text_or_an_example() -> None:
    task = TASKS["qa"]
    assert TaskChoice(None, None).read_prompt("hi") == "hi"
    assert TaskChoice("qa", None).read_prompt("Text: a") == task.ask("Text: a")
    assert TaskChoice("qa", 2).read_prompt(None) == task.ask(task.examples[1].given)
    assert TaskChoice("qa", None).read_prompt(None) == task.ask(task.examples[0].given)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a PROMPT, or --task with --example"),
        (["hi", "--example", "1"], "--example is of a task; name it: --task"),
        (["hi", "--task", "qa", "--example", "1"], "two texts; give one"),
        (["--task", "translate", "--example", "6"], "this task has examples 1 to 5"),
        (["--task", "sing"], "'sing' is not one of"),
    ],
    ids=range(5),
)
def test_a_task_that_is_asked_wrongly_is_named(arguments: list[str], words: str) -> None:
    said = CliRunner().invoke(midspan, ["ask", *arguments])
    assert said.exit_code != 0
    assert words in said.output


def test_an_example_of_a_task_is_answered(pool: LocalPool, options: list[str]) -> None:
    more = [*options, "--threads", "1", "--json", "--broker", pool.edge_endpoint]
    asked = run_midspan("ask", "--task", "translate", "--example", "2", "-n", "2", "-t", "0", *more)
    assert len(json.loads(asked.stdout)["token_ids"]) == 2, asked.stderr
