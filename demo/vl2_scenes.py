"""Scenes for the DeepSeek-VL2 demo: wide and tall pictures of shapes and a sign, what is asked about them, and boxes.

    scene = random_scene(random.Random(7))
    draw(scene)                                 a PIL picture
    ask(scene, "ground", random.Random(7))      ("<|ref|>the red star<|/ref|>", "<|ref|>...<|det|>[[...]]<|/det|>")
    chat(random.Random(7))                      a conversation for processor.Processor, as for training

Lengths are in pixels of the tiles that the model sees (`TILE` on a side). A picture is drawn up to four times as large,
and the processor reduces it. Letters are eight pixels high; in the whole picture's own tile they are two or three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from drawings import (
    LEAST_CONTRAST,
    PAINTS,
    add_noise,
    contrast,
    corners,
    paint,
    random_drawing,
    random_emptiness,
    random_ground,
    random_paint,
)  # fmt: skip
from PIL import Image, ImageDraw, ImageFont
from scenes import COLORS, KINDS, WORDS, listing
from torch import Tensor

from processor import COORDINATES, Processor, best_resolution

TILE = 48
LAYOUTS = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2))  # tiles wide and high
DRAWN = ((4, 1), (4, 1), (1, 4), (1, 4), (3, 1), (1, 3), (2, 2), (2, 1), (1, 2))  # so often
MOST_SHAPES = {2: 3, 3: 4, 4: 5}  # by the number of tiles
RADII = {"small": (4.5, 6.5), "large": (9.5, 13)}
LETTERS = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONT_SIZE = 11
NUMBERS = ("zero", "one", "two", "three", "four", "five")
IGNORED = -100

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A shape, or a sign with a text."""

    kind: str
    color: str
    size: str
    box: tuple[float, float, float, float]  # left, top, right, bottom
    outline: tuple[Point, ...] = ()  # of all but circles and signs
    text: str = ""

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def caption(self) -> str:
        return f"{self.size} {self.name}"

    @property
    def middle(self) -> Point:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Thing, ...]  # from left to right, or in a tall picture from top to bottom
    signs: tuple[Thing, ...]  # one at most, but where the scene is crowded
    width: float
    height: float
    scale: float  # pixels of the picture for one of a tile
    ground: tuple[int, int, int]
    noise: float
    smooth: bool
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the picture."""
        return round(self.width * self.scale), round(self.height * self.scale)

    @property
    def sign(self) -> Thing | None:
        return self.signs[0] if self.signs else None

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.shapes + self.signs

    @property
    def is_tall(self) -> bool:
        return self.height > self.width


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


# ------------------------------------------------------------------------------------------- scenes


def random_shape(rng: Random, width: float, height: float, colors: list[str]) -> Thing:
    kind, color, size = rng.choice(KINDS), rng.choice(colors), rng.choice(tuple(RADII))
    radius = rng.uniform(*RADII[size])
    x, y = rng.uniform(radius + 1, width - radius - 1), rng.uniform(radius + 1, height - radius - 1)
    if kind == "circle":
        return Thing(kind, color, size, (x - radius, y - radius, x + radius, y + radius))
    number, first, round_out = {"square": (4, 45, 1.2), "triangle": (3, -90, 1.15), "star": (10, -90, 1.15)}[kind]
    turn, inner = rng.choice((0, rng.uniform(-12, 12))), rng.uniform(0.38, 0.48)
    points = []
    for i in range(number):
        angle = math.radians(first + turn + 360 * i / number)
        reach = radius * round_out * (inner if kind == "star" and i % 2 else 1)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    across, down = zip(*points)
    return Thing(kind, color, size, (min(across), min(down), max(across), max(down)), tuple(points))


def random_sign(rng: Random, width: float, height: float) -> Thing:
    text = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randint(10, 99))
    left, top, right, bottom = font(FONT_SIZE).getbbox(text)
    wide, high = right - left + 6, bottom - top + 6
    x, y = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return Thing("sign", rng.choice(("light", "dark")), "", (x, y, x + wide, y + high), (), text)


def apart(thing: Thing, others: list[Thing], axis: int | None) -> bool:
    """Whether a thing covers no other, and no two shapes stand side by side where one must come first."""
    gap = 3
    for other in others:
        a, b = thing.box, other.box
        if a[0] - gap < b[2] and b[0] - gap < a[2] and a[1] - gap < b[3] and b[1] - gap < a[3]:
            return False
        if (
            axis is not None
            and "sign" not in (thing.kind, other.kind)
            and abs(thing.middle[axis] - other.middle[axis]) < 6
        ):
            return False
    return True


def random_scene(rng: Random, sign: bool | None = None, crowded: bool = False) -> Scene:
    """A scene; only pictures of three or four tiles in a row have a sign, by default three in four of them.

    A crowded one has up to three shapes a tile, and signs anywhere: much to see for few pixels.
    """
    while True:
        wide, high = rng.choice(DRAWN)
        shrink = 1 if rng.random() < 0.7 else rng.uniform(0.9, 1)
        width, height = (wide * TILE, high * TILE * shrink) if wide >= high else (wide * TILE * shrink, high * TILE)
        n_signs = int(max(wide, high) > 2 and rng.random() < 0.75)
        if sign is None or sign == bool(n_signs):
            break
    ground = random_ground(rng)
    colors = [color for color in COLORS if min(contrast(paint, ground) for paint in PAINTS[color]) > LEAST_CONTRAST]
    n_shapes = rng.randint(1, MOST_SHAPES[wide * high])
    if crowded:
        n_shapes, n_signs = 3 * wide * high, rng.randint(1, 4)
    signs: list[Thing] = []
    shapes: list[Thing] = []
    for _ in range(200):
        if len(signs) < n_signs:
            found, kept = random_sign(rng, width, height), signs
        elif len(shapes) < n_shapes:
            found, kept = random_shape(rng, width, height, colors), shapes
        else:
            break
        inside = min(found.box) >= 0 and found.box[2] <= width and found.box[3] <= height
        known = not crowded and found.kind != "sign" and found.name in {shape.name for shape in shapes}
        if inside and not known and apart(found, signs + shapes, None if crowded else int(height > width)):
            kept.append(found)
    shapes.sort(key=lambda shape: shape.middle[height > width])
    noise = rng.uniform(0, 20) if rng.random() < 0.4 else 0.0
    scale, smooth, seed = math.exp(rng.uniform(0, math.log(4))), rng.random() < 0.5, rng.randrange(2**31)
    return Scene(tuple(shapes), tuple(signs), width, height, scale, ground, noise, smooth, seed)


def drawn_scene(rng: Random, shapes: tuple[int, int]) -> tuple[Scene, Image.Image]:
    """A drawing as people make them (drawings.py), with so many shapes (least, most), and its picture.

    No two shapes stand side by side where one must come first.
    """
    while True:
        drawing = random_drawing(rng, shapes)
        axis, longest = int(drawing.height > drawing.width), max(drawing.width, drawing.height)
        places = sorted((shape.x, shape.y)[axis] for shape in drawing.shapes)
        apart = all(after - before > 0.06 * longest for before, after in zip(places, places[1:]))
        if len(places) >= shapes[0] and apart:
            break
    brush, things = Random(drawing.seed), []
    for shape in drawing.shapes:  # as `paint` chooses
        random_paint(brush, shape.color)
        ends = [(shape.x - shape.radius, shape.y - shape.radius), (shape.x + shape.radius, shape.y + shape.radius)]
        across, down = zip(*(ends if shape.kind == "circle" else corners(shape, brush)))
        things.append(Thing(shape.kind, shape.color, shape.size, (min(across), min(down), max(across), max(down))))
    things.sort(key=lambda thing: thing.middle[axis])
    scene = Scene(tuple(things), (), drawing.width, drawing.height, 1, drawing.ground, 0, False, drawing.seed)
    return scene, paint(drawing)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture; the same scene always gives the same picture."""
    rng, finer = Random(scene.seed), 3 if scene.smooth else 1
    width, height = scene.size
    across, down = width * finer / scene.width, height * finer / scene.height
    picture = Image.new("RGB", (width * finer, height * finer), scene.ground)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        color = random_paint(rng, shape.color)
        if shape.outline:
            pen.polygon([(x * across, y * down) for x, y in shape.outline], fill=color)
        else:
            pen.ellipse([at * (across, down)[i % 2] for i, at in enumerate(shape.box)], fill=color)
    for sign in scene.signs:
        paper, ink = ((238, 236, 226), (20, 20, 24)) if sign.color == "light" else ((30, 34, 44), (245, 245, 240))
        box = [at * (across, down)[i % 2] for i, at in enumerate(sign.box)]
        pen.rectangle(box, fill=paper, outline=ink)
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        size = round(FONT_SIZE * across)
        pen.text(middle, sign.text, fill=ink, font=font(size), anchor="mm")
    picture = picture.reduce(finer) if finer > 1 else picture
    return add_noise(picture, np.random.default_rng(scene.seed), scene.noise)


