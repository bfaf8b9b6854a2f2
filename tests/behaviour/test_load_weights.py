"""Configs and weights of every layout: sizes, names, values, dtypes, memory, saving, and packing."""

import copy
import json
import os
import re
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
    read_tensors,
    write_weights,
)
from conftest import GOLDENS, KINDS, ROOT, assert_close, copy_checkpoint, golden, golden_model, random_batch, run
from small_vl2 import GROUP_LIMITED, SIGMOID, YARN
from torch import nn

from load_weights import (
    HalfLinear,
    PackedLinear,
    agrees,
    checkpoint_names,
    load_model,
    pack,
    packed,
    read_config,
    read_layout_and_config,
    save_model,
)
from model import MODELS, DeepseekVL, ExpertsConfig, LanguageConfig, LatentConfig, YarnConfig
from processor import load_tokenizer
from vision import HybridConfig, SAMConfig, SigLIPConfig, TileConfig

# ---------------------------------------------------------------------------- configs


def test_official_vision_configs(tmp_path):
    """Sizes beside a preset override it."""
    siglip = SigLIPConfig(image_size=96, patch_size=4, width=64, layers=3, heads=4, mlp_width=256)
    sam = SAMConfig(256, width=48, layers=4, heads=4, mlp_width=192, global_layers=(1, 3), neck_channels=16,
                    downsample_channels=(32, 64))  # fmt: skip
    assert read_config(golden("vl-siglip").folder).vision == siglip
    assert read_config(golden("vl-hybrid").folder).vision == HybridConfig(siglip, sam)
    params = "vision_config.params"
    changes = {f"{params}.low_res_cfg.pixel_mean": [0, 0.25, 1], f"{params}.high_res_cfg.pixel_std": [1, 2, 3]}
    content = json.loads((golden("vl-hybrid").folder / "config.json").read_text())
    vision = read_config(config_folder(tmp_path / "model", content, changes)).vision
    assert (vision.low_norm.mean, vision.low_norm.std) == ((0, 0.25, 1), (0.5, 0.5, 0.5))
    assert (vision.high_norm.mean[0], vision.high_norm.std) == (0.48145466, (1, 2, 3))


LLAMA_DEFAULTS = LanguageConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0,
)  # fmt: skip
VL2_DEFAULTS = replace(  # DeepseekV2Config's
    LLAMA_DEFAULTS, vocab_size=102400, hidden_size=2048, num_hidden_layers=30, head_dim=64,
    latent=LatentConfig(q_lora_rank=1536), experts=ExpertsConfig(64, 0, 1, 1407, first_k_dense_replace=0),
)  # fmt: skip
OFFICIAL = {"model_type": "multi_modality", "language_config": {}}
SMALL, EXPERTS = MODELS["deepseek-vl2-small"].language, ExpertsConfig()
NULLS = dict.fromkeys(("hidden_size", "rope_parameters", "num_key_value_heads"))
LANGUAGE_CONFIGS = {  # a config, changes of its language_config, what is read, what differs from it
    "nothing": (OFFICIAL, {}, LLAMA_DEFAULTS, {}),
    "nulls": (OFFICIAL, NULLS, LLAMA_DEFAULTS, {}),
    "more heads": (OFFICIAL, {"num_attention_heads": 64}, LLAMA_DEFAULTS,
                   dict(num_attention_heads=64, num_key_value_heads=64, head_dim=64)),
    "shared keys": (OFFICIAL, {"num_key_value_heads": 8}, LLAMA_DEFAULTS, {"num_key_value_heads": 8}),
    "own head width": (OFFICIAL, {"head_dim": 64}, LLAMA_DEFAULTS, {"head_dim": 64}),
    "older rope": (OFFICIAL, {"rope_theta": 500000}, LLAMA_DEFAULTS, {"rope_theta": 500000.0}),
    "newer rope": (OFFICIAL, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, LLAMA_DEFAULTS,
                   {"rope_theta": 500000.0}),
    "tied": (OFFICIAL, {"tie_word_embeddings": True}, LLAMA_DEFAULTS, {"tie_word_embeddings": True}),
    "VL2 as released": (VL2_SMALL, {}, SMALL, {}),
    "VL2's defaults": (
        VL2_SMALL, dict.fromkeys(VL2_SMALL["language_config"].keys() - {"hidden_size", "n_routed_experts"}, ABSENT),
        VL2_DEFAULTS, {},
    ),
    "q_lora_rank": (VL2_SMALL, {"q_lora_rank": 96}, SMALL, {"latent": LatentConfig(q_lora_rank=96)}),
    "plain attention": (VL2_SMALL, {"use_mla": False}, SMALL, {"latent": None}),
    "no experts": (VL2_SMALL, {"n_routed_experts": None}, SMALL, {"experts": None}),
    "groups": (VL2_SMALL, GROUP_LIMITED, SMALL, {"experts": replace(EXPERTS, **GROUP_LIMITED)}),
    "sigmoid": (VL2_SMALL, SIGMOID, SMALL, {"experts": replace(EXPERTS, **SIGMOID)}),
    "every other layer": (VL2_SMALL, {"first_k_dense_replace": 2, "moe_layer_freq": 2}, SMALL,
                          {"experts": replace(EXPERTS, first_k_dense_replace=2, moe_layer_freq=2)}),
    "yarn": (VL2_SMALL, {"rope_scaling": {"type": "yarn", **asdict(YARN)}}, SMALL, {"yarn": YARN}),
    "yarn's defaults": (VL2_SMALL, {"rope_scaling": {"type": "yarn", "factor": 40}}, SMALL, {"yarn": YarnConfig(40.0)}),
}  # fmt: skip


