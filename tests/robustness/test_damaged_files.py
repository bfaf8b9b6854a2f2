"""Checkpoint folders as users have them: damaged, half downloaded, hostile, quantized elsewhere, saved from a wrapper.

Each is refused with one line that says what and where, and nothing is ever run.
"""

import json
import os
import random
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import ABSENT, check_refused, config_folder, edit_json, read_tensors, write_weights
from conftest import copy_checkpoint, golden
from safetensors.torch import save_file

import generate
from load_weights import load_model, read_config, save_checkpoint
from processor import Processor

OFFICIAL = json.loads((golden("vl-hybrid").folder / "config.json").read_text())
CONFIGS = {"official": OFFICIAL, "transformers": checkpoints.TRANSFORMERS, "VL2": checkpoints.VL2_SMALL}
LLAMA, PROJECTOR = "language_config", "aligner_config.params"
SIGLIP, SAM = "vision_config.params.low_res_cfg", "vision_config.params.high_res_cfg"
NAN, INFINITY, LONG = float("nan"), float("inf"), "9" * 10**6
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

BAD_VALUES = {  # of each layout: keys, and values that the error names
    "official": {
        "model_type": [ABSENT, "llava", ["llava"], LONG], LLAMA: [[1]], "vision_config.cls": ["ViT"],
        f"{SIGLIP}.model_name": ["vit_h"], f"{SAM}.model_name": ["sam_h"], f"{SIGLIP}.select_layer": [-2],
        f"{PROJECTOR}.projector_type": ["linear", "mlp_gelu"], f"{PROJECTOR}.depth": [3],  # mlp_gelu: of the 1.3B
        f"{LLAMA}.rope_scaling": [{"type": "linear"}], f"{LLAMA}.rope_parameters": [{"rope_type": "yarn"}],
        f"{LLAMA}.attention_bias": [True], f"{LLAMA}.hidden_act": ["gelu", LONG],
        f"{LLAMA}.tie_word_embeddings": ["yes"], f"{LLAMA}.vocab_size": [-5, 0, "64", 64.0, True, 10**400, LONG],
        f"{LLAMA}.rope_theta": [NAN, INFINITY, "1", 10**400], f"{SIGLIP}.mlp_ratio": [INFINITY],
        f"{SAM}.global_attn_indexes": [[1, 4], [], [-1], "1, 3"],
        f"{SAM}.pixel_mean": [[0.5], ["a", "b", "c"], [0.5] * 10**5], f"{SAM}.pixel_std": [[0, 1, 1]],
    },
    "transformers": {
        "vision_config.model_type": ["clip"], "vision_config.hidden_act": ["relu"],
        "high_res_vision_config.use_rel_pos": [False], "high_res_vision_config.mlp_dim": [-1],
        "text_config.model_type": ["qwen2"], "text_config": [[3]], "tie_word_embeddings": [3], "image_token_id": [-3],
    },
    "VL2": {
        "projector_config.n_embed": [1280], "projector_config.input_dim": [1024], "projector_config.depth": [3],
        "projector_config.projector_type": ["mlp_gelu"], "vision_config.model_name": ["siglip_large_patch16_384"],
        "tile_tag": ["1D"], "global_view_pos": ["middle"], f"{LLAMA}.n_routed_experts": [0],
        f"{LLAMA}.topk_method": ["random"], f"{LLAMA}.scoring_func": ["relu"], f"{LLAMA}.q_lora_rank": ["many"],
        f"{LLAMA}.kv_lora_rank": [-1], f"{LLAMA}.rope_scaling": [{"type": "linear", "factor": 2.0}],
        f"{LLAMA}.attention_bias": [True], f"{LLAMA}.moe_layer_freq": [0],
    },
}  # fmt: skip
GROUPS = {f"{LLAMA}.topk_method": "group_limited_greedy", f"{LLAMA}.n_group": 16, f"{LLAMA}.topk_group": 1}
BAD_SIZES = [  # layout, changes that do not fit each other or cannot be, words
    ("official", {f"{SIGLIP}.heads": 5}, "vision width 64 is no multiple of 5 heads"),
    ("official", {f"{SIGLIP}.patch_size": 97}, "a 96 pixel image holds no 97 pixel patch"),
    ("official", {f"{LLAMA}.num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
    ("official", {f"{LLAMA}.head_dim": 15}, "heads of 15 values cannot be rotated in pairs"),
    ("official", {f"{SAM}.downsample_channels": [32]}, "downsample_channels is [32], expected 2 integers from 1 to"),
    ("official", {f"{LLAMA}.rope_theta": 1e-41}, "rope_theta"),  # finite at place 1, but not at 4096
    ("VL2", {"vision_config.width": 1024}, "input_dim is 1152, expected 1024"),
    ("VL2", {f"{LLAMA}.n_group": 3}, "in 3 groups, do not fit 64 experts"),
    ("VL2", {f"{LLAMA}.topk_group": 2}, "of 2 in 1 groups"),
    ("VL2", {f"{LLAMA}.num_experts_per_tok": 65}, "65 experts a token"),
    ("VL2", GROUPS, "6 experts a token, of 1 in 16 groups, do not fit 64 experts"),
    ("VL2", {f"{LLAMA}.qk_rope_head_dim": 63}, "heads of 63 values cannot be rotated in pairs"),
    ("VL2", {f"{LLAMA}.rope_theta": 1, f"{LLAMA}.rope_scaling": YARN}, "rope"),
    *(("VL2", {f"{LLAMA}.rope_scaling": YARN | {key: value}}, "rope_scaling")
      for key, value in (("beta_fast", 5e-324), ("beta_slow", 5e-324), ("factor", 1e300), ("mscale", 1e300))),
    ("official", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config says gptq"),
    ("official", {f"{LLAMA}.quantization_config": {"quant_method": "fp8"}}, "quantization_config says fp8"),
    ("official", {"quantization_config": {"load_in_4bit": True}}, "quantization_config says load_in_4bit"),
]  # fmt: skip


@pytest.mark.parametrize("layout", BAD_VALUES)
def test_values_that_cannot_be_are_named_with_their_key(layout, tmp_path):
    rows = [(key, value) for key, values in BAD_VALUES[layout].items() for value in values]
    for number, (key, value) in enumerate(rows):
        place = config_folder(tmp_path / f"{number}", CONFIGS[layout], {key: value})
        found = str(value)[:9] if isinstance(value, str | int | float) else ""
        message = check_refused(place, "config.json", found, read=read_config)
        assert key.split(".")[-1] in message.replace(str(place), "")
        assert any(word in message for word in ("expected", "only", "fit"))


@pytest.mark.parametrize("layout, changes, words", BAD_SIZES)
def test_sizes_that_do_not_fit_each_other(layout, changes, words, tmp_path):
    check_refused(config_folder(tmp_path / "model", CONFIGS[layout], changes), "config.json", words, read=read_config)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
NORM = "language_model.model.norm.weight"  # float16 [64]
QKV = "vision_model.vision_tower.blocks.0.attn.qkv.weight"  # float16 [192, 64]


@pytest.fixture
def folder(tmp_path) -> Path:
    return copy_checkpoint("vl-siglip", tmp_path / "model")


@pytest.fixture
def sharded(folder) -> Path:
    """A checkpoint in two shards, NORM in the first of them."""
    tensors = read_tensors(folder / "model.safetensors")
    write_weights(folder, {NORM: tensors.pop(NORM)} | tensors, shards=2)
    return folder


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4000000000\n"
BAD_INDEXES = [  # tensors and their shards, words
    ({NORM: SHARD}, f"{SHARD}: lacks tensor {NORM}, which {INDEX} promises"),
    ({LONG: SHARD}, f"{SHARD}: lacks tensor 999"),
    ({NORM: SHARD.replace("2", "1", 1)}, "which model.safetensors.index.json does not list"),
    *(({"x": place}, f"x is said to be in {place!r}, expected a file name") for place in ("../x", "/etc/passwd", 3)),
    ({"x": LONG}, "x is said to be in '999"),
]
BAD_FILES = [  # name, content, words
    *(("config.json", content, "not valid JSON") for content in (b"{", b"", b"\xff\xfe", b"[" * 100_000)),
    *((name, b"{", "not valid JSON") for name in ("generation_config.json", "tokenizer.json", INDEX)),
    *((name, b"[]", "expected a JSON object, found a list") for name in ("config.json", INDEX)),
    ("generation_config.json", b'{"eos_token_id": "end"}', "eos_token_id is"),
    (INDEX, b"{}", "no weight_map, expected an object of tensor names and file names"),
    (INDEX, b'{"weight_map": []}', "weight_map: expected an object"),
    *((INDEX, json.dumps({"weight_map": files}).encode(), words) for files, words in BAD_INDEXES),
    *((name, POINTER, "a git-lfs pointer and not the file")
      for name in ("config.json", "tokenizer.json", SHARD, "pytorch_model.bin")),
    (SHARD, b"", "not a readable weight file ("), (SHARD, None, "no such file"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", BAD_FILES, ids=lambda value: str(value)[:40])
def test_files_that_are_none(name, content, words, sharded):
    if name == "pytorch_model.bin":
        (sharded / INDEX).unlink()
    (sharded / name).unlink(missing_ok=True)
    if content is not None:
        (sharded / name).write_bytes(content)
    check_refused(sharded, name, words)
    if name == "tokenizer.json":
        check_refused(sharded, name, words, read=Processor)


def test_no_checkpoint_and_no_weights(folder, tmp_path, capsys):
    no_config = "no such file, expected a checkpoint folder with a config.json"
    check_refused(tmp_path / "nowhere", no_config)
    (tmp_path / "config.json").mkdir()
    check_refused(tmp_path, no_config)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    check_refused(folder, "no weights, only a GGUF file, expected model.safetensors")
    (folder / "model.gguf").unlink()
    check_refused(folder, "no weights, expected model.safetensors or pytorch_model.bin, or shards and an index")
    (folder / "model.safetensors").mkdir()
    check_refused(folder, "model.safetensors: no such file")
    hint = "hf download deepseek-ai/deepseek-vl2-tiny --local-dir deepseek-vl2-tiny"
    check_refused(Path("deepseek-ai/deepseek-vl2-tiny"), hint)
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "a", "--model", "deepseek-ai/deepseek-vl2-tiny"])
    assert hint in capsys.readouterr().err


def test_in_two_shards_a_tensor_is_that_of_the_one_in_the_index(sharded):
    save_file(read_tensors(sharded / SHARD) | {NORM: torch.ones(3)}, sharded / SHARD)
    checkpoints.assert_same_weights(load_model(sharded), load_model(golden("vl-siglip").folder))


def change_tensors(folder: Path, changes: dict, suffix: str = "safetensors") -> None:
    """Set tensors of a checkpoint, None taking one away."""
    tensors = read_tensors(folder / "model.safetensors") | changes
    write_weights(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None}, suffix)


WRONG_TENSORS = [  # tensors changed, words
    ({NORM: None, QKV: None}, f"missing tensor {NORM} and 1 more, expected shape [64]"),
    ({LONG: torch.ones(2)}, "unexpected tensor 999"),
    ({"vision_model.layer_norm.bias": torch.ones(2)}, "unexpected tensor vision_model.layer_norm.bias, the model"),
    ({NORM: torch.ones(65)}, f"model.safetensors: tensor {NORM} has shape [65], config.json says [64]"),
    ({QKV: torch.ones(64, 192)}, f"{QKV} has shape [64, 192], config.json says [192, 64]"),
    *(({NORM: torch.full((64,), value)}, f"{NORM} holds values that are not finite") for value in (NAN, -INFINITY)),
    *(({NORM: torch.ones(64).to(dtype)}, f"{NORM} holds {dtype}, expected one of")
      for dtype in (torch.int16, torch.float8_e4m3fn)),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", WRONG_TENSORS)
def test_wrong_tensors(changes, words, folder):
    change_tensors(folder, changes)
    check_refused(folder, words)


def test_names_that_a_wrapper_left(folder):
    tensors = read_tensors(folder / "model.safetensors")
    for prefix in ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod."):
        write_weights(folder, {prefix + name: tensor for name, tensor in tensors.items()})
        check_refused(folder, f"tensors are named {prefix}..., save the model without what wrapped it")


def test_stray_buffers_are_passed_over(folder):
    stray = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(folder, stray | {"vision_model.vision_tower.embeddings.position_ids": torch.arange(9)})
    checkpoints.assert_same_weights(load_model(folder), load_model(golden("vl-siglip").folder))


LAYERS = "language_model.model.layers"
HUGE, MANY = "sizes too large for any memory", "layers or experts of config.json"
OTHER_MODELS = [  # checkpoint, changes of its config, words
    ("vl-siglip", {f"{LLAMA}.num_hidden_layers": 4}, f"missing tensor {LAYERS}.3.input_layernorm.weight"),
    ("vl-siglip", {f"{LLAMA}.num_hidden_layers": 2}, f"unexpected tensor {LAYERS}.2.input_layernorm.weight and 8 more"),
    ("vl-siglip", {f"{LLAMA}.num_key_value_heads": 2}, "k_proj.weight has shape [64, 64], config.json says [32, 64]"),
    ("vl-siglip", {"vision_config.params.width": 2**31 - 8}, HUGE),  # a product beyond 63 bits
    ("vl2-mla", {"projector_config.downsample_ratio": 10**9}, HUGE),  # a size beyond them
    # Thousands of blocks are not built.
    ("vl-siglip", {f"{LLAMA}.num_hidden_layers": 19_999}, MANY),
    ("vl-siglip", {"vision_config.params.layers": 19_999}, MANY),
    ("vl-hybrid", {f"{SAM}.layers": 19_999}, MANY),
    ("vl2-mla", {f"{LLAMA}.n_routed_experts": 6_600}, MANY),
    # Experts that no layer has are no reason to refuse: what is missing is a dense layer's, and not 15,000 of them.
    ("vl2-mla", {f"{LLAMA}.first_k_dense_replace": 3, f"{LLAMA}.n_routed_experts": 5_000},
     "missing tensor language.model.layers.1.mlp.down_proj.weight"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, words", OTHER_MODELS)
def test_a_config_of_another_model(name, changes, words, tmp_path):
    folder = copy_checkpoint(name, tmp_path / "model")
    edit_json(folder / "config.json", changes)
    check_refused(folder, words)


def test_wrong_quantized_tensors(tmp_path):
    source, folder, layer = golden("vl-siglip").folder, tmp_path / "model", f"{LAYERS}.1.self_attn.q_proj"
    save_checkpoint(load_model(source, quantize="int4"), source, folder)
    before, w, s = read_tensors(folder / "model.safetensors"), f"{layer}.weight", f"{layer}.scales"
    unfit = {name.replace("self_attn.q", "mlp.down"): before[name].clone() for name in (w, s)}  # no group divides it
    int8 = {w: torch.zeros(64, 64).char(), s: torch.ones(64)}  # among int4
    other_dtypes = {w: before[w].float()}, {s: before[s].int()}
    other_shapes = {w: before[w][:, :5].clone()}, {s: before[s][:, :3].clone()}
    for changes in ({w: None}, {s: None}, int8, *other_dtypes, *other_shapes, unfit):
        change_tensors(folder, changes)
        check_refused(folder)
        write_weights(folder, before)


def with_length(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


def edit_header(raw: bytes, tensor: str = NORM, **changes) -> bytes:
    """A safetensors file whose header says something else of one tensor; the data stays."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[tensor] |= changes
    return with_length(json.dumps(header).encode()) + raw[end:]


WRONG_HEADERS = [  # offsets beyond the data and backwards, dtypes unknown and of another width, shapes of other bytes
    {"data_offsets": [10**9, 10**9 + 128]}, {"data_offsets": [128, 0]}, {"dtype": "F17"}, {"dtype": LONG},
    {"dtype": "F32"}, {"shape": [65]}, {"shape": [2**62, 4, 64]},
]  # fmt: skip


def test_damaged_safetensors(folder):
    file = folder / "model.safetensors"
    raw = edit_header(file.read_bytes(), shape=[64], dtype="F16")  # which is right
    file.write_bytes(raw)
    load_model(folder)
    lengths = [with_length(raw[8:], len(raw)), with_length(b"{" * 200), with_length(b'{"a":' * 200_000)]
    headers = [edit_header(raw, **changes) for changes in WRONG_HEADERS]
    dtype_that_torch_lacks = edit_header(raw, QKV, dtype="F6_E2M3", shape=[32768])
    for damaged in (b"", raw[:100], raw[:-100], raw + bytes(100), *lengths, *headers, dtype_that_torch_lacks):
        file.write_bytes(damaged)
        check_refused(folder, "model.safetensors: ")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_flipped_bits_are_refused_or_harmless(suffix, folder):
    """Damaged headers: a ValueError, or a model of the right shapes where the damage lies in unused parts."""
    shapes = {name: tensor.shape for name, tensor in load_model(folder).state_dict().items()}
    change_tensors(folder, {}, suffix)
    (file,) = folder.glob(f"*.{suffix}")
    raw, rng, refused = file.read_bytes(), random.Random(0), 0
    header = 8 + int.from_bytes(raw[:8], "little") if suffix == "safetensors" else 12_000
    for _ in range(50):
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
    assert refused > 25


NO_TENSOR = "is no ordinary tensor with a name"
BAD_PICKLES = [  # what is pickled, words
    ([torch.ones(3)], "expected a dict of tensors, found"),
    ({"state_dict": {NORM: torch.ones(64)}}, f"'state_dict' {NO_TENSOR}"),
    *(({"x": value}, f"'x' {NO_TENSOR}") for value in ("1", torch.ones(3).to_sparse(), torch.ones(3, device="meta"))),
    ({LONG: "ones"}, "'999"),
    ({3: torch.ones(3)}, f"3 {NO_TENSOR}"),
    (torch.nn.Linear(2, 2), "not a pickle of tensors alone"),
]


@pytest.mark.parametrize("content, words", BAD_PICKLES)
def test_pickles_of_something_else(content, words, folder):
    write_weights(folder, content, "bin")
    check_refused(folder, "pytorch_model.bin: not a readable weight file", words)


class MakesAFolder:
    """Unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("proof",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run_and_none_is_read_in_part(zipped, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, file = read_tensors(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"x": MakesAFolder()}, file, _use_new_zipfile_serialization=zipped)
    check_refused(folder, "pytorch_model.bin: not a readable weight file (not a pickle of tensors alone)")
    assert not (tmp_path / "proof").exists()
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    raw = file.read_bytes()
    for kept in (slice(0), slice(1000), slice(-1000), slice(1000, None)):
        file.write_bytes(raw[kept])
        check_refused(folder, "pytorch_model.bin: not a readable weight file (")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_a_device_that_is_not_here():
    for device in ("cuda", "cuda:7", "no such device", None, 1.5):
        with pytest.raises(ValueError, match=f"device {device} is not available here"):
            load_model(golden("vl-siglip").folder, device=device)
