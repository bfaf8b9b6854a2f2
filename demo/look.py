"""Look inside one answer: where its attention went over the picture, what else was likely, which experts ran.

    python demo/look.py --image demo/images/scene.png --prompt "Describe this image." --out look.html --png look.png

The page is one file without outside resources; open it in any browser. `look_page.html` is its template.

The answer is greedy. A token is shown with the pass that chose it, in which the token before it was fed: that pass has
one query, so its attention is (layers, H, S) numbers, of which those over image tokens are kept, in 8 bits.

Shape letters as in model.py; N image tokens, of all pictures together.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from generate import (
    DEMO,
    DTYPES,
    Parser,
    TextStream,
    check_options,
    choose,
    demo_notice,
    make_message,
    note,
    pick_device,
    pick_dtype,
    tell,
    told,
)
from load_weights import load_model, unfinished
from model import DeepseekVL, ModelConfig, record
from processor import PixelSettings, Processor, Tokenizer, fit_label, parse_boxes
from vision import HybridConfig, PixelNorm

LIKELIEST = 5
LONGEST_SIDE = 800  # of a view in the page, in pixels
CAUTION = (
    "Attention says which positions a layer read, not what it took from them, nor why the answer came out so. An image "
    "token is not its patch alone: the vision tower has already mixed it with all others. A position may be read for "
    "nothing (the first one often is). To learn whether a place mattered, change it in the picture and ask again."
)

# ---------------------------------------------------------------------------- the answer, pass by pass


class Step(NamedTuple):
    """A token of the answer, and the pass that chose it."""

    id: int
    probability: float
    likeliest: list[tuple[int, float]]  # ids and probabilities
    peaks: np.ndarray  # float32 (layers, H), the largest weight on an image token
    weights: np.ndarray  # uint8 (layers, H, N): 255 * sqrt(weight / peak), rounded; the root keeps small weights
    shares: np.ndarray  # float32 (layers, H, 4): attention to picture, first token, rest of the prompt, answer
    experts: list[list[tuple[int, float]]]  # of each layer that has some, in order: the chosen, and their weights


def attention_of(step: Step) -> np.ndarray:
    """The attention over image tokens, float32 (layers, H, N), off by at most 0.4% of its peak."""
    return (step.weights / np.float32(255)) ** 2 * step.peaks[..., None]


@torch.inference_mode()
def answer(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int) -> Iterator[Step]:
    """The tokens of a greedy answer to a batch of one conversation, its end token included.

    Raises: ValueError for max_new_tokens below 1, and for logits that are not finite.
    """
    check_options(max_new_tokens=max_new_tokens)
    input_ids, is_image = batch["input_ids"], batch["images_seq_mask"][0]
    T, config = input_ids.shape[1], model.config.language
    steps = min(max_new_tokens, config.max_position_embeddings - T + 1)
    cache = model.new_cache(1, T + steps - 1)
    pictures = (batch.get(name) for name in ("pixel_values", "high_res_pixel_values", "images_spatial_crop"))
    x = model.embed(input_ids, model.encode_images(*pictures), batch["images_seq_mask"])  # (1, T, D)
    model(inputs_embeds=x[:, :-1], cache=cache, logits_to_keep=1)
    x = x[:, -1:]  # of the prompt's last token, which chooses the first of the answer
    for _ in range(steps):
        with record(model) as inside:
            logits = model(inputs_embeds=x, cache=cache).logits[:, -1].float()  # (1, vocabulary)
        if not logits.isfinite().all():
            raise ValueError(f"logits are not finite in {model.dtype}: try bfloat16 or float32 (or check the weights)")
        step = summarize(logits, inside, config.num_hidden_layers, is_image)
        yield step
        if step.id in model.config.end_token_ids:
            return
        x = model.embed(torch.tensor([[step.id]]))


def summarize(logits: Tensor, inside: dict, layers: int, is_image: Tensor) -> Step:
    """What is kept of a pass over one token.

    Args:
        logits: (1, vocabulary); inside: as `record` gives it; is_image: bool (T,), of the prompt.
    """
    names = [f"language.layers.{layer}" for layer in range(layers)]
    attention = torch.cat([inside[f"{name}.self_attn"] for name in names])[:, :, 0].float().cpu()  # (layers, H, S)
    T = len(is_image)
    picture, prompt = attention[..., :T][..., is_image], attention[..., 1:T][..., ~is_image[1:]]
    parts = (picture, attention[..., :1], prompt, attention[..., T:])
    peaks = picture.amax(dim=-1)
    weights = (picture / peaks[..., None].clamp(min=1e-30)).sqrt() * 255  # (layers, H, N)
    routers = (inside[f"{name}.mlp.gate"] for name in names if f"{name}.mlp.gate" in inside)
    probabilities, id = logits[0].softmax(dim=-1), int(choose(logits, 0.0, 0, 1.0, None))
    top = probabilities.topk(min(LIKELIEST, len(probabilities)))
    return Step(
        id=id,
        probability=probabilities[id].item(),
        likeliest=list(zip(top.indices.tolist(), top.values.tolist())),
        peaks=peaks.numpy(),
        weights=weights.round().byte().numpy(),
        shares=torch.stack([part.sum(dim=-1) for part in parts], dim=-1).numpy(),
        experts=[list(zip(chosen[0].tolist(), weights[0].tolist())) for chosen, weights in routers],
    )


def spell(tokenizer: Tokenizer, id: int) -> str:
    """A token as text; bytes that are no whole character as \\xe5."""
    if tokenizer.is_special(id):
        return tokenizer.tokens[id]
    return tokenizer.token_bytes(id).decode(errors="backslashreplace") or f"(id {id})"


# ---------------------------------------------------------------------------- where image tokens lie


class View(NamedTuple):
    """A picture as a tower gets it. Boxes: (label, left, top, right, bottom), in its pixels."""

    name: str
    picture: Image.Image
    tile: int  # side in pixels
    boxes: list[tuple[str, float, float, float, float]]


class Cell(NamedTuple):
    """Where an image token lies: the view's number, and edges in the view's pixels.

    The learned newlines and separator (DeepSeek-VL2) are no part of the picture, and lie to its right and below it.
    """

    name: str
    view: int
    left: float
    top: float
    right: float
    bottom: float


def to_picture(pixels: Tensor, norm: PixelSettings | PixelNorm | None = None) -> Image.Image:
    """(3, height, width), normalized by `norm`'s mean and std or, without one, in [0, 1] -> the picture."""
    if norm is not None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (norm.mean, norm.std))
        pixels = pixels * std + mean
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy())


