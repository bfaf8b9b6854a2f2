"""Checkpoint folders as users have them: half downloaded, quantized elsewhere, saved from a wrapper."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, copy_checkpoint, golden
from safetensors.torch import load_file, save_file

from load_weights import load_model
from processor import Processor

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4000000000\n"


@pytest.fixture
def folder(tmp_path):
    return copy_checkpoint("vl-siglip", tmp_path / "model")


def edit(folder, change) -> None:
    """Change config.json, as a dict."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_told(name, folder):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name}: a git-lfs pointer and not the file .*, run `git lfs pull`"):
        Processor(folder)
        load_model(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
@pytest.mark.parametrize("part", ["the whole", "language_config"])
def test_weights_that_others_quantized(part, method, folder):
    quantization = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit(folder, lambda config: config.get(part, config).update(quantization))
    with pytest.raises(ValueError, match=f"config.json.*: quantization_config says {method}, only plain weights load"):
        load_model(folder)


def test_quantized_weights_whose_method_has_no_name(folder):
    edit(folder, lambda config: config.update(quantization_config={"load_in_4bit": True}))  # older bitsandbytes
    with pytest.raises(ValueError, match="quantization_config says load_in_4bit, only plain weights load"):
        load_model(folder)


def test_a_gguf_file_alone(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(ValueError, match="no weights, only a GGUF file, expected model.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "m."])
def test_names_that_a_wrapper_left(prefix, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensors are named {prefix}..., save the model without what wrapped it"):
        load_model(folder)


def test_stray_buffers_are_passed_over(folder):
    tensors = load_file(folder / "model.safetensors")
    plain = load_model(folder)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["vision_model.vision_tower.embeddings.position_ids"] = torch.arange(9)
    save_file(tensors, folder / "model.safetensors")
    again = load_model(folder)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))


def test_a_name_of_the_hub_tells_how_to_download():
    command = [sys.executable, str(ROOT / "generate.py"), "--prompt", "a", "--model"]
    done = subprocess.run([*command, "deepseek-ai/deepseek-vl-1.3b-chat"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hf download deepseek-ai/deepseek-vl-1.3b-chat --local-dir deepseek-vl-1.3b-chat" in done.stderr
    with pytest.raises(ValueError, match="hf download deepseek-ai/deepseek-vl2-tiny --local-dir deepseek-vl2-tiny"):
        load_model("deepseek-ai/deepseek-vl2-tiny")


@pytest.mark.parametrize(
    "name, keys, count",
    [
        ("vl-siglip", ("language_config", "num_hidden_layers"), 19_999),
        ("vl-siglip", ("vision_config", "params", "layers"), 19_999),
        ("vl-hybrid", ("vision_config", "params", "high_res_cfg", "layers"), 19_999),
        ("vl2-mla", ("language_config", "n_routed_experts"), 6_600),
    ],
)
def test_thousands_of_blocks_are_not_built(name, keys, count, tmp_path):
    folder = copy_checkpoint(name, tmp_path / "model")

    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = count

    edit(folder, change)
    with pytest.raises(ValueError, match=r"missing tensors, \d+ for the \d+ layers or experts of config.json"):
        load_model(folder)


def test_experts_that_no_layer_has(tmp_path):
    """Their number is no reason to refuse a model whose layers are all dense."""
    folder = copy_checkpoint("vl2-mla", tmp_path / "model")
    edit(folder, lambda config: config["language_config"].update(first_k_dense_replace=3, n_routed_experts=5_000))
    with pytest.raises(ValueError, match="missing tensor language.model.layers.1.mlp.down_proj.weight"):
        load_model(folder)  # what it lacks is a dense layer's, and not 15,000 experts


@pytest.mark.parametrize(
    "changes",
    [
        *({"rope_theta": 1}, {"rope_theta": 1e-41}, {"beta_fast": 5e-324}, {"beta_slow": 5e-324}),
        *({"factor": 1e300}, {"mscale": 1e300}),
    ],
    ids=str,
)
def test_rotations_that_are_none(changes, tmp_path):
    folder = copy_checkpoint("vl2-mla", tmp_path / "model")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

    def change(config):
        config["language_config"]["rope_scaling"] = scaling | {k: v for k, v in changes.items() if k != "rope_theta"}
        config["language_config"]["rope_theta"] = changes.get("rope_theta", 10000.0)

    edit(folder, change)
    with pytest.raises(ValueError, match="config.json"):
        load_model(folder)


def test_dtypes_that_torch_lacks(folder):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = next(name for name, entry in header.items() if name != "__metadata__" and entry["shape"][0] % 4 == 0)
    start, end = header[name]["data_offsets"]
    header[name] |= {"dtype": "F6_E2M3", "shape": [(end - start) * 8 // 6 // 4 * 4]}
    packed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + raw[8 + length :])
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "no such device", None, 1.5])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"device {device} is not to be had here"):
        load_model(golden("vl-siglip").folder, device=device)
