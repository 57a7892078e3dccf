"""lm-evaluation-harness with a model cut for a pool, as `--model midspan`.

    python -m evaluation.harness --model midspan \
        --model_args pretrained=DIR,broker=tcp://127.0.0.1:5555,codec=fp32 --tasks midspan_choice

It is lm-eval's own command: this file registers the model and adds the tasks beside it
(evaluation/tasks), which need no download. Releases of lm-eval after 0.4.13 find the model by
themselves (`lm-eval run --model midspan`), by the entry point in `lm_eval.models`. No endpoint is
between: an engine is this process's own, so that many requests share batches. Texts become tokens
as the tokenizer has it, with its marks, which is what lm-eval's `hf` does when it is told
`add_bos_token=True`.

`pip install 'midspan[harness]'` brings lm-eval.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from common.errors import MidspanError, SettingsError
from common.settings import EDGE_ENDPOINT
from common.weights.demo_model import find_model
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.connection_options import Connection
from edge_agent.commands.own_engine import open_engine
from edge_agent.commands.question import Means
from edge_agent.engine.streams import TokenStream
from edge_agent.text.logprobs import TokenLogprob
from edge_agent.text.sampling import SamplingSettings

TASKS = Path(__file__).parent / "tasks"
AT_ONCE = 64  # requests; the engine takes as many sessions
WITHOUT_CONTEXT = 2048
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")

Scored = tuple[float, bool]
Request = tuple[Any, list[int], list[int]]


class MidspanLM(TemplateLM):  # type: ignore[misc]
    """Scores and writes with a pool. Raises what `midspan ask` raises."""

    def __init__(
        self,
        pretrained: str | None = None,
        broker: str = EDGE_ENDPOINT,
        span: str | None = None,
        codec: str = "fp32",
        dtype: str = "float32",
        key: str | None = None,
        broker_key: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        timeout: float = 60.0,
        **others: Any,
    ) -> None:
        """`pretrained` is a directory, or a model that comes with midspan.

        Of `others` lm-eval gives batch_size and device, which mean nothing here.
        """
        super().__init__()
        unknown = sorted(others.keys() - {"batch_size", "max_batch_size", "device"})
        if unknown:
            raise SettingsError(f"--model_args has {unknown[0]!r}, which midspan does not know")
        connection = Connection((broker,), Path(key) if key else None, broker_key)
        means = Means(
            find_model(pretrained), span, dtype, CodecChoice(codec), connection, None, timeout, 1
        )
        means.check()
        self._open = contextlib.ExitStack()
        atexit.register(self.close)
        own = self._open.enter_context(open_engine(means))
        self._engine, self._text = own.engine, own.tokenizer
        ends = own.choice()
        self._name = ends.name
        self._end_ids = sorted(ends.eos_ids)
        self.max_length = int(max_length or (ends.context or WITHOUT_CONTEXT) - 2)
        self.max_gen_toks = max_gen_toks

    def close(self) -> None:
        """End the engine."""
        self._open.close()

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval knows the requests that it has kept."""
        return self._name

    @property
    def eot_token_id(self) -> int:
        if not self._end_ids:
            raise SettingsError(f"{self._name} has no token that ends a text")
        return self._end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with: the tokenizer's mark, or the end of the one before."""
        marks = self._text.tokenize("")
        return marks[0] if marks else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._text.tokenize(string, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Scored]:
        return [scored for part in _split(requests) for scored in self._score(part)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, those longer than the context in windows, as lm-eval's others have it."""
        results = []
        for request in requests:
            windows = map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(None, *window) for window in windows])
            results.append(sum(value for value, _ in scored))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [text for part in _split(requests) for text in self._write(part)]

    def _score(self, requests: Sequence[Request]) -> Iterator[Scored]:
        """Some at once: the log-likelihood of each continuation, and whether it is greedy."""
        texts = [(context + more)[-(self.max_length + 1) :] for _, context, more in requests]
        streams = [self._engine.submit(t, 0, top_logprobs=1, score_prompt=True) for t in texts]
        for (_, _, more), stream in zip(requests, streams, strict=True):
            list(stream)  # until it is over
            own = stream.prompt_logprobs[-len(more) :]
            yield sum(each.logprob for each in own), all(map(_is_greedy, own))

    def _write(self, requests: Sequence[Any]) -> Iterator[str]:
        begun = [self._begin(*request.args) for request in requests]
        for stream, stops in begun:
            yield self._read(stream, stops)

    def _begin(self, context: str, wishes: dict[str, Any]) -> tuple[TokenStream, list[str]]:
        kwargs = normalize_gen_kwargs(wishes, self.max_gen_toks)
        room = int(kwargs["max_gen_toks"])
        prompt = self.tok_encode(context)[-max(1, self.max_length - room) :]
        drawing = {name: kwargs[name] for name in DRAWING if kwargs.get(name) is not None}
        until = kwargs.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        return self._engine.submit(prompt, room, SamplingSettings(**drawing)), stops

    def _read(self, stream: TokenStream, stops: Sequence[str]) -> str:
        """The text up to the first of some strings; what would come after is not computed."""
        token_ids: list[int] = []
        for token in stream:
            token_ids.append(token.token_id)
            text = self._text.decode(token_ids)
            ends = [at for stop in stops if (at := text.find(stop)) >= 0]
            if ends:
                stream.cancel()
                return text[: min(ends)]
        return self._text.decode(token_ids)


def _is_greedy(scored: TokenLogprob) -> bool:
    return bool(scored.top) and scored.top[0][0] == scored.token_id


def _split(requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (requests[at : at + AT_ONCE] for at in range(0, len(requests), AT_ONCE))


def main() -> None:
    """lm-eval's command, with this model and these tasks."""
    from lm_eval.__main__ import cli_evaluate

    register_model("midspan")(MidspanLM)
    if "--include_path" not in sys.argv and "ls" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except MidspanError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
