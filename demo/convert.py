"""Write a DeepSeek-VL checkpoint in another layout: DeepSeek's own, or that of transformers.

    python demo/convert.py deepseek-vl-1.3b-chat NEW --layout transformers [--dtype bfloat16]

The tensors stay as they are, under other names, so that there and back gives equal tensors. What no model uses
(SigLIP's pooling head) is left out. `load_weights.py` has the tables of names; this file has what the JSON files of a
checkpoint say in each layout.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent.parent)]

from generate import DTYPES, Parser, told
from load_weights import (
    OFFICIAL_KEYS,
    TRANSFORMERS_KEYS,
    QuantizedLinear,
    check_new_folder,
    checkpoint_names,
    load_model,
    new_folder,
    open_weights,
    read_config,
    read_layout_and_config,
    tensors_to_save,
)
from model import ModelConfig
from processor import SYSTEM_TEXT, PixelSettings, Processor, read_json
from vision import HybridConfig, SAMConfig, SigLIPConfig

SHARD_BYTES = 5 * 10**9
CHAT_TEMPLATE = r"""{{ bos_token }}{% if messages[0].role != "system" %}SYSTEM{{ "\n\n" }}{% endif %}
{%- for message in messages %}
{{- {"system": "", "user": "User: ", "assistant": "Assistant: "}[message.role] }}
{%- for part in ([{"type": "text", "text": message.content}] if message.content is string else message.content) %}
{%- if part.type == "image" %}{{ "<image_placeholder>" }}{% else %}
{%- if loop.previtem is defined and loop.previtem.type == "text" %}{{ " " }}{% endif %}
{%- set text = part.text.lstrip() if loop.first else part.text %}
{{- text.rstrip() if loop.last else text }}{% endif %}{% endfor %}
{{- eos_token if message.role == "assistant" else "\n\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "Assistant:" }}{% endif %}""".replace("SYSTEM", SYSTEM_TEXT)


def renamed(config: Any, keys: dict[str, str], **more: Any) -> dict[str, Any]:
    """A config's fields by the names of a file, without those that are not set."""
    return {keys.get(key, key): value for key, value in asdict(config).items() if value is not None} | more


def transformers_files(config: ModelConfig, processor: Processor) -> dict[str, dict]:
    """The JSON files of a DeepSeek-VL as transformers reads them, but for the tokenizer's."""
    vision, pixels = config.vision, processor.pixels
    hybrid = isinstance(vision, HybridConfig)
    name, low = ("DeepseekVLHybrid", vision.low) if hybrid else ("DeepseekVL", vision)
    act, tie = "gelu" if low.gelu == "exact" else "gelu_pytorch_tanh", config.language.tie_word_embeddings
    values = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "deepseek_vl_hybrid" if hybrid else "deepseek_vl",
        "image_token_id": processor.image_token_id,
        "tie_word_embeddings": tie,
        "text_config": renamed(config.language, {}, model_type="llama"),
        "vision_config": renamed(
            low, TRANSFORMERS_KEYS, model_type="siglip_vision_model", hidden_act=act, vision_use_head=False
        ),
    }
    images = {"size": {"height": pixels.side, "width": pixels.side}, "image_mean": pixels.mean, "image_std": pixels.std}
    if hybrid:
        sam = renamed(vision.high, TRANSFORMERS_KEYS, model_type="sam_vision_model", mlp_dim=vision.high.mlp_width)
        values["high_res_vision_config"], square = sam, {"height": low.image_size, "width": low.image_size}
        images = {"high_res_size": images["size"], "size": square, "resample": 2}
        for prefix, norm in (("high_res_", vision.high_norm), ("", vision.low_norm)):
            images |= {f"{prefix}image_mean": norm.mean, f"{prefix}image_std": norm.std}
    images |= {"image_processor_type": f"{name}ImageProcessor", "do_normalize": hybrid or pixels.normalize}
    images |= {"min_size": pixels.min_size, "rescale_factor": pixels.rescale_factor}
    return {
        "config.json": values,
        "preprocessor_config.json": images,
        "processor_config.json": {
            "processor_class": f"{name}Processor",
            "num_image_tokens": processor.num_image_tokens,
        },
    }


def official_files(config: ModelConfig, processor: Processor) -> dict[str, dict]:
    """The JSON files of a DeepSeek-VL as DeepSeek's own code reads them, but for the tokenizer's."""

    def tower(part: SigLIPConfig | SAMConfig, preset: str, seen: PixelSettings) -> dict[str, Any]:
        preset = {"model_name": preset, "mlp_ratio": part.mlp_width / part.width, "pixel_mean": seen.mean}
        values = renamed(part, OFFICIAL_KEYS, select_feature="same", select_layer=-1, pixel_std=seen.std, **preset)
        return {key: value for key, value in values.items() if key not in ("mlp_width", "gelu")}

    vision, width = config.vision, config.language.hidden_size
    hybrid = isinstance(vision, HybridConfig)
    low, pixels = (vision.low, processor.high_res_pixels) if hybrid else (vision, processor.pixels)
    params = tower(low, "siglip_large_patch16_384", processor.pixels)
    if hybrid:
        high = tower(vision.high, "sam_b_downsample", pixels)
        params = {"concat_type": "tuple", "high_res_cfg": high, "low_res_cfg": params}
    else:
        del params["pixel_mean"], params["pixel_std"]  # the processor normalizes
    projector = {"projector_type": "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu", "depth": 2}
    projector |= {"input_dim": low.width, "n_embed": width}
    images = {"image_processor_type": "VLMImageProcessor", "image_size": pixels.side, "image_mean": pixels.mean}
    images |= {"image_std": pixels.std, "min_size": pixels.min_size, "rescale_factor": pixels.rescale_factor}
    tower_class = "HybridVisionTower" if hybrid else "CLIPVisionTower"
    return {
        "config.json": {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "vision_config": {"model_type": "vision", "cls": tower_class, "params": params},
            "aligner_config": {"model_type": "aligner", "cls": "MlpProjector", "params": projector},
            "language_config": renamed(config.language, {}, model_type="llama"),
        },
        "preprocessor_config.json": images | {"do_normalize": not hybrid and pixels.normalize},
        "processor_config.json": {
            "processor_class": "VLChatProcessor", "image_tag": processor.image_token, "sft_format": "deepseek",
            "num_image_tokens": processor.num_image_tokens, "add_special_token": False, "mask_prompt": True,
        },
    }  # fmt: skip


def write_files(
    folder: Path, files: dict[str, dict], copied: dict[str, bytes], tokenizer: dict, image_token: str | None
) -> None:
    """Write a converted checkpoint's JSON files: made anew, as they are, and the tokenizer's config."""
    for name, content in copied.items():
        (folder / name).write_bytes(content)
    tokenizer = tokenizer | {"tokenizer_class": "LlamaTokenizerFast"}
    if image_token is not None:
        added = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": image_token}}
        tokenizer |= added
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in (files | {"tokenizer_config.json": tokenizer}).items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def difference(ours: Any, theirs: Any, name: str = "its config") -> str | None:
    """The first field in which two configs differ, and both values; None if they are equal."""
    if ours == theirs or type(ours) is not type(theirs) or not is_dataclass(ours):
        return None if ours == theirs else f"{name} {str(ours)[:80]} (it would become {str(theirs)[:80]})"
    found = (difference(getattr(ours, f.name), getattr(theirs, f.name), f.name) for f in fields(ours))
    return next(filter(None, found), None)


def convert(source: str | Path, path: str | Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """Write a DeepSeek-VL checkpoint as a new folder in the official layout or in that of transformers.

    transformers' from_pretrained loads the model, the processor and the tokenizer of the result. Weights lie in
    shards of at most 5 GB. The pictures' sizes are rounded down in one layout, to nearest in the other, as the code
    that reads it does. The folder appears when it is whole.

    Args:
        layout: "official" or "transformers".
        dtype: of all weights; by default as stored (for files that mix: as the embedding).
    Raises: ValueError for DeepSeek-VL2, quantized weights, sizes that the layout has no words for, and as `load_model`.
    """
    source, path = Path(source), Path(path)
    check_new_folder(path)
    if layout not in ("official", "transformers"):
        raise ValueError(f"layout is {layout!r}, expected official or transformers")
    processor, theirs = Processor(source), layout == "transformers"
    if processor.is_vl2:
        raise ValueError(f"{source}: a DeepSeek-VL2, which has no other layout")
    stored, files = read_layout_and_config(source, processor.tokenizer)[0], open_weights(source)
    embedding = checkpoint_names("language.embed_tokens.weight", stored.names)[0]
    if dtype is None and embedding in files:
        dtype = files[embedding].read(embedding).dtype
    model = load_model(source, dtype=dtype, tokenizer=processor.tokenizer)
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(f"{source}: holds quantized weights, which neither layout has words for")
    contents = (transformers_files if theirs else official_files)(model.config, processor)
    if not (source / "generation_config.json").exists():
        ids = {"bos_token_id": processor.bos_token_id, "pad_token_id": processor.pad_token_id}
        contents["generation_config.json"] = ids | {"eos_token_id": list(model.config.end_token_ids)}
    names = ("tokenizer.json", "tokenizer.model", "generation_config.json")
    copied = {name: (source / name).read_bytes() for name in names if (source / name).exists()}  # errors name them
    tokenizer = read_json(source / "tokenizer_config.json")
    with new_folder(path) as unfinished:
        write_files(unfinished, contents, copied, tokenizer, processor.image_token if theirs else None)
        if (key := difference(model.config, read_config(unfinished))) is not None:
            raise ValueError(f"{source}: config.json of the {layout} layout has no word for {key}")
        tensors, shards, size = tensors_to_save(model, unfinished, None), [{}], 0
        for name, tensor in tensors.items():
            if size and size + tensor.nbytes > SHARD_BYTES:
                shards, size = [*shards, {}], 0
            shards[-1][name], size = tensor, size + tensor.nbytes
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        names = names if len(names) > 1 else ["model.safetensors"]
        for name, shard in zip(names, shards):
            save_file(shard, unfinished / name, metadata={"format": "pt"})
        if len(shards) > 1:
            total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
            weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
            index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=1)
            (unfinished / "model.safetensors.index.json").write_text(index + "\n")


def main() -> None:
    parser = Parser(description="Write a DeepSeek-VL checkpoint in another layout.")
    parser.add_argument("source", metavar="DIR", help="checkpoint folder")
    parser.add_argument("path", metavar="NEW", help="folder to write")
    parser.add_argument("--layout", choices=("official", "transformers"), required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: as stored)")
    args = parser.parse_args()
    with told():
        convert(args.source, args.path, args.layout, DTYPES.get(args.dtype))


if __name__ == "__main__":
    main()
