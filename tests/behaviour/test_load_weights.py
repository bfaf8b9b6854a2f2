"""Configs and weights of every layout: sizes, names, values, dtypes, memory, saving, and packing in bfloat16."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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
from conftest import (
    KINDS,
    ROOT,
    SMALL_SIGLIP,
    VL2_GOLDENS,
    VL_GOLDENS,
    assert_close,
    copy_checkpoint,
    golden,
    golden_model,
    random_batch,
    skip_unless_packable,
)
from small_vl2 import GROUP_LIMITED, SIGMOID, YARN
from torch import nn

from load_weights import (
    PackedLinear,
    check_new_folder,
    checkpoint_names,
    load_model,
    pack,
    read_config,
    read_layout_and_config,
    save_model,
)
from model import MODELS, ExpertsConfig, LanguageConfig, LatentConfig, YarnConfig
from processor import load_tokenizer
from vision import HybridConfig, SAMConfig, SigLIPConfig, TileConfig

GOLDENS = [*VL_GOLDENS, *VL2_GOLDENS]

# ---------------------------------------------------------------------------- configs


def test_sizes_beside_a_preset_override_it():
    siglip = SigLIPConfig(image_size=96, patch_size=4, width=64, layers=3, heads=4, mlp_width=256)
    sam = SAMConfig(
        image_size=256, width=48, layers=4, heads=4, mlp_width=192, global_layers=(1, 3), neck_channels=16,
        downsample_channels=(32, 64),
    )  # fmt: skip
    assert read_config(golden("vl-siglip").folder).vision == siglip
    assert read_config(golden("vl-hybrid").folder).vision == HybridConfig(siglip, sam)


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
LANGUAGE_CONFIGS = {  # what a language_config says: (its keys, what differs from the defaults)
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
    assert config.vision == MODELS["deepseek-vl-1.3b"].vision  # an official config that says nothing


@pytest.mark.parametrize("act, gelu", [("gelu", "exact"), ("gelu_pytorch_tanh", "tanh"), (ABSENT, "tanh")])
def test_transformers_configs(act, gelu, tmp_path):
    siglip = SMALL_SIGLIP if act is ABSENT else SMALL_SIGLIP | {"hidden_act": act}
    config = read_config(
        config_folder(tmp_path / "model", TRANSFORMERS | {"vision_config": siglip, "image_token_id": 9})
    )
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


def test_absent_keys_of_transformers_configs(tmp_path):
    empty = {"model_type": "deepseek_vl_hybrid", "tie_word_embeddings": False}
    config = read_config(config_folder(tmp_path / "model", empty))
    siglip = SigLIPConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, gelu="tanh")
    assert config.vision == HybridConfig(siglip, SAMConfig())
    assert config.language == LLAMA_DEFAULTS and config.image_token_id == 100015


VL2_VARIANTS = {
    "as released": ({}, MODELS["deepseek-vl2-small"].language),
    "DeepseekV2Config's defaults": (
        dict.fromkeys(VL2_SMALL["language_config"].keys() - {"hidden_size", "n_routed_experts"}, ABSENT),
        replace(
            LLAMA_DEFAULTS, vocab_size=102400, hidden_size=2048, num_hidden_layers=30, head_dim=64,
            latent=LatentConfig(q_lora_rank=1536),
            experts=ExpertsConfig(64, 0, 1, 1407, first_k_dense_replace=0),
        ),
    ),
    "q_lora_rank": ({"q_lora_rank": 96}, {"latent": LatentConfig(q_lora_rank=96)}),
    "plain attention": ({"use_mla": False}, {"latent": None}),
    "no experts": ({"n_routed_experts": None}, {"experts": None}),
    "groups": (GROUP_LIMITED, {"experts": replace(ExpertsConfig(), **GROUP_LIMITED)}),
    "sigmoid": (SIGMOID, {"experts": replace(ExpertsConfig(), **SIGMOID)}),
    "every other layer": (
        {"first_k_dense_replace": 2, "moe_layer_freq": 2},
        {"experts": replace(ExpertsConfig(), first_k_dense_replace=2, moe_layer_freq=2)},
    ),
    "yarn": ({"rope_scaling": {"type": "yarn", **asdict(YARN)}}, {"yarn": YARN}),
    "yarn's defaults": ({"rope_scaling": {"type": "yarn", "factor": 40}}, {"yarn": YarnConfig(40.0)}),
}  # fmt: skip


@pytest.mark.parametrize("changes, expected", VL2_VARIANTS.values(), ids=VL2_VARIANTS)
def test_vl2_language_configs(changes, expected, tmp_path):
    if isinstance(expected, dict):
        expected = replace(MODELS["deepseek-vl2-small"].language, **expected)
    changes = {f"language_config.{key}": value for key, value in changes.items()}
    assert read_config(config_folder(tmp_path / "model", VL2_SMALL, changes)).language == expected


def test_vl2_projector_config(tmp_path):
    assert read_config(config_folder(tmp_path / "released", VL2_SMALL)).tiles == TileConfig()
    changes = {"projector_config.mlp_ratio": 3, "projector_config.downsample_ratio": 3, "global_view_pos": "tail"}
    tiles = read_config(config_folder(tmp_path / "model", VL2_SMALL, changes)).tiles
    assert tiles == TileConfig(3, 3, global_view_first=False)


def test_end_and_image_tokens(tmp_path):
    """The tokenizer knows them; a generation_config.json knows better which tokens end an answer."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    end = tokenizer.token_to_id("<｜end▁of▁sentence｜>")
    assert read_config(folder).image_token_id == tokenizer.token_to_id("<image_placeholder>")
    assert read_config(folder).end_token_ids == (end,)
    for generation, ends in (("{}", (end,)), ('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [7, 8]}', (7, 8))):
        (folder / "generation_config.json").write_text(generation)
        assert read_config(folder).end_token_ids == ends


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", GOLDENS)
def test_every_tensor_is_a_parameter_under_the_name_of_the_table(name):
    """In float32, each value is the file's. What is left over is SigLIP's pooling head, of which nothing is read."""
    model, weights = golden_model(name)[0], read_tensors(golden(name).folder / "model.safetensors")
    layout, _ = read_layout_and_config(golden(name).folder)
    for ours, parameter in model.state_dict().items():
        (theirs,) = checkpoint_names(ours, layout.names)
        assert torch.equal(parameter, weights.pop(theirs).float())
    assert weights and all("attn_pool." in key or "_layer_norm." in key for key in weights)


