"""Configs and weights of every layout: sizes, names, values, dtypes, memory, saving, and packing."""

import copy
import gc
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import ABSENT, VL2_SMALL, assert_same_weights, config_folder, edit_json, read_tensors, write_weights
from conftest import GOLDENS, KINDS, assert_close, copy_checkpoint, golden, random_batch
from small_vl2 import GROUP_LIMITED, SIGMOID, YARN
from torch import nn

from load_weights import HalfLinear, PackedLinear, agrees, load_model, pack, packed, read_config, save_model
from model import MODELS, DeepseekVL, ExpertsConfig, LanguageConfig, LatentConfig, YarnConfig
from processor import load_tokenizer
from vision import HybridConfig, SAMConfig, SigLIPConfig, TileConfig

OFFICIAL = {"model_type": "multi_modality", "language_config": {}}
LLAMA = LanguageConfig(  # LlamaConfig's defaults
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0,
)  # fmt: skip
VL2 = replace(  # DeepseekV2Config's
    LLAMA, vocab_size=102400, hidden_size=2048, num_hidden_layers=30, head_dim=64,
    latent=LatentConfig(q_lora_rank=1536), experts=ExpertsConfig(64, 0, 1, 1407, first_k_dense_replace=0),
)  # fmt: skip
SMALL, EXPERTS = MODELS["deepseek-vl2-small"].language, ExpertsConfig()
SILENT = dict.fromkeys(VL2_SMALL["language_config"].keys() - {"hidden_size", "n_routed_experts"}, ABSENT)
SOME_LAYERS = {"first_k_dense_replace": 2, "moe_layer_freq": 2}
LANGUAGE_CONFIGS = [  # a config, changes of its language_config, what is read, what differs from it
    (OFFICIAL, {}, LLAMA, {}),
    (OFFICIAL, dict.fromkeys(("hidden_size", "rope_parameters", "num_key_value_heads")), LLAMA, {}),  # null: absent
    (OFFICIAL, {"num_attention_heads": 64}, LLAMA, dict(num_attention_heads=64, num_key_value_heads=64, head_dim=64)),
    (OFFICIAL, dict(num_key_value_heads=8, head_dim=64, rope_theta=500000, tie_word_embeddings=True), LLAMA,
     dict(num_key_value_heads=8, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True)),
    (OFFICIAL, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, LLAMA, {"rope_theta": 500000.0}),
    (VL2_SMALL, {}, SMALL, {}),
    (VL2_SMALL, SILENT, VL2, {}),
    (VL2_SMALL, {"use_mla": False, "n_routed_experts": None}, SMALL, {"latent": None, "experts": None}),
    (VL2_SMALL, SIGMOID | SOME_LAYERS, SMALL, {"experts": replace(EXPERTS, **SIGMOID, **SOME_LAYERS)}),
    (VL2_SMALL, GROUP_LIMITED | {"rope_scaling": {"type": "yarn", **asdict(YARN)}}, SMALL,
     {"experts": replace(EXPERTS, **GROUP_LIMITED), "yarn": YARN}),
    (VL2_SMALL, {"q_lora_rank": 96, "rope_scaling": {"type": "yarn", "factor": 40}}, SMALL,
     {"latent": LatentConfig(q_lora_rank=96), "yarn": YarnConfig(40.0)}),
]  # fmt: skip


@pytest.mark.parametrize("content, changes, base, differs", LANGUAGE_CONFIGS)
def test_language_configs(content, changes, base, differs, tmp_path):
    changes = {f"language_config.{key}": value for key, value in changes.items()}
    config = read_config(config_folder(tmp_path / "model", content, changes))
    assert config.language == replace(base, **differs)
    if content is OFFICIAL:
        assert config.vision == MODELS["deepseek-vl-1.3b"].vision  # an official config that says nothing


def test_sams_early_layer_is_the_first_to_run_in_whatever_order_a_config_lists_them(tmp_path):
    folder = copy_checkpoint("vl-hybrid", tmp_path / "model")
    edit_json(folder / "config.json", {"vision_config.params.high_res_cfg.global_attn_indexes": [3, 1]})
    assert read_config(folder) == read_config(golden("vl-hybrid").folder)


