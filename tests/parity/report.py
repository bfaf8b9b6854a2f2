"""Prints README.md's figures of parity, which the tests only bound.

    python tests/parity/report.py           needs transformers

Largest relative errors (Euclidean norms); float32, and bfloat16 against transformers in float32.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from conftest import (  # noqa: E402
    KINDS,
    VL2_GOLDENS,
    VL_GOLDENS,
    encode_images,
    golden,
    golden_model,
    inside,
    random_batch,
    random_transformers_model,
    relative_error,
)

from load_weights import load_model  # noqa: E402


def golden_errors(name: str) -> dict[str, float]:
    """The largest error over the cases of each tensor that the original's results hold."""
    data, (model, processor) = golden(name), golden_model(name)
    errors: dict[str, float] = {}

    def note(what: str, tested: torch.Tensor, key: str) -> None:
        if key in data.tensors:
            expected = data.tensors[key]
            tested = tested[-len(expected) :] if key.endswith("_last64") else tested
            errors[what] = max(errors.get(what, 0.0), relative_error(tested, expected))

    together = model(**processor(data.conversations)).logits
    for case, conversation in enumerate(data.conversations):
        batch = processor(conversation)
        assert batch["input_ids"][0].tolist() == data.tensors[f"{case}.input_ids"].tolist()
        if "pixel_values" in batch:
            pixels = batch["pixel_values"]
            note("pixels", pixels, f"{case}.pixel_values")
            note("pixels", pixels, f"{case}.images")
            if name == "vl-hybrid":
                high, low = model.vision(*model.vision.split(pixels))
                note("SAM tokens", high, f"{case}.vision_high")
                note("SigLIP tokens", low, f"{case}.vision_low")
            else:
                note("SigLIP tokens", model.vision(pixels), f"{case}.vision")
                note("SigLIP tokens", model.vision(pixels)[0], f"{case}.vision_tile0")
            features = torch.cat(encode_images(model, batch))
            note("image features", features[None], f"{case}.image_features")
            note("image features", features[:64], f"{case}.image_embeds_head64")
            note("image features", features[-64:], f"{case}.image_embeds_tail64")
        output, hidden_states, _ = inside(model, batch)
        note("hidden states, first", hidden_states[1][0], f"{case}.hidden_layer1_last64")
        note("hidden states, last", hidden_states[-1][0], f"{case}.hidden_final_last64")
        note("logits", output.logits[0], f"{case}.logits_last64")
        error = relative_error(together[case, -output.logits.shape[1] :], output.logits[0])
        errors["padded batch against alone"] = max(errors.get("padded batch against alone", 0.0), error)
    return errors


def transformers_errors(kind: str, seeds: int = 20) -> dict[str, float]:
    """float32: the largest error; bfloat16: means over random checkpoints, ours and transformers' own."""
    largest: dict[str, float] = {}
    means: dict[str, float] = {}
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
            largest[f"{what}, float32"] = max(largest.get(f"{what}, float32", 0.0), relative_error(exact[what], value))
            for who, tested in (("ours", half), ("transformers", their_half)):
                key = f"{what}, bfloat16, {who}"
                means[key] = means.get(key, 0.0) + relative_error(tested[what], value) / seeds
    return largest | means


def show(name: str, errors: dict[str, float]) -> None:
    print(f"\n{name}")
    for what, error in errors.items():
        print(f"  {what:40}{error:.2e}")


if __name__ == "__main__":
    with torch.no_grad():
        for name in VL_GOLDENS + VL2_GOLDENS:
            show(f"against the original, {name}", golden_errors(name))
        for kind in KINDS:
            show(f"against transformers, {kind}", transformers_errors(kind))
