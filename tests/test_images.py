"""Images through a real pool: equal to diffusers' own pipeline, whoever dies on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import redis
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from forks import run_midspan
from msgspec import structs
from PIL import Image
from pools import PROMPTS, count_records, generate
from test_unet import NARROW
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
)

from common.diffusion.schedulers import (
    NAMES,
    OWN,
    SCHEDULERS,
    check_resumable,
    find_class,
    go_to,
    make_scheduler,
    read_scheduler_config,
)
from common.errors import CheckpointError, NoWorker, ProtocolError, SettingsError, StepRefused
from common.protocol.messages import BOUNDARY, ImageOpening, Part, Step
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.image.maker import ImageMaker, ImageSettings, Progress
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

PROMPT = "a red house on a green hill under a blue sky with the sun"
STEPS = 8
EXACT = ImageSettings(PROMPT, steps=STEPS, guidance=2.5, codec_up="fp32", codec_down="fp32")
KEPT = ("euler", "ddim", "dpm++2m")  # by workers that keep the latents
WAYS: dict[str, dict[str, Any]] = {
    "unet-edge": {}, "unet-cloud": {"sync": "cloud"}, "inner": {"cut": "inner"},
}  # fmt: skip


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


@pytest.fixture(scope="module")
def pool(directory: Path) -> Iterator[LocalPool]:
    settings = PoolSettings(workers=2, model=DEMO_TEXT_MODEL, image_model=str(directory))
    with LocalPool(settings) as running:
        yield running


class Makers:
    """ImageMakers by cut, loaded once."""

    def __init__(self, directory: Path, pool: LocalPool) -> None:
        self._directory, self._pool = directory, pool
        self._makers: dict[str, ImageMaker] = {}
        self._clients: list[BrokerClient] = []

    def __getitem__(self, cut: str) -> ImageMaker:
        if cut not in self._makers:
            self._clients.append(self._pool.connect())
            self._makers[cut] = ImageMaker(self._directory, self._clients[-1], cut)
        return self._makers[cut]

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def make(self, settings: ImageSettings, **others: Any) -> list[Image.Image]:
        return self[settings.cut].make(settings, **others)


@pytest.fixture(scope="module")
def makers(directory: Path, pool: LocalPool) -> Iterator[Makers]:
    loaded = Makers(directory, pool)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def whole(directory: Path) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline: the reference."""
    return load_whole(directory)


def load_whole(directory: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        directory, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(
    whole: StableDiffusionXLPipeline, directory: Path, settings: ImageSettings
) -> list[Image.Image]:
    config = read_scheduler_config(directory)
    whole.scheduler = make_scheduler(config, settings.scheduler, settings.steps)
    images: list[Image.Image] = whole(
        settings.prompt,
        negative_prompt=settings.negative_prompt or None,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.height,
        width=settings.width,
        num_images_per_prompt=settings.count,
        generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
    ).images
    return images


def test_picture_k_of_several_is_the_one_that_its_seed_gives_alone(makers: Makers) -> None:
    settings = dataclasses.replace(EXACT, seed=2**64 - 2, count=3)
    assert settings.seeds == [2**64 - 2, 2**64 - 1, 0]
    together = makers.make(settings)
    for picture, seed in zip(together, settings.seeds, strict=True):
        (alone,) = makers.make(dataclasses.replace(settings, seed=seed, count=1))
        assert difference([picture], [alone]) <= 2  # a batch moves last bits
    assert difference(together[:1], together[1:2]) > 20


def difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    """The largest of any pixel's channel, of 255."""
    assert len(first) == len(second)
    return max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"scheduler": "ddim"}, {"scheduler": "dpm++2m"}, {"guidance": 1.0},
        {"guidance": 0.0, "steps": 1}, {"count": 2},
        {"negative_prompt": "the sun", "seed": 5}, {"height": 48, "width": 80},
    ],
    ids=str,
)  # fmt: skip
def test_the_image_equals_diffusers(
    makers: Makers,
    whole: StableDiffusionXLPipeline,
    directory: Path,
    way: str,
    changes: dict[str, Any],
) -> None:
    settings = dataclasses.replace(EXACT, **WAYS[way], **changes)
    assert difference(makers.make(settings), reference(whole, directory, settings)) == 0


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # some of diffusers' own, in numbers
@pytest.mark.parametrize(
    "name", [*(name for name in SCHEDULERS if name not in KEPT), OWN, "dpm++2m-karras"]
)
def test_the_edge_has_any_scheduler_of_diffusers(
    makers: Makers, whole: StableDiffusionXLPipeline, directory: Path, name: str
) -> None:
    settings = dataclasses.replace(EXACT, steps=3, scheduler=name)
    assert difference(makers.make(settings), reference(whole, directory, settings)) == 0
    class_name, _ = find_class(read_scheduler_config(directory), name)
    assert type(makers["unet"]._pipelines.from_text.scheduler).__name__ == class_name


