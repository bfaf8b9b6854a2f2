"""model.py and the loaded model: against the golden files, transformers run live, and the equations.

A pair of small models, `small_pair(kind)`, is one random checkpoint, written by transformers and
read by `load_model`, so every comparison here also tests the loader.
"""

import copy
import itertools
import json
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    KINDS,
    SMALL_LLAMA,
    VL_GOLDENS,
    VOCABULARY,
    alone,
    assert_close,
    golden,
    golden_model,
    needs_shared,
    random_batch,
    random_transformers_model,
    relative_error,
    skip_unless_packable,
)
from torch import nn

from load_weights import load_model
from model import (
    DecoderLayer,
    DeepseekVL,
    LanguageConfig,
    PackedLinear,
    RMSNorm,
    SwiGLU,
    Workspace,
    causal_attention,
    heads_at_a_time,
    one_token_attention,
    pack_linears,
    positions_from_mask,
    products,
    rope_angles,
    rotate,
    visible_keys,
)
from vision import attention

both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run_theirs(model, batch, **options):
    """transformers' forward pass. Left to itself it counts positions from the padding on, as its generate does not."""
    positions = positions_from_mask(batch["attention_mask"])
    return model(**batch, position_ids=positions, output_hidden_states=True, output_attentions=True, **options)


# ------------------------------------------------------------------------------------ golden files


@needs_shared
@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_hidden_states_and_logits_equal_the_originals(name, case):
    (model, processor), data = golden_model(name), golden(name)
    output = model(**processor(data.conversations[case]), output_hidden_states=True)
    computed = {
        "logits": output.logits,
        "hidden_layer1": output.hidden_states[1],
        "hidden_final": output.hidden_states[-1],
    }
    for tensor, value in computed.items():
        if (expected := data.tensors.get(f"{case}.{tensor}_last64")) is not None:
            assert_close(value[0, -64:], expected)


@needs_shared
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_batch_of_all_golden_cases_equals_each_alone(name):
    (model, processor), data = golden_model(name), golden(name)
    logits = model(**processor(data.conversations), logits_to_keep=1).logits
    for case, row in enumerate(logits):
        assert_close(row[-1], data.tensors[f"{case}.logits_last64"][-1])


# ------------------------------------------------------------------------------------ transformers, the whole model

LANGUAGES = {
    "grouped heads": {},
    "one key/value head": {"num_key_value_heads": 1, "rope_theta": 10000.0},
    "ungrouped heads": {"num_key_value_heads": 6, "head_dim": 8},
    "tied embeddings": {"tie": True},
}


