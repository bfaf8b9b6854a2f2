"""Answer questions about images: prefill, decode, sampling, streaming, and the command line.

    python generate.py --image demo/images/scene.png
    python generate.py --model CHECKPOINT --image photo.jpg --prompt "What is this?"
    python generate.py --model CHECKPOINT --chat

    prefill   the whole prompt through the decoder, filling the cache -> logits of the next token
    sample    logits (B, vocabulary) -> one id a row
    decode    that id alone through the decoder, again and again, until an end token

Shape letters as in model.py. The command line's options come first: --help and a mistyped option
are answered before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import signal


def exit_at_interrupt() -> None:
    """Ctrl-C ends the program in silence, with the status that the shell gives it, also while it imports or exits."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


if __name__ == "__main__":
    exit_at_interrupt()  # before all other imports

import argparse
import codecs
import json
import math
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from numbers import Integral, Real
from pathlib import Path

# ---------------------------------------------------------------------------- command line: options


progress_stands = False  # on the last line of the terminal


def note(text: str, quiet: bool = False) -> None:
    """Progress on a terminal, each text in place of the last, cut to the window's width."""
    global progress_stands
    if not quiet and sys.stderr is not None and sys.stderr.isatty():
        with suppress(OSError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            end = "\n" if text.endswith("\n") else ""
            print(f"\r\033[K{text.rstrip()[: width - 1]}", end=end, file=sys.stderr, flush=True)
            progress_stands = text != "" and not end


def tell(line: str) -> None:
    """Print a line on standard error, in place of progress; somebody may have closed it, or its disk may be full."""
    with suppress(OSError, ValueError):
        if progress_stands:
            note("")
        if sys.stderr is not None:  # otherwise `print` takes standard output
            print(line, file=sys.stderr, flush=True)


def fail(message: str):
    """Print one `error:` line, of at most 1000 characters, and end with status 2."""
    tell(f"error: {' '.join(message.split())}"[:1000])
    sys.exit(2)


@contextmanager
def told(stopped: str = "") -> Iterator[None]:
    """Around a command: an error becomes one line and status 2, Ctrl-C the line `stopped`, if any, and status 130."""
    open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        tell(stopped) if stopped else note("", quiet=not progress_stands)
        sys.exit(130)  # as the shell says of a program ended by Ctrl-C
    except BrokenPipeError:  # whoever read the answer has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        fail(str(error) or type(error).__name__)
    finally:
        exit_at_interrupt()


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        words = message.partition("unrecognized arguments: ")[2]
        named = words[:1] not in ("", "-") and "--image" in self.format_usage()
        fail(message[:300] + ("; pictures are given with --image" if named else ""))


LARGEST = 2**63 - 1  # of int64
OPTIONS = {  # of `generate`: type, least, most, other valid values
    "max_new_tokens": (Integral, 1, LARGEST, ()),
    "temperature": (Real, 1e-6, 1e9, (0,)),  # below, division overflows
    "top_k": (Integral, 0, LARGEST, ()),
    "top_p": (Real, 1e-9, 1, ()),
    "repetition_penalty": (Real, 1e-6, 1e9, ()),
    "seed": (Integral, 0, LARGEST, (None,)),
    "chunk_size": (Integral, 1, LARGEST, (None,)),
    "n": (Integral, 1, 2**31 - 1, ()),
    "log_probs": (Integral, 0, LARGEST, (None,)),
}


def check_options(**options: object) -> None:
    """Raise ValueError that names the first option out of its range, TypeError for one that is none."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise TypeError(f"unknown option {name}, expected one of {', '.join(OPTIONS)}")
        kind, least, most, others = OPTIONS[name]
        fits = isinstance(value, kind) and not isinstance(value, bool)
        number = float(value) if fits and not isinstance(value, Integral) else value  # NumPy's may be narrow
        if not (fits and least <= number <= most) and (isinstance(value, bool) or value not in others):
            shown = "an int of many digits" if isinstance(value, int) and abs(value) > 10**99 else repr(value)[:80]
            expected = " or ".join([f"from {least} to {most}", *map(str, others)])
            raise ValueError(f"{name} is {shown}, expected a {'whole ' * (kind is Integral)}number {expected}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Ask DeepSeek-VL about images; the answer streams to standard output.")
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="file, address, or - (stdin); may be repeated")
    add("--prompt", help="the question, or - (stdin); <image> marks where an image goes")
    add("--model", metavar="DIR", help="checkpoint folder (default: the small one in demo/checkpoint)")
    add("--system", metavar="TEXT", help="system text in place of the model's own")
    add("--chat", action="store_true", help="several questions, a line each, about pictures that /image adds")
    add("--raw", action="store_true", help="base models: continue the prompt as it is, without system text and roles")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this; may be repeated")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens up to P (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids repeats (default: 1)")
    add("--seed", type=int, metavar="S", help="makes sampling repeatable")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of what is not quantized (default: the device's fastest)")
    add("--quantize", choices=("int8", "int4"), help="round decoder and head to 8 or 4 bits: smaller; faster on a CPU")
    add("--save", metavar="DIR", help="with --quantize: write the result to this new folder, for --model the next time")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--compile", action="store_true", help="compile decode steps: slow start, then fast (CPU: quantized bfloat16)")
    add("--chunk-size", type=int, metavar="N", help="prefill N tokens at a time, to save memory")
    add("--boxes", metavar="FILE", help="draw what the answer located (DeepSeek-VL2) on the last image, and save it")
    add("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(arguments)
    args.options = {name: value for name, value in vars(args).items() if name in OPTIONS}
    try:
        check_options(**args.options)
    except ValueError as error:
        parser.error(str(error))
    greedy, reads_input = args.temperature == 0, "-" in (args.prompt, *args.image)
    asks = args.prompt is not None or args.image or args.chat
    names = (*args.options, "system", "stop", "raw", "compile")
    of_answers = any(getattr(args, name) != parser.get_default(name) for name in names)
    wrong = {
        "nothing to do: give --image, --prompt or both": not asks and args.save is None,
        "--save alone answers nothing, its options are --model, --quantize, --dtype, --device": not asks and of_answers,
        "--prompt is not valid UTF-8": not is_utf8(args.prompt or ""),
        "--system is not valid UTF-8": not is_utf8(args.system or ""),
        "--system has no place in a --raw prompt": args.raw and args.system is not None,
        "--stop is not valid UTF-8": not is_utf8("".join(args.stop)),
        "--stop needs a text": "" in args.stop,
        "--raw answers one question, not a --chat": args.chat and args.raw,
        "--boxes answers one question, not a --chat": args.chat and args.boxes is not None,
        "--boxes draws on an image, give --image": args.boxes is not None and not args.image,
        "--chat and - both read standard input, give a text or a file": args.chat and reads_input,
        "standard input is closed": (args.chat or reads_input) and sys.stdin is None,
        "--save writes a quantized checkpoint, give --quantize": args.save is not None and args.quantize is None,
        "--top-k has no effect at temperature 0, give --temperature": greedy and args.top_k != 0,
        "--top-p has no effect at temperature 0, give --temperature": greedy and args.top_p != 1,
        "--seed has no effect at temperature 0, give --temperature": greedy and args.seed is not None,
    }
    for message, found in wrong.items():
        if found:
            parser.error(message)
    return args


def is_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: bytes that were none are surrogates in a Python text."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def open_streams() -> None:
    """Give the program its streams where whoever started it has closed them; characters a stream lacks become "?"."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="replace")


if __name__ == "__main__":
    open_streams()
    ARGUMENTS = parse_arguments()
    note("starting", ARGUMENTS.quiet)

import torch
from PIL import Image
from torch import Tensor, nn

from load_weights import (
    DigitLinear,
    HalfLinear,
    PackedLinear,
    QuantizedLinear,
    check_new_folder,
    download_hint,
    load_model,
    pack,
    save_checkpoint,
    unfinished,
)
from model import Decoder, DeepseekVL, KVCache, LayerCache, MixtureOfExperts, check_ids
from processor import GROUNDING_TAGS, Processor, Tokenizer, draw_boxes, load_image, parse_boxes, reason
from vision import TileAligner

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
    """Keep the fewest tokens whose probabilities reach p, at least one (nucleus sampling, 1904.09751)."""
    ordered, order = logits.sort(dim=-1)  # ascending: the tail to cut comes first
    tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    tail[:, -1] = False
    return logits.masked_fill(torch.zeros_like(tail).scatter(1, order, tail), -math.inf)


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


# ---------------------------------------------------------------------------- generation


class Token(int):
    """An id that also says how likely it was, before temperature and penalty.

    log_prob: natural logarithm of its probability; likeliest: the k likeliest ids and theirs, in order.
    """

    def __new__(cls, id: int, log_prob: float, likeliest: list[tuple[int, float]]):
        token = super().__new__(cls, id)
        token.log_prob, token.likeliest = log_prob, likeliest
        return token

    def __getnewargs__(self) -> tuple:  # for copies and pickles
        return int(self), self.log_prob, self.likeliest


def with_log_probs(ids: Tensor, logits: Tensor, k: int) -> list[Token]:
    """ids (B,) as Tokens, from the logits (B, vocabulary) that they were chosen by."""
    log_probs = logits.float().log_softmax(dim=-1)
    chosen, top = log_probs.gather(1, ids[:, None])[:, 0], log_probs.topk(min(k, log_probs.shape[-1]))
    likeliest = [list(zip(*row)) for row in zip(top.indices.tolist(), top.values.tolist())]
    return [Token(*fields) for fields in zip(ids.tolist(), chosen.tolist(), likeliest)]


PICTURES = ("pixel_values", "high_res_pixel_values", "images_spatial_crop")  # what `encode_images` takes


def split_pictures(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The arguments of `encode_images` for each picture alone."""
    given, tiles = {name: batch[name] for name in PICTURES if batch.get(name) is not None}, 1
    if "pixel_values" not in given or not len(given["pixel_values"]):
        return []
    if "images_spatial_crop" in given:
        crops = TileAligner.crops(given["images_spatial_crop"], len(given["pixel_values"]))
        given["images_spatial_crop"], tiles = torch.tensor(crops), [1 + wide * high for wide, high in crops]
    parts = [tensor.split(tiles if name == "pixel_values" else 1) for name, tensor in given.items()]
    return [dict(zip(given, part)) for part in zip(*parts)]


class ConversationCache:
    """What a conversation's next turn need not compute again; `generate` and `stream` take it as `cache`.

    The batch holds the whole conversation at every turn. Its tokens are compared with those fed before, and fed
    from the first that differs. A picture is recognized by its pixels: the towers see it once.
    """

    def __init__(self, model: DeepseekVL):
        self.kv = model.new_cache(1, 0)
        self.tokens: list[tuple] = []  # what was fed, and an answer's last id: (id, hash of the picture or None)
        self.features: dict[int, Tensor] = {}  # of each picture of the last batch (N, D), by a hash of its pixels
        self.reused = 0  # tokens of the last batch that were not fed again

    def embed_new(self, model: DeepseekVL, batch: dict[str, Tensor]) -> Tensor:
        """Forget what the batch does not begin with, and embed what it has beyond: (1, T, D) with T at least 1."""
        ids, places, pictures = batch["input_ids"], batch.get("images_seq_mask"), []
        for picture in split_pictures(batch):
            key = hash(b"".join(tensor.float().cpu().numpy().tobytes() for tensor in picture.values()))
            if key not in self.features:
                (self.features[key],) = model.encode_images(**picture)
            pictures.append(key)
        x = model.embed(ids, [self.features[key] for key in pictures], places)  # (1, all tokens, D)
        places = model.image_places(ids) if places is None else places
        keys = (key for key in pictures for _ in self.features[key])
        tokens = [(id, next(keys) if image else None) for id, image in zip(ids[0].tolist(), places[0].tolist())]
        held = self.tokens[: min(self.kv.length, len(tokens) - 1)]  # at least one is fed, for its logits
        same = next((i for i, (new, old) in enumerate(zip(tokens, held)) if new != old), len(held))
        self.tokens, self.kv.length, self.reused = tokens, same, same
        self.features = {key: self.features[key] for key in pictures}  # those of pictures that are gone are freed
        return x[:, same:]


def prefill(model: DeepseekVL, x: Tensor, attention_mask: Tensor, cache: KVCache, chunk_size: int | None) -> Tensor:
    """Feed the embedded prompt (B, T, D), all at once or `chunk_size` tokens at a time.

    A chunk attends to all before it through the cache, so the result is the same, with less memory for the
    activations.

    Returns: logits of the next token, (B, vocabulary).
    """
    size = chunk_size or x.shape[1]
    for chunk, mask in zip(x.split(size, dim=1), attention_mask.split(size, dim=1)):
        output = model(inputs_embeds=chunk, attention_mask=mask, cache=cache, logits_to_keep=1)
    return output.logits[:, -1]


@torch.inference_mode()
def decode(
    model: DeepseekVL, logits: Tensor, seen: Tensor, cache: KVCache, steps: int,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
    seed: int | None = None, log_probs: int | None = None,
) -> Iterator[list[int]]:  # fmt: skip
    """Choose an id a row, feed them, `steps` times; yield each step's ids. `generate` explains the options.

    Args:
        logits: (B, vocabulary) of the first id; seen: bool (B, vocabulary), ids of the prompt.
        cache: holds the prompt, and has room for all ids but the last, which is not fed.
    """
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(int(seed))
    for step in range(steps):
        if not logits.isfinite().all():
            bad = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
            why = f", as {bad} is not" if bad else ": try bfloat16 or float32 (or check the weights)"
            raise ValueError(f"logits are not finite in {model.dtype}{why}")
        scores = penalize_repetition(logits.float(), seen, float(repetition_penalty))
        ids = choose(scores, float(temperature), top_k, float(top_p), generator)  # (B,)
        yield ids.tolist() if log_probs is None else with_log_probs(ids, logits, int(log_probs))
        if step < steps - 1:
            seen = seen.scatter(1, ids[:, None], True)
            x = model.language.embed_tokens(ids[:, None])  # of chosen ids, which need no check
            logits = model(inputs_embeds=x, cache=cache).logits[:, -1]


@torch.inference_mode()
def answer(
    model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, chunk_size: int | None = None, n: int = 1,
    cache: ConversationCache | None = None, stop: Sequence[str] = (), tokenizer: Tokenizer | None = None, **sampling,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Prefill, then decode: yield an id a row at each step, None for rows that have ended, until all have.

    `generate` explains batch and options.
    """
    check_options(max_new_tokens=max_new_tokens, chunk_size=chunk_size, n=n, **sampling)
    x, input_ids, mask = (batch.get(name) for name in ("inputs_embeds", "input_ids", "attention_mask"))
    if x is None and input_ids is None:
        raise ValueError("the batch has neither input_ids nor inputs_embeds")
    if input_ids is not None:
        check_ids("input_ids", input_ids, model.config.language.vocab_size, *("BT" if x is None else x.shape[:2]))
    (B, T), most = (input_ids if x is None else x).shape[:2], model.config.language.max_position_embeddings
    mask = torch.ones(B, T, dtype=torch.long) if mask is None else mask
    if not 0 < T <= most:
        raise ValueError(f"the prompt has {T} tokens, the model's context holds {most}" if T else "the prompt is empty")
    if mask.shape != (B, T) or not mask[:, -1].all():
        raise ValueError(f"attention_mask of shape {list(mask.shape)}: expected {[B, T]}, without padding at the end")
    if cache is not None and (x is not None or B * n > 1 or not mask.all()):
        taken = "one conversation of input_ids: not inputs_embeds, a batch, padding, or n above 1"
        raise ValueError(f"a cache continues {taken}")
    if cache is not None and cache.kv.fixed_shape != model.fixed_shape_steps:
        raise ValueError("the cache was made before compile_steps, make a new one")
    if n > 1 and sampling.get("temperature", 0) == 0:
        raise ValueError(f"n is {n} at temperature 0, where all answers are the same")
    are_texts = isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop)
    if stop and (isinstance(stop, str) or not are_texts or not isinstance(tokenizer, Tokenizer)):
        raise ValueError("stop is a list of texts that are not empty, and needs the tokenizer")
    steps = min(max_new_tokens, most - T + 1)

    if cache is not None:
        x = cache.embed_new(model, batch)
        cache.kv.enlarge(T + steps - 1)
    elif x is None:
        features = model.encode_images(*(batch.get(name) for name in PICTURES))
        x = model.embed(input_ids, features, batch.get("images_seq_mask"))
    kv = model.new_cache(B, T + steps - 1) if cache is None else cache.kv
    logits = prefill(model, x, mask[:, -x.shape[1] :], kv, chunk_size and int(chunk_size))
    seen = torch.zeros_like(logits, dtype=torch.long)  # (B, vocabulary), how often a row has each id; without padding
    if input_ids is not None:
        seen.scatter_add_(1, input_ids.to(seen), mask.to(seen))
    if n > 1:
        kv.enlarge(kv.capacity, n)
        logits, seen = logits.repeat_interleave(n, dim=0), seen.repeat_interleave(n, dim=0)

    open_rows, texts = set(range(B * n)), [TextStream(tokenizer, stop) for _ in range(B * n if stop else 0)]
    for ids in decode(model, logits, seen > 0, kv, steps, **sampling):  # rows that have ended are fed as the others
        if cache is not None:
            cache.tokens += [(id, None) for id in ids]
        yield [id if row in open_rows else None for row, id in enumerate(ids)]
        for text, id in zip(texts, ids):
            text.push(id)
        stopped = {row for row, text in enumerate(texts) if text.stopped}
        open_rows -= stopped | {row for row, id in enumerate(ids) if id in model.config.end_token_ids}
        if not open_rows:
            return


def generate(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, **options) -> list[list[int]]:
    """The new ids of each row, its end token included where it was produced.

    A row ends with an end token, with the token that completes a `stop` text, or after `max_new_tokens`; all
    rows end where the longest one, padding included, fills the model's context.

    Args:
        batch: as `Processor` makes it: input_ids (B, T), attention_mask (B, T), pixels. Or inputs_embeds
            (B, T, D), from `DeepseekVL.embed`, in place of ids and pixels; if input_ids are there too, they
            are what the repetition penalty counts.
        options: temperature (0: always the likeliest token), top_k (0: off), top_p (1: off),
            repetition_penalty (1: off; counts prompt and answer), seed (for temperature above 0;
            None: another answer each time), chunk_size (tokens of the prompt fed at once), n (answers to
            each prompt, which is fed once: B * n rows, those of one prompt in a row), log_probs (k: the
            ids are `Token`s with the k likeliest at their place), stop (texts that end an answer; they need
            the `tokenizer`), cache (a `ConversationCache`: feed only what it does not hold).
    Raises: ValueError for an option out of its range, or a prompt beyond the model's context.
    """
    steps = list(answer(model, batch, max_new_tokens, **options))
    return [[id for id in row if id is not None] for row in zip(*steps)]


def stream(model: DeepseekVL, batch: dict[str, Tensor], max_new_tokens: int = 512, **options) -> Iterator[int]:
    """The ids that `generate` returns, each as it comes, for a batch of one conversation.

    Raises: ValueError as `generate`, and for more than one row.
    """
    for new, *others in answer(model, batch, max_new_tokens, **options):
        if others:
            raise ValueError(f"stream takes one conversation, this batch has {1 + len(others)}; use generate")
        yield new


class CompiledSteps:
    """Decode steps of one token, compiled; on CUDA also recorded as a graph, which is replayed.

    A decoder's layers are built alike, so that what is compiled at the first step, in some seconds, serves them all.
    Another number of rows or capacity of the cache is compiled anew. A step attends to the cache's whole capacity, so
    ask for no more tokens than you want. Where compiling fails, `failed` is told why, and steps run as without it.
    """

    def __init__(self, model: DeepseekVL, failed: Callable[[str], None]):
        self.decoder, self.failed, self.works = model.language, failed, True
        self.graph, self.graph_of, self.inputs, self.output = None, None, [], None
        modules, options = [*model.language.layers], None
        if model.device.type == "cuda":  # with this option the product of one row is a sum that reads int8 as int8
            modules, options = [*modules, model.lm_head], {"coordinate_descent_tuning": True}
            # Experts are chosen on the host, which a graph cannot record.
            if not any(isinstance(module, MixtureOfExperts) for module in model.language.modules()):
                model.language.forward = self.replay
        compiled = {kind: torch.compile(kind.forward, dynamic=False, options=options) for kind in {*map(type, modules)}}
        for module in modules:
            module.forward = partial(self.call, module, compiled[type(module)])

    def call(self, module: nn.Module, compiled: Callable, x: Tensor, *arguments, **options) -> Tensor:
        """The module's `forward`."""
        if self.works and x.shape[1] == 1:
            try:
                return compiled(module, x, *arguments, **options)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, OSError) as error:  # of dynamo, inductor, the C++ compiler, or the cache's folder
                self.give_up(error)
        return type(module).forward(module, x, *arguments, **options)

    def give_up(self, error: Exception) -> None:
        self.works = False
        self.failed(reason(str(error).strip().partition("\n")[0] or type(error).__name__))

    def replay(
        self, x: Tensor, position_ids: Tensor, bias: Tensor | None = None, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """`Decoder.forward`. A graph reads fixed addresses, so each step's inputs are copied there."""
        if not self.works or caches is None or bias is None or x.shape[1] > 1:
            return Decoder.forward(self.decoder, x, position_ids, bias, caches)
        step = (x, position_ids, bias, caches[0].places)
        graph_of = (x.shape, bias.shape, *(tensor.data_ptr() for cache in caches for tensor in cache.tensors))
        if graph_of != self.graph_of:
            self.inputs, self.graph_of = [tensor.clone() for tensor in step], None
            for cache in caches:
                cache.places = self.inputs[3]
            for _ in range(2):  # compiles, and allocates workspaces, neither of which can be recorded
                self.output = Decoder.forward(self.decoder, *self.inputs[:3], caches)
            if not self.works:
                return self.output
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.output = Decoder.forward(self.decoder, *self.inputs[:3], caches)
            except RuntimeError as error:
                self.give_up(error)
                return Decoder.forward(self.decoder, x, position_ids, bias, caches)
            self.graph_of = graph_of
        for tensor, new in zip(self.inputs, step):
            tensor.copy_(new)
        self.graph.replay()
        return self.output


def compile_steps(model: DeepseekVL, failed: Callable[[str], None] = lambda reason: None) -> None:
    """Compile the model's decode steps in place, where that can be done; see `CompiledSteps`."""
    if any(isinstance(module, (PackedLinear, HalfLinear, DigitLinear)) for module in model.language.modules()):
        failed("the compiler does not know how weights are packed for this CPU")
        return
    try:
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):  # which experts run depends on values: compile around them
                module.mix = torch.compiler.disable(module.mix)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        CompiledSteps(model, failed)
        model.fixed_shape_steps = True
    except (RuntimeError, AttributeError, OSError) as error:  # torch too old, Python too new, no folder
        failed(reason(error))


