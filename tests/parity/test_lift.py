"""Classes lift out: each runs in a new file that holds it, what it needs, and torch, and computes the same.

What it needs are the module-level names that its source mentions, followed through vision.py, model.py and generate.py.
"""

import ast
import copy
import sys
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
DEFINITIONS = (ast.ClassDef, ast.FunctionDef)
ENGINE = ("packed", "quantize", "quantization", "workspace", "memory_layout")  # what no class of the papers may need


def module_level(file: str) -> dict[str, tuple[str, str, ast.stmt]]:
    """Each name that a file defines or takes from the others: the file that defines it, its name there, its source."""
    names = {}
    for node in ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, DEFINITIONS):
            names[node.name] = (file, node.name, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names |= {part.id: (file, part.id, node) for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name, source = alias.asname or alias.name, getattr(node, "module", None)
                names[name] = names_of(source)[alias.name] if source in FILES else (file, name, node)
    return names


TABLES: dict[str, dict] = {}


def names_of(file: str) -> dict[str, tuple[str, str, ast.stmt]]:
    if file not in TABLES:
        TABLES[file] = module_level(file)
    return TABLES[file]


def needed(file: str, name: str) -> dict[tuple[str, str], ast.stmt]:
    """The definition of a name and of all that it mentions, annotations aside."""
    found, todo = {}, [(file, name)]
    while todo:
        file, name = todo.pop()
        if name not in names_of(file):
            continue
        file, name, node = names_of(file)[name]
        if (file, name) in found:
            continue
        found[file, name] = node
        annotations: set[int] = set()
        for part in ast.walk(node):
            for value in (getattr(part, "annotation", None), getattr(part, "returns", None)):
                annotations |= {id(inner) for inner in ast.walk(value)} if value is not None else set()
        todo += [(file, p.id) for p in ast.walk(node) if isinstance(p, ast.Name) and id(p) not in annotations]
    return found


def lifted(file: str, name: str, monkeypatch) -> ModuleType:
    """A module that holds the source of a name and of what it needs. Imports are torch's and the standard library's."""
    nodes = needed(file, name)
    imports = {ast.unparse(node): node for node in nodes.values() if isinstance(node, ast.Import | ast.ImportFrom)}
    for node in imports.values():
        modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        packages = {module.split(".")[0] for module in modules}
        assert packages <= {"torch", *sys.stdlib_module_names}, f"{name} needs {packages}"
    order = sorted(nodes.items(), key=lambda item: (FILES.index(item[0][0]), item[1].lineno))
    definitions = {ast.unparse(node): None for _, node in order if not isinstance(node, ast.Import | ast.ImportFrom)}
    text = "\n\n".join(["from __future__ import annotations", *imports, *definitions])
    module = ModuleType(f"lifted_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(text, module.__name__, "exec"), vars(module))
    return module


def same_config(config, module: ModuleType):
    """A config of ours as the lifted module's own dataclass."""
    if not hasattr(config, "__dataclass_fields__"):
        return config
    fields = {name: same_config(getattr(config, name), module) for name in config.__dataclass_fields__}
    own = getattr(module, type(config).__name__, type(config))
    return own(**fields)


PLAIN = LanguageConfig(120, 48, 80, 3, 6, 2, 16, 256, rope_theta=500.0)
SIGLIP = SigLIPConfig(26, 4, 32, 2, 4, 48)
SMALL_SAM = SAMConfig(80, 8, 24, 3, 3, 40, 4, (1, 2), 8, (16, 32))


POSITIONS = torch.arange(9)[None].expand(2, 9)


def rope(config: LanguageConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return model.rope_angles(POSITIONS, config)


CASES = {  # the file, the arguments that build it, and its inputs
    "SwiGLU": ("model", (48, 80), lambda: (torch.randn(2, 9, 48),)),
    "Attention": ("model", (PLAIN,), lambda: (torch.randn(2, 9, 48), rope(PLAIN))),
    "LatentAttention": ("model", (SMALL,), lambda: (torch.randn(2, 9, 32), rope(SMALL))),
    "MixtureOfExperts": ("model", (with_experts(**SIGMOID),), lambda: (torch.randn(2, 9, 32),)),
    "SigLIP": ("vision", (SIGLIP,), lambda: (torch.randn(2, 3, 26, 26),)),
    "SAMAttention": ("vision", (24, 3, 10), lambda: (torch.randn(2, 10, 10, 24),)),
    "SAM": ("vision", (SMALL_SAM, 6), lambda: (torch.randn(2, 3, 80, 80),)),
    "Decoder": ("model", (PLAIN,), lambda: (torch.randn(2, 9, 48), POSITIONS)),
    "Decoder with experts": ("model", (SMALL,), lambda: (torch.randn(2, 9, 32), POSITIONS)),
}


def build(kind: type, module: ModuleType, arguments: tuple) -> nn.Module:
    return kind(*(same_config(argument, module) for argument in arguments)).eval()


@pytest.mark.parametrize("case", CASES)
def test_a_class_runs_alone(case, monkeypatch):
    name, (file, arguments, inputs) = case.split()[0], CASES[case]
    original = randomized(build(getattr(vision if file == "vision" else model, name), vision, arguments))
    module, given = lifted(file, name, monkeypatch), inputs()
    alone = build(getattr(module, name), module, arguments)
    assert type(alone) is not type(original)
    alone.load_state_dict(original.state_dict())
    assert_close(alone(*given), original(*given), 0)


@pytest.mark.parametrize("kind", ["siglip", "hybrid", "vl2"])
def test_a_whole_model_runs_alone(kind, monkeypatch):
    if kind == "vl2":
        original, batch = small_vl2(SMALL)
    else:
        towers = SIGLIP if kind == "siglip" else HybridConfig(SIGLIP, SMALL_SAM)
        config = ModelConfig(towers, PLAIN, image_token_id=7)
        original, batch = randomized(DeepseekVL(config)), random_batch(kind)
    module = lifted("model", "DeepseekVL", monkeypatch)
    alone = build(module.DeepseekVL, module, (original.config,))
    alone.load_state_dict(original.state_dict())
    steps = []
    for tested in (alone, original):
        cache = tested.new_cache(*batch["input_ids"].shape)
        names = "input_ids", "attention_mask", "images_seq_mask"
        start = {name: value[:, :-1] if name in names else value for name, value in batch.items() if name != "labels"}
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
    for decode in (lifted("generate", "decode", monkeypatch).decode, generate.decode):
        cache = tested.new_cache(2, T + 5)
        logits = tested(**batch, cache=cache).logits[:, -1]
        rows.append([*decode(copy.copy(tested), logits, seen, cache, 6, repetition_penalty=1.2, **options)])
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_no_class_of_the_papers_needs_the_engine():
    engine = {name for name, (*_, node) in names_of("load_weights").items() if isinstance(node, DEFINITIONS)}
    engine -= names_of("model").keys() | names_of("vision").keys()  # what it imports from there
    for file in ("vision", "model"):
        for name, (_, _, node) in names_of(file).items():
            if isinstance(node, DEFINITIONS):
                parts = {part for _, part in needed(file, name)}
                assert not parts & engine and not any(word in part.lower() for word in ENGINE for part in parts), name
    imported = {node.module for _, _, node in names_of("model").values() if isinstance(node, ast.ImportFrom)}
    assert not imported & {"load_weights", "processor", "generate"}
