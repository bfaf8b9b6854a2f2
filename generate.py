"""Answer questions about images: prefill, decode, sampling, streaming, and the command line.

    python generate.py --image demo/images/scene.png
    python generate.py --model CHECKPOINT --image photo.jpg --prompt "What is this?"

    prefill   the whole prompt through the decoder, filling the cache -> logits of the next token
    sample    logits (B, vocabulary) -> one id a row
    decode    that id alone through the decoder, again and again, until an end token

Shape letters as in model.py.
"""

from __future__ import annotations

import argparse
import codecs
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from load_weights import check_new_folder, load_model, read_config, save_checkpoint
from model import QUANTIZATIONS, DeepseekVL, KVCache, PackedLinear, QuantizedLinear
from processor import Processor, Tokenizer, load_image

# ---------------------------------------------------------------------------- sampling

# Each transform takes and gives float32 logits (B, vocabulary); what may not be chosen is -inf.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        seen: bool (B, vocabulary), which tokens the row's prompt and answer hold so far.
        penalty: positive logits are divided by it, negative ones multiplied; 1 does nothing.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of a row (and what equals the smallest of them)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach p (nucleus sampling, 1904.09751).

    At least one is kept. Only what may still be chosen is sorted: after a small top-k that is little.
    """
    allowed = (logits > -math.inf).any(dim=0).nonzero()[:, 0]
    left = logits.index_select(1, allowed)
    ordered, order = left.sort(dim=-1)  # ascending: the tail to cut comes first
    tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    tail[:, -1] = False
    kept = left.masked_fill(torch.zeros_like(tail).scatter(1, order, tail), -math.inf)
    return torch.full_like(logits, -math.inf).index_copy(1, allowed, kept)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One id a row: the largest logit at temperature 0, otherwise drawn from the softmax.

    Args:
        logits: (B, vocabulary), after any repetition penalty.
    Returns: (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int | None,
    chunk_size: int | None,
) -> None:
    """Raise ValueError that names the first option out of its range."""

    def whole(value: object, least: int) -> bool:
        return isinstance(value, Integral) and least <= value < 2**63

    for name, value, valid, wanted in (
        ("max_new_tokens", max_new_tokens, whole(max_new_tokens, 1), "a whole number, 1 or more"),
        # Dividing by less than a millionth overflows; it would choose the likeliest token, as 0 does.
        ("temperature", temperature, temperature == 0 or 1e-6 <= temperature < math.inf, "0, or from 1e-6"),
        ("top_k", top_k, whole(top_k, 0), "a whole number, 0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0"),
        ("seed", seed, seed is None or whole(seed, 0), "a whole number from 0 to 2**63 - 1"),
        ("chunk_size", chunk_size, chunk_size is None or whole(chunk_size, 1), "a whole number, 1 or more"),
    ):
        if not valid:
            raise ValueError(f"{name} is {value}, expected {wanted}")


# ---------------------------------------------------------------------------- generation


def prefill(
    model: DeepseekVL, batch: dict[str, Tensor], cache: KVCache, attention_mask: Tensor | None, chunk_size: int | None
) -> Tensor:
    """Feed the prompt, all at once or in pieces of `chunk_size` tokens.

    Images are seen once, whatever the pieces. A piece attends to all before it through the
    cache, so the result is the same; what shrinks is the memory for the activations.

    Args:
        attention_mask: (B, capacity) or None.
    Returns: logits of the next token, (B, vocabulary).
    """
    pictures_and_ids = {name: batch[name] for name in batch.keys() - {"attention_mask", "labels"}}
    embeddings = model.embed(**pictures_and_ids)  # (B, T, D)
    for piece in embeddings.split(chunk_size or embeddings.shape[1], dim=1):
        seen = cache.length + piece.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :seen]
        output = model(inputs_embeds=piece, attention_mask=mask, cache=cache, logits_to_keep=1)
    return output.logits[:, -1]


class CompiledStep:
    """A model's decode step through torch.compile, on CUDA as a graph that is replayed.

    Compiles at the first step, which takes about a minute (seconds, once torch has kept the result on disk), and anew
    for another number of rows or capacity of the cache, which `decode` therefore rounds up to a multiple of `CAPACITY`.
    A step attends to all of that capacity and hides what is not there yet, so ask for no more tokens than you want.
    Where that cannot be done, as for a decoder of `PackedLinear` layers or without a C++ compiler, `failed` is told
    why, once, and steps are as without it.
    """

    CAPACITY = 256

    def __init__(self, model: DeepseekVL, failed: Callable[[str], None] = lambda reason: None):
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.failed, self.last = failed, None
        self.compiled = None
        if any(isinstance(module, PackedLinear) for module in model.language.modules()):
            failed("the compiler does not know bfloat16 weights packed for a CPU, only what --quantize makes of them")
            return
        try:
            # Layers with experts are compiled one by one, because which experts run depends on values.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            self.compiled = torch.compile(model.fixed_shape_step, mode=mode, dynamic=False)
        except (RuntimeError, AttributeError) as error:  # of a torch too old, or for too new a Python
            failed(str(error))

    def __call__(self, ids: Tensor, cache: KVCache, attention_mask: Tensor | None) -> Tensor | None:
        """
        Args:
            ids: (B, 1); attention_mask: (B, capacity), or None.
        Returns: logits (B, vocabulary), and the cache advanced; None where it cannot be compiled.
        """
        if self.compiled is None:
            return None
        if self.last is None or self.last() is not cache:
            self.last = weakref.ref(cache)
            cache.clear_rest()
            for tensor in (tensor for layer in cache.layers for tensor in layer):
                if tensor.device.type == "cuda":  # a graph may then write into it where it lies
                    torch._dynamo.mark_static_address(tensor, guard=False)
        position = torch.tensor([cache.length], device=ids.device)
        try:
            logits = self.compiled(ids, position, cache.layers, attention_mask)
        except RuntimeError as error:  # of dynamo, of inductor, of the C++ compiler
            self.compiled = None
            self.failed(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
            return None
        cache.advance(1)
        return logits.clone()  # a CUDA graph writes its results to the same place at each step


@torch.inference_mode()
def decode(
    model: DeepseekVL,
    batch: dict[str, Tensor],
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    chunk_size: int | None = None,
    compiled: CompiledStep | None = None,
) -> Iterator[list[int]]:
    """Yield one id a row at each step; `generate` and `stream` say what they mean.

    Rows that have ended are still fed, and what they yield is to be ignored, until all have ended.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, chunk_size)
    input_ids = batch["input_ids"].to(model.device)
    B, T = input_ids.shape
    context = model.config.language.max_position_embeddings
    if T == 0:
        raise ValueError("the prompt is empty, expected at least one token")
    if T > context:
        raise ValueError(f"the prompt has {T} tokens, the model's context holds {context}")
    steps = min(max_new_tokens, context - T + 1)  # the last id is never fed back
    capacity = T + steps - 1
    if compiled is not None:
        capacity = -(-capacity // compiled.CAPACITY) * compiled.CAPACITY
    cache = model.new_cache(B, capacity)

    attention_mask = batch.get("attention_mask")
    if attention_mask is not None:
        if bool(attention_mask.all()):
            attention_mask = None  # nothing is padding: the fast path
        elif not attention_mask[:, -1].all():
            raise ValueError("attention_mask ends in padding, expected the padding on the left")
        else:
            attention_mask = torch.nn.functional.pad(attention_mask.to(model.device), (0, capacity - T), value=1)

    generator = None
    if temperature > 0:
        generator = torch.Generator(model.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

    seen = None
    if repetition_penalty != 1:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, :T].to(input_ids.dtype)
        counts = torch.zeros(B, model.config.language.vocab_size, dtype=input_ids.dtype, device=model.device)
        seen = counts.scatter_add(1, input_ids.long(), real) > 0  # padding adds nothing

    logits = prefill(model, batch, cache, attention_mask, chunk_size)
    for step in range(steps):
        logits = logits.float()
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        ids = choose(logits, temperature, top_k, top_p, generator)  # (B,)
        yield ids.tolist()
        if step == steps - 1:
            return
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        logits = None if compiled is None else compiled(ids[:, None], cache, attention_mask)
        if logits is None:
            mask = None if attention_mask is None else attention_mask[:, : cache.length + 1]
            logits = model(input_ids=ids[:, None], attention_mask=mask, cache=cache).logits[:, -1]


def generate(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, **options) -> list[list[int]]:
    """The new ids of each row, its end token included where it was produced.

    A row ends with an end token or after `max_new_tokens`; all rows end where the longest one, padding
    included, fills the model's context.

    Args:
        batch: as `Processor` makes it: input_ids (B, T), attention_mask (B, T), pixels.
        options: temperature (0: always the likeliest token), top_k (0: off), top_p (1: off),
            repetition_penalty (1: off; counts prompt and answer), seed (for temperature above 0;
            None: another answer each time), chunk_size (tokens of the prompt fed at once), compiled (a
            `CompiledStep` of this model, or None).
    Raises: ValueError for an option out of its range, or a prompt beyond the model's context.
    """
    ends = model.config.end_token_ids
    rows: list[list[int]] = [[] for _ in batch["input_ids"]]
    for ids in decode(model, batch, max_new_tokens, **options):
        for row, new in zip(rows, ids):
            if not row or row[-1] not in ends:
                row.append(new)
        if all(row[-1] in ends for row in rows):
            break
    return rows


def stream(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, **options) -> Iterator[int]:
    """The ids that `generate` returns, each as it comes, for a batch of one conversation.

    Raises: ValueError as `generate`, and for a batch of more than one row.
    """
    if len(batch["input_ids"]) != 1:
        raise ValueError(f"stream takes one conversation, this batch has {len(batch['input_ids'])}; use generate")
    for (new,) in decode(model, batch, max_new_tokens, **options):
        yield new
        if new in model.config.end_token_ids:
            return


class TextStream:
    """Turns ids into text as they come, holding back bytes until they make whole characters.

    A character outside ASCII is several bytes, and byte-level BPE may split it between tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tags = {tokenizer.token_to_id(tag) for tag in GROUNDING_TAGS}  # special, but part of the answer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, which may be none."""
        if self.tokenizer.is_special(token_id) and token_id not in self.tags:
            return ""
        return self.utf8.decode(self.tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        return self.utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------- grounding

# DeepSeek-VL2 answers where something is with <|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>,
# in thousandths of the image's width and height, 0 to 999. The tags are special tokens.
GROUNDING_TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
COORDINATES = 999


class Box(NamedTuple):
    """Something that an answer located, in pixels: 0 <= left < right <= width, 0 <= top < bottom <= height."""

    label: str
    left: int
    top: int
    right: int
    bottom: int


def parse_boxes(text: str, image_size: tuple[int, int]) -> list[Box]:
    """The boxes in an answer, tolerating malformed ones.

    Inside <|det|>, every innermost bracket of exactly four numbers is a box, if it is closed: where an
    answer was cut off, so may its last number be. Corners may be swapped, and what reaches beyond the
    image is cut at its edge. Anything else is passed over: other counts, other text, boxes without an
    area. Nothing is evaluated.

    Args:
        text: decoded with its special tokens; image_size: width and height in pixels.
    Raises: ValueError for an image size that is not positive.
    """
    width, height = image_size
    if width < 1 or height < 1:
        raise ValueError(f"image_size is {image_size}, expected a positive width and height")
    boxes, label, tag = [], "", None
    for part in re.split(r"(<\|/?(?:ref|det)\|>)", text):
        if re.fullmatch(r"<\|/?(?:ref|det)\|>", part):
            tag = part
        elif tag == "<|ref|>":
            label = part.strip()
        elif tag == "<|det|>":
            for bracket in re.findall(r"\[([^\[\]]*)\]", part):
                box = to_pixels(bracket, width, height)
                if box is not None:
                    boxes.append(Box(label, *box))
    return boxes


def to_pixels(bracket: str, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Four numbers of a bracket as left, top, right, bottom in pixels; None where they are no box."""
    numbers = bracket.split(",")
    if len(numbers) != 4 or not all(re.fullmatch(r"\s*[-+]?\d{1,12}(\.\d{0,12})?\s*", n, re.ASCII) for n in numbers):
        return None
    x1, y1, x2, y2 = (min(max(float(n), 0), COORDINATES) / COORDINATES for n in numbers)
    left, right = sorted((int(x1 * width), int(x2 * width)))
    top, bottom = sorted((int(y1 * height), int(y2 * height)))
    return (left, top, right, bottom) if left < right and top < bottom else None


BOX_COLOURS = ("#e6194b", "#0a7a3b", "#0050c8", "#a0388e", "#8a5200", "#00707a")  # dark enough for white text


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of the image with each box outlined and its label beside it, inside the image.

    A label goes above its box, else below, else into it; where another label is, it moves down, or up.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    size = max(12, min(image.size) // 32)
    line = max(2, size // 6)
    taken: list[tuple[int, int, int, int]] = []
    for i, box in enumerate(boxes):
        colour = BOX_COLOURS[i % len(BOX_COLOURS)]
        corners = (box.left, box.top, max(box.right - 1, box.left), max(box.bottom - 1, box.top))
        draw.rectangle(corners, outline=colour, width=line)
    for i, box in enumerate(boxes):
        font = font_for(box.label, size)
        text = fit_label(box.label, font, image.width - size) or f"{i + 1}"
        wide, high = (int(side) + size // 2 for side in font.getbbox(text, anchor="lt")[2:])
        left = max(0, min(box.left, image.width - wide))
        places = [box.top - high, box.bottom, *range(box.top, image.height, high), *range(box.top, -1, -high)]
        places = [top for top in places if 0 <= top <= image.height - high] or [0]
        free = [top for top in places if not any(overlap((left, top, left + wide, top + high), t) for t in taken)]
        place = (left, (free or places)[0], left + wide, (free or places)[0] + high)
        taken.append(place)
        draw.rectangle(place, fill=BOX_COLOURS[i % len(BOX_COLOURS)])
        draw.text((place[0] + size // 4, place[1] + size // 4), text, fill="white", font=font, anchor="lt")
    return image


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# Tried in this order, by name, after Pillow's own, which knows Latin alone.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "malgun.ttf")


@lru_cache(16)
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    found = [ImageFont.load_default(size)]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            pass  # not on this machine
    return found


def font_for(label: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has most of the label's characters."""
    return max(fonts(size), key=lambda font: sum(has_glyph(font, character) for character in label[:200]))


@lru_cache(4096)
def has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws this character as anything but its sign for a missing one."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def fit_label(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """One line of printable text that the font can draw, cut to `width` pixels.

    Characters that the font lacks become "?"; a label of nothing else becomes empty.
    """
    label = " ".join("".join(c if c.isprintable() else " " for c in label[:200]).split())
    if not any(has_glyph(font, c) for c in label if not c.isspace()):
        return ""
    label = "".join(c if has_glyph(font, c) else "?" for c in label)
    while font.getlength(label) > width and len(label) > 1:
        label = label[:-2] + "…" if has_glyph(font, "…") else label[:-1]
    return label


# ---------------------------------------------------------------------------- command line

DEMO = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NOTICE = (
    "no --model: asking the small one in demo/checkpoint, which knows drawn shapes, their places and small signs; what "
    "it says of anything else, such as a photograph, means nothing"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises: ValueError for one that is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in available.items() if here)
    if not available[name]:
        raise ValueError(
            f"--device {name}: there is none here, expected one of "
            + ", ".join(device for device, here in available.items() if here)
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes the fastest dtype that the device has arithmetic for, and does not emulate."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    # A CPU without 16-bit instructions emulates them, several times slower: a short race tells.
    return torch.bfloat16 if matmul_seconds(torch.bfloat16) < matmul_seconds(torch.float32) else torch.float32


def matmul_seconds(dtype: torch.dtype) -> float:
    """The best of a few (256, 1024) x (1024, 1024) matmuls on the CPU."""
    x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        fail(message)


def fail(message: str):
    """Print one `error:` line and end with status 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Ask DeepSeek-VL about images; the answer streams to standard output.")
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="image file or http(s) address; may be repeated")
    add("--prompt", help='the question (default: "Describe this image."); <image> marks where an image goes')
    add("--model", metavar="DIR", help="checkpoint folder (default: the small one in demo/checkpoint)")
    add("--system", metavar="TEXT", help="system text in place of the model's own")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens up to P (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids repeats (default: 1)")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of what is not quantized (default: the device's fastest)",
    )
    add(
        "--quantize",
        choices=tuple(QUANTIZATIONS),
        help="round the decoder and the head to 8 or 4 bits: smaller, faster",
    )
    add("--save", metavar="DIR", help="with --quantize: write the result to this new folder, for --model the next time")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add(
        "--compile",
        action="store_true",
        help="compile the decode step (CPU: with --quantize): starts slowly, then faster",
    )
    add("--chunk-size", type=int, metavar="N", help="prefill N tokens at a time, to save memory")
    add("--boxes", metavar="FILE", help="draw what the answer located (DeepSeek-VL2) on the last image, and save it")
    add("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def make_message(prompt: str | None, images: list[str], marker: str) -> dict:
    """The user's message. Images go first, as `marker`, where the prompt has no marker for them.

    Raises: ValueError where there is nothing to ask, or an image that cannot be read.
    """
    if prompt is None:
        if not images:
            raise ValueError("nothing to do: give --image, --prompt or both")
        prompt = "Describe this image."
    if "<image>" not in prompt and "<image_placeholder>" not in prompt:
        prompt = marker * len(images) + prompt
    return {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}


def check_boxes_file(file: str | None, images: list[str]) -> None:
    """Raise ValueError where --boxes could not be drawn, before any time is spent."""
    if file is None:
        return
    if not images:
        raise ValueError("--boxes draws on an image, give --image")
    if Path(file).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--boxes {file}: expected a name that ends in .png, .jpg or .webp")
    if Path(file).is_dir() or not Path(file).resolve().parent.is_dir():
        raise ValueError(f"--boxes {file}: expected the name of a file, in a folder that is there")


def save_boxes(file: Path, image: Image.Image, answer: str) -> str:
    """Draw the answer's boxes on the image and save it, whole or not at all. Returns what was done."""
    boxes = parse_boxes(answer, image.size)
    if not boxes:
        return f"the answer locates nothing, {file} is not written"
    unfinished = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        draw_boxes(image, boxes).save(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return f"{len(boxes)} box{'es' * (len(boxes) > 1)} drawn in {file}"


def run(args: argparse.Namespace, note: Callable[[str], None]) -> None:
    """Load, answer, report. `note` shows progress, each text in place of the last."""
    options = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "chunk_size")
    }
    check_options(**options)
    check_boxes_file(args.boxes, args.image)
    if args.save is not None:
        if args.quantize is None:
            raise ValueError("--save writes a quantized checkpoint, give --quantize")
        try:
            check_new_folder(Path(args.save))
        except ValueError as error:
            raise ValueError(f"--save {error}") from None
    if args.model is None and not DEMO.is_dir():
        raise ValueError(f"--model is missing, expected a checkpoint folder; {DEMO}, the default, is not there")
    folder = str(DEMO) if args.model is None else args.model
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    processor = Processor(folder)
    message = make_message(args.prompt, args.image, "<image>\n" if processor.is_vl2 else "<image>")
    batch = processor([message], system=args.system)
    prompt_tokens, highest_id = batch["input_ids"].shape[1], int(batch["input_ids"].max())
    vocabulary = read_config(folder, processor.tokenizer).language.vocab_size
    if highest_id >= vocabulary:
        raise ValueError(f"{folder}: the tokenizer gives id {highest_id}, the model knows ids below {vocabulary}")
    if args.model is None:
        print(DEMO_NOTICE, file=sys.stderr)
    kinds = [str(dtype).removeprefix("torch.")] + ([args.quantize] if args.quantize else [])
    loading = f"loading {folder} as {' and '.join(kinds)} on {device}"
    start = time.perf_counter()
    model = load_model(
        folder,
        dtype=dtype,
        device=device,
        quantize=args.quantize,
        pack=args.save is None,
        tokenizer=processor.tokenizer,
        progress=lambda share: note(f"{loading}: {share:.0%}"),
    )
    if args.save is not None:
        save_checkpoint(model, folder, args.save)
        model.pack()
    text, answer = TextStream(processor.tokenizer), ""

    def say(piece: str) -> None:
        nonlocal answer
        answer += piece
        print(piece, end="", flush=True)

    def warn(line: str) -> None:
        note("")
        if answer and sys.stderr.isatty():  # where the answer's unfinished line may stand, too
            print(file=sys.stderr)
        print(line, file=sys.stderr)

    slow = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if slow:
        warn(f"layers in 8 or 4 bits without a fast kernel here: {len(slow)}, as {slow[0]}")
    if args.compile:
        reason = "--compile: not possible here, going on without it"
        options["compiled"] = CompiledStep(model, lambda why: warn(f"{reason} ({why})"))
    note(f"loaded in {time.perf_counter() - start:.1f} s; prefilling {prompt_tokens} tokens")
    start, first, second, count = time.perf_counter(), 0.0, 0.0, 0

    try:
        for new in stream(model, batch, **options):
            if not count:
                first = time.perf_counter()
                note("")
            count += 1
            if count == 2:
                second = time.perf_counter()
            say(text.push(new))
    finally:  # also after Ctrl-C: what was produced ends as a whole line
        if count:
            now = time.perf_counter()
            say(text.finish())
            say("" if answer.endswith("\n") else "\n")
            # Not the second token's time, which may be that of compiling.
            rate = f", {(count - 2) / (now - second):.1f} tokens/s" if count > 2 else ""
            note(
                f"{prompt_tokens} tokens read in {first - start:.1f} s, {count} written in {now - first:.1f} s{rate}\n"
            )
    if args.boxes is not None:
        print(save_boxes(Path(args.boxes), message["images"][-1], answer), file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    args = parse_arguments(arguments)
    show_progress = sys.stderr.isatty() and not args.quiet

    def note(text: str) -> None:
        if show_progress:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        run(args, note)
    except KeyboardInterrupt:
        note("")
        sys.exit(130)  # as the shell says of a program ended by Ctrl-C
    except BrokenPipeError:  # whoever read the answer has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        note("")
        fail(str(error) or type(error).__name__)


if __name__ == "__main__":
    main()