# ------------------------------------------------------------------------------------------- talk

TASKS = ("describe", "color", "count", "text", "ground", "grounded")
DESCRIBE = ("Describe this image.", "Describe the picture.", "What do you see?")


def thousandths(thing: Thing, scene: Scene) -> list[int]:
    """A box as DeepSeek-VL2 writes it."""
    sides = scene.width, scene.height
    return [round(min(1, max(0, at / sides[i % 2])) * COORDINATES) for i, at in enumerate(thing.box)]


def located(label: str, things: list[Thing], scene: Scene) -> str:
    boxes = ", ".join(str(thousandths(thing, scene)) for thing in things)
    return f"<|ref|>{label}<|/ref|><|det|>[{boxes}]<|/det|>"


def order(scene: Scene) -> str:
    return "From top to bottom: " if scene.is_tall else "From left to right: "


def groups(scene: Scene) -> list[tuple[str, str, list[Thing]]]:
    """What may be located: its label for one thing and for several, and the things. Only what is there."""
    found = [(f"the {kind}", f"the {kind}s", [s for s in scene.shapes if s.kind == kind]) for kind in KINDS]
    for color in COLORS:
        found.append((f"the {color} shape", f"the {color} shapes", [s for s in scene.shapes if s.color == color]))
    return [group for group in found if group[2]]


