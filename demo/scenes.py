"""Scenes for the demo checkpoint: pictures of coloured shapes and a small sign, and talk about them.

    scene = random_scene(random.Random(7))
    draw(scene)                                 a PIL picture, 128 x 128
    ask(scene, "position", random.Random(7))    ("Where is the red circle?", "The red circle is in the top left.")
    chat(random.Random(7))                      a conversation for processor.Processor, as for training

`drawings.py` makes pictures as people draw them. Here a picture has nine cells, three by three. One to four of them
hold a shape, off centre and sometimes reaching over a neighbour; one may hold a sign with a word or a number, in
letters of about eight pixels. SAM sees the picture as it is; SigLIP sees it at 30 pixels, where letters are two high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 128
CELL = SIDE / 3
JITTER = 5.5  # how far off its cell's middle a thing may be, in pixels each way
FONT = ImageFont.load_default(12)
KINDS = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (205, 35, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "purple": (135, 50, 165),
    "black": (18, 18, 20),
    "white": (246, 246, 246),
}
RADII = {"small": (8, 10), "large": (14.5, 18)}
CELLS = (
    "top left", "top center", "top right", "center left", "center", "center right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
WORDS = (
    "OPEN", "STOP", "EXIT", "TAXI", "MILK", "CAFE", "BANK", "BOOK", "FISH", "PARK", "EAST", "WEST", "SALE", "FREE",
    "PUSH", "PULL", "JAZZ", "QUIZ", "LEFT", "HOME", "GOLD", "ROOM", "TOYS", "VIEW", "TEA", "BUS", "ZOO", "INN", "MAP",
    "KEY", "ICE", "RED", "SUN", "SKY", "DOG", "CAT", "BOX", "GYM", "HUT", "PIE",
)  # fmt: skip
FURTHER = {"left of": "further left", "right of": "further right", "above": "higher", "below": "lower"}
NUMBERS = ("zero", "one", "two", "three", "four")
DOWN, ACROSS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
BACKGROUNDS = ("flat", "gradient", "stripes", "checks", "clouds", "photo")


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    size: str
    cell: int
    x: float  # centre and radius in pixels, turn in degrees
    y: float
    radius: float
    turn: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.name}"

    @property
    def place(self) -> str:
        return f"in the {CELLS[self.cell]}"


@dataclass(frozen=True)
class Sign:
    text: str
    cell: int
    x: float
    y: float
    dark: bool


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]  # in reading order of their cells
    signs: tuple[Sign, ...]
    background: str
    seed: int  # of colours' shades, background and noise

    @property
    def text(self) -> str | None:
        return self.signs[0].text if self.signs else None


# ------------------------------------------------------------------------------------------- scenes


def middle(cell: int, rng: Random, jitter: float) -> tuple[float, float]:
    """A point near the middle of a cell: x, y."""
    row, column = divmod(cell, 3)
    return (column + 0.5) * CELL + rng.uniform(-jitter, jitter), (row + 0.5) * CELL + rng.uniform(-jitter, jitter)


def random_shape(rng: Random, cell: int, taken: set[str]) -> Shape:
    """A shape whose colour and kind together are not `taken`."""
    while True:
        kind, color, size = rng.choice(KINDS), rng.choice(tuple(COLORS)), rng.choice(tuple(RADII))
        if f"{color} {kind}" not in taken:
            break
    turn = rng.uniform(-14, 14)
    return Shape(kind, color, size, cell, *middle(cell, rng, JITTER), rng.uniform(*RADII[size]), turn)


def random_sign(rng: Random, cell: int) -> Sign:
    text = rng.choice(WORDS) if rng.random() < 0.6 else str(rng.randint(10, 99))
    return Sign(text, cell, *middle(cell, rng, JITTER), rng.random() < 0.3)


def random_scene(rng: Random, shapes: tuple[int, int] = (1, 4), signs: tuple[int, int] | None = None) -> Scene:
    """A scene with that many shapes and signs (least, most); by default two scenes in three have a sign."""
    n_shapes = rng.randint(*shapes)
    n_signs = rng.randint(*signs) if signs else int(rng.random() < 0.67)
    cells = rng.sample(range(9), n_shapes + n_signs)
    found: list[Shape] = []
    for cell in sorted(cells[:n_shapes]):
        found.append(random_shape(rng, cell, {shape.name for shape in found}))
    placed = tuple(random_sign(rng, cell) for cell in cells[n_shapes:])
    return Scene(tuple(found), placed, rng.choice(BACKGROUNDS), rng.randrange(2**31))


# ------------------------------------------------------------------------------------------- drawing


def smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(SIDE, SIDE) of soft blobs, from 0 to 1."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def draw_background(kind: str, rng: np.random.Generator) -> Image.Image:
    """Muted colours, never as strong as a shape's, never black or white."""

    def muted() -> np.ndarray:
        return rng.uniform(85, 190) + rng.uniform(-18, 18, 3)

    first, second = muted(), muted()
    step = (second - first) * rng.uniform(0.2, 0.7)
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 20) / SIDE
    along = ACROSS * math.cos(angle) + DOWN * math.sin(angle)
    if kind == "gradient":
        mix = along
    elif kind == "stripes":
        mix = (along / period) % 1 < 0.5
    elif kind == "checks":
        mix = ((ACROSS / period).astype(int) + (DOWN / period).astype(int)) % 2
    elif kind == "clouds":
        mix = smooth_noise(rng, 6)
    elif kind == "photo":  # several scales of light and shade, darker towards the corners
        mix = 0.5 * smooth_noise(rng, 3) + 0.3 * smooth_noise(rng, 9) + 0.2 * smooth_noise(rng, 40)
        mix = mix - 0.5 * ((ACROSS - 0.5) ** 2 + (DOWN - 0.5) ** 2)
    else:
        return Image.new("RGB", (SIDE, SIDE), tuple(int(level) for level in first))
    pixels = np.float32(first) + np.float32(step) * np.asarray(mix, dtype=np.float32)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def outline(shape: Shape, scale: int) -> list[tuple[float, float]]:
    """The corners of a square, triangle or star in a box of side 2.4 radii, times `scale`."""
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}[shape.kind]
    first = 45 if shape.kind == "square" else -90
    points = []
    for i in range(corners):
        angle = math.radians(first + shape.turn + 360 * i / corners)
        radius = shape.radius * 1.1 * (inner if shape.kind == "star" and i % 2 else 1)
        points.append(
            (
                (1.2 * shape.radius + radius * math.cos(angle)) * scale,
                (1.2 * shape.radius + radius * math.sin(angle)) * scale,
            )
        )
    return points


