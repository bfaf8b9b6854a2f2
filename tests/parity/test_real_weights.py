"""The official weights answer as the originals do. Runs where it is told a checkpoint folder and a picture.

    export REAL_CHECKPOINT=deepseek-vl-1.3b-chat REAL_IMAGE=pipeline-cat-chonk.jpeg
    python -m pytest tests/parity/test_real_weights.py

The answers are those that README.md lists, greedy and 20 tokens long; the picture is that of transformers'
documentation, for deepseek-vl2-tiny `visual_grounding_1.jpeg` of the DeepSeek-VL2 repository.
"""

import os

import pytest
import torch

from generate import generate
from load_weights import load_model, pack
from processor import Processor

CHECKPOINT, IMAGE = os.environ.get("REAL_CHECKPOINT"), os.environ.get("REAL_IMAGE")

KNOWN = {  # by whether it is DeepSeek-VL2 and its language model's width: question, answer
    (False, 2048): ("<image>Describe this image.", "In the image, a majestic snow leopard is captured in a moment of "
                    "tranquility. The snow leopard"),
    (False, 4096): ("<image>Describe this image.", "The image depicts a fluffy, beige-colored animal with a long tail, "
                    "walking on snow. The"),
    (True, 1280): ("<image>\n<|ref|>The giraffe at the back.<|/ref|>.", "<|ref|>The giraffe at the back.<|/ref|>"
                   "<|det|>[[580, 270, 999, 900]]<|/det|>"),
}  # fmt: skip


@pytest.mark.skipif(not (CHECKPOINT and IMAGE), reason="REAL_CHECKPOINT and REAL_IMAGE name no checkpoint and picture")
def test_the_official_weights_give_the_known_answer():
    processor, model = Processor(CHECKPOINT), pack(load_model(CHECKPOINT, dtype=torch.bfloat16))
    kind = (processor.is_vl2, model.config.language.hidden_size)
    assert kind in KNOWN, f"no answer is known for {CHECKPOINT}"
    question, answer = KNOWN[kind]
    batch = processor([{"role": "user", "content": question, "images": [IMAGE]}])
    (ids,) = generate(model, batch, max_new_tokens=60 if processor.is_vl2 else 20)
    text = processor.decode([i for i in ids if i != processor.eos_token_id], skip_special_tokens=False)
    assert text.strip() == answer
