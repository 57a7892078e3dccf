"""`midspan eval split`: what a cut costs beside no cut, stage by stage, and rows to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from common.console.inputs import check_file, read_text
from common.console.options import calibration_option, new_tokens_option, span_option
from common.console.outputs import check_writable
from common.console.tables import format_table
from common.console.waiting import waiting
from common.errors import SettingsError
from common.link import Link
from evaluation.options import (
    codecs_option,
    json_option,
    mbit_option,
    rtt_option,
    tokens_option,
)

if TYPE_CHECKING:
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.leakage.split_model import Codecs, SplitModel
    from evaluation.split.ways import Step, Way

DEFAULT_CODECS = ("fp32", "int8")
TOKEN_STAGES = ("head", "encode", "middle", "decode", "tail", "sample")


@dataclass(frozen=True, slots=True)
class Summary:
    """One way. Its fields are the columns: of the prompt, then medians of the tokens behind it."""

    way: str
    codec: str
    same_percent: float | None  # of the tokens: as on the device alone
    prompt_ms: float  # until the first token, stages and link
    prompt_up: int  # bytes
    prompt_down: int
    token_ms: float
    token_up: int
    token_down: int
    link_ms: float  # of token_ms, as all that follow
    head_ms: float
    encode_ms: float
    middle_ms: float
    decode_ms: float
    tail_ms: float
    sample_ms: float


@click.command("split")
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), help="Text to read: its beginning.")
@tokens_option(64)
@new_tokens_option(32)
@codecs_option
@span_option("the middle half")
@calibration_option
@mbit_option
@rtt_option
@click.option(
    "--save-rows",
    type=click.Path(path_type=Path),
    help="Write the prompt's boundary rows as the first codec's pool has them, and the head's KV.",
)
@click.option(
    "--from-rows",
    type=click.Path(path_type=Path),
    help="Go on from what --save-rows wrote, without --text.",
)
@click.option(
    "--stages", "stages_path", type=click.Path(path_type=Path),
    help="Write each step with its stages as a line of JSON.",
)  # fmt: skip
@json_option
def split_command(
    model: str,
    text: Path | None,
    tokens: int,
    max_new_tokens: int,
    codecs: tuple[str, ...],
    span_text: str | None,
    calibration: Path | None,
    mbit: float | None,
    rtt_ms: float,
    save_rows: Path | None,
    from_rows: Path | None,
    stages_path: Path | None,
    as_json: bool,
) -> None:
    """Write an answer on the device alone, in the cloud alone, and split: time and bytes of each.

    One process, no pool: all parts of MODEL run here, as device and worker have them. The device's
    and the cloud's tokens are the exact model's; same_percent says how many of them came out split.
    """
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.leakage.split_model import SplitModel

    if (text is None) == (from_rows is None):
        raise SettingsError("a prompt comes from --text or --from-rows; expected one of them")
    if from_rows is not None and (codecs or save_rows):
        raise SettingsError("--from-rows goes on with the codec of its rows, without --codec")
    check_writable(save_rows, stages_path)
    set_up_torch(threads=1)
    directory = find_model(model)
    with waiting(f"loading {directory.resolve().name}", is_shown=not as_json):
        laboratory = Laboratory(
            SplitModel(directory, span_text), TextTokenizer(directory), calibration,
            max_new_tokens, Link(mbit, rtt_ms) if mbit else None,
        )  # fmt: skip
    if from_rows is not None:
        answers = [laboratory.go_on(from_rows)]
    else:
        assert text is not None
        answers = laboratory.compare(text, tokens, codecs or DEFAULT_CODECS, save_rows)
    report(answers, laboratory.tokenizer, stages_path, as_json)


@dataclass(frozen=True)
class Laboratory:
    """A model cut in this process, and how it is to be measured."""

    split: SplitModel
    tokenizer: TextTokenizer
    calibration: Path | None
    new_tokens: int
    link: Link | None

    def compare(
        self, text: Path, tokens: int, codecs: Sequence[str], save_to: Path | None
    ) -> list[list[Step]]:
        """The steps of each way, the exact one first. Raises SettingsError."""
        from evaluation.split.ways import CloudOnly, DeviceOnly, SplitSession

        prompt = self.tokenizer.encode(read_text(text, "--text"))[:tokens]
        self._check_room(len(prompt))
        known = [self.split.make_codecs(name, self.calibration) for name in codecs]
        if save_to is not None:
            self.capture(prompt, known[0], save_to)
        ways: list[Way] = [DeviceOnly(self.split), CloudOnly(self.split, self.tokenizer)]
        ways += [SplitSession(self.split, each) for each in known]
        for _ in self.answer(DeviceOnly(self.split), prompt[:2]):
            pass  # the first passes through a model are slow
        return [self.answer(way, prompt) for way in ways]

    def answer(self, way: Way, prompt: Sequence[int]) -> list[Step]:
        """Beginning with the prompt's words, of which these tokens come."""
        from evaluation.split.ways import StageClock, write_answer

        words = self.tokenizer.decode(list(prompt))
        clock = StageClock()
        self.tokenizer.tokenize(words)
        clock.mark("tokenize")
        return list(write_answer(way, clock, prompt, self.new_tokens, link=self.link))

    def capture(self, prompt: Sequence[int], codecs: Codecs, path: Path) -> None:
        """Write what `go_on` reads. Raises SettingsError."""
        from evaluation.leakage.split_model import cross
        from evaluation.split.rows_file import CapturedRows, save_rows, take_head_kv

        ends, caches = self.split.ends, self.split.ends.new_caches()
        up = cross(codecs.up, ends.run_heads([(prompt, caches)])[0])
        head_kv = take_head_kv(caches.head)
        span = str(ends.cut.middle)
        save_rows(CapturedRows(ends.fingerprint, span, codecs.name, up, head_kv), path)

    def go_on(self, path: Path) -> list[Step]:
        """From captured rows: the prompt's tokens and its pass through the head are not needed."""
        from evaluation.split.rows_file import load_rows, restore_head_kv
        from evaluation.split.ways import SplitSession, StageClock, write_answer

        check_file(path, "--from-rows")
        rows = load_rows(path)
        rows.check(self.split.ends)
        self._check_room(len(rows.up))
        way = SplitSession(self.split, self.split.make_codecs(rows.codec, self.calibration))
        restore_head_kv(way.caches.head, rows.head_kv)
        clock = StageClock()
        begun = way.run_rows(rows.up, clock)
        return list(write_answer(way, clock, [], self.new_tokens, link=self.link, begun=begun))

    def _check_room(self, tokens: int) -> None:
        room = self.split.ends.context
        if room is not None and tokens + self.new_tokens > room:
            raise SettingsError(
                f"{tokens} tokens of a prompt and {self.new_tokens} of an answer; the model has "
                f"{room} (--tokens, -n)"
            )


