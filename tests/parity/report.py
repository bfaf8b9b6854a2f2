"""Prints README.md's figures of parity, which the tests only bound.

    python tests/parity/report.py           needs transformers

Largest relative errors (Euclidean norms); float32, and bfloat16 against transformers in float32.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import conftest  # noqa: E402
from conftest import KINDS, encode_images, random_batch, random_transformers_model, relative_error  # noqa: E402

from load_weights import load_model  # noqa: E402
from model import DeepseekVL  # noqa: E402


def golden_errors(name: str) -> dict[str, float]:
    """The largest error over the cases of a golden checkpoint."""
    data, (model, processor), errors = conftest.golden(name), conftest.golden_model(name), defaultdict(float)
    for case, conversation in enumerate(data.conversations):
        batch = processor(conversation)
        computed = {"logits_last64": ("logits", model(**batch).logits[0, -64:])}
        if "pixel_values" in batch:
            pixels, features = batch["pixel_values"], torch.cat(encode_images(model, batch))
            *high, siglip = model.vision(*model.vision.split(pixels)) if name == "vl-hybrid" else [model.vision(pixels)]
            computed |= {"vision": ("SigLIP tokens", siglip), "vision_low": ("SigLIP tokens", siglip)}
            computed |= {"vision_tile0": ("SigLIP tokens", siglip[0]), "vision_high": ("SAM tokens", *high)}
            computed |= {"image_features": ("image features", features[None])}
            computed |= {"image_embeds_head64": ("image features", features[:64])}
            computed |= {"image_embeds_tail64": ("image features", features[-64:])}
        for key, (what, *tested) in computed.items():
            if f"{case}.{key}" in data.tensors:
                errors[what] = max(errors[what], relative_error(*tested, data.tensors[f"{case}.{key}"]))
    return errors


def results(model, batch: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of our model or transformers'."""
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    if isinstance(model, DeepseekVL):
        features = torch.cat(encode_images(model, inputs))
    else:
        pictures = {key: value for key, value in inputs.items() if "pixel_values" in key}
        features = model.model.get_image_features(**pictures).pooler_output.flatten(0, 1)
    return {"image features": features, "logits": model(**inputs).logits[batch["attention_mask"].bool()]}


def transformers_errors(kind: str, seeds: int = 20) -> dict[str, float]:
    """float32: the largest error; bfloat16: means over random checkpoints, ours and transformers' own."""
    errors: dict[str, float] = defaultdict(float)
    for seed in range(seeds):
        theirs, batch = random_transformers_model(kind, seed=seed), random_batch(kind, seed=seed)
        expected = results(theirs, batch, torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            exact = results(load_model(folder), batch, torch.float32)
            half = results(load_model(folder, dtype=torch.bfloat16), batch, torch.bfloat16)
        their_half = results(theirs.to(torch.bfloat16), batch, torch.bfloat16)
        for what, value in expected.items():
            key = f"{what}, float32"
            errors[key] = max(errors[key], relative_error(exact[what], value))
            for who, tested in (("ours", half), ("transformers", their_half)):
                errors[f"{what}, bfloat16, {who}"] += relative_error(tested[what], value) / seeds
    return errors


if __name__ == "__main__":
    with torch.no_grad():
        sides = [("the original", golden_errors, conftest.GOLDENS), ("transformers", transformers_errors, KINDS)]
        for side, measure, name in ((side, measure, name) for side, measure, names in sides for name in names):
            print(f"\nagainst {side}, {name}")
            for what, error in measure(name).items():
                print(f"  {what:40}{error:.2e}")