def test_a_turbo_models_own_scheduler_makes_its_picture_in_one_step_without_guidance(
    pool: LocalPool, directory: Path, tmp_path: Path
) -> None:
    """As published: Euler's ancestral steps, trailing, and one or a few of them."""
    turbo = tmp_path / "turbo"
    shutil.copytree(directory, turbo)
    index = json.loads((turbo / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    (turbo / "model_index.json").write_text(json.dumps(index))
    pipeline = load_whole(turbo)  # with the scheduler that diffusers finds for itself
    assert isinstance(pipeline.scheduler, diffusers.EulerAncestralDiscreteScheduler)
    client = pool.connect()
    maker = ImageMaker(turbo, client)
    for steps in (1, 3):
        settings = dataclasses.replace(EXACT, steps=steps, guidance=0.0)
        images = pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=0.0,
            generator=[torch.Generator().manual_seed(settings.seed)],
        ).images  # fmt: skip
        assert difference(maker.make(settings), images) == 0
        assert maker.stats.calls == steps
    words = r"own \(EulerAncestralDisc.*take euler, ddim, dpm\+\+2m, or leave"
    with pytest.raises(SettingsError, match=words):
        maker.make(dataclasses.replace(EXACT, sync="cloud"))
    client.close()


def test_which_schedulers_a_worker_can_go_on_with(directory: Path) -> None:
    config = read_scheduler_config(directory)
    resumed = []
    for name in NAMES:
        with contextlib.suppress(SettingsError):
            check_resumable(config, name)
            resumed.append(name)
    assert resumed == [OWN, "euler", "ddim", "dpm++2m", "euler-karras", "dpm++2m-karras"]
    with pytest.raises(CheckpointError, match=r"own scheduler is FlowMatch.*--scheduler euler, "):
        make_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, OWN, 4)
    scheduler = make_scheduler(config, "dpm++2m", 4)
    with pytest.raises(ProtocolError, match="remembers 2 outputs; step 1 needs at most 1"):
        go_to(scheduler, 1, [torch.zeros(1), torch.zeros(1)])


@pytest.fixture(scope="module")
def narrow_sdxl(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL base's own UNet blocks and depths with random weights, about a tenth as wide."""
    made = tmp_path_factory.mktemp("narrow-sdxl")
    torch.manual_seed(1)
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "max_position_embeddings": 32,
    }
    demo = load_whole(directory)
    text = CLIPTextConfig(
        **tiny, vocab_size=len(demo.tokenizer), eos_token_id=demo.tokenizer.eos_token_id
    )
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8), norm_num_groups=8, scaling_factor=0.13025,
            force_upcast=False,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=demo.tokenizer,
        tokenizer_2=demo.tokenizer,
        unet=UNet2DConditionModel(**NARROW),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(made)
    return made


def test_a_narrow_sdxl_base_equals_diffusers(narrow_sdxl: Path) -> None:
    settings = dataclasses.replace(EXACT, steps=3, height=128, width=128, guidance=5.0)
    whole = load_whole(narrow_sdxl)
    with LocalPool(PoolSettings(workers=1, image_model=str(narrow_sdxl))) as pool:
        makers = Makers(narrow_sdxl, pool)
        for way in WAYS.values():
            changed = dataclasses.replace(settings, **way)
            assert difference(makers.make(changed), reference(whole, narrow_sdxl, changed)) == 0
        makers.close()


@pytest.mark.parametrize(
    ("way", "scheduler"),
    [("unet-edge", "euler"), ("inner", "dpm++2m"), *(("unet-cloud", name) for name in KEPT)],
)
def test_the_serving_worker_is_killed_at_a_random_step(
    pool: LocalPool, makers: Makers, way: str, scheduler: str
) -> None:
    settings = dataclasses.replace(EXACT, **WAYS[way], scheduler=scheduler, codec_down="int8")
    undisturbed = makers.make(settings)
    maker = makers[settings.cut]
    at = random.Random(f"{way} {scheduler}").randrange(1, STEPS)

    def kill(progress: Progress) -> None:
        if progress.step == at:
            pool.kill_worker(maker.unet.last_worker_id)
            pool.start_worker()

    assert difference(makers.make(settings, on_step=kill), undisturbed) == 0
    assert len(maker.stats.calls_by_worker) >= 2
    pool.wait_for_workers(2)


