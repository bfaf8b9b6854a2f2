"""Small random parts of DeepSeek-VL2 for the tests, and transformers' modules of the same sizes."""

from dataclasses import asdict, replace

import pytest
import torch

from model import DeepseekVL, ExpertsConfig, LanguageConfig, LatentConfig, ModelConfig, YarnConfig
from vision import SigLIPConfig, TileConfig

LATENT = LatentConfig(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
EXPERTS = ExpertsConfig(n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=20)
SMALL = LanguageConfig(
    vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=256, rope_theta=500.0, latent=LATENT, experts=EXPERTS,
)  # fmt: skip
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=0.9, mscale_all_dim=0.6)

GROUPS = {"n_group": 4, "topk_group": 3}
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0}
GROUP_LIMITED = {"topk_method": "group_limited_greedy", **GROUPS, "routed_scaling_factor": 16.0}


def with_experts(**changes) -> LanguageConfig:
    return replace(SMALL, experts=replace(EXPERTS, **changes))


LANGUAGES = {
    "tiny": replace(SMALL, latent=None),
    "small": SMALL,
    "base": with_experts(**SIGMOID),
    "latent queries, wide values, groups": replace(
        with_experts(**GROUP_LIMITED), latent=replace(LATENT, q_lora_rank=20, v_head_dim=40), yarn=YARN
    ),
}


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


def small_vl2(language: LanguageConfig) -> tuple[DeepseekVL, dict]:
    """A random model and a batch for it: a row with an image, and a shorter one without."""
    vision = SigLIPConfig(image_size=44, patch_size=14, width=24, layers=2, heads=2, mlp_width=40, gelu="tanh")
    model = randomized(DeepseekVL(ModelConfig(vision, language, TileConfig())))
    tokens = 2 * 3 + 1 + 2 * (2 * 2 + 1)  # of an image of 2 x 1 tiles of 3 x 3 patches, which make 2 x 2 tokens
    ids = torch.randint(10, 120, (2, 12 + tokens))
    where, mask = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids)
    where[0, 4 : 4 + tokens], mask[1, :9] = True, 0
    batch = {"input_ids": ids, "attention_mask": mask, "images_seq_mask": where}
    batch |= {"pixel_values": torch.randn(3, 3, 44, 44), "images_spatial_crop": torch.tensor([[2, 1]])}
    return model, batch | {"labels": ids.masked_fill(where | (mask == 0), -100)}


def transformers_module(version: str, kind: str, config: LanguageConfig, *args) -> torch.nn.Module:
    """transformers' module `kind` of deepseek_v2 or deepseek_v3 ("V2", "V3") for a config of ours."""
    module = pytest.importorskip(f"transformers.models.deepseek_{version.lower()}.modeling_deepseek_{version.lower()}")
    make, rope = getattr(module, f"Deepseek{version}Config"), {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {"rope_type": "yarn"} | asdict(config.yarn)
    names = make.__init__.__annotations__.keys() - {"head_dim"}
    values = asdict(config) | asdict(config.latent or LATENT) | asdict(config.experts or EXPERTS)
    theirs = make(**{key: value for key, value in values.items() if key in names}, rope_parameters=rope)
    theirs._attn_implementation = theirs._experts_implementation = "eager"
    return getattr(module, f"Deepseek{version}{kind}")(theirs, *args).eval()