def shape_mask(shape: Shape) -> Image.Image:
    """Where the shape is, with soft edges: drawn three times too large, then reduced."""
    scale, side = 3, math.ceil(2.4 * shape.radius)
    mask = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(mask)
    if shape.kind == "circle":
        near, far = 0.2 * shape.radius * scale, 2.2 * shape.radius * scale
        pen.ellipse((near, near, far, far), fill=255)
    else:
        pen.polygon(outline(shape, scale), fill=255)
    return mask.reduce(scale)


def plate(sign: Sign) -> tuple[int, int, int, int]:
    """The sign's left, top, right and bottom edge."""
    left, top, right, bottom = FONT.getbbox(sign.text)
    width, height = right - left + 8, bottom - top + 7
    x, y = round(sign.x - width / 2), round(sign.y - height / 2)
    return x, y, x + width, y + height


def letters(sign: Sign) -> list[tuple[str, float, float]]:
    """Each letter of a sign and where its middle is: x, y."""
    x, top, _, bottom = plate(sign)
    edges = [x + 4 - FONT.getbbox(sign.text)[0] + FONT.getlength(sign.text[:i]) for i in range(len(sign.text) + 1)]
    return [(letter, (a + b) / 2, (top + bottom) / 2) for letter, a, b in zip(sign.text, edges, edges[1:])]


