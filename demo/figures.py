"""Draw the README's figures of both demos: a scene as each tower sees it, the training curves, the experts' load.

python demo/figures.py      writes resolutions.png, training.png, training_vl2.png and experts.png in demo, and the
                            scenes in demo/images
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).parent
sys.path[:0] = [str(DEMO), str(DEMO.parent)]

import vl2_scenes
from drawings import paint, random_drawing
from scenes import SIDE, Scene, draw, plate, random_scene

from generate import Parser, told
from load_weights import read_config, unfinished
from model import DeepseekVL
from processor import Processor

# Seeds, chosen by hand; no seed of training's looks so.
EXAMPLES = {"scene": "scene-283", "photo": "photo-49"}
DRAWING, WIDE = "drawing-325", "wide-2145"
INK, GREY, PAPER = (40, 40, 46), (205, 205, 210), (255, 255, 255)
PALETTE = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#111111", "#e377c2", "#17becf", "#bcbd22", "#7f4f24")
PALETTE += ("#00a087", "#3c5488", "#f39b7f")
LOADS = ("least busy", "busiest")  # of the experts, over an equal share


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def to_picture(pixels) -> Image.Image:
    """(1, 3, side, side) in [0, 1] -> a picture."""
    return Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy())


def draw_resolutions(scene: Scene) -> Image.Image:
    """What SAM and SigLIP get of a scene, from the model's own code, and its sign enlarged."""
    config = read_config(DEMO / "checkpoint")
    tower = DeepseekVL(config).vision
    pixels = Processor(DEMO / "checkpoint").image_inputs(draw(scene))[0]["pixel_values"]
    high, low = tower.split(pixels)
    canvas = Image.new("RGB", (1200, 356), PAPER)
    pen = ImageDraw.Draw(canvas)
    towers = ("SAM", high, tower.config.high_norm), ("SigLIP", low, tower.config.low_norm)
    for i, (name, normalized, norm) in enumerate(towers):
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (norm.mean, norm.std))
        view, x = to_picture(normalized * std + mean), 20 + 600 * i
        canvas.paste(view.resize((300, 300), Image.Resampling.NEAREST), (x, 42))
        box = [edge * view.width / SIDE for edge in plate(scene.signs[0])]
        size = 240, round(240 * (box[3] - box[1]) / (box[2] - box[0]))
        sign = view.resize(size, Image.Resampling.NEAREST, box=box)
        canvas.paste(sign, (x + 320, 42 + (300 - sign.height) // 2))
        pen.text((x, 12), f"what {name} sees: {view.width} x {view.width} pixels", fill=INK, font=font(18))
    return canvas


@dataclass
class Curves:
    """A training's numbers against its steps, which start anew with each stage."""

    stages: list[tuple[str, float]]  # a stage's name, and when it ended
    points: dict[str, list[tuple[float, float]]]


def read_history(file: Path) -> Curves:
    """Of a history.csv; the loss is over its highest in the stage."""
    rows = list(csv.DictReader(file.open()))
    stages, clock = [], 0.0
    points: dict[str, list[tuple[float, float]]] = {
        name: [] for name in rows[0] if name not in ("stage", "step", "seconds")
    }
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        highest = max(float(row["loss"]) for row in own)
        for row in own:
            for name, line in points.items():
                if row[name]:
                    line.append((clock + float(row["step"]), float(row[name]) / (highest if name == "loss" else 1)))
        clock += float(own[-1]["step"])
        stages.append((stage, clock))
    return Curves(stages, points)


def draw_curves(curves: Curves, names: list[str], most: float = 1.0, step: float = 0.25) -> Image.Image:
    """The named curves against thousands of steps, from 0 to `most`; none goes on from one stage into the next."""
    left, top, width, height = 70, 50, 1000, 320
    canvas = Image.new("RGB", (left + width + 150, top + height + 60), PAPER)
    pen = ImageDraw.Draw(canvas)
    clock = curves.stages[-1][1]

    def place(at: float, value: float) -> tuple[float, float]:
        return left + width * at / clock, top + height * (1 - value / most)

    for i in range(round(most / step) + 1):
        y = place(0, i * step)[1]
        pen.line((left, y, left + width, y), fill=GREY)
        pen.text((left - 8, y), f"{i * step:.0%}", fill=INK, font=font(14), anchor="rm")
    start = 0.0
    for i, (stage, end) in enumerate(curves.stages):
        x, odd = place(end, 0)[0], i % 2  # in two rows, since some stages are short
        pen.line((x, top, x, top + height), fill=GREY)
        pen.text(((place(start, 0)[0] + x) / 2, top - 8 - 18 * odd), stage, fill=INK, font=font(14), anchor="mb")
        pen.text((x, top + height + 6 + 18 * odd), f"{end / 1000:.1f}k", fill=INK, font=font(14), anchor="mt")
        start = end
    for i, name in enumerate(names):
        color = "#8c8c94" if name == "loss" else PALETTE[i]
        for stage_start, stage_end in zip([0.0, *(end for _, end in curves.stages)], (end for _, end in curves.stages)):
            inside = [place(*point) for point in curves.points[name] if stage_start < point[0] <= stage_end]
            pen.line(inside, fill=color, width=2 if name != "loss" else 1)
            if len(inside) == 1:
                pen.ellipse([at + d for d in (-2, 2) for at in inside[0]], fill=color)
        pen.text((left + width + 12, top + 22 * i), name, fill=color, font=font(16))
    return canvas


def save(picture: Image.Image, name: str) -> None:
    """As demo/<name>.png, whole or not at all."""
    with unfinished(DEMO / f"{name}.png") as hidden:
        picture.save(hidden)


def write_figures() -> None:
    scenes = {name: random_scene(Random(seed)) for name, seed in EXAMPLES.items()}
    pictures = {name: draw(scene) for name, scene in scenes.items()}
    pictures["drawing"] = paint(random_drawing(Random(DRAWING)))
    pictures["wide"] = vl2_scenes.draw(vl2_scenes.random_scene(Random(WIDE)))
    for name, picture in pictures.items():
        save(picture, f"images/{name}")
    save(draw_resolutions(scenes["scene"]), "resolutions")
    for folder, name in (("checkpoint", "training"), ("vl2", "training_vl2")):
        curves = read_history(DEMO / folder / "history.csv")
        shown = [name for name in curves.points if name not in LOADS]
        save(draw_curves(curves, [*shown[1:], "loss"]), name)
    save(draw_curves(curves, list(LOADS), most=3.0, step=0.5), "experts")


def main() -> None:
    parser = Parser(description="Writes the README's figures in demo and the scenes in demo/images.")
    parser.parse_args()  # --help writes none of them
    with told():
        write_figures()


if __name__ == "__main__":
    main()
