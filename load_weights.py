"""From a checkpoint folder to a model: its config, its tensor names, its weights, and how they lie in memory.

    config.json           -> read_config  -> ModelConfig, plain dataclasses
    names in the files    -> LAYOUTS      -> names in the model, one visible table a layout
    *.safetensors, *.bin  -> load_model   -> DeepseekVL: one pass over its modules, never the whole of it twice
                          -> pack         -> DeepseekVL with layers stored for fast inference

Three layouts are read: the official ones of DeepSeek-VL (deepseek-ai/deepseek-vl-*) and of
DeepSeek-VL2 (deepseek-ai/deepseek-vl2*), and that of transformers (deepseek-community/*, and
whatever its save_pretrained writes).

No code in a checkpoint is executed: JSON, safetensors, and pickles with weights_only.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import timeit
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import MODELS, DeepseekVL, ExpertsConfig, LanguageConfig, LatentConfig, ModelConfig, YarnConfig
from processor import Settings, Tokenizer, check_is_no_pointer, load_tokenizer, read_json, reason
from vision import HybridConfig, SAMConfig, SigLIPConfig, TileConfig

# ---------------------------------------------------------------------------- config.json

# Numbers outside these bounds mean a damaged config, which is refused before it costs time and memory.
LEAST = {int: 1, float: 1e-20}
MOST = 2**31 - 1
MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "mscale", "mscale_all_dim", "pixel_mean"}
# Keys that hold one of a few words, and mean the first where they are absent.
WORDS = {"topk_method": ("greedy", "group_limited_greedy", "noaux_tc"), "scoring_func": ("softmax", "sigmoid")}

# Fields whose names differ from the files' keys.
SAM_KEYS = {"window": "window_size", "global_layers": "global_attn_indexes"}
OFFICIAL_KEYS = {**SAM_KEYS, "mean": "pixel_mean", "std": "pixel_std"}
TRANSFORMERS_KEYS = {
    **SAM_KEYS,
    **{"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"mlp_width": "intermediate_size", "neck_channels": "output_channels"},
}
# The official configs name a vision tower by its preset; keys beside the name override it. Beside the sizes: the ratio
# of MLP width to width.
TOWERS = {
    "siglip_large_patch16_384": (MODELS["deepseek-vl-1.3b"].vision, 4.0),
    "siglip_so400m_patch14_384": (MODELS["deepseek-vl2"].vision, 3.7362),
    "sam_b_downsample": (MODELS["deepseek-vl-7b"].vision.high, 4.0),
}
# What absent keys mean: the defaults of the class that wrote the file.
TRANSFORMERS_SIGLIP = SigLIPConfig(image_size=224, width=768, layers=12, heads=12, mlp_width=3072)
LLAMA = LanguageConfig(vocab_size=32000, num_hidden_layers=32, max_position_embeddings=2048)  # LlamaConfig
DEEPSEEK_V2 = LanguageConfig(  # DeepseekV2Config
    max_position_embeddings=2048,
    latent=LatentConfig(q_lora_rank=1536),
    experts=ExpertsConfig(
        n_shared_experts=0, num_experts_per_tok=1, moe_intermediate_size=1407, first_k_dense_replace=0
    ),
)


class Section(Settings):
    """An object of config.json. As in transformers, null means absent."""

    def __init__(self, values: Any, name: str):
        super().__init__(values, name)
        self.nulls = [key for key, value in self.values.items() if value is None]
        for key in self.nulls:
            del self.values[key]

    def only(self, **supported: Any) -> None:
        """Refuse any other value of these keys. They may be absent."""
        for key, value in supported.items():
            self.one_of(key, value)

    def get(self, key: str, default: Any) -> Any:
        """A value of the default's type: one of WORDS, bool, int, float, or a tuple of as many numbers.

        Raises: ValueError that names the file and the key, and what was expected.
        """
        if key in WORDS:
            return self.one_of(key, *WORDS[key])
        if isinstance(default, bool):
            return self.one_of(key, default, not default)
        several = isinstance(default, tuple)
        defaults = default if several else (default,)
        kind = type(defaults[0])
        numbers = self.numbers(key, defaults, 0 if key in MAY_BE_ZERO else LEAST[kind], MOST, kind)
        return tuple(map(kind, numbers)) if several else kind(numbers[0])


def fill(defaults: Any, section: Section, keys: dict[str, str] = OFFICIAL_KEYS, **known: Any) -> Any:
    """A config dataclass from a section. An absent key takes the field's value in `defaults`.

    Args:
        keys: field -> key of the file, where the two differ.
        known: fields that are not read from the section. Other dataclasses are never read from it.
    """
    for field in fields(defaults):
        key, default = keys.get(field.name, field.name), getattr(defaults, field.name)
        if field.name not in known and (key in WORDS or isinstance(default, (int, float, tuple))):
            known[field.name] = section.get(key, default)
    return replace(defaults, **known)


def global_layers(section: Section, layers: int) -> tuple[int, ...]:
    """SAM's layers that attend to the whole image and not to windows, in the order in which they run."""
    key = "global_attn_indexes"
    indexes = section.values.get(key, list(SAMConfig.global_layers))
    fit = isinstance(indexes, list) and all(type(index) is int and 0 <= index < layers for index in indexes)
    if not fit or not indexes:
        section.refuse(key, f"a list of SAM layers, integers from 0 to {layers - 1}")
    return tuple(sorted(indexes))


def official_tower(section: Section, name: str, **known: Any) -> SigLIPConfig | SAMConfig:
    section.only(model_name=name, select_feature="same", select_layer=-1)
    defaults, mlp_ratio = TOWERS[name]
    width = section.get("width", defaults.width)
    return fill(defaults, section, mlp_width=int(width * section.get("mlp_ratio", mlp_ratio)), **known)


def official_vision(config: Section) -> SigLIPConfig | HybridConfig:
    params = config.section("params")
    if config.one_of("cls", "CLIPVisionTower", "HybridVisionTower") == "CLIPVisionTower":
        return official_tower(params, "siglip_large_patch16_384")
    params.only(concat_type="tuple")
    low, high = params.section("low_res_cfg"), params.section("high_res_cfg")
    indexes = global_layers(high, high.get("layers", SAMConfig.layers))
    return HybridConfig(
        low=official_tower(low, "siglip_large_patch16_384"),
        high=official_tower(high, "sam_b_downsample", global_layers=indexes),
        low_norm=fill(HybridConfig.low_norm, low),
        high_norm=fill(HybridConfig.high_norm, high),
    )


def official_config(config: Section) -> ModelConfig:
    vision = official_vision(config.section("vision_config"))
    projector = "low_high_hybrid_split_mlp_gelu" if isinstance(vision, HybridConfig) else "mlp_gelu"
    config.section("aligner_config").section("params").only(projector_type=projector, depth=2)
    return ModelConfig(vision, llama(config.section("language_config")))


def transformers_siglip(config: Section) -> SigLIPConfig:
    config.only(model_type="siglip_vision_model")
    act = config.one_of("hidden_act", "gelu_pytorch_tanh", "gelu")
    return fill(TRANSFORMERS_SIGLIP, config, TRANSFORMERS_KEYS, gelu="exact" if act == "gelu" else "tanh")


