"""One forward pass of the demo, step by step, with the model's own functions; the end must equal `model(**batch)`.

    python demo/walk.py --out walk      or cell by cell (# %%) in an editor or notebook that runs in this repository

Shape letters as in vision.py and model.py; g: patches along a side of SAM's grid. A 7B differs in its sizes alone.
"""

# %% The demo, and where pictures go
import sys
import tempfile
from pathlib import Path

HERE = Path(globals().get("__file__", "demo/walk.py")).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
import torch.nn.functional as F
from look import spell, to_picture
from PIL import Image

from generate import Parser, fail
from load_weights import load_model, unfinished
from model import record, rope_angles
from processor import Processor, load_image, official_square, to_tensor
from vision import causal_bias, window_partition, window_unpartition

IN_CELLS = "get_ipython" in globals()
parser = Parser(description=__doc__.split("\n")[0])
parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures (default: a temporary one)")
try:
    OUT = parser.parse_args([] if IN_CELLS else None).out or Path(tempfile.mkdtemp(prefix="walk-"))
    OUT.mkdir(parents=True, exist_ok=True)
    processor = Processor(HERE / "checkpoint")
    model = load_model(HERE / "checkpoint", dtype=torch.float32)
except (ValueError, OSError) as error:
    fail(str(error))
torch.set_grad_enabled(False)
sam, siglip, language = model.vision.high, model.vision.low, model.language


