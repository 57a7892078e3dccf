"""A chat on this device: messages, and a conversation of the engine that keeps what it has seen."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from common.errors import SettingsError
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.stats import GenerationStats
from edge_agent.text.tokenizer import TextStream, TextTokenizer

if TYPE_CHECKING:
    from edge_agent.engine.engine import Engine

Message = Mapping[str, str]  # role and content


class Chat:
    """One after another: what is said, and what the model answers to all of it.

    A turn sends only what the pool has not seen. Raises SettingsError for a tokenizer without a
    chat template unless there is a `template`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        sampling: SamplingSettings,
        max_new_tokens: int,
        system: str = "",
        template: str | None = None,
    ) -> None:
        if template is None and not tokenizer.has_chat_template:
            raise SettingsError(
                "the model's tokenizer has no chat template; give one with --chat-template FILE"
            )
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._template = template
        self._conversation = engine.open()
        self.system = system
        self._said: list[Message] = []
        self.stats: GenerationStats | None = None  # of the last answer

    @property
    def messages(self) -> Sequence[Message]:
        """All that counts: the system prompt if there is one, then the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self._said]

    def ask(self, text: str) -> Generator[str, None, None]:
        """Say something; yields the answer as it comes.

        Closing it stops the answer, and what there is of it stays in the chat. After an
        error it is as if nothing had been said. Raises what Engine.submit raises and its streams.
        """
        self._said.append({"role": "user", "content": text})
        answer = ""
        try:
            prompt_ids = self._tokenizer.render_chat(self.messages, self._template)
            stream = self._conversation.submit(prompt_ids, self._max_new_tokens, self._sampling)
            texts = TextStream(self._tokenizer, prompt_ids)
            try:
                for token in stream:
                    piece = texts.add(token.token_id)
                    answer += piece
                    yield piece
            except (GeneratorExit, KeyboardInterrupt):
                stream.cancel()
                for _ in stream:  # until it is over: one answer at a time
                    pass
                raise
            finally:
                self.stats = stream.stats
        except Exception:
            self._said.pop()
            raise
        except BaseException:
            self._said.append({"role": "assistant", "content": answer})
            raise
        self._said.append({"role": "assistant", "content": answer})

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self._conversation.close()
        self._conversation = self._engine.open()
        self._said.clear()
        self.stats = None

    def close(self) -> None:
        """Tell the pool that it may forget the chat."""
        self._conversation.close()