@pytest.mark.parametrize("way", WAYS)
def test_redis_is_flushed_and_the_worker_killed(pool: LocalPool, makers: Makers, way: str) -> None:
    """What neither worker nor store has comes from the edge."""
    settings = dataclasses.replace(EXACT, **WAYS[way], scheduler="dpm++2m")
    undisturbed = makers.make(settings)
    maker = makers[settings.cut]

    def harm(progress: Progress) -> None:
        if progress.step == 4:
            redis.Redis.from_url(pool.redis_url).flushall()
            pool.kill_worker(maker.unet.last_worker_id)
            pool.start_worker()

    assert difference(makers.make(settings, on_step=harm), undisturbed) == 0
    assert maker.stats.tensors_resent >= 1
    pool.wait_for_workers(2)


def test_the_end_of_an_image_frees_the_store_when_only_a_text_worker_is_left(
    directory: Path,
) -> None:
    with LocalPool(PoolSettings(workers=1, model=DEMO_TEXT_MODEL)) as pool:
        pool.settings = PoolSettings(image_model=str(directory))
        name = pool.start_worker()
        pool.wait_for_workers(2)
        store = redis.Redis.from_url(pool.redis_url)
        client = pool.connect()
        maker = ImageMaker(directory, client, "unet")

        def harm(progress: Progress) -> None:
            if progress.step == 4:
                assert count_records(store) == 2  # conditioning and latents
                pool.kill_worker(name)
                while len(client.status()["workers"]) > 1:
                    time.sleep(0.02)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            maker.make(dataclasses.replace(EXACT, sync="cloud"), on_step=harm)
        client.status()  # what was sent before has been read
        client.close()
        pool.drain_worker("w1")
        assert count_records(store) == 0


@pytest.mark.parametrize("scheduler", KEPT)
def test_cloud_sync_sends_nothing_up_after_the_first_step(makers: Makers, scheduler: str) -> None:
    """If the worker's scheduler went wrong the edge would send its latents, and nobody notice."""
    maker = makers["unet"]
    up: dict[str, list[int]] = {}
    for sync in ("edge", "cloud"):
        counted: list[int] = []
        maker.make(
            dataclasses.replace(EXACT, sync=sync, scheduler=scheduler),
            on_step=lambda progress, counted=counted: counted.append(maker.stats.bytes_up),
        )
        up[sync] = [after - before for before, after in itertools.pairwise(counted)]
    assert all(size < 100 for size in up["cloud"])
    assert all(size > 4 * 16 * 16 * 4 for size in up["edge"])


