"""DeepSeek-VL2: golden files, tiles, mixture of experts, latent attention, its configs and names.

References, in this order: the golden files for whole models, transformers' deepseek_v2 and deepseek_v3
modules with the same random weights where they have a variant, and otherwise the equations, written
here as slowly and plainly as they are in the papers.
"""

import copy
import itertools
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SHARED,
    VL2_GOLDENS,
    assert_close,
    golden,
    golden_model,
    needs_shared,
    relative_error,
    skip_unless_packable,
)
from safetensors.torch import load_file, save_file

from generate import generate
from load_weights import (
    check_names,
    checkpoint_names,
    expected_tensors,
    load_model,
    read_config,
    read_layout_and_config,
)
from model import (
    DeepseekVL,
    ExpertsConfig,
    KVCache,
    LanguageConfig,
    LatentAttention,
    LatentConfig,
    MixtureOfExperts,
    ModelConfig,
    Router,
    YarnConfig,
    half_split,
    pack_linears,
    positions_from_mask,
    rope_angles,
    rotate,
    visible_keys,
    yarn_frequencies,
    yarn_mscale,
)
from vision import SigLIPConfig, TileAligner, TileConfig

FULL_SIZE = {"deepseek-vl2-tiny": 12, "deepseek-vl2-small": 27, "deepseek-vl2": 30}  # and their layers

all_goldens = pytest.mark.parametrize("name", VL2_GOLDENS)


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------ golden files


@needs_shared
@pytest.mark.parametrize("case", range(4))
@all_goldens
def test_golden_case_from_its_files_to_its_logits(name, case):
    (model, processor), data = golden_model(name), golden(name)
    expected = {key[2:]: tensor for key, tensor in data.tensors.items() if key.startswith(f"{case}.")}
    batch = processor(data.conversations[case], labels=True)
    assert batch["input_ids"][0].tolist() == expected.pop("input_ids").tolist()
    assert batch.pop("labels")[0].tolist() == expected.pop("labels").tolist()
    no_image = torch.zeros(1, 2, dtype=torch.int32)  # as the original has it where there is none
    assert batch.get("images_spatial_crop", no_image).tolist() == expected.pop("images_spatial_crop").tolist()
    if "images" in expected:  # the pixels are in the files of one case
        torch.testing.assert_close(batch["pixel_values"], expected.pop("images"), rtol=0, atol=1e-6)

    output = model(**batch, output_hidden_states=True)
    computed = {
        "logits_last64": output.logits[0, -64:],
        "hidden_layer1_last64": output.hidden_states[1][0, -64:],
        "hidden_final_last64": output.hidden_states[-1][0, -64:],
    }
    if "pixel_values" in batch:
        tiles = model.vision(batch["pixel_values"])
        features = torch.cat(model.encode_images(batch))
        computed |= {
            "vision_tile0": tiles[0],
            "projector_tile_last": model.aligner.project(tiles)[-1].flatten(0, 1),
            "image_embeds_head64": features[:64],
            "image_embeds_tail64": features[-64:],
        }
    assert computed.keys() == {key for key in expected if "greedy" not in key}
    for key, tensor in computed.items():
        assert_close(tensor, expected[key])


@needs_shared
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 50, 512])
@all_goldens
def test_golden_answers_whatever_the_chunks(name, chunk_size):
    (model, processor), data = golden_model(name), golden(name)
    for case, conversation in enumerate(data.conversations):
        for key, penalty in {"greedy": 1.0, "greedy_repetition_penalty_1.3": 1.3}.items():
            if (expected := data.tensors.get(f"{case}.{key}")) is not None:
                batch = processor(conversation)
                answer = generate(model, batch, 12, repetition_penalty=penalty, chunk_size=chunk_size)
                assert answer == [expected.tolist()]


@needs_shared
@all_goldens
def test_golden_batch(name):
    """The rows that the original batched, in a batch: the ids, and then the answers that each got alone."""
    (model, processor), data = golden_model(name), golden(name)
    batch = processor([data.conversations[case] for case in data.batch])
    assert batch["input_ids"].tolist() == data.tensors["batch.input_ids"].tolist()
    assert batch["attention_mask"].tolist() == data.tensors["batch.attention_mask"].tolist()
    assert generate(model, batch, 12) == [data.tensors[f"{case}.greedy"].tolist() for case in data.batch]
    penalized = generate(model, batch, 12, repetition_penalty=1.3)
    assert penalized[0] == data.tensors["0.greedy_repetition_penalty_1.3"].tolist()


def mixed_conversations(name: str) -> list[list[dict]]:
    """Conversations of different length, with no image or up to four, of different tile counts, of one turn or more."""

    def user(text: str, *images: int) -> dict:
        files = [str(golden(name).folder / "images" / f"{image}.png") for image in images]
        return {"role": "user", "content": "<image>" * len(images) + text, "images": files}

    def assistant(text: str) -> dict:
        return {"role": "assistant", "content": text}

    return [
        [user("Hi.")],
        [user("What is this?", 2)],
        [user("And these?", 3, 5)],
        [user("Hello, who are you?"), assistant("A model."), user("Of what?" * 12)],
        [user("Compare them.", 0, 1, 4, 5)],
        [user("First this.", 4), assistant("A circle."), user("Then nothing."), assistant("So?"), user("That.", 1)],
        [{"role": "system", "content": "Be brief."}, user("<|ref|>The giraffe.<|/ref|>", 3)],
    ]


