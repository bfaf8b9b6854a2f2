"""Damaged configs, weights, indexes and pickles: one line that says what and where, and nothing is ever run."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import (
    ABSENT,
    TRANSFORMERS,
    VL2_SMALL,
    assert_same_weights,
    check_refused,
    config_folder,
    edit_json,
    needs_proc,
    private_bytes,
    read_tensors,
    write_weights,
)
from conftest import copy_checkpoint, golden
from safetensors.torch import save_file

from load_weights import load_model, read_config, save_checkpoint

# ---------------------------------------------------------------------------- configs

LLAMA, PROJECTOR = "language_config", "aligner_config.params"
SIGLIP, SAM = "vision_config.params.low_res_cfg", "vision_config.params.high_res_cfg"

# In the config of vl-hybrid: (key, value, words of the message).
BAD_CONFIGS = {
    "no model type": ("model_type", ABSENT, "model_type is missing, expected one of multi_modality"),
    "unknown model type": ("model_type", "llava", "model_type is 'llava', expected one of multi_modality"),
    "model type of a wrong type": ("model_type", ["llava"], "model_type is ['llava'], expected one of"),
    "section of a wrong type": (LLAMA, [1], "language_config: expected an object, found a list"),
    "unknown tower": ("vision_config.cls", "ViT", "cls is 'ViT', expected 'CLIPVisionTower' or 'HybridVisionTower'"),
    "unknown SigLIP": (f"{SIGLIP}.model_name", "vit_h", "model_name is 'vit_h', expected 'siglip_large_patch16_384'"),
    "unknown SAM": (f"{SAM}.model_name", "sam_h", "model_name is 'sam_h', expected 'sam_b_downsample'"),
    "features of another layer": (f"{SIGLIP}.select_layer", -2, "select_layer is -2, expected -1"),
    "unknown projector": (f"{PROJECTOR}.projector_type", "linear", "projector_type is 'linear', expected 'low_high"),
    "projector of the 1.3B": (f"{PROJECTOR}.projector_type", "mlp_gelu", "projector_type is 'mlp_gelu', expected"),
    "deeper projector": (f"{PROJECTOR}.depth", 3, "depth is 3, expected 2"),
    "stretched rope": (f"{LLAMA}.rope_scaling", {"type": "linear"}, "rope_scaling is {'type': 'linear'}, expected"),
    "another rope": (f"{LLAMA}.rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn', expected 'default'"),
    "biases": (f"{LLAMA}.attention_bias", True, "attention_bias is True, expected False"),
    "another activation": (f"{LLAMA}.hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
    "no truth": (f"{LLAMA}.tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected False or True"),
    "negative size": (f"{LLAMA}.vocab_size", -5, "vocab_size is -5, expected an integer from 1"),
    "no layers": (f"{LLAMA}.num_hidden_layers", 0, "num_hidden_layers is 0, expected an integer from 1"),
    "size as text": (f"{LLAMA}.hidden_size", "64", "hidden_size is '64', expected an integer from 1"),
    "size with a fraction": (f"{LLAMA}.hidden_size", 64.0, "hidden_size is 64.0, expected an integer from 1"),
    "size as a truth": (f"{SIGLIP}.layers", True, "layers is True, expected an integer from 1"),
    "not a number": (f"{LLAMA}.rope_theta", float("nan"), "rope_theta is nan, expected a number from"),
    "infinite": (f"{SIGLIP}.mlp_ratio", float("inf"), "mlp_ratio is inf, expected a number from"),
    "beyond any number": (f"{LLAMA}.rope_theta", 10**400, "rope_theta is 1000000"),
    "beyond any patience": (f"{LLAMA}.num_hidden_layers", 2**30, "1073741824 layers or experts of config.json"),
    "uneven vision heads": (f"{SIGLIP}.heads", 5, "vision width 64 is no multiple of 5 heads"),
    "patch beyond the image": (f"{SIGLIP}.patch_size", 97, "a 96 pixel image holds no 97 pixel patch"),
    "uneven key heads": (f"{LLAMA}.num_key_value_heads", 3, "4 attention heads cannot share 3 key/value heads evenly"),
    "odd heads": (f"{LLAMA}.head_dim", 15, "heads of 15 values cannot be rotated in pairs"),
    "more heads than width": (f"{LLAMA}.num_attention_heads", 100, "heads of 1 values cannot be rotated in pairs"),
    "layer beyond the last": (f"{SAM}.global_attn_indexes", [1, 4], "expected a list of SAM layers, integers from 0"),
    "no global layer": (f"{SAM}.global_attn_indexes", [], "expected a list of SAM layers, integers from 0 to 3"),
    "negative layer": (f"{SAM}.global_attn_indexes", [-1], "global_attn_indexes is [-1], expected a list of SAM"),
    "layers as text": (f"{SAM}.global_attn_indexes", "1, 3", "global_attn_indexes is '1, 3', expected a list of SAM"),
    "channels missing": (f"{SAM}.downsample_channels", [32], "downsample_channels is [32], expected"),
    "grey mean": (f"{SAM}.pixel_mean", [0.5], "pixel_mean is [0.5], expected 3 numbers from 0"),
    "mean as text": (f"{SAM}.pixel_mean", ["a", "b", "c"], "pixel_mean is ['a', 'b', 'c'], expected 3 numbers"),
    "std of zero": (f"{SAM}.pixel_std", [0, 1, 1], "pixel_std is [0, 1, 1], expected 3 numbers from"),
}
BAD_TRANSFORMERS = {
    "vision_config.model_type": ("clip", "model_type is 'clip', expected 'siglip_vision_model'"),
    "vision_config.hidden_act": ("relu", "hidden_act is 'relu', expected 'gelu_pytorch_tanh' or 'gelu'"),
    "high_res_vision_config.use_rel_pos": (False, "use_rel_pos is False, expected True"),
    "high_res_vision_config.mlp_dim": (-1, "mlp_dim is -1, expected an integer from 1"),
    "text_config.model_type": ("qwen2", "model_type is 'qwen2', expected 'llama'"),
    "text_config": (3, "text_config: expected an object, found a int"),
    "tie_word_embeddings": (3, "tie_word_embeddings is 3, expected True or False"),
    "image_token_id": (-3, "image_token_id is -3, expected an integer from 1"),
}
BAD_VL2 = {
    "projector_config.n_embed": (1280, "n_embed is 1280, expected 2048"),
    "projector_config.input_dim": (1024, "input_dim is 1024, expected 1152"),
    "projector_config.depth": (3, "depth is 3"),
    "projector_config.projector_type": ("mlp_gelu", "projector_type is 'mlp_gelu'"),
    "vision_config.width": (1024, "input_dim is 1152, expected 1024"),
    "vision_config.model_name": ("siglip_large_patch16_384", "model_name is 'siglip_large"),
    "tile_tag": ("1D", "tile_tag is '1D'"),
    "global_view_pos": ("middle", "global_view_pos is 'middle'"),
    "language_config.n_group": (3, "in 3 groups, do not fit 64 experts"),
    "language_config.topk_group": (2, "of 2 in 1 groups"),
    "language_config.num_experts_per_tok": (65, "65 experts a token"),
    "language_config.n_routed_experts": (0, "n_routed_experts is 0"),
    "language_config.topk_method": ("random", "topk_method is 'random'"),
    "language_config.scoring_func": ("relu", "scoring_func is 'relu'"),
    "language_config.q_lora_rank": ("many", "q_lora_rank is 'many'"),
    "language_config.kv_lora_rank": (-1, "kv_lora_rank is -1"),
    "language_config.qk_rope_head_dim": (63, "heads of 63 values cannot be rotated in pairs"),
    "language_config.rope_scaling": ({"type": "linear", "factor": 2.0}, "type is 'linear'"),
    "language_config.attention_bias": (True, "attention_bias is True"),
    "language_config.moe_layer_freq": (0, "moe_layer_freq is 0"),
}


@pytest.mark.parametrize("key, value, words", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_official_configs(key, value, words, tmp_path):
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, "config.json", words)


@pytest.mark.parametrize("content, bad", [(TRANSFORMERS, BAD_TRANSFORMERS), (VL2_SMALL, BAD_VL2)], ids=["hf", "vl2"])
def test_bad_configs_of_the_other_layouts(content, bad, tmp_path):
    for i, (key, (value, words)) in enumerate(bad.items()):
        folder = config_folder(tmp_path / str(i), content, {key: value})
        check_refused(folder, "config.json", words, read=read_config)


def test_groups_must_hold_as_many_experts_as_a_token_wants(tmp_path):
    groups = {"topk_method": "group_limited_greedy", "n_group": 16, "topk_group": 1}  # 4 experts, where 6 are wanted
    changes = {f"language_config.{key}": value for key, value in groups.items()}
    folder = config_folder(tmp_path / "model", VL2_SMALL, changes)
    words = "6 experts a token, of 1 in 16 groups, do not fit 64 experts"
    check_refused(folder, "config.json", words, read=read_config)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("vl-siglip", "vision_config.params.width", 2**31 - 8),  # a product beyond 63 bits
        ("vl2-mla", "projector_config.downsample_ratio", 10**9),  # a size beyond them
    ],
)
def test_sizes_beyond_any_memory(name, key, value, tmp_path):
    folder = copy_checkpoint(name, tmp_path / "model")
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, "config.json: sizes too large for any memory")


BAD_FILES = {
    "broken": ("config.json", b"{", "not valid JSON"),
    "empty": ("config.json", b"", "not valid JSON"),
    "not text": ("config.json", b"\xff\xfe", "not valid JSON"),
    "too deep": ("config.json", b"[" * 100_000, "not valid JSON"),
    "a list": ("config.json", b"[]", "expected a JSON object, found a list"),
    "generation config broken": ("generation_config.json", b"{", "not valid JSON"),
    "end token as text": ("generation_config.json", b'{"eos_token_id": "end"}', "eos_token_id is 'end', expected"),
    "tokenizer broken": ("tokenizer.json", b"{", "not valid JSON"),
}


@pytest.mark.parametrize("name, content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_json(name, content, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    (folder / name).write_bytes(content)
    check_refused(folder, name, words)


def test_no_checkpoint_and_no_weights(tmp_path):
    no_config = "no such file, expected a checkpoint folder with a config.json"
    check_refused(tmp_path / "nowhere", no_config)
    check_refused(tmp_path, no_config)
    (tmp_path / "config.json").mkdir()
    check_refused(tmp_path, no_config)
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    check_refused(folder, "no weights, expected model.safetensors or pytorch_model.bin, or shards and an index")
    (folder / "model.safetensors").mkdir()
    check_refused(folder, "model.safetensors: no such file")


# ---------------------------------------------------------------------------- tensors

NORM = "language_model.model.norm.weight"  # float16 [64]
QKV = "vision_model.vision_tower.blocks.0.attn.qkv.weight"  # float16 [192, 64]

# Tensors changed, None taking one away: (changes, words).
WRONG_TENSORS = {
    "one missing": ({NORM: None}, f"missing tensor {NORM}, expected shape [64]"),
    "two missing": ({NORM: None, QKV: None}, f"missing tensor {NORM} and 1 more, expected shape [64]"),
    "one extra": ({"language_model.norm": torch.ones(2)}, "unexpected tensor language_model.norm, the model of"),
    "almost unused": ({"vision_model.layer_norm.bias": torch.ones(2)}, "unexpected tensor vision_model.layer_norm"),
    "longer": ({NORM: torch.ones(65)}, f"model.safetensors: tensor {NORM} has shape [65], config.json says [64]"),
    "transposed": ({QKV: torch.ones(64, 192)}, f"{QKV} has shape [64, 192], config.json says [192, 64]"),
    "one dimension more": ({NORM: torch.ones(1, 64)}, f"{NORM} has shape [1, 64], config.json says [64]"),
    "empty": ({NORM: torch.ones(0)}, f"{NORM} has shape [0], config.json says [64]"),
    "integers": ({NORM: torch.ones(64, dtype=torch.int16)}, f"{NORM} holds torch.int16, expected one of"),
    "eight bits": ({NORM: torch.ones(64).to(torch.float8_e4m3fn)}, f"{NORM} holds torch.float8_e4m3fn, expected"),
    "complex": ({NORM: torch.ones(64, dtype=torch.complex64)}, f"{NORM} holds torch.complex64, expected one of"),
}


@pytest.mark.parametrize("changes, words", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors(changes, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors") | changes
    write_weights(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_refused(folder, words)


LAYERS, EXPERTS = "language_model.model.layers", r"language.model.layers.1.mlp.experts"
OTHER_MODELS = {
    "a layer more": ("vl-siglip", f"{LLAMA}.num_hidden_layers", 4, f"missing tensor {LAYERS}.3.input_layernorm.weight"),
    "a layer less": (
        "vl-siglip", f"{LLAMA}.num_hidden_layers", 2, f"unexpected tensor {LAYERS}.2.input_layernorm.weight and 8 more",
    ),
    "fewer tokens": ("vl-siglip", f"{LLAMA}.vocab_size", 511, "has shape [512, 64], config.json says [511, 64]"),
    "fewer keys": (
        "vl-siglip", f"{LLAMA}.num_key_value_heads", 2, "k_proj.weight has shape [64, 64], config.json says [32, 64]",
    ),
    "more pixels": (
        "vl-siglip", "vision_config.params.image_size", 100,
        "pos_embed has shape [1, 576, 64], config.json says [1, 625, 64]",
    ),
    "an expert less": ("vl2-mla", f"{LLAMA}.n_routed_experts", 7, f"unexpected tensor {EXPERTS}.7.down_proj.weight"),
    "an expert more": ("vl2-mla", f"{LLAMA}.n_routed_experts", 9, f"missing tensor {EXPERTS}.8.down_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name, key, value, words", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_config_of_another_model(name, key, value, words, tmp_path):
    folder = copy_checkpoint(name, tmp_path / "model")
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, words)


# A change of a layer's weight `w` and scales `s` in 4 bits, and the words.
WRONG_QUANTIZED = {
    "no weight": (lambda tensors, w, s: {w: None}, "missing tensor"),
    "no scales": (lambda tensors, w, s: {s: None}, "has shape"),
    "both kinds": (lambda tensors, w, s: {w: torch.zeros(64, 64).char(), s: torch.ones(64)}, "has shape [64, 64]"),
    "floating weight": (lambda tensors, w, s: {w: tensors[w].float()}, "holds torch.float32, expected one of"),
    "whole scales": (lambda tensors, w, s: {s: tensors[s].int()}, "expected one of"),
    "too few scales": (lambda tensors, w, s: {s: tensors[s][:, :3].clone()}, "has shape"),
    "too few columns": (lambda tensors, w, s: {w: tensors[w][:, :5].clone()}, "has shape"),
    "width of no group": (
        lambda tensors, w, s: {name.replace("self_attn.q", "mlp.down"): tensors[name].clone() for name in (w, s)},
        "unexpected tensor",
    ),
}


def test_wrong_quantized_tensors(tmp_path):
    source = golden("vl-siglip").folder
    folder = tmp_path / "model"
    save_checkpoint(load_model(source, quantize="int4"), source, folder)
    tensors = read_tensors(folder / "model.safetensors")
    layer = f"{LAYERS}.1.self_attn.q_proj"
    for change, words in WRONG_QUANTIZED.values():
        changed = tensors | change(tensors, f"{layer}.weight", f"{layer}.scales")
        write_weights(folder, {name: tensor for name, tensor in changed.items() if tensor is not None})
        check_refused(folder, words, "layers.1")


# ---------------------------------------------------------------------------- safetensors


def edit_header(raw: bytes, tensor: str, **changes) -> bytes:
    """A safetensors file whose header says something else of one tensor; the data stays."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[tensor] |= changes
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :]


