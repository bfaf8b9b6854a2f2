"""Answer questions about images: prefill, decode, sampling, streaming, and the command line.

    python generate.py --image demo/images/scene.png
    python generate.py --model CHECKPOINT --image photo.jpg --prompt "What is this?"

    prefill   the whole prompt through the decoder, filling the cache -> logits of the next token
    sample    logits (B, vocabulary) -> one id a row
    decode    that id alone through the decoder, again and again, until an end token

Shape letters as in model.py. The command line's options come first: --help and a mistyped option
are answered before torch is imported, which takes seconds.
"""

from __future__ import annotations

import argparse
import codecs
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path

# ---------------------------------------------------------------------------- command line: options


def tell(line: str) -> None:
    """Print a line on standard error, where somebody may have closed it or its disk may be full."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def fail(message: str):
    """Print one `error:` line and end with status 2."""
    tell(f"error: {' '.join(message.split())}")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        hint = "; pictures are given with --image" if message.startswith("unrecognized arguments: ") else ""
        fail(message[:300] + hint)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Ask DeepSeek-VL about images; the answer streams to standard output.")
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="file, address, or - (stdin); may be repeated")
    add("--prompt", help='the question, or - (stdin); <image> marks where an image goes')
    add("--model", metavar="DIR", help="checkpoint folder (default: the small one in demo/checkpoint)")
    add("--system", metavar="TEXT", help="system text in place of the model's own")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens up to P (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids repeats (default: 1)")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of what is not quantized (default: the device's fastest)")
    add("--quantize", choices=("int8", "int4"), help="round decoder and head to 8 or 4 bits: smaller, faster")
    add("--save", metavar="DIR", help="with --quantize: write the result to this new folder, for --model the next time")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action="store_true", help="compile decode steps: slow start, faster steps (CPU: with --quantize)")
    add("--chunk-size", type=int, metavar="N", help="prefill N tokens at a time, to save memory")
    add("--boxes", metavar="FILE", help="draw what the answer located (DeepSeek-VL2) on the last image, and save it")
    add("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(arguments)
    for name in ("prompt", "system"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError:
            parser.error(f"--{name} is not valid UTF-8")
    if args.temperature == 0:
        for name, given in (("top-k", args.top_k != 0), ("top-p", args.top_p != 1), ("seed", args.seed is not None)):
            if given:
                parser.error(f"--{name} has no effect at temperature 0, give --temperature")
    return args


def note(text: str, quiet: bool = False) -> None:
    """Progress on a terminal, each text in place of the last, cut to the window's width."""
    if not quiet and sys.stderr.isatty():
        with suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            end = "\n" if text.endswith("\n") else ""
            print(f"\r\033[K{text.rstrip()[: width - 1]}", end=end, file=sys.stderr, flush=True)


def exit_at_interrupt() -> None:
    """Ctrl-C ends the program in silence, with the status that the shell gives it, also while it imports or exits."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def open_streams() -> None:
    """Give the program its streams where whoever started it has closed them; characters a stream lacks become "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="replace")


if __name__ == "__main__":
    exit_at_interrupt()
    open_streams()
    ARGUMENTS = parse_arguments()
    note("starting", ARGUMENTS.quiet)

import torch
from PIL import Image
from torch import Tensor

from load_weights import (
    PackedLinear,
    QuantizedLinear,
    check_new_folder,
    download_hint,
    load_model,
    pack,
    read_config,
    save_checkpoint,
)
from model import DeepseekVL, KVCache, LayerCache, MixtureOfExperts
from processor import GROUNDING_TAGS, Processor, Tokenizer, draw_boxes, load_image, parse_boxes

# ---------------------------------------------------------------------------- sampling

# Each transform takes and gives float32 logits (B, vocabulary); what may not be chosen is -inf.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        seen: bool (B, vocabulary), which tokens the row's prompt and answer hold so far.
        penalty: positive logits are divided by it, negative ones multiplied; 1 does nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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


def whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < 2**63


def number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and -1e9 < value < 1e9