def summarize(steps: Sequence[Step], exact: Sequence[Step] | None) -> Summary:
    """One way beside the exact one."""
    first, rest = steps[0], steps[1:] or steps

    def middle_of(values: Iterable[float]) -> float:
        return round(median(values), 3)

    same = None
    if exact is not None:
        right = sum(a.token_id == b.token_id for a, b in zip(steps, exact, strict=True))
        same = round(100 * right / len(steps), 1)
    stages = [middle_of(step.stage_ms[name] for step in rest) for name in TOKEN_STAGES]
    return Summary(
        first.way, first.codec, same,
        round(first.total_ms, 3), first.bytes_up, first.bytes_down,
        middle_of(step.total_ms for step in rest),
        round(median(step.bytes_up for step in rest)),
        round(median(step.bytes_down for step in rest)),
        middle_of(step.link_ms for step in rest), *stages,
    )  # fmt: skip


def report(
    answers: Sequence[Sequence[Step]],
    tokenizer: TextTokenizer,
    stages_path: Path | None,
    as_json: bool,
) -> None:
    """Print a line for each way and what was written, and write the log of steps."""
    if stages_path is not None:
        lines = [json.dumps(asdict(step)) for steps in answers for step in steps]
        stages_path.write_text("\n".join(lines) + "\n")
    exact = answers[0] if len(answers) > 1 else None
    summaries = [summarize(steps, exact) for steps in answers]
    texts = [tokenizer.decode([step.token_id for step in steps]) for steps in answers]
    if as_json:
        pairs = zip(summaries, texts, strict=True)
        click.echo(json.dumps([asdict(summary) | {"text": text} for summary, text in pairs]))
        return
    headers = [field.name for field in fields(Summary)]
    click.echo(format_table(headers, [tuple(asdict(each).values()) for each in summaries]))
    for text, names in group_texts(summaries, texts).items():
        click.echo(f"{', '.join(names)}: {text}")


def group_texts(summaries: Sequence[Summary], texts: Sequence[str]) -> dict[str, list[str]]:
    """Each text that was written, and by whom."""
    names: dict[str, list[str]] = {}
    for summary, text in zip(summaries, texts, strict=True):
        names.setdefault(text, []).append(f"{summary.way} {summary.codec}".strip())
    return names
