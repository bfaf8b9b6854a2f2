"""What several test files share: where the data lies, the golden cases, small random models, comparisons."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = ROOT.parent / "shared"  # what a clone lacks: released configs, tensor names and a tokenizer of 3 MB
sys.path[:0] = [str(ROOT), str(DEMO)]

VL_GOLDENS = ["vl-siglip", "vl-hybrid"]
VL2_GOLDENS = ["vl2-mha", "vl2-mla", "vl2-mla-sigmoid"]
GOLDENS = [*VL_GOLDENS, *VL2_GOLDENS]

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other


@pytest.fixture
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@cache
def golden(name: str) -> SimpleNamespace:
    """A golden checkpoint: folder, conversations with full image paths, prompts, batch (case numbers), tensors.

    `tensors` are what the original code computed in float32 from the weights in `folder`, named `<case>.<tensor>`.
    """
    folder = GOLDEN / name
    content = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    prompts, conversations = ([case[key] for case in content["cases"]] for key in ("prompt", "conversation"))
    for message in itertools.chain(*conversations):
        if "images" in message:
            message["images"] = [str(folder / "images" / image) for image in message["images"]]
    rest = {"batch": content["batch"], "tensors": load_file(folder / "golden.safetensors")}
    return SimpleNamespace(folder=folder, conversations=conversations, prompts=prompts, **rest)


@cache
def golden_model(name: str) -> tuple:
    """The model of a golden checkpoint in float32, and its processor."""
    from load_weights import load_model
    from processor import Processor

    folder = golden(name).folder
    return load_model(folder, dtype=torch.float32), Processor(folder)


@cache
def released_model(preset: str) -> torch.nn.Module:
    """A released model without values."""
    from model import MODELS, DeepseekVL

    with torch.device("meta"):
        return DeepseekVL(MODELS[preset])


def copy_checkpoint(name: str, folder: Path) -> Path:
    """The files of a golden checkpoint in a new folder, where a test may change or damage them."""
    left_out = shutil.ignore_patterns("cases.json", "golden.safetensors", "images")
    return shutil.copytree(golden(name).folder, folder, ignore=left_out, copy_function=shutil.copyfile)


def run(*arguments, folder: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """A command of Python in a process of its own, with one thread."""
    command = [sys.executable, *map(str, arguments)]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True} | options
    return subprocess.run(command, capture_output=True, cwd=folder, timeout=300, **options)


# ------------------------------------------------------------------ small random models, ours and transformers'

KINDS = ["siglip", "hybrid"]  # the architectures of DeepSeek-VL 1.3B and 7B

IMAGE_TOKEN = 7  # the id that stands for an image token in the small models
IMAGE_TOKENS = 36  # of one image: 26 pixels hold 6 x 6 patches of 4, and the last two pixels are dropped
VOCABULARY = 120

SMALL_SIGLIP = dict(
    model_type="siglip_vision_model", image_size=26, patch_size=4, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=48,
)  # fmt: skip
SMALL_SAM = dict(
    model_type="sam_vision_model", image_size=80, patch_size=8, hidden_size=24, num_hidden_layers=3,
    num_attention_heads=3, mlp_dim=40, window_size=4, global_attn_indexes=[1, 2], output_channels=8,
)  # fmt: skip  # a 10 x 10 grid, which windows of 4 do not divide
SMALL_LLAMA = dict(
    model_type="llama", hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=256, rope_theta=500.0,
)  # fmt: skip


def random_transformers_model(kind: str, seed: int = 0, tie: bool = False, **language):
    """transformers' model of one architecture, eager attention, every parameter random, alpha not zero.

    `language` changes entries of SMALL_LLAMA.
    """
    transformers = pytest.importorskip("transformers")
    towers, name = {"vision_config": SMALL_SIGLIP | {"hidden_act": "gelu"}}, "DeepseekVL"
    if kind == "hybrid":
        towers, name = towers | {"high_res_vision_config": SMALL_SAM}, "DeepseekVLHybrid"
    options = {"image_token_id": IMAGE_TOKEN, "tie_word_embeddings": tie, "attn_implementation": "eager"}
    config = getattr(transformers, f"{name}Config")(**towers, text_config=SMALL_LLAMA | language, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in key and "weight" in key else 0.0, std=0.3)
            else:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if kind == "hybrid":
        torch.nn.init.constant_(model.model.high_res_vision_alpha, 0.7)
    return model.eval()


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory):
    """small_pair(kind, **options) -> folder, and `theirs`, saved there, and `ours`, loaded from there.

    Options are those of `random_transformers_model`; `end` is the id of the end token, or a tuple of them.
    """

    @cache
    def make(kind: str, end: int | tuple[int, ...] | None = None, **options) -> SimpleNamespace:
        from load_weights import load_model

        theirs, folder = random_transformers_model(kind, **options), tmp_path_factory.mktemp(kind)
        theirs.generation_config.eos_token_id = list(end) if isinstance(end, tuple) else end
        theirs.save_pretrained(folder)
        return SimpleNamespace(folder=folder, theirs=theirs, ours=load_model(folder))

    return make


def random_batch(kind: str, lengths: tuple[int, ...] = (54, 42), pad_id: int = 0, seed: int = 0) -> dict:
    """One conversation a length, each an image between two texts; shorter ones are padded on the left."""
    random = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    batch = {"input_ids": torch.full((rows, longest), pad_id), "attention_mask": torch.zeros(rows, longest).long()}
    for row, length in enumerate(lengths):
        ids = torch.randint(10, VOCABULARY, (length,), generator=random)
        ids[3 : 3 + IMAGE_TOKENS] = IMAGE_TOKEN
        batch["input_ids"][row, longest - length :] = ids
        batch["attention_mask"][row, longest - length :] = 1
    sizes = {"pixel_values": SMALL_SIGLIP} | ({"high_res_pixel_values": SMALL_SAM} if kind == "hybrid" else {})
    for name, config in sizes.items():
        batch[name] = torch.randn(rows, 3, config["image_size"], config["image_size"], generator=random)
    return batch


def alone(batch: dict, row: int) -> dict:
    """One conversation of `random_batch`, without its padding."""
    real = batch["attention_mask"][row].bool()
    text = {name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    return text | {name: batch[name][row : row + 1] for name in batch if "pixel_values" in name}


def encode_images(model, batch: dict) -> list[torch.Tensor]:
    """The features of a batch's images, (tokens, D) each."""
    pictures = ("pixel_values", "high_res_pixel_values", "images_spatial_crop")
    return model.encode_images(**{name: batch[name] for name in pictures if name in batch})


def inside(model, batch: dict) -> tuple:
    """A forward pass: its output, the hidden states (embeddings, layers, the last normalized), and the attentions."""
    from model import record

    with record(model) as seen:
        output = model(**batch)
    layers = [f"language.layers.{layer}" for layer in range(len(model.language.layers))]
    hidden_states = [seen[name] for name in ("language.embeddings", *layers[:-1], "language")]
    return output, hidden_states, [seen[f"{name}.self_attn"] for name in layers]


def relative_error(tested: torch.Tensor, expected: torch.Tensor) -> float:
    """|tested - expected| / |expected|, Euclidean norms over all values."""
    expected = expected.double()
    return ((tested.double() - expected).norm() / expected.norm()).item()


def assert_close(tested: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert tested.shape == expected.shape
    error = relative_error(tested, expected)
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e} is right"
