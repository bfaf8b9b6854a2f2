"""Against transformers run live, and where it has no such part, against the equations written out slowly.

First whole models, then their parts in the order of vision.py and model.py. A pair of small models, `small_pair(kind)`,
is one random checkpoint, written by transformers and read by `load_model`. Relative errors are at most 1e-5 in float32
unless a test says otherwise; in bfloat16 at most 1.2 times transformers' own, mean over several models.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    IMAGE_TOKEN,
    KINDS,
    SMALL_LLAMA,
    VOCABULARY,
    assert_close,
    encode_images,
    golden_model,
    inside,
    random_batch,
    random_transformers_model,
    relative_error,
)
from PIL import Image
from small_vl2 import GROUP_LIMITED, GROUPS, LATENT, SIGMOID, SMALL, YARN, randomized, transformers_module, with_experts

from load_weights import load_model, pack
from model import (
    DecoderLayer,
    DeepseekVL,
    KVCache,
    LanguageConfig,
    LatentAttention,
    MixtureOfExperts,
    RMSNorm,
    Router,
    SwiGLU,
    YarnConfig,
    record,
    rope_angles,
    rotate,
    yarn_frequencies,
    yarn_mscale,
)
from vision import (
    SAMAttention,
    TileAligner,
    TileConfig,
    attention,
    fast_attention,
)

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")

both_kinds = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------ whole models


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Counted from a row's first real token on."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def run_theirs(model, batch, **options):
    """transformers' forward pass. Left to itself it counts positions from the padding on, as its generate does not."""
    positions = positions_of(batch["attention_mask"])
    return model(**batch, position_ids=positions, output_hidden_states=True, output_attentions=True, **options)


LANGUAGES = {
    "grouped heads": {},
    "one key/value head": {"num_key_value_heads": 1, "rope_theta": 10000.0},
    "ungrouped heads": {"num_key_value_heads": 6, "head_dim": 8},
    "tied embeddings": {"tie": True},
}


@both_kinds
@pytest.mark.parametrize("language", LANGUAGES)
def test_forward_pass(small_pair, kind, language):
    """Features, logits, all hidden states and all attentions, of a batch whose second row is padded."""
    pair, batch = small_pair(kind, **LANGUAGES[language]), random_batch(kind)
    real = batch["attention_mask"].bool()
    ours, hidden_states, attentions = inside(pair.ours, batch)
    theirs = run_theirs(pair.theirs, batch)
    assert_close(torch.cat(encode_images(pair.ours, batch)), theirs.image_hidden_states.flatten(0, -2))
    assert_close(ours.logits[real], theirs.logits[real])
    assert_close(pair.ours(**batch).logits[real], theirs.logits[real])
    for tested, expected in zip(hidden_states, theirs.hidden_states, strict=True):
        assert_close(tested[real], expected[real])
    for tested, expected in zip(attentions, theirs.attentions, strict=True):
        assert_close(tested.transpose(1, 2)[real], expected.transpose(1, 2)[real])


def labels_of(batch):
    """Every real token that is text, but for a row's first, which nothing real comes before."""
    first_or_padding = batch["attention_mask"].cumsum(dim=-1) <= 1
    return batch["input_ids"].masked_fill(first_or_padding | (batch["input_ids"] == IMAGE_TOKEN), -100)


@both_kinds
@pytest.mark.parametrize("tie", [False, True], ids=["separate head", "tied head"])
def test_loss_and_every_gradient(kind, tie, tmp_path):
    """transformers' gradients are saved as if they were weights, and loaded as our parameters."""
    theirs, batch = random_transformers_model(kind, tie=tie), random_batch(kind)
    theirs.save_pretrained(tmp_path / "weights")
    ours, labels = load_model(tmp_path / "weights"), labels_of(batch)
    with torch.enable_grad():
        loss, expected_loss = (ours(**batch, labels=labels).loss, run_theirs(theirs, batch, labels=labels).loss)
        loss.backward()
        expected_loss.backward()
    assert_close(loss, expected_loss, 1e-6)
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
        lambda ours, batch: torch.cat(encode_images(ours, batch)),
        lambda theirs, batch: theirs(**batch).image_hidden_states.flatten(0, -2),  # 5.23 drops the batch dimension
    ),
    "logits": (lambda ours, batch: ours(**batch).logits, lambda theirs, batch: theirs(**batch).logits),
    "decode step": (last_step, last_step),
}


