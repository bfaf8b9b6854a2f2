"""Classes lift out: each runs in a new file that holds it, what it needs, and torch, and computes the same.

What it needs are the module-level names that its source mentions, followed through vision.py, model.py and generate.py:
a class that needs anything of load_weights.py, how weights lie in memory, does not run here.
"""

import ast
import copy
import sys
from functools import cache
from types import ModuleType

import pytest
import torch
from conftest import ROOT, assert_close, golden, golden_model, random_batch
from small_vl2 import SIGMOID, SMALL, randomized, small_vl2, with_experts
from torch import nn

import generate
import model
import vision
from model import DeepseekVL, LanguageConfig, ModelConfig
from vision import HybridConfig, SAMConfig, SigLIPConfig

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")

FILES = ("vision", "model", "generate")
DEFINITIONS, IMPORTS = (ast.ClassDef, ast.FunctionDef), (ast.Import, ast.ImportFrom)


def statements(file: str) -> dict[str, ast.stmt]:
    """Each name that a file defines or imports, but from the others of FILES, and the statement that does it."""
    names = {}
    for node in ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, DEFINITIONS):
            names[node.name] = node
        elif isinstance(node, IMPORTS):
            if getattr(node, "module", None) not in FILES:
                names |= {alias.asname or alias.name: node for alias in node.names}
        else:
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            names |= {part.id: node for part in stored}
    return names


STATEMENTS = {name: node for file in FILES for name, node in statements(file).items()}  # in the order of reading


@cache
def needed(name: str) -> set[str]:
    """A name and all that its definition mentions, annotations aside."""
    found, todo = set(), [name]
    while todo:
        if (name := todo.pop()) in found or name not in STATEMENTS:
            continue
        found.add(name)
        annotations: set[int] = set()
        for part in ast.walk(STATEMENTS[name]):
            for value in (getattr(part, "annotation", None), getattr(part, "returns", None)):
                annotations |= {id(inner) for inner in ast.walk(value)} if value is not None else set()
        parts = ast.walk(STATEMENTS[name])
        todo += [part.id for part in parts if isinstance(part, ast.Name) and id(part) not in annotations]
    return found


def lifted(name: str, monkeypatch) -> ModuleType:
    """A module that holds the source of a name and of what it needs. Imports are torch's and the standard library's."""
    nodes = dict.fromkeys(node for other, node in STATEMENTS.items() if other in needed(name))
    for node in (node for node in nodes if isinstance(node, IMPORTS)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        packages = {module.split(".")[0] for module in modules}
        assert packages <= {"torch", *sys.stdlib_module_names}, f"{name} needs {packages}"
    text = "\n\n".join(["from __future__ import annotations", *map(ast.unparse, nodes)])
    module = ModuleType(f"lifted_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(text, module.__name__, "exec"), vars(module))
    return module


def same_config(config, module: ModuleType):
    """A config of ours as the lifted module's own dataclass."""
    if not hasattr(config, "__dataclass_fields__"):
        return config
    fields = {name: same_config(getattr(config, name), module) for name in config.__dataclass_fields__}
    return getattr(module, type(config).__name__, type(config))(**fields)


def build(kind: type, module: ModuleType, arguments: tuple) -> nn.Module:
    return kind(*(same_config(argument, module) for argument in arguments)).eval()


PLAIN = LanguageConfig(120, 48, 80, 3, 6, 2, 16, 256, rope_theta=500.0)
SIGLIP = SigLIPConfig(26, 4, 32, 2, 4, 48)
SMALL_SAM = SAMConfig(80, 8, 24, 3, 3, 40, 4, (1, 2), 8, (16, 32))
POSITIONS = torch.arange(9)[None].expand(2, 9)

CASES = {  # the arguments that build it, and its inputs
    "SwiGLU": ((48, 80), lambda: (torch.randn(2, 9, 48),)),
    "Attention": ((PLAIN,), lambda: (torch.randn(2, 9, 48), model.rope_angles(POSITIONS, PLAIN))),
    "LatentAttention": ((SMALL,), lambda: (torch.randn(2, 9, 32), model.rope_angles(POSITIONS, SMALL))),
    "MixtureOfExperts": ((with_experts(**SIGMOID),), lambda: (torch.randn(2, 9, 32),)),
    "SigLIP": ((SIGLIP,), lambda: (torch.randn(2, 3, 26, 26),)),
    "SAMAttention": ((24, 3, 10), lambda: (torch.randn(2, 10, 10, 24),)),
    "SAM": ((SMALL_SAM, 6), lambda: (torch.randn(2, 3, 80, 80),)),
    "Decoder": ((PLAIN,), lambda: (torch.randn(2, 9, 48), POSITIONS)),
    "Decoder with experts": ((SMALL,), lambda: (torch.randn(2, 9, 32), POSITIONS)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_class_runs_alone(case, monkeypatch):
    name, (arguments, inputs) = case.split()[0], CASES[case]
    original = randomized(build(getattr(model, name, None) or getattr(vision, name), vision, arguments))
    module, given = lifted(name, monkeypatch), inputs()
    alone = build(getattr(module, name), module, arguments)
    assert type(alone) is not type(original)
    alone.load_state_dict(original.state_dict())
    assert_close(alone(*given), original(*given), 0)


@pytest.mark.parametrize("kind", ["siglip", "hybrid", "vl2"])
def test_a_whole_model_runs_alone(kind, monkeypatch):
    if kind == "vl2":
        original, batch = small_vl2(SMALL)
        del batch["labels"]
    else:
        towers = SIGLIP if kind == "siglip" else HybridConfig(SIGLIP, SMALL_SAM)
        original, batch = randomized(DeepseekVL(ModelConfig(towers, PLAIN, image_token_id=7))), random_batch(kind)
    module = lifted("DeepseekVL", monkeypatch)
    alone = build(module.DeepseekVL, module, (original.config,))
    alone.load_state_dict(original.state_dict())
    steps, shape = [], batch["input_ids"].shape
    start = {name: value[:, :-1] if value.shape == shape else value for name, value in batch.items()}
    for tested in (alone, original):
        cache = tested.new_cache(*shape)
        tested(**start, cache=cache)
        steps.append(tested(input_ids=batch["input_ids"][:, -1:], cache=cache).logits)
    assert_close(*steps, 0)
    assert_close(alone(**batch).logits, original(**batch).logits, 0)


def test_decode_runs_alone(monkeypatch):
    tested, processor = golden_model("vl2-mla")
    batch, options = processor(golden("vl2-mla").conversations[:2]), dict(temperature=0.7, top_p=0.9, top_k=50, seed=1)
    vocabulary, T = tested.config.language.vocab_size, batch["input_ids"].shape[1]
    seen = torch.zeros(2, vocabulary).scatter_add(1, batch["input_ids"], batch["attention_mask"].float()) > 0
    rows = []
    for decode in (lifted("decode", monkeypatch).decode, generate.decode):
        cache = tested.new_cache(2, T + 5)
        logits = tested(**batch, cache=cache).logits[:, -1]
        rows.append([*decode(copy.copy(tested), logits, seen, cache, 6, repetition_penalty=1.2, **options)])
    assert rows[0] == rows[1] and len(rows[0]) == 6