def transformers_sam(config: Section) -> SAMConfig:
    config.only(model_type="sam_vision_model", hidden_act="gelu", qkv_bias=True, use_abs_pos=True, use_rel_pos=True)
    indexes = global_layers(config, config.get("num_hidden_layers", SAMConfig.layers))
    sam = fill(SAMConfig(), config, TRANSFORMERS_KEYS, global_layers=indexes)
    mlp_width = config.get("mlp_dim", int(sam.width * config.get("mlp_ratio", 4.0)))
    return replace(sam, mlp_width=mlp_width, downsample_channels=(2 * sam.neck_channels, 4 * sam.neck_channels))


def transformers_config(config: Section) -> ModelConfig:
    vision, text = transformers_siglip(config.section("vision_config")), config.section("text_config")
    if config.values["model_type"] == "deepseek_vl_hybrid":
        vision = HybridConfig(low=vision, high=transformers_sam(config.section("high_res_vision_config")))
    text.values["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    return ModelConfig(vision, llama(text), image_token_id=config.get("image_token_id", 100015))


def language_model(config: Section, defaults: LanguageConfig, **known: Any) -> LanguageConfig:
    """What LlamaConfig and DeepseekV2Config share. By default, heads share no keys and split the width."""
    config.only(hidden_act="silu", attention_bias=False)
    heads = config.get("num_attention_heads", defaults.num_attention_heads)
    head_dim = max(config.get("hidden_size", defaults.hidden_size) // heads, 1)
    return fill(replace(defaults, num_key_value_heads=heads, head_dim=head_dim), config, **known)


def llama(config: Section) -> LanguageConfig:
    """The language model of DeepSeek-VL."""
    config.only(model_type="llama", mlp_bias=False, rope_scaling=None)
    rope = config.section("rope_parameters")  # newer files; older ones have rope_theta beside the sizes
    rope.only(rope_type="default")
    theta = rope.get("rope_theta", config.get("rope_theta", LLAMA.rope_theta))
    return language_model(config, LLAMA, rope_theta=theta)


def deepseek_v2(config: Section) -> LanguageConfig:
    """The language model of DeepSeek-VL2. Absent or null, `n_routed_experts` and `rope_scaling` mean: none."""
    latent = experts = yarn = None
    if config.get("use_mla", True):
        latent = fill(DEEPSEEK_V2.latent, config)
        if "q_lora_rank" in config.nulls:  # here null is not absent
            latent = replace(latent, q_lora_rank=None)
    if "n_routed_experts" in config.values:
        experts = fill(DEEPSEEK_V2.experts, config)
    if "rope_scaling" in config.values:
        scaling = config.section("rope_scaling")
        key = "type" if "type" in scaling.values else "rope_type"
        if scaling.values.get(key) != "yarn":
            scaling.refuse(key, "'yarn'")
        yarn = fill(YarnConfig(factor=1.0), scaling)
    language = language_model(config, DEEPSEEK_V2, latent=latent, experts=experts, yarn=yarn)
    return replace(language, head_dim=language.hidden_size // language.num_attention_heads)  # whatever the file says


def vl2_config(config: Section) -> ModelConfig:
    config.only(tile_tag="2D")
    vision = official_tower(config.section("vision_config"), "siglip_so400m_patch14_384")
    language, projector = deepseek_v2(config.section("language_config")), config.section("projector_config")
    projector.values = {"input_dim": 1152, "n_embed": 2048} | projector.values
    projector.only(projector_type="downsample_mlp_gelu", depth=2, input_dim=vision.width, n_embed=language.hidden_size)
    view = config.one_of("global_view_pos", "head", "tail")
    return ModelConfig(vision, language, fill(TileConfig(), projector, global_view_first=view == "head"))


def read_config(path: str | Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The config of a checkpoint folder, in any known layout.

    The ids of the image token and of the tokens that end an answer are looked up in the
    folder's generation config and tokenizer, where there are such files.

    Args:
        tokenizer: the folder's; None reads it, which takes up to a second.
    Raises: ValueError that names the file and the key, and what was expected.
    """
    return read_layout_and_config(Path(path), tokenizer)[1]


def download_hint(path: str | Path) -> str:
    """For a path that is not there, but named as a model on Hugging Face: how to have it, to end an error with."""
    named = None if Path(path).exists() else re.fullmatch(r"[\w.-]+/([\w.-]+)", str(path))
    return f"; to have it: hf download {path} --local-dir {named[1]}" if named else ""


def read_layout_and_config(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Layout, ModelConfig]:
    file = folder / "config.json"
    if not file.is_file():
        hint = download_hint(folder)
        raise ValueError(f"{file}: no such file, expected a checkpoint folder with a config.json{hint}")
    whole = Section(read_json(file), str(file))
    kind = whole.values.get("model_type")
    if kind not in list(LAYOUTS):
        whole.refuse("model_type", f"one of {', '.join(LAYOUTS)}")
    for part in (whole, whole.section("language_config"), whole.section("text_config")):
        quantization = part.section("quantization_config").values
        if quantization:
            method = str(quantization.get("quant_method") or ", ".join(quantization))[:40]
            raise ValueError(f"{part.name}: quantization_config says {method}, only plain weights load; see --quantize")
    layout = LAYOUTS[kind]
    config = layout.read_config(whole)
    check_sizes(config, file)
    return layout, with_token_ids(config, folder, tokenizer)


def towers(config: ModelConfig) -> list[SigLIPConfig | SAMConfig]:
    vision = config.vision
    return [vision.low, vision.high] if isinstance(vision, HybridConfig) else [vision]


def check_sizes(config: ModelConfig, file: Path) -> None:
    """Raise ValueError where the sizes do not fit each other."""
    language, e = config.language, config.language.experts
    heads, kv_heads = language.num_attention_heads, language.num_key_value_heads
    rope_dim, theta = language.rope_dim, language.rope_theta
    checks = [
        (heads % kv_heads == 0, f"{heads} attention heads cannot share {kv_heads} key/value heads evenly"),
        (rope_dim >= 2 and rope_dim % 2 == 0, f"heads of {rope_dim} values cannot be rotated in pairs"),
        (not language.yarn or abs(theta - 1) > 1e-6, f"rope_theta {theta} gives equal rotations, which have no YaRN"),
    ]
    for t in towers(config):
        checks += [
            (t.width % t.heads == 0, f"vision width {t.width} is no multiple of {t.heads} heads"),
            (t.image_size >= t.patch_size, f"a {t.image_size} pixel image holds no {t.patch_size} pixel patch"),
        ]
    if e is not None:
        choosable = e.n_routed_experts // e.n_group * (e.n_group if e.topk_method == "greedy" else e.topk_group)
        fits = e.n_routed_experts % e.n_group == 0 and e.topk_group <= e.n_group and e.num_experts_per_tok <= choosable
        wanted = f"{e.num_experts_per_tok} experts a token, of {e.topk_group} in {e.n_group} groups"
        checks.append((fits, f"language_config: {wanted}, do not fit {e.n_routed_experts} experts"))
    for fits, message in checks:
        if not fits:
            raise ValueError(f"{file}: {message}")


def with_token_ids(config: ModelConfig, folder: Path, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config with the image token's id and the ids that end an answer; None and () where no file names them.

    The end tokens are those of generation_config.json, without it the tokenizer's own end token.
    """
    image_token_id, ends = config.image_token_id, []
    if tokenizer is None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if image_token_id is None:
            image_token_id = tokenizer.token_to_id("<image>" if config.tiles else "<image_placeholder>")
    file = folder / "generation_config.json"
    if file.exists():
        generation = Section(read_json(file), str(file))
        ends = generation.values.get("eos_token_id", ends)
        ends = ends if isinstance(ends, list) else [ends]
        if not all(type(id) is int for id in ends):
            generation.refuse("eos_token_id", "an integer or a list of them")
    return replace(config, image_token_id=image_token_id, end_token_ids=tuple(ends))


# ---------------------------------------------------------------------------- tensor names

# A row: a name in the checkpoint, a name in the model. The first row that fits counts. `*` stands for the
# same text on both sides, `{a,b}` for several tensors that the model stacks along the first dimension.

UNUSED = ""  # no forward pass of the original reads these: SigLIP's pooling head, and two norms of the 7B

OFFICIAL_NAMES = [
    ("vision_model.*attn_pool.*", UNUSED),
    ("vision_model.high_layer_norm.*", UNUSED),
    ("vision_model.low_layer_norm.*", UNUSED),
    ("vision_model.vision_tower_high.vision_tower.*", "vision.high.*"),
    ("vision_model.vision_tower_low.vision_tower.*", "vision.low.*"),
    ("vision_model.vision_tower.*", "vision.*"),
    ("aligner.high_up_proj.*", "aligner.high_proj.*"),
    ("aligner.low_up_proj.*", "aligner.low_proj.*"),
    ("aligner.layers.1.*", "aligner.proj.*"),
    ("aligner.layers.0.*", "aligner.linear1.*"),
    ("aligner.layers.2.*", "aligner.linear2.*"),
    ("language_model.model.*", "language.*"),
    ("language_model.lm_head.*", "lm_head.*"),
]

_SAM = "model.high_res_vision_model.vision_encoder"
_NECK = [("conv1.*", "0.*"), ("layer_norm1.*", "1.*"), ("conv2.*", "2.*"), ("layer_norm2.*", "3.*")]
_SIGLIP = "model.vision_model"  # files written in 2025 have ".vision_model" once more; `expected_tensors` knows both
_PARTS = [
    ("embeddings.patch_embedding.*", "patch_embed.proj.*"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.*.layer_norm1.*", "blocks.*.norm1.*"),
    ("encoder.layers.*.self_attn.{q,k,v}_proj.*", "blocks.*.attn.qkv.*"),
    ("encoder.layers.*.self_attn.out_proj.*", "blocks.*.attn.proj.*"),
    ("encoder.layers.*.layer_norm2.*", "blocks.*.norm2.*"),
    ("encoder.layers.*.mlp.*", "blocks.*.mlp.*"),
    ("post_layernorm.*", "norm.*"),
]

TRANSFORMERS_NAMES = [
    ("model.vision_model.*head.*", UNUSED),
    ("model.high_res_vision_alpha", "vision.high.hd_alpha_downsamples"),
    ("model.high_res_vision_proj.conv1.weight", "vision.high.downsamples.0.weight"),
    ("model.high_res_vision_proj.conv2.weight", "vision.high.downsamples.1.weight"),
    *((f"model.high_res_vision_neck.{theirs}", f"vision.high.neck_hd.{ours}") for theirs, ours in _NECK),
    *((f"{_SAM}.neck.{theirs}", f"vision.high.neck.{ours}") for theirs, ours in _NECK),
    (f"{_SAM}.pos_embed", "vision.high.pos_embed"),
    (f"{_SAM}.patch_embed.projection.*", "vision.high.patch_embed.proj.*"),
    (f"{_SAM}.layers.*.layer_norm1.*", "vision.high.blocks.*.norm1.*"),
    (f"{_SAM}.layers.*.layer_norm2.*", "vision.high.blocks.*.norm2.*"),
    (f"{_SAM}.layers.*", "vision.high.blocks.*"),
    *((f"{_SIGLIP}.{theirs}", f"{tower}.{ours}") for tower in ("vision.low", "vision") for theirs, ours in _PARTS),
    ("model.aligner.high_res_vision_proj.*", "aligner.high_proj.*"),
    ("model.aligner.vision_proj.*", "aligner.low_proj.*"),
    ("model.aligner.*", "aligner.*"),
    ("model.language_model.*", "language.*"),
    ("lm_head.*", "lm_head.*"),
]

VL2_NAMES = [
    ("vision.attn_pool.*", UNUSED),
    ("image_newline", "aligner.image_newline"),
    ("view_seperator", "aligner.view_seperator"),
    ("projector.layers.0.*", "aligner.linear1.*"),
    ("projector.layers.2.*", "aligner.linear2.*"),
    ("vision.*", "vision.*"),
    ("language.model.*", "language.*"),
    ("language.lm_head.*", "lm_head.*"),
]


STRAY_BUFFERS = r".*\.rotary_emb\.inv_freq|.*\.position_ids"  # which older transformers wrote


class Layout(NamedTuple):
    """One family of checkpoints: how to read its config, and its names."""

    read_config: Callable[[Section], ModelConfig]
    names: list[tuple[str, str]]


LAYOUTS = {  # model_type -> layout
    "multi_modality": Layout(official_config, OFFICIAL_NAMES),
    "deepseek_vl_v2": Layout(vl2_config, VL2_NAMES),
    "deepseek_vl": Layout(transformers_config, TRANSFORMERS_NAMES),
    "deepseek_vl_hybrid": Layout(transformers_config, TRANSFORMERS_NAMES),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # 8 bits and fewer would need scales


class Target(NamedTuple):
    """Where a checkpoint's tensor goes: a parameter of the model, or an equal part of one."""

    parameter: str
    shape: tuple[int, ...]  # that the tensor must have
    dtypes: tuple[torch.dtype, ...]  # of which it must have one


def checkpoint_names(name: str, table: list[tuple[str, str]]) -> list[str]:
    """The name or names that a parameter of the model has in a checkpoint."""
    for theirs, ours in table:
        match = re.fullmatch(re.escape(ours).replace(r"\*", "(.+)"), name)
        if match:
            theirs = theirs.replace("*", "%s") % match.groups()
            braces = re.search(r"\{(.+)\}", theirs)
            return [theirs.replace(braces[0], choice) for choice in braces[1].split(",")] if braces else [theirs]
    raise KeyError(name)


def expected_tensors(model: DeepseekVL, layout: Layout, found: set[str]) -> dict[str, Target]:
    """Every tensor that a checkpoint of this layout must hold for this model. A tied head is left out.

    Args:
        found: the names that are in the files; they tell the two eras of transformers' names apart.
    """
    siglip = _SIGLIP
    if any(name.startswith(f"{_SIGLIP}.vision_model.") for name in found):
        siglip += ".vision_model"
    expected = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and model.config.language.tie_word_embeddings:
            continue
        theirs, shape = checkpoint_names(name, layout.names), tuple(parameter.shape)
        if layout.names is TRANSFORMERS_NAMES and name.endswith("pos_embed") and len(shape) == 3:
            shape = shape[1:]  # SigLIP's positions are (1, N, D) officially, (N, D) in transformers' files
        dtypes = FLOATS if parameter.is_floating_point() else (parameter.dtype,)
        target = Target(name, (shape[0] // len(theirs), *shape[1:]), dtypes)
        expected |= dict.fromkeys((their_name.replace(_SIGLIP, siglip) for their_name in theirs), target)
    return expected


# ---------------------------------------------------------------------------- files


class WeightFile:
    """One file of tensors, opened without reading them: safetensors, or a pickle of weights only.

    Tensors come as views of the mapped file, so reading one costs no private memory. (A pickle
    from before 2020 is no zip file, cannot be mapped, and is read as a whole.)
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        check_is_no_pointer(path)
        try:
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                self.names, self._tensor = set(file.keys()), file.get_tensor
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                self.names, self._tensor = names_of_tensors(tensors), tensors.__getitem__
        except (UnpicklingError, EOFError, LookupError):  # torch's text for these advises to run the pickle
            raise ValueError(f"{path}: not a readable weight file (not a pickle of tensors alone)") from None
        except Exception as error:  # both libraries raise many kinds on a damaged file
            raise ValueError(f"{path}: not a readable weight file ({reason(error)})") from None

    def read(self, name: str) -> Tensor:
        """Raises: ValueError for a dtype that torch lacks."""
        try:
            return self._tensor(name)
        except (SafetensorError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path}: tensor {name[:200]} cannot be read ({reason(error)})") from None


def names_of_tensors(pickled: Any) -> set[str]:
    """The names in a dict of ordinary tensors. Raises: ValueError for anything else."""
    if not isinstance(pickled, dict):
        raise ValueError(f"expected a dict of tensors, found {type(pickled).__name__}")
    for name, tensor in pickled.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not isinstance(name, str):
            raise ValueError(f"{repr(name)[:80]} is no ordinary tensor with a name")
    return set(pickled)


def open_weights(folder: Path) -> dict[str, WeightFile]:
    """Every tensor name in a folder's weights, and the file that holds it.

    Takes model.safetensors, or shards with model.safetensors.index.json, or the same of
    pytorch_model.bin, in this order.

    Raises: ValueError for a missing or damaged file, or one that lacks what the index promises.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            file = WeightFile(single)
            return dict.fromkeys(file.names, file)
        if index.exists():
            return open_shards(index)
    found = ", only a GGUF file" if any(folder.glob("*.gguf")) else ""
    wanted = "model.safetensors or pytorch_model.bin, or shards and an index"
    raise ValueError(f"{folder}: no weights{found}, expected {wanted}")


def open_shards(index: Path) -> dict[str, WeightFile]:
    weight_map = Section(read_json(index), str(index)).section("weight_map").values
    if not weight_map:
        raise ValueError(f"{index}: no weight_map, expected an object of tensor names and file names")
    files: dict[str, WeightFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard[:200]:
            raise ValueError(f"{index}: {name[:200]} is said to be in {repr(shard)[:80]}, expected a file name")
        if shard not in files:
            files[shard] = WeightFile(index.parent / shard)
        if name not in files[shard].names:
            raise ValueError(f"{index.parent / shard}: lacks tensor {name[:200]}, which {index.name} promises")
    stored = {name: file for file in files.values() for name in file.names}
    if stored.keys() != weight_map.keys():
        name = min(stored.keys() - weight_map.keys())
        raise ValueError(f"{stored[name].path}: holds tensor {name[:200]}, which {index.name} does not list")
    return {name: files[shard] for name, shard in weight_map.items()}


def check_tensors(expected: dict[str, Target], files: dict[str, WeightFile], layout: Layout, folder: Path) -> None:
    """Raise ValueError that names the first tensor that is missing, unexpected, or of a wrong shape or dtype."""

    def listed(names: list[str]) -> str:
        return names[0][:200] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    missing = sorted(expected.keys() - files.keys())
    if missing:
        wrapped = next((name for name in files if name.endswith(f".{missing[0]}")), None)
        if wrapped:  # by DataParallel, "module."; torch.compile, "_orig_mod."; PEFT, "base_model.model."
            prefix = wrapped.removesuffix(missing[0])[-100:]
            raise ValueError(f"{folder}: tensors are named {prefix}..., save the model without what wrapped it")
        shape = list(expected[missing[0]].shape)
        raise ValueError(f"{folder}: missing tensor {listed(missing)}, expected shape {shape}")
    unused = [re.escape(theirs).replace(r"\*", ".*") for theirs, ours in layout.names if ours == UNUSED]
    unused.append(STRAY_BUFFERS)
    extra = sorted(name for name in files.keys() - expected.keys() if not re.fullmatch("|".join(unused), name))
    if extra:
        raise ValueError(f"{folder}: unexpected tensor {listed(extra)}, the model of config.json has no such part")
    for name, target in expected.items():
        tensor, where = files[name].read(name), f"{files[name].path}: tensor {name}"
        if tensor.shape != target.shape:
            raise ValueError(f"{where} has shape {list(tensor.shape)}, config.json says {list(target.shape)}")
        if tensor.dtype not in target.dtypes:
            raise ValueError(f"{where} holds {tensor.dtype}, expected one of {target.dtypes}")
        if tensor.dim() == 1 and not tensor.isfinite().all():  # a router's bias never reaches the logits
            raise ValueError(f"{where} holds values that are not finite")


# ---------------------------------------------------------------------------- how weights lie in memory

# Torch will drop the tensors from which FBGEMM's int8 weights are packed; `agrees` will then say no.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor")

# A linear layer has six forms, which are called alike:
#
#     nn.Linear              as the checkpoint has it
#     PackedLinear           bfloat16 in the order in which a CPU's matmul reads it
#     HalfLinear             float32 whose weights lie in float16 (x86 CPUs)
#     QuantizedLinear        int8 or int4; to be saved, and the equation of what the last two compute
#     DigitLinear            int8 in products of integers, for float32 (x86 CPUs)
#     PackedQuantizedLinear  int8 or int4 in the layout of torch's kernels
#
# `load_model` and `pack` put one in place of another. The model does not know.

QUANTIZATIONS = {"int8": torch.int8, "int4": torch.uint8}  # how each is stored
INT4_GROUPS = (128, 64)  # inputs that share a scale: the first that divides a layer's width
READ_AS_A_MATRIX = "kv_b_proj"  # latent attention computes with this weight itself, so it stays as it is


def layers_to_quantize(model: DeepseekVL, kind: str) -> list[str]:
    """The names of the linear layers that become "int8" or "int4".

    These are the decoder's layers and the head, which every new token reads whole. The rest stays as it is:
    embeddings, of which a token reads one row; norms and routers, which are small and sensitive; latent attention's
    `kv_b_proj`; vision and aligner, which run once an image; a head tied to the embedding; and for int4 a layer
    whose width no group divides.
    """
    head = () if model.config.language.tie_word_embeddings else ("lm_head",)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.startswith("language.layers.") or name in head)
        and not name.endswith(READ_AS_A_MATRIX)
        and (kind == "int8" or module.in_features % INT4_GROUPS[-1] == 0)
    ]


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weights are small integers. Inputs and outputs stay floats.

    This is the equation: dequantize, then multiply.

        int8    W[n, k] = q[n, k] * scale[n]                                       q from -127 to 127
        int4    W[n, k] = (q[n, k] - 8) * scale[k // g, n] + offset[k // g, n]     q from 0 to 15

    int8 has a scale for each output. int4 has a scale and an offset for each group of g inputs of each output. They
    are chosen so that a row's largest weight, or a group's least and largest, are met. Each weight goes to the
    nearest value (round to nearest: the baseline in LLM.int8(), arXiv 2208.07339, and GPTQ, 2210.17323).

    weight: int8 (out, in); for int4 uint8 (out, in / 2), two inputs a byte, the first in its high half.
    scales: (out,), for int4 (in / g, out, 2), scale and offset, in the dtype of the layer's input and output.
    """

    def __init__(self, weight: Tensor, scales: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * (1 if self.weight.dtype == torch.int8 else 2)

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.in_features if self.scales.dim() == 1 else self.in_features // len(self.scales)

    @classmethod
    def empty(cls, shape: tuple[int, int], kind: str, dtype: torch.dtype | None = None) -> QuantizedLinear:
        """For a weight (out, in), without values, on torch's default device."""
        rows, width = shape
        if kind == "int8":
            return cls(torch.empty(rows, width, dtype=torch.int8), torch.empty(rows, dtype=dtype))
        groups = width // next(group for group in INT4_GROUPS if width % group == 0)
        return cls(torch.empty(rows, width // 2, dtype=torch.uint8), torch.empty(groups, rows, 2, dtype=dtype))

    @classmethod
    def from_weight(cls, weight: Tensor, kind: str, dtype: torch.dtype) -> QuantizedLinear:
        """Quantize a weight (out, in) of any float dtype; int4 needs a multiple of 64 inputs."""
        with weight.device:
            layer = cls.empty(tuple(weight.shape), kind, dtype)
        scales = layer.scales if kind == "int8" else layer.scales.transpose(0, 1)  # (out, ...)
        step = max(1, 2**20 // weight.shape[1])  # so few rows at a time stay in a CPU's cache
        for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
            layer.weight[rows], scales[rows] = layer.rounded(weight[rows].detach().float())
        return layer

    def rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of a float32 weight -> what `weight` holds of them, and scales (rows,) or (rows, in / g, 2).

        The scales are rounded to their dtype first, so the integers make up for their rounding.
        """
        dtype, tiny = self.scales.dtype, torch.finfo(torch.float32).tiny
        if self.weight.dtype == torch.int8:
            scales = (weight.abs().amax(dim=1) / 127).to(dtype)
            q = (weight / scales.float().clamp(min=tiny)[:, None]).round_().clamp_(-127, 127)
            return q.to(torch.int8), scales
        weight = weight.unflatten(1, (-1, self.group))  # (rows, groups, g)
        least, largest = weight.amin(dim=2), weight.amax(dim=2)  # aminmax, both in one, takes ten times as long
        scale = ((largest - least) / 15).to(dtype)
        offset = (least + 8 * scale.float()).to(dtype)  # the value of q = 8
        q = (weight - offset.float()[..., None]).div_(scale.float().clamp(min=tiny)[..., None])
        q = q.add_(8).round_().clamp_(0, 15).to(torch.uint8).flatten(1)  # (rows, in)
        return q[:, 0::2] << 4 | q[:, 1::2], torch.stack((scale, offset), dim=-1)

    @staticmethod
    def halves(weight: Tensor) -> Tensor:
        """int4's (out, in / 2), two inputs a byte -> q (out, in), uint8 from 0 to 15."""
        return torch.stack((weight >> 4, weight & 15), dim=-1).flatten(1)

    def dequantized(self) -> Tensor:
        """W, (out, in), in the scales' dtype; computed in float32."""
        scales = self.scales.float()
        if self.weight.dtype == torch.int8:
            return (self.weight.float() * scales[:, None]).to(self.scales.dtype)
        q = self.halves(self.weight).float().unflatten(1, (-1, self.group))  # (out, groups, g)
        scale, offset = scales.transpose(0, 1).unsqueeze(2).unbind(-1)  # (out, groups, 1) both
        return ((q - 8) * scale + offset).flatten(1).to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), both in the scales' dtype."""
        return F.linear(x, self.dequantized())


class NoGradient(torch.autograd.Function):
    """The identity, for what a packed layer computes: its gradient is an error, and not silently missing."""

    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor) -> Tensor:
        """`x`, the layer's input, ties the result to the graph that would want a gradient."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        raise ValueError("a packed layer cannot learn: to train, load the model without pack and quantize")


class Packed(nn.Module):
    """A layer in a kernel's own layout. Its plain weight is gone: it cannot learn, nor be written as a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = self.product(x.detach().reshape(-1, x.shape[-1]))
        out = out.view(*x.shape[:-1], out.shape[-1])
        return NoGradient.apply(out, x) if x.requires_grad else out


class PackedLinear(Packed):
    """A bfloat16 linear layer on a CPU whose weight lies in the blocks that oneDNN's matmul reads.

    Given a plain matrix, oneDNN cuts it into blocks at every call, which at one token a step costs as much as the
    multiplication. Here that is done once, with the operators of torch's own compiler. The arithmetic is that of
    nn.Linear.
    """

    def __init__(self, linear: nn.Linear, workspace: Tensor | None = None):
        """
        Args:
            linear: of any float dtype; the packed layer is bfloat16.
            workspace: bfloat16, where a weight of another dtype is converted; it takes the size that this needs.
        """
        super().__init__()
        weight = linear.weight.detach()
        if weight.dtype != torch.bfloat16:
            weight = weight.bfloat16() if workspace is None else workspace.resize_(weight.shape).copy_(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # opaque
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16, copy=True)

    def product(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), both bfloat16."""
        one = len(rows) == 1  # repeated four times: for one row oneDNN uses no blocks
        rows = rows.expand(4, -1).contiguous() if one else rows
        out = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return out[:1] if one else out


class HalfLinear(Packed):
    """A float32 linear layer on an x86 CPU whose weights lie in float16: half the bytes, and so steps twice as fast.

    Products and sums are float32, those of nn.Linear, in FBGEMM, a part of torch.
    """

    LEAST = 2**19  # weights: smaller layers, which caches hold, are faster as they are

    def __init__(self, linear: nn.Linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)  # opaque

    def product(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), both float32."""
        return torch.ops.quantized.linear_dynamic_fp16(rows.float(), self.weight)


def fits_in_half(weight: Tensor) -> bool:
    """Whether each weight differs by at most 2^-25 from a finite float16: half the smallest one above zero."""
    parts = weight.split(256)  # little memory, and an early end for most that do not
    return all((part - part.half()).abs().max() <= 2**-25 for part in parts)  # inf - inf is nan


class DigitLinear(Packed):
    """int8 for float32 on an x86 CPU, by FBGEMM's product of 8-bit integers: nothing is dequantized, for any rows.

    A row x is rounded to 14 bits, counted from its largest value, in two digits, integers from -64 to 64: x = unit
    (a + b / 128). So

        W x = unit (W a + W b / 128)

    with a and b as two rows of one product, which takes hardly longer than for one. No digit is larger because
    CPUs add two products in 16 bits: 2 x 128 x 127, as digits count from 0 there, is less than 2^15.
    """

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        zeros = torch.zeros_like(layer.scales, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(layer.weight, layer.scales.double(), zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(weight, None)  # opaque; holds the scales

    def product(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), both float32; some rows at a time, which takes less memory."""
        return torch.cat([self.some_rows(part) for part in rows.float().split(256)])

    def some_rows(self, rows: Tensor) -> Tensor:
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        unit = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30).div_(64)
        x = rows / unit
        a = x.round()
        digits = torch.cat((a, x.sub_(a).mul_(128)))
        a, b = multiply(digits, 1.0, 64, self.weight).chunk(2)  # which rounds them, and counts from 64 below zero
        return a.add_(b, alpha=1 / 128).mul_(unit)


class PackedQuantizedLinear(Packed):
    """A quantized layer in the layout of torch's own kernels, which dequantize as they read.

    For a few rows, as in a decode step, these are fast: they read half or a quarter of the bytes. For the many rows
    of a prompt, dequantize + matmul is faster, and runs in pieces. (Of int4 on CUDA the kernel does any number.)
    A CPU's kernels are slow in float32: then they compute in bfloat16.
    """

    FEW_ROWS = {8: 12, 4: 128}  # above these, by bits, dequantize + matmul is faster (Zen 4, bfloat16)
    # Bytes of dequantized weights at a time. From 32 MiB on, glibc maps memory anew for each, which is slow.
    PIECE = 2**24

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features, self.group = layer.in_features, len(layer.weight), layer.group
        self.bits, on_cpu = 8 if layer.weight.dtype == torch.int8 else 4, layer.weight.device.type == "cpu"
        self.scales = layer.scales.clone()
        self.kernel_scales = self.scales.bfloat16() if on_cpu and self.scales.dtype == torch.float32 else self.scales
        self.weight = self.arranged(layer.weight)
        self.few = self.FEW_ROWS[self.bits] if self.bits == 8 or on_cpu else math.inf

    def arranged(self, weight: Tensor) -> Tensor:
        """The integers as the device's kernel wants them; int4's layout is opaque but for what `dequantized` knows."""
        if self.bits == 8:  # the kernel crashes on unaligned weights, and in a mapped file a tensor may begin anywhere
            return weight if weight.data_ptr() % 64 == 0 else weight.clone()
        if weight.device.type == "cuda":
            return torch.ops.aten._convert_weight_to_int4pack(weight, 8)
        packed = torch.empty_like(weight)
        for piece, place in zip(weight.split(256), packed.split(256)):  # as int32, 256 outputs fit a CPU's cache
            place.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(QuantizedLinear.halves(piece).int(), 1))
        return packed

    def product(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), in the scales' dtype."""
        dtype = self.scales.dtype  # under autocast the rows may be of another
        return self.multiply(rows).to(dtype) if len(rows) <= self.few else self.dequantize_and_multiply(rows.to(dtype))

    def multiply(self, rows: Tensor) -> Tensor:
        """The kernels. (rows, in) -> (rows, out), in the kernel's dtype."""
        rows = rows.to(self.kernel_scales.dtype).contiguous()
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.kernel_scales)
        on_cpu = rows.device.type == "cpu"
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        return kernel(rows, self.weight, self.group, self.kernel_scales)

    def dequantize_and_multiply(self, rows: Tensor) -> Tensor:
        """A plain matmul for some outputs at a time, a multiple of 64. (rows, in) -> (rows, out)."""
        outputs = self.out_features
        pieces = -(-outputs * self.in_features * rows.element_size() // self.PIECE)
        size = -(-outputs // (64 * pieces)) * 64
        out = [rows @ self.dequantized(start, min(start + size, outputs)) for start in range(0, outputs, size)]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def dequantized(self, start: int, stop: int) -> Tensor:
        """W of the outputs from `start` to `stop`, multiples of 64 for int4: (in, stop - start), transposed.

        int4's layout on a CPU has blocks of 64 outputs (32 without 512-bit vectors). In a block each input has 32 (16)
        bytes: the low halves are the first 32 (16) outputs, the high halves the others. As four bits of two's
        complement, q - 8 is q with its top bit flipped.
        """
        if self.bits == 8:
            return self.weight[start:stop].to(self.scales.dtype).mul_(self.scales[start:stop, None]).T
        width, half = self.in_features, 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
        packed = self.weight.view(-1, width, half)[start // (2 * half) : stop // (2 * half)]
        signed = (packed ^ 0x88).view(torch.int8)
        wide = torch.empty(width, len(packed), 2 * half, dtype=self.scales.dtype, device=self.weight.device)
        halves = wide.transpose(0, 1)
        halves[..., :half] = signed << 4 >> 4
        halves[..., half:] = signed >> 4
        wide = wide.view(width // self.group, self.group, stop - start)
        scales = self.scales[:, None, start:stop]  # (groups, 1, out, 2)
        scale, offset = (part.contiguous() for part in scales.unbind(-1))
        return torch.addcmul(offset, wide, scale, out=wide).view(width, -1)


@lru_cache
def agrees(form: type[Packed], kind: str | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this form of a layer can be had here, and gives the plain layer's results for one, a few and many rows.

    Args:
        kind: None for an nn.Linear, else that of a QuantizedLinear.
    """
    weight = torch.arange(640 * 384, device=device).sin().half().view(640, 384)
    plain = nn.utils.skip_init(nn.Linear, 384, 640, bias=False, dtype=dtype, device=device)
    plain.weight.data.copy_(weight)
    plain = plain if kind is None else QuantizedLinear.from_weight(weight, kind, dtype)
    x = torch.arange(200 * 384, device=device).cos().view(200, 384).to(dtype)
    try:
        packed = form(plain)
        with torch.inference_mode():  # as while decoding
            results = torch.cat([packed(rows) for rows in x.split((1, 4, 195))]).float()
    except (RuntimeError, AttributeError, TypeError):  # no such kernel for this device, dtype or torch
        return False
    expected = plain(x).detach().float()
    return bool((results - expected).norm() < 0.02 * expected.norm())


@lru_cache
def pays(form: type[Packed], kind: str | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this form `agrees` here, and if here is a CPU, multiplies one row faster than a plain layer: a race.

    A Zen 4 takes half the time with packed bfloat16; on a Xeon with AMX steps took 1.4 times as long with it.
    """
    works = agrees(form, kind, dtype, device)
    if not works or device.type != "cpu":
        return works
    with device:  # whatever torch's default is
        plain = nn.utils.skip_init(nn.Linear, 8192, 2048, bias=False, dtype=dtype)
        layer = plain if kind is None else QuantizedLinear.empty((2048, 8192), kind, dtype)
    for tensor in (plain.weight.data, *layer.buffers()):
        tensor.fill_(1)
    return is_faster(form(layer), plain)


@torch.inference_mode()
def is_faster(packed: nn.Module, plain: nn.Linear) -> bool:
    """A short race: which of two layers multiplies one row in less time."""
    row = plain.weight.new_ones(1, plain.in_features)
    first, second = (min(timeit.repeat(lambda: layer(row), number=1, repeat=4)) for layer in (packed, plain))  # noqa: B023
    return first < second


def packed(name: str, layer: nn.Module, dtype: torch.dtype | None = None, workspace: Tensor | None = None) -> nn.Module:
    """The layer's packed form, where this machine has one that is faster; otherwise the layer.

    Args:
        dtype: what the layer is to be converted to; by default its own.
        workspace: see `PackedLinear`.
    """
    if not isinstance(layer, (nn.Linear, QuantizedLinear)) or name.endswith(READ_AS_A_MATRIX):
        return layer
    weight, device, on_cuda = layer.weight.detach(), layer.weight.device, layer.weight.is_cuda
    if isinstance(layer, nn.Linear):
        dtype, is_large = dtype or weight.dtype, weight.numel() >= HalfLinear.LEAST
        is_for_tokens = not name.startswith(("vision.", "aligner."))  # an image gains less than `HalfLinear` costs
        if dtype == torch.bfloat16 and pays(PackedLinear, None, dtype, device):
            return PackedLinear(layer, workspace)
        gains = dtype == torch.float32 and is_for_tokens and is_large and agrees(HalfLinear, None, dtype, device)
        return HalfLinear(layer) if gains and fits_in_half(weight) else layer
    kind, dtype = "int8" if weight.dtype == torch.int8 else "int4", layer.scales.dtype
    if kind == "int8" and dtype == torch.float32 and agrees(DigitLinear, kind, dtype, device):
        return DigitLinear(layer)
    # At other widths int8's kernel drops the rest, or worse; on CUDA it is slower than the equation.
    least = 32 if kind == "int8" else 128 if on_cuda else 64
    fits = layer.in_features % least == 0 and (not on_cuda if kind == "int8" else len(weight) % 64 == 0)
    return PackedQuantizedLinear(layer) if fits and pays(PackedQuantizedLinear, kind, dtype, device) else layer


def pack(model: nn.Module) -> nn.Module:
    """Repack weights for fast inference, in place; irreversible. Returns the model.

    Linear layers become `PackedLinear` (bfloat16 on a CPU) or `HalfLinear` (float32 on an x86 CPU), quantized ones
    `DigitLinear` (int8 in float32 on an x86 CPU) or `PackedQuantizedLinear`. These can neither learn nor be written as
    a checkpoint. A layer that has no such form stays.
    """
    for name in [name for name, _ in model.named_modules() if name]:  # names alone, so each plain weight is freed
        model.set_submodule(name, packed(name, model.get_submodule(name)))
    return model


# ---------------------------------------------------------------------------- loading


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    pack: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[float], None] | None = None,
) -> DeepseekVL:
    """A checkpoint folder's model, in eval mode.

    The model is built without memory. Each module then gets its tensors, converted, quantized or packed. A tensor that
    has the wanted dtype and device already is not copied (but for what is packed, and for transformers' q, k and v,
    which are stacked): the file must then stay unchanged for as long as the model lives.

    Args:
        dtype: of all weights; by default as stored (for files that mix: as the embedding), but float32 for a
            float16 file on a CPU, which computes slowly in float16 and overflows early.
        quantize: "int8" or "int4": quantize the layers that `layers_to_quantize` names as they are read, so no
            more than a few of them are there in 16 bits. Files that hold quantized layers need no such option.
        pack: as `pack` does, in less time and memory. Quantized layers that are not packed are dequantized at
            every step, which is slow.
        tokenizer: see `read_config`.
        progress: called after each module with the share of tensors that have been read, up to 1.
    Raises: ValueError that names the file, key or tensor, and what was expected.
    """
    folder = Path(path)
    try:
        device = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device} is not available here ({str(error).splitlines()[0][:200]})") from None
    layout, config = read_layout_and_config(folder, tokenizer)
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize is {repr(quantize)[:80]}, expected one of {', '.join(QUANTIZATIONS)}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    files = open_weights(folder)
    if checkpoint_names("lm_head.weight", layout.names)[0] in files:  # then it is not tied, whatever the config says
        config = replace(config, language=replace(config.language, tie_word_embeddings=False))
    model = model_without_memory(config, files, folder)
    scales = {name: checkpoint_names(f"{name}.scales", layout.names)[0] for name in layers_to_quantize(model, "int8")}
    scales = {name: files[their_name].read(their_name) for name, their_name in scales.items() if their_name in files}
    stored = expect_quantization(model, scales)
    if stored and quantize not in (None, stored):
        raise ValueError(f"{folder}: holds {stored} weights, which cannot become {quantize}")
    chosen = set() if stored or quantize is None else set(layers_to_quantize(model, quantize))
    expected = expected_tensors(model, layout, set(files))
    check_tensors(expected, files, layout, folder)
    if dtype is None:
        embedding = checkpoint_names("language.embed_tokens.weight", layout.names)[0]
        dtype = files[embedding].read(embedding).dtype
        if dtype == torch.float16 and device.type == "cpu":
            dtype = torch.float32

    workspace = torch.empty(0, dtype=torch.bfloat16, device="cpu")

    def place(name: str, parameters: dict[str, list[str]]) -> int:
        """One module's tensors, how many there are."""
        module, tensors = model.get_submodule(name), {}
        for parameter, theirs in parameters.items():
            parts = [files[their_name].read(their_name) for their_name in theirs]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            tensors[parameter] = tensor.reshape(getattr(module, parameter).shape)
        if name in chosen:
            module = QuantizedLinear.from_weight(tensors["weight"].to(device), quantize, dtype)
        else:
            now = None if pack and isinstance(module, nn.Linear) and device.type == "cpu" else dtype  # or packing does
            tensors = {key: converted(tensor, device, now) for key, tensor in tensors.items()}
            module.load_state_dict(tensors, strict=False, assign=True)
        if pack:
            module = packed(name, module, dtype, None if name == "lm_head" else workspace)  # the head would enlarge it
        model.set_submodule(name, module.to(dtype))
        return sum(map(len, parameters.values()))

    by_fbgemm = pack and dtype == torch.float32 and "int4" not in (quantize, stored)
    by_fbgemm = by_fbgemm and agrees(HalfLinear, None, dtype, device)
    workers = min(4, torch.get_num_threads()) if by_fbgemm else 1  # it packs with one thread
    with ThreadPoolExecutor(workers) as pool:
        run, done = pool.map if workers > 1 else map, 0
        for count in run(place, *zip(*by_module(expected).items())):
            done += count
            if progress is not None:
                progress(done / len(expected))
    if config.language.tie_word_embeddings:
        model.lm_head.weight = model.language.embed_tokens.weight
        if pack:
            model.lm_head = packed("lm_head", model.lm_head)
    return model.eval()


def model_without_memory(config: ModelConfig, files: dict[str, WeightFile], folder: Path) -> DeepseekVL:
    """The model with parameters on the meta device. Raises: ValueError for sizes that no such files can have."""
    language = config.language
    blocks = max(language.num_hidden_layers, *(tower.layers for tower in towers(config)))
    if language.experts and blocks <= len(files):
        layers = sum(map(language.has_experts, range(language.num_hidden_layers)))
        blocks = max(blocks, layers * language.experts.n_routed_experts)
    if blocks > len(files):  # found before thousands of them are built: each has a tensor of its own
        raise ValueError(f"{folder}: missing tensors, {len(files)} for the {blocks} layers or experts of config.json")
    try:
        with torch.device("meta"):
            return DeepseekVL(config)
    except (RuntimeError, TypeError) as error:  # without memory, all that can fail is counting the bytes
        raise ValueError(f"{folder / 'config.json'}: sizes too large for any memory") from error


def by_module(expected: dict[str, Target]) -> dict[str, dict[str, list[str]]]:
    """Module -> its parameters -> their names in the files, in the order to load them.

    The head comes first: it is the largest layer, and while it is packed it is there twice.
    """
    modules: dict[str, dict[str, list[str]]] = {}
    for theirs, target in expected.items():
        module, _, parameter = target.parameter.rpartition(".")
        modules.setdefault(module, {}).setdefault(parameter, []).append(theirs)
    return dict(sorted(modules.items(), key=lambda item: item[0] != "lm_head"))


def converted(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    """The tensor on the device; one of floats in the dtype, unless that is None."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def expect_quantization(model: DeepseekVL, scales: dict[str, Tensor]) -> str | None:
    """Put a QuantizedLinear without values where a layer has scales. Returns their kind, "int4" or "int8", or None.

    The kind is that of the first scales; comparing names and shapes then refuses what does not fit it.
    """
    kind = next(("int8" if tensor.dim() == 1 else "int4" for tensor in scales.values()), None)
    for name in scales.keys() & layers_to_quantize(model, kind) if kind else ():
        linear = model.get_submodule(name)
        with torch.device("meta"):
            model.set_submodule(name, QuantizedLinear.empty((linear.out_features, linear.in_features), kind))
    return kind


# ---------------------------------------------------------------------------- saving


def save_model(model: DeepseekVL, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights into a checkpoint folder, as model.safetensors, for `load_model` and the original code.

    The folder's config.json says under which names. An older file stays whole until the new one is. Quantized layers
    are written as they are, which `load_model` knows and the original code does not.

    Args:
        dtype: to write in; by default as the weights are.
    Raises: ValueError where the folder's config describes another model, for a packed model, and for a tensor that
        no checkpoint has a place for or that is not finite in `dtype`; CannotWrite where it cannot be written.
    """
    folder = Path(path)
    tensors = tensors_to_save(model, folder, dtype)
    with unfinished(folder / "model.safetensors") as file:
        file.touch()  # with the mode that other files get, which save_file would not give
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(mode)


class CannotWrite(OSError, ValueError):
    """A file or folder cannot be written: a full disk, say, or a folder that is read-only.

    An OSError by its kind, and a ValueError as all other bad input.
    """

    def __init__(self, path: Path, why: object):
        super().__init__(f"{path}: cannot be written ({why})")
        self.why = why


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yields a name beside `path`. What is written there becomes `path` if no error ends the block, else it is removed.

    Raises: CannotWrite in place of any OSError inside the block.
    """
    hidden = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield hidden
        hidden.replace(path)
    except (SafetensorError, OSError) as error:
        raise CannotWrite(path, getattr(error, "why", None) or getattr(error, "strerror", None) or error) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if hidden.is_file():
            hidden.unlink()


def tensors_to_save(model: DeepseekVL, folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the layout that the folder's config.json names. Raises: as `save_model`."""
    if not isinstance(model, DeepseekVL):
        raise ValueError(f"a {type(model).__name__} is no DeepseekVL: save the model that it wraps")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ValueError("the model is packed, and its plain weights are gone: save it before pack()")
    layout, config = read_layout_and_config(folder)
    tied = model.config.language.tie_word_embeddings
    if replace(config, language=replace(config.language, tie_word_embeddings=tied)) != model.config:
        raise ValueError(f"{folder / 'config.json'}: describes another model than the one to be saved")
    parameters = model.state_dict()
    with torch.device("meta"):
        fresh = DeepseekVL(model.config)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    expect_quantization(fresh, {name: module.scales for name, module in quantized.items()})
    plain = {name: tensor.layout == torch.strided and not tensor.is_meta for name, tensor in parameters.items()}
    found = {name: list(tensor.shape) if plain[name] else "none" for name, tensor in parameters.items()}
    wanted = {name: list(tensor.shape) for name, tensor in fresh.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        shape, expected = found.get(name, "none"), wanted.get(name, "none: a checkpoint has no place for it")
        if shape != expected:
            raise ValueError(f"tensor {name} of the model has shape {shape}, expected {expected}")
    tensors, first = {}, {}
    for name, (target, tensor) in checkpoint_tensors(fresh, parameters, layout).items():
        tensor = converted(tensor, "cpu", dtype).contiguous()
        tied_by_hand = first.setdefault(tensor.data_ptr(), name) != name  # in a file no tensors share memory
        tensors[name] = tensor.clone() if tied_by_hand else tensor
        if tensors[name].dtype not in target.dtypes:
            raise ValueError(f"tensor {target.parameter} is {tensor.dtype}, expected one of {target.dtypes}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"tensor {target.parameter} is not finite in {tensors[name].dtype}, nothing is written")
    return tensors


def checkpoint_tensors(
    model: DeepseekVL, parameters: dict[str, Tensor], layout: Layout
) -> dict[str, tuple[Target, Tensor]]:
    """Views of the model's parameters, under the names and in the shapes that a checkpoint of the layout has."""
    parts: dict[str, Iterator[Tensor]] = {}  # of parameters that the checkpoint holds in several tensors
    tensors = {}
    for name, target in expected_tensors(model, layout, set()).items():
        rows = parts.setdefault(target.parameter, iter(parameters[target.parameter].view(-1, *target.shape)))
        tensors[name] = target, next(rows)
    return tensors


def save_checkpoint(model: DeepseekVL, source: str | Path, path: str | Path) -> None:
    """Write a new checkpoint folder: the model's weights, and the config and tokenizer files of `source`.

    For a quantized model, so that the next start is fast. The folder appears when it is whole.

    Raises: ValueError where `path` is already there, or lies in no folder; OSError where `source` is none, or
        a file in it cannot be read; and as `save_model`.
    """
    described = {}
    for file in sorted(Path(source).iterdir()):
        describes = file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json")
        if describes or file.name == "tokenizer.model":
            described[file.name] = file.read_bytes()  # first, so that an error names it
    with new_folder(Path(path)) as folder:
        for name, content in described.items():
            (folder / name).write_bytes(content)
        save_model(model, folder)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `path` if no error ends the block, and is gone otherwise."""
    check_new_folder(path)
    with unfinished(path) as folder:
        folder.mkdir()
        yield folder


def check_new_folder(path: Path) -> None:
    """Raise ValueError where no new folder can be made."""
    if path.exists():
        raise ValueError(f"{path}: is there already, expected the name of a new folder")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: expected the name of a new folder, in a folder that is there")