@pytest.mark.parametrize("content, changes, base, differs", LANGUAGE_CONFIGS.values(), ids=LANGUAGE_CONFIGS)
def test_language_configs(content, changes, base, differs, tmp_path):
    changes = {f"language_config.{key}": value for key, value in changes.items()}
    config = read_config(config_folder(tmp_path / "model", content, changes))
    assert config.language == replace(base, **differs)
    if content is OFFICIAL:
        assert config.vision == MODELS["deepseek-vl-1.3b"].vision  # an official config that says nothing


@pytest.mark.parametrize("act, gelu", [("gelu", "exact"), ("gelu_pytorch_tanh", "tanh"), (ABSENT, "tanh")])
def test_transformers_configs(act, gelu, tmp_path):
    changes = {"vision_config.hidden_act": act, "image_token_id": 9}
    config = read_config(config_folder(tmp_path / "model", TRANSFORMERS, changes))
    assert config.vision.low == SigLIPConfig(26, 4, 32, 2, 4, 48, gelu)
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
def test_every_tensor_is_a_parameter_under_the_name_of_the_table(name, tmp_path):
    """In float32, each value is the file's, also in shards. SigLIP's pooling head is not read and may be missing."""
    folder = copy_checkpoint(name, tmp_path / "model")
    weights = read_tensors(folder / "model.safetensors")
    used = {key: value for key, value in weights.items() if "attn_pool." not in key and "_layer_norm." not in key}
    assert len(used) < len(weights)
    write_weights(folder, used, shards=3)
    model, (layout, _) = load_model(folder, dtype=torch.float32), read_layout_and_config(folder)
    assert model.config == golden_model(name)[0].config and not model.training
    for ours, parameter in model.state_dict().items():
        (theirs,) = checkpoint_names(ours, layout.names)
        assert torch.equal(parameter, used.pop(theirs).float())
    assert not used


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
    with pytest.raises(ValueError, match="dtype is torch.int8, expected one of"):
        load_model(folder, dtype=torch.int8)


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


