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


def golden_errors(name: str) -> dict[str, float]:
    """The largest error over the cases of a golden checkpoint."""
    data, (model, processor), errors = conftest.golden(name), conftest.golden_model(name), defaultdict(float)
    for case, conversation in enumerate(data.conversations):
        batch = processor(conversation)
        computed = [("logits", model(**batch).logits[0, -64:], "logits_last64")]
        if "pixel_values" in batch:
            if name == "vl-hybrid":
                high, siglip = model.vision(*model.vision.split(batch["pixel_values"]))
                computed += [("SAM tokens", high, "vision_high"), ("SigLIP tokens", siglip, "vision_low")]
            else:
                siglip = model.vision(batch["pixel_values"])
                computed += [("SigLIP tokens", siglip, "vision"), ("SigLIP tokens", siglip[0], "vision_tile0")]
            features = torch.cat(encode_images(model, batch))
            computed += [("image features", features[None], "image_features")]
            computed += [("image features", features[:64], "image_embeds_head64")]
            computed += [("image features", features[-64:], "image_embeds_tail64")]
        for what, tested, key in computed:
            if f"{case}.{key}" in data.tensors:
                errors[what] = max(errors[what], relative_error(tested, data.tensors[f"{case}.{key}"]))
    return errors


def transformers_errors(kind: str, seeds: int = 20) -> dict[str, float]:
    """float32: the largest error; bfloat16: means over random checkpoints, ours and transformers' own."""
    errors: dict[str, float] = defaultdict(float)
    for seed in range(seeds):
        theirs, batch = random_transformers_model(kind, seed=seed), random_batch(kind, seed=seed)

        def results(model, dtype, is_ours, batch=batch) -> dict[str, torch.Tensor]:
            inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
            real, pictures = batch["attention_mask"].bool(), {k: v for k, v in inputs.items() if "pixel_values" in k}
            if is_ours:
                features = torch.cat(encode_images(model, inputs))
            else:
                features = model.model.get_image_features(**pictures).pooler_output.flatten(0, 1)
            return {"image features": features, "logits": model(**inputs).logits[real]}

        expected = results(theirs, torch.float32, False)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            exact = results(load_model(folder), torch.float32, True)
            half = results(load_model(folder, dtype=torch.bfloat16), torch.bfloat16, True)
        their_half = results(theirs.to(torch.bfloat16), torch.bfloat16, False)
        for what, value in expected.items():
            key = f"{what}, float32"
            errors[key] = max(errors[key], relative_error(exact[what], value))
            for who, tested in (("ours", half), ("transformers", their_half)):
                errors[f"{what}, bfloat16, {who}"] += relative_error(tested[what], value) / seeds
    return errors


if __name__ == "__main__":
    with torch.no_grad():
        for side, names, measure in (
            ("the original", conftest.GOLDENS, golden_errors),
            ("transformers", KINDS, transformers_errors),
        ):
            for name in names:
                print(f"\nagainst {side}, {name}")
                for what, error in measure(name).items():
                    print(f"  {what:40}{error:.2e}")