def ask(scene: Scene, task: str, rng: Random) -> tuple[str, str] | None:
    """A question about the scene and its one right answer; None where the scene does not lend itself to it."""
    shape = rng.choice(scene.shapes) if scene.shapes else None
    if task == "text":
        question = rng.choice(("What does the sign say?", "Read the text."))
        return question, f"It says {scene.sign.text}." if scene.sign else "There is no text."
    if task == "describe":
        captions = [f"a {shape.caption}" for shape in scene.shapes]
        return rng.choice(DESCRIBE), order(scene) + listing(captions) + "." if captions else "I see no shapes."
    if task == "count":
        kind, color = (shape.kind, shape.color) if shape else (rng.choice(KINDS), rng.choice(tuple(COLORS)))
        what, number = rng.choice(
            [
                ("shapes", len(scene.shapes)),
                *((f"{k}s", sum(s.kind == k for s in scene.shapes)) for k in (kind, rng.choice(KINDS))),
                (f"{color} shapes", sum(s.color == color for s in scene.shapes)),
            ]
        )
        return f"How many {what} are there?", f"The number of {what} is {NUMBERS[number]}."
    if shape is None:
        return None
    if task == "grounded":
        question = "<|grounding|>" + DESCRIBE[0]
        return question, order(scene) + listing([located(f"a {s.caption}", [s], scene) for s in scene.shapes]) + "."
    if task == "color":
        same_kind = [s for s in scene.shapes if s.kind == shape.kind]
        if len(same_kind) == 1:
            label = shape.kind
        elif sum(s.size == shape.size for s in same_kind) == 1:
            label = f"{shape.size} {shape.kind}"
        else:
            return None
        return f"What color is the {label}?", f"The {label} is {shape.color}."
    if task == "ground":
        if scene.sign and rng.random() < 0.15:
            label, things = "the sign", [scene.sign]
        elif rng.random() < 0.6:
            label, things = f"the {rng.choice((shape.name, shape.caption))}", [shape]
        else:
            one, several, things = rng.choice(groups(scene))
            label = several if len(things) > 1 or rng.random() < 0.5 else one
        return f"<|ref|>{label}<|/ref|>", located(label, things, scene)
    raise ValueError(f"no task {task!r}, expected one of {', '.join(TASKS)}")


