"""Draw little landscapes with captions from a seed: the corpus of the demo image model.

A picture is a scene (sky, ground, subject, what stands in the sky), drawn four times too large with
Pillow and scaled down. The caption names what is in it and nothing else; where things stand and how
large they are is left to chance. The same seed always gives the same pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64
SCALE = 4
CANVAS = SIZE * SCALE

Color = tuple[int, int, int]

SKIES: dict[str, tuple[Color, Color]] = {  # at the top, at the horizon
    "a blue sky": ((64, 134, 222), (186, 221, 247)),
    "an orange sunset": ((214, 84, 62), (253, 190, 92)),
    "a night sky": ((9, 13, 44), (42, 52, 104)),
    "a grey sky": ((126, 134, 144), (190, 195, 200)),
}
GROUNDS: dict[str, Color] = {
    "a green hill": (78, 156, 62),
    "a snowy field": (238, 243, 250),
    "a yellow desert": (228, 196, 112),
    "the sea": (36, 98, 164),
}
WALLS: dict[str, Color] = {
    "red": (202, 44, 38),
    "yellow": (244, 206, 62),
    "blue": (52, 84, 190),
    "white": (246, 244, 238),
}
SAILS: dict[str, Color] = {
    "red": (216, 40, 36),
    "yellow": (250, 214, 56),
    "white": (250, 250, 250),
}
BY_DAY = ["", " with the sun", " with clouds"]
BY_NIGHT = ["", " with the moon", " with stars"]


@dataclass(frozen=True, slots=True)
class Scene:
    sky: str
    ground: str
    subject: str
    above: str

    @property
    def caption(self) -> str:
        if self.subject == "a mountain":
            place = f"{self.subject} behind {self.ground}"
        else:
            place = f"{self.subject} on {self.ground}"
        return f"{place} under {self.sky}{self.above}"


def all_scenes() -> list[Scene]:
    """Every scene that the words allow, in a fixed order."""
    scenes = []
    for sky in SKIES:
        for above in BY_NIGHT if sky == "a night sky" else BY_DAY:
            for ground in GROUNDS:
                if ground == "the sea":
                    subjects = [f"a boat with a {color} sail" for color in SAILS]
                    subjects += ["a lighthouse"]
                else:
                    subjects = [f"a {color} house" for color in WALLS]
                    subjects += ["a tree", "two trees", "a red house and a tree", "a mountain"]
                scenes += [Scene(sky, ground, subject, above) for subject in subjects]
    return scenes


def write_landscapes(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """`count` pictures of SIZE x SIZE pixels, RGB, each with its caption."""
    rng = random.Random(seed)
    scenes = all_scenes()
    chosen = [rng.choice(scenes) for _ in range(count)]
    return [(draw(scene, rng), scene.caption) for scene in chosen]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    top, bottom = SKIES[scene.sky]
    picture = Image.new("RGB", (CANVAS, CANVAS))
    pen = ImageDraw.Draw(picture)
    horizon = int(CANVAS * rng.uniform(0.58, 0.68))
    for y in range(CANVAS):
        pen.line([(0, y), (CANVAS, y)], fill=mix(top, bottom, min(1.0, y / horizon)))
    draw_above(pen, scene, rng)
    if scene.subject == "a mountain":
        draw_mountain(pen, horizon, rng)
    ground = dim(GROUNDS[scene.ground], scene.sky)
    if scene.ground == "the sea":
        draw_sea(pen, ground, horizon, rng)
    else:
        draw_land(pen, ground, horizon, scene.ground == "a green hill", rng)
    draw_subject(pen, scene, horizon + CANVAS // 14, rng)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_above(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    x, y = rng.uniform(0.15, 0.85) * CANVAS, rng.uniform(0.12, 0.24) * CANVAS
    if "sun" in scene.above:
        low = scene.sky == "an orange sunset"
        disc(pen, x, y + low * 0.12 * CANVAS, 0.085 * CANVAS, (255, 236, 120))
    elif "moon" in scene.above:
        disc(pen, x, y, 0.08 * CANVAS, (244, 244, 220))
    elif "clouds" in scene.above:
        color = (255, 222, 200) if scene.sky == "an orange sunset" else (252, 252, 254)
        for center in (0.25, 0.72):
            cx = (center + rng.uniform(-0.1, 0.1)) * CANVAS
            cy = rng.uniform(0.12, 0.28) * CANVAS
            for shift in (-0.09, -0.03, 0.04, 0.1):
                disc(pen, cx + shift * CANVAS, cy, rng.uniform(0.045, 0.07) * CANVAS, color)
    elif "stars" in scene.above:
        for _ in range(22):
            place = rng.uniform(0, CANVAS), rng.uniform(0, 0.5) * CANVAS
            disc(pen, *place, rng.uniform(2.0, 3.6), (255, 255, 236))


def draw_mountain(pen: ImageDraw.ImageDraw, horizon: int, rng: random.Random) -> None:
    peak = rng.uniform(0.35, 0.65) * CANVAS
    height, half = rng.uniform(0.34, 0.42) * CANVAS, rng.uniform(0.32, 0.4) * CANVAS
    foot = horizon + 0.05 * CANVAS
    pen.polygon([(peak - half, foot), (peak, foot - height), (peak + half, foot)], (112, 106, 112))
    pen.polygon([(peak, foot - height), (peak + half, foot), (peak, foot)], (84, 80, 92))
    cap = 0.32
    pen.polygon(
        [
            (peak - half * cap, foot - height * (1 - cap)),
            (peak, foot - height),
            (peak + half * cap, foot - height * (1 - cap)),
            (peak, foot - height * (1 - cap * 0.7)),
        ],
        (250, 250, 252),
    )


def draw_land(
    pen: ImageDraw.ImageDraw, color: Color, horizon: int, curved: bool, rng: random.Random
) -> None:
    if curved:
        lift = rng.uniform(0.05, 0.09) * CANVAS
        middle = rng.uniform(0.35, 0.65) * CANVAS
        pen.ellipse([middle - CANVAS, horizon - lift, middle + CANVAS, horizon + CANVAS], color)
    pen.rectangle([0, horizon + (CANVAS // 12 if curved else 0), CANVAS, CANVAS], color)
    pen.rectangle([0, int(CANVAS * 0.9), CANVAS, CANVAS], mix(color, (30, 30, 30), 0.12))


def draw_sea(pen: ImageDraw.ImageDraw, color: Color, horizon: int, rng: random.Random) -> None:
    pen.rectangle([0, horizon, CANVAS, CANVAS], color)
    light = mix(color, (255, 255, 255), 0.3)
    for row in range(1, 4):
        y = horizon + row * (CANVAS - horizon) // 4
        for _ in range(3):
            x = rng.uniform(0, CANVAS)
            pen.line([(x, y), (x + 0.16 * CANVAS, y)], fill=light, width=4)


def draw_subject(pen: ImageDraw.ImageDraw, scene: Scene, foot: int, rng: random.Random) -> None:
    subject, x = scene.subject, rng.uniform(0.36, 0.64) * CANVAS
    size = rng.uniform(0.9, 1.1)
    if subject == "a red house and a tree":
        side = rng.choice((-1, 1))
        draw_house(pen, (0.5 - side * 0.18) * CANVAS, foot, 0.85 * size, WALLS["red"])
        draw_tree(pen, (0.5 + side * 0.24) * CANVAS, foot, 0.9 * size)
    elif subject.endswith("house") and subject != "a lighthouse":
        draw_house(pen, x, foot, size, WALLS[subject.split()[1]])
    elif subject == "a lighthouse":
        draw_lighthouse(pen, x, foot + CANVAS // 20, size)
    elif subject == "two trees":
        draw_tree(pen, 0.28 * CANVAS, foot, size)
        draw_tree(pen, 0.72 * CANVAS, foot, 2 - size)
    elif subject == "a tree":
        draw_tree(pen, x, foot, 1.15 * size)
    elif subject.startswith("a boat"):
        draw_boat(pen, x, foot + CANVAS // 16, size, SAILS[subject.split()[4]])


def draw_house(pen: ImageDraw.ImageDraw, x: float, foot: float, size: float, wall: Color) -> None:
    half, height = 0.17 * CANVAS * size, 0.2 * CANVAS * size
    pen.rectangle([x - half, foot - height, x + half, foot], wall)
    eaves = foot - height
    pen.polygon(
        [(x - 1.2 * half, eaves), (x, eaves - 0.8 * height), (x + 1.2 * half, eaves)], (92, 58, 48)
    )
    pen.rectangle([x - 0.2 * half, foot - 0.6 * height, x + 0.24 * half, foot], (70, 44, 36))
    for side in (-0.62, 0.62):
        cx, cy, r = x + side * half, foot - 0.62 * height, 0.17 * half
        pen.rectangle([cx - r, cy - r, cx + r, cy + r], (255, 240, 170))


def draw_tree(pen: ImageDraw.ImageDraw, x: float, foot: float, size: float) -> None:
    trunk, height = 0.028 * CANVAS * size, 0.22 * CANVAS * size
    pen.rectangle([x - trunk, foot - height, x + trunk, foot], (104, 68, 40))
    leaf = (28, 104, 44)
    crown = 0.115 * CANVAS * size
    for dx, dy in ((-0.6, 0.1), (0.6, 0.1), (0, -0.5)):
        disc(pen, x + dx * crown, foot - height + dy * crown, crown, leaf)


def draw_lighthouse(pen: ImageDraw.ImageDraw, x: float, foot: float, size: float) -> None:
    height, half = 0.42 * CANVAS * size, 0.075 * CANVAS * size
    pen.ellipse([x - 3 * half, foot - half, x + 3 * half, foot + 1.2 * half], (96, 90, 86))
    for band in range(5):
        low, high = foot - band * height / 5, foot - (band + 1) * height / 5
        wide, narrow = half * (1 - 0.08 * band), half * (1 - 0.08 * (band + 1))
        color = (250, 250, 248) if band % 2 else (206, 40, 40)
        pen.polygon(
            [(x - wide, low), (x + wide, low), (x + narrow, high), (x - narrow, high)], color
        )
    top = foot - height
    pen.rectangle([x - half * 0.6, top - half, x + half * 0.6, top], (255, 232, 120))
    pen.polygon([(x - half, top - half), (x, top - 2 * half), (x + half, top - half)], (60, 52, 56))


def draw_boat(pen: ImageDraw.ImageDraw, x: float, foot: float, size: float, sail: Color) -> None:
    half, deck = 0.19 * CANVAS * size, foot - 0.09 * CANVAS * size
    pen.polygon(
        [(x - half, deck), (x + half, deck), (x + 0.65 * half, foot), (x - 0.65 * half, foot)],
        (110, 66, 38),
    )
    top = deck - 0.36 * CANVAS * size
    pen.rectangle([x - 3, top, x + 3, deck], (70, 44, 30))
    pen.polygon([(x + 4, top), (x + 0.9 * half, deck - 6), (x + 4, deck - 6)], sail)
    pen.polygon([(x - 4, top + 16), (x - 0.65 * half, deck - 6), (x - 4, deck - 6)], sail)


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: Color) -> None:
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], color)


def mix(first: Color, second: Color, share: float) -> Color:
    """`share` of `second` in `first`."""
    red, green, blue = (
        round(a * (1 - share) + b * share) for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def dim(color: Color, sky: str) -> Color:
    """The ground takes some of the light of the sky."""
    if sky == "a night sky":
        return mix(color, (10, 14, 50), 0.55)
    if sky == "an orange sunset":
        return mix(color, (200, 90, 50), 0.22)
    return color
