"""Pictures as people draw them, on canvases of any size and ground, and pictures without shapes.

    drawing = random_drawing(random.Random(7))
    paint(drawing)                  a PIL picture of drawing.width x drawing.height pixels
    random_emptiness(random.Random(7))      a scene without shapes, and a texture, gradient or photograph as its picture

The processor reduces a drawing to the model's input, as it does for every picture of a user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import scenes
from PIL import Image, ImageDraw
from scenes import (
    BACKGROUNDS,
    CELL,
    COLORS,
    KINDS,
    SIDE,
    Scene,
    Shape,
    draw,
    draw_background,
    random_scene,
    talk,
)  # fmt: skip

# As Pillow and paint programs name them; each is moved a little.
PAINTS = {
    "red": ((255, 0, 0), (237, 28, 36), (205, 35, 40)),
    "orange": ((255, 165, 0), (255, 127, 39), (245, 135, 20)),
    "yellow": ((255, 255, 0), (255, 242, 0), (245, 220, 50)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 177, 76), (40, 150, 60)),
    "blue": ((0, 0, 255), (63, 72, 204), (40, 80, 205)),
    "purple": ((128, 0, 128), (163, 73, 164), (135, 50, 165)),
    "black": ((0, 0, 0), (18, 18, 20)),
    "white": ((255, 255, 255), (246, 246, 246)),
}
SIDES = (64, 2000)  # of a canvas, in pixels
LEAST_CONTRAST = 95  # between a shape's colour and the ground, as a distance in RGB
RADII = {"small": (0.045, 0.082), "large": (0.112, 0.17)}  # of the canvas' longest side
HUGE = 0.32  # the largest radius of a shape that is alone
MARGIN = 0.1  # of a ninth: so near to its edge no shape's middle stands
BOARD = Path(__file__).parent / "images" / "board.jpg"
SEEN = 0.6  # of the photograph's width, from the left: what training sees of it


@dataclass(frozen=True)
class Drawing(Scene):
    """Shapes on a ground of one colour; their places are in pixels of the canvas."""

    width: int
    height: int
    ground: tuple[int, int, int]
    noise: float
    smooth: bool  # with antialiasing


def random_side(rng: Random) -> int:
    return round(math.exp(rng.uniform(*map(math.log, SIDES))))


def random_ground(rng: Random) -> tuple[int, int, int]:
    """White, black, a grey, or a muted colour."""
    choice = rng.random()
    if choice < 0.55:
        return (255,) * 3 if choice < 0.33 else (0,) * 3
    level = rng.randint(0, 255)
    spread = 0 if choice < 0.85 else 18
    return tuple(min(255, max(0, level + rng.randint(-spread, spread))) for _ in range(3))


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.dist(a, b)


def random_paint(rng: Random, color: str) -> tuple[int, ...]:
    return tuple(min(255, max(0, level + rng.randint(-8, 8))) for level in rng.choice(PAINTS[color]))


def random_size(rng: Random, alone: bool) -> tuple[str, float]:
    size = rng.choice(tuple(RADII))
    least, most = RADII[size]
    return size, rng.uniform(least, HUGE if alone and size == "large" and rng.random() < 0.4 else most)


def place(rng: Random, cell: int, width: int, height: int, radius: float) -> tuple[float, float] | None:
    """A point in a ninth of the canvas from which nothing reaches over the canvas' edge; None where there is none."""
    point = []
    for at, side in zip(reversed(divmod(cell, 3)), (width, height)):
        least = max((at + MARGIN) * side / 3, radius * 1.05)
        most = min((at + 1 - MARGIN) * side / 3, side - radius * 1.05)
        if least > most:
            return None
        point.append(rng.uniform(least, most))
    return point[0], point[1]