def test_normalization_beside_a_preset(tmp_path):
    params, folder = "vision_config.params", copy_checkpoint("vl-hybrid", tmp_path / "model")
    changes = {f"{params}.low_res_cfg.pixel_mean": [0, 0.25, 1], f"{params}.high_res_cfg.pixel_std": [1, 2, 3]}
    edit_json(folder / "config.json", changes)
    vision = read_config(folder).vision
    assert (vision.low_norm.mean, vision.low_norm.std) == ((0, 0.25, 1), (0.5, 0.5, 0.5))
    assert (vision.high_norm.mean[0], vision.high_norm.std) == (0.48145466, (1, 2, 3))


def test_transformers_configs(tmp_path):
    """What such a file leaves out has transformers' defaults; sizes that it names are read."""
    sam = SAMConfig(80, 8, 24, 3, 3, 40, 4, global_layers=(1, 2), neck_channels=8, downsample_channels=(16, 32))
    for act, gelu in (("gelu", "exact"), ("gelu_pytorch_tanh", "tanh"), (ABSENT, "tanh")):
        changes = {"vision_config.hidden_act": act, "image_token_id": 9}
        config = read_config(config_folder(tmp_path / str(act), checkpoints.TRANSFORMERS, changes))
        assert config.vision == HybridConfig(SigLIPConfig(26, 4, 32, 2, 4, 48, gelu), sam)
        assert config.language.tie_word_embeddings and config.image_token_id == 9
    silent = {"model_type": "deepseek_vl_hybrid", "tie_word_embeddings": False}
    config = read_config(config_folder(tmp_path / "silent", silent))
    siglip = SigLIPConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072, gelu="tanh")
    assert config.vision == HybridConfig(siglip, SAMConfig())
    assert config.language == LLAMA and config.image_token_id == 100015


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