@both_kinds
@pytest.mark.parametrize("language", LANGUAGES)
def test_forward_pass_equals_transformers(small_pair, kind, language):
    """Features, logits, all hidden states and all attentions, of a batch whose second row is padded."""
    pair, batch = small_pair(kind, **LANGUAGES[language]), random_batch(kind)
    real = batch["attention_mask"].bool()
    ours = pair.ours(**batch, output_hidden_states=True, output_attentions=True)
    theirs = run_theirs(pair.theirs, batch)
    assert_close(torch.cat(pair.ours.encode_images(batch)), theirs.image_hidden_states.flatten(0, -2))
    assert_close(ours.logits[real], theirs.logits[real])
    for tested, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(tested[real], expected[real])
    for tested, expected in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(tested.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@both_kinds
def test_fused_and_written_out_attention_agree(small_pair, kind):
    """Without the weights wanted, another kernel computes the same."""
    model, batch = small_pair(kind).ours, random_batch(kind)
    for inputs in (batch, alone(batch, 0), alone(batch, 0) | {"attention_mask": None}):
        assert_close(model(**inputs).logits, model(**inputs, output_attentions=True).logits)


def labels_of(batch):
    """Every real token that is text, but for a row's first, which nothing real comes before."""
    first_or_padding = batch["attention_mask"].cumsum(dim=-1) <= 1
    return batch["input_ids"].masked_fill(first_or_padding | (batch["input_ids"] == IMAGE_TOKEN), -100)


@both_kinds
def test_loss_equals_transformers(small_pair, kind):
    pair, batch = small_pair(kind), random_batch(kind)
    labels = labels_of(batch)
    assert_close(pair.ours(**batch, labels=labels).loss, run_theirs(pair.theirs, batch, labels=labels).loss, 1e-6)


def test_loss_is_of_the_next_token(small_pair):
    model = small_pair("siglip").ours
    ids = torch.randint(10, VOCABULARY, (2, 6))
    labels = ids.clone()
    labels[0, 2] = labels[1, 5] = -100
    output = model(input_ids=ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    losses = [-log_probabilities[b, t, ids[b, t + 1]] for b in range(2) for t in range(5) if labels[b, t + 1] != -100]
    assert len(losses) == 8
    assert_close(output.loss, torch.stack(losses).mean(), 1e-6)


@both_kinds
@pytest.mark.parametrize("tie", [False, True], ids=["separate head", "tied head"])
def test_gradients_equal_transformers(kind, tie, tmp_path):
    """All of them: transformers' gradients are saved as if they were weights, and loaded as our parameters."""
    theirs, batch = random_transformers_model(kind, tie=tie), random_batch(kind)
    theirs.save_pretrained(tmp_path / "weights")
    ours, labels = load_model(tmp_path / "weights"), labels_of(batch)
    with torch.enable_grad():
        ours(**batch, labels=labels).loss.backward()
        run_theirs(theirs, batch, labels=labels).loss.backward()
    for name, parameter in theirs.named_parameters():
        pooling_head = ".vision_model.head." in name  # which takes no part
        parameter.copy_(0 if pooling_head else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected = dict(load_model(tmp_path / "gradients").named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert_close(parameter.grad, expected[name], 1e-4)


def last_step(model, batch):
    """Logits of the last token, fed alone after all others: ours and transformers' call their caches differently."""
    start = {name: value[:, :-1] if value.dim() == 2 else value for name, value in batch.items()}
    last = batch["input_ids"][:, -1:]
    if isinstance(model, DeepseekVL):
        cache = model.new_cache(*batch["input_ids"].shape)
        model(**start, cache=cache)
        return model(input_ids=last, cache=cache).logits
    return model(input_ids=last, past_key_values=model(**start, use_cache=True).past_key_values).logits


QUANTITIES = {  # of our model and a batch, and of transformers' model and the same
    "features": (
        lambda ours, batch: torch.cat(ours.encode_images(batch)),
        lambda theirs, batch: theirs(**batch).image_hidden_states.flatten(0, -2),  # 5.23 drops the batch dimension
    ),
    "logits": (lambda ours, batch: ours(**batch).logits, lambda theirs, batch: theirs(**batch).logits),
    "decode step": (last_step, last_step),
}


@both_kinds
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_bfloat16_error_is_that_of_transformers(small_pair, kind, packed, quantity):
    """Against transformers in float32, mean over five models and inputs: at most 1.2 times its own bfloat16 error."""
    of_ours, of_theirs = QUANTITIES[quantity]
    our_errors, their_errors = [], []
    for seed in range(5):
        pair, batch = small_pair(kind, seed=seed), random_batch(kind, (54, 54), seed=seed)
        exact = of_theirs(pair.theirs, batch)
        batch = {name: value.bfloat16() if "pixel_values" in name else value for name, value in batch.items()}
        ours = load_model(pair.folder, dtype=torch.bfloat16)
        if packed:
            skip_unless_packable(ours.lm_head)
            ours.pack()
        theirs = type(pair.theirs).from_pretrained(pair.folder, dtype=torch.bfloat16)
        our_errors.append(relative_error(of_ours(ours, batch), exact))
        their_errors.append(relative_error(of_theirs(theirs, batch), exact))
    assert sum(our_errors) <= 1.2 * sum(their_errors)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan_even_at_padding(small_pair, kind, dtype):
    model, batch = load_model(small_pair(kind).folder, dtype=dtype), random_batch(kind)
    output = model(**batch, output_hidden_states=True)
    assert output.logits.dtype == dtype
    assert all(states.isfinite().all() for states in (output.logits, *output.hidden_states))


# ------------------------------------------------------------------------------------ how a checkpoint may be written


def sharded(pair, folder):
    pair.theirs.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def pickled(pair, folder):
    pair.theirs.config.save_pretrained(folder)
    torch.save(pair.theirs.state_dict(), folder / "pytorch_model.bin")


def of_2025(pair, folder):
    """SigLIP's names had one "vision_model" more, and rope_theta stood beside the sizes."""
    weights = {
        re.sub(r"^model\.vision_model\.", "model.vision_model.vision_model.", name): tensor.clone()
        for name, tensor in pair.theirs.state_dict().items()
    }
    config = json.loads((pair.folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")


@both_kinds
@pytest.mark.parametrize("write", [sharded, pickled, of_2025])
def test_every_way_to_write_a_checkpoint_gives_the_same_model(small_pair, kind, write, tmp_path):
    pair = small_pair(kind)
    write(pair, tmp_path)
    model = load_model(tmp_path)
    assert model.config == pair.ours.config
    expected = pair.ours.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@both_kinds
def test_tied_head_is_the_embedding(small_pair, kind):
    tied, separate = small_pair(kind, tie=True).ours, small_pair(kind).ours
    assert tied.lm_head.weight is tied.language.embed_tokens.weight
    assert separate.lm_head.weight is not separate.language.embed_tokens.weight
    built = DeepseekVL(tied.config)
    assert built.lm_head.weight is built.language.embed_tokens.weight


# ------------------------------------------------------------------------------------ ways to call the model


@both_kinds
def test_batch_equals_each_row_alone(small_pair, kind):
    model, batch = small_pair(kind).ours, random_batch(kind, (60, 42, 51))
    logits = model(**batch).logits
    for row in range(3):
        expected = model(**alone(batch, row)).logits[0]
        assert_close(logits[row, -len(expected) :], expected)


@both_kinds
@pytest.mark.parametrize("lengths", [(54,), (54, 42)], ids=["one row", "padded"])
def test_cached_steps_equal_one_pass(small_pair, kind, lengths):
    """Tokens fed in pieces, several or one at a time, with the attention weights or without."""
    model, batch = small_pair(kind).ours, random_batch(kind, lengths)
    mask = batch["attention_mask"] if len(lengths) > 1 else None
    whole = model(**batch | {"attention_mask": mask}, output_attentions=True)
    embeddings = model.embed(**{name: value for name, value in batch.items() if name != "attention_mask"})
    for want_weights in (False, True):
        cache = model.new_cache(len(lengths), 54)
        for piece in embeddings.split([20, 1, 1, 7, 24, 1], dim=1):
            start, end = cache.length, cache.length + piece.shape[1]
            seen = None if mask is None else mask[:, :end]
            output = model(inputs_embeds=piece, attention_mask=seen, cache=cache, output_attentions=want_weights)
            assert_close(output.logits, whole.logits[:, start:end])
            for tested, expected in zip(output.attentions or (), whole.attentions):
                assert_close(tested, expected[:, :, start:end, :end])
        assert cache.length == 54


def test_logits_to_keep_are_the_last_ones(small_pair):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    logits = model(**batch).logits
    for keep in (1, 5):
        assert_close(model(**batch, logits_to_keep=keep).logits, logits[:, -keep:], 1e-6)


@both_kinds
def test_image_features_go_where_the_mask_or_the_image_token_says(small_pair, kind):
    model, batch = small_pair(kind).ours, random_batch(kind)
    where = batch["input_ids"] == IMAGE_TOKEN
    pixels = {name: value for name, value in batch.items() if "pixel_values" in name}
    features = model.encode_images(pixels)
    assert [tuple(feature.shape) for feature in features] == [(IMAGE_TOKENS, 48)] * 2
    expected = model.language.embed_tokens(batch["input_ids"])
    expected[where] = torch.cat(features)
    assert torch.equal(model.embed(batch["input_ids"], **pixels), expected)
    assert torch.equal(model.embed(batch["input_ids"] * 0, **pixels, images_seq_mask=where)[where], expected[where])


def test_a_picture_between_0_and_1_is_split_for_both_towers(small_pair):
    model, picture = small_pair("hybrid").ours, torch.rand(2, 3, 80, 80)
    high, low = model.vision.split(picture)
    features = model.encode_images({"pixel_values": picture})
    expected = model.encode_images({"pixel_values": low, "high_res_pixel_values": high})
    assert torch.equal(torch.stack(features), torch.stack(expected))


def test_embeddings_in_place_of_ids(small_pair):
    model, ids = small_pair("siglip").ours, torch.randint(10, VOCABULARY, (2, 9))
    assert torch.equal(model(inputs_embeds=model.embed(ids)).logits, model(input_ids=ids).logits)


def test_given_positions_equal_transformers(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    positions = torch.randint(0, 200, (2, 9))
    expected = pair.theirs(input_ids=ids, position_ids=positions).logits
    assert_close(pair.ours(input_ids=ids, position_ids=positions).logits, expected)
    assert relative_error(pair.ours(input_ids=ids).logits, expected) > 0.01


IDS, EMBEDDINGS, PICTURE = torch.full((1, 5), 11), torch.ones(1, 5, 48), torch.ones(1, 3, 26, 26)
WRONG_INPUTS = {
    "neither ids nor embeddings": ({}, "either input_ids or inputs_embeds"),
    "ids and embeddings": ({"input_ids": IDS, "inputs_embeds": EMBEDDINGS}, "either input_ids or inputs_embeds"),
    "a mask of another length": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, "4 tokens, there are 5"),
    "labels of few logits": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "logits_to_keep must be 0"),
    "no place for an image": ({"input_ids": IDS, "pixel_values": PICTURE}, "36 image features for 0 image tokens"),
    "too many places": (
        {"input_ids": torch.full((1, 40), IMAGE_TOKEN), "pixel_values": PICTURE},
        "36 image features for 40 image tokens",
    ),
    "pixels of another size": (
        {"input_ids": IDS, "pixel_values": torch.ones(1, 3, 30, 30)},
        r"pixel_values have shape \[1, 3, 30, 30\], expected \[images, 3, 26, 26\]",
    ),
    "places without pictures": (
        {"input_ids": IDS, "images_seq_mask": IDS > 0},
        "no pixel_values for 5 image tokens",
    ),
    "places that a mask gives": (
        {"input_ids": IDS, "pixel_values": PICTURE, "images_seq_mask": IDS > 0},
        "36 image features for 5 image tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_errors_that_say_why(small_pair, case):
    inputs, message = WRONG_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        small_pair("siglip").ours(**inputs)


def test_a_hybrid_needs_the_high_resolution_picture(small_pair):
    with pytest.raises(ValueError, match=r"expected \[images, 3, 80, 80\]"):
        small_pair("hybrid").ours.encode_images({"pixel_values": PICTURE})


def test_a_cache_for_another_number_of_rows(small_pair):
    model = small_pair("siglip").ours
    with pytest.raises(ValueError, match="holds 2 conversations, 1 were fed"):
        model(input_ids=IDS, cache=model.new_cache(2, 10))


def test_no_pictures_are_as_none(small_pair):
    model = small_pair("siglip").ours
    assert torch.equal(model(input_ids=IDS, pixel_values=PICTURE[:0]).logits, model(input_ids=IDS).logits)


def test_mask_must_cover_the_cached_tokens_too(small_pair):
    model, ids = small_pair("siglip").ours, torch.ones(1, 5).long()
    cache = model.new_cache(1, 10)
    model(input_ids=ids, cache=cache)
    with pytest.raises(ValueError, match="5 tokens, there are 10"):
        model(input_ids=ids, attention_mask=torch.ones(1, 5), cache=cache)


# ------------------------------------------------------------------------------------ RMSNorm, RoPE, SwiGLU


def transformers_llama():
    return pytest.importorskip("transformers.models.llama.modeling_llama")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("scale", [1.0, 0.001])  # at the small one, eps is half of what is under the root
def test_rms_norm(dtype, tolerance, scale):
    """The fused form, the equation, and transformers'."""
    ours, theirs = RMSNorm(48, eps=1e-6), transformers_llama().LlamaRMSNorm(48, eps=1e-6)
    ours.weight.copy_(torch.rand(48) + 0.5)
    theirs.weight.copy_(ours.weight)
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), (torch.randn(2, 9, 48) * scale).to(dtype)
    assert_close(ours(x), theirs(x), tolerance)
    assert_close(ours(x), ours.equation(x), tolerance)
    assert torch.equal(ours.equation(x), theirs(x))


def llama_configs(theta: float = 500.0):
    """The small language model's config, ours and transformers'."""
    theirs = pytest.importorskip("transformers").LlamaConfig(**SMALL_LLAMA | {"rope_theta": theta})
    theirs._attn_implementation = "eager"
    sizes = {name: value for name, value in SMALL_LLAMA.items() if name != "model_type"}
    return LanguageConfig(**sizes | {"rope_theta": theta}), theirs


@pytest.mark.parametrize("theta", [500.0, 10000.0])
def test_rope(theta):
    ours, theirs = llama_configs(theta)
    llama = transformers_llama()
    q, k = torch.randn(2, 6, 9, 16), torch.randn(2, 2, 9, 16)
    positions = torch.randint(0, 16384, (2, 9))
    cos, sin = rope_angles(positions, ours)
    assert cos.dtype == sin.dtype == torch.float32
    expected_q, expected_k = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(theirs)(q, positions))
    assert_close(rotate(q, cos, sin), expected_q, 1e-6)
    assert_close(rotate(k, cos, sin), expected_k, 1e-6)


def test_rope_turns_each_pair_as_a_complex_number():
    """Pair i at position p is multiplied by exp(1j * p * theta ** (-2 i / d)), RoFormer equation 15."""
    x, positions = torch.randn(1, 1, 5, 16), torch.tensor([[0, 1, 2, 100, 3000]])
    frequencies = 500.0 ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    turned = torch.complex(*x[0, 0].double().chunk(2, -1)) * torch.exp(1j * positions.T * frequencies)
    rotated = rotate(x, *rope_angles(positions, llama_configs()[0]))[0, 0]
    assert_close(rotated, torch.cat((turned.real, turned.imag), -1), 1e-4)  # float32 knows an angle of 3000 to 1e-4


def test_swiglu():
    theirs = transformers_llama().LlamaMLP(llama_configs()[1])
    ours, x = SwiGLU(48, 80), torch.randn(2, 9, 48)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x), theirs(x), 1e-6)


# ------------------------------------------------------------------------------------ positions and masks


def test_positions_count_from_the_first_real_token():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert positions_from_mask(mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 5), (2, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_visible_keys(T, S, masked):
    """A token sees itself, and the real tokens before it."""
    mask = torch.tensor([[1] * S, [0] * (S // 2) + [1] * (S - S // 2)]) if masked else None
    visible = visible_keys(T, S, mask, torch.device("cpu"))
    if not masked and (T, S) != (2, 5):
        assert visible is None  # plain causal attention, or one token that sees all
        return
    real = mask.bool() if masked else torch.ones(1, S, dtype=torch.bool)
    assert visible.shape == (len(real), 1, T, S)
    for row, t, key in itertools.product(range(len(real)), range(T), range(S)):
        query = S - T + t
        assert visible[row, 0, t, key] == (key == query or (key < query and real[row, key]))


# ------------------------------------------------------------------------------------ attention and cache


def naive_attention(q, k, v, visible, scale):
    """One softmax at a time, over the keys that a query sees, in float64. visible: (B, T, S)."""
    B, H, T, d = q.shape
    out, weights = torch.zeros(B, H, T, d), torch.zeros(B, H, T, k.shape[2])
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (B, H, T))):
        shared = h // (H // k.shape[1])  # consecutive query heads share a key/value head
        keys, values = (x[b, shared, visible[b, t]].double() for x in (k, v))
        weights[b, h, t, visible[b, t]] = (keys @ q[b, h, t].double() * scale).softmax(0).float()
        out[b, h, t] = weights[b, h, t, visible[b, t]] @ values.float()
    return out, weights


@pytest.mark.parametrize("T, S", [(5, 5), (1, 5), (2, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_causal_attention_fused_and_written_out(T, S, masked, kv_heads):
    q, k, v, scale = torch.randn(2, 6, T, 4), torch.randn(2, kv_heads, S, 4), torch.randn(2, kv_heads, S, 4), 0.7
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) if masked else None
    visible = visible_keys(T, S, mask, q.device)
    sees = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(2, T, S)
    sees = sees if visible is None else visible[:, 0].expand(2, T, S)
    expected, expected_weights = naive_attention(q, k, v, sees, scale)
    fused, no_weights = causal_attention(q, k, v, visible, scale)
    written_out, weights = causal_attention(q, k, v, visible, scale, want_weights=True)
    assert no_weights is None
    assert_close(fused, expected, 1e-6)
    assert_close(written_out, expected, 1e-6)
    assert_close(weights, expected_weights, 1e-6)
    if T == 1:
        assert_close(one_token_attention(q, k, v, visible, scale), expected, 1e-6)


def test_one_token_attention_rounds_only_its_result():
    q, k, v = (torch.randn(2, heads, tokens, 16).bfloat16() for heads, tokens in ((6, 1), (2, 50), (2, 50)))
    in_float32 = one_token_attention(q.float(), k.float(), v.float(), None, 0.25)
    assert torch.equal(one_token_attention(q, k, v, None, 0.25), in_float32.bfloat16())


@pytest.mark.parametrize("padded", [False, True])
def test_decoder_layer(padded):
    """With grouped heads, of a width that is not hidden_size / heads."""
    config, their_config = llama_configs()
    ours, theirs = DecoderLayer(config, 0), transformers_llama().LlamaDecoderLayer(their_config, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())

    x = torch.randn(2, 9, 48) * 0.01
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]) if padded else torch.ones(2, 9)
    positions = positions_from_mask(mask)
    visible = visible_keys(9, 9, mask if padded else None, x.device)
    their_mask = torch.full((2, 1, 9, 9), -torch.inf).triu(1)
    if padded:
        their_mask.masked_fill_(~visible, -torch.inf)
    rotary = transformers_llama().LlamaRotaryEmbedding(their_config)(x, positions)
    expected = theirs(x, attention_mask=their_mask, position_embeddings=rotary)
    tested, _ = ours(x, rope_angles(positions, config), visible, None)
    assert_close(tested[mask.bool()], expected[mask.bool()])


def test_cache_holds_rotated_keys_and_values_as_transformers(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    cache = pair.ours.new_cache(2, 12)
    pair.ours(input_ids=ids[:, :4], cache=cache)
    pair.ours(input_ids=ids[:, 4:], cache=cache)
    assert cache.length == 9
    expected = pair.theirs(input_ids=ids, use_cache=True).past_key_values.layers
    for (keys, values), theirs in zip(cache.layers, expected, strict=True):
        assert_close(keys[:, :, :9], theirs.keys)
        assert_close(values[:, :, :9], theirs.values)


def test_cache_is_written_in_place_and_read_without_a_copy(small_pair):
    cache = small_pair("siglip").ours.new_cache(1, 6)
    where = [tensor.data_ptr() for tensor in cache.layers[1]]
    pieces = [torch.randn(2, 1, 2, tokens, 16) for tokens in (3, 1, 2)]
    for key, value in pieces:
        seen = cache.append(1, key, value)
        cache.advance(key.shape[2])
        assert [tensor.data_ptr() for tensor in seen] == where
    for tensor, written in zip(seen, torch.cat(pieces, dim=3)):
        assert torch.equal(tensor, written)


def test_cache_that_is_full_refuses(small_pair):
    model = small_pair("siglip").ours
    cache = model.new_cache(1, 4)
    model(input_ids=torch.ones(1, 3).long(), cache=cache)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 were fed"):
        model(input_ids=torch.ones(1, 2).long(), cache=cache)
    assert cache.length == 3


# ------------------------------------------------------------------------------------ packed weights


@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (2, 48), (3, 5, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_equals_linear(shape, bias):
    """Against the product in float64, no worse than bfloat16's own rounding of the result."""
    linear, x = nn.Linear(48, 80, bias).bfloat16(), torch.randn(shape).bfloat16()
    skip_unless_packable(linear)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert_close(linear(x), exact, 2**-8)
    assert_close(PackedLinear(linear)(x), exact, 2**-8)


@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (2, 1, 48), (3, 5, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_packed_together_equal_each_alone(shape, bias):
    """As queries, keys and values: of several heads, and of fewer."""
    linears, x = [nn.Linear(48, size, bias).bfloat16() for size in (80, 16, 16)], torch.randn(shape).bfloat16()
    skip_unless_packable(linears[0])
    together = products(x, PackedLinear(*linears), None, None)
    for tested, linear, plain in zip(together, linears, products(x, *linears), strict=True):
        assert_close(tested, PackedLinear(linear)(x), 2**-9)
        assert_close(tested, plain, 2**-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_packing_converts(count, bias, dtype):
    """To what it is for layers converted before, bit by bit, also in memory that others were in."""
    linears, x = [nn.Linear(48, size, bias).to(dtype) for size in (80, 16, 16)[:count]], torch.randn(3, 48).bfloat16()
    skip_unless_packable(nn.Linear(48, 80).bfloat16())
    workspace = Workspace()
    tested = [PackedLinear(*linears, workspace=workspace) for _ in range(2)]
    memory = workspace.memory
    PackedLinear(nn.Linear(48, 64), workspace=workspace)
    assert workspace.memory is memory and len(memory) == 48 * sum(linear.out_features for linear in linears)
    expected = PackedLinear(*(copy.deepcopy(linear).bfloat16() for linear in linears))(x)
    assert all(torch.equal(packed(x), expected) for packed in tested)
    assert all(linear.weight.dtype == dtype for linear in linears)


def test_packing_frees_each_weight_before_the_next():
    """At most the plain weights of one layer are held beside the packed ones."""
    layers = nn.ModuleList(SwiGLU(48, 80).bfloat16() for _ in range(3))
    skip_unless_packable(layers[0].up_proj)
    plain = [weakref.ref(parameter) for parameter in layers.parameters()]
    held = []
    pack = PackedLinear.__init__

    def counting(self, *linears, **options):
        held.append(sum(parameter() is not None for parameter in plain))
        pack(self, *linears, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "__init__", counting)
        pack_linears(layers)
    assert held == [9, 7, 6, 4, 3, 1] and not any(parameter() is not None for parameter in plain)


@both_kinds
def test_packed_model_equals_the_plain_one(small_pair, kind):
    folder, batch = small_pair(kind).folder, random_batch(kind)
    plain, packed = (load_model(folder, dtype=torch.bfloat16) for _ in range(2))
    skip_unless_packable(packed.lm_head)
    packed.pack()
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert_close(packed(**batch).logits, plain(**batch).logits, 0.02)


@both_kinds
def test_packing_leaves_float32_as_it_is(small_pair, kind):
    model = load_model(small_pair(kind).folder)
    before = list(model.modules())
    assert model.pack() is model
    assert all(old is new for old, new in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("B, H, G, S", [(1, 16, 16, 2100), (1, 8, 2, 9000), (1, 4, 1, 20000), (2, 7, 7, 2100)])
def test_one_token_attends_to_a_long_text_some_heads_at_a_time(B, H, G, S):
    q, k, v = torch.randn(B, H, 1, 128), torch.randn(B, G, S, 128), torch.randn(B, G, S, 128)
    visible = torch.rand(B, 1, 1, S) < 0.9
    expected = F.scaled_dot_product_attention(q, k, v, visible, scale=0.1, enable_gqa=True)
    assert_close(one_token_attention(q, k, v, visible, 0.1), expected, 1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("G", [1, 3, 6])
@pytest.mark.parametrize("values", [4, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_token_attends_with_any_number_of_heads_at_a_time(heads, G, values, dtype, monkeypatch):
    monkeypatch.setattr("model.heads_at_a_time", lambda *_: heads)
    q, k, v = (torch.randn(2, *shape).to(dtype) for shape in ((6, 1, 8), (G, 5, 8), (G, 5, values)))
    visible = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()[:, None, None]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible, enable_gqa=True)
    out = one_token_attention(q, k, v, visible, 8**-0.5)
    assert out.dtype == dtype
    assert_close(out.double(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-6)
    if values == 8:  # one tensor for both, as in latent attention
        expected = F.scaled_dot_product_attention(q.double(), k.double(), k.double(), visible, enable_gqa=True)
        again = one_token_attention(q, k, k, visible, 8**-0.5)
        assert_close(again.double(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    "cores, heads, size, few",
    [
        (2, 16, 640 * 128, 8),
        (2, 16, 4096 * 128, 2),
        (2, 10, 640 * 128, 10),
        (2, 7, 2100 * 128, 4),
        (2, 16, 2**22, 2),
        (2, 1, 20000 * 576, 1),
        (16, 16, 4096 * 128, 16),
        (16, 32, 8192 * 128, 16),
        (2, 0, 128, 0),
    ],
)
def test_heads_at_a_time_are_as_many_for_every_core(cores, heads, size, few, monkeypatch):
    """2**19 values for each core; few heads of many values: one for each core."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert heads_at_a_time(heads, size) == few


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_of_a_single_token(wanted):
    """Wide keys and values share memory in the fast form, which would lose what a gradient needs."""
    inputs = {name: torch.randn(1, 2, tokens, 8) for name, tokens in (("q", 1), ("k", 5), ("v", 5))}
    inputs[wanted].requires_grad_()
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(attention(**inputs, scale=0.5)[0].pow(2).sum(), inputs[wanted])
        out, _ = causal_attention(**inputs, visible=None, scale=0.5)
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), inputs[wanted])
    assert_close(gradient, expected, 1e-5)
