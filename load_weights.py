"""From a checkpoint folder to a model: its config, its tensor names, its weights.

    config.json           -> read_config  -> ModelConfig, plain dataclasses
    names in the files    -> LAYOUTS      -> names in the model, one visible table a layout
    *.safetensors, *.bin  -> load_model   -> DeepseekVL, tensor by tensor, never the whole of it twice

Three layouts are read: the official ones of DeepSeek-VL (deepseek-ai/deepseek-vl-*) and of
DeepSeek-VL2 (deepseek-ai/deepseek-vl2*), and that of transformers (deepseek-community/*, and
whatever its save_pretrained writes).

Nothing of a checkpoint is ever executed: JSON, safetensors, and pickles with weights_only.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import (
    INT4_GROUPS,
    PACKED,
    QUANTIZATIONS,
    DeepseekVL,
    ExpertsConfig,
    LanguageConfig,
    LatentConfig,
    ModelConfig,
    QuantizedLinear,
    Workspace,
    YarnConfig,
    layers_to_quantize,
    pack_linears,
)
from processor import Tokenizer, load_tokenizer, read_json
from vision import HybridConfig, PixelNorm, SAMConfig, SigLIPConfig, TileConfig

# ---------------------------------------------------------------------------- config.json

# Beyond these a config is damaged: refused before it costs time and memory.
MAX_NUMBER = 2**31 - 1
MAX_BLOCKS = 20_000  # layers, or layers times experts; DeepSeek-VL2 has 30 x 72


class Section:
    """A JSON object of a config that knows its own name, so that errors can tell it."""

    def __init__(self, values: Any, name: str):
        if not isinstance(values, dict):
            raise ValueError(f"{name}: expected an object, found {type(values).__name__}")
        self.values, self.name = values, name

    def section(self, key: str) -> Section:
        """The object inside; an absent or null one is empty."""
        value = self.values.get(key)
        return Section({} if value is None else value, f"{self.name}: {key}")

    def get(self, key: str, default: Any, least: float | None = None) -> Any:
        """A number of the default's type, above zero, or `least` and more; absent or null it is the default."""
        value = self.values.get(key)
        return default if value is None else self._number(key, value, type(default), least)

    def numbers(self, key: str, default: tuple, least: float | None = None, same_length: bool = True) -> tuple:
        """A list of numbers like `default`, and as many unless told otherwise; absent or null it is the default."""
        values = self.values.get(key)
        if values is None:
            return default
        if not isinstance(values, list) or (same_length and len(values) != len(default)):
            count = len(default) if same_length else "some"
            raise ValueError(f"{self.name}: {key} is {values!r}, expected a list of {count} numbers")
        return tuple(self._number(f"{key}[{i}]", value, type(default[0]), least) for i, value in enumerate(values))

    def _number(self, key: str, value: Any, wanted: type, least: float | None) -> Any:
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits or not (0 < value if least is None else least <= value) or value > MAX_NUMBER:
            kind = {int: "an integer", float: "a number"}[wanted]
            bound = "above 0" if least is None else f"of {least} or more"
            raise ValueError(f"{self.name}: {key} is {value!r}, expected {kind} {bound}, at most {MAX_NUMBER}")
        return wanted(value)

    def expect(self, key: str, *allowed: Any) -> Any:
        """The value, which must be one of `allowed`; an absent or null one is the first of them."""
        value = self.values.get(key)
        value = allowed[0] if value is None else value
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{self.name}: {key} is {value!r}, only {choices} is supported")
        return value


# The official configs name a vision tower by its preset; keys beside the name override it.
SIGLIP_PRESETS = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}
SAM_PRESET = "sam_b_downsample"

GELU_FORMS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # hidden_act -> torch's name


def official_siglip(params: Section, name: str = "siglip_large_patch16_384", gelu: str = "none") -> SigLIPConfig:
    params.expect("model_name", name)
    preset = SIGLIP_PRESETS[name]
    params.expect("select_feature", "same")
    params.expect("select_layer", -1)
    size = {key: params.get(key, value) for key, value in preset.items()}
    return SigLIPConfig(
        image_size=params.get("image_size", 384),
        patch_size=size["patch_size"],
        width=size["width"],
        layers=size["layers"],
        heads=size["heads"],
        mlp_width=int(size["width"] * size["mlp_ratio"]),
        gelu=gelu,
    )