def test_dtypes(tmp_path):
    """By default the file's own, or of a mixed file the embedding's, but float32 for a float16 file on a CPU."""
    folder, shares = copy_checkpoint("vl-hybrid", tmp_path / "model"), []
    stored = load_model(folder, dtype=torch.float16, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 30
    for dtype in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        model = load_model(str(folder), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
        assert_same_weights(model, copy.deepcopy(stored).to(dtype or torch.float32))
    with pytest.raises(ValueError, match="dtype is torch.int8, expected one of"):
        load_model(folder, dtype=torch.int8)
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, {name: tensor if "embed" in name else tensor.double() for name, tensor in tensors.items()})
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_onto_another_device():
    folder = golden("vl-hybrid").folder
    model = load_model(folder, dtype=torch.float32, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert_same_weights(model.cpu(), load_model(folder))


def test_both_eras_of_transformers_names(small_pair, tmp_path):
    pair = small_pair("hybrid")
    pair.theirs.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    for era in ("model.vision_model.", "model.vision_model.vision_model."):
        prefix = r"^model\.vision_model\.(vision_model\.)?"
        write_weights(tmp_path, {re.sub(prefix, era, name): tensor for name, tensor in tensors.items()})
        assert_same_weights(load_model(tmp_path), pair.ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head(kind, small_pair, tmp_path):
    """Tied files leave the head out, and then it is the embedding; a head that is there is its own tensor."""
    pair = small_pair(kind, tie=True)
    tensors = read_tensors(pair.folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for model in (pair.ours, DeepseekVL(pair.ours.config)):
        assert model.lm_head.weight is model.language.embed_tokens.weight
    folder = shutil.copytree(pair.folder, tmp_path / "model")
    edit_json(folder / "config.json", {"tie_word_embeddings": False})
    checkpoints.check_refused(folder, "missing tensor lm_head.weight, expected shape [120, 48]")
    head = torch.randn_like(pair.ours.lm_head.weight)
    write_weights(folder, tensors | {"lm_head.weight": head})
    for tie in (False, True):
        edit_json(folder / "config.json", {"tie_word_embeddings": tie})
        assert torch.equal(load_model(folder).lm_head.weight, head)


@pytest.mark.parametrize("shards, zipped", [(1, True), (3, True), (1, False)], ids=["one", "shards", "before 2020"])
def test_pickles(shards, zipped, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, tensors, "bin", shards)
    if not zipped:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


@pytest.mark.parametrize("name", [*GOLDENS, "siglip", "siglip, tied head", "hybrid"])
def test_what_is_saved_is_what_was_loaded(name, small_pair, tmp_path):
    """Bit for bit, and nothing but that one file is written; but for what no model uses, which may be missing."""
    source = golden(name).folder if name in GOLDENS else small_pair(name.split(",")[0], tie="tied" in name).folder
    model, before = load_model(source), read_tensors(source / "model.safetensors")
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    save_model(model, folder)
    assert {file.name for file in folder.iterdir()} == {file.name for file in source.iterdir()}
    saved = read_tensors(folder / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    unused = r".*attn_pool\..*|.*vision_model\.(head|(high|low)_layer_norm)\..*"
    assert all(re.fullmatch(unused, name) for name in before.keys() - saved.keys())
    again = load_model(folder)
    assert again.config == model.config and not again.training
    assert_same_weights(again, model)
    save_model(model, folder, torch.bfloat16)  # over an older file
    assert {tensor.dtype for tensor in read_tensors(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert_same_weights(load_model(folder), model.bfloat16())


def test_a_folder_of_another_model_stays_as_it_is(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "other")
    before = (folder / "model.safetensors").read_bytes()
    edit_json(folder / "config.json", {"language_config.num_hidden_layers": 1})
    with pytest.raises(ValueError, match="describes another model"):
        save_model(load_model(golden("vl-siglip").folder), folder)
    assert (folder / "model.safetensors").read_bytes() == before


@checkpoints.needs_proc
def test_private_memory_while_loading(tmp_path):
    """Its peak: nothing at the file's own dtype; otherwise the model in its last form, and no more."""
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    vocabulary, slack = 2**19, 48 * 2**20  # kernels keep some 35 MiB of their own
    edit_json(folder / "config.json", {"language_config.vocab_size": vocabulary})
    tensors, wide = read_tensors(folder / "model.safetensors"), torch.zeros(vocabulary, 64, dtype=torch.float16)
    tensors |= {f"language_model.{name}.weight": wide.clone() for name in ("model.embed_tokens", "lm_head")}
    size = 2 * sum(tensor.numel() for tensor in tensors.values())
    for suffix, options, expected in (
        ("bin", {"dtype": torch.float16}, 0),
        ("safetensors", {"dtype": torch.float16}, 0),
        ("safetensors", {"dtype": torch.bfloat16}, size),
        ("safetensors", {"dtype": torch.bfloat16, "quantize": "int8", "pack": True}, size * 3 // 4),
    ):
        write_weights(folder, tensors, suffix)
        gc.collect()
        before, seen = checkpoints.private_bytes(), []
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_model, folder, **options)
            while not loading.done():
                seen.append(checkpoints.private_bytes())
                time.sleep(0.001)
            seen.append(checkpoints.private_bytes())
        del loading
        assert expected - slack < max(seen) - before < expected + slack, (suffix, options)


@pytest.fixture
def half(monkeypatch):
    """Whether torch has such a kernel here; then layers of any size are packed."""
    assert type(packed("", nn.Linear(96, 200).half().float())) is nn.Linear  # too small to be faster
    monkeypatch.setattr(HalfLinear, "LEAST", 0)
    return agrees(HalfLinear, None, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_with_weights_in_float16(bias, dtype, half):
    """Where float16 holds the weights, or all but 2^-25 of each, as of a file in bfloat16: nn.Linear's results."""
    linear = nn.Linear(96, 200, bias).to(dtype)
    tested, exact = packed("", linear.float()), copy.deepcopy(linear).double()
    assert isinstance(tested, HalfLinear) == half
    for shape in ((1, 96), (5, 96), (2, 150, 96)):
        x = torch.randn(shape)
        assert_close(tested(x), exact(x.double()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_float16_does_not_hold_stay(dtype, half):
    """Also where the layer is converted to float32 only while it is packed."""
    for value in (1 / 3, 7e4, -torch.inf, torch.nan):
        linear = nn.Linear(64, 300)
        linear.weight.data.zero_()[299, 63] = value
        fits = half and dtype != torch.float32 and value == 1 / 3
        assert isinstance(packed("", linear.to(dtype), torch.float32), HalfLinear) == fits


def test_packed_bfloat16(small_pair, monkeypatch):
    """No worse than bfloat16's own rounding; packed from another dtype, it is that of the converted layer."""
    if not agrees(PackedLinear, None, torch.bfloat16, torch.device("cpu")):
        pytest.skip("this machine's CPU has no packed bfloat16 kernels")
    monkeypatch.setattr("load_weights.pays", agrees)  # whatever is faster here
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
    latent = load_model(golden("vl2-mla").folder, dtype=torch.bfloat16, pack=True)
    plain = [name for name, module in latent.named_modules() if type(module) is nn.Linear]
    assert plain and all(name.endswith("kv_b_proj") for name in plain)
