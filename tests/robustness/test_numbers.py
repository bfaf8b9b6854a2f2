"""Numbers that are none, and numbers of other types."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from checkpoints import read_tensors, write_weights
from conftest import copy_checkpoint, golden, golden_model

from generate import OPTIONS, TextStream, check_options, generate
from load_weights import load_model
from processor import parse_boxes

HELLO = {"role": "user", "content": "Hello"}
WHOLE = ("max_new_tokens", "top_k", "seed", "chunk_size")
REAL = ("temperature", "top_p", "repetition_penalty")


@pytest.mark.parametrize("value", [3e4, torch.nan, torch.inf], ids=["overflow", "nan", "infinite"])
def test_logits_that_are_not_finite_are_one_error(value, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    tensors = read_tensors(folder / "model.safetensors")
    tensors["language_model.model.layers.0.mlp.down_proj.weight"] *= value
    write_weights(folder, tensors)
    model, batch = load_model(folder, dtype=torch.float16), golden_model("vl-siglip")[1]([HELLO])
    why = ": try bfloat16 or float32" if value == 3e4 else ", as language.layers.0.mlp.down_proj.weight is not"
    for options in ({}, {"temperature": 1.0, "seed": 0}):
        with pytest.raises(ValueError, match=f"logits are not finite in torch.float16{why}"):
            generate(model, batch, max_new_tokens=4, **options)


@pytest.mark.parametrize("ids, message", [
    ([[10**6]], "reach from 1000000 to 1000000, expected 0 to 511"),
    ([[-1]], "reach from -1 to -1, expected 0 to 511"),
    ([[1.0]], "is a Tensor torch.float32, expected a Tensor torch.int64"),
    ([1], r"has shape \[1\], expected \["),
])  # fmt: skip
def test_ids_beyond_the_vocabulary(ids, message):
    model, known, ids = golden_model("vl-siglip")[0], torch.tensor([[1]]), torch.tensor(ids)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "inputs_embeds": model.embed(known).detach()}):
        with pytest.raises(ValueError, match=f"^input_ids {message}"):
            generate(model, batch, max_new_tokens=1)
    for name, others in (("input_ids", {}), ("labels", {"input_ids": known})):
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            model(**others, **{name: ids})


@pytest.mark.parametrize("name", WHOLE + REAL)
def test_options_of_other_types_are_refused(name):
    model, processor = golden_model("vl-siglip")
    for value in (10**400, -(10**5000), Decimal(1), "1", True, False, [1], 1j):
        with pytest.raises(ValueError, match=f"^{name} is .*, expected ") as caught:
            generate(model, processor([HELLO]), **({"max_new_tokens": 1} | {name: value}))
        assert len(str(caught.value)) < 200


def test_stop_texts_of_other_types_are_refused():
    model, processor = golden_model("vl-siglip")
    wrong = [(stop, processor.tokenizer) for stop in ("a", [""], ["a", 5], [b"a"], 5, iter(["a"]), [["a"]])]
    for stop, tokenizer in (*wrong, (["a"], None), (["a"], processor)):
        with pytest.raises(ValueError, match="stop is a list of texts that are not empty, and needs the tokenizer"):
            generate(model, processor([HELLO]), max_new_tokens=1, stop=stop, tokenizer=tokenizer)


def test_a_long_stop_text_costs_little():
    stream = TextStream(golden_model("vl-siglip")[1].tokenizer, ["x" * 10**7])
    assert "".join(map(stream.push, range(100, 200))) + stream.finish()


@pytest.mark.filterwarnings("error")
def test_numpy_numbers_are_numbers():
    model, processor = golden_model("vl-siglip")
    expected = generate(model, processor([HELLO]), **dict.fromkeys(WHOLE, 1), **dict.fromkeys(REAL, 0.5))
    for real in (np.float16, np.float32, np.float64):
        options = dict.fromkeys(WHOLE, np.int64(1)) | dict.fromkeys(REAL, real(0.5))
        assert generate(model, processor([HELLO]), **options) == expected


def test_the_limits_that_an_error_names_are_taken():
    for name, (_, least, most, others) in OPTIONS.items():
        for limit in (least, most, *others):
            check_options(**{name: limit})


def test_boxes_of_no_image():
    sides = [float("inf"), 0, float("nan"), 10**400, Decimal(5), "5", None, 1j, [5]]
    for size in (*((side, 5) for side in sides), 5, None, (5,), (5, 5, 5), "55"):
        with pytest.raises(ValueError, match="image_size"):
            parse_boxes("<|det|>[[1, 2, 3, 4]]<|/det|>", size)


@pytest.mark.parametrize("name", ["vl-hybrid", "vl2-mla"])
def test_towers_of_another_dtype(name):
    """A tower in float32 beside a decoder in bfloat16, and all in float32 under autocast."""
    model, exact = (load_model(golden(name).folder, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    batch = golden_model(name)[1](golden(name).conversations[0])
    labels = batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)
    for part in (model.vision, model.aligner, model.lm_head, model.language.embed_tokens, model.language.norm):
        part.float()  # one of them, then more
        assert len(generate(model, batch, max_new_tokens=2)[0]) == 2
    assert model.dtype == torch.bfloat16
    model.train()(**batch, labels=labels).loss.backward()
    embedded = {"inputs_embeds": model.embed(torch.tensor([[1, 2]])).float()}
    assert len(generate(model, embedded, max_new_tokens=2)[0]) == 2
    with torch.autocast("cpu", torch.bfloat16):
        exact(**batch, labels=labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in exact.aligner.parameters())
