"""Speed and memory beside transformers, at the full size of DeepSeek-VL 1.3B in bfloat16.

    python tests/bench.py            everything
    python tests/bench.py compute    SigLIP, prefill of 640 tokens with one image, decode of 32 tokens
    python tests/bench.py load       loading a float16 file: seconds, and private memory at its peak

The weights are random: speed does not depend on them. Both models run in one process, in turns,
after a warm-up; a figure is the median of its turns. Nothing here is asserted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from generate import generate  # noqa: E402
from load_weights import OFFICIAL, expected_tensors, load_model  # noqa: E402
from model import DeepseekVL, LanguageConfig, ModelConfig, PackedLinear  # noqa: E402
from vision import SigLIPConfig  # noqa: E402

CONFIG = ModelConfig(
    vision=SigLIPConfig(),
    language=LanguageConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    ),
    image_token_id=100015,
)
PROMPT, IMAGE_TOKENS, NEW_TOKENS = 640, 576, 32


def seconds(functions: dict[str, callable], turns: int) -> dict[str, float]:
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
    """Random weights, cheaply: one block of noise over and over; vectors become ones."""
    noise = (torch.rand(2**20) - 0.5) * 0.06
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(noise)):
                piece = flat[start : start + len(noise)]
                piece.copy_(noise[: len(piece)])
    return model.eval()


def our_model() -> DeepseekVL:
    with torch.device("meta"):
        model = DeepseekVL(CONFIG).to(torch.bfloat16)
    return fill(model.to_empty(device="cpu")).pack()


def their_model() -> torch.nn.Module:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    vision, language = CONFIG.vision, CONFIG.language
    config = DeepseekVLConfig(
        vision_config=dict(
            model_type="siglip_vision_model", image_size=384, patch_size=16, hidden_size=vision.width,
            num_hidden_layers=vision.layers, num_attention_heads=vision.heads, intermediate_size=vision.mlp_width,
            hidden_act="gelu", vision_use_head=False,
        ),
        text_config=dict(
            model_type="llama", hidden_size=language.hidden_size, intermediate_size=language.intermediate_size,
            num_hidden_layers=language.num_hidden_layers, num_attention_heads=language.num_attention_heads,
            num_key_value_heads=language.num_key_value_heads, vocab_size=language.vocab_size,
            max_position_embeddings=language.max_position_embeddings,
        ),
        tie_word_embeddings=False,
        image_token_id=CONFIG.image_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    skip = {name: getattr(torch.nn.init, name) for name in ("normal_", "uniform_", "kaiming_normal_", "trunc_normal_")}
    for name in skip:  # transformers would spend a minute on an initialization that is overwritten
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    model = DeepseekVLForConditionalGeneration(config)
    for name, function in skip.items():
        setattr(torch.nn.init, name, function)
    torch.set_default_dtype(torch.float32)
    return fill(model)


def machine() -> dict[str, float]:
    """What this machine allows: bfloat16 matmul in GFLOP/s, weight reads of one-row products in GB/s."""
    x, row = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.randn(1, 2048, dtype=torch.bfloat16)
    linear = torch.nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16)
    weights = [torch.nn.Linear(2048, 8192, bias=False, dtype=torch.bfloat16) for _ in range(24)]
    packed, packed_weights = linear, weights
    if PackedLinear.suits(linear):
        packed, packed_weights = PackedLinear(linear), [PackedLinear(weight) for weight in weights]
    size = 2048 * 8192 * 2 / 1e9
    times = seconds(
        {
            "matmul": lambda: linear(x),
            "packed matmul": lambda: packed(x),
            "row": lambda: [weight(row) for weight in weights],
            "packed row": lambda: [weight(row) for weight in packed_weights],
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


@torch.inference_mode()
def compute() -> None:
    rates = machine()
    print(f"machine: {torch.get_num_threads()} threads, bfloat16 matmul {rates['matmul']:.0f} GFLOP/s; "
          f"memory read {rates['read']:.1f} GB/s; weights read by one-row products {rates['row']:.1f} GB/s plain, "
          f"{rates['packed row']:.1f} GB/s packed")
    ours, theirs = our_model(), their_model()
    ids = torch.randint(0, 100000, (1, PROMPT))
    ids[:, 30 : 30 + IMAGE_TOKENS] = CONFIG.image_token_id
    pixels = torch.randn(1, 3, 384, 384).to(torch.bfloat16)

    def decode_ours():
        cache = ours.new_cache(1, PROMPT + NEW_TOKENS)
        cache.length = PROMPT
        for layer in cache.layers:
            for tensor in layer:
                tensor.zero_()
        token = ids[:, :1]
        for _ in range(NEW_TOKENS):
            token = ours(input_ids=token, cache=cache).logits[:, -1].argmax(-1, keepdim=True)

    from transformers import DynamicCache

    def decode_theirs():
        past = DynamicCache()
        shape = (1, CONFIG.language.num_key_value_heads, PROMPT, CONFIG.language.head_dim)
        for layer in range(CONFIG.language.num_hidden_layers):
            past.update(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16), layer)
        token = ids[:, :1]
        for _ in range(NEW_TOKENS):
            output = theirs(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)

    def prefill_ours():
        ours(input_ids=ids, pixel_values=pixels, cache=ours.new_cache(1, PROMPT), logits_to_keep=1)

    def prefill_theirs():
        theirs(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)

    language = CONFIG.language
    per_layer = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size
    layers = language.num_hidden_layers * per_layer
    head = language.hidden_size * language.vocab_size
    vision = CONFIG.vision
    tower = vision.layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width) * 2 * IMAGE_TOKENS
    prefill_flops = 2 * PROMPT * layers + 2 * head + tower
    prefill_flops += 2 * IMAGE_TOKENS * (vision.width + language.hidden_size) * language.hidden_size

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
            print(f"   {tower / times['ours'] / 1e9 / rates['matmul']:.0%} of the matmul rate (its linear layers' work)")
        elif name.startswith("prefill"):
            print(f"   {prefill_flops / times['ours'] / 1e9 / rates['matmul']:.0%} of the matmul rate")
        else:
            read = 2 * (layers + head) * NEW_TOKENS / times["ours"] / 1e9
            print(f"   {NEW_TOKENS / times['ours']:.1f} tokens/s against {NEW_TOKENS / times['theirs']:.1f}; reads "
                  f"{read:.1f} GB/s, {read / rates['packed row']:.0%} of packed one-row products")


# ---------------------------------------------------------------------------- loading


class PrivateMemory:
    """The most anonymous memory of this process while inside the block, in MB (Linux)."""

    def __enter__(self):
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        return 0.0