@needs_shared
@all_goldens
def test_every_row_of_a_mixed_batch_equals_that_row_alone(name):
    model, processor = golden_model(name)
    conversations = mixed_conversations(name)
    together = processor(conversations)
    logits = model(**together).logits
    answers = {chunk_size: generate(model, together, 6, chunk_size=chunk_size) for chunk_size in (None, 7, 50)}
    assert (together["attention_mask"].sum(1) == together["input_ids"].shape[1]).sum() == 1  # the others are padded
    assert together["images_spatial_crop"].unique(dim=0).shape[0] > 3
    for row, conversation in enumerate(conversations):
        alone = processor(conversation)
        expected = model(**alone).logits[0]
        assert_close(logits[row, -len(expected) :], expected)
        (answer,) = generate(model, alone, 6)
        assert [answers[chunk_size][row] for chunk_size in answers] == [answer] * 3


# ------------------------------------------------------------------------------------ small random parts

LATENT = LatentConfig(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
EXPERTS = ExpertsConfig(n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=20)
SMALL = LanguageConfig(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=256,
    rope_theta=500.0,
    latent=LATENT,
    experts=EXPERTS,
)
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=0.9, mscale_all_dim=0.6)


def randomized(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every parameter random; norm weights around one."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random)
        if parameter.dim() == 1:
            parameter.copy_(values * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
        else:
            parameter.copy_(values * parameter[0].numel() ** -0.5)
    return module.eval()


def transformers_module(version: str, kind: str, config: LanguageConfig, *args) -> torch.nn.Module:
    """transformers' module `kind` of deepseek_v2 or deepseek_v3 ("V2", "V3") for a config of ours."""
    pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.models.deepseek_{version.lower()}.modeling_deepseek_{version.lower()}")
    parts = {"latent", "experts", "yarn", "head_dim", "rope_theta"}
    values = {key: value for key, value in asdict(config).items() if key not in parts}
    values |= asdict(config.latent or LATENT) | asdict(config.experts or EXPERTS)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {"rope_type": "yarn"} | asdict(config.yarn)
    names = getattr(module, f"Deepseek{version}Config").__init__.__annotations__
    values = {key: value for key, value in values.items() if key in names}
    theirs = getattr(module, f"Deepseek{version}Config")(**values, rope_parameters=rope)
    theirs._attn_implementation = theirs._experts_implementation = "eager"
    return getattr(module, f"Deepseek{version}{kind}")(theirs, *args).eval()


# ------------------------------------------------------------------------------------ routing

GROUPS = {"n_group": 4, "topk_group": 3}
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0}
GROUP_LIMITED = {"topk_method": "group_limited_greedy", **GROUPS, "routed_scaling_factor": 16.0}
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
# What transformers has, in deepseek_v2 and deepseek_v3.
THEIR_ROUTINGS = {"tiny and small": "V2", "groups": "V2", "base": "V3", "bias and groups": "V3"}


def with_experts(**changes) -> LanguageConfig:
    return replace(SMALL, experts=replace(EXPERTS, **changes))


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
            preference = [value if e // size in kept else 0.0 for e, value in enumerate(preference)]
        chosen = sorted(range(len(scores)), key=preference.__getitem__)[-c.num_experts_per_tok :]
        several = c.norm_topk_prob and c.num_experts_per_tok > 1
        divisor = sum(scores[e] for e in chosen) if several else 1.0
        choices.append({e: scores[e] / divisor * c.routed_scaling_factor for e in chosen})
    return choices


def dense(experts: torch.Tensor, weights: torch.Tensor, count: int = EXPERTS.n_routed_experts) -> torch.Tensor:
    """Chosen experts and their weights (tokens, k) as one row of weights a token (tokens, E)."""
    return torch.zeros(len(experts), count).scatter(1, experts, weights.float())


@pytest.mark.parametrize("bias", [0.0, -3.0])  # the lower one makes preferences negative, so that 0 beats them
@pytest.mark.parametrize("routing", ROUTINGS)
def test_router_equals_the_definitions(routing, bias):
    router, x = randomized(Router(with_experts(**ROUTINGS[routing]))), torch.randn(50, 32)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias += bias
    experts, weights = router(x)
    assert weights.dtype == torch.float32
    expected = torch.zeros(50, 8)
    for token, choice in enumerate(route(router, x)):
        expected[token, list(choice)] = torch.tensor(list(choice.values()))
    assert torch.equal(dense(experts, weights) > 0, expected > 0)
    assert_close(dense(experts, weights), expected, 1e-6)


@pytest.mark.parametrize("routing", THEIR_ROUTINGS)
def test_router_equals_transformers(routing):
    config = with_experts(**ROUTINGS[routing])
    ours, theirs = randomized(Router(config)), transformers_module(THEIR_ROUTINGS[routing], "TopkRouter", config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(50, 32)
    _, weights, experts = theirs(x)
    assert_close(dense(*ours(x)), dense(experts, weights), 1e-6)


def test_experts_outside_the_best_groups_count_as_zero_not_as_never():
    """The first pair is the better group; of all four, the two zeros are then the largest."""
    router = Router(with_experts(n_routed_experts=4, n_group=2, topk_group=1, topk_method="noaux_tc"))
    preference = router.within_best_groups(torch.tensor([[-0.1, -0.4, -0.3, -0.9]]))
    assert_close(preference, torch.tensor([[-0.1, -0.4, 0.0, 0.0]]), 0)


def test_router_works_in_float32_whatever_it_is_given():
    router, x = randomized(Router(with_experts(**SIGMOID))).bfloat16(), torch.randn(50, 32).bfloat16()
    half, full = router(x), router.float()(x.float())
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


# ------------------------------------------------------------------------------------ mixture of experts


def naive_mixture(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
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


def transformers_mixture(version: str, ours: MixtureOfExperts, config: LanguageConfig) -> torch.nn.Module:
    """transformers' mixture with our weights: it stacks those of all experts, gate above up."""
    theirs = transformers_module(version, {"V2": "Moe", "V3": "MoE"}[version], config)
    weights = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("experts.")}
    both = [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in ours.experts]
    weights["experts.gate_up_proj"] = torch.stack(both)
    weights["experts.down_proj"] = torch.stack([expert.down_proj.weight for expert in ours.experts])
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(2, 9, 32), (1, 1, 32)], ids=["prompt", "one token"])
def test_mixture_of_experts_equals_a_loop_over_tokens_and_experts(routing, shape):
    moe, x = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))), torch.randn(shape)
    assert_close(moe(x), naive_mixture(moe, x), 1e-6)