def draw_sign(picture: Image.Image, sign: Sign) -> None:
    """A plate with the text, in Pillow's own font at 12 pixels: capitals are 8 to 9 pixels high."""
    ground, ink = ((40, 44, 52), (240, 240, 235)) if sign.dark else ((238, 236, 226), (30, 30, 34))
    box, (left, top, *_) = plate(sign), FONT.getbbox(sign.text)
    pen = ImageDraw.Draw(picture)
    pen.rectangle(box, fill=ground)
    pen.text((box[0] + 4 - left, box[1] + 4 - top), sign.text, fill=ink, font=FONT)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIDE x SIDE pixels; the same scene always gives the same picture."""
    rng = np.random.default_rng(scene.seed)
    picture = draw_background(scene.background, rng)
    for shape in scene.shapes:
        color = tuple(int(c) for c in np.clip(np.array(COLORS[shape.color]) + rng.integers(-10, 11, 3), 0, 255))
        mask = shape_mask(shape)
        corner = round(shape.x - 1.2 * shape.radius), round(shape.y - 1.2 * shape.radius)
        if scene.background == "photo":  # a soft shadow, and light that falls from above
            shadow = mask.point(lambda value: value // 3)
            picture.paste((20, 20, 20), (corner[0] + 2, corner[1] + 2), shadow)
        picture.paste(color, corner, mask)
    for sign in scene.signs:
        draw_sign(picture, sign)
    if scene.background == "photo":
        picture = picture.filter(ImageFilter.GaussianBlur(0.3))
    pixels = np.asarray(picture, dtype=np.float32)
    noise = rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * rng.uniform(0, 7)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------- talk

DESCRIBE = ("Describe this image.", "Describe the picture.", "What is in this image?", "What do you see?")
TASKS = ("describe", "color", "count", "position", "relation", "text")


def sentence(caption: str) -> str:
    return caption[0].upper() + caption[1:]


def listing(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def describe(scene: Scene) -> str:
    if not scene.shapes:
        return "I see no shapes."
    return sentence(listing([f"{shape.place} {shape.caption}" for shape in scene.shapes])) + "."


def tell(scene: Scene) -> str:
    """The scene in words, for questions without a picture."""
    return f"Picture this: {describe(scene)} " + (f"The sign says {scene.text}. " if scene.text else "")


def ask(scene: Scene, task: str, rng: Random) -> tuple[str, str] | None:
    """A question about the scene and its one right answer; None where the scene does not lend itself to it.

    Answers say again what is asked about, and relations say both places: what is to be looked up then follows the words
    by which to find it, which a small model learns sooner.
    """
    shape = rng.choice(scene.shapes) if scene.shapes else None
    if task == "describe":
        return rng.choice(DESCRIBE), describe(scene)
    if shape is None and task in ("color", "position", "relation"):
        return None
    if task == "color":
        alone = [s for s in scene.shapes if sum(s.kind == other.kind for other in scene.shapes) == 1]
        if alone and rng.random() < 0.6:
            shape = rng.choice(alone)
            thing = f"the {shape.kind}"
        else:
            thing = f"the shape {shape.place}"
        return rng.choice(
            (f"What color is {thing}?", f"Tell me the color of {thing}.")
        ), f"{sentence(thing)} is {shape.color}."
    if task == "count":
        kind, color = (shape.kind, shape.color) if shape else (rng.choice(KINDS), rng.choice(tuple(COLORS)))
        what, number = rng.choice(
            [
                ("shapes", len(scene.shapes)),
                *((f"{kind}s", sum(s.kind == kind for s in scene.shapes)) for kind in (kind, rng.choice(KINDS))),
                (f"{color} shapes", sum(s.color == color for s in scene.shapes)),
            ]
        )
        return rng.choice(
            (f"How many {what} are there?", f"Count the {what}.")
        ), f"The number of {what} is {NUMBERS[number]}."
    if task == "position":
        if rng.random() < 0.3:
            return f"What is {shape.place}?", f"{sentence(shape.place)} {shape.caption}."
        return rng.choice(
            (f"Where is the {shape.name}?", f"Find the {shape.name}.")
        ), f"The {shape.name} is {shape.place}."
    if task == "relation":
        return ask_relation(scene, rng)
    if task == "text":
        question = rng.choice(("What does the sign say?", "Read the text.", "What is written there?"))
        return question, f"It says {scene.text}." if scene.text else "There is no text."
    raise ValueError(f"no task {task!r}, expected one of {', '.join(TASKS)}")


def ask_relation(scene: Scene, rng: Random) -> tuple[str, str] | None:
    """Which of two shapes is left of, right of, above or below the other; they stand in different columns or rows."""
    pairs = []
    for a in scene.shapes:
        for b in scene.shapes:
            if a.cell % 3 < b.cell % 3:
                pairs += [(a, b, "left of"), (b, a, "right of")]
            if a.cell // 3 < b.cell // 3:
                pairs += [(a, b, "above"), (b, a, "below")]
    if not pairs:
        return None
    yes, no, relation = rng.choice(pairs)
    first, second = (yes, no) if rng.random() < 0.5 else (no, yes)
    places = f"The {first.name} is {first.place}, the {second.name} {second.place}, so the {yes.name}"
    if rng.random() < 0.4:
        return f"Is the {first.name} {relation} the {second.name}?", f"{places} is {relation} the {no.name}."
    return f"Which is {FURTHER[relation]}, the {first.name} or the {second.name}?", f"{places}."


def talk(
    scene: Scene, picture: Image.Image | None, rng: Random, tasks: tuple[str, ...], turns: int, describe_ends: bool
) -> list[dict]:
    """`turns` of the questions that `tasks` names, about a scene and its picture.

    With `describe_ends` a description, if asked for, is the end, since it answers most other questions: these, in
    training, must be answered by looking. Without a picture the first message tells the scene in words, for training
    the language model alone.
    """
    opening, images = ("<image>", [picture]) if picture else (tell(scene), [])
    messages: list[dict] = []
    for task in rng.sample(tasks, min(turns, len(tasks))):
        if found := ask(scene, task, rng):
            question, answer = found
            message = {"role": "user", "content": question if messages else opening + question}
            messages.append(message if messages else message | {"images": images})
            messages.append({"role": "assistant", "content": answer})
        if task == "describe" and describe_ends:
            break
    return messages


def chat(
    rng: Random, tasks: tuple[str, ...] = TASKS, turns: int = 4, pictures: bool = True, describe_ends: bool = True
) -> list[dict]:
    """A conversation about a random scene, as `talk` makes it."""
    scene = random_scene(rng)
    return talk(scene, draw(scene) if pictures else None, rng, tasks, turns, describe_ends)
