"""`midspan eval leakage`: attacks find what is there to be found, and no more is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import error_line, run_midspan
from random_models import save_random_model
from transformers import GPT2Config, MambaConfig

from common.errors import SettingsError
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.attacks import (
    ATTACKS,
    DRAFTED,
    KNOWN_TOKENS,
    Situation,
    use_known_plaintext,
)
from evaluation.leakage.command import ATTACK_NAMES
from evaluation.leakage.exact_search import ExactSearch
from evaluation.leakage.inversion import LinearMap, Network, know_plaintext
from evaluation.leakage.split_model import Conversation, SplitModel
from evaluation.leakage.table import measure
from evaluation.leakage.texts import Division, divide_text, draw_texts

PROMPT = "Once upon a time, there was a brave fox named Mia. She loved to paint in the sun."


@pytest.fixture(scope="module")
def split(demo_directory: Path) -> SplitModel:
    return SplitModel(demo_directory)


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> TextTokenizer:
    return TextTokenizer(demo_directory)


@pytest.fixture(scope="module")
def situation(split: SplitModel, tokenizer: TextTokenizer) -> Situation:
    """One conversation as fp32, an attacker with random texts."""
    codecs = split.make_codecs("fp32")
    conversation = split.converse(tokenizer.encode(PROMPT), 12, codecs)
    return Situation(split, codecs, [conversation], draw_texts(300, 30, 0, split.ends.vocabulary))


def test_exact_search_reads_all_of_prompts_and_answers_whatever_the_cut_and_codec(
    demo_directory: Path,
) -> None:
    done = run_midspan(
        "eval", "leakage", "stories-llama", "--text", str(demo_directory / "validation.txt"),
        "--documents", "--tokens", "24", "--window", "16", "-n", "4",
        "--attack", "exact-search", "--attack", "downlink", "--attack", "drafted-rows",
        "--cut", "1:7", "--cut", "4:6", "--codec", "fp32", "--codec", "int4", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["headline_percent"] == 100
    found = {(a["attack"], a["cut"], a["codec"]): a for a in report["attacks"]}
    assert len(found) == 12
    for (attack, _, codec), leak in found.items():
        if attack == "exact-search":
            assert leak["recovered_percent"] == leak["similarity_percent"] == 100
        elif attack == "drafted-rows":  # of tokens that were never written
            assert leak["recovered_percent"] == leak["answer_percent"] == 100
        elif codec == "fp32":
            assert leak["answer_percent"] == 100  # greedy choice is what the logits say
            assert leak["prompt_percent"] < 100


def test_wrong_guesses_are_tokens_that_the_session_has_not_written(
    split: SplitModel, situation: Situation
) -> None:
    steps = situation.of_wrong_guesses().conversations
    assert steps
    (conversation,) = situation.conversations
    written = conversation.token_ids
    for step in steps:
        known = step.prompt_tokens
        assert step.token_ids[:known] == written[:known]
        assert step.token_ids[known] != written[known]
        rows = split.send(step.token_ids, situation.codecs)
        assert torch.equal(step.up, rows)


def test_a_session_without_wrong_guesses_has_no_line_for_them(
    split: SplitModel, tokenizer: TextTokenizer
) -> None:
    codecs = split.make_codecs("fp32")
    short = split.converse(tokenizer.encode(PROMPT), 1, codecs)
    assert measure(DRAFTED, Situation(split, codecs, [short], []), tokenizer) is None


def test_a_conversation_is_what_the_whole_model_writes(
    situation: Situation, whole_model: torch.nn.Module
) -> None:
    (conversation,) = situation.conversations
    prompt = conversation.token_ids[: conversation.prompt_tokens]
    written = whole_model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False
    )
    assert conversation.token_ids == written[0].tolist()
    assert len(conversation.up) == len(conversation.down) == len(conversation.token_ids)


def test_exact_search_reads_a_model_of_another_family_by_its_own_head_only(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=90, n_embd=32, n_layer=3, n_head=2, n_positions=64, eos_token_id=None
    )
    split = SplitModel(save_random_model(config, tmp_path), "1:2")
    codecs = split.make_codecs("int8")
    tokens = draw_texts(25, 25, 3, 90)[0]
    seen = split.send(tokens, codecs)
    own = ExactSearch([split.ends.head], 90, 3)
    assert own.recover(seen, codecs.up) == tokens
    generator = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    found = own.recover(seen @ turn, codecs.up)  # what another head might have sent
    assert sum(a == b for a, b in zip(found, tokens, strict=True)) < 5


def test_rows_of_the_embedding_itself_are_read_by_nearest_embedding(
    demo_directory: Path, tokenizer: TextTokenizer
) -> None:
    split = SplitModel(demo_directory, "0:8")
    codecs = split.make_codecs("int8")
    conversation = split.converse(tokenizer.encode(PROMPT), 0, codecs)
    leak = measure("nearest-embedding", Situation(split, codecs, [conversation], []), tokenizer)
    assert (leak.cut, leak.recovered_percent) == ("0-8", 100)


@pytest.mark.parametrize("attack", [LinearMap, Network, know_plaintext])
def test_maps_that_are_trained_tell_clusters_apart_and_noise_not(attack: type) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=generator)
    tokens = torch.arange(400) % 8
    noise = torch.randn(400, 16, generator=generator)
    rows = centres[tokens] + noise / 10
    trained = attack(rows[:200], 5 * tokens[:200])
    assert torch.equal(trained.recover(rows[200:]), 5 * tokens[200:])
    deceived = attack(noise[:200], 5 * tokens[:200])
    right = (deceived.recover(noise[200:]) == 5 * tokens[200:]).float().mean()
    assert right < 0.25  # an eighth is chance; 200 draws stay within 3 deviations of 0.023


def test_known_plaintext_is_not_counted_as_recovered(
    situation: Situation, split: SplitModel, tokenizer: TextTokenizer
) -> None:
    few = Situation(
        split,
        situation.codecs,
        [split.converse(tokenizer.encode(PROMPT)[:KNOWN_TOKENS], 0, situation.codecs)],
        [],
    )
    assert measure("known-plaintext", few, tokenizer).recovered_percent == 0
    twice = Situation(split, situation.codecs, [*situation.conversations] * 4, [])
    assert len(twice.conversations[0].token_ids) < KNOWN_TOKENS
    guesses = use_known_plaintext(twice)
    assert [len(guess) for guess in guesses] == [len(c.token_ids) for c in twice.conversations]
    last = twice.conversations[-1].token_ids  # all of its tokens were among those known
    assert sum(a == b for a, b in zip(guesses[-1], last, strict=True)) > len(last) * 3 // 4


def test_half_of_the_tokens_are_fifty_percent_and_marks_count_for_nothing(
    situation: Situation, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(PROMPT)[:11]  # one mark, ten tokens
    assert tokenizer.is_special(ids[0])
    half = 5
    guess = [-1, *ids[1:6], *([ids[1]] * 5)]
    assert ids[1] not in ids[6:]
    rows = torch.zeros(len(ids), 1)
    only = Situation(
        situation.split, situation.codecs, [Conversation(ids, 1 + half, rows, rows)], []
    )
    monkeypatch.setitem(ATTACKS, "downlink", lambda _: [guess])
    leak = measure("downlink", only, tokenizer)
    assert (leak.recovered_percent, leak.prompt_percent, leak.answer_percent) == (50, 100, 0)
    assert 0 < leak.similarity_percent < 100


def test_the_prompts_are_no_part_of_what_the_attacker_trains_on(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = tmp_path / "text"
    path.write_text("Tom ran.\n\nMia sat.\n\nThe end.\n\n")
    texts = divide_text(path, tokenizer, True, Division(30, 6, 100), 1024)
    words = [tokenizer.decode(text) for text in texts.prompts]
    others = [tokenizer.decode(text) for text in texts.others]
    assert words[0] == "Tom ran."
    assert not set(words) & set(others)
    assert "The end." in others
    assert sum(map(len, texts.others)) >= 100
    assert all(text[0] == texts.prompts[0][0] for text in texts.others)


def test_a_text_without_documents_is_cut_into_prompts_that_begin_alike(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = tmp_path / "text"
    path.write_text(PROMPT)
    texts = divide_text(path, tokenizer, False, Division(8, 1000, 8), 1024)
    first = tokenizer.encode(PROMPT)[0]
    assert all(prompt[0] == first and len(prompt) <= 8 for prompt in texts.prompts)
    joined = [token for prompt in texts.prompts for token in prompt[1:]]
    assert joined == tokenizer.encode(PROMPT)[1 : 1 + len(joined)]
    assert len(joined) >= len(tokenizer.encode(PROMPT)) - 2  # a last prompt of one token is none


def test_the_commands_attacks_are_those_that_are_there() -> None:
    assert tuple(ATTACKS) == ATTACK_NAMES


def test_a_text_of_nothing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("\n")
    line = error_line("eval", "leakage", "stories-llama", "--text", str(path))
    assert "fewer than 2 tokens" in line
    assert "int99" in error_line(
        "eval", "leakage", "stories-llama", "--text", str(path), "--codec", "int99"
    )


def test_what_is_for_texts_only_is_refused_of_an_image_model(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("a tree")
    command = ["eval", "leakage", "landscapes-sdxl", "--text", str(path)]
    assert "--attack is for language models" in error_line(*command, "--attack", "network")
    assert "does not go with images" in error_line(*command, "--codec", "compact")


@pytest.mark.long
@pytest.mark.usefixtures("unforked")
def test_an_image_sessions_prompt_and_picture_are_recovered(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("a red house on a green hill under a blue sky with the sun\n")
    done = run_midspan(
        "eval", "leakage", "landscapes-sdxl", "--text", str(path), "--codec", "fp32", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["headline_percent"] == 100
    found = {(a["attack"], a["cut"]): a["recovered_percent"] for a in report["attacks"]}
    assert found["prompt-search", "unet"] == found["prompt-search", "inner"] == 100
    assert found["latents", "unet"] > 99.9  # stepped as the device steps them
    assert found["features-map", "inner"] > 77  # no two of twelve different pictures have more


def test_exact_search_is_refused_where_layers_keep_a_state_of_the_text(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=3)
    split = SplitModel(save_random_model(config, tmp_path), "1:2")
    codecs = split.make_codecs("fp32")
    seen = split.send([3, 4, 5], codecs)
    with pytest.raises(SettingsError, match="choose other attacks with --attack"):
        ExactSearch([split.ends.head], 40, 3).recover(seen, codecs.up)


def test_without_a_tail_on_the_device_the_downlink_says_the_answer(
    demo_directory: Path, tokenizer: TextTokenizer
) -> None:
    split = SplitModel(demo_directory, "6:")
    codecs = split.make_codecs("int8,top100")
    conversation = split.converse(tokenizer.encode(PROMPT), 8, codecs)
    leak = measure("downlink", Situation(split, codecs, [conversation], []), tokenizer)
    assert (leak.cut, leak.answer_percent) == ("6-8e", 100)