def lay_out_square(
    config: ModelConfig, processor: Processor, batch: dict[str, Tensor], image: int
) -> tuple[list[tuple[str, Image.Image]], list[Cell]]:
    """One picture of DeepSeek-VL: a square, and a grid of g x g tokens. As `lay_out_tiles`."""
    high = batch.get("high_res_pixel_values")
    pixels, settings = (batch["pixel_values"], processor.pixels) if high is None else (high, processor.high_res_pixels)
    picture = to_picture(pixels[image], settings if settings.normalize else None)
    if isinstance(config.vision, HybridConfig):
        g, step = config.vision.low.grid, picture.width / config.vision.low.grid
    else:  # SigLIP drops what is left of the last patch
        g, step = config.vision.grid, config.vision.patch_size
    places = [(row, column) for row in range(g) for column in range(g)]
    cells = [Cell(place_name(y, x), 0, x * step, y * step, (x + 1) * step, (y + 1) * step) for y, x in places]
    return [("as the model gets it", picture)], cells


def place_name(row: int, column: int) -> str:
    return f"row {row + 1}, column {column + 1}"


def lay_out_tiles(
    config: ModelConfig, processor: Processor, batch: dict[str, Tensor], image: int
) -> tuple[list[tuple[str, Image.Image]], list[Cell]]:
    """One picture of DeepSeek-VL2: its two views.

    Returns: the views' titles and pictures, and its tokens in the order of `TileAligner.lay_out`.
    """
    crops = batch["images_spatial_crop"].tolist()
    start, (wide, high) = sum(1 + w * h for w, h in crops[:image]), crops[image]
    whole, *tiles = batch["pixel_values"][start : start + 1 + wide * high]
    rows = [torch.cat(tiles[i : i + wide], dim=-1) for i in range(0, len(tiles), wide)]
    norm = processor.pixels if processor.pixels.normalize else None
    pictures = [to_picture(pixels, norm) for pixels in (whole, torch.cat(rows, dim=-2))]
    side = config.vision.image_size
    parts = [tile_cells(config, 0, 1, 1), tile_cells(config, 1, wide, high)]
    first, last = parts if config.tiles.global_view_first else reversed(parts)
    separator = Cell("separator", 0, 0, side + side / 40, side / 20, side + 3 * side / 40)
    titles = "global view", f"local view, {wide} x {high} tiles"
    return list(zip(titles, pictures)), [*first, separator, *last]


