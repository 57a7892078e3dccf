"""The server's parts by themselves: no pool, no socket."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from common.errors import CheckpointError, EngineClosed, MidspanError, SettingsError
from deploy.serve import Address, read_key_file, read_template
from edge_agent.commands.sampling_options import Sampling
from edge_agent.server.answers import ShownToken, StoppableText
from edge_agent.server.errors import fault_of
from edge_agent.server.gate import is_this_machine
from edge_agent.server.images import parse_size
from edge_agent.server.opening import count_bits
from edge_agent.server.prompts import PromptReader, join_same_roles
from edge_agent.server.sampling import choose_settings
from edge_agent.server.schema import Message, Sampled
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingDefaults, SamplingSettings, read_defaults
from edge_agent.text.tokenizer import TextStream, TextTokenizer

NOTHING_SAID = Sampling(None, None, None, None, None, None, 0.0, 0.0, None)


@given(
    texts=st.lists(st.text("abc", max_size=3), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_tokens_join_to_the_text_before_the_first_stop_string(
    texts: list[str], stops: list[str]
) -> None:
    shown = StoppableText(stops)
    text, tokens = "", []
    for token_id, each in enumerate(texts):
        more, whole = shown.add(ShownToken(token_id, each))
        text += more
        tokens += whole
        assert text.startswith("".join(token.text for token in tokens))
        if shown.is_over:
            break
    else:
        more, whole = shown.finish()
        text += more
        tokens += whole
        assert len(tokens) == len(texts)
    written = "".join(texts)
    ends = [place for stop in stops if (place := written.find(stop)) >= 0]
    assert "".join(token.text for token in tokens) == text
    assert not any(stop in text for stop in stops)
    assert written.startswith(text)
    assert shown.is_over == bool(ends)


def test_a_long_text_is_tokenized_in_another_thread(demo_ends: ModelEnds) -> None:
    threads = []

    class Watched(TextTokenizer):
        def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread() is threading.main_thread())
            return super().tokenize(text, add_special_tokens)

    reader = PromptReader(demo_ends, Watched(demo_ends.directory))
    long = "Once upon a time. " * 2000
    assert asyncio.run(reader.read("Once")) == reader._tokenizer.tokenize("Once")
    assert len(asyncio.run(reader.read(long))) > 10_000
    said = [Message(role="user", content=long)]
    assert len(asyncio.run(reader.read_chat(said))) > 10_000
    assert threads == [True, True, False, False]


def test_messages_of_one_role_and_name_become_one() -> None:
    def say(role: str, content: str, **name: str) -> dict[str, str]:
        return {"role": role, "content": content, **name}

    said = [
        say("user", "a"), say("user", "b"), say("user", "c", name="Ann"),
        say("assistant", "d"), say("assistant", "e"),
    ]  # fmt: skip
    assert join_same_roles(said) == [
        say("user", "a\n\nb"), say("user", "c", name="Ann"), say("assistant", "d\n\ne"),
    ]  # fmt: skip


def test_a_character_that_the_prompt_began_is_finished(demo_directory: Path) -> None:
    tokenizer = TextTokenizer(demo_directory)
    first, second = tokenizer.tokenize("é", add_special_tokens=False)
    assert TextStream(tokenizer, [*tokenizer.encode("caf"), first]).add(second) == "é"


@pytest.mark.parametrize("text", ["a café 🦊 at 9%\n", "\x00\t ~\xa0\xad÷"])
def test_the_bytes_of_tokens_join_to_the_text(demo_directory: Path, text: str) -> None:
    tokenizer = TextTokenizer(demo_directory)
    ids = tokenizer.encode(text)
    assert tokenizer.is_special(ids[0])
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_the_bytes_of_sentencepieces_tokens_are_read_from_their_names(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁Once": 1, "<0xC3>": 2, "<0xA9>": 3, "Ġ": 4}
    whole = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    assert [tokenizer.token_bytes(i) for i in range(5)] == [
        b"", b" Once", b"\xc3", b"\xa9", "Ġ".encode(),
    ]  # fmt: skip
    assert not tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        (None, SamplingDefaults()),
        ("{}", SamplingDefaults()),
        ('{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}',
         SamplingDefaults(0.6, 20, 0.9, repetition_penalty=1.1)),
        ('{"min_p": 0.05, "typical_p": 0.9}', SamplingDefaults(min_p=0.05, typical_p=0.9)),
        ('{"temperature": 0.6, "do_sample": false}', SamplingDefaults(0.6, draws=False)),
        ('{"temperature": null, "do_sample": true}', SamplingDefaults(draws=True)),
    ],
)  # fmt: skip
def test_a_checkpoints_sampling_is_read(
    tmp_path: Path, config: str | None, defaults: SamplingDefaults
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(config)
    assert read_defaults(tmp_path) == defaults


@pytest.mark.parametrize(
    "config", ['{"top_p": "a"}', '{"top_p": 7}', '{"temperature": true}', '{"do_sample": 1}']
)
def test_a_checkpoints_sampling_that_is_none_is_named(tmp_path: Path, config: str) -> None:
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_defaults(tmp_path)


@pytest.mark.parametrize(
    ("defaults", "of_a_request", "of_a_command"),
    [
        (SamplingDefaults(), 1.0, 0.0),
        (SamplingDefaults(0.6), 0.6, 0.0),  # as transformers, which wants do_sample
        (SamplingDefaults(0.6, draws=True), 0.6, 0.6),
        (SamplingDefaults(draws=True), 1.0, 1.0),
        (SamplingDefaults(0.6, draws=False), 0.0, 0.0),
    ],
)
def test_a_temperature_that_nobody_gave(
    defaults: SamplingDefaults, of_a_request: float, of_a_command: float
) -> None:
    assert choose_settings(Sampled(), defaults, choice=0).temperature == of_a_request
    options = NOTHING_SAID
    assert options.read_settings(defaults).temperature == of_a_command


def test_options_override_the_checkpoint() -> None:
    defaults = SamplingDefaults(0.6, 20, 0.9, 0.1, 0.8, 1.1, draws=True)
    given = Sampling(0.0, 0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 5).read_settings(defaults)
    assert given == SamplingSettings(seed=5)
    assert NOTHING_SAID.read_settings(defaults) == SamplingSettings(0.6, 20, 0.9, 0.1, 0.8, 1.1)


def test_a_request_overrides_the_checkpoint() -> None:
    defaults = SamplingDefaults(0.6, 20, 0.9, 0.1, 0.8, 1.1)
    request = Sampled(
        temperature=0.0, top_k=0, top_p=0.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0,
        seed=-1,
    )  # fmt: skip
    settings = choose_settings(request, defaults, choice=2)
    assert (settings.temperature, settings.top_k, settings.repetition_penalty) == (0.0, 0, 1.0)
    assert 0 < settings.top_p < 1e-3
    assert (settings.min_p, settings.typical_p) == (0.0, 1.0)
    assert settings.seed == 1


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True), ("localhost:8080", True), ("127.0.0.1:1", True), ("[::1]:8080", True),
        ("10.0.0.1:80", True), ("evil.example", False), ("localhost.evil.example", False),
        ("", False), ("[::1].evil.example", False),
    ],
)  # fmt: skip
def test_a_host_header_means_this_machine_or_not(host: str, is_ours: bool) -> None:
    assert is_this_machine(host) == is_ours


def test_what_nobody_expected_is_not_told_in_words() -> None:
    assert fault_of(KeyError("secret")).status == 500
    assert "secret" not in fault_of(KeyError("secret")).message
    assert fault_of(MidspanError("a sentence")).message == "a sentence"
    assert fault_of(EngineClosed("closed")).status == 503


def test_bits_on_the_wire_are_those_of_a_row_or_not_known() -> None:
    assert count_bits("fp16", "up", 128, None) == 16
    assert count_bits("int8", "down", 128, None) == 8 + 8 * 2 / 128  # a scale in 16 bits
    assert count_bits("int8+zstd", "up", 128, None) is None


def test_sizes_of_pictures_are_read() -> None:
    assert parse_size(None) == parse_size("auto") == (None, None)
    assert parse_size("512x768") == (512, 768)
    for text in ("512", "axb", "4096x64", "64x99999"):
        with pytest.raises(MidspanError, match="expected WIDTHxHEIGHT"):
            parse_size(text)


def test_keys_come_from_option_and_file_and_others_than_this_machine_need_one(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert Address("127.0.0.1", 8080, None, None).read_keys() == []
    assert Address("0.0.0.0", 8080, "own", file).read_keys() == ["own", "one", "two"]
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(SettingsError, match=f"--host {host} can be reached from other"):
            Address(host, 8080, None, None).read_keys()
    with pytest.raises(SettingsError, match="an API key is empty or not printable ASCII"):
        Address("127.0.0.1", 8080, " ", None).read_keys()
    with pytest.raises(SettingsError, match="an API key is empty or not printable ASCII"):
        Address("127.0.0.1", 8080, "a\nb", None).read_keys()  # no header could hold it
    file.write_text("\n")
    with pytest.raises(SettingsError, match="has no key in it"):
        read_key_file(file)
    with pytest.raises(SettingsError, match=r"--chat-template .* cannot be read"):
        read_template(tmp_path / "none")


def test_the_demo_models_template_tells_the_story_on(
    demo_directory: Path,
) -> None:
    tokenizer = TextTokenizer(demo_directory)
    said = [
        {"role": "system", "content": " "}, {"role": "user", "content": "Once upon a time.\n"},
        {"role": "assistant", "content": " A fox came."}, {"role": "user", "content": "It ran."},
    ]  # fmt: skip
    assert tokenizer.render_chat(said, None) == tokenizer.encode(
        "Once upon a time. A fox came. It ran."
    )