@pytest.mark.parametrize("routing", THEIR_ROUTINGS)
def test_mixture_of_experts_and_its_gradients_equal_transformers(routing):
    config = with_experts(**ROUTINGS[routing])
    ours = randomized(MixtureOfExperts(config))
    theirs = transformers_mixture(THEIR_ROUTINGS[routing], ours, config)
    results, x = [], torch.randn(2, 9, 32)
    for moe in (ours, theirs):
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            out = moe(given)
            out.square().sum().backward()
        results.append((out, given.grad, moe.gate.weight.grad, moe.shared_experts.up_proj.weight.grad))
    for tested, expected in zip(*results):
        assert_close(tested, expected)
    down = [expert.down_proj.weight for expert in ours.experts]
    assert_close(torch.stack([zero_where_none(weight) for weight in down]), theirs.experts.down_proj.grad)


def zero_where_none(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "bfloat16 packed"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_token_alone_equals_that_token_among_others(routing, kind):
    """Where nothing is sorted, and where it is: equal but for the order in which float32 adds up k results."""
    dtype = getattr(torch, kind.split()[0])
    moe = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))).to(dtype)
    x = torch.randn(2, 9, 32).to(dtype)
    if kind == "bfloat16 packed":
        skip_unless_packable(moe.shared_experts.up_proj)
        pack_linears(moe)
    together = moe(x)
    alone = torch.stack([torch.cat([moe(token[None, None]) for token in row], dim=1)[0] for row in x])
    assert alone.dtype == dtype
    assert_close(alone, together, {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2**-9}[dtype])


@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 7, 32), (4, 1, 32), (3, 5, 32)], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_packed_mixture_equals_the_plain_one(routing, shape):
    """Products of one input become one product; the arithmetic stays, but for the order of the kernels' sums."""
    plain, x = randomized(MixtureOfExperts(with_experts(**ROUTINGS[routing]))).bfloat16(), torch.randn(shape).bfloat16()
    skip_unless_packable(plain.shared_experts.up_proj)
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    for mlp in (*packed.experts, packed.shared_experts):
        assert [name for name, _ in mlp.named_children()] == ["gate_proj", "down_proj"]
    assert_close(packed(x), plain(x), 2**-8)
    assert_close(packed(x), naive_mixture(plain, x), 2**-6)


def test_experts_that_nobody_chose_are_not_touched():
    moe, x = randomized(MixtureOfExperts(SMALL)), torch.randn(1, 1, 32)
    chosen, expected = set(moe.gate(x[0])[0].flatten().tolist()), moe(x)
    for index, expert in enumerate(moe.experts):
        if index not in chosen:
            expert.requires_grad_(False).to("meta")  # no values: to use them is an error
    assert len(chosen) == 3 and torch.equal(moe(x), expected)


@pytest.mark.parametrize(
    "first, every, layers",
    [(1, 1, [1, 2, 3, 4, 5]), (0, 1, [0, 1, 2, 3, 4, 5]), (2, 2, [2, 4]), (3, 2, [4]), (6, 1, [])],
)
def test_layers_that_have_experts(first, every, layers):
    config = with_experts(first_k_dense_replace=first, moe_layer_freq=every)
    assert [layer for layer in range(6) if config.has_experts(layer)] == layers
    assert not replace(config, experts=None).has_experts(5)


# ------------------------------------------------------------------------------------ rotation, YaRN


def test_half_split_then_rotate_turns_pairs_side_by_side_as_complex_numbers():
    """(a + ib) exp(i angle) for each pair (a, b) of neighbours; the results come out real parts first."""
    x, positions = torch.randn(2, 4, 5, 8), torch.tensor([[0, 1, 2, 50, 200]])
    angles = positions.double().T * 500.0 ** (-torch.arange(0, 8, 2) / 8)  # (5, 4)
    turned = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    rotated = rotate(half_split(x), *rope_angles(positions, SMALL))
    assert_close(rotated, torch.cat((turned.real, turned.imag), dim=-1), 1e-5)


YARNS = {
    "DeepSeek-V2": (YarnConfig(40.0, 4096, 32.0, 1.0, 0.707, 0.707), 10000.0, 64),
    "DeepSeek-V3": (YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0), 10000.0, 64),
    "defaults": (YarnConfig(4.0), 10000.0, 64),
    "two mscales": (YARN, 500.0, 8),
    "other ramp": (YarnConfig(16.0, 2048, 8.0, 2.0), 1e6, 32),
    "ramp beyond the last pair": (YarnConfig(2.0, 10**6, 32.0, 1.0), 100.0, 16),
}


@pytest.mark.parametrize("case", YARNS)
def test_yarn_equals_transformers(case):
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
        assert_close(part, theirs_part, 1e-5)


# ------------------------------------------------------------------------------------ latent attention

HEADS = {
    "small's shape": {},
    "latent queries": {"q_lora_rank": 20},
    "values wider than keys": {"v_head_dim": 40},
}
BOTH_WAYS = ["absorbed", "expanded"]


def latent_config(heads: str, yarn: bool = False, **changes) -> LanguageConfig:
    return replace(SMALL, latent=replace(LATENT, **HEADS[heads]), yarn=YARN if yarn else None, **changes)


