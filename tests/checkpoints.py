"""What the tests of checkpoint folders share: to edit, write, damage and compare them."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL_LLAMA, SMALL_SAM, SMALL_SIGLIP
from safetensors.torch import load, save_file

from load_weights import load_model

ABSENT = object()  # as a value: take the key away

TRANSFORMERS = {"model_type": "deepseek_vl_hybrid", "vision_config": SMALL_SIGLIP}
TRANSFORMERS |= {"high_res_vision_config": SMALL_SAM, "text_config": SMALL_LLAMA}
VL2_SMALL = {  # what the released config says, and no more
    "model_type": "deepseek_vl_v2", "global_view_pos": "head", "tile_tag": "2D",
    "language_config": dict(
        first_k_dense_replace=1, max_position_embeddings=4096, n_group=1, n_shared_experts=2, num_experts_per_tok=6,
        topk_group=1, q_lora_rank=None, hidden_size=2048, intermediate_size=10944, kv_lora_rank=512,
        moe_intermediate_size=1408, n_routed_experts=64, num_attention_heads=16, num_key_value_heads=16,
        num_hidden_layers=27, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, topk_method="greedy",
        vocab_size=102400,
    ),
    "projector_config": {"model_type": "mlp_projector", "n_embed": 2048},
    "vision_config": dict(
        layers=27, mlp_ratio=3.7362, model_name="siglip_so400m_patch14_384", model_type="vision", patch_size=14,
        width=1152,
    ),
}  # fmt: skip


def edit_json(file: Path, changes: dict) -> None:
    """Set keys of a JSON file, each written with dots: {"language_config.vocab_size": 7}."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        place, (*sections, key) = content, path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
        if value is ABSENT:
            place.pop(key)
    file.write_text(json.dumps(content))


def config_folder(folder: Path, content: dict, changes: dict | None = None) -> Path:
    """A new folder with a config alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    edit_json(folder / "config.json", changes or {})
    return folder


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, copied, so that the file may be written anew."""
    return load(file.read_bytes())


def write_weights(folder: Path, tensors: dict, suffix: str = "safetensors", shards: int = 1) -> None:
    """Replace a folder's weights: safetensors or bin, whole or in shards with an index."""
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        return save(tensors, folder / f"{stem}.{suffix}")
    weight_map = {}
    for i in range(shards):
        file, part = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}", dict(list(tensors.items())[i::shards])
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check_refused(folder: Path, *words: str, read=load_model) -> str:
    """Loading fails with one ValueError of one line that holds the folder and all these words."""
    with pytest.raises(ValueError) as error:
        read(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 800 + len(str(folder))
    for word in (str(folder), *words):
        assert word in message, message
    return message


def assert_same_weights(tested: torch.nn.Module, expected: torch.nn.Module) -> None:
    tested, expected = tested.state_dict(), expected.state_dict()
    assert tested.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tested[name].dtype == tensor.dtype and torch.equal(tested[name], tensor), name


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


def private_bytes() -> int:
    """Memory of this process that no file backs: what the system cannot drop."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
