"""Train the demo image model on the CPU and write it in diffusers format.

    python training/train_image.py --out models/landscapes-sdxl      (about an hour on one core)

A StableDiffusionXLPipeline with SDXL's own classes and block structure, small enough to ship: two
CLIP text encoders, a UNet with text and time conditioning, a VAE, 64 x 64 pixels. Everything is
seeded and counted in steps, never in seconds.

The latent is not learned but fixed: each 4 x 4 patch's mean colour and its contrast from top to
bottom. So the UNet needs no encoder to train on, and the decoder and the encoder are plain
regressions. UNet and text encoders are trained together, with v-prediction on a schedule that ends
in pure noise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from landscapes import SIZE, write_landscapes
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

FACTOR = 4
LATENT = SIZE // FACTOR
CONTEXT = 32
WIDTH = 64
BATCH = 16
START, END = "<|startoftext|>", "<|endoftext|>"
LUMA = torch.tensor([0.299, 0.587, 0.114])


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte pairs, learned on the captions: every word of theirs is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = tokenizer.get_vocab()
    symbols = sorted(learned, key=lambda token: learned[token])
    symbols += [letter + "</w>" for letter in alphabet if letter + "</w>" not in learned]
    vocabulary = {token: number for number, token in enumerate([*symbols, START, END])}
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def build_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    first = CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu"))
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text, hidden_act="gelu"))
    for encoder in (first, second):  # the default is too small for the last layer but one to speak
        embeddings = [module for module in encoder.modules() if isinstance(module, nn.Embedding)]
        for embedding in embeddings:
            positions = embedding.num_embeddings == CONTEXT
            nn.init.normal_(embedding.weight, std=0.3 if positions else 0.6)
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 3, 4],
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=WIDTH + 6 * 32,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def fixed_latents(pictures: Tensor) -> Tensor:
    """(n, 3, SIZE, SIZE) in [-1, 1] -> (n, 4, LATENT, LATENT), each channel of about unit spread."""
    colors = functional.avg_pool2d(pictures, FACTOR)
    luma = torch.einsum("nchw,c->nhw", pictures, LUMA)[:, None]
    halves = functional.avg_pool2d(luma, (FACTOR // 2, FACTOR))
    contrast = halves[:, :, 0::2] - halves[:, :, 1::2]
    return torch.cat([2.0 * colors, 5.0 * contrast], dim=1)


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to 2% of the peak."""
    if step < 200:
        return peak * (step + 1) / 200
    progress = (step - 200) / max(1, steps - 200)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Course:
    """One optimizer with its schedule, and a line of progress every 100 steps."""

    def __init__(self, name: str, parameters: list[nn.Parameter], steps: int, peak: float) -> None:
        self.name, self.steps, self.peak = name, steps, peak
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.started_at = time.monotonic()
        self.mean_loss = 0.0

    def learn(self, step: int, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(step, self.steps, self.peak)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mean_loss += (loss.item() - self.mean_loss) / min(step + 1, 100)
        if step % 100 == 0:
            seconds = time.monotonic() - self.started_at
            print(f"{self.name} {step} loss {self.mean_loss:.4f} {seconds:.0f} s", flush=True)


def train_vae(
    vae: AutoencoderKL, pictures: Tensor, latents: Tensor, steps: int, bf16: bool
) -> None:
    course = Course("vae", list(vae.parameters()), steps, 2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (8,), generator=generator)
        picture, latent = pictures[chosen], latents[chosen]
        noisy = latent + 0.05 * torch.randn(latent.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            decoded = vae.decode(noisy).sample
            moments = vae.encode(picture).latent_dist
        mean, spread = moments.mean.float(), moments.logvar.float()
        loss = functional.l1_loss(decoded.float(), picture) + functional.mse_loss(
            decoded.float(), picture
        )
        loss = (
            loss + 0.2 * functional.mse_loss(mean, latent) + 0.001 * (spread + 12).square().mean()
        )
        course.learn(step, loss)


def train_unet(
    pipeline: StableDiffusionXLPipeline,
    latents: Tensor,
    captions: list[str],
    steps: int,
    bf16: bool,
) -> None:
    """UNet and both text encoders together; what stays is a running average of the weights."""
    trained = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    parameters = [parameter for model in trained for parameter in model.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    tokens = pipeline.tokenizer(
        captions, padding="max_length", max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    alphas = EulerDiscreteScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    size = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).expand(BATCH, 6)
    course = Course("unet", parameters, steps, 1.5e-3)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        at = torch.randint(len(alphas), (BATCH,), generator=generator)
        kept = (torch.rand(BATCH, generator=generator) > 0.1).float()
        signal = alphas[at].sqrt()[:, None, None, None]
        sigma = (1 - alphas[at]).sqrt()[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            first = pipeline.text_encoder(tokens[chosen], output_hidden_states=True)
            second = pipeline.text_encoder_2(tokens[chosen], output_hidden_states=True)
            hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            predicted = pipeline.unet(
                signal * clean + sigma * noise,
                at,
                hidden * kept[:, None, None],
                added_cond_kwargs={
                    "text_embeds": second.text_embeds * kept[:, None],
                    "time_ids": size,
                },
            ).sample
        course.learn(step, functional.mse_loss(predicted.float(), signal * noise - sigma * clean))
        decay = min(0.998, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    pairs = write_landscapes(arguments.pictures, seed=1)
    pixels = np.stack([np.asarray(picture) for picture, _ in pairs])
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    captions = [caption for _, caption in pairs]
    latents = fixed_latents(pictures)
    print("spread of the latent's channels", latents.std(dim=(0, 2, 3)).tolist())
    pipeline = build_pipeline(train_tokenizer(captions))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        count = sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        print(f"{name}: {count:,} parameters")
    train_unet(pipeline, latents, captions, arguments.steps, bf16)
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.out)
    pipeline.to(dtype=torch.float32)
    train_vae(pipeline.vae, pictures, latents, arguments.vae_steps, bf16)
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
