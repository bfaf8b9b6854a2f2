"""The DeepSeek-VL2 demo's checkpoint before its weights: the official files with small sizes, and a byte-level BPE.

write_empty_vl2(Path("demo/retrained"))
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scenes import COLORS, KINDS, RADII, WORDS
from vl2_scenes import LAYOUTS, NUMBERS, TILE, chat

from processor import CHAR_TO_BYTE, COORDINATES, VL2_SPECIAL_TOKENS, python_regex

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# Numbers first, then words with the space before them, punctuation, white space.
SPLITS = (r"\p{N}{1,3}", r" ?[A-Za-z]+|,\s+(?!\S)| ?[\p{P}\p{S}]+|\s+")


def to_pieces(text: str) -> list[str]:
    """What the regular expressions cut a text into, with each byte as one character."""
    pieces = re.split("|".join(map(re.escape, (*VL2_SPECIAL_TOKENS, BEGIN, END))), text)
    for pattern in SPLITS:
        pieces = [part for piece in pieces for part in re.split(f"({python_regex(pattern)})", piece) if part]
    char = {byte: char for char, byte in CHAR_TO_BYTE.items()}
    return ["".join(char[byte] for byte in piece.encode()) for piece in pieces]


def learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) until each of the words is one token."""
    spelled, merges = [list(word) for word in sorted(words)], []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:])):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            i = 0
            while i + 1 < len(word):
                if word[i : i + 2] == list(best):
                    word[i : i + 2] = ["".join(best)]
                i += 1
        spelled = [word for word in spelled if len(word) > 1]
    return merges


def write_tokenizer(folder: Path) -> dict[str, int]:
    """tokenizer.json of the demo's text; every word and every number to 999 is one token. Returns the special ids."""
    words = {str(number) for number in range(COORDINATES + 1)}
    for word in (*COLORS, *KINDS, *RADII, *NUMBERS, *WORDS, "sign", *(f"{kind}s" for kind in KINDS)):
        words |= set(to_pieces(f" {word}"))
    for i in range(600):
        for message in chat(Random(f"tokenizer-{i}"))[2]:
            words |= set(to_pieces(message["content"]))
    merges = learn_merges(words)
    tokens = [*sorted(CHAR_TO_BYTE), *dict.fromkeys("".join(merge) for merge in merges)]
    special = {token: len(tokens) + i for i, token in enumerate((BEGIN, END, *VL2_SPECIAL_TOKENS))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in SPLITS]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    model |= {"vocab": {token: id for id, token in enumerate(tokens)}, "merges": [" ".join(merge) for merge in merges]}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token} | flags for token, id in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    return special


def write_empty_vl2(folder: Path) -> None:
    """Everything but the weights: the files of DeepSeek-VL2 (base), with small sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    special = write_tokenizer(folder)
    language = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "bos_token_id": special[BEGIN],
        "eos_token_id": special[END],
    }
    language |= {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5, "num_attention_heads": 4}
    language |= {"num_key_value_heads": 4, "vocab_size": max(special.values()) + 1, "max_position_embeddings": 1024}
    language |= {"torch_dtype": "float16", "use_mla": True, "kv_lora_rank": 64, "q_lora_rank": None}
    language |= {"qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 1}
    language |= {"moe_intermediate_size": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 8}
    language |= {"n_shared_experts": 1, "num_experts_per_tok": 2, "topk_method": "noaux_tc"}
    language |= {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    vision = {"model_name": "siglip_so400m_patch14_384", "model_type": "vision", "image_size": TILE, "patch_size": 6}
    vision |= {"width": 112, "layers": 4, "heads": 4, "mlp_ratio": 4.0}
    projector = {"model_type": "mlp_projector", "projector_type": "downsample_mlp_gelu", "depth": 2, "mlp_ratio": 1}
    projector |= {"input_dim": vision["width"], "n_embed": language["hidden_size"], "downsample_ratio": 2}
    resolutions = {"candidate_resolutions": [[wide * TILE, high * TILE] for wide, high in LAYOUTS]}
    files = {
        "config.json": {
            "architectures": ["DeepseekVLV2ForCausalLM"],
            "model_type": "deepseek_vl_v2",
            "torch_dtype": "float16",
            **resolutions,
            "global_view_pos": "head",
            "tile_tag": "2D",
            "language_config": language,
            "projector_config": projector,
            "vision_config": vision,
        },
        "processor_config.json": {
            "processor_class": "DeepseekVLV2Processor",
            **resolutions,
            "patch_size": vision["patch_size"],
            "downsample_ratio": projector["downsample_ratio"],
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "normalize": True,
            "image_token": "<image>",
            "pad_token": VL2_SPECIAL_TOKENS[0],
            "add_special_token": False,
            "mask_prompt": True,
            "sft_format": "deepseek",
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": VL2_SPECIAL_TOKENS[0],
            "tokenizer_class": "LlamaTokenizerFast",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
