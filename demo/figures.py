"""Draw the README's figures of the demo: a scene as each tower sees it, and the training curve.

python demo/figures.py      writes demo/resolutions.png, demo/training.png and the scenes in demo/images
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).parent
sys.path[:0] = [str(DEMO), str(DEMO.parent)]

from scenes import SIDE, Scene, change, draw, plate, random_scene

from generate import Parser
from load_weights import read_config
from model import DeepseekVL
from processor import Processor

# Seeds, chosen by hand; no seed of training's looks so.
EXAMPLES = {"scene": "scene-283", "photo": "photo-49", "before": "pair-20"}
INK, GREY, PAPER = (40, 40, 46), (205, 205, 210), (255, 255, 255)
CURVES = {"describe": "#1f77b4", "color": "#d62728", "count": "#2ca02c", "position": "#9467bd", "relation": "#ff7f0e"}
CURVES |= {"text": "#111111", "shapes": "#e377c2", "signs": "#17becf", "loss": "#8c8c94"}


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


def draw_training(history: Path) -> Image.Image:
    """Loss, over its highest in the stage, and held-out accuracy against minutes of training."""
    rows = list(csv.DictReader(history.open()))
    ends, clock = [], 0.0  # the clock starts anew with each stage
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in CURVES}
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    for stage in stages:
        own = [row for row in rows if row["stage"] == stage]
        highest = max(float(row["loss"]) for row in own)
        for row in own:
            at = clock + float(row["seconds"])
            points["loss"].append((at, float(row["loss"]) / highest))
            for task in CURVES.keys() - {"loss"}:
                if row[task]:
                    points[task].append((at, float(row[task])))
        clock += float(own[-1]["seconds"])
        ends.append((stage, clock))
    left, top, width, height = 70, 50, 1000, 320
    canvas = Image.new("RGB", (left + width + 130, top + height + 60), PAPER)
    pen = ImageDraw.Draw(canvas)

    def place(at: float, value: float) -> tuple[float, float]:
        return left + width * at / clock, top + height * (1 - value)

    for percent in range(0, 101, 25):
        y = place(0, percent / 100)[1]
        pen.line((left, y, left + width, y), fill=GREY)
        pen.text((left - 8, y), f"{percent}%", fill=INK, font=font(14), anchor="rm")
    start = 0.0
    for i, (stage, end) in enumerate(ends):
        x, odd = place(end, 0)[0], i % 2  # in two rows, since the stages in the middle are short
        pen.line((x, top, x, top + height), fill=GREY)
        pen.text(((place(start, 0)[0] + x) / 2, top - 8 - 18 * odd), stage, fill=INK, font=font(14), anchor="mb")
        pen.text((x, top + height + 6 + 18 * odd), f"{end / 60:.0f} min", fill=INK, font=font(14), anchor="mt")
        start = end
    for i, (name, line) in enumerate(points.items()):
        for stage_start, stage_end in zip([0.0, *(end for _, end in ends)], (end for _, end in ends)):
            inside = [place(*point) for point in line if stage_start < point[0] <= stage_end]
            pen.line(inside, fill=CURVES[name], width=2 if name != "loss" else 1)
        pen.text((left + width + 12, top + 22 * i), name, fill=CURVES[name], font=font(16))
    return canvas


def main() -> None:
    parser = Parser(description="Writes demo/resolutions.png, demo/training.png and the scenes in demo/images.")
    parser.parse_args()  # --help writes none of them
    scenes = {name: random_scene(Random(seed)) for name, seed in EXAMPLES.items()}
    scenes["after"], _ = change(scenes["before"], Random(EXAMPLES["before"]))
    for name, scene in scenes.items():
        draw(scene).save(DEMO / "images" / f"{name}.png")
    draw_resolutions(scenes["scene"]).save(DEMO / "resolutions.png")
    draw_training(DEMO / "checkpoint" / "history.csv").save(DEMO / "training.png")


if __name__ == "__main__":
    main()