def tile_cells(config: ModelConfig, view: int, tiles_wide: int, tiles_high: int) -> list[Cell]:
    """The tokens of one view of DeepSeek-VL2: row by row, each row with a newline at its end."""
    side, step = config.vision.image_size, config.tiles.downsample_ratio * config.vision.patch_size
    s = math.ceil(config.vision.grid / config.tiles.downsample_ratio)

    def edges(i: int) -> tuple[int, int]:
        """Of row or column i. A tile's last one reaches over its edge, into the zeros that fill up the fold."""
        start = i // s * side + i % s * step
        return start, min(start + step, (i // s + 1) * side)

    cells, strip = [], (tiles_wide * side + side / 40, tiles_wide * side + 3 * side / 40)
    for row in range(tiles_high * s):
        top, bottom = edges(row)
        for column in range(tiles_wide * s):
            left, right = edges(column)
            cells.append(Cell(place_name(row, column), view, left, top, right, bottom))
        cells.append(Cell(f"newline of row {row + 1}", view, strip[0], top, strip[1], bottom))
    return cells


def fit_box(box: Sequence, size: tuple[int, int], view: tuple[int, int]) -> tuple[str, float, float, float, float]:
    """A box in a picture of `size` -> the same in a view, in which the picture is scaled to fit and centred."""
    scale = min(view[0] / size[0], view[1] / size[1])
    x, y = ((outer - inner * scale) / 2 for outer, inner in zip(view, size))
    return box[0], box[1] * scale + x, box[2] * scale + y, box[3] * scale + x, box[4] * scale + y


def lay_out(
    config: ModelConfig, processor: Processor, batch: dict[str, Tensor], images: list[Image.Image], text: str
) -> tuple[list[View], list[Cell]]:
    """All pictures of a conversation as the model gets them, and the place of each image token, in the prompt's order.

    Args:
        text: the answer with its special tokens; its boxes are those of the last picture, as in generate.py.
    """
    views, cells = [], []
    for i, image in enumerate(images):
        boxes = parse_boxes(text, image.size) if processor.is_vl2 and i == len(images) - 1 else []
        pictures, places = (lay_out_tiles if processor.is_vl2 else lay_out_square)(config, processor, batch, i)
        cells += [cell._replace(view=cell.view + len(views)) for cell in places]
        for title, picture in pictures:
            name = f"picture {i + 1}, {title}" if len(images) > 1 else title
            fitted = [fit_box(box, image.size, picture.size) for box in boxes]
            tile = config.vision.image_size if processor.is_vl2 else picture.width
            views.append(View(f"{name}: {picture.width} x {picture.height} pixels", picture, tile, fitted))
    return views, cells


class Look(NamedTuple):
    """An answer, and all that is shown of it."""

    question: str
    answer: str
    tokenizer: Tokenizer
    steps: list[Step]
    views: list[View]
    cells: list[Cell]
    expert_layers: list[int]  # which layers have experts
    experts: int  # of each


def look(model: DeepseekVL, processor: Processor, message: dict, max_new_tokens: int = 100) -> Look:
    """Answer a user's message with its pictures (PIL images), and keep what happened.

    Raises: ValueError as `Processor`, and as `answer`.
    """
    steps, batch, language = [], processor([message]), model.config.language
    for step in answer(model, batch, max_new_tokens):
        steps.append(step)
        note(f"{len(steps)} tokens")
    note("")
    ids = [step.id for step in steps]
    views, cells = lay_out(model.config, processor, batch, message["images"], processor.decode(ids, False))
    expert_layers = [layer for layer in range(language.num_hidden_layers) if language.has_experts(layer)]
    experts = language.experts.n_routed_experts if expert_layers else 0
    text = TextStream(processor.tokenizer)  # with the tags of what it locates
    written = "".join(map(text.push, ids)) + text.finish()
    return Look(message["content"], written.strip(), processor.tokenizer, steps, views, cells, expert_layers, experts)


# ---------------------------------------------------------------------------- the page


def data_address(picture: Image.Image) -> str:
    picture, file = picture.copy(), io.BytesIO()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    picture.save(file, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def write_page(seen: Look, model: str) -> str:
    """The page: look_page.html with its data as JSON, in which "<" is escaped, so that no text becomes markup."""
    tokens = [
        {
            "text": spell(seen.tokenizer, step.id),
            "probability": step.probability,
            "likeliest": [(spell(seen.tokenizer, id), probability) for id, probability in step.likeliest],
            "experts": step.experts,
        }
        for step in seen.steps
    ]
    views = [
        {"name": view.name, "width": view.picture.width, "height": view.picture.height, "tile": view.tile}
        | {"boxes": view.boxes, "picture": data_address(view.picture)}
        for view in seen.views
    ]
    arrays = [np.stack([getattr(step, name) for step in seen.steps]) for name in ("peaks", "shares", "weights")]
    attention = zlib.compress(b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays))
    layers, heads = seen.steps[0].peaks.shape
    data = {"model": model, "question": seen.question, "answer": seen.answer, "caution": CAUTION, "tokens": tokens}
    data |= {"layers": layers, "heads": heads, "experts": seen.experts, "expert_layers": seen.expert_layers}
    data |= {"views": views, "cells": seen.cells, "attention": base64.b64encode(attention).decode()}
    template = (HERE / "look_page.html").read_text(encoding="utf-8")
    return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)


# ---------------------------------------------------------------------------- one picture

INK, PAPER, NIGHT, CHOSEN, UNCHOSEN = (40, 40, 46), (255, 255, 255), (18, 20, 66), (224, 90, 20), (232, 232, 236)
ACROSS, PANEL = 950, (300, 118)  # width of the picture, and most that a panel's views take, in pixels
CAPTION = "Bright: most attention as the token was chosen, mean of all layers and heads. What was read is not a reason."


def light(view: View, cells: list[Cell], weights: np.ndarray, height: int) -> Image.Image:
    """The view, each cell the darker the smaller its weight (from 0 to 1), and its boxes."""
    scale = height / view.picture.height
    picture = view.picture.resize((round(view.picture.width * scale), height))
    mask = Image.new("L", picture.size, 0)
    pen = ImageDraw.Draw(mask)
    for cell, weight in zip(cells, weights.tolist()):
        left, top, right, bottom = (round(edge * scale) for edge in cell[2:])
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=round(40 + 215 * weight))
    lit = Image.composite(picture, Image.new("RGB", picture.size, NIGHT), mask)
    for _, *edges in view.boxes:
        ImageDraw.Draw(lit).rectangle([round(edge * scale) for edge in edges], outline=CHOSEN)
    return lit