def take(way: str, monkeypatch) -> None:
    """Have latent attention computed one way, whatever takes fewer multiplications."""
    monkeypatch.setattr(LatentAttention, "absorbed_is_cheaper", lambda *_: way == "absorbed")


def masks(T: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A mask of two rows, and the same for `visible_keys`: None where nothing is padding."""
    mask = torch.ones(2, T, dtype=torch.long)
    if padded:
        mask[1, : T // 2] = 0
    return mask, mask if padded else None


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_latent_attention_equals_transformers(version, heads, yarn, padded, way, monkeypatch):
    """Output and weights. V2 turns pairs side by side, V3 reorders them first; the scores are the same."""
    take(way, monkeypatch)
    config = latent_config(heads, yarn)
    ours, theirs = randomized(LatentAttention(config, 0)), transformers_module(version, "Attention", config, 0)
    theirs.load_state_dict(ours.state_dict())
    mask, given_mask = masks(9, padded)
    positions = positions_from_mask(mask)
    visible = visible_keys(9, 9, given_mask, mask.device)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1) if visible is None else ~visible
    bias = torch.zeros(2, 1, 9, 9).masked_fill(hidden, -torch.inf)

    x = torch.randn(2, 9, 32)
    their_rope = transformers_module(version, "RotaryEmbedding", config)(x, positions)
    expected, expected_weights = theirs(x, attention_mask=bias, position_embeddings=their_rope)
    for want_weights in (False, True):
        tested, weights = ours(x, rope_angles(positions, config), visible, None, want_weights)
        assert_close(tested, expected)
        if want_weights:
            assert_close(weights, expected_weights)


def test_norms_of_the_latents_have_an_epsilon_of_their_own():
    """1e-6 whatever rms_norm_eps says, as in the original. Inputs are faint, so that it shows."""
    config = latent_config("latent queries", rms_norm_eps=1e-3)
    ours, theirs = randomized(LatentAttention(config, 0)), transformers_module("V3", "Attention", config, 0)
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(1, 9, 32) * 0.01, torch.arange(9)[None]
    bias = torch.full((9, 9), -torch.inf).triu(1)
    their_rope = transformers_module("V3", "RotaryEmbedding", config)(x, positions)
    expected, _ = theirs(x, attention_mask=bias, position_embeddings=their_rope)
    tested, _ = ours(x, rope_angles(positions, config), None, None)
    assert_close(tested, expected)


@pytest.mark.parametrize("want_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (3, 9), (9, 9)])
@pytest.mark.parametrize("heads", HEADS)
def test_absorbed_equals_expanded(heads, T, S, padded, want_weights):
    attention = randomized(LatentAttention(latent_config(heads), 0))
    q_nope, q_rope, stored = torch.randn(2, 4, T, 16), torch.randn(2, 4, T, 8), torch.randn(2, 1, S, 24 + 8)
    visible = visible_keys(T, S, masks(S, padded)[1], stored.device)
    absorbed, weights = attention.absorbed(q_nope, q_rope, stored, visible, want_weights)
    expanded, expected_weights = attention.expanded(q_nope, q_rope, stored, visible, want_weights)
    assert absorbed.shape == (2, 4, T, attention.config.v_head_dim)
    assert_close(absorbed, expanded, 1e-6)
    if want_weights:
        assert_close(weights, expected_weights, 1e-6)


@pytest.mark.parametrize("way", [None, *BOTH_WAYS])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_latent_attention_in_pieces_equals_one_pass(heads, padded, way, monkeypatch):
    """Pieces of one token and of several, through the cache. None is the model's own choice of the way."""
    config = replace(latent_config(heads), num_hidden_layers=1)
    attention, x = randomized(LatentAttention(config, 0)), torch.randn(2, 60, 32)
    mask, given_mask = masks(60, padded)
    cos, sin = rope_angles(positions_from_mask(mask), config)
    visible = visible_keys(60, 60, given_mask, x.device)
    take("expanded", monkeypatch)
    expected, expected_weights = attention(x, (cos, sin), visible, None, True)
    monkeypatch.undo() if way is None else take(way, monkeypatch)
    for want_weights in (False, True):
        cache, end = KVCache(config, 2, 60, torch.float32, "cpu"), 0
        for size in (40, 1, 1, 7, 10, 1):
            start, end = end, end + size
            seen = None if given_mask is None else given_mask[:, :end]
            rope = cos[:, :, start:end], sin[:, :, start:end]
            visible = visible_keys(size, end, seen, x.device)
            tested, weights = attention(x[:, start:end], rope, visible, cache, want_weights)
            cache.advance(size)
            assert_close(tested, expected[:, start:end])
            if want_weights:
                assert_close(weights, expected_weights[:, :, start:end, :end])


def multiplications(way: str, T: int, S: int, s: LatentConfig) -> int:
    """What a head multiplies for T queries that see S tokens, counted product by product."""
    R, nope, rope, v = s.kv_lora_rank, s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim
    if way == "expanded":
        keys_and_values = S * R * (nope + v)
        return keys_and_values + T * S * (nope + rope) + T * S * v
    into_and_out_of_the_latent_space = T * nope * R + T * R * v
    return into_and_out_of_the_latent_space + T * S * (R + rope) + T * S * R


@pytest.mark.parametrize("T, S", [(1, 1), (1, 2), (1, 4096), (2, 3), (50, 50), (50, 51), (50, 4096), (150, 300),
                                  (170, 10**6), (171, 10**6), (171, 171), (512, 512), (512, 4096)])  # fmt: skip
@pytest.mark.parametrize("sizes", [LatentConfig(), LatentConfig(kv_lora_rank=64)], ids=["rank 512", "rank 64"])
def test_the_way_that_multiplies_less_is_taken(sizes, T, S, monkeypatch):
    """Shapes alone, on the meta device: T tokens are fed after S - T."""
    config = replace(SMALL, latent=sizes, num_hidden_layers=1)
    with torch.device("meta"):
        attention, x = LatentAttention(config, 0), torch.empty(1, T, 32)
        rope = rope_angles(torch.empty(1, T), config)
    cache, taken = KVCache(config, 1, S, torch.float32, "meta"), []
    cache.advance(S - T)
    for way in BOTH_WAYS:

        def watched(*args, way=way):
            taken.append(way)
            return args[0].new_empty(1, 4, T, sizes.v_head_dim), None

        monkeypatch.setattr(attention, way, watched)
    attention(x, rope, visible_keys(T, S, None, x.device), cache)
    counts = {way: multiplications(way, T, S, sizes) for way in BOTH_WAYS}
    assert counts[taken[0]] == min(counts.values()), counts


@needs_shared
@pytest.mark.parametrize(
    "name, values", [("deepseek-vl2-small", 27 * 576), ("deepseek-vl2", 30 * 576), ("deepseek-vl2-tiny", 12 * 2 * 1280)]
)
def test_cache_holds_a_latent_and_a_rotated_key_a_token_and_layer(name, values):
    """kv_lora_rank + qk_rope_head_dim = 512 + 64 values; tiny, without latents, all its keys and values."""
    language = read_config(SHARED / "checkpoints" / name).language
    cache = KVCache(language, 1, 4096, torch.bfloat16, device="meta")
    assert sum(tensor.numel() for layer in cache.layers for tensor in layer) == values * 4096


def test_cache_is_what_transformers_caches():
    """The normalized latent and the rotated key, which transformers keeps as "keys" and "values"."""
    cache_utils = pytest.importorskip("transformers.cache_utils")
    ours, theirs = randomized(LatentAttention(SMALL, 0)), transformers_module("V3", "Attention", SMALL, 0)
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(2, 9, 32), torch.arange(9)[None]
    cache, their_cache = KVCache(SMALL, 2, 12, torch.float32, "cpu"), cache_utils.DynamicCache()
    ours(x, rope_angles(positions, SMALL), None, cache)
    their_rope = transformers_module("V3", "RotaryEmbedding", SMALL)(x, positions)
    theirs(x, their_rope, None, past_key_values=their_cache)
    (stored,) = cache.layers[0]
    their_layer = their_cache.layers[0]
    assert_close(stored[:, :, :9], torch.cat((their_layer.keys, their_layer.values), dim=-1), 1e-6)


# ------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_bfloat16_error_of_latent_attention_is_that_of_transformers(version, way, monkeypatch):
    """Against float32 with the same weights, mean over models and inputs: at most 1.2 times theirs."""
    take(way, monkeypatch)
    positions = torch.arange(40)[None]
    their_rope = transformers_module(version, "RotaryEmbedding", SMALL)
    bias, errors = torch.full((40, 40), -torch.inf).triu(1), {"ours": 0.0, "theirs": 0.0}
    for seed in range(8):
        ours = randomized(LatentAttention(SMALL, 0), seed).bfloat16()
        theirs = transformers_module(version, "Attention", SMALL, 0).bfloat16()
        theirs.load_state_dict(ours.state_dict())
        x, (cos, sin) = torch.randn(2, 40, 32).bfloat16(), rope_angles(positions, SMALL)
        tested, _ = ours(x, (cos.bfloat16(), sin.bfloat16()), None, None)
        reference, _ = theirs(x, attention_mask=bias.bfloat16(), position_embeddings=their_rope(x, positions))
        exact, _ = ours.float()(x.float(), (cos, sin), None, None)
        errors["ours"] += relative_error(tested, exact) / 8
        errors["theirs"] += relative_error(reference, exact) / 8
    assert errors["ours"] <= 1.2 * errors["theirs"], errors


@pytest.mark.parametrize("routing", THEIR_ROUTINGS)
def test_bfloat16_error_of_the_mixture_is_that_of_transformers(routing):
    config, errors = with_experts(**ROUTINGS[routing]), {"ours": 0.0, "theirs": 0.0}
    for seed in range(8):
        ours = randomized(MixtureOfExperts(config), seed).bfloat16()
        theirs = transformers_mixture(THEIR_ROUTINGS[routing], ours, config).bfloat16()
        x = torch.randn(2, 40, 32).bfloat16()
        tested, reference = ours(x), theirs(x)
        exact = ours.float()(x.float())
        errors["ours"] += relative_error(tested, exact) / 8
        errors["theirs"] += relative_error(reference, exact) / 8
    assert errors["ours"] <= 1.2 * errors["theirs"], errors


@needs_shared
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_goldens
def test_half_precision_error_is_of_the_order_of_rounding(name, dtype):
    """Hidden states after the first layer and image features, of a padded batch; nothing is NaN, padding included.

    Later layers are not compared: a rounding may send a token to another expert.
    """
    (exact, processor), data = golden_model(name), golden(name)
    half, batch = load_model(data.folder, dtype=dtype), processor(data.conversations)
    tolerance = 2 * torch.finfo(dtype).eps
    real = batch["attention_mask"].bool()
    expected, tested = (model(**batch, output_hidden_states=True) for model in (exact, half))
    assert tested.logits.dtype == dtype and tested.logits.isfinite().all()
    assert_close(tested.hidden_states[1][real], expected.hidden_states[1][real], tolerance)
    assert_close(torch.cat(half.encode_images(batch)), torch.cat(exact.encode_images(batch)), tolerance)


# ------------------------------------------------------------------------------------ learning

TILE_TOKENS = 2 * 3 + 1 + 2 * (2 * 2 + 1)  # of an image of 2 x 1 tiles of 3 x 3 patches, which make 2 x 2 tokens
LEARNERS = {
    "tiny": replace(SMALL, latent=None),
    "small": SMALL,
    "base": with_experts(**SIGMOID),
    "latent queries, groups": replace(with_experts(**GROUP_LIMITED), latent=replace(LATENT, q_lora_rank=20), yarn=YARN),
}


def small_vl2(language: LanguageConfig) -> tuple[DeepseekVL, dict]:
    """A random model and a batch for it: a row with an image, and a shorter one without."""
    vision = SigLIPConfig(image_size=44, patch_size=14, width=24, layers=2, heads=2, mlp_width=40, gelu="tanh")
    model = randomized(DeepseekVL(ModelConfig(vision, language, TileConfig())))
    ids = torch.randint(10, 120, (2, 12 + TILE_TOKENS))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, 4 : 4 + TILE_TOKENS] = True
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "images_seq_mask": where,
        "pixel_values": torch.randn(3, 3, 44, 44),
        "images_spatial_crop": torch.tensor([[2, 1]]),
        "labels": ids.masked_fill(where | (mask == 0), -100),
    }
    return model, batch