def random_drawing(rng: Random, shapes: tuple[int, int] = (1, 4)) -> Drawing:
    """A drawing with that many shapes (least, most; fewer where there is no room).

    No shape has its ground's colour, and none covers another.
    """
    longest, n_shapes = random_side(rng), rng.randint(*shapes)
    sides = [longest, max(SIDES[0], round(longest * (1 if rng.random() < 0.65 else rng.uniform(0.6, 1))))]
    rng.shuffle(sides)
    width, height = sides
    ground = random_ground(rng)
    visible = [color for color in COLORS if min(contrast(paint, ground) for paint in PAINTS[color]) > LEAST_CONTRAST]
    turned = rng.random() < 0.5
    found: list[Shape] = []
    for _ in range(400):
        if len(found) == n_shapes:
            break
        kind, color, cell = rng.choice(KINDS), rng.choice(visible), rng.randrange(9)
        size, share = random_size(rng, n_shapes == 1)
        radius = share * max(width, height)
        point = place(rng, cell, width, height, radius)
        apart = point and all(math.dist(point, (s.x, s.y)) > 1.02 * (radius + s.radius) for s in found)
        if apart and cell not in {s.cell for s in found} and f"{color} {kind}" not in {s.name for s in found}:
            found.append(Shape(kind, color, size, cell, *point, radius, rng.uniform(-14, 14) if turned else 0.0))
    noise = rng.uniform(0, 22) if rng.random() < 0.4 else 0.0
    smooth = rng.random() < 0.4
    found.sort(key=lambda shape: shape.cell)
    return Drawing(tuple(found), (), "flat", rng.randrange(2**31), width, height, ground, noise, smooth)


def corners(shape: Shape, rng: Random) -> list[tuple[float, float]]:
    """Of a square, triangle or star that a circle of the shape's radius holds."""
    number, first = {"square": (4, 45), "triangle": (3, -90), "star": (10, -90)}[shape.kind]
    inner = rng.uniform(0.38, 0.48)
    flat = rng.uniform(0.8, 1) if shape.kind == "triangle" else 1  # drawn by hand, no triangle is equilateral
    points = []
    for i in range(number):
        angle = math.radians(first + shape.turn + 360 * i / number)
        radius = shape.radius * (inner if shape.kind == "star" and i % 2 else 1)
        points.append((shape.x + radius * math.cos(angle) * flat, shape.y + radius * math.sin(angle)))
    return points