def test_both_eras_of_transformers_names(small_pair, tmp_path):
    pair = small_pair("hybrid")
    pair.theirs.save_pretrained(tmp_path)
    for era in ("model.vision_model.", "model.vision_model.vision_model."):
        tensors = read_tensors(tmp_path / "model.safetensors")
        prefix = r"^model\.vision_model\.(vision_model\.)?"
        write_weights(tmp_path, {re.sub(prefix, era, name): tensor for name, tensor in tensors.items()})
        assert_same_weights(load_model(tmp_path), pair.ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head(kind, small_pair, tmp_path):
    """Tied files leave the head out, and then it is the embedding; a head that is there is its own tensor."""
    pair = small_pair(kind, tie=True)
    assert "lm_head.weight" not in read_tensors(pair.folder / "model.safetensors")
    for model in (pair.ours, DeepseekVL(pair.ours.config)):
        assert model.lm_head.weight is model.language.embed_tokens.weight
    pair.theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", {"tie_word_embeddings": False})
    check_refused(tmp_path, "missing tensor lm_head.weight, expected shape [120, 48]")
    head = torch.randn_like(pair.ours.lm_head.weight)
    write_weights(tmp_path, read_tensors(tmp_path / "model.safetensors") | {"lm_head.weight": head})
    for tie in (False, True):
        edit_json(tmp_path / "config.json", {"tie_word_embeddings": tie})
        assert torch.equal(load_model(tmp_path).lm_head.weight, head)


@pytest.mark.parametrize("shards, zipped", [(1, True), (3, True), (1, False)], ids=["one", "shards", "before 2020"])
def test_pickles(shards, zipped, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, tensors, "bin", shards)
    if not zipped:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


# ---------------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", [*GOLDENS, "siglip", "siglip, tied head", "hybrid"])
def test_what_is_saved_is_what_was_loaded(name, small_pair, tmp_path):
    """Bit for bit, and nothing but that one file is written. In transformers' layout q, k and v are apart again."""
    folder = golden(name).folder if name in GOLDENS else small_pair(name.split(",")[0], tie="tied" in name).folder
    model, before = load_model(folder), read_tensors(folder / "model.safetensors")
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    there = {file.name for file in tmp_path.iterdir()}
    save_model(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == there | {"model.safetensors"}
    saved = read_tensors(tmp_path / "model.safetensors")
    assert saved and all(torch.equal(saved[name], before[name]) for name in saved)
    assert_same_weights(load_model(tmp_path), model)


def test_saving_in_another_dtype(small_pair, tmp_path):
    pair = small_pair("siglip")
    pair.theirs.save_pretrained(tmp_path)
    save_model(pair.ours, tmp_path, torch.float16)  # over an older file
    saved = load_model(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert torch.equal(saved.lm_head.weight, pair.ours.lm_head.weight.half())


def test_a_folder_of_another_model_stays_as_it_is(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "other")
    before = (folder / "model.safetensors").read_bytes()
    edit_json(folder / "config.json", {"language_config.num_hidden_layers": 1})
    with pytest.raises(ValueError, match="describes another model"):
        save_model(load_model(golden("vl-siglip").folder), folder)
    assert (folder / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------- memory


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


GROWTH = """
import json, sys, threading, torch
from checkpoints import private_bytes
from load_weights import load_model
start, seen, done = private_bytes(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(private_bytes())
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], **{'dtype': getattr(torch, sys.argv[2]), **json.loads(sys.argv[3])})
done.set()
watcher.join()
print(max(*seen, private_bytes()) - start)
"""


@needs_proc
def test_private_memory_while_loading(tmp_path):
    """Its peak: nothing at the file's own dtype; otherwise the model in its last form, and no more."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    vocabulary, slack = 2**19, 48 * 2**20  # kernels keep some 35 MiB of their own
    edit_json(folder / "config.json", {"language_config.vocab_size": vocabulary})
    tensors = read_tensors(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.zeros(vocabulary, 64, dtype=torch.float16)
    write_weights(folder, tensors, shards=2)
    del tensors
    size = 4 * sum(parameter.numel() for parameter in load_model(folder, dtype=torch.float16).parameters())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    for dtype, options, expected in (
        ("float16", {}, 0),
        ("bfloat16", {}, size // 2),
        ("bfloat16", {"quantize": "int8", "pack": True}, size * 3 // 8),
    ):
        growth = int(run("-c", GROWTH, folder, dtype, json.dumps(options), env=environment).stdout)
        assert expected - slack < growth < expected + slack, (dtype, options)


# ---------------------------------------------------------------------------- packing in 16 bits


@pytest.mark.parametrize("kind", KINDS)
def test_packing_leaves_float32_that_16_bits_do_not_hold(kind, small_pair):
    model = load_model(small_pair(kind).folder)
    before = list(model.modules())
    assert pack(model) is model
    assert all(old is new for old, new in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_float32_with_weights_in_float16(bias, monkeypatch):
    """Where float16 holds the weights, or all but 2^-25 of each, as of a file in bfloat16: nn.Linear's results."""
    assert not HalfLinear.suits(nn.Linear(96, 200))  # too small to be faster
    monkeypatch.setattr(HalfLinear, "LEAST", 0)
    for dtype in (torch.float16, torch.bfloat16):
        linear = nn.Linear(96, 200, bias).to(dtype).float()
        tested = pack(nn.Sequential(copy.deepcopy(linear)))[0]
        if not agrees(HalfLinear, None, torch.float32, torch.device("cpu")):
            pytest.skip("this machine's torch has no such kernel")
        assert isinstance(tested, HalfLinear)
        for shape in ((1, 96), (5, 96), (2, 150, 96)):
            x = torch.randn(shape)
            assert_close(tested(x), linear.double()(x.double()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1 / 3, 7e4, -torch.inf, torch.nan])
def test_weights_that_float16_does_not_hold_stay(value, dtype, monkeypatch):
    """Also while a file of another dtype is loaded: what is not finite must be seen in the logits."""
    monkeypatch.setattr(HalfLinear, "LEAST", 0)
    linear = nn.Linear(64, 300)
    linear.weight.data.zero_()[299, 63] = value
    fits = dtype != torch.float32 and value == 1 / 3 and agrees(HalfLinear, None, torch.float32, torch.device("cpu"))
    assert isinstance(packed("", linear.to(dtype), torch.float32), HalfLinear) == fits


def test_packed_bfloat16(small_pair):
    """No worse than bfloat16's own rounding; packed from another dtype, it is that of the converted layer."""
    if not PackedLinear.suits(nn.Linear(48, 80).bfloat16()):
        pytest.skip("this machine's CPU has no packed bfloat16 kernels")
    for bias in (False, True):
        wide, linear = nn.Linear(48, 80, bias), nn.Linear(48, 80, bias).bfloat16()
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
