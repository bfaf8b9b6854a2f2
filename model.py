"""The language model of DeepSeek-VL, and `DeepseekVL`, which lets it see.

Read top to bottom, each part is met just before it is used:

    configs, and MODELS: the five released models
    RMSNorm, positions (RoPE, padding), KV cache
    Attention, and LatentAttention in its place (DeepSeek-VL2 small and base)
    SwiGLU, and MixtureOfExperts in its place (DeepSeek-VL2, all layers but the first)
    DecoderLayer, Decoder
    DeepseekVL: image features in place of image tokens, one decoder over all

    input_ids (B, T) -> embeddings (B, T, D)  <- image features (images, N, D) at the placeholders
                     -> layers of attention and SwiGLU (B, T, D) -> logits (B, T, vocabulary)

Shape letters:

    B  batch (conversations)     T  tokens fed now   S  tokens attended to, cached ones included
    D  width of a token          H  query heads      d  width of a head
    N  tokens of an image        G  key/value heads, H / G queries share one (G = H: no sharing)
    E  routed experts            K  of them a token uses
    R  width of the latent that latent attention caches; nope, rope and v: widths of the parts of
       its heads that are not rotated, that are rotated, and of its values

Papers: DeepSeek-VL (arXiv 2403.05525), DeepSeek-VL2 (2412.10302), Llama (2302.13971), RoFormer
(2104.09864) for RoPE, GQA (2305.13245), DeepSeek-V2 (2405.04434) for latent attention and experts,
DeepSeek-V3 (2412.19437) for sigmoid routing, YaRN (2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision import (
    SAM,
    HybridAligner,
    HybridConfig,
    HybridTower,
    MLPAligner,
    SAMBlock,
    SigLIP,
    SigLIPAttention,
    SigLIPBlock,
    SigLIPConfig,
    TileAligner,
    TileConfig,
    attention,
    fast_attention,
    random_parameter,
)


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention. Defaults: DeepSeek-VL2 small and base."""

    q_lora_rank: int | None = None  # None: queries straight from the token
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts. Defaults: DeepSeek-VL2 small."""

    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1  # so many layers at the start have a plain SwiGLU
    moe_layer_freq: int = 1  # after those, the layers whose index is a multiple of this have experts
    topk_method: str = "greedy"  # or "group_limited_greedy", or "noaux_tc"
    scoring_func: str = "softmax"  # or "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class YarnConfig:
    """YaRN, which none of the released models sets: rope stretched to `factor` times the context it was trained for."""

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the decoder, by the names that config.json uses. Defaults: DeepSeek-VL 7B."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    latent: LatentConfig | None = None  # None: plain attention
    experts: ExpertsConfig | None = None  # None: a plain SwiGLU in every layer
    yarn: YarnConfig | None = None

    @property
    def rope_dim(self) -> int:
        """How many values of a head's queries and keys are rotated."""
        return self.latent.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def cached(self) -> list[tuple[int, int]]:
        """What each layer caches for each token: (heads, width) of each tensor."""
        if self.latent:
            return [(1, self.latent.kv_lora_rank + self.latent.qk_rope_head_dim)]
        return [(self.num_key_value_heads, self.head_dim)] * 2

    def has_experts(self, layer: int) -> bool:
        e = self.experts
        return e is not None and layer >= e.first_k_dense_replace and layer % e.moe_layer_freq == 0


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: vision, language, and the token ids that mean something to it."""

    vision: SigLIPConfig | HybridConfig
    language: LanguageConfig
    tiles: TileConfig | None = None  # DeepSeek-VL2's layout of tiles; None: DeepSeek-VL
    image_token_id: int | None = None  # stands where an image token goes
    end_token_ids: tuple[int, ...] = ()  # generation stops after any of them


# The released models. Fields that are not given have the dataclasses' defaults.
SIGLIP_SO400M = SigLIPConfig(patch_size=14, width=1152, layers=27, heads=16, mlp_width=4304, gelu="tanh")
MODELS = {
    "deepseek-vl-1.3b": ModelConfig(
        vision=SigLIPConfig(),
        language=LanguageConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16,
        ),
    ),
    "deepseek-vl-7b": ModelConfig(vision=HybridConfig(), language=LanguageConfig()),
    "deepseek-vl2-tiny": ModelConfig(
        vision=SIGLIP_SO400M,
        tiles=TileConfig(),
        language=LanguageConfig(
            vocab_size=129280, hidden_size=1280, intermediate_size=6848, num_hidden_layers=12, num_attention_heads=10,
            num_key_value_heads=10, max_position_embeddings=4096, experts=ExpertsConfig(moe_intermediate_size=896),
        ),
    ),
    "deepseek-vl2-small": ModelConfig(
        vision=SIGLIP_SO400M,
        tiles=TileConfig(),
        language=LanguageConfig(
            hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=4096, latent=LatentConfig(), experts=ExpertsConfig(),
        ),
    ),
    "deepseek-vl2": ModelConfig(  # base
        vision=SIGLIP_SO400M,
        tiles=TileConfig(),
        language=LanguageConfig(
            vocab_size=129280, hidden_size=2560, intermediate_size=12288, max_position_embeddings=4096,
            head_dim=80,  # 2560 / 32, as the config reader computes it; latent attention does not read it
            latent=LatentConfig(),
            experts=ExpertsConfig(
                n_routed_experts=72, moe_intermediate_size=1536, topk_method="noaux_tc", scoring_func="sigmoid",
                norm_topk_prob=True, routed_scaling_factor=2.0,
            ),
        ),
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------- normalization


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean is subtracted, no bias added. (Torch computes in float32.)"""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---------------------------------------------------------------------------- positions


