"""The demo's checkpoint before its weights: the official 7B's files with small sizes, and a tokenizer of its own.

write_empty_checkpoint(Path("demo/retrained"))
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scenes import CELLS, COLORS, KINDS, RADII, SIDE, WORDS, chat

from processor import SYSTEM_TEXT

SAM_PATCH = 8
BEGIN, END, IMAGE = "<|begin|>", "<|end|>", "<image_placeholder>"


def write_tokenizer(folder: Path) -> int:
    """A SentencePiece model of the demo's text. Returns the size of its vocabulary."""
    import sentencepiece

    lines = []
    for i in range(4000):
        lines.append(SYSTEM_TEXT)
        for message in chat(Random(f"tokenizer-{i}"), pictures=False):
            lines.append(message["content"].replace("<image>", ""))  # as it follows a picture, without a space
            lines.append(f"{message['role'].capitalize()}: {message['content']}")
    model = io.BytesIO()
    whole = (*COLORS, *KINDS, *RADII, *CELLS, *WORDS)  # one token each, the same in questions, answers and stories
    # Pieces may reach over spaces ("How many" is one), which keeps conversations short for so small a model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=900,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        split_by_whitespace=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n\n", *(f" {word}".replace(" ", "▁") for word in whole)],
        control_symbols=[IMAGE],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        bos_piece=BEGIN,
        eos_piece=END,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.get_piece_size()


def write_empty_checkpoint(folder: Path) -> None:
    """Everything but the weights: the official 7B's files, with small sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    low = {"model_name": "siglip_large_patch16_384", "image_size": 30, "patch_size": 10, "width": 128, "layers": 3}
    high = {"model_name": "sam_b_downsample", "image_size": SIDE, "patch_size": SAM_PATCH, "width": 160, "layers": 4}
    low |= {"heads": 4, "mlp_ratio": 4, "select_feature": "same", "select_layer": -1}
    high |= {"heads": 5, "window_size": 8, "global_attn_indexes": [1, 3], "neck_channels": 64}
    high |= {"downsample_channels": [64, 128]}
    language = {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5}
    language |= {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": vocabulary}
    language |= {"max_position_embeddings": 2048, "torch_dtype": "float16"}
    vision = {"concat_type": "tuple", "freeze_high": True, "freeze_low": True}
    vision |= {"high_res_cfg": high, "low_res_cfg": low}
    aligner = {"depth": 2, "input_dim": 128, "n_embed": 192, "projector_type": "low_high_hybrid_split_mlp_gelu"}
    files = {
        "config.json": {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "torch_dtype": "float16",
            "vision_config": {"cls": "HybridVisionTower", "model_type": "vision", "params": vision},
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
            "language_config": language,
        },
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "image_size": SIDE,
            "min_size": 14,
            "do_normalize": False,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": IMAGE,
            "mask_prompt": True,
            "num_image_tokens": 9,
            "sft_format": "deepseek",
        },
        "tokenizer_config.json": {"bos_token": BEGIN, "eos_token": END, "pad_token": END},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