@both_kinds
def test_bfloat16_error_is_that_of_transformers(small_pair, kind):
    """Of features, logits and a decode step; packed too, which changes a model where this CPU has kernels."""
    errors = {name: [0.0, 0.0, 0.0] for name in QUANTITIES}
    for seed in range(5):
        pair, batch = small_pair(kind, seed=seed), random_batch(kind, (54, 54), seed=seed)
        half = {name: value.bfloat16() if "pixel_values" in name else value for name, value in batch.items()}
        theirs = type(pair.theirs).from_pretrained(pair.folder, dtype=torch.bfloat16)
        ours, packed = (load_model(pair.folder, dtype=torch.bfloat16) for _ in range(2))
        pack(packed)
        for name, (of_ours, of_theirs) in QUANTITIES.items():
            exact = of_theirs(pair.theirs, batch)
            tested = of_ours(ours, half), of_ours(packed, half), of_theirs(theirs, half)
            errors[name] = [sum(pair) for pair in zip(errors[name], (relative_error(t, exact) for t in tested))]
    for name, (ours, packed, theirs) in errors.items():
        assert max(ours, packed) <= 1.2 * theirs, name


def test_given_positions(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    positions = torch.randint(0, 200, (2, 9))
    expected = pair.theirs(input_ids=ids, position_ids=positions).logits
    assert_close(pair.ours(input_ids=ids, position_ids=positions).logits, expected)


# ------------------------------------------------------------------------------------ attention and its fast twin


def slow_attention(q, k, v, visible, bias, scale):
    """One softmax at a time, over the keys that a query sees, in float64. visible and bias: (B, T, S)."""
    B, H, T, d = q.shape
    out = torch.zeros(B, H, T, v.shape[-1], dtype=torch.float64)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        shared = h // (H // k.shape[1])  # consecutive query heads share a key/value head
        sees = visible[b, t]
        keys, values = k[b, shared, sees].double(), v[b, shared, sees].double()
        out[b, h, t] = (keys @ q[b, h, t].double() * scale + bias[b, t, sees].double()).softmax(0) @ values
    return out


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.002}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "bias"])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 7), (2, 7)])
def test_attention_and_fast_attention_equal_one_softmax_at_a_time(T, S, kind, dtype):
    for G, width, scale in itertools.product((1, 2, 6), (4, 8, 12), (None, 0.7)):
        q, k, v = (torch.randn(2, *shape).to(dtype) for shape in ((6, T, 8), (G, S, 8), (G, S, width)))
        visible, bias, options = torch.ones(2, T, S, dtype=torch.bool), torch.zeros(2, T, S, dtype=dtype), {}
        if kind == "causal":
            visible, options = visible.tril(S - T), {"causal": True}
        elif kind == "bias":
            visible[1, :, : S // 2] = False
            bias = torch.randn(2, T, S).to(dtype)
            options = {"bias": bias.masked_fill(~visible, -torch.inf)[:, None]}
        expected = slow_attention(q, k, v, visible, bias, 8**-0.5 if scale is None else scale)
        for twin in (attention, fast_attention):
            out = twin(q, k, v, scale=scale, **options)
            assert out.dtype == dtype
            assert_close(out.double(), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("B, H, G, S", [(1, 16, 16, 2100), (1, 8, 2, 9000), (1, 4, 1, 20000), (2, 7, 7, 2100)])
def test_one_query_of_a_long_text(B, H, G, S):
    """As a decode step has it, of any number of heads; only the result is rounded to bfloat16."""
    q, k, v = (torch.randn(B, *shape).bfloat16() for shape in ((H, 1, 128), (G, S, 128), (G, S, 128)))
    bias = torch.zeros(B, 1, 1, S).masked_fill(torch.rand(B, 1, 1, S) < 0.1, -torch.inf)
    exact = attention(q.double(), k.double(), v.double(), bias.double(), scale=0.1)
    assert_close(fast_attention(q.float(), k.float(), v.float(), bias, scale=0.1).double(), exact)
    assert_close(fast_attention(q, k, v, bias.bfloat16(), scale=0.1).double(), exact, 2**-8)


@pytest.mark.parametrize("T, S", [(1, 5), (5, 5), (2, 5)])
@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_of_fast_attention(wanted, T, S):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        inputs = {"q": torch.randn(1, 4, T, 8), "k": torch.randn(1, 2, S, 8), "v": torch.randn(1, 2, S, 8)}
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        inputs[wanted].requires_grad_()
        with torch.enable_grad():
            gradients = [
                torch.autograd.grad(twin(**inputs, causal=True, scale=0.5).pow(2).sum(), inputs[wanted])[0]
                for twin in (attention, fast_attention)
            ]
        assert_close(gradients[1], gradients[0], tolerance)


def test_fast_attention_in_bfloat16_is_as_exact_as_attention():
    """Of SigLIP's kind, with scores of deviation 3."""
    q, k, v = (torch.randn(2, 4, 729, 72).bfloat16() * factor for factor in (3, 1, 1))
    exact = attention(q.double(), k.double(), v.double())
    assert relative_error(fast_attention(q, k, v), exact) <= 1.02 * relative_error(attention(q, k, v), exact)


# ------------------------------------------------------------------------------------ vision


def loud_and_faint(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs for a part that normalizes; the second's variance is 1e-5, so that the 1e-6 in a LayerNorm shows."""
    return torch.randn(shape), torch.randn(shape) * 0.003


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_siglip_and_its_layer(small_pair, hidden_act):
    """26 pixels a side hold 6 patches of 4; the last two are dropped."""
    pair, pixels = small_pair("siglip", hidden_act=hidden_act), torch.randn(2, 3, 26, 26)
    ours, theirs = pair.ours.vision.blocks[1], pair.theirs.model.vision_model.encoder.layers[1]
    for x in loud_and_faint(2, 36, 32):
        assert_close(ours(x), theirs(x, attention_mask=None))
    assert_close(pair.ours.vision(pixels), pair.theirs.model.vision_model(pixels).last_hidden_state)


@pytest.mark.parametrize("layer, window", [(0, 4), (1, 0)], ids=["windowed", "global"])
def test_sam_layer(small_pair, layer, window):
    pair = small_pair("hybrid")
    ours = pair.ours.vision.high.blocks[layer]
    theirs = pair.theirs.model.high_res_vision_model.vision_encoder.layers[layer]
    assert ours.window == theirs.window_size == window
    for x in loud_and_faint(2, 10, 10, 24):
        assert_close(ours(x), theirs(x))


def slow_sam_attention(module: SAMAttention, x: torch.Tensor) -> torch.Tensor:
    """The textbook form: all scores at once, a bias for every pair of places."""
    B, g, _, D = x.shape
    qkv = module.qkv(x).view(B, g * g, 3, module.heads, D // module.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    row, column = torch.arange(g).repeat_interleave(g), torch.arange(g).repeat(g)  # of each place
    by_row = module.rel_pos_h[row[:, None] - row + g - 1]  # (query, key, d)
    by_column = module.rel_pos_w[column[:, None] - column + g - 1]
    bias = torch.einsum("bhqd,qkd->bhqk", q, by_row) + torch.einsum("bhqd,qkd->bhqk", q, by_column)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("g", [4, 14, 17, 29], ids=str)
def test_sam_attention_and_its_gradients_equal_the_textbook_form(g):
    """Also where its scores are made a part at a time; and in bfloat16 it is no less exact."""
    module, x = randomized(SAMAttention(16, 2, grid=g)), torch.randn(1, g, g, 16)
    with torch.enable_grad():
        gradients = [
            torch.autograd.grad((form(x) * x).sum(), list(module.parameters()))
            for form in (module, lambda x: slow_sam_attention(module, x))
        ]
    exact = slow_sam_attention(module, x)
    assert_close(module(x), exact)
    for tested, expected in zip(*gradients):
        assert_close(tested, expected)
    module, x = module.bfloat16(), x.bfloat16()
    assert relative_error(module(x), exact) <= 1.05 * relative_error(slow_sam_attention(module, x), exact)


def test_sams_necks_and_the_early_features(small_pair):
    """Late features, plus alpha times those of the first global layer through a neck of their own."""
    pair, pixels = small_pair("hybrid"), torch.randn(2, 3, 80, 80)
    ours, theirs = pair.ours.vision.high, pair.theirs.model
    necks = (ours.neck, theirs.high_res_vision_model.vision_encoder.neck), (ours.neck_hd, theirs.high_res_vision_neck)
    for (our_neck, their_neck), x in itertools.product(necks, loud_and_faint(2, 10, 10, 24)):
        assert_close(our_neck(x.permute(0, 3, 1, 2)), their_neck(x))
    assert ours.hd_alpha_downsamples.item() == pytest.approx(0.7)
    assert_close(ours(pixels), theirs.get_high_res_image_features(pixels).last_hidden_state)


def test_split_normalizes_the_picture_and_its_small_copy():
    """The small copy is what PIL's antialiased bilinear filter makes of the floating point channels; all in float32."""
    tower = golden_model("vl-hybrid")[0].vision
    picture = torch.randn(1, 3, 256, 256).sigmoid().bfloat16()
    high, low = tower.split(picture)
    picture = picture.float()
    channels = [Image.fromarray(channel.numpy()).resize((96, 96), Image.Resampling.BILINEAR) for channel in picture[0]]
    small = torch.stack([torch.tensor(np.asarray(channel)) for channel in channels])[None]
    assert_close(low, (small - 0.5) / 0.5)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert_close(high, ((picture.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2))
    assert high.dtype == low.dtype == torch.float32


def test_aligners(small_pair):
    pair, (high, low) = small_pair("siglip"), torch.randn(2, 2, 36, 32)
    assert_close(pair.ours.aligner(low), pair.theirs.model.aligner(low))
    pair = small_pair("hybrid")
    expected = pair.theirs.model.aligner(vision_encodings=low, high_res_vision_encodings=high)
    assert_close(pair.ours.aligner(high, low), expected)


def tile_aligner(global_view_first: bool = True, mlp_ratio: int = 1, ratio: int = 2) -> TileAligner:
    return randomized(TileAligner(TileConfig(ratio, mlp_ratio, global_view_first), vision_width=6, language_width=10))


@pytest.mark.parametrize("mlp_ratio", [1, 3])
@pytest.mark.parametrize("side, ratio", [(3, 2), (4, 2), (7, 3), (6, 3), (7, 2)])
def test_projection_folds_squares_of_patches(side, ratio, mlp_ratio):
    """Zeros on the right and at the bottom, squares folded in the order of unfold, Linear, exact GELU, Linear."""
    aligner, x = tile_aligner(mlp_ratio=mlp_ratio, ratio=ratio), torch.randn(5, side * side, 6)
    grids = aligner.project(x)
    padded = -(-side // ratio) * ratio
    picture = torch.zeros(5, 6, padded, padded)
    picture[:, :, :side, :side] = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    folded = F.unfold(picture, ratio, stride=ratio).transpose(1, 2)
    hidden = folded @ aligner.linear1.weight.T + aligner.linear1.bias
    hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ aligner.linear2.weight.T + aligner.linear2.bias
    assert hidden.shape[-1] == 10 * mlp_ratio and grids.shape == (5, padded // ratio, padded // ratio, 10)
    assert_close(grids.flatten(1, 2), expected, 1e-6)


def laid_out(aligner: TileAligner, grids: torch.Tensor, wide: int, high: int) -> torch.Tensor:
    """An image's tokens one by one: rows of the whole, the separator, rows across all tiles."""
    s = grids.shape[1]
    whole, local = [], []
    for row in range(s):
        whole += [grids[0, row, column] for column in range(s)] + [aligner.image_newline]
    for tile_row, row in itertools.product(range(high), range(s)):
        for tile_column, column in itertools.product(range(wide), range(s)):
            local.append(grids[1 + tile_row * wide + tile_column, row, column])
        local.append(aligner.image_newline)
    first, last = (whole, local) if aligner.config.global_view_first else (local, whole)
    return torch.stack([*first, aligner.view_seperator, *last])


@pytest.mark.parametrize("global_view_first", [True, False], ids=["head", "tail"])
def test_tiles_are_laid_out_as_one_picture(global_view_first):
    """Of several images in one pass; 27 patches a side, so 210 + 1 + (14 th)(14 tw + 1) tokens an image."""
    aligner, tilings = tile_aligner(global_view_first), [(1, 1), (2, 1), (1, 3), (3, 2), (9, 1)]
    patches = [torch.randn(1 + wide * high, 27 * 27, 6) for wide, high in tilings]
    together = aligner(torch.cat(patches), torch.tensor(tilings))
    for tokens, (wide, high), own in zip(together, tilings, patches, strict=True):
        assert len(tokens) == 210 + 1 + 14 * high * (14 * wide + 1)
        assert_close(tokens, laid_out(aligner, aligner.project(own), wide, high), 1e-6)


# ------------------------------------------------------------------------------------ parts of a Llama


def llama_module(name: str, theta: float = 500.0, **options):
    """transformers' module of the small Llama, eager attention, and our config."""
    theirs = pytest.importorskip("transformers").LlamaConfig(**SMALL_LLAMA | {"rope_theta": theta})
    theirs._attn_implementation = "eager"
    sizes = {key: value for key, value in SMALL_LLAMA.items() if key != "model_type"}
    module = getattr(pytest.importorskip("transformers.models.llama.modeling_llama"), f"Llama{name}")
    return module(theirs, **options), LanguageConfig(**sizes | {"rope_theta": theta})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the smaller is near the epsilon
def test_rms_norm(scale, dtype):
    """Fused, so one rounding of the result may differ."""
    norm = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(48, eps=1e-6)
    ours = randomized(RMSNorm(48, eps=1e-6)).to(dtype)
    norm.load_state_dict(ours.state_dict())
    x = (torch.randn(2, 9, 48) * scale).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_close(ours(x), norm.to(dtype)(x), tolerance)


@pytest.mark.parametrize("theta", [500.0, 10000.0])
def test_rope(theta):
    """And as RoFormer's equation 15: pair i at position p turns by p * theta ** (-2 i / d)."""
    rotary, config = llama_module("RotaryEmbedding", theta)
    q, positions = torch.randn(2, 6, 9, 16), torch.randint(0, 16384, (2, 9))
    cos, sin = rope_angles(positions, config)
    assert cos.dtype == sin.dtype == torch.float32
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    expected, _ = llama.apply_rotary_pos_emb(q, q, *rotary(q, positions))
    assert_close(rotate(q, cos, sin), expected, 1e-6)
    angles = positions[:, None, :, None] * theta ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    turned = torch.complex(*q.double().chunk(2, -1)) * torch.exp(1j * angles)
    assert_close(rotate(q, cos, sin), torch.cat((turned.real, turned.imag), -1), 1e-3)  # float32 angles of 16,000


def test_swiglu():
    theirs, _ = llama_module("MLP")
    ours, x = SwiGLU(48, 80), torch.randn(2, 9, 48)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x), theirs(x), 1e-6)


def masks(T: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two rows the attention mask, and the bias (2, 1, T, T): a token sees itself and the real ones before it."""
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, : T // 2] = 0 if padded else 1
    visible = torch.ones(T, T, dtype=torch.bool).tril() & mask[:, None, None].bool() | torch.eye(T, dtype=torch.bool)
    return mask, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("padded", [False, True])
def test_decoder_layer(padded):
    """With grouped heads, of a width that is not hidden_size / heads."""
    theirs, config = llama_module("DecoderLayer", layer_idx=0)
    ours = DecoderLayer(config, 0)
    ours.load_state_dict(theirs.state_dict())
    x, (mask, bias) = torch.randn(2, 9, 48) * 0.01, masks(9, padded)
    rotary, _ = llama_module("RotaryEmbedding")
    positions = positions_of(mask)
    expected = theirs(x, attention_mask=bias, position_embeddings=rotary(x, positions))
    tested = ours(x, rope_angles(positions, config), bias if padded else None)
    assert_close(tested[mask.bool()], expected[mask.bool()])


# ------------------------------------------------------------------------------------ YaRN


YARNS = {
    "DeepSeek-V2": (YarnConfig(40.0, 4096, 32.0, 1.0, 0.707, 0.707), 10000.0, 64),
    "DeepSeek-V3": (YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0), 10000.0, 64),
    "defaults": (YarnConfig(4.0), 10000.0, 64),
    "two mscales": (YARN, 500.0, 8),
    "other ramp": (YarnConfig(16.0, 2048, 8.0, 2.0), 1e6, 32),
    "ramp beyond the last pair": (YarnConfig(2.0, 10**6, 32.0, 1.0), 100.0, 16),
}


@pytest.mark.parametrize("case", YARNS)
def test_yarn(case):
    yarn, theta, width = YARNS[case]
    config = replace(SMALL, yarn=yarn, rope_theta=theta, latent=replace(LATENT, qk_rope_head_dim=width))
    theirs = transformers_module("V2", "RotaryEmbedding", config)
    plain = theta ** (-torch.arange(0, width, 2) / width)
    assert_close(yarn_frequencies(plain, config), theirs.inv_freq, 1e-6)
    length = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    assert length == pytest.approx(theirs.attention_scaling)
    position = torch.tensor([[1]])
    expected = theirs(plain, position)[:, None]  # complex numbers
    for part, theirs_part in zip(rope_angles(position, config), (expected.real, expected.imag)):
        assert_close(part, theirs_part)


# ------------------------------------------------------------------------------------ latent attention

HEADS = {
    "small's shape": {},
    "latent queries": {"q_lora_rank": 20},
    "values wider than keys": {"v_head_dim": 40},
}
every_head = pytest.mark.parametrize("heads", HEADS)


def latent_config(heads: str, yarn: bool = False, **changes) -> LanguageConfig:
    return replace(SMALL, latent=replace(LATENT, **HEADS[heads]), yarn=YARN if yarn else None, **changes)


def latent_pair(version: str, config: LanguageConfig, seed: int = 0) -> tuple:
    ours, theirs = randomized(LatentAttention(config), seed), transformers_module(version, "Attention", config, 0)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@every_head
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latent_attention_and_its_weights(version, heads, yarn, padded):
    """V2 turns pairs side by side, V3 reorders them first; the scores are the same."""
    config = latent_config(heads, yarn)
    ours, theirs = latent_pair(version, config)
    x, (mask, bias) = torch.randn(2, 9, 32), masks(9, padded)
    positions = positions_of(mask)
    their_rope = transformers_module(version, "RotaryEmbedding", config)(x, positions)
    expected, expected_weights = theirs(x, attention_mask=bias, position_embeddings=their_rope)
    inputs = x, rope_angles(positions, config), bias if padded else None
    assert_close(ours(*inputs), expected)
    with record(ours) as seen:
        assert_close(ours(*inputs), expected)
    (weights,) = seen.values()
    assert_close(weights, expected_weights)


@every_head
def test_norms_of_the_latents_have_an_epsilon_of_their_own_and_gradients_are_right(heads):
    """1e-6 whatever rms_norm_eps says, as in the original. Inputs are faint, so that it shows."""
    config = latent_config(heads, rms_norm_eps=1e-3)
    ours, theirs = latent_pair("V3", config)
    x, positions, bias = torch.randn(2, 9, 32) * 0.01, torch.arange(9)[None], masks(9, False)[1]
    their_rope = transformers_module("V3", "RotaryEmbedding", config)(x, positions)
    with torch.enable_grad():
        expected, _ = theirs(x, attention_mask=bias, position_embeddings=their_rope)
        tested = ours(x, rope_angles(positions, config))
        assert_close(tested, expected)
        (tested.square().sum() * 1e4 + expected.square().sum() * 1e4).backward()
    for name, parameter in theirs.named_parameters():
        assert_close(dict(ours.named_parameters())[name].grad, parameter.grad)


@every_head
def test_absorbed_equals_expanded(heads):
    module, s = randomized(LatentAttention(latent_config(heads))), replace(LATENT, **HEADS[heads])
    for T, S, padded in itertools.product((1, 3, 9), (9,), (False, True)):
        q_nope, q_rope, stored = torch.randn(2, 4, T, 16), torch.randn(2, 4, T, 8), torch.randn(2, 1, S, 24 + 8)
        bias = masks(S, True)[1][:, :, -T:] if padded else None
        with torch.enable_grad():
            ways = [way(q_nope, q_rope, stored, bias) for way in (module.absorbed, module.expanded)]
            gradients = [torch.autograd.grad(way.square().sum(), module.kv_b_proj.weight)[0] for way in ways]
        assert ways[0].shape == (2, 4, T, s.v_head_dim)
        assert_close(*ways, 1e-6)
        assert_close(*gradients)


@pytest.mark.parametrize("padded", [False, True])
@every_head
def test_latent_attention_in_pieces_equals_one_pass_and_caches_what_transformers_does(heads, padded):
    """The normalized latent and the rotated key, which transformers keeps as "keys" and "values"."""
    cache_utils = pytest.importorskip("transformers.cache_utils")
    config = replace(latent_config(heads), num_hidden_layers=1)
    (ours, theirs), x, (mask, bias) = latent_pair("V3", config), torch.randn(2, 60, 32), masks(60, padded)
    positions, their_cache = positions_of(mask), cache_utils.DynamicCache()
    their_rope = transformers_module("V3", "RotaryEmbedding", config)(x, positions)
    expected, _ = theirs(x, their_rope, bias, past_key_values=their_cache)
    cache, rope = KVCache(config, 2, 60, torch.float32, "cpu"), rope_angles(positions, config)
    for size in (40, 1, 1, 7, 10, 1):
        piece = slice(cache.length, cache.length + size)
        cache.reserve(2, size, mask[:, piece].bool())
        seen = bias[:, :, piece, : piece.stop] if padded else None
        tested = ours(x[:, piece], [part[:, :, piece] for part in rope], seen, cache.layers[0])
        assert_close(tested, expected[:, piece])
        cache.length += size
    (stored,), their_layer = cache.layers[0].tensors, their_cache.layers[0]
    assert_close(stored, torch.cat((their_layer.keys, their_layer.values), dim=-1), 1e-5)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_bfloat16_error_of_latent_attention(version):
    """Of a prompt (expanded) and of its last token (absorbed), against float32 with the same weights."""
    positions, (_, bias), errors = torch.arange(40)[None], masks(40, False), torch.zeros(3)
    their_rope = transformers_module(version, "RotaryEmbedding", SMALL)
    for seed in range(8):
        ours, theirs = latent_pair(version, SMALL, seed)
        ours, theirs, x = ours.bfloat16(), theirs.bfloat16(), torch.randn(2, 40, 32).bfloat16()
        rope = rope_angles(positions, SMALL)
        half = [part.bfloat16() for part in rope]
        whole = ours(x, half)
        reference, _ = theirs(x, attention_mask=bias.bfloat16(), position_embeddings=their_rope(x, positions))
        cache = KVCache(SMALL, 2, 40, torch.bfloat16, "cpu")
        for piece in (slice(0, 39), slice(39, 40)):
            cache.reserve(2, piece.stop - piece.start, None)
            step = ours(x[:, piece], [part[:, :, piece] for part in half], None, cache.layers[0])
            cache.length = piece.stop
        exact = ours.float()(x.float(), rope)
        pairs = (whole, exact), (step, exact[:, 39:]), (reference, exact)
        errors += torch.tensor([relative_error(*pair) for pair in pairs])
    assert errors[:2].max() <= 1.2 * errors[2], errors


# ------------------------------------------------------------------------------------ routing and experts

ROUTINGS = {
    "tiny and small": {},
    "base": SIGMOID,
    "normalized": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "sigmoid without a bias": {"scoring_func": "sigmoid"},
    "groups": GROUP_LIMITED,
    "groups of sigmoids": {**GROUP_LIMITED, "scoring_func": "sigmoid", "norm_topk_prob": True},
    "bias and groups": {**SIGMOID, **GROUPS},
    "bias and groups of softmax": {**SIGMOID, **GROUPS, "scoring_func": "softmax", "norm_topk_prob": False},
    "groups of one": {**SIGMOID, "n_group": 8, "topk_group": 6},
    "one expert a token, which is not normalized": {**SIGMOID, "num_experts_per_tok": 1},
}
THEIR_ROUTINGS = {"tiny and small": "V2", "groups": "V2", "base": "V3", "bias and groups": "V3"}  # what they have
every_routing = pytest.mark.parametrize("routing", ROUTINGS)
their_routings = pytest.mark.parametrize("routing", THEIR_ROUTINGS)


def route(router: Router, x: torch.Tensor) -> list[dict[int, float]]:
    """For each token its experts and their weights, from the definitions, one token at a time."""
    c, choices = router.config, []
    for token in x.double():
        logits = (router.weight.double() @ token).tolist()
        total = sum(math.exp(logit) for logit in logits)
        if c.scoring_func == "softmax":
            scores = [math.exp(logit) / total for logit in logits]
        else:
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        preference = list(scores)
        if c.topk_method == "noaux_tc":
            preference = [score + bias for score, bias in zip(scores, router.e_score_correction_bias.tolist())]
        if c.topk_method != "greedy":
            best, size = 2 if c.topk_method == "noaux_tc" else 1, len(scores) // c.n_group
            groups = [preference[start : start + size] for start in range(0, len(scores), size)]
            goodness = [sum(sorted(group)[-best:]) for group in groups]
            kept = sorted(range(c.n_group), key=goodness.__getitem__)[-c.topk_group :]
            preference = [value if e // size in kept else 0.0 for e, value in enumerate(preference)]  # zero, not never
        chosen = sorted(range(len(scores)), key=preference.__getitem__)[-c.num_experts_per_tok :]
        several = c.norm_topk_prob and c.num_experts_per_tok > 1
        divisor = sum(scores[e] for e in chosen) if several else 1.0
        choices.append({e: scores[e] / divisor * c.routed_scaling_factor for e in chosen})
    return choices


def dense(experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Chosen experts and their weights (tokens, k) as one row of 8 weights a token."""
    return torch.zeros(len(experts), 8).scatter(1, experts, weights.float())


@pytest.mark.parametrize("bias", [0.0, -3.0])  # the lower one makes preferences negative, so that 0 beats them
@every_routing
def test_router_equals_the_definitions(routing, bias):
    router, x = randomized(Router(with_experts(**ROUTINGS[routing]))), torch.randn(50, 32)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias += bias
    experts, weights = router(x)
    expected = torch.zeros(50, 8)
    for token, choice in enumerate(route(router, x)):
        expected[token, list(choice)] = torch.tensor(list(choice.values()))
    assert torch.equal(dense(experts, weights) > 0, expected > 0)
    assert_close(dense(experts, weights), expected, 1e-6)
    router, x = router.bfloat16(), x.bfloat16()  # it works in float32 whatever it is given
    for tested, exact in zip(router(x), router.float()(x.float())):
        assert tested.dtype == exact.dtype and torch.equal(tested, exact)


def slow_mixture(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """shared(x) + sum of weight_e * expert_e(x), a token and an expert at a time, in float64."""

    def mlp(part: torch.nn.Module, token: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(part, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        hidden = gate @ token
        return down @ (hidden * torch.sigmoid(hidden) * (up @ token))

    tokens = x.flatten(0, 1).double()
    out = torch.stack([mlp(moe.shared_experts, token) for token in tokens])
    for row, choice in enumerate(route(moe.gate, tokens)):
        for expert, weight in choice.items():
            out[row] += weight * mlp(moe.experts[expert], tokens[row])
    return out.view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_routing
def test_mixture_of_experts_equals_a_loop_over_tokens_and_experts(routing, dtype):
    """Of a prompt, and of one token alone."""
    moe, x = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))).to(dtype), torch.randn(2, 9, 32).to(dtype)
    expected, tolerance = slow_mixture(moe, x), {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    assert_close(moe(x).double(), expected, tolerance)
    assert_close(moe(x[1:, 4:5]).double(), expected[1:, 4:5], tolerance)
    assert moe(x).dtype == dtype


def mixture_pair(routing: str) -> tuple[MixtureOfExperts, torch.nn.Module]:
    """Ours, and transformers' with the same weights: it stacks those of all experts, gate above up."""
    config, version = with_experts(**ROUTINGS[routing]), THEIR_ROUTINGS[routing]
    ours = randomized(MixtureOfExperts(config))
    theirs = transformers_module(version, {"V2": "Moe", "V3": "MoE"}[version], config)
    weights = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("experts.")}
    both = [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in ours.experts]
    weights["experts.gate_up_proj"] = torch.stack(both)
    weights["experts.down_proj"] = torch.stack([expert.down_proj.weight for expert in ours.experts])
    theirs.load_state_dict(weights)
    return ours, theirs


@their_routings
def test_mixture_of_experts_and_its_gradients(routing):
    ours, theirs = mixture_pair(routing)
    results, x = [], torch.randn(2, 9, 32)
    _, weights, experts = theirs.gate(x.flatten(0, 1))
    assert_close(dense(*ours.gate(x.flatten(0, 1))), dense(experts, weights), 1e-6)
    for moe in (ours, theirs):
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            out = moe(given)
            out.square().sum().backward()
        results.append((out, given.grad, moe.gate.weight.grad, moe.shared_experts.up_proj.weight.grad))
    for tested, expected in zip(*results):
        assert_close(tested, expected)
    down = [expert.down_proj.weight for expert in ours.experts]
    zero = torch.zeros_like(down[0])  # of an expert that no token chose
    grads = torch.stack([zero if weight.grad is None else weight.grad for weight in down])
    assert_close(grads, theirs.experts.down_proj.grad)
