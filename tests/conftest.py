"""What several test files share: where the data lies, and the golden cases."""

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
sys.path.insert(0, str(ROOT))

VL_GOLDENS = ["vl-siglip", "vl-hybrid"]
VL2_GOLDENS = ["vl2-mha", "vl2-mla", "vl2-mla-sigmoid"]

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the golden files are not at {SHARED}")


@cache
def golden(name: str) -> SimpleNamespace:
    """A golden checkpoint: folder, conversations with full image paths, prompts, batch (case numbers), tensors.

    `tensors` are what the original code computed in float32 from the weights in `folder`, named `<case>.<tensor>`.
    """
    folder = SHARED / "golden" / name
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    conversations = [case["conversation"] for case in cases["cases"]]
    for message in (message for conversation in conversations for message in conversation):
        if "images" in message:
            message["images"] = [str(folder / "images" / image) for image in message["images"]]
    return SimpleNamespace(
        folder=folder,
        conversations=conversations,
        prompts=[case["prompt"] for case in cases["cases"]],
        batch=cases["batch"],
        tensors=load_file(folder / "golden.safetensors"),
    )
