"""Config and weights: every layout's names and sizes, loading without copies, and every kind of damage."""

import json
import os
import random
import re
import struct
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    SHARED,
    SMALL_LLAMA,
    SMALL_SAM,
    SMALL_SIGLIP,
    VL2_GOLDENS,
    VL_GOLDENS,
    copy_checkpoint,
    golden,
    needs_shared,
    skip_unless_packable,
)
from safetensors.torch import load, save_file

from load_weights import expected_tensors, load_model, read_config, read_layout_and_config, save_model
from model import DeepseekVL, LanguageConfig
from processor import load_tokenizer
from vision import HybridConfig, SAMConfig, SigLIPConfig

ABSENT = object()  # as a value: take the key away


def edit_json(file: Path, changes: dict) -> None:
    """Set keys of a JSON file, each written with dots: {"language_config.vocab_size": 7}."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *sections, key = path.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        if value is ABSENT:
            place.pop(key)
        else:
            place[key] = value
    file.write_text(json.dumps(content))


def config_folder(folder: Path, content: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, copied, so that the file may be written anew."""
    return load(file.read_bytes())


def check_refused(folder: Path, *words: str) -> None:
    """Loading fails with one ValueError of one line that holds all these words."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message, message
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------------------- the released checkpoints

SIGLIP_L = SigLIPConfig(image_size=384, patch_size=16, width=1024, layers=24, heads=16, mlp_width=4096, gelu="none")
SAM_B = SAMConfig(
    image_size=1024, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, window=14,
    global_layers=(2, 5, 8, 11), neck_channels=256, downsample_channels=(512, 1024),
)  # fmt: skip
LLAMA_1B = LanguageConfig(
    vocab_size=102400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128, max_position_embeddings=16384, rms_norm_eps=1e-6, rope_theta=10000.0,
)  # fmt: skip
LLAMA_7B = replace(
    LLAMA_1B, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32,
    num_key_value_heads=32,
)  # fmt: skip
# The 7B official config names neither width nor heads of its language model: they are LlamaConfig's defaults.
RELEASED = {
    "deepseek-vl-1.3b-chat": (SIGLIP_L, LLAMA_1B, None),
    "deepseek-vl-7b-chat": (HybridConfig(SIGLIP_L, SAM_B), LLAMA_7B, None),
    "deepseek-community--deepseek-vl-1.3b-chat": (SIGLIP_L, LLAMA_1B, 100015),
    "deepseek-community--deepseek-vl-7b-chat": (HybridConfig(SIGLIP_L, SAM_B), LLAMA_7B, 100015),
}
PARAMETERS = {  # without the unused ones, which make 1.98 billion of the first, and so on
    "deepseek-vl-1.3b-chat": 1_962_640_384,
    "deepseek-vl-7b-chat": 7_331_390_721,
    "deepseek-community--deepseek-vl-1.3b-chat": 1_962_640_384,
    "deepseek-community--deepseek-vl-7b-chat": 7_331_390_721,
    "deepseek-vl2-tiny": 3_355_263_088,
    "deepseek-vl2-small": 16_133_111_152,
    "deepseek-vl2": 27_464_895_896,
}
UNUSED = re.compile(r".*\.attn_pool\..*|vision_model\.(high|low)_layer_norm\..*|model\.(vision_model\.)+head\..*")


@needs_shared
@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name):
    config = read_config(SHARED / "checkpoints" / name)
    vision, language, image_token_id = RELEASED[name]
    assert config.vision == vision
    assert replace(config.language, tie_word_embeddings=False) == language
    assert config.image_token_id == image_token_id  # official configs leave it to the tokenizer


@needs_shared
@pytest.mark.parametrize("name", PARAMETERS)
def test_released_names_and_shapes(name):
    """One to one: what is in the files feeds every parameter, all of it, and nothing else is there."""
    folder = SHARED / "checkpoints" / name
    shapes = {name: tuple(shape) for name, shape in json.loads((folder / "names.json").read_text()).items()}
    layout, config = read_layout_and_config(folder)
    with torch.device("meta"):
        model = DeepseekVL(config)
    expected = expected_tensors(model, layout, set(shapes))

    assert {name: target.shape for name, target in expected.items()} == {
        name: shape for name, shape in shapes.items() if not UNUSED.fullmatch(name)
    }
    fed = dict.fromkeys(model.state_dict(), 0)
    for target in expected.values():
        fed[target.parameter] += torch.Size(target.shape).numel()
    assert fed == {name: parameter.numel() for name, parameter in model.state_dict().items()}
    assert sum(fed.values()) == PARAMETERS[name]


# ------------------------------------------------------------------------------- configs


@needs_shared
def test_sizes_beside_a_preset_override_it():
    siglip = SigLIPConfig(image_size=96, patch_size=4, width=64, layers=3, heads=4, mlp_width=256)
    sam = SAMConfig(
        image_size=256, width=48, layers=4, heads=4, mlp_width=192, global_layers=(1, 3), neck_channels=16,
        downsample_channels=(32, 64),
    )  # fmt: skip
    assert read_config(golden("vl-siglip").folder).vision == siglip
    assert read_config(golden("vl-hybrid").folder).vision == HybridConfig(siglip, sam)


@needs_shared
def test_pixel_norms_are_read(tmp_path):
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    params = "vision_config.params"
    changes = {f"{params}.low_res_cfg.pixel_mean": [0, 0.25, 1], f"{params}.high_res_cfg.pixel_std": [1, 2, 3]}
    edit_json(folder / "config.json", changes)
    vision = read_config(folder).vision
    assert (vision.low_norm.mean, vision.low_norm.std) == ((0, 0.25, 1), (0.5, 0.5, 0.5))
    assert (vision.high_norm.mean[0], vision.high_norm.std) == (0.48145466, (1, 2, 3))


LLAMA_DEFAULTS = LanguageConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0,
)  # fmt: skip


# What a language_config says: (its keys, what differs from the defaults).
LANGUAGE_CONFIGS = {
    "nothing": ({}, {}),
    "nulls": ({"hidden_size": None, "rope_parameters": None, "num_key_value_heads": None}, {}),
    "more heads": ({"num_attention_heads": 64}, dict(num_attention_heads=64, num_key_value_heads=64, head_dim=64)),
    "shared keys": ({"num_key_value_heads": 8}, {"num_key_value_heads": 8}),
    "own head width": ({"head_dim": 64}, {"head_dim": 64}),
    "older rope": ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
    "newer rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 500000.0}),
    "tied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("language, expected", LANGUAGE_CONFIGS.values(), ids=LANGUAGE_CONFIGS)
def test_absent_keys_are_llama_defaults(language, expected, tmp_path):
    content = {"model_type": "multi_modality", "language_config": language}
    config = read_config(config_folder(tmp_path / "model", content))
    assert config.language == replace(LLAMA_DEFAULTS, **expected)
    assert config.vision == SIGLIP_L  # an official config that says nothing


TRANSFORMERS = {
    "model_type": "deepseek_vl_hybrid",
    "vision_config": SMALL_SIGLIP,
    "high_res_vision_config": SMALL_SAM,
    "text_config": SMALL_LLAMA,
}


@pytest.mark.parametrize("act, gelu", [("gelu", "none"), ("gelu_pytorch_tanh", "tanh"), (ABSENT, "tanh")])
def test_transformers_configs(act, gelu, tmp_path):
    siglip = SMALL_SIGLIP if act is ABSENT else SMALL_SIGLIP | {"hidden_act": act}
    folder = config_folder(tmp_path / "model", TRANSFORMERS | {"vision_config": siglip, "image_token_id": 9})
    config = read_config(folder)
    assert config.vision.low == SigLIPConfig(
        image_size=26, patch_size=4, width=32, layers=2, heads=4, mlp_width=48, gelu=gelu
    )
    assert config.vision.high == SAMConfig(
        image_size=80, patch_size=8, width=24, layers=3, heads=3, mlp_width=40, window=4, global_layers=(1, 2),
        neck_channels=8, downsample_channels=(16, 32),
    )  # fmt: skip
    assert (config.language.num_key_value_heads, config.language.head_dim, config.language.rope_theta) == (2, 16, 500.0)
    assert config.language.tie_word_embeddings  # transformers' default for these models, where the file says nothing
    assert config.image_token_id == 9


@needs_shared
def test_end_and_image_tokens(tmp_path):
    """The tokenizer knows them; a generation_config.json knows better which tokens end an answer."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    end = tokenizer.token_to_id("<｜end▁of▁sentence｜>")
    assert read_config(folder).image_token_id == tokenizer.token_to_id("<image_placeholder>")
    assert read_config(folder).end_token_ids == (end,)
    for generation, ends in (({}, (end,)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": [7, 8]}, (7, 8))):
        (folder / "generation_config.json").write_text(json.dumps(generation))
        assert read_config(folder).end_token_ids == ends


LLAMA, PROJECTOR = "language_config", "aligner_config.params"
SIGLIP, SAM = "vision_config.params.low_res_cfg", "vision_config.params.high_res_cfg"

# What the config of vl-hybrid says: (key, value, words of the message).
BAD_CONFIGS = {
    "no model type": ("model_type", ABSENT, "model_type is None, expected one of multi_modality"),
    "unknown model type": ("model_type", "llava", "model_type is 'llava', expected one of multi_modality"),
    "model type of a wrong type": ("model_type", ["llava"], "model_type is ['llava'], expected one of"),
    "section of a wrong type": (LLAMA, [1], "language_config: expected an object, found list"),
    "unknown tower": ("vision_config.cls", "ViT", "cls is 'ViT', only 'CLIPVisionTower' or 'HybridVisionTower'"),
    "unknown SigLIP": (f"{SIGLIP}.model_name", "vit_h", "model_name is 'vit_h', only 'siglip_large_patch16_384'"),
    "unknown SAM": (f"{SAM}.model_name", "sam_h", "model_name is 'sam_h', only 'sam_b_downsample'"),
    "features of another layer": (f"{SIGLIP}.select_layer", -2, "select_layer is -2, only -1 is supported"),
    "unknown projector": (f"{PROJECTOR}.projector_type", "linear", "projector_type is 'linear', only 'low_high_hybrid"),
    "projector of the 1.3B": (f"{PROJECTOR}.projector_type", "mlp_gelu", "projector_type is 'mlp_gelu', only 'low_"),
    "deeper projector": (f"{PROJECTOR}.depth", 3, "depth is 3, only 2 is supported"),
    "stretched rope": (f"{LLAMA}.rope_scaling", {"type": "linear"}, "rope_scaling is {'type': 'linear'}, only None"),
    "another rope": (f"{LLAMA}.rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn', only 'default'"),
    "biases": (f"{LLAMA}.attention_bias", True, "attention_bias is True, only False is supported"),
    "another activation": (f"{LLAMA}.hidden_act", "gelu", "hidden_act is 'gelu', only 'silu' is supported"),
    "no truth": (f"{LLAMA}.tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', only False or True"),
    "negative size": (f"{LLAMA}.vocab_size", -5, "vocab_size is -5, expected an integer above 0"),
    "no layers": (f"{LLAMA}.num_hidden_layers", 0, "num_hidden_layers is 0, expected an integer above 0"),
    "size as text": (f"{LLAMA}.hidden_size", "64", "hidden_size is '64', expected an integer above 0"),
    "size with a fraction": (f"{LLAMA}.hidden_size", 64.0, "hidden_size is 64.0, expected an integer above 0"),
    "size as a truth": (f"{SIGLIP}.layers", True, "layers is True, expected an integer above 0"),
    "not a number": (f"{LLAMA}.rope_theta", float("nan"), "rope_theta is nan, expected a number above 0"),
    "infinite": (f"{SIGLIP}.mlp_ratio", float("inf"), "mlp_ratio is inf, expected a number above 0"),
    "beyond any number": (f"{LLAMA}.rope_theta", 10**400, "rope_theta is 1000000"),
    "beyond any patience": (f"{LLAMA}.num_hidden_layers", 2**30, "1073741824 layers or experts, expected at most"),
    "uneven vision heads": (f"{SIGLIP}.heads", 5, "vision width 64 is no multiple of 5 heads"),
    "patch beyond the image": (f"{SIGLIP}.patch_size", 97, "a 96 pixel image holds no 97 pixel patch"),
    "uneven key heads": (f"{LLAMA}.num_key_value_heads", 3, "4 attention heads cannot share 3 key/value heads evenly"),
    "odd heads": (f"{LLAMA}.head_dim", 15, "heads of 15 values cannot be rotated in pairs"),
    "more heads than width": (f"{LLAMA}.num_attention_heads", 100, "heads of 0 values cannot be rotated in pairs"),
    "layer beyond the last": (f"{SAM}.global_attn_indexes", [1, 4], "global_attn_indexes do not fit 4 SAM layers"),
    "no global layer": (f"{SAM}.global_attn_indexes", [], "global_attn_indexes do not fit 4 SAM layers"),
    "negative layer": (f"{SAM}.global_attn_indexes", [-1], "global_attn_indexes[0] is -1, expected an integer of 0 or"),
    "layers as text": (f"{SAM}.global_attn_indexes", "1, 3", "global_attn_indexes is '1, 3', expected a list of some"),
    "channels missing": (f"{SAM}.downsample_channels", [32], "downsample_channels is [32], expected a list of 2"),
    "grey mean": (f"{SAM}.pixel_mean", [0.5], "pixel_mean is [0.5], expected a list of 3 numbers"),
    "mean as text": (f"{SAM}.pixel_mean", ["a", "b", "c"], "pixel_mean[0] is 'a', expected a number of 0.0 or more"),
    "std of zero": (f"{SAM}.pixel_std", [0, 1, 1], "pixel_std[0] is 0, expected a number above 0"),
}


@needs_shared
@pytest.mark.parametrize("key, value, words", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(key, value, words, tmp_path):
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, "config.json", words)


@needs_shared
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


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("vision_config.model_type", "clip", "model_type is 'clip', only 'siglip_vision_model'"),
        ("vision_config.hidden_act", "relu", "hidden_act is 'relu', only 'gelu_pytorch_tanh' or 'gelu'"),
        ("high_res_vision_config.use_rel_pos", False, "use_rel_pos is False, only True is supported"),
        ("high_res_vision_config.mlp_dim", -1, "mlp_dim is -1, expected an integer above 0"),
        ("text_config.model_type", "qwen2", "model_type is 'qwen2', only 'llama'"),
        ("text_config", 3, "text_config: expected an object, found int"),
        ("tie_word_embeddings", 3, "tie_word_embeddings is 3, only True or False"),
        ("image_token_id", -3, "image_token_id is -3, expected an integer above 0"),
    ],
)
def test_bad_transformers_configs(key, value, words, tmp_path):
    folder = config_folder(tmp_path / "model", TRANSFORMERS)
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, "config.json", words)