def test_reuse_asks_the_pool_less_often(makers: Makers) -> None:
    settings = dataclasses.replace(EXACT, cut="inner")
    every = makers.make(settings)
    maker = makers["inner"]
    often, bytes_often = maker.stats.calls, maker.stats.bytes_up
    reused = makers.make(dataclasses.replace(settings, reuse=2))
    assert (often, maker.stats.calls) == (STEPS, STEPS // 2)
    assert maker.stats.bytes_up < 0.6 * bytes_often
    assert 0 < difference(every, reused) < 255


def test_text_and_images_at_the_same_time(
    pool: LocalPool,
    makers: Makers,
    whole: StableDiffusionXLPipeline,
    directory: Path,
    demo_ends: ModelEnds,
) -> None:
    ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
    wanted_tokens, _ = generate(pool, demo_ends, ids, 40)
    jobs = {
        way: dataclasses.replace(EXACT, **changes, seed=seed)
        for seed, (way, changes) in enumerate(WAYS.items())
    }
    results: dict[str, Any] = {}

    def make(way: str) -> None:
        client = pool.connect()
        results[way] = ImageMaker(directory, client, jobs[way].cut).make(jobs[way])
        client.close()

    def write(name: str) -> None:
        results[name] = generate(pool, demo_ends, ids, 40)[0]

    targets: list[tuple[Callable[[str], None], str]] = [(make, way) for way in WAYS]
    targets += [(write, "text 1"), (write, "text 2")]
    threads = [threading.Thread(target=work, args=(name,)) for work, name in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["text 1"] == results["text 2"] == wanted_tokens
    for way, settings in jobs.items():
        # steps of several sessions share batches, whose shape may move the last bit of a float
        assert difference(results[way], reference(whole, directory, settings)) <= 1


def test_sessions_of_several_sizes_do_not_mix(
    pool: LocalPool, whole: StableDiffusionXLPipeline, directory: Path
) -> None:
    jobs = [dataclasses.replace(EXACT, height=side, width=side) for side in (48, 64, 64, 80)]
    results: dict[int, Any] = {}

    def make(index: int) -> None:
        client = pool.connect()
        results[index] = ImageMaker(directory, client).make(jobs[index])
        client.close()

    threads = [threading.Thread(target=make, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, settings in enumerate(jobs):
        assert difference(results[index], reference(whole, directory, settings)) <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "the number of steps is 0"),
        ({"height": 60}, "the height is 60; expected a multiple of 8, as 64"),
        ({"width": -8}, "the width is -8"),
        ({"count": 0}, "the number of images is 0"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"scheduler": "magic"}, "scheduler 'magic' is unknown; known are own, euler"),
        ({"codec_up": "int9"}, "codec 'int9' is unknown"),
        ({"cut": "inner", "sync": "cloud"}, "sync cloud goes with cut unet"),
        ({"reuse": 2}, "reuse goes with cut inner"),
    ],
)
def test_bad_settings_are_named(makers: Makers, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        makers["unet"].make(dataclasses.replace(EXACT, **changes))


def test_the_end_of_a_long_prompt_is_named(makers: Makers) -> None:
    words = "a red house on a green hill under a blue sky with the sun and " * 4
    assert makers["unet"].find_cut_off(PROMPT) == ""
    rest = makers["unet"].find_cut_off(words + "a boat")
    assert rest.endswith("a boat")
    assert len(rest.split()) < len(words.split())


def test_a_pool_without_the_image_model_says_what_it_serves(directory: Path) -> None:
    with LocalPool(PoolSettings(workers=1)) as text_only:
        client = text_only.connect()
        words = r"no worker serves unet of the model .*; being served: stories-llama 2-6"
        with pytest.raises(NoWorker, match=words):
            ImageMaker(directory, client).make(EXACT)
        client.close()


@pytest.mark.parametrize(
    ("tensor", "opening", "words"),
    [
        ({"shape": [1, 3, 16, 16]}, {}, r"expected \(n, 4, h, w\)"),
        ({"shape": [2, 4, 16, 16]}, {}, "sample is of 2 images; expected 1"),
        ({"name": "bogus"}, {}, "unknown tensor 'bogus'"),
        ({"name": "latents"}, {"latents_dtype": "foo"}, "latents comes in a session that keeps"),
        ({"codec": 9}, {}, "codec beyond the 1 it opened"),
        ({}, {"images": 10**6}, "session has 1000000 images"),
        ({}, {"timesteps": []}, "step is number 0; the session has 0"),
        ({}, {"codecs": ["int9"]}, "codec 'int9' is unknown"),
        ({}, {"keeps_latents": True}, "scheduler '' is unknown"),
        ({}, {"keeps_latents": True, "scheduler": "foo 0123"}, "scheduler 'foo' is unknown"),
        ({"shape": [1, 4, 16, 2000]}, {}, "sample has sides"),
        (
            {"name": "prompt_embeds", "shape": [2, 5000, 128]},
            {},
            "prompt_embeds has shape",
        ),
        ({}, {"timesteps": [1.0] * 1001}, "bad timesteps: Expected `array` of length <= 1000"),
    ],
)
def test_steps_that_cannot_be_computed_are_refused_and_the_worker_lives_on(
    pool: LocalPool,
    makers: Makers,
    tensor: dict[str, Any],
    opening: dict[str, Any],
    words: str,
) -> None:
    client = pool.connect(timeout_s=20)
    part = structs.replace(Part(0, [1, 4, 16, 16], 0, BOUNDARY), **tensor)
    size = 4 * int(np.prod(part.shape))
    part = structs.replace(part, body_bytes=size)
    step = Step(random.randbytes(16), 0, 0, 0, 0, [part], 0, 0, 20_000)
    good = ImageOpening(
        makers["unet"]._fingerprint, ["unet"], ["fp32"], 1, 2.5, [999.0], False, "", "float32"
    )
    with pytest.raises(StepRefused, match=words):
        client.ask(
            step, bytes(size), structs.replace(good, **opening), is_known=False,
            wait_for_worker=False,
        )  # fmt: skip
    client.close()
    pool.check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--size", "60"], "the height is 60"),
        (["x", "--size", "big"], "--size is 'big'; expected WIDTHxHEIGHT"),
        (["x", "-o", "picture.xyz"], "picture.xyz has no suffix of a picture format"),
        (["x", "-o", "/dev/null/picture.png"], "/dev/null/picture.png cannot be written"),
        (["x", "--broker", "tcp://127.0.0.1:1"], "no broker answers at tcp://127.0.0.1:1"),
    ],
)
def test_the_command_says_what_is_wrong_before_it_computes(
    arguments: list[str], words: str
) -> None:
    result = CliRunner().invoke(midspan, ["image", *arguments])
    assert result.exit_code == 1
    assert words in result.output


