"""Classes lift out: each runs in a new file that holds it, what it needs, and torch, and computes the same.

What it needs are the module-level names that its source mentions, followed through vision.py, model.py and generate.py:
a class that needs anything of load_weights.py, how weights lie in memory, does not run here.
"""

import ast
import copy
import sys
from collections.abc import Iterator
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
IMPORTS = (ast.Import, ast.ImportFrom)


def names(node: ast.AST, context: type) -> Iterator[str]:
    """The variables that a statement reads (ast.Load) or sets (ast.Store), annotations aside."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, context):
        yield node.id
    for field, value in ast.iter_fields(node):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST) and field not in ("annotation", "returns"):
                yield from names(part, context)


STATEMENTS = {}  # each name that the files define or import from elsewhere, and the statement that does it
for file in FILES:
    for node in ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            STATEMENTS[node.name] = node
        elif not isinstance(node, IMPORTS):
            STATEMENTS |= dict.fromkeys(names(node, ast.Store), node)
        elif getattr(node, "module", None) not in FILES:
            STATEMENTS |= {alias.asname or alias.name: node for alias in node.names}


def lifted(name: str, monkeypatch) -> ModuleType:
    """A module that holds the source of a name and of what it needs. Imports are torch's and the standard library's."""
    needed, todo = set(), [name]
    while todo:
        if (other := todo.pop()) in STATEMENTS and other not in needed:
            needed.add(other)
            todo += names(STATEMENTS[other], ast.Load)
    nodes = dict.fromkeys(node for other, node in STATEMENTS.items() if other in needed)  # in the order of reading
    for node in (node for node in nodes if isinstance(node, IMPORTS)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        packages = {module.split(".")[0] for module in modules}
        assert packages <= {"torch", *sys.stdlib_module_names}, f"{name} needs {packages}"
    text = "\n\n".join(["from __future__ import annotations", *map(ast.unparse, nodes)])
    module = ModuleType(f"lifted_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(text, module.__name__, "exec"), vars(module))
    return module


def build_alone(name: str, arguments: tuple, original: nn.Module, monkeypatch) -> nn.Module:
    """The lifted class, built from lifted configs and with the original's weights."""
    module = lifted(name, monkeypatch)
    config_classes = vars(vision) | vars(model) | vars(module)  # of a class that does not mention its config: ours
    alone = getattr(module, name)(*(eval(repr(argument), config_classes) for argument in arguments)).eval()
    assert type(alone) is not type(original)
    alone.load_state_dict(original.state_dict())
    return alone


PLAIN = LanguageConfig(120, 48, 80, 3, 6, 2, 16, 256, rope_theta=500.0)
SIGLIP = SigLIPConfig(26, 4, 32, 2, 4, 48)
SMALL_SAM = SAMConfig(80, 8, 24, 3, 3, 40, 4, (1, 2), 8, (16, 32))
POSITIONS = torch.arange(9)[None].expand(2, 9)

CASES = {  # the arguments that build it, the shape of its input, and what it takes beside
    "SwiGLU": ((48, 80), (2, 9, 48)),
    "Attention": ((PLAIN,), (2, 9, 48), model.rope_angles(POSITIONS, PLAIN)),
    "LatentAttention": ((SMALL,), (2, 9, 32), model.rope_angles(POSITIONS, SMALL)),
    "MixtureOfExperts": ((with_experts(**SIGMOID),), (2, 9, 32)),
    "SigLIP": ((SIGLIP,), (2, 3, 26, 26)),
    "SAMAttention": ((24, 3, 10), (2, 10, 10, 24)),
    "SAM": ((SMALL_SAM, 6), (2, 3, 80, 80)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_class_runs_alone(name, monkeypatch):
    arguments, shape, *more = CASES[name]
    original = randomized((getattr(model, name, None) or getattr(vision, name))(*arguments))
    x, alone = torch.randn(shape), build_alone(name, arguments, original, monkeypatch)
    assert_close(alone(x, *more), original(x, *more), 0)


@pytest.mark.parametrize("kind", ["siglip", "hybrid", "vl2"])
def test_a_whole_model_runs_alone(kind, monkeypatch):
    """A pass over all tokens but the last, and a step."""
    if kind == "vl2":
        original, batch = small_vl2(SMALL)
        del batch["labels"]
    else:
        towers = SIGLIP if kind == "siglip" else HybridConfig(SIGLIP, SMALL_SAM)
        original, batch = randomized(DeepseekVL(ModelConfig(towers, PLAIN, image_token_id=7))), random_batch(kind)
    alone = build_alone("DeepseekVL", (original.config,), original, monkeypatch)
    steps, shape = [], batch["input_ids"].shape
    start = {name: value[:, :-1] if value.shape == shape else value for name, value in batch.items()}
    for tested in (alone, original):
        cache = tested.new_cache(*shape)
        first, last = tested(**start, cache=cache), tested(input_ids=batch["input_ids"][:, -1:], cache=cache)
        steps.append(torch.cat((first.logits, last.logits), dim=1))
    assert_close(*steps, 0)


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
