"""What model.py promises beyond its numbers: inputs, errors, the cache, positions, the record, gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN, KINDS, assert_close, encode_images, golden, golden_model, inside, random_batch
from small_vl2 import LANGUAGES, SMALL, randomized, small_vl2, with_experts
from torch import nn

from load_weights import load_model
from model import MODELS, KVCache, MixtureOfExperts, record

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")

IDS, PICTURE, TILES = torch.full((1, 5), 11), torch.ones(1, 3, 26, 26), torch.ones(3, 3, 44, 44)


def test_what_may_stand_for_pictures_and_which_logits_are_kept(small_pair):
    """One tensor of features; places that a mask gives; embeddings with the features in them; no pictures at all."""
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    ids, where, logits = batch["input_ids"], batch["input_ids"] == IMAGE_TOKEN, model(**batch).logits
    features = encode_images(model, batch)
    expected = model.embed(ids, features)
    assert torch.equal(model.embed(ids, torch.stack(features)), expected)
    assert torch.equal(model.embed(ids * 0, features, where)[where], expected[where])
    assert torch.equal(model(inputs_embeds=expected, attention_mask=batch["attention_mask"]).logits, logits)
    assert torch.equal(model(input_ids=IDS, pixel_values=PICTURE[:0]).logits, model(input_ids=IDS).logits)
    for keep in (1, 5):
        assert_close(model(**batch, logits_to_keep=keep).logits, logits[:, -keep:], 1e-6)


WRONG_INPUTS = [  # a model, what it is given beside ids, words of the error
    ("siglip", {"input_ids": None}, "either input_ids or inputs_embeds"),
    ("siglip", {"inputs_embeds": torch.ones(1, 5, 48)}, "either input_ids or inputs_embeds"),
    ("siglip", {"input_ids": None, "inputs_embeds": torch.ones(1, 5, 48), "pixel_values": PICTURE}, "or inputs_embeds"),
    ("siglip", {"attention_mask": torch.ones(1, 4)}, r"\[1, 4\], expected .*5\]"),
    *(("siglip", {"position_ids": torch.ones(shape)}, r"position_ids has shape .*, expected \[1, 5\]")
      for shape in ((1, 1), (2, 5), (5,))),
    ("siglip", {"labels": IDS, "logits_to_keep": 1}, "logits_to_keep must be 0"),
    ("siglip", {"pixel_values": PICTURE}, "36 image features for 0 image tokens"),
    ("siglip", {"pixel_values": PICTURE, "images_seq_mask": IDS > 0}, "36 image features for 5 image tokens"),
    ("siglip", {"images_seq_mask": IDS > 0}, "no pixel_values for 5 image tokens"),
    ("siglip", {"input_ids": IDS * 0 + IMAGE_TOKEN}, "no pixel_values for 5 image tokens"),
    ("siglip", {"pixel_values": torch.ones(1, 3, 30, 30)},
     r"pixel_values has shape \[1, 3, 30, 30\], expected \[images, 3, 26, 26\]"),
    ("hybrid", {"pixel_values": PICTURE}, r"expected \[images, 3, 80, 80\]"),
    ("hybrid", {"pixel_values": PICTURE, "high_res_pixel_values": torch.ones(2, 3, 80, 80)}, r"expected \[2, 3, 26"),
    ("vl2", {"pixel_values": TILES}, r"images_spatial_crop has shape None, expected \[images, 2\]"),
    ("vl2", {"pixel_values": TILES, "images_spatial_crop": torch.ones(1, 1, 2)}, r"expected \[images, 2\]"),
    *(("vl2", {"pixel_values": TILES, "images_spatial_crop": torch.tensor(crop)},
       f"says {tiles} tiles with the global views, pixel_values hold 3")
      for crop, tiles in (([[1, 1]], 2), ([[1, 1], [1, 1]], 4), ([[0, 0]], 0), ([[3, 2]], 7), ([[-1, -2]], 0))),
]  # fmt: skip


@pytest.mark.parametrize("kind, inputs, message", WRONG_INPUTS)
def test_wrong_inputs_are_errors_that_say_why(small_pair, kind, inputs, message):
    model = small_vl2(SMALL)[0] if kind == "vl2" else small_pair(kind).ours
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS} | inputs)


# ------------------------------------------------------------------------------------ cache and positions


@pytest.mark.parametrize("case", ["siglip", "siglip padded", "hybrid", "hybrid padded", *LANGUAGES])
def test_a_batch_fed_in_pieces_through_a_cache_equals_one_pass(small_pair, case):
    """In its logits, also while recording, and in the attention weights that a record holds."""
    if case in LANGUAGES:
        (model, batch), sizes = small_vl2(LANGUAGES[case]), [3, 15, 1, 9, 1]
    else:
        kind, lengths, sizes = case.split()[0], (54, 42) if "padded" in case else (54,), [20, 1, 1, 7, 24, 1]
        model, batch = small_pair(kind).ours, random_batch(kind, lengths)
    whole, _, attentions = inside(model, batch)
    embeddings = model.embed(batch["input_ids"], encode_images(model, batch), batch.get("images_seq_mask"))
    for recording in (False, True):
        cache, end = model.new_cache(*batch["input_ids"].shape), 0
        for piece in embeddings.split(sizes, dim=1):
            start, end = end, end + piece.shape[1]
            inputs = {"inputs_embeds": piece, "attention_mask": batch["attention_mask"][:, start:end], "cache": cache}
            output, _, weights = inside(model, inputs) if recording else (model(**inputs), [], [])
            assert_close(output.logits, whole.logits[:, start:end])
            for tested, expected in zip(weights, attentions):
                assert_close(tested, expected[:, :, start:end, :end])
        assert cache.length == end == cache.capacity


def test_a_mask_may_be_left_out_where_no_more_padding_comes(small_pair):
    """The cache remembers which of the tokens before were padding."""
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    cache, ids = model.new_cache(2, 60), torch.randint(10, 120, (2, 2))
    model(**batch, cache=cache)
    logits = model(input_ids=ids, cache=cache).logits
    longer = {key: torch.cat((batch[key], more), 1) for key, more in (("input_ids", ids), ("attention_mask", ids > 0))}
    assert_close(logits, model(**batch | longer).logits[:, -2:])


def test_errors_of_a_cache(small_pair):
    model = small_pair("siglip").ours
    cache = model.new_cache(1, 4)
    model(input_ids=IDS[:, :3], cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 were fed"):
        model(input_ids=IDS[:, :2], cache=cache)
    assert cache.length == 3
    with pytest.raises(ValueError, match="holds 2 conversations, 1 were fed"):
        model(input_ids=IDS, cache=model.new_cache(2, 10))


def test_a_wrapped_kv_b_proj_is_called_in_every_step():
    """As of LoRA, which has the weight that it adds to as its own `weight`."""
    model, batch = small_vl2(SMALL)

    class Doubled(nn.Module):
        def __init__(self, linear: nn.Linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.linear(x)

    for layer in model.language.layers:
        layer.self_attn.kv_b_proj = Doubled(layer.self_attn.kv_b_proj)
    ids = torch.randint(10, 60, (1, 9))
    cache, expected = model.new_cache(1, 9), model(input_ids=ids).logits
    assert_close(torch.cat([model(input_ids=id, cache=cache).logits for id in ids.split(1, dim=1)], dim=1), expected)


def test_cache_holds_a_latent_and_a_rotated_key_a_token_and_layer():
    """kv_lora_rank + qk_rope_head_dim = 512 + 64 values; tiny, without latents, all its keys and values."""
    values = {"deepseek-vl2-small": 27 * 576, "deepseek-vl2": 30 * 576, "deepseek-vl2-tiny": 12 * 2 * 1280}
    for name, count in values.items():
        cache = KVCache(MODELS[name].language, 1, 4096, torch.bfloat16, device="meta")
        assert sum(tensor.numel() for layer in cache.layers for tensor in layer.tensors) == count * 4096


# ------------------------------------------------------------------------------------ record, half precision


@pytest.mark.parametrize("kind", KINDS)
def test_record_holds_every_layer_and_every_attention_of_the_towers(small_pair, kind):
    """So does one inside another. Nothing is kept once the block ends."""
    model, batch = small_pair(kind).ours, random_batch(kind)
    with record(model) as outer, record(model) as seen:
        logits = model(**batch).logits
    count = len(seen)
    assert outer.keys() == seen.keys()
    assert all(torch.equal(outer[name], seen[name]) for name in seen if name.endswith("attn"))
    assert_close(logits, model(**batch).logits, 1e-6)
    assert len(seen) == count
    assert_close(torch.cat(encode_images(model, batch)), seen["aligner"].flatten(0, 1), 1e-6)
    for tower in {"siglip": ["vision"], "hybrid": ["vision.low", "vision.high"]}[kind]:
        for block in range(len(model.get_submodule(f"{tower}.blocks"))):
            assert len(seen[f"{tower}.blocks.{block}"]) == 2
        weights = seen[f"{tower}.blocks.0.attn"]
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vl-hybrid", "vl2-mha", "vl2-mla-sigmoid"])
def test_half_precision_error_is_of_the_order_of_rounding(name, dtype):
    """Hidden states after the first layer and image features, of a padded batch; nothing is NaN, padding included.

    Later layers of experts may differ: a rounding may send a token to another one. Pixels are split in float32.
    """
    (exact, processor), half = golden_model(name), load_model(golden(name).folder, dtype=dtype)
    batch = processor([golden(name).conversations[case] for case in (0, 3)])
    (_, expected, _), (output, tested, _) = inside(exact, batch), inside(half, batch)
    real, tolerance = batch["attention_mask"].bool(), 2 * torch.finfo(dtype).eps
    assert output.logits.dtype == dtype
    assert all(states.isfinite().all() for states in (output.logits, *tested))
    assert_close(tested[1][real], expected[1][real], tolerance)
    assert_close(torch.cat(encode_images(half, batch)), torch.cat(encode_images(exact, batch)), tolerance)
    if name == "vl-hybrid":
        assert all(pixels.dtype == torch.float32 for pixels in half.vision.split(batch["pixel_values"].to(dtype)))


# ------------------------------------------------------------------------------------ experts, learning


def test_the_loss_is_the_mean_over_labels_and_zero_without_any(small_pair):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    expected = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(model(**batch, labels=labels).loss, expected, 1e-6)
    assert model(**batch, labels=labels * 0 - 100).loss == 0


def test_layers_that_have_experts():
    for first, every, layers in ((1, 1, [1, 2, 3, 4, 5]), (0, 1, [0, 1, 2, 3, 4, 5]), (2, 2, [2, 4]), (6, 1, [])):
        config = with_experts(first_k_dense_replace=first, moe_layer_freq=every)
        assert [layer for layer in range(6) if config.has_experts(layer)] == layers


def test_experts_that_nobody_chose_are_not_touched():
    moe, x = randomized(MixtureOfExperts(SMALL)), torch.randn(1, 1, 32)
    chosen, expected = set(moe.gate(x[0])[0].flatten().tolist()), moe(x)
    for index in set(range(8)) - chosen:
        moe.experts[index].requires_grad_(False).to("meta")  # no values: to use them is an error
    assert len(chosen) == 3 and torch.equal(moe(x), expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_parameter_that_should_learn_gets_a_gradient_and_training_lowers_the_loss(language):
    """Exceptions: experts that no token chose, and the bias that only takes part in the choice."""
    model, batch = small_vl2(LANGUAGES[language])
    with record(model) as seen:
        model(**batch)
    gates = {name: out[0] for name, out in seen.items() if name.endswith(".gate")}  # the experts of each token
    chosen = {f"{name[:-5]}.experts.{e}" for name, experts in gates.items() for e in experts.unique().tolist()}
    assert len(gates) == 2
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for step in range(4):
        with torch.enable_grad():
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
        for name, parameter in model.named_parameters() if step == 0 else ():
            unused = ".experts." in name and name.rsplit(".", 2)[0] not in chosen
            learns = not unused and not name.endswith("e_score_correction_bias")
            assert learns == (parameter.grad is not None and bool(parameter.grad.any())), name
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0], losses