def chosen_experts(model: DeepseekVL, batch: dict) -> set[str]:
    """The names of the experts that any token of the batch is sent to."""
    chosen = set()
    hooks = [
        moe.gate.register_forward_hook(
            lambda _, __, out, name=name: chosen.update(f"{name}.experts.{e}" for e in out[0].flatten().tolist())
        )
        for name, moe in model.named_modules()
        if isinstance(moe, MixtureOfExperts)
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.mark.parametrize("kind", LEARNERS)
def test_every_parameter_that_should_learn_gets_a_gradient_and_training_lowers_the_loss(kind):
    """Exceptions: experts that no token chose, and the bias that only takes part in the choice."""
    model, batch = small_vl2(LEARNERS[kind])
    chosen = chosen_experts(model, batch)
    assert chosen
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(6):
        with torch.enable_grad():
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
        losses.append(loss.item())
        if step == 0:
            for name, parameter in model.named_parameters():
                expert = name.rsplit(".", 2)[0]
                unused = ".experts." in name and expert not in chosen
                if unused or name.endswith("e_score_correction_bias"):
                    assert parameter.grad is None, name
                else:
                    assert parameter.grad is not None and parameter.grad.any(), name
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_of_latent_attention_equal_transformers(heads, monkeypatch):
    config = latent_config(heads)
    x, positions, gradients = torch.randn(2, 9, 32), torch.arange(9)[None], []
    bias = torch.full((9, 9), -torch.inf).triu(1)
    theirs = transformers_module("V3", "Attention", config, 0)
    theirs.load_state_dict(randomized(LatentAttention(config, 0)).state_dict())
    their_rope = transformers_module("V3", "RotaryEmbedding", config)(x, positions)
    with torch.enable_grad():
        out, _ = theirs(x, attention_mask=bias, position_embeddings=their_rope)
        out.square().sum().backward()
    for way in BOTH_WAYS:
        take(way, monkeypatch)
        ours = randomized(LatentAttention(config, 0))
        with torch.enable_grad():
            ours(x, rope_angles(positions, config), None, None)[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        for ours in gradients:
            assert_close(ours[name], parameter.grad)


# ------------------------------------------------------------------------------------ tiles


def tile_aligner(global_view_first: bool = True, mlp_ratio: int = 1, ratio: int = 2) -> TileAligner:
    config = TileConfig(ratio, mlp_ratio, global_view_first)
    return randomized(TileAligner(config, vision_width=6, language_width=10))


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


TILINGS = [(1, 1), (2, 1), (1, 3), (3, 2), (9, 1)]


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
@pytest.mark.parametrize("wide, high", TILINGS)
def test_tiles_are_laid_out_as_one_picture(wide, high, global_view_first):
    aligner, grids = tile_aligner(global_view_first), torch.randn(1 + wide * high, 3, 3, 10)
    tokens = aligner.lay_out(grids, wide, high)
    assert torch.equal(tokens, laid_out(aligner, grids, wide, high))
    assert len(tokens) == 3 * (3 + 1) + 1 + 3 * high * (3 * wide + 1)


def test_a_tile_of_27_patches_a_side_makes_14_rows_of_14_tokens():
    """210 + 1 + (14 th)(14 tw + 1) tokens, as the processor leaves room for."""
    aligner = tile_aligner()
    for wide, high in TILINGS:
        patches = torch.randn(1 + wide * high, 27 * 27, 6)
        (tokens,) = aligner(patches, torch.tensor([[wide, high]]))
        assert len(tokens) == 210 + 1 + 14 * high * (14 * wide + 1)


def test_images_share_one_pass_over_their_tiles():
    aligner, tilings = tile_aligner(), [(2, 1), (1, 1), (1, 3)]
    patches = [torch.randn(1 + wide * high, 9, 6) for wide, high in tilings]
    together = aligner(torch.cat(patches), torch.tensor(tilings))
    for tokens, tiling, own in zip(together, tilings, patches, strict=True):
        assert_close(tokens, laid_out(aligner, aligner.project(own), *tiling), 1e-6)


@pytest.mark.parametrize("crop, tiles", [([[2, 1]], 3), ([[1, 1], [1, 1]], 4), ([[0, 0]], 0), ([[3, 2]], 7)])
def test_tile_counts_must_agree(crop, tiles):
    with pytest.raises(ValueError, match=f"counts {tiles} tiles with the global views, pixel_values hold 5"):
        tile_aligner()(torch.randn(5, 9, 6), torch.tensor(crop))


def test_tiles_need_their_counts():
    model, batch = small_vl2(SMALL)
    del batch["images_spatial_crop"]
    with pytest.raises(ValueError, match="pixel_values of tiles need images_spatial_crop"):
        model(**batch)


# ------------------------------------------------------------------------------------ configs


def edited(folder: Path, source: Path, **changes) -> Path:
    """A copy of a checkpoint in which config.json has other values; `section__key` is a key of a section.

    A value of `...` takes the key out.
    """
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
            (folder / file.name).chmod(0o644)
    config = json.loads((source / "config.json").read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        values = config
        for section in sections:
            values = values[section]
        values.pop(key, None)
        if value is not ...:
            values[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def language_of(tmp_path: Path, **changes) -> LanguageConfig:
    source = SHARED / "checkpoints" / "deepseek-vl2-small"
    changes = {f"language_config__{key}": value for key, value in changes.items()}
    return read_config(edited(tmp_path, source, **changes)).language


@needs_shared
def test_defaults_of_absent_keys(tmp_path):
    keys = "kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim q_lora_rank vocab_size n_group".split()
    language = language_of(tmp_path, **dict.fromkeys(keys, ...))
    assert language.latent == LatentConfig(q_lora_rank=1536)  # and the rest of small's sizes, which are the defaults
    assert (language.vocab_size, language.rope_theta, language.rms_norm_eps) == (102400, 10000.0, 1e-6)
    assert not language.tie_word_embeddings and language.yarn is None
    assert language.experts == ExpertsConfig()


VARIANTS = {
    "q_lora_rank of null is none": ({"q_lora_rank": None}, "latent", LatentConfig(q_lora_rank=None)),
    "q_lora_rank": ({"q_lora_rank": 96}, "latent", LatentConfig(q_lora_rank=96)),
    "plain attention": ({"use_mla": False}, "latent", None),
    "no experts": ({"n_routed_experts": None}, "experts", None),
    "groups": (GROUP_LIMITED, "experts", replace(ExpertsConfig(), **GROUP_LIMITED)),
    "sigmoid": (SIGMOID, "experts", replace(ExpertsConfig(), **SIGMOID)),
    "every other layer": (
        {"first_k_dense_replace": 2, "moe_layer_freq": 2},
        "experts",
        replace(ExpertsConfig(), first_k_dense_replace=2, moe_layer_freq=2),
    ),
    "yarn": ({"rope_scaling": {"type": "yarn", **asdict(YARN)}}, "yarn", YARN),
    "yarn's defaults": ({"rope_scaling": {"type": "yarn", "factor": 40}}, "yarn", YarnConfig(40.0)),
}


@needs_shared
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_language_config(variant, tmp_path):
    changes, part, expected = VARIANTS[variant]
    assert getattr(language_of(tmp_path, **changes), part) == expected


@needs_shared
def test_projector_config(tmp_path):
    source = SHARED / "checkpoints" / "deepseek-vl2-small"
    assert read_config(source).tiles == TileConfig()
    changes = {"projector_config__mlp_ratio": 3, "projector_config__downsample_ratio": 3, "global_view_pos": "tail"}
    assert read_config(edited(tmp_path, source, **changes)).tiles == TileConfig(3, 3, global_view_first=False)


UNFIT = {
    "projector_config__n_embed": (1280, "n_embed is 1280, expected 2048"),
    "projector_config__input_dim": (1024, "input_dim is 1024, expected 1152"),
    "projector_config__depth": (3, "depth is 3"),
    "projector_config__projector_type": ("mlp_gelu", "projector_type is 'mlp_gelu'"),
    "vision_config__width": (1024, "input_dim is 1152, expected 1024"),
    "vision_config__model_name": ("siglip_large_patch16_384", "model_name is 'siglip_large"),
    "tile_tag": ("1D", "tile_tag is '1D'"),
    "global_view_pos": ("middle", "global_view_pos is 'middle'"),
    "language_config__n_group": (3, "in 3 groups, do not fit 64 experts"),
    "language_config__topk_group": (2, "of 2 in 1 groups"),
    "language_config__num_experts_per_tok": (65, "65 experts a token"),
    "language_config__n_routed_experts": (0, "n_routed_experts is 0"),
    "language_config__topk_method": ("random", "topk_method is 'random'"),
    "language_config__scoring_func": ("relu", "scoring_func is 'relu'"),
    "language_config__q_lora_rank": ("many", "q_lora_rank is 'many'"),
    "language_config__kv_lora_rank": (-1, "kv_lora_rank is -1"),
    "language_config__qk_rope_head_dim": (63, "heads of 63 values cannot be rotated in pairs"),
    "language_config__rope_scaling": ({"type": "linear", "factor": 2.0}, "type is 'linear'"),
    "language_config__attention_bias": (True, "attention_bias is True"),
    "language_config__moe_layer_freq": (0, "moe_layer_freq is 0"),
}


@needs_shared
@pytest.mark.parametrize("key", UNFIT)
def test_unfit_configs_are_errors_that_name_the_key(key, tmp_path):
    value, message = UNFIT[key]
    with pytest.raises(ValueError, match=message) as caught:
        read_config(edited(tmp_path, SHARED / "checkpoints" / "deepseek-vl2-small", **{key: value}))
    assert "config.json" in str(caught.value)


@needs_shared
def test_groups_must_hold_as_many_experts_as_a_token_wants(tmp_path):
    changes = {"topk_method": "group_limited_greedy", "n_group": 16, "topk_group": 1}  # 4 experts, where 6 are wanted
    with pytest.raises(ValueError, match="6 experts a token, of 1 in 16 groups, do not fit 64 experts"):
        language_of(tmp_path, **changes)


# ------------------------------------------------------------------------------------ full-size names


def full_size(name: str) -> tuple[DeepseekVL, dict, dict[str, tuple]]:
    """A released checkpoint's model without memory, what it expects of the files, and names and shapes in them."""
    folder = SHARED / "checkpoints" / name
    layout, config = read_layout_and_config(folder)
    names = {key: tuple(shape) for key, shape in json.loads((folder / "names.json").read_text()).items()}
    with torch.device("meta"):
        model = DeepseekVL(config)
    return model, expected_tensors(model, layout, set(names)), names


@needs_shared
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes_map_one_to_one(name):
    model, expected, names = full_size(name)
    assert len(model.language.layers) == FULL_SIZE[name]
    pooling_head = {key for key in names if key.startswith("vision.attn_pool.")}
    assert len(pooling_head) == 13
    assert {key: target.shape for key, target in expected.items()} == {
        key: shape for key, shape in names.items() if key not in pooling_head
    }
    parameters = dict(model.named_parameters())
    assert sorted(target.parameter for target in expected.values()) == sorted(parameters)
    assert all(parameters[target.parameter].shape == target.shape for target in expected.values())


@needs_shared
@pytest.mark.parametrize(
    "name, total, active",
    [("deepseek-vl2-tiny", 3.37, 1.0), ("deepseek-vl2-small", 16.1, 2.8), ("deepseek-vl2", 27.5, 4.5)],
)
def test_full_size_parameter_counts(name, total, active):
    """In billions, to three digits. The published totals count SigLIP's unused pooling head.

    Active for a token are the experts chosen for it and all else, the vision tower included, but not the
    embedding table, of which one row is read.
    """
    model, _, names = full_size(name)
    assert f"{sum(math.prod(shape) for shape in names.values()) / 1e9:.3g}" == f"{total}"
    experts = model.config.language.experts
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    routed = sum(size for key, size in sizes.items() if ".experts." in key)
    idle = routed * (experts.n_routed_experts - experts.num_experts_per_tok) // experts.n_routed_experts
    used = sum(sizes.values()) - idle - sizes["language.embed_tokens.weight"]
    assert used / 1e9 == pytest.approx(active, rel=0.03)


# ------------------------------------------------------------------------------------ loading


@needs_shared
@all_goldens
def test_weights_are_those_of_the_file(name):
    """Every tensor of the file, pooling head aside, is a parameter under the name that the table gives."""
    model, weights = golden_model(name)[0], load_file(golden(name).folder / "model.safetensors")
    layout, _ = read_layout_and_config(golden(name).folder)
    for ours, parameter in model.state_dict().items():
        (theirs,) = checkpoint_names(ours, layout.names)
        assert torch.equal(parameter, weights.pop(theirs).float())
    assert all(key.startswith("vision.attn_pool.") for key in weights)


def write_shards(folder: Path, weights: dict[str, torch.Tensor], count: int = 3) -> None:
    names, weight_map = sorted(weights), {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:06d}.safetensors"
        save_file({name: weights[name] for name in names[shard::count]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::count], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@needs_shared
@all_goldens
def test_shards_give_the_same_model(name, tmp_path):
    expected, _ = golden_model(name)
    edited(tmp_path, golden(name).folder)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, load_file(golden(name).folder / "model.safetensors"))
    model = load_model(tmp_path, dtype=torch.float32)
    assert model.config == expected.config and not model.training
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in model.state_dict().items())


@needs_shared
@pytest.mark.parametrize("sharded", [False, True])
def test_a_missing_expert_is_named(sharded, tmp_path):
    edited(tmp_path, golden("vl2-mla").folder)
    weights = load_file(golden("vl2-mla").folder / "model.safetensors")
    missing = "language.model.layers.1.mlp.experts.5.up_proj.weight"
    del weights[missing]
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, weights) if sharded else save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing tensor {missing}, expected shape \\[32, 64\\]"):
        load_model(tmp_path)


@needs_shared
def test_an_expert_too_many_is_named(tmp_path):
    folder = edited(tmp_path, golden("vl2-mla").folder, language_config__n_routed_experts=7)
    with pytest.raises(ValueError, match=r"unexpected tensor language\.model\.layers\.1\.mlp\.experts\.7\.down_proj"):
        load_model(folder)


@needs_shared
def test_full_size_check_names_a_missing_tensor():
    _, expected, names = full_size("deepseek-vl2-tiny")
    files = dict.fromkeys(names)
    del files["view_seperator"]
    layout, _ = read_layout_and_config(SHARED / "checkpoints" / "deepseek-vl2-tiny")
    with pytest.raises(ValueError, match=r"missing tensor view_seperator, expected shape \[1280\]"):
        check_names(expected, files, layout, Path("folder"))


@needs_shared
def test_global_view_at_the_tail(tmp_path):
    """The same tokens, local view first; and the answer then is that of the model given these embeddings."""
    head, processor = golden_model("vl2-mla")
    tail = load_model(edited(tmp_path, golden("vl2-mla").folder, global_view_pos="tail"), dtype=torch.float32)
    batch = processor(golden("vl2-mla").conversations[2])  # two images
    whole = 4 * (4 + 1)  # tokens of the global view
    reordered = [torch.cat((x[whole + 1 :], x[whole : whole + 1], x[:whole])) for x in head.encode_images(batch)]
    for tested, expected in zip(tail.encode_images(batch), reordered, strict=True):
        assert_close(tested, expected, 1e-6)
    embeddings = head.language.embed_tokens(batch["input_ids"])
    embeddings[batch["images_seq_mask"]] = torch.cat(reordered)
    logits = tail(**batch).logits
    assert_close(logits, head(inputs_embeds=embeddings).logits)
    assert relative_error(logits, head(**batch).logits) > 0.01