DAMAGED_BYTES = {
    "empty": lambda raw: b"",
    "a length alone": lambda raw: raw[:8],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-100],
    "longer than the header says": lambda raw: raw + bytes(100),
    "header beyond the file": lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
    "header beyond any file": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "header of no length": lambda raw: struct.pack("<Q", 0) + raw[8:],
    "header that is no JSON": lambda raw: struct.pack("<Q", 100) + b"{" * 200,
    "header that is no text": lambda raw: struct.pack("<Q", 100) + b"\xff" * 200,
    "header that is a list": lambda raw: struct.pack("<Q", 8) + b"[1, 2]  ",
    "header without a floor": lambda raw: struct.pack("<Q", 10**6) + b'{"a":' * 200_000,
    "offsets beyond the data": lambda raw: edit_header(raw, NORM, data_offsets=[10**9, 10**9 + 128]),
    "offsets of another tensor": lambda raw: edit_header(raw, NORM, data_offsets=[0, 128]),
    "offsets backwards": lambda raw: edit_header(raw, NORM, data_offsets=[128, 0]),
    "offsets below zero": lambda raw: edit_header(raw, NORM, data_offsets=[-128, 0]),
    "unknown dtype": lambda raw: edit_header(raw, NORM, dtype="F17"),
    "dtype of another width": lambda raw: edit_header(raw, NORM, dtype="F32"),
    "shape of other bytes": lambda raw: edit_header(raw, NORM, shape=[65]),
    "shape beyond any memory": lambda raw: edit_header(raw, NORM, shape=[2**62, 4, 64]),
    "shape below zero": lambda raw: edit_header(raw, NORM, shape=[-64]),
}


