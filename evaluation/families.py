"""Which families of models can be cut: the survey behind docs/models.md.

    python -m evaluation.families             # every family, a line each
    python -m evaluation.families llama mpt   # these
    python -m evaluation.families --write     # every family, into docs/models.md

Of each family of causal language models that the installed transformers has, a small model of
random weights is saved as a Hugging Face directory, cut by the code that loads real models, and
compared with the same model whole. Each family is tried in a process of its own, so that one which
crashes is counted and no more.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.spans.cut import Cut
from common.spans.twin_check import (
    Comparison,
    compare,
    count_layers,
    explain_difference,
    explain_error,
)
from common.weights.configuration import WITH_TEXT_PARTS
from evaluation.small_models import NOTES, write_small

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
PATIENCE_S = 60.0  # for one family
SEED = 3
MAX_WORDS = 160
EQUAL, CLOSE, REFUSED = "equal", "close", "refused"
DIFFERENT, CRASHED, NOT_TINY = "different", "crashed", "not tried"
INTRODUCTION = """\
# Which models can be cut

Written by `python -m evaluation.families --write` with transformers {version}: of {tried} families
of causal language models that it has, **{right} are computed right**.

Of each family a small model with random weights is saved as a Hugging Face directory, cut by the
code that loads real models, at 1:n-1 and at 0:n, and compared with the same model whole: a prompt
and single tokens, the prompt in two pieces, and two sessions in one batch; where layers keep a
state of the whole text, also after a cut-back, and from a state that came back from its bytes.

| word | meaning |
|---|---|
| equal | the logits of the whole model, bit for bit; in a batch with another session to 1e-4 |
| close | the largest difference follows, as a share of the largest logit |
| refused | midspan says these words instead of loading such a model |
| not tried | no small model of this family could be made, for this reason |
| its texts | of texts and pictures, it is compared where a text has no pictures |
| one session at a time | in a batch, sessions of such a model are computed one after another |

A family is one thing, a checkpoint another: before a model is loaded, a small twin of its own
configuration is tried in the same way. `midspan check` says what became of that.

"""
TABLE = "| family | | |\n|---|---|---|\n"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one family."""

    family: str
    verdict: str
    words: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict in (EQUAL, CLOSE)


def list_families() -> list[str]:
    """Language models of the installed transformers, by the name of their type.

    Of those of texts and pictures, the ones that the library runs as language models, and ours.
    """
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_TEXT_PARTS})


def try_family(family: str) -> Finding:
    """Try a family in a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_tell, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE_S):
            process.kill()
            return Finding(family, CRASHED, f"nothing for {PATIENCE_S:.0f} s")
        return Finding(*json.loads(ours.recv_bytes()))
    except EOFError:
        process.join()
        return Finding(family, CRASHED, f"its process ended with {process.exitcode}")
    finally:
        process.join()
        ours.close()


def _tell(family: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    finding = examine(family)
    answer.send_bytes(json.dumps([finding.family, finding.verdict, finding.words]).encode())


def examine(family: str) -> Finding:
    """Make a small model of a family, cut it in two places and compare."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(prefix="midspan-family-") as name:
        directory = Path(name)
        try:
            whole = write_small(family, directory)
        except Exception as error:  # whatever a foreign class raises
            return Finding(family, NOT_TINY, _short(f"{type(error).__name__}: {error}"))
        cuts = (Cut(1, count_layers(whole) - 1), Cut(0, count_layers(whole)))
        try:
            found = [compare(whole, directory, cut) for cut in cuts]
        except Exception as error:  # the same
            words = explain_error(error, whole.config.model_type, name)
            return Finding(family, REFUSED, _short(words))
    finding = _judge(whole.config.model_type, family, found)
    if not finding.is_right:
        return finding
    texts = "its texts" if whole.config.get_text_config() is not whole.config else ""
    words = ", ".join(filter(None, [texts, finding.words, NOTES.get(family)]))
    return replace(finding, words=words)


def _judge(kind: str, family: str, found: Sequence[Comparison]) -> Finding:
    """The guard looks at the first cut; what it lets pass has to be right at the other too."""
    refusal, other = (explain_difference(comparison, kind) for comparison in found)
    if refusal or other:
        return Finding(family, REFUSED if refusal else DIFFERENT, _short(refusal or other or ""))
    together = "" if all(f.packs_sessions for f in found) else "one session at a time"
    if all(f.same_bits for f in found):
        return Finding(family, EQUAL, together)
    largest = f"{max(f.difference for f in found):.0e}"
    return Finding(family, CLOSE, ", ".join(filter(None, [largest, together])))


def _short(words: str) -> str:
    """For one cell of a table."""
    words = " ".join(words.replace("|", "/").split("model of its configuration: ")[-1].split())
    return words if len(words) <= MAX_WORDS else words[:MAX_WORDS] + " …"


@click.command()
@click.argument("families", nargs=-1)
@click.option("--write", is_flag=True, help="Write docs/models.md.")
def main(families: tuple[str, ...], write: bool) -> None:
    """Try FAMILIES, or all that the installed transformers has."""
    findings = []
    for family in families or list_families():
        findings.append(try_family(family))
        click.echo(f"{family:28} {findings[-1].verdict:10} {findings[-1].words}")
    click.echo(_count(findings))
    if write:
        PAGE.write_text(format_page(findings), encoding="utf-8")


def _count(findings: Sequence[Finding]) -> str:
    verdicts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())


def read_page(text: str) -> list[Finding]:
    """The findings of docs/models.md."""
    rows = text.split(TABLE)[1].splitlines()
    return [Finding(*(cell.strip() for cell in row.strip("|").split("|"))) for row in rows if row]


def format_page(findings: Sequence[Finding]) -> str:
    """docs/models.md."""
    right = sum(finding.is_right for finding in findings)
    opening = INTRODUCTION.format(
        version=transformers.__version__, right=right, tried=len(findings)
    )
    rows = "".join(f"| {f.family} | {f.verdict} | {f.words} |\n" for f in findings)
    return f"{opening}{TABLE}{rows}"


if __name__ == "__main__":
    main()
