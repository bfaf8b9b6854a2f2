"""Speed and memory beside transformers, at the full size of DeepSeek-VL 1.3B in bfloat16.

    python tests/bench.py            everything
    python tests/bench.py compute    SigLIP, prefill of 640 tokens with one image, decode of 32 tokens
    python tests/bench.py sam        the 7B's high-resolution branch
    python tests/bench.py quantize   prefill and decode in bfloat16, int8 and int4, eager and compiled
    python tests/bench.py errors     what 8 and 4 bits cost in accuracy, and bfloat16 in SigLIP
    python tests/bench.py prompts    int4: prefill by tokens and images
    python tests/bench.py steps      int4: decode by cache length and rows
    python tests/bench.py small      int4: private memory and time of 1.3B and 7B; writes 19 GB of random files
    python tests/bench.py load       loading a float16 file: seconds, and private memory at its peak
    python tests/bench.py vl2        DeepSeek-VL2 tiny, beside what the machine allows; prefill by chunks
    python tests/bench.py vl2-quantized    its decoder in bfloat16, int8 and int4

The weights are random: speed does not depend on them. Both models run in one process, in turns,
after a warm-up; a figure is the median of its turns. Nothing here is asserted.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conftest import relative_error  # noqa: E402

from generate import CompiledStep, decode, generate  # noqa: E402
from load_weights import (  # noqa: E402
    OFFICIAL,
    TRANSFORMERS,
    Layout,
    expected_tensors,
    load_model,
    read_config,
    save_checkpoint,
)
from model import (  # noqa: E402
    DeepseekVL,
    ExpertsConfig,
    LanguageConfig,
    MixtureOfExperts,
    ModelConfig,
    PackedLinear,
    PackedQuantizedLinear,
    QuantizedLinear,
    layers_to_quantize,
    pack_linears,
)
from vision import (  # noqa: E402
    SAM,
    SAMConfig,
    SigLIP,
    SigLIPConfig,
    TileConfig,
    attention,
    attention_some_heads_at_a_time,
    attention_some_queries_at_a_time,
    attention_with_positions,
    fold_positions,
    relative_bias,
)

CONFIG = ModelConfig(
    vision=SigLIPConfig(),
    language=LanguageConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    ),
    image_token_id=100015,
)
PROMPT, IMAGE_TOKENS, NEW_TOKENS = 640, 576, 32


def seconds(functions: dict[str, Callable], turns: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a slow minute hits all alike."""
    times = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights, cheaply: one block of noise over and over; vectors become ones.

    Each parameter starts somewhere else in the noise. Layers of equal weights would push all tokens the
    same way, to the same few experts.
    """
    noise = (torch.rand(2**20) - 0.5) * 0.06
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            flat, noise = parameter.data.view(-1), noise.roll(int(torch.randint(len(noise), ())))
            for start in range(0, len(flat), len(noise)):
                piece = flat[start : start + len(noise)]
                piece.copy_(noise[: len(piece)])
    return model.eval()


def prompt() -> dict[str, torch.Tensor]:
    """640 random tokens, 576 of which are of a random image."""
    ids = torch.randint(0, 100000, (1, PROMPT))
    ids[:, 30 : 30 + IMAGE_TOKENS] = CONFIG.image_token_id
    pixels = torch.randn(1, 3, 384, 384).to(torch.bfloat16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def our_model(quantize: str | None = None, config: ModelConfig = CONFIG) -> DeepseekVL:
    with torch.device("meta"):
        model = DeepseekVL(config).to(torch.bfloat16)
    model = fill(model.to_empty(device="cpu"))
    if quantize is not None:
        for name in layers_to_quantize(model, quantize):  # one at a time
            put(model, {name: QuantizedLinear.from_weight(model.get_submodule(name).weight, quantize, torch.bfloat16)})
    return model.pack()


def language_config() -> dict:
    """The decoder's sizes, as both kinds of config.json have them."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings",
    )  # fmt: skip
    return {"model_type": "llama"} | {name: getattr(CONFIG.language, name) for name in names}


def transformers_config():
    from transformers import DeepseekVLConfig

    vision = CONFIG.vision
    return DeepseekVLConfig(
        vision_config=dict(
            model_type="siglip_vision_model",
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.mlp_width,
            hidden_act="gelu",
            vision_use_head=False,
        ),
        text_config=language_config(),
        tie_word_embeddings=False,
        image_token_id=CONFIG.image_token_id,
    )