def draw_experts(chosen: list[list[tuple[int, float]]], experts: int, dot: int) -> Image.Image:
    """A row for each layer with experts, in which the chosen are marked; an expert is `dot` pixels wide."""
    grid = Image.new("RGB", (experts * dot, len(chosen) * dot), PAPER)
    pen = ImageDraw.Draw(grid)
    for row, picks in enumerate(chosen):
        marked = {expert for expert, _ in picks}
        for expert in range(experts):
            x, y, colour = expert * dot, row * dot, CHOSEN if expert in marked else UNCHOSEN
            pen.rectangle((x, y, x + dot - 2, y + dot - 2), fill=colour)
    return grid


def draw_panel(seen: Look, step: Step, height: int) -> Image.Image:
    """The views in the light of a token's attention, mean of layers and heads; the token; the experts."""
    weights, views = attention_of(step).mean(axis=(0, 1)), seen.views  # (N,)
    sizes = [views[cell.view].picture.size for cell in seen.cells]
    inside = [cell.left < width and cell.top < high for cell, (width, high) in zip(seen.cells, sizes)]
    weights = (weights / max(weights[inside].max(), 1e-30)).clip(max=1)
    font, dot = ImageFont.load_default(14), 8 if seen.experts <= 16 else 3
    pictures = []
    for number, view in enumerate(views):
        own = [i for i, cell in enumerate(seen.cells) if cell.view == number]
        pictures.append(light(view, [seen.cells[i] for i in own], weights[own], height))
    ends = list(accumulate(picture.width + 4 for picture in pictures))
    width = max(ends[-1], dot * seen.experts, 80)
    panel = Image.new("RGB", (width + 10, height + 40 + dot * len(step.experts)), PAPER)
    for picture, end in zip(pictures, ends):
        panel.paste(picture, (end - picture.width - 4, 0))
    share = f" {step.probability:.0%}"
    name = fit_label(spell(seen.tokenizer, step.id), font, width - font.getlength(share)) or f"(id {step.id})"
    ImageDraw.Draw(panel).text((0, height + 4), name + share, fill=INK, font=font)
    if seen.experts:
        panel.paste(draw_experts(step.experts, seen.experts, dot), (0, height + 26))
    return panel