OPTIONS = {  # of `generate`: which values are valid, and how an error says that
    "max_new_tokens": (lambda n: whole(n, 1), "a whole number from 1 to 2**63 - 1"),
    "temperature": (
        lambda t: number(t) and (t == 0 or t >= 1e-6),
        "0, or from 1e-6 to 1e9",
    ),  # below, division overflows
    "top_k": (lambda k: whole(k, 0), "a whole number from 0 (off) to 2**63 - 1"),
    "top_p": (lambda p: number(p) and 0 < p <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda r: number(r) and r > 1e-6, "from 1e-6 to 1e9"),
    "seed": (lambda s: s is None or whole(s, 0), "a whole number from 0 to 2**63 - 1"),
    "chunk_size": (lambda c: c is None or whole(c, 1), "a whole number from 1 to 2**63 - 1"),
}


def check_options(**options: object) -> None:
    """Raise ValueError that names the first option out of its range."""
    for name, value in options.items():
        if not OPTIONS[name][0](value):
            long = isinstance(value, int) and value.bit_length() > 128
            shown = f"{value.bit_length()} bits long" if long else repr(value)[:80]
            raise ValueError(f"{name} is {shown}, expected {OPTIONS[name][1]}")


# ---------------------------------------------------------------------------- generation


def prefill(
    model: DeepseekVL, batch: dict[str, Tensor], attention_mask: Tensor, cache: KVCache, chunk_size: int | None
) -> Tensor:
    """Feed the prompt, all at once or `chunk_size` tokens at a time.

    The towers see the images once. A chunk attends to all before it through the cache, so the result
    is the same, with less memory for the activations.

    Returns: logits of the next token, (B, vocabulary).
    """
    pixels, features = batch.get("pixel_values"), ()
    if pixels is not None and len(pixels):
        features = model.encode_images(pixels, batch.get("high_res_pixel_values"), batch.get("images_spatial_crop"))
    x = model.embed(batch["input_ids"], features, batch.get("images_seq_mask"))  # (B, T, D)
    size = chunk_size or x.shape[1]
    for chunk, mask in zip(x.split(size, dim=1), attention_mask.split(size, dim=1)):
        output = model(inputs_embeds=chunk, attention_mask=mask, cache=cache, logits_to_keep=1)
    return output.logits[:, -1]


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
) -> Iterator[list[int]]:
    """Yield one id a row at each step; `generate` explains the options.

    Finished rows keep decoding until all finish; ignore their ids.
    """
    check_options(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_options(repetition_penalty=repetition_penalty, seed=seed, chunk_size=chunk_size)
    input_ids, mask = batch["input_ids"].to(model.device), batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids)
    (B, T), most = input_ids.shape, model.config.language.max_position_embeddings
    if not 0 < T <= most:
        raise ValueError(f"the prompt has {T} tokens, the model's context holds {most}" if T else "the prompt is empty")
    if not mask[:, -1].all():
        raise ValueError("attention_mask ends in padding, expected the padding on the left")
    steps = min(max_new_tokens, most - T + 1)  # the last id is never fed back
    cache = model.new_cache(B, T + steps - 1)
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(int(seed))

    logits = prefill(model, batch, mask, cache, chunk_size and int(chunk_size))
    seen = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, input_ids.long(), mask.long()) > 0  # no padding
    for step in range(steps):
        if not logits.isfinite().all():
            raise ValueError(f"logits are not finite in {model.dtype}: try bfloat16 or float32 (or check the weights)")
        logits = penalize_repetition(logits.float(), seen, float(repetition_penalty))
        ids = choose(logits, float(temperature), top_k, float(top_p), generator)  # (B,)
        yield ids.tolist()
        if step < steps - 1:
            seen.scatter_(1, ids[:, None], True)
            logits = model(input_ids=ids[:, None], cache=cache).logits[:, -1]