def chat(
    rng: Random, tasks: tuple[str, ...] = TASKS, turns: int = 3, emptiness: float = 0.05, drawn: float = 0.0
) -> tuple[Scene, Image.Image, list[dict]]:
    """A scene, its picture and a conversation about it; with the chance `emptiness` there are no shapes, with the
    chance `drawn` it is a drawing."""
    choice = rng.random()
    if choice < emptiness:
        _, picture = random_emptiness(rng)
        scene = Scene((), (), *picture.size, 1, (0, 0, 0), 0, False, 0)
        tasks = ("describe", "count")
    elif choice < emptiness + drawn:
        scene, picture = drawn_scene(rng, rng.choice(((1, 1), (2, 4), (2, 4))))
    else:
        scene = random_scene(rng)
        picture = draw(scene)
    messages: list[dict] = []
    for task in rng.sample(tasks, min(turns, len(tasks))):
        if found := ask(scene, task, rng):
            content = found[0] if messages else f"<image>\n{found[0]}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": found[1]}]
    messages[0]["images"] = [picture]
    return scene, picture, messages


# ------------------------------------------------------------------------------------------- labels

FIELDS = ("kind", "color", "size", "left", "top", "right", "bottom", "rank", "text", "across", "down")


def word_id(processor: Processor, word: str) -> int:
    (id,) = processor.tokenizer.encode(word if word.isdigit() or word.isspace() else f" {word}")
    return id


@cache
def number_ids(processor: Processor) -> Tensor:
    """The tokens of the numbers 0 to 999, int64 (1000,)."""
    return torch.tensor([word_id(processor, str(number)) for number in range(COORDINATES + 1)])


def views(size: tuple[int, int], processor: Processor) -> list[tuple[tuple[int, int], float, Point]]:
    """The whole picture's tile and the local view: width and height, how much the picture is scaled, and its corner."""
    side, found = processor.pixels.side, []
    for view in ((side, side), best_resolution(size, processor.candidate_resolutions)):
        scale = min(view[0] / size[0], view[1] / size[1])
        found.append((view, scale, ((view[0] - size[0] * scale) / 2, (view[1] - size[1] * scale) / 2)))
    return found