def draw_poster(seen: Look) -> Image.Image:
    """A panel for each token of the answer, row by row."""
    shape = sum(view.picture.width / view.picture.height for view in seen.views)
    height = max(24, min(PANEL[1], int(PANEL[0] / shape)))
    panels = [draw_panel(seen, step, height) for step in seen.steps]
    width, high = panels[0].size
    across = max(1, ACROSS // width)
    poster = Image.new("RGB", (max(across * width, ACROSS) + 20, 44 + -(-len(panels) // across) * high + 30), PAPER)
    pen, font = ImageDraw.Draw(poster), ImageFont.load_default(16)
    pen.text((14, 12), fit_label(seen.question, font, poster.width - 28), fill=INK, font=font)
    pen.text((14, poster.height - 30), CAPTION, fill=INK, font=ImageFont.load_default(14))
    for i, panel in enumerate(panels):
        poster.paste(panel, (14 + i % across * width, 44 + i // across * high))
    return poster.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # small enough to paste


# ---------------------------------------------------------------------------- command line


def check_file(option: str, file: Path | None, *endings: str) -> None:
    """Raise ValueError where a file to write cannot be, before any time is spent."""
    if file is None:
        return
    if file.suffix.lower() not in endings:
        raise ValueError(f"{option} {str(file)[:200]}: expected a name that ends in {' or '.join(endings)}")
    if file.is_dir() or not file.resolve().parent.is_dir():
        raise ValueError(f"{option} {str(file)[:200]}: expected the name of a file, in a folder that is there")


def run(args) -> None:
    if args.out is None and args.png is None:
        raise ValueError("nothing to write: give --out FILE.html, --png FILE.png or both")
    check_file("--out", args.out, ".html", ".htm")
    check_file("--png", args.png, ".png")
    check_options(max_new_tokens=args.max_new_tokens)
    device = pick_device(args.device)
    processor, message = Processor(args.model), make_message(args.prompt, args.image)
    if notice := demo_notice(args.model):
        tell(notice)
    model = load_model(args.model, dtype=pick_dtype(args.dtype, device), device=device, pack=True)
    seen = look(model, processor, message, args.max_new_tokens)
    if seen.steps[-1].id not in model.config.end_token_ids:
        tell(f"the answer was cut off after {len(seen.steps)} tokens")
    if args.out is not None:
        page = write_page(seen, args.model.resolve().name).encode()
        with unfinished(args.out) as hidden:
            hidden.write_bytes(page)
        print(f"{args.out}: {len(seen.steps)} tokens, {len(page) / 1e6:.1f} MB")
    if args.png is not None:
        with unfinished(args.png) as hidden:
            draw_poster(seen).save(hidden, optimize=True)
        print(f"{args.png}: {len(seen.steps)} tokens")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--image", action="append", required=True, metavar="FILE", help="file, address, or - (stdin); may be repeated")
    add("--prompt", metavar="TEXT", help="the question, or - (stdin); <image> marks where an image goes")
    add("--model", type=Path, default=DEMO, metavar="DIR", help="default: %(default)s")
    add("--out", type=Path, metavar="FILE", help="the page to write, .html")
    add("--png", type=Path, metavar="FILE", help="the picture to write, .png: the attention of each token")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="longest answer (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    args = parser.parse_args()
    with told():
        run(args)


if __name__ == "__main__":
    main()