def generate(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, **options) -> list[list[int]]:
    """The new ids of each row, its end token included where it was produced.

    A row ends with an end token or after `max_new_tokens`; all rows end where the longest one, padding
    included, fills the model's context.

    Args:
        batch: as `Processor` makes it: input_ids (B, T), attention_mask (B, T), pixels.
        options: temperature (0: always the likeliest token), top_k (0: off), top_p (1: off),
            repetition_penalty (1: off; counts prompt and answer), seed (for temperature above 0;
            None: another answer each time), chunk_size (tokens of the prompt fed at once).
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


class CompiledDecoder:
    """A decoder's `forward` in which steps of one token run compiled, on CUDA as a graph that is replayed.

    The first step compiles, which takes about a minute (seconds, once torch has kept the result on
    disk); so does another number of rows or capacity of the cache. A step attends to the cache's whole
    capacity, so ask for no more tokens than you want. Where compiling fails, `failed` is told why, and
    steps run as without it.
    """

    def __init__(self, plain: Callable, mode: str, failed: Callable[[str], None]):
        self.plain, self.failed = plain, failed
        self.compiled = torch.compile(plain, mode=mode, dynamic=False)

    def __call__(self, x: Tensor, position_ids: Tensor, bias: Tensor | None, caches: list[LayerCache] | None) -> Tensor:
        if self.compiled is None or x.shape[1] > 1 or caches is None:
            return self.plain(x, position_ids, bias, caches)
        for tensor in (tensor for cache in caches for tensor in cache.tensors if tensor.is_cuda):
            torch._dynamo.mark_static_address(tensor, guard=False)  # a graph may write into it where it lies
        try:
            return self.compiled(x, position_ids, bias, caches)
        except RuntimeError as error:  # of dynamo, of inductor, of the C++ compiler
            self.compiled = None
            self.failed(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
            return self.plain(x, position_ids, bias, caches)


def compile_steps(model: DeepseekVL, failed: Callable[[str], None] = lambda reason: None) -> None:
    """Compile the model's decode steps in place, where that can be done; see `CompiledDecoder`."""
    if any(isinstance(module, PackedLinear) for module in model.language.modules()):
        failed("the compiler does not know bfloat16 weights packed for a CPU, only what --quantize makes of them")
        return
    try:
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):  # which experts run depends on values: compile around them
                module.mix = torch.compiler.disable(module.mix)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        model.language.forward = CompiledDecoder(model.language.forward, mode, failed)
        model.fixed_shape_steps = True
    except (RuntimeError, AttributeError) as error:  # of a torch too old, or for too new a Python
        failed(str(error))


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


# ---------------------------------------------------------------------------- command line

DEMO = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NOTICE = (
    "asking the small model in demo/checkpoint, which knows drawn shapes, their places and small signs; what it says "
    "of anything else, such as a photograph, means nothing"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises: ValueError for one that is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in available.items() if here)
    if not available[name]:
        here = ", ".join(device for device, here in available.items() if here)
        raise ValueError(f"--device {name}: there is none here, expected one of {here}")
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