def add_noise(picture: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    """The same grain for red, green and blue; on large canvases it repeats, which saves time."""
    if not deviation:
        return picture
    pixels = np.asarray(picture, dtype=np.float32)
    grain = rng.standard_normal((min(512, pixels.shape[0]), min(512, pixels.shape[1])), dtype=np.float32) * deviation
    times = [-(-side // own) for side, own in zip(pixels.shape, grain.shape)]
    grain = np.tile(grain, times)[: pixels.shape[0], : pixels.shape[1], None]
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def paint(drawing: Drawing) -> Image.Image:
    """The drawing as an RGB picture; the same drawing always gives the same picture."""
    rng = Random(drawing.seed)
    scale = 3 if drawing.smooth and max(drawing.width, drawing.height) <= 600 else 1  # above, edges are fine enough
    picture = Image.new("RGB", (drawing.width * scale, drawing.height * scale), drawing.ground)
    pen = ImageDraw.Draw(picture)
    for shape in drawing.shapes:
        color = random_paint(rng, shape.color)
        if shape.kind == "circle":
            x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            pen.polygon([(x * scale, y * scale) for x, y in corners(shape, rng)], fill=color)
    picture = picture.reduce(scale) if scale > 1 else picture
    return add_noise(picture, np.random.default_rng(drawing.seed), drawing.noise)


# ---------------------------------------------------------------------------- pictures without shapes

EMPTY = ("blank", "gradient", "grain", "clouds", "stripes", "lines", "muted", "photo", "photo")


@cache
def board() -> Image.Image:
    return Image.open(BOARD).convert("RGB")


def random_crop(rng: Random, held_out: bool) -> Image.Image:
    """A square of the photograph, turned, mirrored, lighter or darker: of its left side, or held out of its right."""
    photo = board()
    edge = round(photo.width * SEEN)
    left, right = (edge, photo.width) if held_out else (0, edge)
    side = rng.randint(90, min(photo.height, right - left))
    x, y = rng.randint(left, right - side), rng.randint(0, photo.height - side)
    crop = photo.crop((x, y, x + side, y + side)).resize((160, 160), Image.Resampling.BICUBIC)
    crop = crop.transpose(rng.choice(tuple(Image.Transpose)))
    gain, offset = rng.uniform(0.6, 1.3), rng.uniform(-25, 40)
    return crop.point(lambda level: gain * level + offset)


def texture(kind: str, rng: Random) -> Image.Image:
    """A picture of 160 x 160 pixels of one of EMPTY's kinds but photo."""
    side, random = 160, np.random.default_rng(rng.randrange(2**31))
    down, across = np.mgrid[0:side, 0:side].astype(np.float32) / side
    first, second = (np.float32([rng.randint(0, 255) for _ in range(3)]) for _ in range(2))
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.03, 0.3)
    along = across * math.cos(angle) + down * math.sin(angle)

    def blobs(cells: int) -> np.ndarray:
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells), dtype=np.uint8))
        return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255

    if kind == "muted":
        return draw_background(rng.choice(BACKGROUNDS), random)
    if kind == "blank":
        picture = Image.new("RGB", (side, side), random_ground(rng))
        return add_noise(picture, random, rng.choice((0, rng.uniform(0, 25))))
    if kind == "lines":
        picture = Image.new("RGB", (side, side), tuple(first.astype(int).tolist()))
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.randint(1, 14)):
            ends = [rng.uniform(-40, side + 40) for _ in range(4)]
            pen.line(ends, fill=tuple(rng.randint(0, 255) for _ in range(3)), width=rng.randint(1, 4))
        return picture
    if kind == "gradient":
        mix = along
    elif kind == "stripes":
        mix = (along / period) % 1 < rng.uniform(0.3, 0.7)
        if rng.random() < 0.4:
            mix = mix ^ ((across * math.sin(angle) - down * math.cos(angle)) / period % 1 < 0.5)
    elif kind == "clouds":
        mix = sum(weight * blobs(cells) for weight, cells in zip((0.5, 0.3, 0.2), (rng.randint(3, 6), 12, 40)))
    else:  # grain
        mix = random.random((side, side, 3), dtype=np.float32)
    mix = np.asarray(mix, dtype=np.float32)
    pixels = first + (second - first) * (mix if mix.ndim == 3 else mix[..., None])
    return add_noise(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), random, rng.choice((0, rng.uniform(0, 20))))


def random_emptiness(rng: Random, held_out: bool = False) -> tuple[Scene, Image.Image]:
    """A scene without shapes and its picture. Photographs' crops are of another part of the photo with `held_out`."""
    kind = rng.choice(EMPTY)
    picture = random_crop(rng, held_out) if kind == "photo" else texture(kind, rng)
    return Scene((), (), kind, 0), picture


# ---------------------------------------------------------------------------- talk

TASKS = ("describe", "describe", "color", "count", "position", "relation", "text")


def drawing_chat(rng: Random) -> tuple[Scene, list[dict]]:
    """A scene and a conversation for training: three in ten of usual scenes, more of drawings, some of no shapes."""
    choice = rng.random()
    if choice < 0.3:
        scene = random_scene(rng)
        return scene, talk(scene, draw(scene), rng, scenes.TASKS, turns=4, describe_ends=False)
    if choice < 0.87:
        drawing = random_drawing(rng, (1, 1) if choice < 0.45 else (2, 4))
        return drawing, talk(drawing, paint(drawing), rng, TASKS, turns=4, describe_ends=False)
    scene, picture = random_emptiness(rng)
    return scene, talk(scene, picture, rng, ("describe", "count"), 1 + (choice < 0.92), describe_ends=False)


def on_the_square(drawing: Drawing) -> Scene:
    """The drawing as the processor reduces it to a square of SIDE pixels: lengths and cells are of that."""
    longest = max(drawing.width, drawing.height)
    scale, left, top = SIDE / longest, (longest - drawing.width) / 2, (longest - drawing.height) / 2
    shapes = []
    for shape in drawing.shapes:
        x, y = (shape.x + left) * scale, (shape.y + top) * scale
        cell = int(y // CELL) * 3 + int(x // CELL)
        shapes.append(replace(shape, x=x, y=y, radius=shape.radius * scale, cell=cell))
    return Scene(tuple(shapes), (), drawing.background, drawing.seed)
