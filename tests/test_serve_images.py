"""Pictures through the official client: those of `midspan image`, as long as they are wanted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image
from serving import Endpoint, open_endpoint
from waiting import wait_until

from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, ImageSettings
from edge_agent.server.images import ImageService
from edge_agent.text.ends import ModelEnds

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = "a red house on a green hill under a blue sky"
FEW: dict[str, Any] = {"steps": 2, "guidance": 2.0, "negative_prompt": "snow"}


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends, image_model=find_model(DEMO_IMAGE_MODEL)) as running:
        yield running


@pytest.fixture(scope="module")
def maker(pool: LocalPool) -> Iterator[ImageMaker]:
    client = pool.connect()
    yield ImageMaker(find_model(DEMO_IMAGE_MODEL), client)
    client.close()


def service_of(endpoint: Endpoint) -> ImageService:
    assert endpoint.services.images is not None
    return endpoint.services.images


def read_png(data: bytes) -> np.ndarray[Any, Any]:
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    return np.asarray(picture)


def wanted_picture(maker: ImageMaker, seed: int) -> np.ndarray[Any, Any]:
    (picture,) = maker.make(ImageSettings(PROMPT, "snow", steps=2, guidance=2.0, seed=seed))
    return np.asarray(picture)


def test_pictures_are_those_of_the_maker_and_picture_k_has_seed_plus_k(
    endpoint: Endpoint, maker: ImageMaker
) -> None:
    made = endpoint.openai.images.generate(
        prompt=PROMPT, n=2, response_format="b64_json", extra_body=FEW | {"seed": 5}
    )
    pictures = [read_png(base64.b64decode(each.b64_json or "")) for each in made.data or []]
    for k, picture in enumerate(pictures):
        assert np.array_equal(picture, wanted_picture(maker, 5 + k))
    assert endpoint.metric("midspan_images_total") >= 2


def test_a_url_leads_to_the_picture_and_nobody_guesses_it(endpoint: Endpoint) -> None:
    made = endpoint.openai.images.generate(
        model=DEMO_IMAGE_MODEL, prompt=PROMPT, size="64x32", extra_body=FEW | {"cut": "inner"},
        quality="hd", user="me",
    )  # fmt: skip
    ((url, seed),) = [(each.url, each.model_extra["seed"]) for each in made.data or []]
    assert url is not None
    assert url.startswith(f"{endpoint.url}/images/")
    assert read_png(httpx.get(url).content).shape == (32, 64, 3)
    assert 0 <= seed < 2**32
    assert "inner" in service_of(endpoint)._makers
    assert endpoint.http.get("/images/none.png").status_code == 404
    models = [model.id for model in endpoint.openai.models.list()]
    assert models == [DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "prompt", "Field required"),
        ({"prompt": " "}, 400, "prompt", "the prompt is empty"),
        ({"prompt": "a", "size": "65x64"}, 400, "size", "expected a multiple of 8"),
        ({"prompt": "a", "size": "9999x9999"}, 400, "size", "at most 2048"),
        ({"prompt": "a", "size": "big"}, 400, "size", "expected WIDTHxHEIGHT"),
        ({"prompt": "a", "n": 11}, 400, "n", "less than or equal to 10"),
        ({"prompt": "a", "steps": 0}, 400, "steps", "greater than or equal to 1"),
        ({"prompt": "a", "guidance": 5000}, 400, "guidance", "the guidance is 5000"),
        ({"prompt": "a", "cut": "outer"}, 400, "cut", "'unet' or 'inner'"),
        ({"prompt": "a", "response_format": "jpeg"}, 400, "response_format", "'url' or 'b64_json'"),
        ({"prompt": "a", "output_format": "webp"}, 400, "output_format", "'png'"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "model", f"{DEMO_IMAGE_MODEL} is"),
    ],
)
def test_what_is_wrong_with_a_picture_is_said_with_its_field(
    endpoint: Endpoint, body: dict[str, Any], status: int, param: str, words: str
) -> None:
    got, field, message = endpoint.refusal(IMAGES, **body)
    assert (got, field) == (status, param), message
    assert words in message


def test_pictures_that_nobody_waits_for_are_not_made_and_a_full_queue_says_so(
    endpoint: Endpoint,
) -> None:
    service = service_of(endpoint)
    service._most_jobs = 3

    async def hang_up_three() -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            body = {"prompt": PROMPT, "steps": 500}
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(IMAGES, json=body, timeout=1.0)

        async with httpx.AsyncClient(base_url=endpoint.url) as client:
            waiting = [asyncio.create_task(ask(client)) for _ in range(3)]
            while service.jobs < 3:
                await asyncio.sleep(0.01)
            refused = await client.post(IMAGES, json={"prompt": "a"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            await asyncio.gather(*waiting)

    asyncio.run(hang_up_three())
    wait_until(lambda: service.jobs == 0)
    made = endpoint.openai.images.generate(prompt=PROMPT, extra_body={"steps": 1})
    assert len(made.data or []) == 1


def test_texts_are_answered_while_a_picture_is_made(endpoint: Endpoint) -> None:
    service = service_of(endpoint)

    async def both() -> int:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            body = {"prompt": PROMPT, "steps": 300}
            picture = asyncio.create_task(client.post(IMAGES, json=body))
            while service.jobs < 1:
                await asyncio.sleep(0.01)
            text = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4})
            assert service.jobs == 1
            picture.cancel()
            return text.status_code

    assert asyncio.run(both()) == 200
    wait_until(lambda: service.jobs == 0)


# --- a picture to begin with


@pytest.fixture(scope="module")
def begin() -> Image.Image:
    drawn = Image.new("RGB", (64, 64), (90, 140, 220))
    drawn.paste((60, 130, 50), (0, 40, 64, 64))
    return drawn


def as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_an_edit_is_the_picture_that_the_maker_begins_with_another(
    endpoint: Endpoint, maker: ImageMaker, begin: Image.Image
) -> None:
    made = endpoint.openai.images.edit(
        image=("begin.png", as_png(begin)), prompt=PROMPT, n=2, response_format="b64_json",
        extra_body={"steps": 4, "guidance": 2.0, "seed": 5, "strength": 0.5,
                    "negative_prompt": "7"},
    )  # fmt: skip
    for k, each in enumerate(made.data or []):
        settings = ImageSettings(
            PROMPT, "7", steps=4, guidance=2.0, seed=5 + k, init_image=begin, strength=0.5
        )
        (wanted,) = maker.make(settings)
        assert np.array_equal(read_png(base64.b64decode(each.b64_json or "")), np.asarray(wanted))


@pytest.mark.parametrize(
    ("fields", "files", "param", "words"),
    [
        ({"prompt": "a"}, [], "image", "has 0 pictures called image; expected one"),
        ({"prompt": "a"}, ["image[]", "image[]"], "image", "has 2 pictures"),
        ({"prompt": "a"}, ["image", "mask"], "mask", "leave the mask out"),
        ({}, ["image"], "prompt", "Field required"),
        ({"prompt": "a", "strength": "2"}, ["image"], "strength", "less than or equal to 1"),
        ({"prompt": "a", "strength": "0.01"}, ["image"], "strength", "leaves none of 20 steps"),
        ({"prompt": "a", "n": "many"}, ["image"], "n", "valid integer"),
        ({"prompt": "a", "size": "9999x9999"}, ["image"], "size", "at most 2048"),
    ],
)
def test_what_is_wrong_with_an_edit_is_said_with_its_field(
    endpoint: Endpoint,
    begin: Image.Image,
    fields: dict[str, str],
    files: list[str],
    param: str,
    words: str,
) -> None:
    sent = [(name, ("a.png", as_png(begin), "image/png")) for name in files]
    sent = sent or [("other", ("a.png", b"", "image/png"))]
    response = endpoint.http.post(EDITS, data=fields, files=sent)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_bodies_that_are_no_form_or_no_picture_and_forms_of_other_pages_are_refused(
    endpoint: Endpoint, begin: Image.Image
) -> None:
    def post(body: bytes = b"", **headers: str) -> tuple[int, str]:
        sent = {"content-type": "multipart/form-data; boundary=x"} | headers
        response = endpoint.http.post(EDITS, content=body, headers=sent)
        return response.status_code, response.json()["error"]["message"]

    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    assert post(part + as_png(begin)) == (400, "the form does not end, or has no parts")
    assert post(b"--x\r\n\r\n\r\n--x--") == (400, "a part of the form has no name")
    kind = "multipart/form-data"
    assert post(**{"content-type": kind}) == (400, "the form names no boundary")
    assert endpoint.http.post(EDITS, json={}).status_code == 415
    assert endpoint.http.post(IMAGES, data={}, files={"a": b""}).status_code == 415
    assert post(origin="http://elsewhere.example")[0] == 403
    assert post(origin="null")[0] == 403
    assert post(origin=endpoint.url)[0] == 400
    files = {"image": ("a.png", b"none", "image/png")}
    response = endpoint.http.post(EDITS, data={"prompt": "a"}, files=files)
    assert "image cannot be read as a picture" in response.json()["error"]["message"]