def their_model() -> torch.nn.Module:
    from transformers import DeepseekVLForConditionalGeneration

    config = transformers_config()
    torch.set_default_dtype(torch.bfloat16)
    skip = {name: getattr(torch.nn.init, name) for name in ("normal_", "uniform_", "kaiming_normal_", "trunc_normal_")}
    for name in skip:  # transformers would spend a minute on an initialization that is overwritten
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    model = DeepseekVLForConditionalGeneration(config)
    for name, function in skip.items():
        setattr(torch.nn.init, name, function)
    torch.set_default_dtype(torch.float32)
    return fill(model)


def one_row_products(kind: str) -> Callable:
    """Products of one row with 24 weights of `WEIGHT_GB`: more than any cache holds, as in a decode step.

    kind: "plain", "packed", "int8" or "int4".
    """
    row = torch.randn(1, 2048, dtype=torch.bfloat16)
    weights = [torch.nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16) for _ in range(24)]
    if kind in ("int8", "int4"):
        weights = [QuantizedLinear.from_weight(weight.weight, kind, torch.bfloat16) for weight in weights]
        if PackedQuantizedLinear.suits(weights[0]):
            weights = [PackedQuantizedLinear(weight) for weight in weights]
    elif kind == "packed" and PackedLinear.suits(weights[0]):
        weights = [PackedLinear(weight) for weight in weights]
    return lambda: [weight(row) for weight in weights]


WEIGHT_GB = 2048 * 8192 * 2 / 1e9


def machine() -> dict[str, float]:
    """What this machine allows: bfloat16 matmul in GFLOP/s, weight reads of one-row products in GB/s."""
    x, size = torch.randn(2048, 2048, dtype=torch.bfloat16), WEIGHT_GB
    linear = torch.nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16)
    packed = PackedLinear(linear) if PackedLinear.suits(linear) else linear
    times = seconds(
        {
            "matmul": lambda: linear(x),
            "packed matmul": lambda: packed(x),
            "row": one_row_products("plain"),
            "packed row": one_row_products("packed"),
        },
        turns=7,
    )
    big = torch.ones(2**28)
    times["read"] = seconds({"read": big.sum}, turns=5)["read"]
    return {
        "matmul": 2 * 2048 * size / 2 / min(times["matmul"], times["packed matmul"]),
        "row": 24 * size / times["row"],
        "packed row": 24 * size / times["packed row"],
        "read": big.nbytes / 1e9 / times["read"],
    }


def print_rates(rates: dict[str, float]) -> None:
    print(
        f"machine: {torch.get_num_threads()} threads, bfloat16 matmul {rates['matmul']:.0f} GFLOP/s; "
        f"memory read {rates['read']:.1f} GB/s; weights read by one-row products {rates['row']:.1f} GB/s plain, "
        f"{rates['packed row']:.1f} GB/s packed"
    )


def our_decode(model: DeepseekVL, compiled: bool = False, past: int = PROMPT, rows: int = 1) -> Callable:
    """NEW_TOKENS steps after `past` tokens."""
    cache = model.new_cache(rows, past + NEW_TOKENS)
    cache.clear_rest()  # the steps read tokens that were never fed
    step = CompiledStep(model, lambda why: sys.exit(f"cannot compile here: {why}")) if compiled else None

    def decode():
        cache.length = past
        token = torch.ones(rows, 1, dtype=torch.long)
        for _ in range(NEW_TOKENS):
            logits = step(token, cache, None) if step else model(input_ids=token, cache=cache).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)

    return decode


def their_decode(model: torch.nn.Module) -> Callable:
    from transformers import DynamicCache

    def decode():
        past = DynamicCache()
        shape = (1, CONFIG.language.num_key_value_heads, PROMPT, CONFIG.language.head_dim)
        for layer in range(CONFIG.language.num_hidden_layers):
            past.update(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16), layer)
        token = torch.ones(1, 1, dtype=torch.long)
        for _ in range(NEW_TOKENS):
            output = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)

    return decode


