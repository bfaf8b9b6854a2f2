"""Numbers that are none, and numbers of other types."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from conftest import copy_checkpoint, golden, golden_model
from safetensors.torch import load_file, save_file

from generate import OPTIONS, TextStream, check_options, generate
from load_weights import load_model
from processor import parse_boxes

HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("value", [3e4, float("nan"), float("inf")], ids=["overflow", "nan", "infinite"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_one_error(value, options, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name] = tensors[name] * value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    batch = golden_model("vl-siglip")[1]([HELLO])
    with pytest.raises(ValueError, match="logits are not finite in torch.float16: try bfloat16 or float32"):
        generate(load_model(folder, dtype=torch.float16), batch, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[10**6]], "reach from 1000000 to 1000000, expected 0 to 511"),
        ([[-1]], "reach from -1 to -1, expected 0 to 511"),
        ([[1.0]], "is a Tensor torch.float32, expected a Tensor torch.int64"),
        ([1], r"has shape \[1\], expected \["),
    ],
    ids=["large", "negative", "floats", "one dimension"],
)
def test_ids_beyond_the_vocabulary(ids, message):
    model, known, ids = golden_model("vl-siglip")[0], torch.tensor([[1]]), torch.tensor(ids)
    embedded = model.embed(known).detach()
    for name, call in (
        ("input_ids", lambda: model(input_ids=ids)),
        ("input_ids", lambda: generate(model, {"input_ids": ids})),
        ("input_ids", lambda: generate(model, {"input_ids": ids, "inputs_embeds": embedded}, max_new_tokens=1)),
        ("labels", lambda: model(input_ids=known, labels=ids)),
    ):
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            call()


WHOLE = ("max_new_tokens", "top_k", "seed", "chunk_size")
REAL = ("temperature", "top_p", "repetition_penalty")


@pytest.mark.parametrize("name", WHOLE + REAL)
def test_options_of_other_types_are_refused(name):
    model, processor = golden_model("vl-siglip")
    for value in (10**400, -(10**5000), Decimal(1), "1", True, False, [1], 1j):
        with pytest.raises(ValueError, match=f"^{name} is .*, expected ") as caught:
            generate(model, processor([HELLO]), **({"max_new_tokens": 1} | {name: value}))
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("stop", ["a", [""], ["a", 5], [b"a"], 5, iter(["a"]), [["a"]]], ids=str)
def test_stop_texts_of_other_types_are_refused(stop):
    model, processor = golden_model("vl-siglip")
    for tokenizer in (processor.tokenizer, None, processor):
        with pytest.raises(ValueError, match="stop is a list of texts that are not empty, and needs the tokenizer"):
            generate(model, processor([HELLO]), max_new_tokens=1, stop=stop, tokenizer=tokenizer)


def test_a_long_stop_text_costs_little():
    stream = TextStream(golden_model("vl-siglip")[1].tokenizer, ["x" * 10**7])
    assert "".join(map(stream.push, range(100, 200))) + stream.finish()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("real", [np.float16, np.float32, np.float64])
def test_numpy_numbers_are_numbers(real):
    model, processor = golden_model("vl-siglip")
    options = {name: np.int64(1) for name in WHOLE} | {name: real(0.5) for name in REAL}
    plain = {name: 1 for name in WHOLE} | {name: 0.5 for name in REAL}
    assert generate(model, processor([HELLO]), **options) == generate(model, processor([HELLO]), **plain)


def test_the_limits_that_an_error_names_are_taken():
    for name, (_, least, most, others) in OPTIONS.items():
        for limit in (least, most, *others):
            check_options(**{name: limit})


def test_boxes_of_no_image():
    sides = [float("inf"), 0, float("nan"), 10**400, Decimal(5), "5", None, 1j, [5]]
    for size in (*((side, 5) for side in sides), 5, None, (5,), (5, 5, 5), "55"):
        with pytest.raises(ValueError, match="image_size"):
            parse_boxes("<|det|>[[1, 2, 3, 4]]<|/det|>", size)


def test_towers_of_another_dtype():
    """A tower in float32 beside a decoder in bfloat16, and all in float32 under autocast."""
    for name in ("vl-hybrid", "vl2-mla"):
        model, processor = load_model(golden(name).folder, dtype=torch.bfloat16), golden_model(name)[1]
        batch = processor(golden(name).conversations[0])
        parts = (model.vision, model.aligner, model.lm_head, model.language.embed_tokens, model.language.norm)
        for part in parts:  # one of them, then more
            part.float()
            assert len(generate(model, batch, max_new_tokens=2)[0]) == 2
        assert model.dtype == torch.bfloat16
        model.train()(**batch, labels=batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)).loss.backward()
        embedded = {"inputs_embeds": model.embed(torch.tensor([[1, 2]])).float()}
        assert len(generate(model, embedded, max_new_tokens=2)[0]) == 2
        model = load_model(golden(name).folder, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            labels = batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)
            model(**batch, labels=labels).loss.backward()
        grads = [parameter.grad for parameter in model.aligner.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