def rope_angles(position_ids: Tensor, config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation (RoFormer, section 3.2.2).

    Pair i of a head's d values turns by position * theta ** (-2 i / d): the first pairs fast,
    the last ones slowly. Angles are float32: bfloat16 cannot tell position 257 from 256.

    Args:
        position_ids: (B, T) integers.
    Returns: cos and sin, float32 (B, 1, T, d / 2); the 1 stands for the heads.
    """
    d = config.rope_dim
    pairs = torch.arange(0, d, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (pairs / d)
    length = 1.0
    if yarn := config.yarn:
        frequencies = yarn_frequencies(frequencies, config)
        length = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, d / 2)
    return angles.cos() * length, angles.sin() * length


def yarn_frequencies(frequencies: Tensor, config: LanguageConfig) -> Tensor:
    """Slow rotations divided by the factor, fast ones kept, a ramp between (YaRN, section 3.2).

    A pair that turns more than beta_fast times within the original context says where a token is
    relative to its neighbours, and stays; one that turns less than beta_slow times would meet
    angles it was never trained on, and is slowed down.
    """
    yarn, d = config.yarn, config.rope_dim

    def pair_that_turns(times: float) -> float:
        inverse_frequency = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return d * math.log(inverse_frequency) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), d - 1)
    slowed = ((torch.arange(d // 2, device=frequencies.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much attention is sharpened for a context `factor` times as long (YaRN, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


Rope = tuple[Tensor, Tensor]  # cosines and sines, (B, 1, T, d / 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle: the half-split layout.

    Args:
        x: (B, H, T, d); cos, sin: (B, 1, T, d / 2), of x's dtype.
    Returns: (B, H, T, d).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def half_split(x: Tensor) -> Tensor:
    """Reorder pairs stored side by side, (a0, b0, a1, b1, ...), to (a0, a1, ..., b0, b1, ...) for `rotate`."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count from the first real token, so left padding does not shift a text.

    Args:
        attention_mask: (B, S), 1 for real tokens and 0 for padding.
    Returns: (B, S) int64; what padding gets (on the left 0) does not matter, since no real token sees it.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def padded_bias(real: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention that does not see padding, as a bias for the scores.

    A padding token sees itself: a row that sees nothing has no softmax.

    Args:
        real: bool (B, S), which keys are tokens; places: (T,), where among the keys the queries stand.
    Returns: (B, 1, T, S), 0 where a query sees a key and minus infinity elsewhere.
    """
    keys, queries = torch.arange(real.shape[1], device=real.device), places[:, None]
    visible = (keys <= queries) & real[:, None] | (keys == queries)  # (B, T, S)
    return torch.zeros(visible.shape, dtype=dtype, device=real.device).masked_fill(~visible, -torch.inf)[:, None]


# ---------------------------------------------------------------------------- KV cache


class LayerCache:
    """One layer's part of a `KVCache`: tensors (B, G, capacity, d), written in place."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.places: slice | Tensor = slice(0)  # where the tokens fed now go: `KVCache.reserve` says it
        self.seen = 0  # how many places they attend to

    def append(self, *new: Tensor) -> list[Tensor]:
        """Write the tokens fed now, (B, G, T, d); return views of all to attend to, (B, G, S, d)."""
        for stored, tensor in zip(self.tensors, new):
            stored[:, :, self.places] = tensor
        return [stored[:, :, : self.seen] for stored in self.tensors]


class KVCache:
    """What attention needs of the tokens already fed, and which of them are padding.

    Plain attention: their rotated keys, and their values, (B, G, capacity, d) each. Latent
    attention: their latent and one rotated key, side by side, (B, 1, capacity, R + rope).

    Memory for `capacity` tokens is taken once, so no step copies what is there. The next token goes to
    place `length`, in every row of the batch: shorter rows are padded on the left. A smaller `length`
    forgets the tokens behind it. The 7B caches 30 layers x 2 x 32 heads x 128 = 245,760 values a
    token, VL2 small 27 x 576 = 15,552.

    With `fixed_shape`, a step of one token attends to all places, and a bias hides those not yet
    written. Then nothing but values changes from step to step, as compiled code needs it.
    """

    def __init__(
        self, config: LanguageConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device,
        fixed_shape: bool = False,
    ):  # fmt: skip
        self.capacity, self.length, self.fixed_shape = capacity, 0, fixed_shape
        self.real = torch.zeros(batch_size, capacity, dtype=torch.bool, device=device)  # tokens that are no padding
        self.has_padding = False
        sizes = [(batch_size, heads, capacity, width) for heads, width in config.cached]
        layers = range(config.num_hidden_layers)
        self.layers = [LayerCache([torch.zeros(size, dtype=dtype, device=device) for size in sizes]) for _ in layers]

    def reserve(self, rows: int, T: int, real: Tensor | None) -> Tensor | None:
        """Make room for T tokens a row. `length` moves when the decoder has fed them.

        Args:
            real: bool (rows, T), False for padding; None where nothing is.
        Returns: bool (B, S), which of the keys to attend to are tokens; None where all are.
        Raises: ValueError where the tokens do not fit, or are of another number of rows.
        """
        end = self.length + T
        if rows != len(self.real):
            raise ValueError(f"the cache holds {len(self.real)} conversations, {rows} were fed")
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were fed")
        self.real[:, self.length : end] = True if real is None else real
        self.has_padding |= real is not None
        fixed = self.fixed_shape and T == 1
        places = torch.arange(self.length, end, device=self.real.device) if fixed else slice(self.length, end)
        for layer in self.layers:
            layer.places, layer.seen = places, self.capacity if fixed else end
        return self.real[:, : self.capacity if fixed else end] if fixed or self.has_padding else None

    def enlarge(self, capacity: int, n: int = 1) -> None:
        """Make room for `capacity` tokens a row, and put n copies of each row in its place; what is there stays."""
        more = max(0, (-(-capacity // 256) * 256 if self.fixed_shape else capacity) - self.capacity)
        self.capacity += more
        self.real = F.pad(self.real.repeat_interleave(n, dim=0), (0, more))
        for layer in self.layers if more or n > 1 else ():
            layer.tensors = [F.pad(t.repeat_interleave(n, dim=0), (0, 0, 0, more)) for t in layer.tensors]


# ---------------------------------------------------------------------------- decoder


def softmax_scale(head_dim: int, config: LanguageConfig) -> float:
    """1 / sqrt(d), which keeps the scores' variance at one; times mscale squared under YaRN."""
    mscale = yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) if config.yarn else 1.0
    return head_dim**-0.5 * mscale**2


class Attention(nn.Module):
    """Causal self-attention with RoPE and grouped key/value heads."""

    attend = staticmethod(attention)  # DeepseekVL installs fast_attention

    def __init__(self, config: LanguageConfig):
        super().__init__()
        D, H, G, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.head_dim, self.scale = H, d, softmax_scale(d, config)
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, G * d, bias=False)
        self.v_proj = nn.Linear(D, G * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def forward(self, x: Tensor, rope: Rope, bias: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """
        Args:
            x: (B, T, D); rope: cos and sin, (B, 1, T, d / 2), of x's dtype.
            bias: (B, 1, T, S), see `padded_bias`; None where nothing is padding: attention is causal.
        Returns: (B, T, D).
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, d), then (B, G, T, d) twice
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, d)
        out = self.attend(q, k, v, bias, causal=bias is None, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


LATENT_NORM_EPS = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps a config gives the others


class LatentAttention(nn.Module):
    """Multi-head latent attention: cache one small latent for each token, not keys and values for each head.

    (DeepSeek-V2, section 2.1.) A token's keys and values are all made from one latent c of R values:
    per head, k = W_k c and v = W_v c. Rotation by position does not commute with W_k, so position is
    told by extra values: each head's query has a rotated part, and one rotated key serves all heads.

        score(query, token) = (q_nope . W_k c + q_rope . k_rope) * scale

    Two ways to compute it, equal but for rounding:
        expanded   make k and v of every token, then attend as usual: few operations for many queries
        absorbed   q_nope . W_k c = (W_k^T q_nope) . c, so carry the query into the latent space, attend
                   to the cache as it lies, and carry the result out with W_v: a decode step reads
                   R + rope values a token, not H (nope + v)
    """

    attend = staticmethod(attention)  # DeepseekVL installs fast_attention

    def __init__(self, config: LanguageConfig):
        super().__init__()
        sizes, D, H = config.latent, config.hidden_size, config.num_attention_heads
        query_dim = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        self.heads, self.config, self.scale = H, sizes, softmax_scale(query_dim, config)
        if sizes.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * query_dim, bias=False)
        else:  # queries through a latent of their own, which saves parameters
            self.q_a_proj = nn.Linear(D, sizes.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(sizes.q_lora_rank, H * query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, LATENT_NORM_EPS)
        kv_width = H * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        self.kv_b_proj = nn.Linear(sizes.kv_lora_rank, kv_width, bias=False)  # W_k and W_v of every head
        self.o_proj = nn.Linear(H * sizes.v_head_dim, D, bias=False)

    def forward(self, x: Tensor, rope: Rope, bias: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """As `Attention.forward`; rope turns qk_rope_head_dim of a head's values, so it is (B, 1, T, rope / 2)."""
        sizes = self.config
        q = self.q_proj(x) if sizes.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, nope + rope)
        q_nope, q_rope = q.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), dim=-1)
        q_rope = rotate(half_split(q_rope), *rope)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # (B, 1, T, R): one "head" for all
        k_rope = rotate(half_split(k_rope[:, None]), *rope)  # (B, 1, T, rope)
        stored = torch.cat((latent, k_rope), dim=-1)
        if cache is not None:
            (stored,) = cache.append(stored)  # (B, 1, S, R + rope)

        form = self.absorbed if self.absorbed_is_cheaper(x.shape[1], stored.shape[2]) else self.expanded
        return self.o_proj(form(q_nope, q_rope, stored, bias).transpose(1, 2).flatten(2))

    def absorbed_is_cheaper(self, T: int, S: int) -> bool:
        """Whether `absorbed` multiplies less than `expanded`, for T queries and S tokens to attend to.

        Multiplications a head:                expanded               absorbed
            into and out of the latent space   S R (nope + v)         T R (nope + v)
            attention                          T S (nope + rope + v)  T S (2 R + rope)

        So a decode step is absorbed, and a prompt expanded. (The zeros that pad v are not counted.) Never absorbed
        is a `kv_b_proj` of another class, as LoRA puts in its place: that must be called, not read.
        """
        R, nope_and_v = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        return type(self.kv_b_proj) is nn.Linear and T * S * (2 * R - nope_and_v) < (S - T) * R * nope_and_v

    def expanded(self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        """The plain formula: keys and values of every head from the latents.

        Args:
            q_nope, q_rope: (B, H, T, nope or rope); stored: (B, 1, S, R + rope); bias: (B, 1, T, S) or None.
        Returns: (B, H, T, v).
        """
        sizes = self.config
        latent, k_rope = stored.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split((sizes.qk_nope_head_dim, sizes.v_head_dim), dim=-1)  # (B, H, S, nope or v)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)
        v = F.pad(v, (0, max(0, q.shape[-1] - sizes.v_head_dim)))  # fused kernels want one width for all
        return self.attend(q, k, v, bias, causal=bias is None, scale=self.scale)[..., : sizes.v_head_dim]

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        """The same in the latent space. Args and result: as `expanded`."""
        sizes = self.config
        W = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # (H, nope + v, R)
        W_k, W_v = W.split((sizes.qk_nope_head_dim, sizes.v_head_dim), dim=1)
        q = torch.cat((q_nope @ W_k, q_rope), dim=-1)  # (B, H, T, R + rope)
        out = self.attend(q, stored, stored, bias, causal=bias is None, scale=self.scale)
        return out[..., : sizes.kv_lora_rank] @ W_v.transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the gate decides how much of each hidden value passes."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses the experts of each token, and how much each counts; all in float32.

    (DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2.)
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config.experts
        self.weight = random_parameter(self.config.n_routed_experts, config.hidden_size)
        if self.config.topk_method == "noaux_tc":  # above zero for experts that got too few tokens
            self.e_score_correction_bias = nn.Parameter(torch.zeros(self.config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (tokens, D).
        Returns: the chosen experts (tokens, K) int64, and their weights (tokens, K) float32.
        """
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (tokens, E)
        scores = logits.softmax(dim=-1) if c.scoring_func == "softmax" else logits.sigmoid()  # (tokens, E)
        # The bias steers the choice, not the weights.
        preference = scores + self.e_score_correction_bias.float() if c.topk_method == "noaux_tc" else scores
        if c.topk_method != "greedy":
            preference = self.within_best_groups(preference)
        experts = preference.topk(c.num_experts_per_tok, dim=-1).indices  # (tokens, K)
        weights = scores.gather(-1, experts)
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor

    def within_best_groups(self, preference: Tensor) -> Tensor:
        """Experts stand in groups (one in all released models); outside the best groups they get 0.

        A group is as good as its best expert, or under noaux_tc as its best two together. The others'
        scores become 0, not minus infinity, as in the original, though a score plus its bias may be less.
        """
        c = self.config
        grouped = preference.unflatten(-1, (c.n_group, -1))  # (tokens, groups, E / groups)
        best = 2 if c.topk_method == "noaux_tc" else 1
        goodness = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        chosen = goodness.topk(c.topk_group, dim=-1).indices
        keep = torch.zeros_like(goodness, dtype=torch.bool).scatter(-1, chosen, True)
        return grouped.masked_fill(~keep[..., None], 0.0).flatten(-2)


class MixtureOfExperts(nn.Module):
    """Shared experts (if any) for every token, plus the K routed ones that the router chose for it.

    y = shared(x) + sum over chosen e of weight_e * expert_e(x)
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        D, e = config.hidden_size, config.experts
        self.gate = Router(config)
        self.experts = nn.ModuleList(SwiGLU(D, e.moe_intermediate_size) for _ in range(e.n_routed_experts))
        shared = e.n_shared_experts * e.moe_intermediate_size
        self.shared_experts = SwiGLU(D, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        routed = self.mix(x.flatten(0, 1), *self.gate(x.flatten(0, 1))).to(x.dtype).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def mix(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sort by expert, so that each runs once, over all its tokens; add its results to their sums.

        Experts that nobody chose are not touched: a decode step of one conversation reads K of them.

        Args:
            tokens: (tokens, D); experts, weights: (tokens, K).
        Returns: (tokens, D), in float32 or wider.
        """
        chosen, order = experts.flatten().sort(stable=True)  # pairs of token and expert, by expert
        rows = order // experts.shape[-1]  # (tokens * K,): which token each pair is of
        weights = weights.flatten()[order, None]  # (tokens * K, 1)
        out = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))
        start = 0
        for expert, count in zip(*(t.tolist() for t in chosen.unique_consecutive(return_counts=True))):
            pairs = slice(start, start + count)
            result = self.experts[expert](tokens[rows[pairs]]) * weights[pairs]
            out.index_add_(0, rows[pairs], result.to(out.dtype))
            start += count
        return out


class DecoderLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.latent else Attention)(config)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.has_experts(layer) else SwiGLU(D, config.intermediate_size)

    def forward(self, x: Tensor, rope: Rope, bias: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); arguments as of `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model from embeddings to the last normalized hidden state."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        weight = random_parameter(config.vocab_size, config.hidden_size)  # nn.Embedding's own draw is wider
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, position_ids: Tensor, bias: Tensor | None = None, caches: Sequence[LayerCache] | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, T, D) embeddings; position_ids: (B, T); bias: see `padded_bias`; caches: one a layer.
        Returns: (B, T, D).
        """
        cos, sin = rope_angles(position_ids, self.config)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, bias, None if caches is None else caches[i])
        return self.norm(x)


# ---------------------------------------------------------------------------- the whole model


@dataclass
class Output:
    """What a forward pass gives; `record` tells what happens inside.

    logits (B, T or logits_to_keep, vocabulary); loss, a scalar, where labels were given.
    """

    logits: Tensor
    loss: Tensor | None = None


def check_shape(name: str, tensor: Tensor | None, *shape: int | str) -> None:
    """Raise ValueError for another shape, or none at all; a text stands for any size."""
    found = None if tensor is None else list(tensor.shape)
    if found is None or len(found) != len(shape) or any(n not in (size, str(n)) for n, size in zip(shape, found)):
        raise ValueError(f"{name} has shape {found}, expected [{', '.join(map(str, shape))}]")


def check_ids(name: str, ids: Tensor, vocabulary: int, *shape: int | str) -> None:
    """Raise ValueError for anything but integers of this shape, from 0 to vocabulary - 1."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is a {type(ids).__name__} {getattr(ids, 'dtype', '')}, expected a Tensor torch.int64")
    check_shape(name, ids, *shape)
    if ((ids < 0) | (ids >= vocabulary)).any():
        reach = f"reach from {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}"
        raise ValueError(f"{name} {reach}; does the tokenizer fit?")


class DeepseekVL(nn.Module):
    """DeepSeek-VL and DeepSeek-VL2: a vision tower, an aligner, a decoder and its head."""

    fixed_shape_steps = False  # see `KVCache`

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        vision, D = config.vision, config.language.hidden_size
        if isinstance(vision, HybridConfig):
            self.vision = HybridTower(vision)
            self.aligner = HybridAligner(vision.high.downsample_channels[-1], vision.low.width, D)
        else:
            self.vision = SigLIP(vision)
            self.aligner = TileAligner(config.tiles, vision.width, D) if config.tiles else MLPAligner(vision.width, D)
        self.language = Decoder(config.language)
        self.lm_head = nn.Linear(D, config.language.vocab_size, bias=False)
        if config.language.tie_word_embeddings:
            self.lm_head.weight = self.language.embed_tokens.weight
        for module in self.modules():
            if isinstance(module, (SigLIPAttention, Attention, LatentAttention)):
                module.attend = fast_attention  # instead of the equation, `attention`; SAM cuts its own work in blocks

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in: the dtype of its first matrix, or of a norm where no matrix is a parameter."""
        return max(self.language.layers[0].parameters(), key=Tensor.dim).dtype

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of the model's dtype, on its device."""
        capacity = -(-capacity // 256) * 256 if self.fixed_shape_steps else capacity  # so that few sizes are compiled
        return KVCache(self.config.language, batch_size, capacity, self.dtype, self.device, self.fixed_shape_steps)

    def encode_images(
        self, pixel_values: Tensor | None, high_res_pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Pixels -> features in the language model's width.

        Args:
            pixel_values: (images, 3, size, size). For a hybrid tower either in [0, 1] at the high
                resolution, as the official processor gives them, or normalized at the low one, beside
                `high_res_pixel_values`, as transformers' processor does. For DeepSeek-VL2 the tiles of
                all images, and `images_spatial_crop` (images, 2), tiles wide and high.
        Returns: one (N, D) tensor for each image, in the order of the batch; none where there are no pixels.
        Raises: ValueError for pixels of another size, and tiles that do not fit images_spatial_crop.
        """
        if pixel_values is None or not len(pixel_values):
            return []
        pixels, high_pixels, sizes = pixel_values.to(self.device), high_res_pixel_values, self.config.vision
        dtype, then = (next((p.dtype for p in part.parameters()), self.dtype) for part in (self.vision, self.aligner))
        if isinstance(self.vision, HybridTower):
            if high_pixels is None:
                check_shape("pixel_values", pixels, "images", 3, sizes.high.image_size, sizes.high.image_size)
                high_pixels, pixels = self.vision.split(pixels)
            check_shape("high_res_pixel_values", high_pixels, "images", 3, sizes.high.image_size, sizes.high.image_size)
            check_shape("pixel_values", pixels, len(high_pixels), 3, sizes.low.image_size, sizes.low.image_size)
            high, low = self.vision(high_pixels.to(self.device, dtype), pixels.to(dtype))
            return list(self.aligner(high.to(then), low.to(then)))
        check_shape("pixel_values", pixels, "images", 3, sizes.image_size, sizes.image_size)
        tokens = self.vision(pixels.to(dtype)).to(then)
        if isinstance(self.aligner, TileAligner):
            check_shape("images_spatial_crop", images_spatial_crop, "images", 2)
            return self.aligner(tokens, images_spatial_crop)
        return list(self.aligner(tokens))

    def image_places(self, ids: Tensor) -> Tensor:
        """Where the image token stands among ids: bool, of their shape. Nowhere, if the config names none."""
        return ids == (-1 if self.config.image_token_id is None else self.config.image_token_id)

    def embed(
        self, input_ids: Tensor, features: Sequence[Tensor] = (), images_seq_mask: Tensor | None = None
    ) -> Tensor:
        """Token embeddings, with image features in place of the image tokens.

        Args:
            input_ids: (B, T); features: as `encode_images` returns them.
            images_seq_mask: bool (B, T), where features go, in reading order over the batch; by
                default wherever the image token stands.
        Returns: (B, T, D).
        Raises: ValueError for ids beyond the vocabulary, and where places and features differ in number.
        """
        check_ids("input_ids", input_ids, self.config.language.vocab_size, "B", "T")
        input_ids = input_ids.to(self.device)
        embeddings = self.language.embed_tokens(input_ids)
        mask = self.image_places(input_ids) if images_seq_mask is None else images_seq_mask
        check_shape("images_seq_mask", mask, *input_ids.shape)
        places, count, id = int(mask.sum()), sum(map(len, features)), self.config.image_token_id
        if places != count:
            found = f"{count} image features" if count else "no pixel_values"
            raise ValueError(f"{found} for {places} image tokens (id {id}); does processor_config.json fit?")
        joined = torch.cat([embeddings.new_empty(0, embeddings.shape[-1]), *features]).to(embeddings)
        return embeddings.masked_scatter(mask.to(self.device, torch.bool)[..., None], joined)

    def forward(
        self,
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None, images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None, *, inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None, cache: KVCache | None = None, labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Output:  # fmt: skip
        """One pass over T tokens, after those already in `cache`.

        Args:
            input_ids: (B, T), with the pictures that `encode_images` takes; or
            inputs_embeds: (B, T, D) in their place.
            attention_mask: (B, T), 1 for real tokens, 0 for padding, which goes on the left. None
                where nothing is padding. A cache remembers the padding of the tokens before.
            position_ids: (B, T); by default counted from each row's first real token.
            labels: (B, T), what each token should have been predicted as by the one before
                it; -100 is ignored. The loss is the mean over the others, and 0 where there are none.
            logits_to_keep: compute logits only for that many tokens at the end; 0 for all.
        Raises: ValueError for both or neither of input_ids and inputs_embeds, for pixels beside the latter,
            for a mask, positions or labels of another shape than the tokens, for ids beyond the vocabulary,
            and for labels without all logits.
        """
        if (input_ids is None) == (inputs_embeds is None) or not (inputs_embeds is None or pixel_values is None):
            raise ValueError("give either input_ids or inputs_embeds, which take no pixel_values")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need all logits: logits_to_keep must be 0")
        if inputs_embeds is None:
            features = self.encode_images(pixel_values, high_res_pixel_values, images_spatial_crop)
            inputs_embeds = self.embed(input_ids, features, images_seq_mask)
        x = inputs_embeds.to(self.device, self.dtype)
        check_shape("inputs_embeds", x, "B", "T", self.config.language.hidden_size)
        B, T = x.shape[:2]
        for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if given is not None:
                check_shape(name, given, B, T)
        if labels is not None:
            check_ids("labels", labels.masked_fill(labels == -100, 0), self.config.language.vocab_size, B, T)
        real = None if attention_mask is None or attention_mask.all() else attention_mask.to(self.device).bool()
        places = torch.arange(T, device=self.device)
        if cache is not None:
            places = places + cache.length
            real = cache.reserve(B, T, real)  # (B, S)
        if position_ids is None:
            position_ids = places[None] if real is None else positions_from_mask(real)[:, places]
        bias = None if real is None else padded_bias(real, places, x.dtype)
        x = self.language(x, position_ids.to(self.device), bias, cache and cache.layers)
        if cache is not None:
            cache.length += T
        x = x[:, -logits_to_keep:].to(next(self.lm_head.parameters(), x).dtype)  # [-0:] is all of them
        logits, loss = self.lm_head(x), None
        if labels is not None:
            predicted, expected = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(self.device, torch.int64)
            loss = F.cross_entropy(predicted.float(), expected, reduction="sum") / (expected >= 0).sum().clamp(min=1)
        return Output(logits, loss)


# ---------------------------------------------------------------------------- what happens inside

RECORDED = (SigLIPBlock, SigLIP, SAMBlock, SAM, MLPAligner, HybridAligner, TileAligner, DecoderLayer, Decoder, Router)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect what the parts of `model` compute while the `with` block runs.

    Yields a dict that each forward pass fills anew:
        "vision.blocks.0", "vision" (7B: "vision.high", "vision.low"), "aligner", "language.layers.3", "language":
            the output of each of RECORDED; of a decoder the normalized last hidden state, of a router experts
            and weights
        "language.embeddings": what the decoder was given, (B, T, D)
        "language.layers.3.self_attn", "vision.blocks.0.attn": the weights of every attention, (B, H, T, S); in SAM's
            windowed layers B counts windows
    Every attention's weights are computed beside it, so a record takes time and memory.
    """
    recorded: dict[str, Any] = {}

    def watch(name: str, module: nn.Module, usual: Callable) -> None:
        blocks: list[Tensor] = []  # SAM attends to one head and a few queries at a time

        def attend(q: Tensor, k: Tensor, v: Tensor, *args, **options) -> Tensor:
            identity = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
            blocks.append(attention(q, k, identity, *args, **options))  # the weights times 1
            return usual(q, k, v, *args, **options)

        def finish(*_) -> None:
            recorded[name] = torch.cat(blocks, dim=2).view(len(blocks[0]), module.heads, -1, blocks[0].shape[-1])
            blocks.clear()

        module.attend = attend
        stack.callback(setattr, module, "attend", usual)
        stack.enter_context(module.register_forward_hook(finish))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "attend"):
                watch(name, module, module.attend)
            elif isinstance(module, RECORDED):
                keep = lambda _, inputs, out, name=name: recorded.update({name: out})  # noqa: E731
                stack.enter_context(module.register_forward_hook(keep))
            if isinstance(module, Decoder):
                keep = lambda _, inputs, name=name: recorded.update({f"{name}.embeddings".lstrip("."): inputs[0]})  # noqa: E731
                stack.enter_context(module.register_forward_pre_hook(keep))
        yield recorded
