"""Prints the figures of README.md's section on parity, which the tests only bound.

    python tests/parity.py           needs the folder `shared` beside the repository, and transformers

Largest relative errors (Euclidean norms); float32, and bfloat16 against transformers in float32.
"""

import tempfile

import torch
from conftest import (
    KINDS,
    VL2_GOLDENS,
    VL_GOLDENS,
    golden,
    golden_model,
    random_batch,
    random_transformers_model,
    relative_error,
)

from load_weights import load_model


def golden_errors(name: str) -> dict[str, float]:
    """The largest error over the cases of each tensor that the original's results hold."""
    data, (model, processor) = golden(name), golden_model(name)
    errors: dict[str, float] = {}

    def note(what: str, tested: torch.Tensor, key: str) -> None:
        if key in data.tensors:
            expected = data.tensors[key]
            tested = tested[-len(expected) :] if key.endswith("_last64") else tested
            errors[what] = max(errors.get(what, 0.0), relative_error(tested, expected))

    for case, conversation in enumerate(data.conversations):
        batch = processor(conversation)
        assert batch["input_ids"][0].tolist() == data.tensors[f"{case}.input_ids"].tolist()
        if "pixel_values" in batch:
            pixels = batch["pixel_values"]
            note("pixels", pixels, f"{case}.pixel_values")
            note("pixels", pixels, f"{case}.images")
            features = model.encode_images(batch)
            if name == "vl-hybrid":
                high, low = model.vision(*model.vision.split(pixels))
                note("SAM tokens", high, f"{case}.vision_high")
                note("SigLIP tokens", low, f"{case}.vision_low")
            else:
                note("SigLIP tokens", model.vision(pixels), f"{case}.vision")
                note("SigLIP tokens", model.vision(pixels)[0], f"{case}.vision_tile0")
            if f"{case}.image_features" in data.tensors:
                note("image features", torch.stack(features), f"{case}.image_features")
            features = torch.cat(features)
            note("image features", features[:64], f"{case}.image_embeds_head64")
            note("image features", features[-64:], f"{case}.image_embeds_tail64")
        output = model(**batch, output_hidden_states=True)
        note("hidden states, first", output.hidden_states[1][0], f"{case}.hidden_layer1_last64")
        note("hidden states, last", output.hidden_states[-1][0], f"{case}.hidden_final_last64")
        note("logits", output.logits[0], f"{case}.logits_last64")

    together = model(**processor(data.conversations)).logits
    for row, conversation in enumerate(data.conversations):
        alone = model(**processor(conversation)).logits[0]
        error = relative_error(together[row, -len(alone) :], alone)
        errors["padded batch against alone"] = max(errors.get("padded batch against alone", 0.0), error)
    return errors


def transformers_errors(kind: str, seeds: int = 20) -> dict[str, float]:
    """float32: the largest error; bfloat16: means over random checkpoints, ours and transformers' own."""
    largest: dict[str, float] = {}
    means: dict[str, float] = {}
    for seed in range(seeds):
        theirs, batch = random_transformers_model(kind, seed=seed), random_batch(kind, seed=seed)
        pictures = {key: value for key, value in batch.items() if "pixel_values" in key}
        real = batch["attention_mask"].bool()

        def results(model, dtype, is_ours, batch=batch, pictures=pictures, real=real) -> dict[str, torch.Tensor]:
            inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
            cast = {key: inputs[key] for key in pictures}
            if is_ours:
                features = torch.cat(model.encode_images(cast))
            else:
                features = model.model.get_image_features(**cast).pooler_output.flatten(0, 1)
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