def show(name: str, picture: Image.Image) -> None:
    """Small ones are enlarged."""
    times = max(1, 384 // max(picture.size))
    picture = picture.resize([side * times for side in picture.size], Image.Resampling.NEAREST)
    with unfinished(OUT / f"{name}.png") as hidden:
        picture.save(hidden, optimize=True)
    if IN_CELLS:
        display(picture)  # noqa: F821 (a notebook's own)


def heat(values: torch.Tensor) -> Image.Image:
    """(rows, columns): the smallest value black, the largest white."""
    values = values.float() - values.min()
    return Image.fromarray((255 * values / values.max().clamp(min=1e-9)).byte().numpy())


def cut(pixels: torch.Tensor, side: int) -> Image.Image:
    """(1, 3, height, width) in [0, 1], cut into squares as SAM cuts its windows, with white lines between."""
    squares = F.pad(window_partition(pixels.permute(0, 2, 3, 1), side), (0, 0, 0, 1, 0, 1), value=1.0)
    size = (-(-length // side) * (side + 1) for length in pixels.shape[2:])
    return to_picture(window_unpartition(squares, side + 1, *size)[0].permute(2, 0, 1))


# %% The picture, letterboxed: its longest side to image_size, the rest filled with the mean colour
image = load_image(HERE / "images" / "scene.png")
image = image.crop((0, 0, image.width, image.height * 7 // 8))  # no longer square
square = official_square(image, processor.pixels)
pixels = to_tensor(square, processor.pixels)[None]  # (1, 3, side, side) in [0, 1]
print("picture", image.size, "->", tuple(pixels.shape))
show("01-letterbox", square)

# %% The prompt: one marker for the picture, which becomes as many image tokens as the aligner will give
talk = [{"role": "user", "content": "<image>What does the sign say?", "images": [image]}]
batch = processor(talk)
print(repr(processor.prompt(talk)[-60:]), "->", {name: tuple(tensor.shape) for name, tensor in batch.items()})
assert torch.equal(batch["pixel_values"], pixels)

# %% What each tower gets: SAM all pixels, SigLIP few, each normalized its own way
high, low = model.vision.split(pixels)
print("SAM", tuple(high.shape), "SigLIP", tuple(low.shape))
show("02-input-of-sam", to_picture(high[0], model.vision.config.high_norm))
show("02-input-of-siglip", to_picture(low[0], model.vision.config.low_norm))

# %% SAM cuts the picture into patches, each one token
x = sam.patch_embed(high) + sam.pos_embed  # (1, g, g, D)
print("patches", tuple(x.shape))
show("03-patches", cut(pixels, sam.config.patch_size))

# %% Most of SAM's layers attend within windows. The demo's grid divides into them; the 7B's is padded, 64 to 70
windows = window_partition(sam.blocks[0].norm1(x), sam.blocks[0].window)  # (windows, window, window, D)
print("windows", tuple(windows.shape))
show("04-windows-of-the-7b", cut(F.interpolate(pixels, (64, 64)), 14))  # a pixel for each patch, black padding

# %% SAM's layers. The first global one's output takes a second, early path, which alpha scales
for i, block in enumerate(sam.blocks):
    x = block(x)
    if i == sam.config.global_layers[0]:
        early = x
late, early = sam._tokens(sam.neck, x), sam._tokens(sam.neck_hd, early)  # (1, N, C) each
early = early * sam.hd_alpha_downsamples
high_tokens = late + early
print("SAM's tokens", tuple(high_tokens.shape), "alpha", round(sam.hd_alpha_downsamples.item(), 3))
show("05-late-and-early-path", heat(torch.cat((late[0], early[0])).abs()))  # rows: tokens; the early path's below

# %% SigLIP: as many tokens, of the same places
low_tokens = siglip.patch_embed(low).flatten(1, 2) + siglip.pos_embed  # (1, N, D)
for block in siglip.blocks:
    low_tokens = block(low_tokens)
low_tokens = siglip.norm(low_tokens)
print("SigLIP's tokens", tuple(low_tokens.shape))

# %% The aligner joins them, and they take the image tokens' places among the words
features = model.aligner(high_tokens, low_tokens)  # (1, N, D)
x = joined = model.embed(batch["input_ids"], list(features), batch["images_seq_mask"])  # (1, T, D)
T = x.shape[1]
print("features", tuple(features.shape), "the decoder's tokens", tuple(x.shape))
show("06-joined-tokens", heat(x[0].abs().sqrt()))  # rows: tokens, the picture's brighter than words

# %% The mask: a token sees itself and all before it. RoPE's angles: a row for each position, a column for each pair
mask = causal_bias(T, T, x)
cos, sin = rope_angles(torch.arange(T)[None], model.config.language)  # (1, 1, T, d / 2)
print("mask", tuple(mask.shape), "cosines", tuple(cos.shape))
show("07-mask", heat(mask.exp()))
show("08-rope", heat(cos[0, 0]))

# %% The decoder's layers, and the five likeliest next tokens
for layer in language.layers:
    x = layer(x, (cos, sin), bias=None)  # no padding: causal attention needs no bias
logits = model.lm_head(language.norm(x))  # (1, T, vocabulary)
for probability, id in zip(*(values.tolist() for values in logits[0, -1].softmax(dim=-1).topk(5))):
    print(f"{probability:9.4%}", repr(spell(processor.tokenizer, id)))

# %% The same in one call
with record(model) as inside:
    expected = model(**batch).logits
torch.testing.assert_close(logits, expected)
attention = inside[f"language.layers.{len(language.layers) - 1}.self_attn"]  # (1, H, T, T)
show("09-attention-of-the-last-layer", heat(attention[0].mean(dim=0).sqrt()))

# %% A step with the cache: it holds each layer's keys and values, so only the new token is fed
cache, new = model.new_cache(1, T + 1), logits[:, -1:].argmax(dim=-1)  # (1, 1)
model(**batch, cache=cache)
stepped = model(input_ids=new, cache=cache).logits[:, -1]
again = torch.cat((joined, model.embed(new)), dim=1)  # (1, T + 1, D): all of it, without a cache
torch.testing.assert_close(stepped, model(inputs_embeds=again).logits[:, -1])
keys, _ = cache.layers[0].tensors  # (1, H, T + 1, d)
print("cached keys of a layer", tuple(keys.shape), "next", repr(spell(processor.tokenizer, stepped.argmax().item())))
show("10-cached-keys", heat(keys[0].transpose(0, 1).flatten(1)))  # rows: tokens
print("all equal; pictures in", OUT)