@pytest.mark.parametrize("name", GOLDENS)
def test_unused_tensors_may_be_missing_and_weights_in_shards(name, tmp_path):
    folder, (model, _) = copy_checkpoint(name, tmp_path / "model"), golden_model(name)
    tensors = read_tensors(folder / "model.safetensors")
    tensors = {key: tensor for key, tensor in tensors.items() if "attn_pool." not in key and "_layer_norm." not in key}
    write_weights(folder, tensors, shards=3)
    again = load_model(folder, dtype=torch.float32)
    assert again.config == model.config and not again.training
    assert_same_weights(again, model)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    """By default the file's own, but float32 for a float16 file on a CPU."""
    folder = golden("vl-hybrid").folder
    model, stored = load_model(str(folder), dtype=dtype), load_model(folder, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert_same_weights(model, stored.to(dtype or torch.float32))


def test_a_file_of_mixed_dtypes_takes_the_embedding_s(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, {name: tensor.double() if "norm" in name else tensor for name, tensor in tensors.items()})
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


def test_a_dtype_that_is_no_float():
    with pytest.raises(ValueError, match="dtype is torch.int8, expected one of"):
        load_model(golden("vl-siglip").folder, dtype=torch.int8)


def test_progress_counts_up_to_one():
    shares = []
    load_model(golden("vl-siglip").folder, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_onto_another_device():
    folder = golden("vl-hybrid").folder
    model = load_model(folder, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert_same_weights(model.cpu(), load_model(folder))


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
    for era in ("model.vision_model.", "model.vision_model.vision_model."):
        tensors = read_tensors(tmp_path / "model.safetensors")
        prefix = r"^model\.vision_model\.(vision_model\.)?"
        write_weights(tmp_path, {re.sub(prefix, era, name): tensor for name, tensor in tensors.items()})
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
    write_weights(tmp_path, read_tensors(tmp_path / "model.safetensors") | {"lm_head.weight": head})
    for tie in (False, True):
        edit_json(tmp_path / "config.json", {"tie_word_embeddings": tie})
        assert torch.equal(load_model(tmp_path).lm_head.weight, head)


@pytest.mark.parametrize("suffix, shards", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3), ("old", 1)])
def test_files_and_shards(suffix, shards, tmp_path):
    """`old`: a pickle from before 2020."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    if suffix == "old":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        write_weights(folder, tensors, suffix, shards)
        assert len(list(folder.glob(f"*.{suffix}"))) == shards
    assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


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


@pytest.mark.parametrize("name", GOLDENS)
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
    saved = load_model(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert torch.equal(saved.lm_head.weight, pair.ours.lm_head.weight.half())


def test_what_cannot_be_saved(tmp_path):
    model = load_model(golden("vl-siglip").folder)
    folder = copy_checkpoint("vl-siglip", tmp_path / "other")
    before = (folder / "model.safetensors").read_bytes()
    edit_json(folder / "config.json", {"language_config.num_hidden_layers": 1})
    with pytest.raises(ValueError, match="describes another model"):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    for path, words in ((folder, "is there already"), (tmp_path / "nowhere" / "new", "in a folder that is there")):
        with pytest.raises(ValueError, match=words):
            check_new_folder(path)


# ---------------------------------------------------------------------------- memory


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


@needs_proc
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_at_the_file_s_dtype_nothing_is_copied(suffix, tmp_path):
    """Every parameter lies in the mapped file itself."""
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    write_weights(folder, read_tensors(folder / "model.safetensors"), suffix)
    model = load_model(folder, dtype=torch.float16)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f".{suffix}")]
    mapped = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines if str(folder) in line]
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in addresses for addresses in mapped), name


@needs_proc
def test_private_memory_while_loading(tmp_path):
    """Nothing at the file's own dtype; otherwise the model in its last form, and no more."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    vocabulary, slack = 2**19, 28 * 2**20
    edit_json(folder / "config.json", {"language_config.vocab_size": vocabulary})
    tensors = read_tensors(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.zeros(vocabulary, 64, dtype=torch.float16)
    write_weights(folder, tensors, shards=2)
    del tensors
    size = 4 * sum(parameter.numel() for parameter in load_model(folder, dtype=torch.float16).parameters())
    for options, expected in (
        ("dtype=torch.float16", 0),
        ("dtype=torch.float32", size),
        ("dtype=torch.bfloat16", size // 2),
        ("dtype=torch.bfloat16, quantize='int8'", size * 3 // 8),
        ("dtype=torch.bfloat16, quantize='int8', pack=True", size * 3 // 8),
    ):
        growth = growth_of_a_fresh_process(folder, options)
        assert expected - slack < growth < expected + slack, options


def growth_of_a_fresh_process(folder: Path, options: str) -> int:
    """Private bytes at their peak while a model is loaded, above what they were before."""
    script = f"""
import torch
from test_load_weights import MostPrivateBytes
from load_weights import load_model
with MostPrivateBytes() as measured:
    model = load_model({str(folder)!r}, {options})
print(measured.growth)
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    command = [sys.executable, "-c", script]
    return int(subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, check=True).stdout)


# ---------------------------------------------------------------------------- packing in bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_packing_leaves_float32_as_it_is(kind, small_pair):
    model = load_model(small_pair(kind).folder)
    before = list(model.modules())
    assert pack(model) is model
    assert all(old is new for old, new in zip(before, model.modules(), strict=True))


def test_packed_bfloat16(small_pair):
    """No worse than bfloat16's own rounding; packed from another dtype, it is that of the converted layer."""
    skip_unless_packable(nn.Linear(48, 80).bfloat16())
    for bias in (False, True):
        wide = nn.Linear(48, 80, bias)
        linear = nn.Linear(48, 80, bias).bfloat16()
        linear.load_state_dict(wide.state_dict())
        for shape in ((1, 48), (1, 1, 48), (2, 48), (3, 5, 48)):
            x = torch.randn(shape).bfloat16()
            exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
            tested = PackedLinear(linear)(x)
            assert_close(tested, exact, 2**-8)
            assert torch.equal(PackedLinear(wide)(x), tested)
    for kind in KINDS:
        folder, batch = small_pair(kind).folder, random_batch(kind)
        plain, model = (load_model(folder, dtype=torch.bfloat16) for _ in range(2))
        assert not any(type(module) is nn.Linear for module in pack(model).modules())
        assert_close(model(**batch).logits, plain(**batch).logits, 0.02)
        with pytest.raises(ValueError, match="save it before pack"):
            save_model(model, folder)
    latent = load_model(golden("vl2-mla").folder, dtype=torch.bfloat16, pack=True)
    plain = [name for name, module in latent.named_modules() if type(module) is nn.Linear]
    assert plain and all(name.endswith("kv_b_proj") for name in plain)
