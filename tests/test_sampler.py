"""The sampler against transformers' own generate, and its edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.codecs.codec import make_codec
from common.errors import NonFiniteError, SettingsError
from edge_agent.text.sampler import Forward, Sampler, score, write
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.tokenizer import TextTokenizer

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def draw(settings: SamplingSettings, count: int = 200) -> set[int]:
    sampler = Sampler(settings)
    return {sampler.pick(LOGITS, [0]) for _ in range(count)}


def test_temperature_zero_takes_the_largest() -> None:
    assert draw(SamplingSettings()) == {1}


def test_top_k_keeps_the_k_largest() -> None:
    assert draw(SamplingSettings(temperature=5.0, top_k=2, seed=0)) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    # softmax of the logits: 0.09, 0.66, 0.24, 0.01
    assert draw(SamplingSettings(temperature=1.0, top_p=0.6, seed=0)) == {1}
    assert draw(SamplingSettings(temperature=1.0, top_p=0.8, seed=0)) == {1, 2}


def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest() -> None:
    assert draw(SamplingSettings(temperature=1.0, min_p=0.5, seed=0)) == {1}
    assert draw(SamplingSettings(temperature=1.0, min_p=0.3, seed=0)) == {1, 2}  # 0.24 / 0.66


def test_typical_p_keeps_what_surprises_as_much_as_is_to_be_expected() -> None:
    """1.5 nats are: 0.15 has 1.9, and 0.4, though the likeliest, 0.9."""
    logits = torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15]).log()
    sampler = Sampler(SamplingSettings(temperature=1.0, typical_p=0.5, seed=0))
    assert {sampler.pick(logits, [0]) for _ in range(200)} == {1, 2, 3, 4}


def test_a_repetition_penalty_makes_a_seen_token_less_likely() -> None:
    sampler = Sampler(SamplingSettings(repetition_penalty=2.0))
    assert sampler.pick(LOGITS, [1]) == 2  # 3.0 / 2 is less than 2.0


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.clone()
    Sampler(SamplingSettings(temperature=0.5, repetition_penalty=2.0, seed=1)).pick(logits, [1])
    assert torch.equal(logits, LOGITS)


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=3.0, seed=seed))
        return [sampler.pick(LOGITS, [0]) for _ in range(50)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_penalty_gives_the_tokens_of_generate(
    whole_model: torch.nn.Module, demo_directory: object
) -> None:
    tokenizer = TextTokenizer(demo_directory)  # type: ignore[arg-type]
    ids = tokenizer.encode("Once upon a time, there was a fox.")
    want = whole_model.generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, repetition_penalty=1.3
    )[0].tolist()
    sampler = Sampler(SamplingSettings(repetition_penalty=1.3))
    ours = list(ids)
    with torch.no_grad():
        while len(ours) < len(want):
            ours.append(sampler.pick(whole_model(torch.tensor([ours])).logits[0, -1], ours))
    assert ours == want


def test_nan_logits_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="NaN"):
        Sampler(SamplingSettings()).pick(torch.tensor([1.0, float("nan")]), [])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"typical_p": 0.0},
        {"typical_p": float("nan")},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="expected"):
        SamplingSettings(**bad)  # type: ignore[arg-type]


def test_whole_numbers_are_numbers() -> None:
    penalties = SamplingSettings(presence_penalty=1, frequency_penalty=1)
    assert Sampler(penalties).pick(LOGITS, [1]) == 2  # 3 - 1 - 1 is less than 2
    assert Sampler(SamplingSettings(logit_bias={3: 5})).pick(LOGITS, [1]) == 3


def test_settings_that_leave_no_token_are_named() -> None:
    none = SamplingSettings(temperature=1.0, logit_bias=dict.fromkeys(range(len(LOGITS)), -100.0))
    with pytest.raises(SettingsError, match="leave no token"):
        Sampler(none).pick(LOGITS, [0])
    with pytest.raises(SettingsError, match="leave no token"):
        Sampler(SamplingSettings(temperature=1e-4)).pick(LOGITS * 1e36, [0])


def forward_of(model: torch.nn.Module) -> Forward:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(ids).logits
            return logits

    return forward


@pytest.mark.parametrize(
    "options",
    [{"min_p": 0.1}, {"typical_p": 0.7}, {"top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.3}],
)
def test_the_library_writes_what_generate_writes_from_any_function(
    whole_model: torch.nn.Module, demo_directory: Path, options: dict[str, float]
) -> None:
    """Both are left one token to draw, by a temperature that makes the likeliest certain."""
    ids = TextTokenizer(demo_directory).encode("Once upon a time, there was a fox.")
    cold = {"temperature": 1e-3, **options}
    want = whole_model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=True, top_k=options.get("top_k", 0),
        **{name: value for name, value in cold.items() if name != "top_k"},
    )[0].tolist()  # fmt: skip
    tokens = write(forward_of(whole_model), ids, 24, SamplingSettings(**cold))  # type: ignore[arg-type]
    assert ids + list(tokens) == want


def test_the_library_stops_at_the_end_of_a_text() -> None:
    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids + 1, 10).float()

    assert list(write(forward, [1], 20, eos_ids={4})) == [2, 3, 4]
    assert list(write(forward, [1], 2)) == [2, 3]


def test_continuations_of_several_lengths_score_in_one_batch_what_each_does_alone(
    whole_model: torch.nn.Module, demo_directory: Path
) -> None:
    tokenizer, calls = TextTokenizer(demo_directory), []
    prompt = tokenizer.encode("Once upon a time, there was a")
    options = [tokenizer.tokenize(o, False) for o in (" fox.", " big, kind elephant.", " of")]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        return forward_of(whole_model)(ids)

    scores = score(forward, prompt, [*options, []])
    assert calls == [4]
    for option, got in zip(options, scores[:-1], strict=True):
        logprobs = forward_of(whole_model)(torch.tensor([prompt + option])).log_softmax(-1)[0]
        want = sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(option))
        assert got == pytest.approx(want, abs=1e-4)
    assert scores[-1] == 0.0


def test_a_token_that_the_codec_left_out_is_not_chosen_when_the_others_are_banned() -> None:
    codec = make_codec("top2", "down", None)
    logits = codec.decode(codec.encode(LOGITS[None]), 1, len(LOGITS), torch.float32)[0]
    for temperature in (0.0, 1.0, 1e4):
        sampler = Sampler(SamplingSettings(temperature, logit_bias={1: -100, 2: -100}))
        with pytest.raises(SettingsError, match="leave no token"):
            sampler.pick(logits, [0])