class TextStream:
    """Turns ids into text as they come, holding back bytes until they make whole characters.

    A character outside ASCII is several bytes, and byte-level BPE may split it between tokens. What could begin a
    `stop` text is held back too; where one is complete, the text ends before it, and `stopped` is true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.held, self.stopped = tokenizer, stop, "", False
        self.tags = {tokenizer.token_to_id(tag) for tag in GROUNDING_TAGS}  # special, but part of the answer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, which may be none."""
        if self.stopped or (self.tokenizer.is_special(token_id) and token_id not in self.tags):
            return ""
        return self._release(self.utf8.decode(self.tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What is left at the end; bytes that never became a character are U+FFFD."""
        text = self._release(self.utf8.decode(b"", final=True)) + self.held
        self.held = ""
        return text

    def _release(self, text: str) -> str:
        text = self.held + text
        found = [text.index(word) for word in self.stop if word in text]
        self.stopped |= bool(found)
        starts = (text[i:] for i in range(len(text)) if any(word.startswith(text[i:]) for word in self.stop))
        self.held = "" if found else next(starts, "")
        return text[: min(found)] if found else text.removesuffix(self.held)


# ---------------------------------------------------------------------------- command line

DEMO = Path(__file__).parent / "demo" / "checkpoint"
DEMO_NOTICE = (
    "asking the small model in demo/checkpoint, which knows drawn shapes, their places and small signs; what it says "
    "of anything else, such as a photograph, means nothing"
)


def demo_notice(folder: Path) -> str:
    """What to tell of a model in demo/; nothing of any other."""
    folder = folder.resolve()
    return DEMO_NOTICE.replace("checkpoint", folder.name) if folder.parent == DEMO.resolve().parent else ""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises: ValueError for one that is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [device for device, is_here in available.items() if is_here]
    if name not in ("auto", *here):
        raise ValueError(f"--device {name}: there is none here, expected one of {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


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
    return min(timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=6))


def make_message(prompt: str | None, images: list[str], raw: bool = False) -> dict:
    """The user's message; a prompt of "-" is read from standard input, and None asks to describe the images.

    Raises: ValueError for a prompt or an image that cannot be read.
    """
    if prompt is None:
        prompt = "" if raw else "Describe this image."
    if prompt == "-":
        if "-" in images:
            raise ValueError("--prompt and --image both read standard input, give a file for one")
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        sys.stdin.reconfigure(errors="surrogateescape")
        prompt = sys.stdin.read()
        if not is_utf8(prompt):
            raise ValueError("standard input is not valid UTF-8")
    return {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError where a file or folder of the options cannot be, before any time is spent."""
    if args.save is not None:
        try:
            check_new_folder(Path(args.save))
        except ValueError as error:
            raise ValueError(f"--save {error}") from None
    if args.model is None and not DEMO.is_dir():
        raise ValueError(f"--model is missing, expected a checkpoint folder; {DEMO}, the default, is not there")
    if args.model is not None and (not args.model or not Path(os.path.expanduser(args.model)).is_dir()):
        found = "is a file" if Path(args.model).is_file() else "is not there"
        hint = download_hint(args.model)
        raise ValueError(f"--model {args.model[:200]!r} {found}, expected a checkpoint folder{hint}")
    if args.boxes is not None:
        file = Path(args.boxes)
        if file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--boxes {file}: expected a name that ends in .png, .jpg or .webp")
        if file.is_dir() or not file.resolve().parent.is_dir():
            raise ValueError(f"--boxes {file}: expected the name of a file, in a folder that is there")


def save_boxes(file: Path, image: Image.Image, answer: str) -> str:
    """Draw the answer's boxes on the image and save it, whole or not at all. Returns what was done."""
    boxes = parse_boxes(answer, image.size)
    if not boxes:
        return f"the answer locates nothing, {file} is not written"
    with unfinished(file) as hidden:
        try:
            draw_boxes(image, boxes).save(hidden)
        except ValueError as error:  # what a format cannot hold
            raise OSError(reason(error)) from None
    return f"{len(boxes)} box{'es' * (len(boxes) > 1)} drawn in {file}"


def run(args: argparse.Namespace) -> None:
    """Load, answer, report."""
    check_files(args)
    folder = DEMO if args.model is None else Path(os.path.expanduser(args.model))
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    processor = Processor(folder)
    if args.boxes is not None and not processor.is_vl2:
        raise ValueError(f"--boxes needs a DeepSeek-VL2, {folder} is a DeepSeek-VL, which locates nothing")
    asks = not args.chat and (args.prompt is not None or args.image)
    if asks:
        message = make_message(args.prompt, args.image, args.raw)
        batch = processor([message], system=args.system, raw=args.raw)
    pictures = [load_named(image) for image in args.image] if args.chat else []
    if notice := demo_notice(folder):
        tell(notice)
    kinds = [str(dtype).removeprefix("torch.")] + ([args.quantize] if args.quantize else [])
    loading = f" as {' and '.join(kinds)} on {device}: loading {folder}"
    model = load_model(
        folder, dtype=dtype, device=device, quantize=args.quantize, pack=args.save is None,
        tokenizer=processor.tokenizer, progress=lambda share: note(f"{share:.0%}{loading}", args.quiet),
    )  # fmt: skip
    if args.save is not None:
        save_checkpoint(model, folder, args.save)
        pack(model)
    if slow := [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]:
        tell(f"layers in 8 or 4 bits without a fast kernel here: {len(slow)}, as {slow[0]}")
    if args.compile:
        lead = ""
        compile_steps(model, lambda why: tell(f"{lead}--compile: not possible here, going on without it ({why})"))
        lead = "\n" if sys.stderr.isatty() else ""  # from now on the answer's line may be open
    if args.chat:
        chat(args, model, processor, pictures, args.options)
    if asks:
        answer = say_answer(args, model, processor, batch, args.options)
    if args.boxes is not None:
        tell(save_boxes(Path(args.boxes), message["images"][-1], answer))


def say_answer(
    args: argparse.Namespace, model: DeepseekVL, processor: Processor, batch: dict, options: dict,
    cache: ConversationCache | None = None,
) -> str:  # fmt: skip
    """Stream the answer to standard output, as whole lines also after Ctrl-C. Returns it.

    With a cache, in a chat, Ctrl-C ends the answer alone.
    """
    text, answer, ended = TextStream(processor.tokenizer, args.stop), "", False

    def say(piece: str) -> None:
        nonlocal answer
        piece = piece if answer or args.raw else piece.removeprefix(" ")  # an answer's first token begins with one
        answer += piece
        print(piece, end="", flush=True)

    start, times = time.perf_counter(), []
    note(f"prefilling {batch['input_ids'].shape[1]} tokens", args.quiet)
    try:
        for new in stream(model, batch, cache=cache, stop=args.stop, tokenizer=processor.tokenizer, **options):
            if not times:
                note("", args.quiet)
            times.append(time.perf_counter())
            say(text.push(new))
        ended = text.stopped or new in model.config.end_token_ids
    except KeyboardInterrupt:
        ended = True
        if cache is None:
            raise
    finally:
        if times:
            say(text.finish())
            print("" if answer.endswith("\n") else "\n", end="", flush=True)
            now, count = time.perf_counter(), len(times)
            # From the second token on: its own step may have compiled.
            rate = f", {(count - 2) / (now - times[1]):.1f} tokens/s" if count > 2 else ""
            read, written = times[0] - start, now - times[0]
            fed = batch["input_ids"].shape[1] - (cache.reused if cache else 0)
            note(f"{fed} tokens read in {read:.1f} s, {count} written in {written:.1f} s{rate}\n", args.quiet)
    if not ended:
        limit = "--max-new-tokens" if len(times) == options["max_new_tokens"] else "the model's context"
        tell(f"the answer was cut off after {len(times)} tokens, by {limit}")
    return answer


COMMANDS = """/image FILE  joins the next question
/clear       starts over
/save FILE   writes all as JSON
/quit        ends, as does Ctrl-D"""


def load_named(name: str) -> Image.Image:
    """The picture, and in its `info` where it comes from."""
    picture = load_image(name)
    picture.info["name"] = name
    return picture


def chat(args: argparse.Namespace, model: DeepseekVL, processor: Processor, pictures: list, options: dict) -> None:
    """Answer the lines of standard input. `pictures`: those of `load_named` that go with the next question."""
    with suppress(ImportError):
        import readline  # noqa: F401 (`input` then edits and remembers lines)
    sys.stdin.reconfigure(errors="surrogateescape")
    terminal, most = sys.stdin.isatty(), processor.max_positions
    if terminal:
        tell(COMMANDS)
    messages, cache, line = [], ConversationCache(model), args.prompt
    while True:
        try:
            line = input("> " if terminal else "") if line is None else line
            command, _, value = (part.strip() for part in line.strip().partition(" "))
            if command == "/quit":
                return
            if command == "/clear":
                messages, pictures, cache = [], [], ConversationCache(model)
            elif command == "/image":
                if value in ("", "-"):
                    raise ValueError("/image needs the name of a file, or an address")
                pictures = [*pictures, load_named(value)]
            elif command == "/save":
                save_conversation(Path(os.path.expanduser(value)), messages)
            elif command.startswith("/"):
                raise ValueError(f"{command[:80]} is no command, expected /image, /clear, /save or /quit")
            elif command:
                if not is_utf8(line):
                    raise ValueError("the question is not valid UTF-8")
                asked = [*messages, {"role": "user", "content": line.strip(), "images": pictures}]
                answer = say_answer(args, model, processor, processor(asked, system=args.system), options, cache)
                if answer:  # otherwise the question was not asked
                    messages, pictures = [*asked, {"role": "assistant", "content": answer}], []
                if (left := most - len(cache.tokens)) < most // 10:
                    tell(f"{left} tokens are left of the model's context of {most}: /clear starts over")
        except EOFError:
            print("\n" if terminal else "", end="")
            return
        except KeyboardInterrupt:  # while a line is typed
            if not terminal:
                raise
            print()
        except (ValueError, FileNotFoundError) as error:
            hint = ": /clear starts over" if "over the model's context" in str(error) else ""
            tell(f"error: {reason(error)}{hint}")
        line = None


def save_conversation(file: Path, messages: list[dict]) -> None:
    """Write messages, as `Processor` takes them, as JSON. Raises: ValueError where that cannot be done."""
    if file.suffix != ".json":
        raise ValueError(f"/save {file}: expected a name that ends in .json")
    text = json.dumps(messages, ensure_ascii=False, indent=1, default=lambda picture: picture.info["name"])
    with unfinished(file) as hidden:
        hidden.write_text(text + "\n", encoding="utf-8")
    tell(f"{len(messages)} messages written to {file}")


def main(arguments: list[str] | None = None) -> None:
    with told():
        run(ARGUMENTS if __name__ == "__main__" else parse_arguments(arguments))


if __name__ == "__main__":
    main()