def official_sam(params: Section) -> SAMConfig:
    params.expect("model_name", SAM_PRESET)
    default = SAMConfig()
    width = params.get("width", default.width)
    return SAMConfig(
        image_size=params.get("image_size", default.image_size),
        patch_size=params.get("patch_size", default.patch_size),
        width=width,
        layers=params.get("layers", default.layers),
        heads=params.get("heads", default.heads),
        mlp_width=int(width * params.get("mlp_ratio", 4.0)),
        window=params.get("window_size", default.window),
        global_layers=params.numbers("global_attn_indexes", default.global_layers, least=0, same_length=False),
        neck_channels=params.get("neck_channels", default.neck_channels),
        downsample_channels=params.numbers("downsample_channels", default.downsample_channels),
    )


def official_pixel_norm(params: Section, default: PixelNorm) -> PixelNorm:
    return PixelNorm(
        mean=params.numbers("pixel_mean", default.mean, least=0.0),
        std=params.numbers("pixel_std", default.std),
    )


def official_vision(config: Section) -> SigLIPConfig | HybridConfig:
    kind = config.expect("cls", "CLIPVisionTower", "HybridVisionTower")
    params = config.section("params")
    if kind == "CLIPVisionTower":
        return official_siglip(params)
    low, high = params.section("low_res_cfg"), params.section("high_res_cfg")
    params.expect("concat_type", "tuple")
    return HybridConfig(
        low=official_siglip(low),
        high=official_sam(high),
        low_norm=official_pixel_norm(low, HybridConfig.low_norm),
        high_norm=official_pixel_norm(high, HybridConfig.high_norm),
    )


def transformers_siglip(config: Section) -> SigLIPConfig:
    config.expect("model_type", "siglip_vision_model")
    return SigLIPConfig(
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        width=config.get("hidden_size", 768),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        gelu=GELU_FORMS[config.expect("hidden_act", "gelu_pytorch_tanh", "gelu")],
    )


def transformers_sam(config: Section) -> SAMConfig:
    config.expect("model_type", "sam_vision_model")
    for key in ("qkv_bias", "use_abs_pos", "use_rel_pos"):
        config.expect(key, True)
    config.expect("hidden_act", "gelu")
    default = SAMConfig()
    channels = config.get("output_channels", default.neck_channels)
    width = config.get("hidden_size", default.width)
    return SAMConfig(
        image_size=config.get("image_size", default.image_size),
        patch_size=config.get("patch_size", default.patch_size),
        width=width,
        layers=config.get("num_hidden_layers", default.layers),
        heads=config.get("num_attention_heads", default.heads),
        mlp_width=config.get("mlp_dim", int(width * config.get("mlp_ratio", 4.0))),
        window=config.get("window_size", default.window),
        global_layers=config.numbers("global_attn_indexes", default.global_layers, least=0, same_length=False),
        neck_channels=channels,
        downsample_channels=(2 * channels, 4 * channels),
    )


