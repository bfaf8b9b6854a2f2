"""Draw how DeepSeek-VL2 sees a picture: its tiles, and the order of the tokens they become.

    python demo/draw_tiles.py                            demo/tiles.png, from demo/images/board.jpg
    python demo/draw_tiles.py photo.jpg --out tiles.png

Uses the processor's own functions at the released models' sizes: tiles of 384 pixels, 27 x 27 patches,
14 x 14 tokens.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from generate import Parser, told
from load_weights import unfinished
from model import MODELS
from processor import CANDIDATE_RESOLUTIONS, PIXELS, best_resolution, cut_tiles, load_image

SETTINGS, MODEL = PIXELS["deepseek-vl2"], MODELS["deepseek-vl2"]
TILE = SETTINGS.side
# Tokens along a tile: 27 patches, padded to 28, folded two by two.
SIDE = math.ceil(MODEL.vision.grid / MODEL.tiles.downsample_ratio)

INK, PAPER, GLOBAL, LOCAL, NEWLINE, SEPARATOR = "#222222", "white", "#2f6db5", "#3a9150", "#e08a1e", "#c0285a"


def draw_grid(draw: ImageDraw.ImageDraw, left: int, top: int, rows: int, columns: int, cell: int, colour: str) -> None:
    """A grid of tokens; the last column is the newline that ends each row."""
    for row in range(rows):
        for column in range(columns + 1):
            x, y = left + column * cell, top + row * cell
            fill = NEWLINE if column == columns else colour
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)


def draw_tiles(image: Image.Image) -> Image.Image:
    """The picture, its global and local view, and their tokens, side by side."""
    resolution = best_resolution(image.size, CANDIDATE_RESOLUTIONS)
    wide, high = resolution[0] // TILE, resolution[1] // TILE
    whole, *tiles = cut_tiles(image, resolution, SETTINGS)
    font, small = ImageFont.load_default(22), ImageFont.load_default(18)

    small_tile, gap, margin, cell = 180, 8, 30, 13
    column = [margin, margin + 420, margin + 420 + wide * (small_tile + gap) + 60]
    token_width = (wide * SIDE + 1) * cell
    local_top = 380
    height = local_top + max(high * (small_tile + gap), high * SIDE * cell) + 90
    canvas = Image.new("RGB", (column[2] + max(token_width, 400) + margin, height), PAPER)
    draw = ImageDraw.Draw(canvas)

    def write(x: int, y: int, text: str, colour: str = INK, font: ImageFont.FreeTypeFont = small) -> None:
        draw.text((x, y), text, fill=colour, font=font)

    write(column[0], 20, f"picture, {image.width} x {image.height}", font=font)
    shown = image.copy()
    shown.thumbnail((360, 360))
    canvas.paste(shown, (column[0], 100))

    write(column[1], 20, f"{1 + len(tiles)} tiles of {TILE} x {TILE}", font=font)
    write(column[1], 60, "global view: all of it", GLOBAL)
    canvas.paste(whole.resize((small_tile, small_tile)), (column[1], 100))
    write(column[1], local_top - 35, f"local view: {resolution[0]} x {resolution[1]}, {wide} x {high} tiles", LOCAL)
    for i, tile in enumerate(tiles):
        place = (column[1] + i % wide * (small_tile + gap), local_top + i // wide * (small_tile + gap))
        canvas.paste(tile.resize((small_tile, small_tile)), place)
        draw.rectangle((*place, place[0] + small_tile - 1, place[1] + small_tile - 1), outline=LOCAL, width=2)

    global_count, local_count = SIDE * (SIDE + 1), high * SIDE * (wide * SIDE + 1)
    write(column[2], 20, f"{global_count + 1 + local_count} tokens, in reading order", font=font)
    write(column[2], 60, f"{SIDE} rows of {SIDE} + newline = {global_count}", GLOBAL)
    draw_grid(draw, column[2], 100, SIDE, SIDE, cell, GLOBAL)
    separator_top = 100 + SIDE * cell + 12
    draw.rectangle((column[2], separator_top, column[2] + cell - 2, separator_top + cell - 2), fill=SEPARATOR)
    write(column[2] + 25, separator_top - 6, "one separator", SEPARATOR)
    write(column[2], local_top - 35, f"{high * SIDE} rows of {wide * SIDE} + newline = {local_count}", LOCAL)
    draw_grid(draw, column[2], local_top, high * SIDE, wide * SIDE, cell, LOCAL)
    write(column[2], height - 50, "orange: the learned newline that ends every row", NEWLINE)
    return canvas


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, HERE / "images" / "board.jpg"
    add("picture", nargs="?", type=Path, default=default, metavar="PICTURE", help="default: demo/images/board.jpg")
    add("--out", type=Path, metavar="FILE", help="default, for the default picture alone: demo/tiles.png")
    args = parser.parse_args()
    with told():
        if args.out is None and args.picture != default:
            raise ValueError("--out FILE is needed: demo/tiles.png is for the default picture alone")
        out = args.out or HERE / "tiles.png"
        if out.suffix.lower() not in (".png", ".jpg", ".webp"):
            raise ValueError(f"--out {out}: expected a name that ends in .png, .jpg or .webp")
        with unfinished(out) as hidden:
            draw_tiles(load_image(args.picture)).save(hidden, optimize=True)


if __name__ == "__main__":
    main()