@torch.inference_mode()
def compute() -> None:
    rates = machine()
    print_rates(rates)
    ours, theirs = our_model(), their_model()
    batch = prompt()
    ids, pixels = batch["input_ids"], batch["pixel_values"]

    decode_ours = our_decode(ours)
    decode_theirs = their_decode(theirs)

    def prefill_ours():
        ours(input_ids=ids, pixel_values=pixels, cache=ours.new_cache(1, PROMPT), logits_to_keep=1)

    def prefill_theirs():
        theirs(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

    language = CONFIG.language
    per_layer = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size
    layers = language.num_hidden_layers * per_layer
    head = language.hidden_size * language.vocab_size
    eyes = CONFIG.vision
    tower = eyes.layers * (4 * eyes.width**2 + 2 * eyes.width * eyes.mlp_width) * 2 * IMAGE_TOKENS
    prefill_flops = 2 * PROMPT * layers + 2 * head + tower
    prefill_flops += 2 * IMAGE_TOKENS * (eyes.width + language.hidden_size) * language.hidden_size

    rows = (
        ("SigLIP, one image", lambda: ours.vision(pixels), lambda: theirs.model.vision_model(pixels), 7),
        (f"prefill, {PROMPT} tokens", prefill_ours, prefill_theirs, 5),
        (f"decode, {NEW_TOKENS} tokens", decode_ours, decode_theirs, 5),
    )
    print(f"{'':24}{'ours':>10}{'theirs':>10}{'ratio':>8}")
    for name, our_run, their_run, turns in rows:
        times = seconds({"ours": our_run, "theirs": their_run}, turns)
        print(f"{name:24}{times['ours']:9.3f}s{times['theirs']:9.3f}s{times['theirs'] / times['ours']:8.2f}", end="")
        if name.startswith("SigLIP"):
            print(
                f"   {tower / times['ours'] / 1e9 / rates['matmul']:.0%} of the matmul rate (its linear layers' work)"
            )
        elif name.startswith("prefill"):
            print(f"   {prefill_flops / times['ours'] / 1e9 / rates['matmul']:.0%} of the matmul rate")
        else:
            read = 2 * (layers + head) * NEW_TOKENS / times["ours"] / 1e9
            print(
                f"   {NEW_TOKENS / times['ours']:.1f} tokens/s against {NEW_TOKENS / times['theirs']:.1f}; reads "
                f"{read:.1f} GB/s, {read / rates['packed row']:.0%} of packed one-row products"
            )

    for way, taken in seconds(siglip_attention(), turns=15).items():
        print(f"attention of a layer of SigLIP, {way:34}{taken * 1e3:6.1f} ms")


def siglip_attention(B: int = 1, N: int = IMAGE_TOKENS, H: int = 16, d: int = 64) -> dict[str, Callable]:
    """What was tried for SigLIP's attention; transformers has the fused one."""
    q, k, v = torch.randn(B, N, 3, H, d).to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    few = 2 * N * N  # scores of two heads, in float32, fit best
    return {
        "fused": lambda: F.scaled_dot_product_attention(q, k, v),
        "some heads at a time": lambda: attention_some_heads_at_a_time(q * d**-0.5, k, v),
        "some heads at a time, in float32": lambda: attention_some_heads_at_a_time(
            q.float() * d**-0.5, k.float(), v.float(), few
        ).to(q.dtype),
    }


@torch.inference_mode()
def sam() -> None:
    """SAM-B at 1024 pixels with the second neck and the downsampling, as the 7B runs it."""
    from transformers import DeepseekVLHybridConfig, DeepseekVLHybridModel

    config = transformers_config().to_dict()
    config["text_config"] |= {"num_hidden_layers": 1, "vocab_size": 8}  # the language model does not run
    config["high_res_vision_config"] = {"model_type": "sam_vision_model"}
    with torch.device("meta"):
        ours = SAM(SAMConfig(), tokens_per_side=24).to(torch.bfloat16)
    ours = fill(ours.to_empty(device="cpu"))
    pack_linears(ours)
    torch.set_default_dtype(torch.bfloat16)
    theirs = fill(
        DeepseekVLHybridModel(DeepseekVLHybridConfig.from_dict(config | {"model_type": "deepseek_vl_hybrid"}))
    )
    torch.set_default_dtype(torch.float32)
    pixels = torch.randn(1, 3, 1024, 1024).to(torch.bfloat16)
    runs = {"ours": lambda: ours(pixels), "theirs": lambda: theirs.get_high_res_image_features(pixels)}
    rate = machine()["matmul"]
    times = seconds(runs, turns=5)
    work = sam_work(SAMConfig()) / 1e9
    print(
        f"SAM branch: ours {times['ours']:.2f} s, theirs {times['theirs']:.2f} s, "
        f"ratio {times['theirs'] / times['ours']:.2f}\n"
        f"its layers' {work:.0f} GFLOP: {work / times['ours'] / rate:.0%} of the matmul rate of {rate:.0f} GFLOP/s, "
        f"at which they take {work / rate:.2f} s ({times['theirs'] * rate / work:.2f})"
    )
    for name, batch, grid in (("a global layer", 1, 64), ("25 windows", 25, 14)):
        for way, taken in seconds(sam_attention(batch, grid), turns=3).items():
            print(f"attention of {name:16}{way:40}{taken:6.3f} s")


def sam_work(c: SAMConfig) -> int:
    """Floating point operations of the matmuls in SAM's layers, those for the windows' padding included."""
    patches, padded = c.grid**2, (-(-c.grid // c.window) * c.window) ** 2
    linear, attention = 2 * patches * c.layers * c.width * c.mlp_width, 0
    for layer in range(c.layers):
        queries, keys = (patches, patches) if layer in c.global_layers else (padded, c.window**2)
        linear += 4 * queries * c.width**2
        attention += 2 * queries * keys * c.width
    return 2 * (linear + attention)


def sam_attention(B: int, g: int, H: int = 12, d: int = 64) -> dict[str, Callable]:
    """What was tried for the attention of one of SAM's layers, relative positions included."""
    N = g * g
    q, k, v = torch.randn(B, N, 3, H, d).to(torch.bfloat16).permute(2, 0, 3, 1, 4)
    tables = [torch.randn(2 * g - 1, d).to(torch.bfloat16) * 0.1 for _ in range(2)]

    def biases() -> tuple[torch.Tensor, torch.Tensor]:
        return relative_bias(q.unflatten(2, (g, g)), *tables)

    def whole(bias: tuple[torch.Tensor, torch.Tensor], part: slice) -> torch.Tensor:
        by_row, by_column = (b.flatten(2, 3)[:, :, part] for b in bias)
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(3)

    def masked() -> None:
        bias = biases()
        for part in (slice(start, start + 512) for start in range(0, N, 512)):
            F.scaled_dot_product_attention(q[:, :, part], k, v, whole(bias, part))

    return {
        "written out": lambda: attention(q, k, v, whole(biases(), slice(0, N))),
        "fused, bias as a mask, by blocks": masked,
        "fused, bias folded": lambda: attention_with_positions(q, k, v, *biases(), limit=0),
        "by heads, bias folded": lambda: attention_some_heads_at_a_time(*fold_positions(q, k, *biases()), v),
        "by queries, product added to the bias": lambda: attention_some_queries_at_a_time(
            q, k, v, *biases(), 2**21 // N
        ),
        "what runs": lambda: attention_with_positions(q, k, v, *biases()),
    }


# ---------------------------------------------------------------------------- int8, int4


def weight_bytes(model: DeepseekVL) -> int:
    """What a decode step reads: the decoder's layers and the head, scales included."""
    language = CONFIG.language
    if isinstance(model.lm_head, PackedLinear):
        layer = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size
        return 2 * (language.num_hidden_layers * layer + language.hidden_size * language.vocab_size)
    packed = [module for module in model.modules() if isinstance(module, PackedQuantizedLinear)]
    return sum(module.weight.nbytes + module.scales.nbytes for module in packed)


@torch.inference_mode()
def quantize() -> None:
    theirs, batch = their_model(), prompt()
    ours = {"bfloat16": our_model(), "int8": our_model("int8"), "int4": our_model("int4")}
    ids, pixels = batch["input_ids"], batch["pixel_values"]

    def prefill(model: DeepseekVL) -> Callable:
        return lambda: model(input_ids=ids, pixel_values=pixels, cache=model.new_cache(1, PROMPT), logits_to_keep=1)

    runs = {"transformers": lambda: theirs(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)}
    times = seconds(runs | {name: prefill(model) for name, model in ours.items()}, turns=3)
    for name, taken in times.items():
        print(f"prefill {name:16}{taken:7.2f} s   {taken / times['bfloat16']:.2f} of our bfloat16")

    runs = {"transformers": their_decode(theirs)} | {name: our_decode(model) for name, model in ours.items()}
    runs |= {f"{name}, compiled": our_decode(ours[name], compiled=True) for name in ("int8", "int4")}
    runs |= {f"rows {kind}": one_row_products(kind) for kind in ("plain", "packed", "int8", "int4")}
    times = seconds(runs, turns=5)
    share = {"int8": 1 / 2, "int4": (1 / 2 + 4 / 128) / 2}  # of bfloat16's bytes, int4 with its scales
    rates = {"bfloat16": 24 * WEIGHT_GB / times["rows packed"]}
    rates |= {kind: 24 * WEIGHT_GB * share[kind] / times[f"rows {kind}"] for kind in ("int8", "int4")}
    print("one-row products read: " + ", ".join(f"{kind} {rate:.1f} GB/s" for kind, rate in rates.items()))
    for name, taken in times.items():
        if name.startswith("rows"):
            continue
        line = f"decode {name:17}{NEW_TOKENS / taken:6.1f} tokens/s, {times['transformers'] / taken:.2f} x transformers"
        kind = name.partition(",")[0]
        if kind in ours:
            read = weight_bytes(ours[kind]) * NEW_TOKENS / taken / 1e9
            line += f"   reads {read:.1f} GB/s, {read / rates[kind]:.0%} of one-row products"
        print(line)


@torch.inference_mode()
def errors() -> None:
    """Relative errors of what is rounded, weights or values, against float32, for random full-size weights."""
    x, weight = torch.randn(64, 2048), torch.randn(5632, 2048)
    for kind in ("int8", "int4"):
        rounded = QuantizedLinear.from_weight(weight, kind, torch.float32)
        print(f"one product, 2048 x 5632 normal weights, {kind}: {relative_error(rounded(x), x @ weight.T):.2%}")
    ids = torch.randint(0, 100000, (1, 64))
    for start in ("torch's initial weights", "normal weights"):
        for layers in (1, 4):
            model = few_layers(layers, normal=start == "normal weights")
            exact = model(input_ids=ids).logits
            originals = {name: model.get_submodule(name) for name in layers_to_quantize(model, "int8")}
            for kind in ("int8", "int4"):
                rounded = {n: QuantizedLinear.from_weight(o.weight, kind, torch.float32) for n, o in originals.items()}
                model.lm_head = rounded["lm_head"]
                head = relative_error(model(input_ids=ids).logits, exact)
                put(model, rounded)
                everything = relative_error(model(input_ids=ids).logits, exact)
                put(model, originals)
                print(
                    f"logits, {start}, {layers} layers: {kind} in the head {head:.2%}, "
                    f"in the layers too {everything:.2%}"
                )
            narrow = model.to(torch.bfloat16)(input_ids=ids).logits
            print(
                f"logits, {start}, {layers} layers: nothing rounded, but all in bfloat16 "
                f"{relative_error(narrow, exact):.2%}"
            )

    for sharpness in (1, 3):
        for way, error in siglip_errors(sharpness).items():
            print(f"SigLIP in bfloat16, scores with a standard deviation of {sharpness}, attention {way}: {error:.2%}")


def siglip_errors(sharpness: float) -> dict[str, float]:
    """Of the tower's output for noise, against float32, with normal weights."""
    tower = SigLIP(SigLIPConfig()).eval()
    for block in tower.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            linear.weight.normal_(0, linear.in_features**-0.5)
        block.attn.qkv.weight[: 2 * tower.config.width] *= sharpness**0.5
    tower, pixels = tower.to(torch.bfloat16), torch.randn(1, 3, 384, 384).to(torch.bfloat16)
    exact = tower.float()(pixels.float())
    tower.to(torch.bfloat16)
    ways = {
        "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
        "written out": lambda q, k, v: attention(q, k, v, scale=1.0)[0],
        "some heads at a time": attention_some_heads_at_a_time,
    }
    errors = {}
    for way, function in ways.items():
        with patch("vision.attention_some_heads_at_a_time", function):
            errors[way] = relative_error(tower(pixels), exact)
    return errors


def few_layers(count: int, normal: bool) -> DeepseekVL:
    language = replace(CONFIG.language, num_hidden_layers=count)
    model = DeepseekVL(replace(CONFIG, language=language, vision=replace(CONFIG.vision, layers=1))).eval()
    for name, parameter in model.named_parameters():
        if normal and parameter.dim() == 2 and name.startswith(("language", "lm_head")):
            parameter.normal_(0, 0.02)
    return model


def put(model: DeepseekVL, layers: dict[str, torch.nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


@torch.inference_mode()
def prompts() -> None:
    """What int4 costs over the prompt's length, and over images."""
    model = our_model("int4")

    def prefill(tokens: int, images: int) -> Callable:
        ids = torch.randint(0, 100000, (1, tokens))
        ids[:, : images * IMAGE_TOKENS] = CONFIG.image_token_id
        pixels = torch.randn(images, 3, 384, 384).to(torch.bfloat16) if images else None

        def run():
            model(input_ids=ids, pixel_values=pixels, cache=model.new_cache(1, tokens), logits_to_keep=1)

        return run

    cases = [(tokens, 0) for tokens in (256, 512, 1024, 2048, 4096)] + [(64 + 576 * n, n) for n in (1, 2, 3, 4)]
    for tokens, images in cases:
        taken = seconds({"run": prefill(tokens, images)}, turns=3 if tokens < 2000 else 1)["run"]
        print(f"prefill {tokens:5} tokens, {images} images: {taken:6.2f} s, {taken / tokens * 1e3:.2f} ms a token")


@torch.inference_mode()
def steps() -> None:
    """What a decode step of int4 costs over the cache's length, and over the rows of a batch."""
    model = our_model("int4")
    for past, rows in [(past, 1) for past in (128, 512, 1024, 2048, 4096)] + [(640, rows) for rows in (1, 2, 4, 8)]:
        taken = seconds({"run": our_decode(model, past=past, rows=rows)}, turns=2)["run"] / NEW_TOKENS
        print(f"decode after {past:4} tokens, {rows} rows: {taken * 1e3:6.1f} ms a step, {rows / taken:5.1f} tokens/s")


# ---------------------------------------------------------------------------- loading and memory


def private_megabytes() -> float:
    """This process's anonymous memory now (Linux); pages of mapped files, which can be dropped, are apart."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


class PeakMemory:
    """The most private memory, in MiB, that the process had inside the block."""

    def __enter__(self):
        self.peak, self.running = 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, private_megabytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.peak = max(self.peak, private_megabytes())


def write_checkpoint(folder: Path, layout: Layout, config: dict) -> None:
    """A random float16 checkpoint of full size, in shards of about a gigabyte."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = DeepseekVL(read_config(folder))
    noise = (torch.rand(2**20) - 0.5).half() * 0.06
    shard, weight_map = {}, {}
    expected = list(expected_tensors(model, layout, set()).items())
    for i, (name, target) in enumerate(expected):
        count = math.prod(target.shape)
        shard[name] = noise.repeat(-(-count // 2**20))[:count].view(target.shape).contiguous()
        weight_map[name] = f"model-{i:05}.safetensors"
        if sum(tensor.nbytes for tensor in shard.values()) > 1e9 or i == len(expected) - 1:
            weight_map |= dict.fromkeys(shard, weight_map[name])
            save_file(shard, folder / weight_map[name], metadata={"format": "pt"})
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure_in_child(who: str, folder: Path, dtype: str) -> dict:
    """Load and answer in a process of its own; see `child`."""
    output = subprocess.run(
        [sys.executable, __file__, "child", who, str(folder), dtype], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


@torch.inference_mode()
def child(who: str, folder: str, dtype: str) -> None:
    """Print seconds to load, and private memory at its peak while loading and while answering."""
    before = private_megabytes()
    start = time.perf_counter()
    with PeakMemory() as loading:
        if who.startswith("ours"):
            model = load_model(folder, dtype=getattr(torch, dtype), pack=who == "ours, packed")
        else:
            from transformers import DeepseekVLForConditionalGeneration
            from transformers.utils import logging

            logging.disable_progress_bar()
            start, before = time.perf_counter(), private_megabytes()  # their import is not loading
            model = DeepseekVLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    load_seconds = time.perf_counter() - start
    with torch.device("meta"):  # packed weights are no parameters
        size = sum(p.numel() for p in DeepseekVL(CONFIG).parameters()) * getattr(torch, dtype).itemsize / 2**20
    batch = prompt()
    with PeakMemory() as answering:
        if dtype == "float16":
            pass  # this CPU emulates float16, and takes minutes
        elif who.startswith("ours"):
            batch["images_seq_mask"] = batch["input_ids"] == CONFIG.image_token_id
            generate(model, batch, max_new_tokens=8)
        else:
            model.generate(**batch, max_new_tokens=8, do_sample=False)
    print(
        json.dumps(
            {
                "seconds": load_seconds,
                "size": size,
                "loading": loading.peak - before,
                "answering": answering.peak - before,
            }
        )
    )


ONE_B = {
    "model_type": "multi_modality",
    "vision_config": {"cls": "CLIPVisionTower", "params": {"model_name": "siglip_large_patch16_384"}},
    "aligner_config": {"params": {"projector_type": "mlp_gelu", "depth": 2}},
    "language_config": language_config() | {"torch_dtype": "float16"},
}
SEVEN_B = {
    "model_type": "multi_modality",
    "vision_config": {
        "cls": "HybridVisionTower",
        "params": {
            "high_res_cfg": {"model_name": "sam_b_downsample"},
            "low_res_cfg": {"model_name": "siglip_large_patch16_384"},
        },
    },
    "aligner_config": {"params": {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": 2}},
    "language_config": {
        "model_type": "llama", "vocab_size": 102400, "intermediate_size": 11008, "num_hidden_layers": 30,
        "max_position_embeddings": 16384,
    },
}  # fmt: skip


def load() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = Path(temporary) / "official", Path(temporary) / "transformers"
        write_checkpoint(ours, OFFICIAL, ONE_B)
        write_checkpoint(theirs, TRANSFORMERS, transformers_config().to_dict())
        print(
            f"{'':34}{'seconds':>9}{'model MiB':>10}{'peak loading':>14}{'peak answering':>16}   (private memory, MiB)"
        )
        for dtype in ("bfloat16", "float16"):
            for who, folder in (("ours", ours), ("ours, packed", ours), ("transformers", theirs)):
                runs = [measure_in_child(who, folder, dtype) for _ in range(3)]
                middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                print(
                    f"{who + ', float16 -> ' + dtype:34}{middle['seconds']:9.2f}{middle['size']:10.0f}"
                    f"{middle['loading']:14.0f}{middle['answering']:16.0f}"
                )


def small() -> None:
    """int4 from float16 files, then from the saved int4 file: seconds, and private memory at its peak."""
    for name, config in (("1.3B", ONE_B), ("7B", SEVEN_B)):
        with tempfile.TemporaryDirectory() as temporary:
            folder, saved = Path(temporary) / "float16", Path(temporary) / "int4"
            write_checkpoint(folder, OFFICIAL, config)
            for start, arguments in (("first", (folder,)), ("saving", (folder, saved)), ("second", (saved,))):
                command = [sys.executable, __file__, "small-child", *map(str, arguments)]
                print(f"{name}, {start} start: ", end="", flush=True)
                subprocess.run(command, check=True)


def small_child(folder: str, saved: str | None = None) -> None:
    before, start = private_megabytes(), time.perf_counter()
    with PeakMemory() as loading:
        model = load_model(folder, dtype=torch.bfloat16, quantize="int4", pack=saved is None)
    loaded = time.perf_counter() - start
    if saved is not None:
        save_checkpoint(model, folder, saved)
    batch = prompt()
    batch["images_seq_mask"] = batch["input_ids"] == CONFIG.image_token_id
    if hasattr(model.config.vision, "high"):
        batch["pixel_values"] = torch.rand(1, 3, 1024, 1024)
    with PeakMemory() as answering:
        start = time.perf_counter()
        model.pack()
        packed = time.perf_counter() - start
        times = [time.perf_counter() for _ in decode(model, batch, max_new_tokens=17)]
    print(
        f"loaded in {loaded:.1f} s and packed in {packed:.1f} s; private MiB at peak: {loading.peak - before:.0f} "
        f"loading, {answering.peak - before:.0f} answering; first token of {PROMPT} tokens with an image after "
        f"{times[0] - start - packed:.1f} s, then {16 / (times[-1] - times[0]):.1f} tokens/s"
    )


# ---------------------------------------------------------------------------- DeepSeek-VL2 tiny


def experts_used(model: DeepseekVL, run: Callable[[], None]) -> list[int]:
    """How many routed experts of each layer take part in a run."""
    used = []
    gates = [layer.mlp.gate for layer in model.language.layers if isinstance(layer.mlp, MixtureOfExperts)]
    hooks = [gate.register_forward_hook(lambda _, __, out: used.append(len(out[0].unique()))) for gate in gates]
    run()
    for hook in hooks:
        hook.remove()
    return used


VL2_TINY = ModelConfig(
    vision=SigLIPConfig(patch_size=14, width=1152, layers=27, mlp_width=4304, gelu="tanh"),
    language=LanguageConfig(
        vocab_size=129280,
        hidden_size=1280,
        intermediate_size=6848,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=4096,
        experts=ExpertsConfig(moe_intermediate_size=896),
    ),
    tiles=TileConfig(),
)
VL2_PROMPT = 471


def prefill_and_decode(model: DeepseekVL, embeddings: torch.Tensor) -> tuple[Callable, Callable]:
    T = embeddings.shape[1]
    cache = model.new_cache(1, T + NEW_TOKENS)

    def prefill():
        cache.length = 0
        model(inputs_embeds=embeddings, cache=cache, logits_to_keep=1)

    def decode():
        cache.length = T
        for step in range(NEW_TOKENS):
            model(inputs_embeds=embeddings[:, step : step + 1], cache=cache)

    return prefill, decode


@torch.inference_mode()
def vl2_quantized() -> None:
    """The decoder of DeepSeek-VL2 tiny in bfloat16, int8 and int4."""
    embeddings = torch.randn(1, VL2_PROMPT, VL2_TINY.language.hidden_size).to(torch.bfloat16)
    runs = {}
    for kind in ("int8", "int4", None):  # the largest last, to have less at once
        prefill, decode = prefill_and_decode(our_model(kind, VL2_TINY), embeddings)
        runs |= {f"prefill {kind}": prefill, f"decode {kind}": decode}
    times = seconds(runs, turns=7)
    for kind in (None, "int8", "int4"):
        prefill, decode = (times[f"{run} {kind}"] for run in ("prefill", "decode"))
        print(
            f"{kind or 'bfloat16':9} prefill of {VL2_PROMPT} tokens {prefill:6.3f} s, "
            f"{prefill / times['prefill None']:.2f} times as long; "
            f"decode {NEW_TOKENS / decode:5.1f} tokens/s, {times['decode None'] / decode:.2f} times as fast"
        )


@torch.inference_mode()
def vl2() -> None:
    """DeepSeek-VL2 tiny at full size: two tiles, a prompt of 471 tokens, 32 new tokens; and prefill by chunks."""
    rates = machine()
    print_rates(rates)
    config, model = VL2_TINY, our_model(config=VL2_TINY)
    T, tokens = VL2_PROMPT, 2 * 14 * 15 + 1
    ids = torch.randint(0, 100000, (1, T))
    mask = torch.zeros(1, T, dtype=torch.bool)
    mask[:, 10 : 10 + tokens] = True
    pixels, crop = torch.randn(2, 3, 384, 384).to(torch.bfloat16), torch.tensor([[1, 1]])
    embeddings = model.embed(ids, mask, pixel_values=pixels, images_spatial_crop=crop)
    # A random tower's features are alike, and would choose alike: noise makes every expert work.
    prefill, decode = prefill_and_decode(model, torch.randn_like(embeddings))
    used = " ".join(str(count) for count in experts_used(model, prefill))
    print(f"experts used by the prompt, in each layer: {used}; of {config.language.experts.n_routed_experts}")
    # The rate at which memory is read changes from minute to minute: it is measured again, in turns with decoding.
    times = seconds(
        {
            "vision": lambda: model.vision(pixels),
            "prefill": prefill,
            "decode": decode,
            "row": one_row_products("plain"),
            "packed row": one_row_products("packed"),
        },
        turns=7,
    )
    plain, packed = (24 * WEIGHT_GB / times[name] for name in ("row", "packed row"))
    c, e = config.language, config.language.experts
    D, v = c.hidden_size, config.vision
    chosen = e.n_shared_experts + e.num_experts_per_tok
    active = c.num_hidden_layers * 4 * D * D + 3 * D * c.intermediate_size
    active += (c.num_hidden_layers - 1) * D * (3 * chosen * e.moe_intermediate_size + e.n_routed_experts)
    head = D * c.vocab_size
    work = {
        "vision": 2 * 2 * v.grid**2 * v.layers * (4 * v.width**2 + 2 * v.width * v.mlp_width),
        "prefill": 2 * T * active + 2 * head,
    }
    for name, flops in work.items():
        rate = flops / times[name] / 1e9
        print(f"{name:10}{times[name]:8.3f} s   {rate:6.0f} GFLOP/s, {rate / rates['matmul']:.0%} of the matmul rate")
    read = 2 * (active + head) * NEW_TOKENS / times["decode"] / 1e9
    print(
        f"{'decode':10}{times['decode']:8.3f} s   {NEW_TOKENS / times['decode']:.1f} tokens/s, reads {read:.1f} GB/s of "
        f"active weights; large one-row products {plain:.1f} GB/s ({read / plain:.0%}), packed {packed:.1f}"
        f" ({read / packed:.0%})"
    )

    print(
        "prefill of 4096 tokens: private memory above the weights at its peak, of which the cache is "
        f"{sum(t.nbytes for layer in model.new_cache(1, 4096).layers for t in layer) / 2**20:.0f} MiB"
    )
    embeddings = torch.randn(1, 4096, D).to(torch.bfloat16)
    fresh = model.new_cache(1, 1024)
    for piece in embeddings[:, :1024].split(128, dim=1):  # kernels for so few rows are set up once, and stay
        model(inputs_embeds=piece, cache=fresh, logits_to_keep=1)
    del fresh
    trim()
    weights_only = private_megabytes()
    for chunk in (128, 512, 1024, 2048, 4096):
        trim()
        with PeakMemory() as memory:
            fresh = model.new_cache(1, 4096)
            start = time.perf_counter()
            for piece in embeddings.split(chunk, dim=1):
                model(inputs_embeds=piece, cache=fresh, logits_to_keep=1)
            taken = time.perf_counter() - start
        print(f"  chunk {chunk:5}: peak {memory.peak - weights_only:6.0f} MiB, {taken:6.1f} s")
        del fresh


def trim() -> None:
    """Have the C library give freed memory back, so that the next peak is its own (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    sections = {
        "compute": compute,
        "sam": sam,
        "quantize": quantize,
        "errors": errors,
        "prompts": prompts,
        "steps": steps,
        "small": small,
        "load": load,
        "vl2": vl2,
        "vl2-quantized": vl2_quantized,
    }
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["small-child"]:
        small_child(*sys.argv[2:])
    else:
        for name in sys.argv[1:] or sections:
            print(f"\n== {name}", flush=True)
            sections[name]()