def test_the_command_writes_pictures_previews_and_noise(pool: LocalPool, tmp_path: Path) -> None:
    done = run_midspan(
        "image", PROMPT, "-o", str(tmp_path / "out.png"), "--count", "2", "--steps", "4",
        "--preview-every", "2", "--save-noise", str(tmp_path / "noise"), "--json", "--threads", "1",
        "--broker", pool.edge_endpoint,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["files"] == [str(tmp_path / "out-1.png"), str(tmp_path / "out-2.png")]
    assert result["stats"]["calls"] == 4
    assert result["seeds"][1] == result["seeds"][0] + 1
    for name in ("out-1", "out-2", "out-step02-1", "out-step04-2"):
        assert Image.open(tmp_path / f"{name}.png").size == (64, 64)
    assert len(list((tmp_path / "noise").glob("*.png"))) == 8


def test_a_png_says_how_it_was_made_and_its_prompt_only_if_that_is_wanted(
    pool: LocalPool, tmp_path: Path
) -> None:
    common = ["image", PROMPT, "--steps", "2", "--threads", "1", "--broker", pool.edge_endpoint]
    plain, told = tmp_path / "plain.png", tmp_path / "told.png"
    done = run_midspan(*common, "-o", str(plain))
    said = json.loads(Image.open(plain).text["midspan"])  # type: ignore[attr-defined]
    assert done.stderr == f"seed {said['seed']}\n"
    assert (said["steps"], said["cut"], said["codec_up"]) == (2, "unet", "int8")
    assert "prompt" not in said
    assert PROMPT.encode() not in plain.read_bytes()
    run_midspan(*common, "-o", str(told), "--seed", str(said["seed"]), "--prompt-in-png")
    again = Image.open(told)
    assert json.loads(again.text["midspan"])["prompt"] == PROMPT  # type: ignore[attr-defined]
    assert difference([Image.open(plain)], [again]) == 0


def test_stats_in_a_file_are_the_table_and_nothing_else(pool: LocalPool, tmp_path: Path) -> None:
    done = run_midspan(
        "image", PROMPT, "-o", str(tmp_path / "out.png"), "--steps", "2", "--threads", "1",
        "--stats", "--seed", "1", "--broker", pool.edge_endpoint,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path / 'out.png'}\n"
    assert done.stderr.startswith("what it cost")


@pytest.mark.long
def test_half_precision_on_both_sides_is_close_and_stays_in_step(
    directory: Path, whole: StableDiffusionXLPipeline
) -> None:
    settings = PoolSettings(workers=1, image_model=str(directory), dtype="float16")
    exact = reference(whole, directory, EXACT)
    with LocalPool(settings) as pool:
        client = pool.connect()
        for way in WAYS.values():
            changed = dataclasses.replace(EXACT, **way, codec_up="fp16", codec_down="fp16")
            maker = ImageMaker(directory, client, changed.cut, dtype="float16")
            assert difference(maker.make(changed), exact) <= 4
            assert maker.stats.tensors_resent == 0
        client.close()


def test_makers_that_are_loaded_at_once_leave_the_library_as_it_was(
    pool: LocalPool, directory: Path
) -> None:
    """It changes its classes while it loads."""
    before = PreTrainedModel.tie_weights
    client = pool.connect()
    threads = [threading.Thread(target=ImageMaker, args=(directory, client)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert PreTrainedModel.tie_weights is before