BAD_FILES = {
    "broken": ("config.json", "{", "not valid JSON"),
    "empty": ("config.json", "", "not valid JSON"),
    "not text": ("config.json", b"\xff\xfe", "not valid JSON"),
    "too deep": ("config.json", "[" * 100_000, "not valid JSON"),
    "a list": ("config.json", "[]", "expected a JSON object, found a list"),
    "generation config broken": ("generation_config.json", "{", "not valid JSON"),
    "end token as text": ("generation_config.json", '{"eos_token_id": "end"}', "eos_token_id is ['end'], expected"),
    "tokenizer broken": ("tokenizer.json", "{", "not valid JSON"),
}


@needs_shared
@pytest.mark.parametrize("name, content, words", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_json(name, content, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(folder, name, words)


def test_no_checkpoint(tmp_path):
    check_refused(tmp_path / "nowhere", "no such file, expected a checkpoint folder with a config.json")
    check_refused(tmp_path, "no such file, expected a checkpoint folder with a config.json")
    (tmp_path / "config.json").mkdir()
    check_refused(tmp_path, "no such file, expected a checkpoint folder with a config.json")


# ------------------------------------------------------------------------------- loading

# Parameter of the model: tensor of the file. A sample; the parity tests exercise all of them.
OFFICIAL_SAMPLE = {
    "vision.low.pos_embed": "vision_model.vision_tower_low.vision_tower.pos_embed",
    "vision.low.blocks.2.attn.qkv.bias": "vision_model.vision_tower_low.vision_tower.blocks.2.attn.qkv.bias",
    "vision.high.hd_alpha_downsamples": "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples",
    "aligner.high_proj.weight": "aligner.high_up_proj.weight",
    "aligner.low_proj.weight": "aligner.low_up_proj.weight",
    "aligner.proj.bias": "aligner.layers.1.bias",
    "language.embed_tokens.weight": "language_model.model.embed_tokens.weight",
    "language.layers.1.mlp.down_proj.weight": "language_model.model.layers.1.mlp.down_proj.weight",
    "lm_head.weight": "language_model.lm_head.weight",
}
FLOATS = [None, torch.float16, torch.bfloat16, torch.float32]


@needs_shared
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_dtype(dtype):
    """Each value is the file's, converted; by default in the file's own dtype, float16."""
    folder = golden("vl-hybrid").folder
    model = load_model(str(folder), dtype=dtype)
    stored, parameters = read_tensors(folder / "model.safetensors"), dict(model.named_parameters())
    assert not model.training
    assert {parameter.dtype for parameter in parameters.values()} == {dtype or torch.float16}
    for ours, theirs in OFFICIAL_SAMPLE.items():
        assert torch.equal(parameters[ours], stored[theirs].to(dtype or torch.float16))


@needs_shared
def test_a_file_of_mixed_dtypes_takes_the_embedding_s(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    tensors = {name: tensor.double() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float16}


@needs_shared
def test_progress_counts_up_to_one():
    shares = []
    model = load_model(golden("vl-siglip").folder, progress=shares.append)
    count = len(model.state_dict())
    assert shares == [i / count for i in range(1, count + 1)]


@needs_shared
def test_a_dtype_that_is_no_float():
    with pytest.raises(ValueError, match="dtype is torch.int8, expected one of"):
        load_model(golden("vl-siglip").folder, dtype=torch.int8)


@needs_shared
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_onto_another_device():
    folder = golden("vl-hybrid").folder
    model = load_model(folder, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert_same_weights(model.cpu(), load_model(folder))


def rename(file: Path, old: str, new: str) -> None:
    save_file({re.sub(old, new, name): tensor for name, tensor in read_tensors(file).items()}, file)


def assert_same_weights(tested: DeepseekVL, expected: DeepseekVL) -> None:
    tested, expected = tested.state_dict(), expected.state_dict()
    assert tested.keys() == expected.keys()
    assert all(torch.equal(tested[name], expected[name]) for name in expected)


def test_transformers_files(small_pair, tmp_path):
    """Separate q, k and v become one tensor, in this order; both eras of the vision model's names are read."""
    pair = small_pair("hybrid")
    theirs, ours = pair.theirs.model, pair.ours
    layer, block = theirs.vision_model.encoder.layers[1], ours.vision.low.blocks[1]
    for kind in ("weight", "bias"):
        parts = [getattr(getattr(layer.self_attn, f"{letter}_proj"), kind) for letter in "qkv"]
        assert torch.equal(getattr(block.attn.qkv, kind), torch.cat(parts))
    assert torch.equal(block.norm2.weight, layer.layer_norm2.weight)
    assert torch.equal(ours.vision.low.pos_embed[0], theirs.vision_model.embeddings.position_embedding.weight)
    assert torch.equal(ours.vision.high.neck_hd[1].bias, theirs.high_res_vision_neck.layer_norm1.bias)
    assert torch.equal(ours.vision.high.neck[2].weight, theirs.high_res_vision_model.vision_encoder.neck.conv2.weight)
    assert torch.equal(ours.aligner.low_proj.weight, theirs.aligner.vision_proj.weight)
    assert torch.equal(ours.lm_head.weight, pair.theirs.lm_head.weight)

    pair.theirs.save_pretrained(tmp_path)
    prefix = r"^model\.vision_model\.(vision_model\.)?"
    for era in ("model.vision_model.", "model.vision_model.vision_model."):
        rename(tmp_path / "model.safetensors", prefix, era)
        assert_same_weights(load_model(tmp_path), ours)


def test_a_tied_head(small_pair, tmp_path):
    """Tied files leave the head out, and then it is the embedding; a head that is there is its own tensor."""
    pair = small_pair("siglip", tie=True)
    assert "lm_head.weight" not in read_tensors(pair.folder / "model.safetensors")
    assert pair.ours.lm_head.weight is pair.ours.language.embed_tokens.weight

    pair.theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"tie_word_embeddings": False})
    check_refused(tmp_path, "missing tensor lm_head.weight, expected shape [120, 48]")

    head = torch.randn_like(pair.ours.lm_head.weight)
    save_file(read_tensors(tmp_path / "model.safetensors") | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    for tie in (False, True):
        edit_json(tmp_path / "config.json", {"tie_word_embeddings": tie})
        assert torch.equal(load_model(tmp_path).lm_head.weight, head)


# ---------------------------------------------------------------------------- saving


def check_saving(folder: Path, fresh: Path) -> None:
    """What is saved holds the tensors that were loaded, bit for bit, and nothing but that one file is written."""
    model, before = load_model(folder), read_tensors(folder / "model.safetensors")
    fresh.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json" or file.name == "tokenizer.model":
            (fresh / file.name).write_bytes(file.read_bytes())
    there = {file.name for file in fresh.iterdir()}
    save_model(model, fresh)
    assert {file.name for file in fresh.iterdir()} == there | {"model.safetensors"}
    saved = read_tensors(fresh / "model.safetensors")
    assert saved and all(torch.equal(saved[name], before[name]) for name in saved)
    assert_same_weights(load_model(fresh), model)


@needs_shared
@pytest.mark.parametrize("name", [*VL_GOLDENS, *VL2_GOLDENS])
def test_saving_the_official_layouts(name, tmp_path):
    check_saving(golden(name).folder, tmp_path / "saved")


@pytest.mark.parametrize("kind, tie", [("siglip", False), ("siglip", True), ("hybrid", False)])
def test_saving_transformers_layout(kind, tie, small_pair, tmp_path):
    """Queries, keys and values apart again, and a tied head left out."""
    check_saving(small_pair(kind, tie=tie).folder, tmp_path / "saved")


def test_saving_in_another_dtype(small_pair, tmp_path):
    pair = small_pair("siglip")
    pair.theirs.save_pretrained(tmp_path)
    save_model(pair.ours, tmp_path, torch.float16)  # over an older file
    saved = load_model(tmp_path)
    assert saved.dtype == torch.float16
    assert torch.equal(saved.lm_head.weight, pair.ours.lm_head.weight.half())


def test_what_cannot_be_saved(small_pair, tmp_path):
    pair = small_pair("siglip")
    folder = config_folder(tmp_path / "other", json.loads((pair.folder / "config.json").read_text()))
    edit_json(folder / "config.json", {"text_config.num_hidden_layers": 1})
    with pytest.raises(ValueError, match="describes another model"):
        save_model(pair.ours, folder)
    packed = load_model(pair.folder, dtype=torch.bfloat16)
    skip_unless_packable(packed.lm_head)
    with pytest.raises(ValueError, match="save it before pack"):
        save_model(packed.pack(), folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]


def write_weights(folder: Path, tensors: dict, suffix: str, shards: int = 1) -> None:
    """Replace a folder's weights: safetensors or bin, whole or in shards with an index."""
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[suffix]
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        part = dict(list(tensors.items())[i::shards])
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@needs_shared
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_files_and_shards(suffix, shards, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    expected = load_model(golden("vl-siglip").folder)
    write_weights(folder, read_tensors(folder / "model.safetensors"), suffix, shards)
    assert len(list(folder.glob(f"*.{suffix}"))) == shards
    assert_same_weights(load_model(folder), expected)


@needs_shared
def test_a_pickle_of_the_older_format(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    expected = load_model(golden("vl-siglip").folder)
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load_model(folder), expected)


# ------------------------------------------------------------------------------- memory

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


def private_bytes() -> int:
    """Memory of this process that no file backs: what the system cannot drop."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", status)[1])


class MostPrivateBytes:
    """By how much private memory grew at most inside a `with` block, looked at every millisecond."""

    def __enter__(self):
        self.start = self.most = private_bytes()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.done.wait(0.001):
            self.most = max(self.most, private_bytes())

    def __exit__(self, *_):
        self.done.set()
        self.watcher.join()
        self.growth = max(self.most, private_bytes()) - self.start


@needs_shared
@needs_proc
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_at_the_file_s_dtype_nothing_is_copied(suffix, tmp_path):
    """Every parameter lies in the mapped file itself."""
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    write_weights(folder, read_tensors(folder / "model.safetensors"), suffix)
    model = load_model(folder)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f".{suffix}")]
    mapped = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines if str(folder) in line]
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in addresses for addresses in mapped), name


@needs_shared
@needs_proc
def test_private_memory_while_loading(tmp_path):
    """Nothing at the file's own dtype; otherwise the converted model, and no more."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    vocabulary, slack = 2**19, 20 * 2**20
    edit_json(folder / "config.json", {"language_config.vocab_size": vocabulary})
    tensors = read_tensors(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.zeros(vocabulary, 64, dtype=torch.float16)
    write_weights(folder, tensors, "safetensors", shards=2)
    del tensors
    with MostPrivateBytes() as as_stored:
        model = load_model(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 128 * 2**20
    assert as_stored.growth < slack
    del model
    with MostPrivateBytes() as converted:
        load_model(folder, dtype=torch.bfloat16)
    assert size - slack < converted.growth < size + slack


# ------------------------------------------------------------------------------- damaged weights

NORM = "language_model.model.norm.weight"  # float16 [64]
QKV = "vision_model.vision_tower.blocks.0.attn.qkv.weight"  # float16 [192, 64]

# What happened to the tensors: (tensors changed, None taking one away; words).
DAMAGED_TENSORS = {
    "one missing": ({NORM: None}, [f"missing tensor {NORM}, expected shape [64]"]),
    "two missing": ({NORM: None, QKV: None}, [f"missing tensor {NORM} and 1 more, expected shape [64]"]),
    "one extra": ({"language_model.norm": torch.ones(2)}, ["unexpected tensor language_model.norm, the model of"]),
    "almost unused": ({"vision_model.layer_norm.bias": torch.ones(2)}, ["unexpected tensor vision_model.layer_norm"]),
    "longer": ({NORM: torch.ones(65)}, ["model.safetensors", f"{NORM} has shape [65], config.json says [64]"]),
    "transposed": ({QKV: torch.ones(64, 192)}, [f"{QKV} has shape [64, 192], config.json says [192, 64]"]),
    "one dimension more": ({NORM: torch.ones(1, 64)}, [f"{NORM} has shape [1, 64], config.json says [64]"]),
    "empty": ({NORM: torch.ones(0)}, [f"{NORM} has shape [0], config.json says [64]"]),
    "integers": ({NORM: torch.ones(64, dtype=torch.int16)}, [f"{NORM} holds torch.int16, expected one of"]),
    "eight bits": ({NORM: torch.ones(64).to(torch.float8_e4m3fn)}, [f"{NORM} holds torch.float8_e4m3fn, expected"]),
    "complex": ({NORM: torch.ones(64, dtype=torch.complex64)}, [f"{NORM} holds torch.complex64, expected one of"]),
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("changes, words", DAMAGED_TENSORS.values(), ids=DAMAGED_TENSORS)
def test_wrong_tensors(changes, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    check_refused(folder, *words)


@needs_shared
@pytest.mark.parametrize(
    "key, value, words",
    [
        (f"{LLAMA}.num_hidden_layers", 4, "missing tensor LAYERS.3.input_layernorm.weight and 8 more, expected shape"),
        (f"{LLAMA}.num_hidden_layers", 2, "unexpected tensor LAYERS.2.input_layernorm.weight and 8 more, the model of"),
        (f"{LLAMA}.vocab_size", 511, "has shape [512, 64], config.json says [511, 64]"),
        (f"{LLAMA}.num_key_value_heads", 2, "k_proj.weight has shape [64, 64], config.json says [32, 64]"),
        ("vision_config.params.image_size", 100, "pos_embed has shape [1, 576, 64], config.json says [1, 625, 64]"),
    ],
)
def test_a_config_of_another_model(key, value, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    edit_json(folder / "config.json", {key: value})
    check_refused(folder, words.replace("LAYERS", "language_model.model.layers"))


@needs_shared
@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_unused_tensors_may_be_missing_or_there(name, tmp_path):
    folder = copy_checkpoint(name, tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    unused = [name for name in tensors if UNUSED.fullmatch(name)]
    assert unused
    expected = load_model(golden(name).folder)
    save_file({name: tensor for name, tensor in tensors.items() if name not in unused}, folder / "model.safetensors")
    assert_same_weights(load_model(folder), expected)


def edit_header(raw: bytes, tensor: str, **changes) -> bytes:
    """A safetensors file whose header tells something else of one tensor; the data stays."""
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


@needs_shared
@pytest.mark.parametrize("damage", DAMAGED_BYTES.values(), ids=DAMAGED_BYTES)
def test_damaged_safetensors(damage, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    check_refused(folder, "model.safetensors: not a readable weight file (")


@needs_shared
def test_a_header_that_tells_the_truth_is_read(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(edit_header(file.read_bytes(), NORM, shape=[64], dtype="F16"))
    assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


@needs_shared
@needs_proc
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_flipped_bits_are_refused_or_harmless(suffix, tmp_path):
    """200 damaged headers: a ValueError, or a model of the right shapes where the damage lies in unused parts."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    shapes = {name: tensor.shape for name, tensor in load_model(folder).state_dict().items()}
    write_weights(folder, read_tensors(folder / "model.safetensors"), suffix)
    (file,) = folder.glob(f"*.{suffix}")
    raw, rng, refused = file.read_bytes(), random.Random(0), 0
    header = 8 + struct.unpack("<Q", raw[:8])[0] if suffix == "safetensors" else 12_000
    before = private_bytes()
    for _ in range(200):
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
    assert refused > 100
    assert private_bytes() - before < 100 * 2**20


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


@needs_shared
@pytest.mark.parametrize("change, words", BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_pickles_of_something_else(change, words, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    write_weights(folder, change(read_tensors(folder / "model.safetensors")), "bin")
    check_refused(folder, "pytorch_model.bin: not a readable weight file", words)


@needs_shared
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(zipped, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors, proof = read_tensors(folder / "model.safetensors"), tmp_path / "proof"
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(tensors | {"x": RunsACommand(proof)}, file, _use_new_zipfile_serialization=zipped)
    check_refused(folder, "pytorch_model.bin: not a readable weight file (not a pickle of tensors alone)")
    assert not proof.exists()


@needs_shared
@pytest.mark.parametrize("kept", [slice(0), slice(1000), slice(-1000), slice(1000, None)], ids=str)
def test_truncated_pickles(kept, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    write_weights(folder, read_tensors(folder / "model.safetensors"), "bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[kept])
    check_refused(folder, "pytorch_model.bin: not a readable weight file (")


@needs_shared
def test_no_weights(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    check_refused(folder, "no weights, expected model.safetensors or pytorch_model.bin, or shards and an index")
    (folder / "model.safetensors").mkdir()
    check_refused(folder, "model.safetensors: no such file")


# What an index says: (change of its weight_map, words).
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
BAD_INDEXES = {
    "a missing shard": ({NORM: "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors: no such file"),
    "a tensor of another shard": ({NORM: SHARD}, f"{SHARD}: lacks tensor {NORM}, which {INDEX} promises"),
    "a tensor of no shard": ({"x": SHARD}, f"{SHARD}: lacks tensor x, which {INDEX} promises"),
    "a tensor left out": ({NORM: ABSENT}, f"holds tensor {NORM}, which {INDEX} does not list"),
    "a file outside": ({"x": "../x.safetensors"}, "x is said to be in '../x.safetensors', expected a file name"),
    "a file anywhere": ({"x": "/etc/passwd"}, "x is said to be in '/etc/passwd', expected a file name"),
    "the folder above": ({"x": ".."}, "no such file"),
    "a number": ({"x": 3}, "x is said to be in 3, expected a file name"),
}  # fmt: skip


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A checkpoint in two shards, NORM in the first of them."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, {NORM: tensors.pop(NORM)} | tensors, "safetensors", shards=2)
    return folder


@needs_shared
@pytest.mark.parametrize("changes, words", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_bad_indexes(changes, words, sharded):
    index = sharded / INDEX
    weight_map = json.loads(index.read_text())["weight_map"] | changes
    weight_map = {name: file for name, file in weight_map.items() if file is not ABSENT}
    index.write_text(json.dumps({"weight_map": weight_map}))
    check_refused(sharded, words)


@needs_shared
@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("{}", "no weight_map, expected an object of tensor names and file names"),
        ('{"weight_map": []}', "weight_map: expected an object, found list"),
    ],
)
def test_an_index_that_is_none(content, words, sharded):
    (sharded / INDEX).write_text(content)
    check_refused(sharded, INDEX, words)


@needs_shared
def test_a_truncated_shard(sharded):
    (sharded / SHARD).write_bytes((sharded / SHARD).read_bytes()[:-1])
    check_refused(sharded, f"{SHARD}: not a readable weight file (")


@needs_shared
def test_a_tensor_in_two_shards_is_that_of_the_index(sharded):
    expected = load_model(golden("vl-siglip").folder)
    save_file(read_tensors(sharded / SHARD) | {NORM: torch.ones(3)}, sharded / SHARD)
    assert_same_weights(load_model(sharded), expected)