def token_labels(scene: Scene, picture: Image.Image, processor: Processor) -> tuple[Tensor, Tensor]:
    """For each token of the picture, in words of the vocabulary, what stands there: int64 (tokens, fields).

    The last two fields are its own place in the picture, in thousandths. Also how far from the token's middle the
    thing's part in this tile reaches to the left, up, right and down, in tokens: float32 (tokens, 4), 0 where unknown.

    Newlines, the separator and tokens with a mere edge of something are ignored. In the whole picture's tile, so are
    those with several things.
    """
    things = scene.things
    words = torch.full((len(things) + 1, len(FIELDS)), IGNORED)
    for i, thing in enumerate(things):
        found = {"kind": thing.kind} | dict(zip(FIELDS[3:7], map(str, thousandths(thing, scene))))
        if thing.kind == "sign":
            found["text"] = thing.text
        else:
            found |= {"color": thing.color, "size": thing.size}
            found |= {"rank": NUMBERS[i + 1]} if i + 1 < len(NUMBERS) else {}
        for field, word in found.items():
            words[i, FIELDS.index(field)] = word_id(processor, word)
    words[-1, 0] = word_id(processor, "\n")  # nothing
    labels, reaches = [], []
    side = processor.pixels.side
    for (wide, high), scale, corner in views(picture.size, processor):
        cell = side / processor.tile_tokens
        columns, rows = round(wide / cell), round(high / cell)
        left, top = np.meshgrid(np.arange(columns) * cell, np.arange(rows) * cell)
        covered = np.zeros((rows, columns, len(things)))  # of each cell or thing, whichever is smaller
        reach = np.zeros((rows, columns, len(things) + 1, 4), dtype=np.float32)
        for i, thing in enumerate(things):
            x1, y1, x2, y2 = (at * scale * picture.size[k % 2] / (scene.width, scene.height)[k % 2] + corner[k % 2]
                              for k, at in enumerate(thing.box))  # fmt: skip
            across = (np.minimum(left + cell, x2) - np.maximum(left, x1)).clip(0)
            down = (np.minimum(top + cell, y2) - np.maximum(top, y1)).clip(0)
            covered[..., i] = across * down / min(cell * cell, (x2 - x1) * (y2 - y1))
            for k, (edge, near) in enumerate(zip((x1, y1, x2, y2), (left, top, left, top))):
                tile = near // side * side
                reach[..., i, k] = (np.clip(edge, tile, tile + side) - near) / cell - 0.5
        which = np.full((rows, columns), len(things))
        unclear = np.zeros((rows, columns), dtype=bool)
        if things:
            best = covered.max(-1)
            which = np.where(best > 0.25, covered.argmax(-1), len(things))
            unclear = (best > 0.02) & (best <= 0.25)
            if not labels:
                unclear |= (covered > 0.1).sum(-1) > 1
        grid = words[torch.from_numpy(which)]
        grid[torch.from_numpy(unclear)] = IGNORED
        for k, edges in enumerate((left, top)):
            place = (
                torch.from_numpy((edges + cell / 2 - corner[k]) / (scale * picture.size[k]) * COORDINATES)
                .round()
                .long()
            )
            inside = (place >= 0) & (place <= COORDINATES)
            ids = number_ids(processor)[place.clamp(0, COORDINATES)]
            grid[..., FIELDS.index("across") + k] = torch.where(inside, ids, IGNORED)
        at = torch.from_numpy(np.take_along_axis(reach, which[..., None, None], axis=2)[:, :, 0])
        at[torch.from_numpy(unclear)] = 0
        labels.append(F.pad(grid, (0, 0, 0, 1), value=IGNORED).flatten(0, 1))  # with a newline at each row's end
        reaches.append(F.pad(at, (0, 0, 0, 1)).flatten(0, 1))
    # and the separator between the views
    return (
        torch.cat((F.pad(labels[0], (0, 0, 0, 1), value=IGNORED), labels[1])),
        torch.cat((F.pad(reaches[0], (0, 0, 0, 1)), reaches[1])),
    )


def letter_labels(scene: Scene, picture: Image.Image, processor: Processor, patches: int) -> Tensor:
    """For each patch of each tile the sign's letter whose middle lies in it, or 0: int64 (tiles, patches ** 2).

    The whole picture's tile is ignored: letters are too small there.
    """
    (wide, high), scale, corner = views(picture.size, processor)[1]
    side = processor.pixels.side
    grid = torch.zeros(high // side * patches, wide // side * patches, dtype=torch.long)
    for sign in scene.signs:
        text, own = sign.text, font(FONT_SIZE)
        edges = [own.getlength(text[:i]) for i in range(len(text) + 1)]
        for letter, a, b in zip(text, edges, edges[1:]):
            point = sign.middle[0] + (a + b - edges[-1]) / 2, sign.middle[1]
            column, row = (
                int((value * scale * picture.size[k] / (scene.width, scene.height)[k] + corner[k]) * patches / side)
                for k, value in enumerate(point)
            )
            grid[min(row, len(grid) - 1), min(column, grid.shape[1] - 1)] = LETTERS.index(letter)
    tiles = grid.view(high // side, patches, wide // side, patches).transpose(1, 2).reshape(-1, patches**2)
    return torch.cat((torch.full((1, patches**2), IGNORED), tiles))
