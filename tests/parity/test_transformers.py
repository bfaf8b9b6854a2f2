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
from model import DeepseekVL, LatentAttention, MixtureOfExperts, YarnConfig, record, rope_angles, rotate
from vision import TileAligner, TileConfig, attention, fast_attention

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
        (loss + expected_loss).backward()
    assert_close(loss, expected_loss, 1e-6)
    for name, parameter in theirs.named_parameters():
        pooling_head = ".vision_model.head." in name  # which takes no part
        parameter.copy_(0 if pooling_head else parameter.grad)
    theirs.save_pretrained(tmp_path)
    expected = dict(load_model(tmp_path).named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert_close(parameter.grad, expected[name], 1e-4)


def quantities(model, batch) -> list[torch.Tensor]:
    """Image features, logits, and those of the last token fed alone after all others, of our model or transformers'."""
    start = {name: value[:, :-1] if value.dim() == 2 else value for name, value in batch.items()}
    output, last = model(**batch), batch["input_ids"][:, -1:]
    if isinstance(model, DeepseekVL):
        features, cache = torch.cat(encode_images(model, batch)), model.new_cache(*batch["input_ids"].shape)
        model(**start, cache=cache)
        return [features, output.logits, model(input_ids=last, cache=cache).logits]
    features = output.image_hidden_states.flatten(0, -2)  # 5.23 drops the batch dimension
    cache = model(**start, use_cache=True).past_key_values
    return [features, output.logits, model(input_ids=last, past_key_values=cache).logits]


@both_kinds
def test_bfloat16_error_is_that_of_transformers(small_pair, kind):
    """Packed too, which changes a model where this CPU has kernels."""
    errors = torch.zeros(3, 3)  # of ours, ours packed and theirs; each of `quantities`
    for seed in range(5):
        pair, batch = small_pair(kind, seed=seed), random_batch(kind, (54, 54), seed=seed)
        half = {name: value.bfloat16() if "pixel_values" in name else value for name, value in batch.items()}
        ours, packed = (load_model(pair.folder, dtype=torch.bfloat16) for _ in range(2))
        theirs, exact = (
            type(pair.theirs).from_pretrained(pair.folder, dtype=torch.bfloat16),
            quantities(pair.theirs, batch),
        )
        for row, model in zip(errors, (ours, pack(packed), theirs)):
            row += torch.tensor([relative_error(*values) for values in zip(quantities(model, half), exact)])
    assert (errors[:2] <= 1.2 * errors[2]).all(), errors


def test_given_positions(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    inputs = {"input_ids": ids, "position_ids": torch.randint(0, 200, (2, 9))}
    assert_close(pair.ours(**inputs).logits, pair.theirs(**inputs).logits)


SAM_LAYERS = "model.high_res_vision_model.vision_encoder.layers"


@pytest.mark.parametrize(
    "kind, our_path, their_path, shape",
    [
        ("siglip", "vision.blocks.1", "model.vision_model.encoder.layers.1", (2, 36, 32)),
        ("hybrid", "vision.high.blocks.0", f"{SAM_LAYERS}.0", (2, 10, 10, 24)),
        ("hybrid", "vision.high.blocks.1", f"{SAM_LAYERS}.1", (2, 10, 10, 24)),
        ("hybrid", "vision.high.neck", SAM_LAYERS.replace("layers", "neck"), (2, 10, 10, 24)),
        ("hybrid", "vision.high.neck_hd", "model.high_res_vision_neck", (2, 10, 10, 24)),
        ("siglip", "language.norm", "model.language_model.norm", (2, 9, 48)),
    ],
)
def test_epsilons_of_the_norms(small_pair, kind, our_path, their_path, shape):
    """A faint input has a variance of 1e-5, so that the 1e-6 in a norm shows."""
    pair, x = small_pair(kind), torch.randn(shape) * 0.003
    ours, theirs = pair.ours.get_submodule(our_path), pair.theirs.get_submodule(their_path)
    options = {"attention_mask": None} if our_path == "vision.blocks.1" else {}
    assert_close(ours(x.permute(0, 3, 1, 2) if "neck" in our_path else x), theirs(x, **options))


# ------------------------------------------------------------------------------------ attention and its fast twin

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.002}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["all", "causal", "bias"])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 7), (2, 7)])
def test_attention_and_fast_attention_equal_the_equation_in_float64(T, S, kind, dtype):
    """softmax(q k^T * scale + bias) v, where consecutive query heads share a key/value head."""
    for G, width, scale in itertools.product((1, 2, 6), (4, 12), (None, 0.7)):
        q, k, v = (torch.randn(2, *shape).to(dtype) for shape in ((6, T, 8), (G, S, 8), (G, S, width)))
        bias, options = torch.zeros(2, 1, T, S, dtype=dtype), {}
        if kind == "causal":
            bias.masked_fill_(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)
            options = {"causal": True}
        elif kind == "bias":
            bias.normal_()[1, :, :, : S // 2] = -torch.inf
            options = {"bias": bias}
        keys, values = (x.double().repeat_interleave(6 // G, dim=1) for x in (k, v))
        scores = q.double() @ keys.transpose(2, 3) * (8**-0.5 if scale is None else scale)
        expected = (scores + bias).softmax(-1) @ values
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
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        assert_close(fast_attention(*(x.to(dtype) for x in (q, k, v, bias)), scale=0.1).double(), exact, tolerance)


# ------------------------------------------------------------------------------------ vision


def test_sam_attention_a_few_rows_at_a_time(small_pair):
    """Of so many windows that a block does not hold all scores; in bfloat16 it is no less exact than transformers'."""
    pair, windows = small_pair("hybrid"), torch.randn(400, 10, 10, 24)
    ours = copy.deepcopy(pair.ours.vision.high.blocks[1].attn)
    theirs = copy.deepcopy(pair.theirs.get_submodule(f"{SAM_LAYERS}.1.attn"))
    exact, _ = theirs(windows)
    assert_close(ours(windows), exact)
    half, (their_half, _) = ours.bfloat16()(windows.bfloat16()), theirs.bfloat16()(windows.bfloat16())
    assert relative_error(half, exact) <= 1.05 * relative_error(their_half, exact)


def textbook_tiles(aligner: TileAligner, x: torch.Tensor, wide: int, high: int) -> torch.Tensor:
    """An image's tokens: rows of the whole, the separator, rows across all tiles; or the whole last.

    Each token is a square of patches, with zeros on the right and at the bottom, folded in the order of unfold.
    """
    side, ratio, newline = math.isqrt(x.shape[1]), aligner.config.downsample_ratio, aligner.image_newline[None]
    s = -(-side // ratio)
    picture = torch.zeros(len(x), x.shape[2], s * ratio, s * ratio)
    picture[:, :, :side, :side] = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    folded = F.unfold(picture, ratio, stride=ratio).transpose(1, 2)
    grids = aligner.linear2(F.gelu(aligner.linear1(folded))).unflatten(1, (s, s))
    across = grids[1:].unflatten(0, (high, wide)).transpose(1, 2).flatten(0, 1)  # (rows, wide, s, D)
    whole = [torch.cat((row, newline)) for row in grids[0]]
    local = [torch.cat((*row, newline)) for row in across]
    first, last = (whole, local) if aligner.config.global_view_first else (local, whole)
    return torch.cat((*first, aligner.view_seperator[None], *last))


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


def test_rope():
    """RoFormer's equation 15: pair i at position p turns by p * theta ** (-2 i / d); in float32 up to 16,000."""
    q, positions = torch.randn(2, 6, 9, 16), torch.randint(0, 16384, (2, 9))
    cos, sin = rope_angles(positions, replace(SMALL, latent=None, head_dim=16, rope_theta=500.0))
    assert cos.dtype == sin.dtype == torch.float32
    angles = positions[:, None, :, None] * 500.0 ** (-2 * torch.arange(8, dtype=torch.float64) / 16)
    turned = torch.complex(*q.double().chunk(2, -1)) * torch.exp(1j * angles)
    assert_close(rotate(q, cos, sin), torch.cat((turned.real, turned.imag), -1), 1e-3)


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
    position = torch.tensor([[1]])  # where the sines of slow rotations are their frequencies
    expected = transformers_module("V2", "RotaryEmbedding", config)(torch.empty(0), position)[:, None]  # complex
    for part, their_part in zip(rope_angles(position, config), (expected.real, expected.imag)):
        torch.testing.assert_close(part, their_part, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------ latent attention

HEADS = {"small's shape": {}, "latent queries": {"q_lora_rank": 20}, "values wider than keys": {"v_head_dim": 40}}


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "padded"])
@pytest.mark.parametrize("yarn", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latent_attention_its_weights_and_its_gradients(version, heads, yarn, padded):
    """V2 turns pairs side by side, V3 reorders them first; the scores are the same.

    The norms of the latents have an epsilon of 1e-6 whatever rms_norm_eps says. A faint input shows it.
    """
    latent = replace(LATENT, **HEADS[heads])
    config = replace(SMALL, latent=latent, yarn=yarn, num_hidden_layers=1, rms_norm_eps=1e-3)
    ours, theirs = randomized(LatentAttention(config)), transformers_module(version, "Attention", config, 0)
    theirs.load_state_dict(ours.state_dict())
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0 if padded else 1
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & mask[:, None, None].bool() | torch.eye(9, dtype=torch.bool)
    bias, positions = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf), positions_of(mask)
    rope = transformers_module(version, "RotaryEmbedding", config)(torch.empty(2, 9, 32), positions)
    inputs = rope_angles(positions, config), bias if padded else None
    for x in (torch.randn(2, 9, 32), torch.randn(2, 9, 32) * 0.01):
        with record(ours) as seen:
            recorded = ours(x, *inputs)
        with torch.enable_grad():
            tested, (expected, weights) = ours(x, *inputs), theirs(x, attention_mask=bias, position_embeddings=rope)
            ((tested.square().sum() + expected.square().sum()) * 1e4).backward()
        assert_close(recorded, expected)
        assert_close(tested, expected)
        assert_close(*seen.values(), weights)
        for name, parameter in theirs.named_parameters():
            assert_close(ours.get_parameter(name).grad, parameter.grad)


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
    logits = router.weight.double() @ token
    scores = (logits.softmax(0) if c.scoring_func == "softmax" else logits.sigmoid()).tolist()
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
        return down @ (F.silu(gate @ token) * (up @ token))

    def mixed(token: torch.Tensor) -> torch.Tensor:
        routed = [weight * mlp(moe.experts[expert], token) for expert, weight in route(moe, token).items()]
        return mlp(moe.shared_experts, token) + sum(routed)

    return torch.stack([mixed(token) for token in x.flatten(0, 1).double()]).view_as(x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=str)
@pytest.mark.parametrize("bias", [0.0, -3.0])  # the lower one makes preferences negative, so that 0 beats them
@pytest.mark.parametrize("routing", ROUTINGS)
def test_mixture_of_experts_equals_a_loop_over_tokens_and_experts(routing, bias, dtype, tolerance):
    """Of a prompt, and of one token alone. The router works in float32 whatever it is given."""
    moe, x = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))).to(dtype), torch.randn(2, 25, 32).to(dtype)
    if hasattr(moe.gate, "e_score_correction_bias"):
        moe.gate.e_score_correction_bias += bias
    expected = slow_mixture(moe, x)
    assert_close(moe(x).double(), expected, tolerance)
    assert_close(moe(x[1:, 4:5]).double(), expected[1:, 4:5], tolerance)
    assert moe(x).dtype == dtype
