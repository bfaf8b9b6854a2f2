"""Against transformers run live, and where it has no such part, against the equations written out slowly.

First whole models, then what those cannot tell, in the order of vision.py and model.py. A pair of small models,
`small_pair(kind)`, is one random checkpoint, written by transformers and read by `load_model`. Relative errors are at
most 1e-5 in float32 unless a test says otherwise; in bfloat16 at most 1.2 times transformers' own, a mean over models.
"""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN, KINDS, VOCABULARY, assert_close, encode_images, inside, random_batch, relative_error
from small_vl2 import GROUP_LIMITED, GROUPS, LATENT, SIGMOID, SMALL, YARN, randomized, transformers_module, with_experts

from load_weights import load_model, pack
from model import DeepseekVL, KVCache, LatentAttention, MixtureOfExperts, YarnConfig, record, rope_angles, rotate
from vision import SAMAttention, TileAligner, TileConfig, attention, fast_attention

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
    for logits in (ours.logits, pair.ours(**batch).logits):
        assert_close(logits[real], theirs.logits[real])
    for tested, expected in zip(hidden_states, theirs.hidden_states, strict=True):
        assert_close(tested[real], expected[real])
    for tested, expected in zip(attentions, theirs.attentions, strict=True):
        assert_close(tested.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@both_kinds
@pytest.mark.parametrize("tie", [False, True], ids=["separate head", "tied head"])
def test_loss_and_every_gradient(small_pair, kind, tie, tmp_path):
    """transformers' gradients are saved as if they were weights, and loaded as our parameters."""
    pair, batch = small_pair(kind, tie=tie), random_batch(kind)
    theirs, ours = copy.deepcopy(pair.theirs), load_model(pair.folder)
    first_or_padding = batch["attention_mask"].cumsum(dim=-1) <= 1
    labels = batch["input_ids"].masked_fill(first_or_padding | (batch["input_ids"] == IMAGE_TOKEN), -100)
    with torch.enable_grad():
        loss, expected_loss = ours(**batch, labels=labels).loss, run_theirs(theirs, batch, labels=labels).loss
        loss.backward()
        expected_loss.backward()
    assert_close(loss, expected_loss, 1e-6)
    for name, parameter in theirs.named_parameters():
        pooling_head = ".vision_model.head." in name  # which takes no part
        parameter.copy_(0 if pooling_head else parameter.grad)
    theirs.save_pretrained(tmp_path)
    expected = dict(load_model(tmp_path).named_parameters())
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
    inputs = {"input_ids": ids, "position_ids": torch.randint(0, 200, (2, 9))}
    assert_close(pair.ours(**inputs).logits, pair.theirs(**inputs).logits)


SAM_LAYERS = "model.high_res_vision_model.vision_encoder.layers"
PARTS = {  # the kind of model, the module in ours and in transformers', its input's shape
    "SigLIP layer": ("siglip", "vision.blocks.1", "model.vision_model.encoder.layers.1", (2, 36, 32)),
    "SAM layer with windows": ("hybrid", "vision.high.blocks.0", f"{SAM_LAYERS}.0", (2, 10, 10, 24)),
    "SAM layer without": ("hybrid", "vision.high.blocks.1", f"{SAM_LAYERS}.1", (2, 10, 10, 24)),
    "SAM neck": ("hybrid", "vision.high.neck", SAM_LAYERS.replace("layers", "neck"), (2, 10, 10, 24)),
    "SAM early neck": ("hybrid", "vision.high.neck_hd", "model.high_res_vision_neck", (2, 10, 10, 24)),
    "RMSNorm": ("siglip", "language.norm", "model.language_model.norm", (2, 9, 48)),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("deviation", [1, 0.003], ids=["loud", "faint"])
def test_epsilons_of_the_norms(small_pair, part, deviation):
    """A faint input has a variance of 1e-5, so that the 1e-6 in a norm shows."""
    kind, our_path, their_path, shape = PARTS[part]
    pair, x = small_pair(kind), torch.randn(shape) * deviation
    ours, theirs = pair.ours.get_submodule(our_path), pair.theirs.get_submodule(their_path)
    options = {"attention_mask": None} if part == "SigLIP layer" else {}
    assert_close(ours(x.permute(0, 3, 1, 2) if "neck" in part else x), theirs(x, **options))


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
    for G, width, scale in itertools.product((1, 2, 6), (4, 12), (None, 0.7)):
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


@pytest.mark.parametrize("B, H, G, S", [(1, 8, 2, 9000), (1, 4, 1, 20000), (2, 7, 7, 2100)])
def test_one_query_of_a_long_text(B, H, G, S):
    """As a decode step has it, of any number of heads; only the result is rounded to bfloat16."""
    q, k, v = (torch.randn(B, *shape).bfloat16() for shape in ((H, 1, 128), (G, S, 128), (G, S, 128)))
    bias = torch.zeros(B, 1, 1, S).masked_fill(torch.rand(B, 1, 1, S) < 0.1, -torch.inf)
    exact = attention(q.double(), k.double(), v.double(), bias.double(), scale=0.1)
    assert_close(fast_attention(q.float(), k.float(), v.float(), bias, scale=0.1).double(), exact)
    assert_close(fast_attention(q, k, v, bias.bfloat16(), scale=0.1).double(), exact, 2**-8)


# ------------------------------------------------------------------------------------ vision


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


@pytest.mark.parametrize("g", [4, 14, 29], ids=str)
def test_sam_attention_equals_the_textbook_form(g):
    """Also where its scores are made a part at a time; and in bfloat16 it is no less exact."""
    module, x = randomized(SAMAttention(16, 2, grid=g)), torch.randn(1, g, g, 16)
    exact = slow_sam_attention(module, x)
    assert_close(module(x), exact)
    module, x = module.bfloat16(), x.bfloat16()
    assert relative_error(module(x), exact) <= 1.05 * relative_error(slow_sam_attention(module, x), exact)


def textbook_tiles(aligner: TileAligner, x: torch.Tensor, wide: int, high: int) -> torch.Tensor:
    """An image's tokens one by one: rows of the whole, the separator, rows across all tiles.

    Each token is a square of patches, with zeros on the right and at the bottom, folded in the order of unfold;
    then Linear, exact GELU, Linear.
    """
    side, ratio = math.isqrt(x.shape[1]), aligner.config.downsample_ratio
    s = -(-side // ratio)
    picture = torch.zeros(len(x), x.shape[2], s * ratio, s * ratio)
    picture[:, :, :side, :side] = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    hidden = F.unfold(picture, ratio, stride=ratio).transpose(1, 2) @ aligner.linear1.weight.T + aligner.linear1.bias
    hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
    grids = (hidden @ aligner.linear2.weight.T + aligner.linear2.bias).unflatten(1, (s, s))
    whole, local = [], []
    for row in range(s):
        whole += [*grids[0, row], aligner.image_newline]
    for tile_row, row in itertools.product(range(high), range(s)):
        local += [token for tile in range(wide) for token in grids[1 + tile_row * wide + tile, row]]
        local.append(aligner.image_newline)
    first, last = (whole, local) if aligner.config.global_view_first else (local, whole)
    return torch.stack([*first, aligner.view_seperator, *last])


@pytest.mark.parametrize("global_view_first", [True, False], ids=["head", "tail"])
@pytest.mark.parametrize("side, ratio, mlp_ratio", [(27, 2, 1), (3, 2, 3), (4, 2, 1), (7, 3, 1), (6, 3, 3)])
def test_tiles_are_laid_out_as_one_picture(side, ratio, mlp_ratio, global_view_first):
    """Of several images in one pass; 27 patches a side make 210 + 1 + (14 th)(14 tw + 1) tokens an image."""
    aligner = randomized(TileAligner(TileConfig(ratio, mlp_ratio, global_view_first), 6, 10))
    tilings = [(1, 1), (2, 1), (1, 3), (3, 2), (9, 1)]
    patches = [torch.randn(1 + wide * high, side**2, 6) for wide, high in tilings]
    together = aligner(torch.cat(patches), torch.tensor(tilings))
    assert aligner.linear1.out_features == 10 * mlp_ratio
    for tokens, (wide, high), own in zip(together, tilings, patches, strict=True):
        assert side != 27 or len(tokens) == 210 + 1 + 14 * high * (14 * wide + 1)
        assert_close(tokens, textbook_tiles(aligner, own, wide, high), 1e-6)


# ------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("theta", [500.0, 10000.0])
def test_rope(theta):
    """RoFormer's equation 15: pair i at position p turns by p * theta ** (-2 i / d)."""
    config = replace(SMALL, latent=None, head_dim=16, rope_theta=theta)
    q, positions = torch.randn(2, 6, 9, 16), torch.randint(0, 16384, (2, 9))
    cos, sin = rope_angles(positions, config)
    assert cos.dtype == sin.dtype == torch.float32
    angles = positions[:, None, :, None] * theta ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    turned = torch.complex(*q.double().chunk(2, -1)) * torch.exp(1j * angles)
    assert_close(rotate(q, cos, sin), torch.cat((turned.real, turned.imag), -1), 1e-3)  # float32 angles of 16,000


YARNS = {
    "DeepSeek-V2": (YarnConfig(40.0, 4096, 32.0, 1.0, 0.707, 0.707), 10000.0, 64),
    "DeepSeek-V3": (YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0), 10000.0, 64),
    "defaults": (YarnConfig(4.0), 10000.0, 64),
    "two mscales": (YARN, 500.0, 8),
    "other ramp": (YarnConfig(16.0, 2048, 8.0, 2.0), 1e6, 32),
    "ramp beyond the last pair": (YarnConfig(2.0, 10**6, 32.0, 1.0), 100.0, 16),
}


@pytest.mark.parametrize("yarn, theta, width", YARNS.values(), ids=YARNS)
def test_yarn(yarn, theta, width):
    config = replace(SMALL, yarn=yarn, rope_theta=theta, latent=replace(LATENT, qk_rope_head_dim=width))
    theirs = transformers_module("V2", "RotaryEmbedding", config)
    position = torch.tensor([[1]])  # where the sines of slow rotations are their frequencies
    expected = theirs(torch.empty(0), position)[:, None]  # complex numbers
    for part, theirs_part in zip(rope_angles(position, config), (expected.real, expected.imag)):
        torch.testing.assert_close(part, theirs_part, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ latent attention

HEADS = {"small's shape": {}, "latent queries": {"q_lora_rank": 20}, "values wider than keys": {"v_head_dim": 40}}
every_head = pytest.mark.parametrize("heads", HEADS)


def latent_pair(version: str, heads: str, yarn: bool = False, padded: bool = False, T: int = 9) -> tuple:
    """The config; ours; transformers', given x and options; rope; the mask, and the bias that says it (2, 1, T, T)."""
    latent = replace(LATENT, **HEADS[heads])
    config = replace(SMALL, latent=latent, yarn=YARN if yarn else None, num_hidden_layers=1, rms_norm_eps=1e-3)
    ours, theirs = randomized(LatentAttention(config)), transformers_module(version, "Attention", config, 0)
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, : T // 2] = 0 if padded else 1
    visible = torch.ones(T, T, dtype=torch.bool).tril() & mask[:, None, None].bool() | torch.eye(T, dtype=torch.bool)
    bias, positions = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf), positions_of(mask)
    rope = transformers_module(version, "RotaryEmbedding", config)(torch.empty(2, T, 32), positions)

    def run_theirs(x: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return theirs(x, attention_mask=bias, position_embeddings=rope, **options)

    run_theirs.module = theirs
    return config, ours, run_theirs, rope_angles(positions, config), mask, bias if padded else None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@every_head
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latent_attention_its_weights_and_its_gradients(version, heads, yarn, padded):
    """V2 turns pairs side by side, V3 reorders them first; the scores are the same.

    The norms of the latents have an epsilon of 1e-6 whatever rms_norm_eps says. A faint input shows it.
    """
    _, ours, theirs, rope, _, bias = latent_pair(version, heads, yarn, padded)
    for x in (torch.randn(2, 9, 32), torch.randn(2, 9, 32) * 0.01):
        expected, expected_weights = theirs(x)
        with record(ours) as seen:
            assert_close(ours(x, rope, bias), expected)
        (weights,) = seen.values()
        assert_close(weights, expected_weights)
        with torch.enable_grad():
            tested, expected = ours(x, rope, bias), theirs(x)[0]
            assert_close(tested, expected)
            (tested.square().sum() * 1e4 + expected.square().sum() * 1e4).backward()
        for name, parameter in theirs.module.named_parameters():
            assert_close(dict(ours.named_parameters())[name].grad, parameter.grad)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@every_head
def test_latent_attention_in_pieces_equals_one_pass_and_caches_what_transformers_does(heads, padded, dtype, tolerance):
    """The normalized latent and the rotated key, which transformers keeps as "keys" and "values"."""
    their_cache = pytest.importorskip("transformers.cache_utils").DynamicCache()
    config, ours, theirs, rope, mask, bias = latent_pair("V3", heads, padded=padded, T=60)
    x, cache = torch.randn(2, 60, 32).to(dtype), KVCache(config, 2, 60, dtype, "cpu")
    theirs.module.load_state_dict(ours.to(dtype).state_dict())
    expected, _ = theirs(x.float(), past_key_values=their_cache)
    for size in (40, 1, 1, 7, 10, 1):
        piece = slice(cache.length, cache.length + size)
        cache.reserve(2, size, mask[:, piece].bool())
        seen = bias[:, :, piece, : piece.stop].to(dtype) if padded else None
        tested = ours(x[:, piece], [part[:, :, piece].to(dtype) for part in rope], seen, cache.layers[0])
        assert_close(tested, expected[:, piece], tolerance)
        cache.length += size
    (stored,), their_layer = cache.layers[0].tensors, their_cache.layers[0]
    assert_close(stored, torch.cat((their_layer.keys, their_layer.values), dim=-1), tolerance)


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


def route(moe: MixtureOfExperts, token: torch.Tensor) -> dict[int, float]:
    """A token's experts and their weights, from the definitions."""
    router, c = moe.gate, moe.gate.config
    logits = (router.weight.double() @ token).tolist()
    total = sum(math.exp(logit) for logit in logits)
    softmax = c.scoring_func == "softmax"
    scores = [math.exp(logit) / total if softmax else 1 / (1 + math.exp(-logit)) for logit in logits]
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
    return {e: scores[e] / divisor * c.routed_scaling_factor for e in chosen}


def slow_mixture(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """shared(x) + sum of weight_e * expert_e(x), a token and an expert at a time, in float64."""

    def mlp(part: torch.nn.Module, token: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(part, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
        hidden = gate @ token
        return down @ (hidden * torch.sigmoid(hidden) * (up @ token))

    def mixed(token: torch.Tensor) -> torch.Tensor:
        routed = [weight * mlp(moe.experts[expert], token) for expert, weight in route(moe, token).items()]
        return mlp(moe.shared_experts, token) + sum(routed)

    return torch.stack([mixed(token) for token in x.flatten(0, 1).double()]).view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [0.0, -3.0])  # the lower one makes preferences negative, so that 0 beats them
@pytest.mark.parametrize("routing", ROUTINGS)
def test_mixture_of_experts_equals_a_loop_over_tokens_and_experts(routing, bias, dtype):
    """Of a prompt, and of one token alone. The router works in float32 whatever it is given."""
    moe, x = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))).to(dtype), torch.randn(2, 25, 32).to(dtype)
    if hasattr(moe.gate, "e_score_correction_bias"):
        moe.gate.e_score_correction_bias += bias
    expected, tolerance = slow_mixture(moe, x), {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    assert_close(moe(x).double(), expected, tolerance)
    assert_close(moe(x[1:, 4:5]).double(), expected[1:, 4:5], tolerance)
    assert moe(x).dtype == dtype