def llama(config: Section) -> LanguageConfig:
    """A Llama config in which absent keys have the defaults of transformers' LlamaConfig."""
    config.expect("model_type", "llama")
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("rope_scaling", None)
    rope = config.section("rope_parameters")  # newer files; older ones have rope_theta beside the sizes
    rope.expect("rope_type", "default")
    heads = config.get("num_attention_heads", 32)
    hidden_size = config.get("hidden_size", 4096)
    kv_heads = config.get("num_key_value_heads", heads)
    return LanguageConfig(
        vocab_size=config.get("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=config.get("intermediate_size", 11008),
        num_hidden_layers=config.get("num_hidden_layers", 32),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.get("head_dim", hidden_size // heads),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        tie_word_embeddings=config.expect("tie_word_embeddings", False, True),
    )


def official_config(config: Section) -> ModelConfig:
    vision = official_vision(config.section("vision_config"))
    aligner = config.section("aligner_config").section("params")
    hybrid = isinstance(vision, HybridConfig)
    aligner.expect("projector_type", "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu")
    aligner.expect("depth", 2)
    return ModelConfig(vision, llama(config.section("language_config")))


def transformers_config(config: Section) -> ModelConfig:
    vision = transformers_siglip(config.section("vision_config"))
    if config.values["model_type"] == "deepseek_vl_hybrid":
        vision = HybridConfig(low=vision, high=transformers_sam(config.section("high_res_vision_config")))
    tie = config.expect("tie_word_embeddings", True, False)
    text = Section({**config.section("text_config").values, "tie_word_embeddings": tie}, f"{config.name}: text_config")
    return ModelConfig(vision, llama(text), image_token_id=config.get("image_token_id", 100015))


def deepseek_v2(config: Section) -> LanguageConfig:
    """The language model of DeepSeek-VL2; absent keys have the defaults of its DeepseekV2Config."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    heads = config.get("num_attention_heads", 32)
    hidden_size = config.get("hidden_size", 4096)
    latent = None
    if config.expect("use_mla", True, False):
        q_lora_rank = config.values.get("q_lora_rank", 1536)  # null says: none
        latent = LatentConfig(
            q_lora_rank=None if q_lora_rank is None else config.get("q_lora_rank", 1536),
            kv_lora_rank=config.get("kv_lora_rank", 512),
            qk_nope_head_dim=config.get("qk_nope_head_dim", 128),
            qk_rope_head_dim=config.get("qk_rope_head_dim", 64),
            v_head_dim=config.get("v_head_dim", 128),
        )
    return LanguageConfig(
        vocab_size=config.get("vocab_size", 102400),
        hidden_size=hidden_size,
        intermediate_size=config.get("intermediate_size", 11008),
        num_hidden_layers=config.get("num_hidden_layers", 30),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads", heads),
        head_dim=hidden_size // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=config.get("rope_theta", 10000.0),
        tie_word_embeddings=config.expect("tie_word_embeddings", False, True),
        latent=latent,
        experts=deepseek_experts(config),
        yarn=yarn(config),
    )


def deepseek_experts(config: Section) -> ExpertsConfig | None:
    if config.values.get("n_routed_experts") is None:
        return None
    experts = ExpertsConfig(
        n_routed_experts=config.get("n_routed_experts", 1),
        n_shared_experts=config.get("n_shared_experts", 0, least=0),
        num_experts_per_tok=config.get("num_experts_per_tok", 1),
        moe_intermediate_size=config.get("moe_intermediate_size", 1407),
        first_k_dense_replace=config.get("first_k_dense_replace", 0, least=0),
        moe_layer_freq=config.get("moe_layer_freq", 1),
        topk_method=config.expect("topk_method", "greedy", "group_limited_greedy", "noaux_tc"),
        scoring_func=config.expect("scoring_func", "softmax", "sigmoid"),
        n_group=config.get("n_group", 1),
        topk_group=config.get("topk_group", 1),
        norm_topk_prob=config.expect("norm_topk_prob", False, True),
        routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
    )
    choosable = experts.n_routed_experts
    if experts.topk_method != "greedy":
        choosable = experts.n_routed_experts // experts.n_group * experts.topk_group
    if (
        experts.n_routed_experts % experts.n_group
        or experts.topk_group > experts.n_group
        or experts.num_experts_per_tok > choosable
    ):
        raise ValueError(
            f"{config.name}: {experts.num_experts_per_tok} experts a token, of {experts.topk_group} in "
            f"{experts.n_group} groups, do not fit {experts.n_routed_experts} experts"
        )
    return experts


def yarn(config: Section) -> YarnConfig | None:
    if config.values.get("rope_scaling") is None:
        return None
    scaling = config.section("rope_scaling")
    kind = scaling.values.get("type", scaling.values.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"{scaling.name}: type is {kind!r}, only 'yarn' is supported")
    return YarnConfig(
        factor=scaling.get("factor", 1.0),
        original_max_position_embeddings=scaling.get("original_max_position_embeddings", 4096),
        beta_fast=scaling.get("beta_fast", 32.0),
        beta_slow=scaling.get("beta_slow", 1.0),
        mscale=scaling.get("mscale", 1.0, least=0.0),
        mscale_all_dim=scaling.get("mscale_all_dim", 0.0, least=0.0),
    )


def vl2_config(config: Section) -> ModelConfig:
    config.expect("tile_tag", "2D")
    projector = config.section("projector_config")
    projector.expect("projector_type", "downsample_mlp_gelu")
    projector.expect("depth", 2)
    tiles = TileConfig(
        downsample_ratio=projector.get("downsample_ratio", 2),
        mlp_ratio=projector.get("mlp_ratio", 1),
        global_view_first=config.expect("global_view_pos", "head", "tail") == "head",
    )
    vision = official_siglip(config.section("vision_config"), "siglip_so400m_patch14_384", gelu="tanh")
    language = deepseek_v2(config.section("language_config"))
    for key, found, needed in (
        ("input_dim", projector.get("input_dim", 1152), vision.width),
        ("n_embed", projector.get("n_embed", 2048), language.hidden_size),
    ):
        if found != needed:
            raise ValueError(f"{projector.name}: {key} is {found}, expected {needed} to fit its neighbours")
    return ModelConfig(vision, language, tiles)


def read_config(path: str | Path, tokenizer: Tokenizer | None = None) -> ModelConfig:
    """The config of a checkpoint folder, in any known layout.

    The ids of the image token and of the tokens that end an answer are looked up in the
    folder's generation config and tokenizer, where there are such files.

    Args:
        tokenizer: the folder's, where it has been read before, which takes up to a second.
    Raises: ValueError that names the file and the key, and what was expected.
    """
    return read_layout_and_config(Path(path), tokenizer)[1]


def read_layout_and_config(folder: Path, tokenizer: Tokenizer | None = None) -> tuple[Layout, ModelConfig]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file, expected a checkpoint folder with a config.json")
    values = read_json(file)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise ValueError(f"{file}: model_type is {kind!r}, expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    config = layout.read_config(Section(values, str(file)))
    check_sizes(config, file)
    image_token_id, end_token_ids = find_token_ids(folder, config, tokenizer)
    return layout, replace(config, image_token_id=image_token_id, end_token_ids=end_token_ids)


def check_sizes(config: ModelConfig, file: Path) -> None:
    """Raise ValueError where the sizes do not fit each other."""
    language, towers = config.language, [config.vision]
    if isinstance(config.vision, HybridConfig):
        towers = [config.vision.low, config.vision.high]
        if not config.vision.high.global_layers or max(config.vision.high.global_layers) >= config.vision.high.layers:
            raise ValueError(f"{file}: global_attn_indexes do not fit {config.vision.high.layers} SAM layers")
    experts = language.experts.n_routed_experts if language.experts else 1
    for blocks in (language.num_hidden_layers * experts, *(tower.layers for tower in towers)):
        if blocks > MAX_BLOCKS:
            raise ValueError(f"{file}: {blocks} layers or experts, expected at most {MAX_BLOCKS}")
    heads, kv_heads = language.num_attention_heads, language.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"{file}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if language.rope_dim < 2 or language.rope_dim % 2:
        raise ValueError(f"{file}: heads of {language.rope_dim} values cannot be rotated in pairs")
    for tower in towers:
        if tower.width % tower.heads:
            raise ValueError(f"{file}: vision width {tower.width} is no multiple of {tower.heads} heads")
        if tower.image_size < tower.patch_size:
            raise ValueError(f"{file}: a {tower.image_size} pixel image holds no {tower.patch_size} pixel patch")


def find_token_ids(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None = None
) -> tuple[int | None, tuple[int, ...]]:
    """The image token's id and the ids that end an answer, from the files that know them.

    transformers' generation_config.json names the end tokens by id; without it the tokenizer's
    own end token counts. Where a folder has neither, nothing ends an answer but its length.
    """
    image_token_id, end_token_ids = config.image_token_id, ()
    if tokenizer is None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        if image_token_id is None:
            image_token_id = tokenizer.token_to_id("<image>" if config.tiles else "<image_placeholder>")
        if tokenizer.eos_token_id is not None:
            end_token_ids = (tokenizer.eos_token_id,)
    file = folder / "generation_config.json"
    if file.exists():
        ids = read_json(file).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{file}: eos_token_id is {ids!r}, expected an integer or a list of them")
            end_token_ids = tuple(ids)
    return image_token_id, end_token_ids


# ---------------------------------------------------------------------------- tensor names

# A row says: this name in the checkpoint is that name in the model. The first row that fits
# counts. `*` stands for the same text on both sides; `{a,b}` for names that the model keeps
# as one tensor, stacked in this order along the first dimension.

OFFICIAL_NAMES = [
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
    ("image_newline", "aligner.image_newline"),
    ("view_seperator", "aligner.view_seperator"),
    ("projector.layers.0.*", "aligner.linear1.*"),
    ("projector.layers.2.*", "aligner.linear2.*"),
    ("vision.*", "vision.*"),
    ("language.model.*", "language.*"),
    ("language.lm_head.*", "lm_head.*"),
]


class Layout(NamedTuple):
    """One family of checkpoints: how to read its config, its names, and what to pass over."""

    read_config: Callable[[Section], ModelConfig]
    names: list[tuple[str, str]]
    unused: tuple[str, ...]  # patterns of tensors that no forward pass of the original reads


OFFICIAL = Layout(
    official_config,
    OFFICIAL_NAMES,
    (
        "vision_model.*attn_pool.*",  # SigLIP's pooling head
        "vision_model.high_layer_norm.*",
        "vision_model.low_layer_norm.*",
    ),
)
TRANSFORMERS = Layout(transformers_config, TRANSFORMERS_NAMES, ("model.vision_model.*head.*",))
VL2 = Layout(vl2_config, VL2_NAMES, ("vision.attn_pool.*",))
LAYOUTS = {
    "multi_modality": OFFICIAL,
    "deepseek_vl_v2": VL2,
    "deepseek_vl": TRANSFORMERS,
    "deepseek_vl_hybrid": TRANSFORMERS,
}


class Target(NamedTuple):
    """Where a checkpoint's tensor goes: a parameter of the model, or an equal part of one."""

    parameter: str
    shape: tuple[int, ...]  # that the tensor must have


def checkpoint_names(name: str, table: list[tuple[str, str]]) -> list[str]:
    """The name or names that a parameter of the model has in a checkpoint."""
    for theirs, ours in table:
        match = re.fullmatch(re.escape(ours).replace(r"\*", "(.+)"), name)
        if match is None:
            continue
        for text in match.groups():
            theirs = theirs.replace("*", text, 1)
        braces = re.search(r"\{(.+)\}", theirs)
        if braces is None:
            return [theirs]
        return [theirs.replace(braces.group(), choice) for choice in braces.group(1).split(",")]
    raise KeyError(name)


def expected_tensors(model: DeepseekVL, layout: Layout, found: set[str]) -> dict[str, Target]:
    """Every tensor that a checkpoint of this layout must hold for this model.

    Args:
        found: the names that are in the files; they tell the two eras of transformers' names apart.
    """
    double = any(name.startswith("model.vision_model.vision_model.") for name in found)
    expected = {}
    for name, parameter in model.state_dict().items():
        theirs = checkpoint_names(name, layout.names)
        shape = tuple(parameter.shape)
        if layout is TRANSFORMERS and name.endswith("pos_embed") and len(shape) == 3:
            shape = shape[1:]  # SigLIP's positions are (1, N, D) officially, (N, D) in transformers' files
        part_shape = (shape[0] // len(theirs), *shape[1:])
        for their_name in theirs:
            if double:
                their_name = re.sub(r"^model\.vision_model\.", "model.vision_model.vision_model.", their_name)
            expected[their_name] = Target(name, part_shape)
    return expected


# ---------------------------------------------------------------------------- files

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # 8 bits and fewer would need scales


class WeightFile:
    """One file of tensors, opened without reading them: safetensors, or a pickle of weights only.

    Tensors come as views of the mapped file, so reading one costs no private memory. (A pickle
    from before 2020 is no zip file, cannot be mapped, and is read as a whole.)
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, framework="pt")
                self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}
            else:
                self._file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                self.shapes = plain_shapes(self._file)
        except (UnpicklingError, EOFError, LookupError):  # torch's text for these advises to run the pickle
            raise ValueError(f"{path}: not a readable weight file (not a pickle of tensors alone)") from None
        except Exception as error:  # both libraries raise many kinds on a damaged file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path}: not a readable weight file ({reason})") from None

    def read(self, name: str) -> Tensor:
        if isinstance(self._file, dict):
            return self._file[name]
        return self._file.get_tensor(name)


def plain_shapes(pickled: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a dict of ordinary tensors. Raises: ValueError for anything else."""
    if not isinstance(pickled, dict):
        raise ValueError(f"expected a dict of tensors, found {type(pickled).__name__}")
    for name, tensor in pickled.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or not isinstance(name, str):
            raise ValueError(f"{name!r} is no ordinary tensor with a name")
    return {name: tuple(tensor.shape) for name, tensor in pickled.items()}


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
            return dict.fromkeys(file.shapes, file)
        if index.exists():
            return open_shards(index)
    raise ValueError(f"{folder}: no weights, expected model.safetensors or pytorch_model.bin, or shards and an index")


def open_shards(index: Path) -> dict[str, WeightFile]:
    weight_map = Section(read_json(index), str(index)).section("weight_map").values
    if not weight_map:
        raise ValueError(f"{index}: no weight_map, expected an object of tensor names and file names")
    files: dict[str, WeightFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: {name} is said to be in {shard!r}, expected a file name")
        if shard not in files:
            files[shard] = WeightFile(index.parent / shard)
        if name not in files[shard].shapes:
            raise ValueError(f"{index.parent / shard}: lacks tensor {name}, which {index.name} promises")
    stored = {name: file for file in files.values() for name in file.shapes}
    if stored.keys() != weight_map.keys():
        name = min(stored.keys() - weight_map.keys())
        raise ValueError(f"{stored[name].path}: holds tensor {name}, which {index.name} does not list")
    return {name: files[shard] for name, shard in weight_map.items()}


def check_names(expected: dict[str, Target], files: dict[str, WeightFile], layout: Layout, folder: Path) -> None:
    """Raise ValueError that names the first tensor that is missing, misshapen, or unexpected."""

    def listed(names: list[str]) -> str:
        return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    missing = sorted(expected.keys() - files.keys())
    if missing:
        target = expected[missing[0]]
        raise ValueError(f"{folder}: missing tensor {listed(missing)}, expected shape {list(target.shape)}")
    unused = [re.compile(re.escape(pattern).replace(r"\*", ".*")) for pattern in layout.unused]
    extra = sorted(name for name in files.keys() - expected.keys() if not any(p.fullmatch(name) for p in unused))
    if extra:
        raise ValueError(f"{folder}: unexpected tensor {listed(extra)}, the model of config.json has no such part")
    for name, target in expected.items():
        shape = files[name].shapes[name]
        if shape != target.shape:
            raise ValueError(
                f"{files[name].path}: tensor {name} has shape {list(shape)}, config.json says {list(target.shape)}"
            )


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

    The model is built without memory, and each tensor is put in place as it is read: converted
    and moved alone (or when it is packed), and where dtype and device are those of the file, not
    copied at all (but for what is packed, and for transformers' q, k and v, which are stacked):
    then the file must stay as it is for as long as the model lives.

    Args:
        dtype: of all weights; by default as stored (for files that mix: as the embedding).
        quantize: "int8" or "int4": the layers that `layers_to_quantize` names are rounded as they are read, so
            that no more than one of them is there in 16 bits. A file that was saved so is loaded as it is.
        pack: as `DeepseekVL.pack`, in less time and memory: each part of the model is packed as soon as all its tensors
            have been read, layers in 16 bits straight from the file's memory. The head, which is the largest layer
            and for a moment there twice, comes first. Quantized layers that are not packed are widened at every
            step, which is slow.
        tokenizer: see `read_config`.
        progress: called after each tensor with the share of them that has been read, up to 1.
    Raises: ValueError that names the file, key or tensor, and what was expected.
    """
    folder = Path(path)
    layout, config = read_layout_and_config(folder, tokenizer)
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZATIONS)}")
    files = open_weights(folder)
    head = checkpoint_names("lm_head.weight", layout.names)[0]
    if head in files:  # a head that is in the file is its own tensor, whatever the config says
        config = replace(config, language=replace(config.language, tie_word_embeddings=False))
    try:
        with torch.device("meta"):
            model = DeepseekVL(config)
    except (RuntimeError, TypeError) as error:  # without memory, all that can fail is counting the bytes
        raise ValueError(f"{folder / 'config.json'}: sizes too large for any memory") from error
    stored = prepare_quantized(model, layout, files)
    if stored and quantize not in (None, stored):
        raise ValueError(f"{folder}: holds {stored} weights, which cannot become {quantize}")
    rounded = set() if stored or quantize is None else set(layers_to_quantize(model, quantize))
    expected = expected_tensors(model, layout, set(files))
    if config.language.tie_word_embeddings:
        del expected[head]
    check_names(expected, files, layout, folder)
    count = len({target.parameter for target in expected.values()})
    dtype = stored_dtype(expected, files) if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, expected one of {FLOATS}")
    part, workspace = "", Workspace()
    for i, (name, tensor) in enumerate(read_parameters(model, expected, files), start=1):
        module_name, _, tensor_name = name.rpartition(".")
        if pack and part != part_of(name):
            pack_part(model, part, dtype, workspace)
        part, module = part_of(name), model.get_submodule(module_name)
        if module_name in rounded:
            parent_name, _, layer_name = module_name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, layer_name, QuantizedLinear.from_weight(tensor.to(device), quantize, dtype))
        elif isinstance(module, QuantizedLinear):
            setattr(module, tensor_name, tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))
        else:  # on a CPU, pack_part converts all of its part
            later = pack and part != "language" and torch.device(device).type == "cpu"
            setattr(module, tensor_name, nn.Parameter(tensor.to(device=device, dtype=None if later else dtype)))
        if progress is not None:
            progress(i / count)
    if config.language.tie_word_embeddings:
        model.lm_head.weight = model.language.embed_tokens.weight
    if pack:
        pack_part(model, part, dtype, workspace)  # the last one
        model.pack()  # a head that is the embedding
    return model.eval()


def part_of(name: str) -> str:
    """What a parameter is packed with: a decoder layer, "vision", "aligner", "lm_head", or the rest, "language"."""
    return ".".join(name.split(".")[: 3 if name.startswith("language.layers.") else 1])


def pack_part(model: DeepseekVL, part: str, dtype: torch.dtype, workspace: Workspace) -> None:
    """Pack one part of the model, all of whose tensors have been read, and convert its other parameters to `dtype`.

    Around the layers, part "language", there is nothing to pack: that is converted as it is read.
    """
    if part in ("", "language"):
        return
    holder = nn.ModuleDict({"part": model.get_submodule(part)})  # the head is itself a layer to replace
    pack_linears(holder, dtype, Workspace() if part == "lm_head" else workspace)  # so large a one is not kept
    holder.to(dtype)
    parent_name, _, name = part.rpartition(".")
    setattr(model.get_submodule(parent_name), name, holder["part"])


def prepare_quantized(model: DeepseekVL, layout: Layout, files: dict[str, WeightFile]) -> str | None:
    """Where the files hold a layer's scales, make room for it to be quantized. Returns "int4", "int8" or None.

    Raises: ValueError for weights beside scales that are not integers of the expected dtypes, for int4 of a width that
        fits no group, and for int8 and int4 in one folder.
    """
    kinds = set()
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or not name.startswith(("language.layers.", "lm_head")):
            continue
        weight, scales = (checkpoint_names(f"{name}.{part}", layout.names)[0] for part in ("weight", "scales"))
        if scales not in files or weight not in files:
            continue
        found = files[weight].read(weight).dtype
        kind = next((kind for kind, dtype in QUANTIZATIONS.items() if dtype == found), None)
        if kind is None:
            raise ValueError(f"{files[weight].path}: tensor {weight} holds {found}, expected int8 or uint8")
        if kind == "int4" and linear.in_features % INT4_GROUPS[-1]:
            raise ValueError(f"{files[weight].path}: tensor {weight} is int4, its width fits no group of {INT4_GROUPS}")
        kinds.add(kind)
        parent_name, _, layer_name = name.rpartition(".")
        with torch.device("meta"):
            layer = QuantizedLinear.empty((linear.out_features, linear.in_features), kind)
        setattr(model.get_submodule(parent_name), layer_name, layer)
    if len(kinds) > 1:
        folder = next(iter(files.values())).path.parent
        raise ValueError(f"{folder}: holds both int8 and int4 layers, expected one kind")
    return min(kinds, default=None)


def stored_dtype(expected: dict[str, Target], files: dict[str, WeightFile]) -> torch.dtype:
    """The embedding's."""
    name = next(name for name, target in expected.items() if target.parameter == "language.embed_tokens.weight")
    dtype = files[name].read(name).dtype
    if dtype not in FLOATS:
        raise ValueError(f"{files[name].path}: tensor {name} holds {dtype}, expected one of {FLOATS}")
    return dtype


def read_parameters(
    model: DeepseekVL, expected: dict[str, Target], files: dict[str, WeightFile]
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and value as stored, one at a time, its parts joined."""
    sources: dict[str, list[str]] = {}
    # The head first: it is the largest, and while it is packed it is there twice. The parts of one parameter follow
    # each other.
    for name, target in sorted(expected.items(), key=lambda item: not item[1].parameter.startswith("lm_head.")):
        sources.setdefault(target.parameter, []).append(name)
    meta = model.state_dict()
    for parameter, names in sources.items():
        parts = [files[name].read(name) for name in names]
        integer = None if meta[parameter].is_floating_point() else meta[parameter].dtype
        for name, part in zip(names, parts):
            if part.dtype not in ((integer,) if integer else FLOATS):
                wanted = integer or f"one of {FLOATS}"
                raise ValueError(f"{files[name].path}: tensor {name} holds {part.dtype}, expected {wanted}")
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if parameter.endswith("pos_embed") and tensor.dim() == 2:
            tensor = tensor[None]
        yield parameter, tensor


def save_model(model: DeepseekVL, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights into a checkpoint folder, as model.safetensors, for `load_model` and the original code.

    The folder's config.json says under which names. An older file stays whole until the new one is. Quantized layers
    are written as they are, which `load_model` knows and the original code does not.

    Args:
        dtype: to write in; by default as the weights are.
    Raises: ValueError where the folder's config describes another model, and for a packed model.
    """
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise ValueError("the model is packed, and its plain weights are gone: save it before pack()")
    folder = Path(path)
    layout, config = read_layout_and_config(folder)
    tied = model.config.language.tie_word_embeddings
    if replace(config, language=replace(config.language, tie_word_embeddings=tied)) != model.config:
        raise ValueError(f"{folder / 'config.json'}: describes another model than the one to be saved")
    parameters = model.state_dict()
    parts: dict[str, Iterator[Tensor]] = {}  # of parameters that the checkpoint holds in several tensors
    tensors = {}
    for name, target in expected_tensors(model, layout, set()).items():
        parameter = parameters[target.parameter]
        rows = parts.setdefault(target.parameter, iter(parameter.view(-1, *target.shape)))
        tensor = next(rows)
        tensors[name] = tensor.to(device="cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    if tied:
        del tensors[checkpoint_names("lm_head.weight", layout.names)[0]]
    unfinished = folder / f".{os.getpid()}.model.safetensors"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{folder / 'model.safetensors'}: cannot be written ({error})") from None
    else:
        unfinished.replace(folder / "model.safetensors")
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(model: DeepseekVL, source: str | Path, path: str | Path) -> None:
    """Write a new checkpoint folder: the model's weights, and the config and tokenizer files of `source`.

    For a quantized model, so that the next start is fast. The folder appears when it is whole.

    Raises: ValueError where `path` is already there, or lies in no folder, and as `save_model`.
    """
    source, path = Path(source), Path(path)
    check_new_folder(path)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    unfinished.mkdir()
    try:
        for file in sorted(source.iterdir()):
            describes = file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json")
            if describes or file.name == "tokenizer.model":
                shutil.copyfile(file, unfinished / file.name)
        save_model(model, unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raise ValueError where no new folder can be made."""
    if path.exists():
        raise ValueError(f"{path}: is there already, expected the name of a new folder")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: expected the name of a new folder, in a folder that is there")
