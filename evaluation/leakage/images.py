"""What an operator of the pool recovers of an image session: the prompt, and the picture.

- prompt-search, with either part: each token of the text encoder's vocabulary, put after those
  found so far, is compared with the prompt's embeddings. Encoders see backwards only, so this is
  the exact search for texts.
- latents, with part unet: the latents that come up first and the noises that go down are stepped
  to the end and decoded by the model's VAE.
- features-map, with part inner: a ridge regression from features to latents, trained on pictures
  of the attacker's own, at the last step; then the VAE.

Pictures are compared with the one that the device made, by SSIM.

Letters: B images (twice with guidance), C channels, h and w of the latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from common.diffusion.schedulers import OWN, make_scheduler, read_scheduler_config
from common.diffusion.shapes import INNER, WHOLE
from common.diffusion.tensors import decode_tensor, encode_tensor
from edge_agent.image.maker import ImageMaker, ImageSettings, Progress
from edge_agent.image.remote_unet import Travelled, conditioning_codec
from evaluation.image_metrics import ssim

PARTS = (WHOLE, INNER)
STEPS, GUIDANCE = 15, 2.5
RIDGE = 1e-3  # of the mean variance of the features
OWN_PROMPTS = (
    "a house on a hill", "a boat on the sea", "a mountain under a blue sky", "trees on a desert",
    "a red house on the sea", "a tree under a night sky with the moon", "a boat and a hill",
    "a snowy field",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageLeak:
    """What one attack recovers. Its fields are the columns."""

    attack: str
    cut: str
    codec: str
    recovered_percent: float  # of the prompts' tokens, or SSIM of the pictures times 100
    of: str


@dataclass(slots=True)
class Session:
    """One picture, and what crossed the cut meanwhile, as the pool had it."""

    picture: Image
    embeddings: Tensor  # (tokens, width), of the prompt
    ups: list[Tensor] = field(default_factory=list)  # by step, of the half with the prompt
    downs: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # after each step: the device's own


class Watch:
    """Makes pictures with the pool and keeps what travels."""

    def __init__(self, maker: ImageMaker) -> None:
        self._maker = maker
        self._embeddings: Tensor | None = None
        maker.unet.register_forward_pre_hook(self._catch, with_kwargs=True)

    def make(self, settings: ImageSettings) -> Session:
        """A session of one picture."""
        ups: list[Tensor] = []
        downs: list[Tensor] = []
        latents: list[Tensor] = []

        def on_travel(travelled: Travelled) -> None:
            assert travelled.up is not None
            ups.append(_pass(travelled.up, settings.codec_up)[-1:])
            downs.append(travelled.down[-1:])

        def on_step(progress: Progress) -> None:
            latents.append(progress.latents.clone())

        (picture,) = self._maker.make(settings, on_step, on_travel)
        assert self._embeddings is not None
        embeddings = _pass(self._embeddings, conditioning_codec(settings.codec_up))
        return Session(picture, embeddings[-1], ups, downs, latents)

    def decode(self, latents: Tensor) -> Image:
        return self._maker.decode(latents)[0]

    def _catch(self, _: Any, __: Any, arguments: dict[str, Any]) -> None:
        self._embeddings = arguments["encoder_hidden_states"]


def _pass(tensor: Tensor, codec: str) -> Tensor:
    """As it is on the other side."""
    return decode_tensor(encode_tensor(tensor, codec), tensor.shape, codec)


class PromptSearch:
    """With the first text encoder of a pipeline's directory and its tokenizer."""

    def __init__(self, directory: Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        part = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", **part)
        self._encoder = CLIPTextModel.from_pretrained(
            directory / "text_encoder", dtype=torch.float32, **part
        ).eval()

    def recover(self, embeddings: Tensor) -> list[int]:
        """The tokens whose embeddings (tokens, width) these are, up to the end of the text."""
        found = [self.tokenizer.bos_token_id]
        while len(found) < len(embeddings) and found[-1] != self.tokenizer.eos_token_id:
            found.append(self._find_next(found, embeddings[len(found)]))
        return found

    @torch.inference_mode()
    def _find_next(self, found: list[int], seen: Tensor) -> int:
        vocabulary = torch.arange(len(self.tokenizer))
        texts = torch.cat([torch.tensor(found).expand(len(vocabulary), -1), vocabulary[:, None]], 1)
        distances = []
        for part in torch.split(texts, 256):
            rows = self._encoder(part, output_hidden_states=True).hidden_states[-2][:, -1]
            distances.append((rows - seen[: rows.shape[1]]).norm(dim=1))
        return int(torch.cat(distances).argmin())


def step_to_the_end(session: Session, scheduler: Any) -> Tensor:
    """The last latents, from the first that came up and every noise that went down."""
    first = scheduler.timesteps[0]
    scale = scheduler.scale_model_input(torch.ones(1), first)
    latents: Tensor = session.ups[0] / scale
    for time, noise in zip(scheduler.timesteps, session.downs, strict=True):
        latents = scheduler.step(noise, time, latents, return_dict=False)[0]
    return latents


class FeatureMap:
    """A ridge regression from features around a place to the latents there, at the last step."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        features = torch.cat([_around(session.ups[-1]) for session in sessions])
        latents = torch.cat([_blocks(session.latents[-1], session.ups[-1]) for session in sessions])
        self._mean, self._constant = features.mean(dim=0), latents.mean(dim=0)
        centred = (features - self._mean).double()
        covariance = centred.T @ centred / len(centred)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
        cross = centred.T @ (latents - self._constant).double() / len(centred)
        self._weight = torch.linalg.solve(covariance, cross).float()

    def recover(self, session: Session) -> Tensor:
        """The picture's latents (1, C, h, w)."""
        up = session.ups[-1]
        blocks = (_around(up) - self._mean) @ self._weight + self._constant
        side = session.latents[-1].shape[-1] // up.shape[-1]
        stacked = blocks.view(*up.shape[2:], -1).permute(2, 0, 1)[None]
        latents: Tensor = torch.nn.functional.pixel_shuffle(stacked, side)
        return latents


def _around(up: Tensor) -> Tensor:
    """Features (1, C, y, x) as a row for each place: its own and its eight neighbours'."""
    return torch.nn.functional.unfold(up, 3, padding=1)[0].T


def _blocks(latents: Tensor, up: Tensor) -> Tensor:
    """The latents (1, C, h, w) under each place of the features, a row each."""
    side = latents.shape[-1] // up.shape[-1]
    return torch.nn.functional.pixel_unshuffle(latents, side)[0].flatten(1).T


def attack_images(
    directory: Path, prompts: Sequence[str], codecs: Sequence[str]
) -> Iterator[list[ImageLeak]]:
    """A line for each attack, by part and codec. Starts a pool."""
    from deploy.pool import LocalPool, PoolSettings

    search = PromptSearch(directory)
    with LocalPool(PoolSettings(workers=1, image_model=str(directory))) as pool:
        for part in PARTS:
            client = pool.connect()
            watch = Watch(ImageMaker(directory, client, part))
            for codec in codecs:
                settings = ImageSettings(
                    "", steps=STEPS, guidance=GUIDANCE, cut=part, codec_up=codec, codec_down=codec
                )
                yield _attack_part(directory, watch, settings, prompts, search)
            client.close()


def _attack_part(
    directory: Path,
    watch: Watch,
    settings: ImageSettings,
    prompts: Sequence[str],
    search: PromptSearch,
) -> list[ImageLeak]:
    sessions = _make_all(watch, settings, prompts, seed=0)
    found = [_score_prompt(search, s, p) for s, p in zip(sessions, prompts, strict=True)]
    if settings.cut == WHOLE:
        name = "latents"
        pictures = [_step_and_decode(directory, watch, session) for session in sessions]
    else:
        name = "features-map"
        own = FeatureMap(_make_all(watch, settings, OWN_PROMPTS, seed=1000))
        pictures = [watch.decode(own.recover(session)) for session in sessions]
    alike = [ssim(s.picture, picture) for s, picture in zip(sessions, pictures, strict=True)]
    return [
        _leak("prompt-search", settings, mean(found), "prompt, tokens"),
        _leak(name, settings, mean(alike), "picture, SSIM"),
    ]


def _make_all(
    watch: Watch, settings: ImageSettings, prompts: Sequence[str], seed: int
) -> list[Session]:
    return [
        watch.make(replace(settings, prompt=prompt, seed=seed + index))
        for index, prompt in enumerate(prompts)
    ]


def _step_and_decode(directory: Path, watch: Watch, session: Session) -> Image:
    scheduler = make_scheduler(read_scheduler_config(directory), OWN, STEPS)
    return watch.decode(step_to_the_end(session, scheduler))


def _score_prompt(search: PromptSearch, session: Session, prompt: str) -> float:
    """Which share of a prompt's tokens is recovered."""
    sent = search.tokenizer(prompt).input_ids[1:-1]
    found = search.recover(session.embeddings)[1:]
    right: int = sum(a == b for a, b in zip(sent, found, strict=False))
    return right / len(sent)


def _leak(attack: str, settings: ImageSettings, share: float, of: str) -> ImageLeak:
    return ImageLeak(attack, settings.cut, settings.codec_up, round(100 * share, 2), of)
