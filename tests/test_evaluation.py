"""Perplexity, calibration and the rate-distortion table, over the real path."""

from __future__ import annotations

import csv
import json
import re
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from forks import error_line, run_midspan
from pools import PROMPTS, generate
from random_models import save_random_model
from transformers import LlamaConfig

from common.codecs.calibration import load_calibration
from common.errors import StepRefused
from common.link import Link
from common.weights.checkpoint import Checkpoint
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.perplexity import PerplexityMeter, Window, sliding_windows
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.stats import GenerationStats
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.command import Measurement, time_link
from evaluation.texts import read_tokens


def test_windows_score_every_token_but_the_first_once() -> None:
    windows = list(sliding_windows(10, length=4, stride=2))
    assert windows == [
        Window(0, 4, 3), Window(2, 6, 2), Window(4, 8, 2), Window(6, 10, 2),
    ]  # fmt: skip
    for length, stride in ((4, 4), (5, 3), (99, 7), (3, 1)):
        assert sum(w.scored for w in sliding_windows(10, length, stride)) >= 10 - -(-10 // length)
    assert sum(w.scored for w in sliding_windows(10, 5, 3)) == 9


@torch.no_grad()
def huggingface_perplexity(
    model: torch.nn.Module, ids: list[int], window: int, stride: int
) -> float:
    """The loop of transformers' documentation (perplexity of fixed-length models), on labels."""
    nats, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        fresh = end - previous_end
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, :-fresh] = -100
        loss = model(inputs, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        nats, count = nats + float(loss) * scored, count + scored
        previous_end = end
        if end == len(ids):
            break
    return float(torch.exp(torch.tensor(nats / count)))


def test_perplexity_through_the_pool_is_that_of_the_whole_model(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    text = demo_ends.directory / "validation.txt"
    ids = read_tokens(text, TextTokenizer(demo_ends.directory), True, 700)
    meter = PerplexityMeter()
    with LocalPool(PoolSettings(workers=1)) as pool:
        client = pool.connect()
        for part in sliding_windows(len(ids), 200, 100):
            tokens = ids[part.begin : part.end]
            session = Session(demo_ends, client, uniform_settings("fp32"))
            meter.add(session.score(tokens), tokens, part.scored)
        client.close()
    want = huggingface_perplexity(whole_model, ids, 200, 100)
    assert meter.perplexity == pytest.approx(want, rel=1e-5)  # float32 over several shapes


def test_the_demo_models_codecs_keep_their_promises(tmp_path: Path, demo_directory: Path) -> None:
    table, plot = tmp_path / "table.csv", tmp_path / "plot.png"
    done = run_midspan(
        "eval", "codec", "stories-llama", "--text", str(demo_directory / "validation.txt"),
        "--documents", "--tokens", "3000", "--codec", "int8", "--codec", "compact",
        "--codec", "smallest", "--codec", "int8,compact",
        "--csv", str(table), "--plot", str(plot), "--mbit", "2", "--rtt-ms", "30",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()  # the bar is for a terminal
    assert [line.partition(" in ")[0] for line in lines] == ["span 2-6 …", "span 2-6: done"]
    rows = list(csv.DictReader(table.open()))
    header = "codec,span,window_tokens,wire_bits_per_value,perplexity,loss_percent"
    assert ",".join(rows[0]) == header + ",link_ms_per_token,link_ms_per_prompt"
    assert ",".join(Measurement.__slots__) == header  # without --mbit
    bits = {row["codec"]: float(row["wire_bits_per_value"]) for row in rows}
    loss = {row["codec"]: float(row["loss_percent"]) for row in rows}
    assert (rows[0]["codec"], loss["fp32"]) == ("fp32", 0.0)
    assert bits["int8"] <= 8.3
    assert loss["int8"] <= 0.1
    assert bits["compact"] <= 5.2
    assert loss["compact"] <= 0.5
    assert bits["smallest"] <= 2.0
    assert 0.3 <= loss["smallest"] <= 2.0  # promised is 1; few of 3,000 tokens make up most of it
    assert bits["compact"] < bits["int8,compact"] < bits["int8"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    # bytes, at most; the first has the opening, and a prompt goes in eight pieces
    hidden, headers = 128, {"token": 150, "prompt": 1300}
    for name, size in (("fp32", 4 * hidden), ("int8", hidden + 2)):
        (row,) = (row for row in rows if row["codec"] == name)
        least = {"token": 30 + 2 * size * 8 / 2e3, "prompt": 30 + 512 * 2 * size * 8 / 2e3}
        for what, ms in least.items():
            assert ms < float(row[f"link_ms_per_{what}"]) < ms + headers[what] * 8 / 2e3


def test_a_link_takes_a_round_trip_and_the_bytes_both_ways() -> None:
    stats = GenerationStats(
        prompt_tokens=256, new_tokens=11, prompt_bytes_up=30_000, prompt_bytes_down=20_000,
        bytes_up=31_000, bytes_down=21_500,
    )  # fmt: skip
    assert time_link(Link(mbit=8, rtt_ms=7), stats) == {
        "link_ms_per_token": 7
        + (1_000 + 1_500) / 10 / 1e6 * 1e3,  # 8 Mbit/s is a megabyte a second
        "link_ms_per_prompt": 7 + 2 * 50_000 / 1e6 * 1e3,  # of 512 tokens, twice as many
    }


@pytest.mark.parametrize("codec", ["compact", "smallest", "int5/2@0.3+norm+predict", "int4:tensor"])
def test_a_killed_worker_changes_nothing_with_any_codec(demo_ends: ModelEnds, codec: str) -> None:
    from common.codecs.calibration import open_calibration

    span = (demo_ends.cut.begin, demo_ends.cut.end)
    calibration = open_calibration(None, demo_ends.directory, demo_ends.fingerprint, span)
    ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[5])

    def run(pool: LocalPool, harm: bool) -> tuple[list[int], Session]:
        def on_token(index: int, session: Session) -> None:
            if harm and index == 15:
                pool.kill_worker(session.last_worker_id)
                assert pool.redis is not None
                pool.redis.restart()

        return generate(
            pool, demo_ends, ids, 30, codec=codec, calibration=calibration, on_token=on_token
        )

    with LocalPool(PoolSettings(workers=2)) as pool:
        undisturbed, _ = run(pool, harm=False)
        disturbed, session = run(pool, harm=True)
    assert disturbed == undisturbed
    assert session.stats.rows_replayed > 0


def test_different_codecs_for_prompt_and_decode_and_for_both_directions() -> None:
    with LocalPool(PoolSettings(workers=1)) as pool:
        done = run_midspan(
            "ask", PROMPTS[0], "--broker", pool.edge_endpoint, "-n", "20", "--json",
            "--codec-prefill", "int4,int8", "--codec-decode", "compact,fp16", "--draft", "off",
        )  # fmt: skip
    stats = json.loads(done.stdout)["stats"]
    hidden, header = 128, 70
    assert hidden * 5 // 8 < stats["bytes_up_per_token"] < hidden * 5 // 8 + header
    assert hidden * 2 < stats["bytes_down_per_token"] < hidden * 2 + header


class CountingProxy:
    """Forwards one TCP connection and counts what passes, apart from everything of ours."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        down = threading.Thread(target=self._pump, args=(server, client, "down"), daemon=True)
        down.start()
        self._pump(client, server, "up")

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        while data := source.recv(1 << 16):
            setattr(self, direction, getattr(self, direction) + len(data))
            target.sendall(data)


def test_the_bytes_that_stats_report_are_those_on_the_wire(demo_ends: ModelEnds) -> None:
    handshake = 400  # ZMTP's greeting and READY, at most
    with LocalPool(PoolSettings(workers=1)) as pool:
        proxy = CountingProxy(int(pool.edge_endpoint.rpartition(":")[2]))
        client = BrokerClient([proxy.endpoint])
        for codec in ("int8", "fp32", "int4"):
            session = Session(demo_ends, client, uniform_settings(codec))
            tokens = list(session.generate([0, 5, 6, 7], 30, SamplingSettings()))
        assert len(tokens) == 30
        client.status()  # everything before it has passed
        assert client.bytes_up <= proxy.up <= client.bytes_up + handshake
        assert client.bytes_down <= proxy.down <= client.bytes_down + handshake
        client.close()


def test_a_wide_decode_token_costs_at_most_8_3_bits_per_value(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=1, head_dim=16, num_key_value_heads=1, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    directory = save_random_model(config, tmp_path)
    ends = load_ends(directory, "1:2")
    settings = PoolSettings(workers=1, model=str(directory), span="1-2")
    with LocalPool(settings) as pool:
        _, session = generate(pool, ends, [1, 2, 3], 20, codec="int8")
    stats = session.stats.to_json()
    assert stats["bytes_up_per_token"] * 8 / 4096 <= 8.3
    assert stats["bytes_down_per_token"] * 8 / 4096 <= 8.3


@pytest.mark.long
def test_a_calibration_is_made_for_any_cut_and_refused_for_another(
    tmp_path: Path, demo_directory: Path
) -> None:
    made = tmp_path / "calibration"
    command = [
        "calibrate", "stories-llama", "--text", str(demo_directory / "validation.txt"),
        "--span", "1-7", "-o", str(made), "--tokens", "600", "--documents",
    ]  # fmt: skip
    done = run_midspan(*command)
    assert done.returncode == 0
    assert re.fullmatch(r"measuring …\nmeasuring: done in \d+ s\n", done.stderr)
    calibration = load_calibration(made)
    fingerprint = Checkpoint(demo_directory).fingerprint()
    assert (calibration.model, calibration.span) == (fingerprint, (1, 7))
    line = error_line("ask", "hi", "--calibration", str(made), "--broker", "tcp://127.0.0.1:1")
    assert "no broker answers" in line
    with LocalPool(PoolSettings(workers=1)) as pool:
        options = ["--calibration", str(made), "--codec", "compact"]
        line = error_line("ask", "hi", *options, "--broker", pool.edge_endpoint)
    assert "was calibrated for span 1-7" in line
    assert "not for 2-6" in line


def test_an_edge_and_a_worker_with_different_calibrations_refuse(
    tmp_path: Path, demo_directory: Path, demo_ends: ModelEnds
) -> None:
    made = tmp_path / "other"
    text = str(demo_directory / "validation.txt")
    done = run_midspan(
        "calibrate", "stories-llama", "--text", text, "-o", str(made), "--tokens", "600"
    )
    assert "too short to search the step of smallest" in done.stdout
    settings = PoolSettings(workers=1, worker_options=["--calibration", str(made)])
    ours = load_calibration(demo_directory / "calibration" / "2-6")
    theirs = load_calibration(made)
    words = f"the edge has calibration {ours.fingerprint} and this worker {theirs.fingerprint}"
    with LocalPool(settings) as pool, pytest.raises(StepRefused, match=words):
        generate(pool, demo_ends, [0, 5, 6], 3, codec="compact", calibration=ours)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "codec", "stories-llama", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["calibrate", "stories-llama", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (
            ["eval", "codec", "stories-llama", "--text", "README.md", "--codec", "int9"],
            "codec 'int9' is unknown",
        ),
        (
            ["eval", "codec", "stories-llama", "--text", "README.md", "--span", "1-7",
             "--codec", "compact"],
            "codec 'compact' needs a calibration of this model and span",
        ),
        (
            ["calibrate", "stories-llama", "--text", "README.md", "--tokens", "99"],
            "99 tokens are too few to calibrate 128 channels",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(arguments: list[str], words: str) -> None:
    assert words in error_line(*arguments)


def test_the_shipped_calibration_belongs_to_the_shipped_model(demo_directory: Path) -> None:
    calibration = load_calibration(demo_directory / "calibration" / "2-6")
    assert calibration.model == Checkpoint(demo_directory).fingerprint()


def test_the_codec_benchmark_runs() -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "codec.py"
    import sys

    done = subprocess.run(
        [sys.executable, script, "--hidden", "64", "--tokens", "4", "--json"],
        cwd=script.parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {row["codec"] for row in json.loads(done.stdout)} >= {"int8", "compact", "smallest"}


@pytest.mark.parametrize("command", ["codec", "layers", "importance"])
def test_a_text_of_a_few_tokens_is_refused_with_the_number_that_is_needed(
    command: str, tmp_path: Path
) -> None:
    text, experiment = tmp_path / "text", tmp_path / "asked.toml"
    text.write_text("a few words")
    experiment.write_text('model = "stories-llama"\ntext = "text"\nwindow = 100\n')
    if command == "importance":
        line = error_line("eval", command, str(experiment), "-o", str(tmp_path / "out"))
        assert line.startswith(f"Error: the experiment's text {text} has ")
        assert line.endswith("tokens; at least 100 are needed")
    else:
        line = error_line("eval", command, "stories-llama", "--text", str(text))
        assert line.startswith(f"Error: --text {text} has ")
        assert line.endswith("tokens; at least 64 are needed")


def test_work_of_minutes_is_said_without_a_terminal_and_not_with_json(
    demo_directory: Path,
) -> None:
    layers = ["eval", "layers", "stories-llama", "--tokens", "64", "--text"]
    layers += [str(demo_directory / "validation.txt")]
    told = run_midspan(*layers).stderr.splitlines()
    assert [line.partition(" in ")[0] for line in told] == ["measuring …", "measuring: done"]
    assert run_midspan(*layers, "--json").stderr == ""