def make_message(prompt: str | None, images: list[str]) -> dict:
    """The user's message; a prompt of "-" is read from standard input.

    Raises: ValueError where there is nothing to ask, or an image that cannot be read.
    """
    if prompt is None:
        if not images:
            raise ValueError("nothing to do: give --image, --prompt or both")
        prompt = "Describe this image."
    if prompt == "-":
        if "-" in images:
            raise ValueError("--prompt and --image both read standard input, give a file for one")
        prompt = sys.stdin.read()
    return {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError where a file or folder of the options cannot be, before any time is spent."""
    if args.save is not None:
        if args.quantize is None:
            raise ValueError("--save writes a quantized checkpoint, give --quantize")
        try:
            check_new_folder(Path(args.save))
        except ValueError as error:
            raise ValueError(f"--save {error}") from None
    if args.model is None and not DEMO.is_dir():
        raise ValueError(f"--model is missing, expected a checkpoint folder; {DEMO}, the default, is not there")
    if args.model is not None and (not args.model or not Path(args.model).expanduser().is_dir()):
        found = "is a file" if Path(args.model).is_file() else "is not there"
        hint = download_hint(args.model)
        raise ValueError(f"--model {args.model[:200]!r} {found}, expected a checkpoint folder{hint}")
    if args.boxes is not None:
        file = Path(args.boxes)
        if not args.image:
            raise ValueError("--boxes draws on an image, give --image")
        if file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--boxes {file}: expected a name that ends in .png, .jpg or .webp")
        if file.is_dir() or not file.resolve().parent.is_dir():
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


def run(args: argparse.Namespace) -> None:
    """Load, answer, report."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "chunk_size")
    options = {name: getattr(args, name) for name in names}
    check_options(**options)
    check_files(args)
    folder = DEMO if args.model is None else Path(args.model).expanduser()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    processor = Processor(folder)
    if args.boxes is not None and not processor.is_vl2:
        raise ValueError(f"--boxes needs a DeepSeek-VL2, {folder} is a DeepSeek-VL, which locates nothing")
    asks = args.prompt is not None or args.image or args.save is None
    if asks:
        message = make_message(args.prompt, args.image)
        batch = processor([message], system=args.system)
        prompt_tokens, highest_id = batch["input_ids"].shape[1], int(batch["input_ids"].max())
        vocabulary = read_config(folder, processor.tokenizer).language.vocab_size
        if highest_id >= vocabulary:
            raise ValueError(f"{folder}: the tokenizer gives id {highest_id}, the model knows ids below {vocabulary}")
    if folder.resolve() == DEMO.resolve():
        note("", args.quiet)
        tell(DEMO_NOTICE)
    kinds = [str(dtype).removeprefix("torch.")] + ([args.quantize] if args.quantize else [])
    loading = f" as {' and '.join(kinds)} on {device}: loading {folder}"
    start = time.perf_counter()
    model = load_model(
        folder,
        dtype=dtype,
        device=device,
        quantize=args.quantize,
        pack=args.save is None,
        tokenizer=processor.tokenizer,
        progress=lambda share: note(f"{share:.0%}{loading}", args.quiet),
    )
    if args.save is not None:
        save_checkpoint(model, folder, args.save)
        pack(model)
    if asks:
        note(f"loaded in {time.perf_counter() - start:.1f} s; prefilling {prompt_tokens} tokens", args.quiet)
        answer = say_answer(args, model, processor, batch, options)
    if args.boxes is not None:
        tell(save_boxes(Path(args.boxes), message["images"][-1], answer))


def say_answer(args: argparse.Namespace, model: DeepseekVL, processor: Processor, batch: dict, options: dict) -> str:
    """Stream the answer to standard output, as whole lines also after Ctrl-C. Returns it."""
    text, answer = TextStream(processor.tokenizer), ""

    def say(piece: str) -> None:
        nonlocal answer
        piece = piece if answer else piece.removeprefix(" ")  # the answer's first token begins with one
        answer += piece
        print(piece, end="", flush=True)

    def warn(line: str) -> None:
        note("", args.quiet)
        tell(f"\n{line}" if answer and sys.stderr.isatty() else line)  # on a terminal the answer's line may be open

    slow = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if slow:
        warn(f"layers in 8 or 4 bits without a fast kernel here: {len(slow)}, as {slow[0]}")
    if args.compile:
        compile_steps(model, lambda why: warn(f"--compile: not possible here, going on without it ({why})"))
    start, prompt_tokens, times = time.perf_counter(), batch["input_ids"].shape[1], []
    try:
        for new in stream(model, batch, **options):
            if not times:
                note("", args.quiet)
            times.append(time.perf_counter())
            say(text.push(new))
    finally:
        if times:
            say(text.finish())
            print("" if answer.endswith("\n") else "\n", end="", flush=True)
            now, count = time.perf_counter(), len(times)
            # From the second token on: its own step may have compiled.
            rate = f", {(count - 2) / (now - times[1]):.1f} tokens/s" if count > 2 else ""
            read, written = times[0] - start, now - times[0]
            line = f"{prompt_tokens} tokens read in {read:.1f} s, {count} written in {written:.1f} s{rate}"
            note(f"{line}\n", args.quiet)
    if new not in model.config.end_token_ids:
        limit = "--max-new-tokens" if len(times) == options["max_new_tokens"] else "the model's context"
        tell(f"the answer was cut off after {len(times)} tokens, by {limit}")
    return answer


def main(arguments: list[str] | None = None) -> None:
    open_streams()
    args = ARGUMENTS if __name__ == "__main__" else parse_arguments(arguments)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(args)
    except KeyboardInterrupt:
        note("", args.quiet)
        sys.exit(130)  # as the shell says of a program ended by Ctrl-C
    except BrokenPipeError:  # whoever read the answer has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        note("", args.quiet)
        fail(str(error) or type(error).__name__)
    finally:
        exit_at_interrupt()


if __name__ == "__main__":
    main()