@pytest.mark.parametrize("damage", DAMAGED_BYTES.values(), ids=DAMAGED_BYTES)
def test_damaged_safetensors(damage, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    check_refused(folder, "model.safetensors: not a readable weight file (")


def test_an_edited_header_that_is_right_is_read(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(edit_header(file.read_bytes(), NORM, shape=[64], dtype="F16"))
    assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


@needs_proc
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_flipped_bits_are_refused_or_harmless(suffix, tmp_path):
    """100 damaged headers: a ValueError, or a model of the right shapes where the damage lies in unused parts."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    shapes = {name: tensor.shape for name, tensor in load_model(folder).state_dict().items()}
    write_weights(folder, read_tensors(folder / "model.safetensors"), suffix)
    (file,) = folder.glob(f"*.{suffix}")
    raw, rng, refused = file.read_bytes(), random.Random(0), 0
    header = 8 + struct.unpack("<Q", raw[:8])[0] if suffix == "safetensors" else 12_000
    before = private_bytes()
    for _ in range(100):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            model = load_model(folder)
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert refused > 50
    assert private_bytes() - before < 100 * 2**20


# ---------------------------------------------------------------------------- pickles


class RunsACommand:
    """Unpickled without care, this runs a command."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)


BAD_PICKLES = {
    "a list": (lambda tensors: list(tensors.values()), "expected a dict of tensors, found list"),
    "a dict inside": (lambda tensors: {"state_dict": tensors}, "'state_dict' is no ordinary tensor"),
    "a text": (lambda tensors: tensors | {"x": "ones"}, "'x' is no ordinary tensor"),
    "a number as a name": (lambda tensors: tensors | {3: torch.ones(3)}, "3 is no ordinary tensor with a name"),
    "a sparse tensor": (lambda tensors: tensors | {"x": torch.ones(3).to_sparse()}, "'x' is no ordinary tensor"),
    "no data": (lambda tensors: tensors | {"x": torch.ones(3, device="meta")}, "'x' is no ordinary tensor"),
    "a module": (lambda tensors: torch.nn.Linear(2, 2), "not a pickle of tensors alone"),
}


@pytest.mark.parametrize("change, words", BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_pickles_of_something_else(change, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    write_weights(folder, change(read_tensors(folder / "model.safetensors")), "bin")
    check_refused(folder, "pytorch_model.bin: not a readable weight file", words)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(zipped, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors, proof = read_tensors(folder / "model.safetensors"), tmp_path / "proof"
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors | {"x": RunsACommand(proof)}, file, _use_new_zipfile_serialization=zipped)
    check_refused(folder, "pytorch_model.bin: not a readable weight file (not a pickle of tensors alone)")
    assert not proof.exists()


@pytest.mark.parametrize("kept", [slice(0), slice(1000), slice(-1000), slice(1000, None)], ids=str)
def test_truncated_pickles(kept, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    write_weights(folder, read_tensors(folder / "model.safetensors"), "bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[kept])
    check_refused(folder, "pytorch_model.bin: not a readable weight file (")


# ---------------------------------------------------------------------------- indexes

INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"

# In the index's weight_map: (changes, words).
BAD_INDEXES = {
    "a missing shard": ({NORM: "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors: no such file"),
    "a tensor of another shard": ({NORM: SHARD}, f"{SHARD}: lacks tensor {NORM}, which {INDEX} promises"),
    "a tensor of no shard": ({"x": SHARD}, f"{SHARD}: lacks tensor x, which {INDEX} promises"),
    "a tensor left out": ({NORM: ABSENT}, f"holds tensor {NORM}, which {INDEX} does not list"),
    "a file outside": ({"x": "../x.safetensors"}, "x is said to be in '../x.safetensors', expected a file name"),
    "a file anywhere": ({"x": "/etc/passwd"}, "x is said to be in '/etc/passwd', expected a file name"),
    "the folder above": ({"x": ".."}, "no such file"),
    "a number": ({"x": 3}, "x is said to be in 3, expected a file name"),
}


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A checkpoint in two shards, NORM in the first of them."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, {NORM: tensors.pop(NORM)} | tensors, shards=2)
    return folder


@pytest.mark.parametrize("changes, words", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_bad_indexes(changes, words, sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"] | changes
    weight_map = {name: file for name, file in weight_map.items() if file is not ABSENT}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    check_refused(sharded, words)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "no weight_map, expected an object of tensor names and file names"),
        ('{"weight_map": []}', "weight_map: expected an object, found a list"),
    ],
)
def test_an_index_that_is_none(content, words, sharded):
    (sharded / INDEX).write_text(content)
    check_refused(sharded, INDEX, words)


def test_damaged_shards(sharded):
    expected = load_model(golden("vl-siglip").folder)
    raw = (sharded / SHARD).read_bytes()
    save_file(read_tensors(sharded / SHARD) | {NORM: torch.ones(3)}, sharded / SHARD)
    assert_same_weights(load_model(sharded), expected)  # in two shards, a tensor is that of the one in the index
    (sharded / SHARD).write_bytes(raw[:-1])
    check_refused(sharded, f"{SHARD}: not a readable weight file (")
