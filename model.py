"""The language model of DeepSeek-VL, and `DeepseekVL`, which lets it see.

Read top to bottom, each part is met just before it is used (but for `products` and what is packed, which come last):

    configs, RMSNorm, positions (RoPE, padding, who sees whom), KV cache (of fixed shape for compiled steps),
    Attention, and LatentAttention in its place (DeepSeek-VL2 small and base),
    SwiGLU, and MixtureOfExperts in its place (DeepSeek-VL2, all layers but the first),
    DecoderLayer, Decoder,
    DeepseekVL: image features in place of image tokens, one decoder over all,
    QuantizedLinear: weights in 8 or 4 bits,
    PackedLinear, PackedQuantizedLinear: the same weights in the order in which the machine reads them fastest
    (brought there through a Workspace).

    input_ids (B, T) -> embeddings (B, T, D)  <- image features (images, N, D) at the placeholders
                     -> layers of attention and SwiGLU (B, T, D) -> logits (B, T, vocabulary)

Shape letters:

    B  batch (conversations)     T  tokens fed now   S  tokens fed so far, cached ones included
    D  width of a token          H  query heads      d  width of a head
    N  tokens of an image        G  key/value heads, H / G queries share one (G = H: no sharing)
    E  routed experts            k  of them a token uses
    R  width of the latent that latent attention caches; nope, rope and v: widths of the parts of
       its heads that are not rotated, that are rotated, and of its values

The five models (the rest of the language configs is in the dataclasses' defaults or derived):

                 layers     D   H   MLP    vocabulary  attention             experts
    1.3B           24    2048  16   5632     102400    plain, d = 128        none
    7B             30    4096  32  11008     102400    plain, d = 128        none
    VL2 tiny       12    1280  10   6848     129280    plain, d = 128        64 of width 896, softmax
    VL2 small      27    2048  16  10944     102400    latent, R = 512       64 of width 1408, softmax
    VL2 base       30    2560  32  12288     129280    latent, R = 512       72 of width 1536, sigmoid

Papers: DeepSeek-VL (arXiv 2403.05525), DeepSeek-VL2 (2412.10302), Llama (2302.13971), RoFormer
(2104.09864) for RoPE, GQA (2305.13245), DeepSeek-V2 (2405.04434) for latent attention and experts,
DeepSeek-V3 (2412.19437) for sigmoid routing, YaRN (2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision import (
    HybridAligner,
    HybridConfig,
    HybridTower,
    MLPAligner,
    SigLIP,
    SigLIPConfig,
    TileAligner,
    TileConfig,
    attention,
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
    """YaRN: rope stretched to `factor` times the context it was trained for."""

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
    """A whole model: eyes, language, and the two token ids that mean something to it."""

    vision: SigLIPConfig | HybridConfig
    language: LanguageConfig
    tiles: TileConfig | None = None  # DeepSeek-VL2's layout of tiles; None: DeepSeek-VL
    image_token_id: int | None = None  # stands where an image token goes
    end_token_ids: tuple[int, ...] = ()  # generation stops after any of them


# ---------------------------------------------------------------------------- normalization


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a learned weight; no mean, no bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same; the fused form of `equation`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def equation(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, the division in float32 whatever the dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


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
    if config.yarn is not None:
        frequencies = yarn_frequencies(frequencies, config)
        length = yarn_mscale(config.yarn.factor, config.yarn.mscale)
        length /= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim)
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
        return (
            d
            * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), d - 1)
    ramp = (torch.arange(d // 2, device=frequencies.device) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much attention is sharpened for a context `factor` times as long (YaRN, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


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
    Returns: (B, S) int64; padding gets 0, which does not matter, since no real token sees it.
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def visible_keys(T: int, S: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of S keys each of the last T tokens may attend to.

    A token sees itself and what came before it, except padding. (A padding token sees itself
    too: a row that sees nothing has no softmax.)

    Args:
        attention_mask: (B, S), 1 for real tokens, or None where nothing is padding.
    Returns: bool (B or 1, 1, T, S); None where plain causal attention says it all.
    """
    if attention_mask is None and (T == 1 or T == S):
        return None
    key = torch.arange(S, device=device)
    query = key[S - T :, None]
    visible = (key <= query)[None, None]
    if attention_mask is not None:
        visible = (visible & attention_mask.bool()[:, None, None, :]) | (key == query)
    return visible


# ---------------------------------------------------------------------------- KV cache


class KVCache:
    """What attention needs of the tokens already fed.

    Plain attention: their rotated keys, and their values, (B, G, capacity, d) each. Latent
    attention: their latent and one rotated key, side by side, (B, 1, capacity, R + rope).

    Memory for `capacity` tokens is taken once; tokens are then written in place, so no step
    copies what is there. Position `length` is where the next token goes, for every row of the
    batch alike: rows of different lengths are padded on the left, and the padding is masked.
    """

    def __init__(
        self, config: LanguageConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.capacity = capacity
        self.length = 0
        self.layers = [
            [
                torch.empty(batch_size, heads, capacity, width, dtype=dtype, device=device)
                for heads, width in config.cached
            ]
            for _ in range(config.num_hidden_layers)
        ]

    def append(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Write one layer's new tensors (B, G, T, d); return views of all so far, (B, G, S, d).

        `length` moves only in `advance`, once all layers have written.

        Raises: ValueError where the tokens do not fit, or are of another number of rows.
        """
        end, rows = self.length + new[0].shape[2], len(self.layers[layer][0])
        if len(new[0]) != rows:
            raise ValueError(f"the cache holds {rows} conversations, {len(new[0])} were fed")
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} were fed")
        for stored, tensor in zip(self.layers[layer], new):
            stored[:, :, self.length : end] = tensor
        return [stored[:, :, :end] for stored in self.layers[layer]]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def clear_rest(self) -> None:
        """Zeros beyond `length`: a step of fixed shape reads there too, and what a mask hides must not be NaN."""
        for stored in (stored for layer in self.layers for stored in layer):
            stored[:, :, self.length :].zero_()


class FixedShapeCache:
    """The tensors of a KVCache, for decode steps whose shapes never change, as compiled code wants them.

    A step writes at `position`, a tensor, so no number in the code changes from step to step. It gets back all of the
    capacity, and `visible` hides what lies beyond the position.
    """

    def __init__(self, layers: list[list[Tensor]], position: Tensor):
        self.layers = layers
        self.position = position  # (1,) int64

    def append(self, layer: int, *new: Tensor) -> list[Tensor]:
        """As `KVCache.append`, for one token a row: (B, G, 1, d) in, (B, G, capacity, d) out."""
        for stored, tensor in zip(self.layers[layer], new):
            stored.index_copy_(2, self.position, tensor)
        return self.layers[layer]

    def advance(self, tokens: int) -> None:
        """Nothing: the caller passes each step its position."""


# ---------------------------------------------------------------------------- decoder


def softmax_scale(head_dim: int, config: LanguageConfig) -> float:
    """1 / sqrt(d), which keeps the scores' variance at one; times mscale squared under YaRN."""
    mscale = yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) if config.yarn else 1.0
    return head_dim**-0.5 * mscale**2


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, want_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The last T tokens attend to all S: fused, or written out where the weights are wanted, or where T is 1
    on a CPU and no gradient is wanted.

    Args:
        q: (B, H, T, d); k, v: (B, G, S, d); visible: see `visible_keys`.
    Returns: (B, H, T, d), and the weights (B, H, T, S) or None.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if not want_weights:
        if T == 1 and q.device.type == "cpu" and not any(t.requires_grad for t in (q, k, v)):
            return one_token_attention(q, k, v, visible, scale), None
        causal = visible is None and T > 1
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out, None
    if grouped:  # repeat each key/value head for the queries that share it
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return attention(q, k, v, minus_infinity_where_hidden(visible, q.dtype), scale)


def one_token_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """A decode step's attention on a CPU: written out in float32, three times as fast as fused on a Zen 4.

    Queries that share a key/value head are laid out as if they were tokens of it, so nothing is repeated.
    The keys of some heads are widened to float32, then their values in the same memory: so few heads that it
    stays in the CPU's caches. (Overwriting keys loses what gradients need: not for inputs that require them.)

    Args and result: as `causal_attention`, with T = 1.
    """
    B, H, _, d = q.shape
    G, S = k.shape[1:3]
    narrow, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    same = v is k  # in latent attention
    q, k, v = (q.to(dtype) * scale).view(B * G, H // G, d), k.flatten(0, 1), v.flatten(0, 1)
    hidden = None if visible is None else ~visible.expand(B, G, 1, S).flatten(0, 1)
    size = S * max(d, v.shape[-1])  # of a head
    heads = heads_at_a_time(B * G, size)
    memory = torch.empty(heads * size if k.dtype != dtype else 0, dtype=dtype, device=k.device)

    def widened(x: Tensor) -> Tensor:
        return x if x.dtype == dtype else memory[: x.numel()].view(x.shape).copy_(x)

    out = []
    for start, queries, keys, values in zip(range(0, B * G, heads), q.split(heads), k.split(heads), v.split(heads)):
        keys = widened(keys)
        scores = torch.bmm(queries, keys.transpose(1, 2))  # (heads, H / G, S)
        if hidden is not None:
            scores = scores.masked_fill(hidden[start : start + heads], -torch.inf)
        out.append(torch.bmm(scores.softmax(dim=-1), keys if same else widened(values)))
    return torch.cat(out).to(narrow).view(B, H, 1, -1)


def heads_at_a_time(heads: int, size: int) -> int:
    """How many heads, of `size` values each, to widen at a time: about 2 MiB of float32 for each of the CPU's cores.

    As many for every core, or one would read what another has in its cache; at least one. Compiled code does all at
    once: where no heads are shared, it widens as it multiplies.
    """
    if torch.compiler.is_compiling():
        return heads
    cores = torch.get_num_threads()
    parts = max(1, -(-heads * size // (cores * 2**19)))
    few = -(-heads // parts)
    return min(heads, few + -few % cores)


def minus_infinity_where_hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as a bias for the scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


class Attention(nn.Module):
    """Causal self-attention with RoPE and grouped key/value heads."""

    same_input = ("q_proj", "k_proj", "v_proj")  # see `products`

    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = softmax_scale(self.head_dim, config)
        D, q_width, kv_width = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(D, q_width, bias=False)
        self.k_proj = nn.Linear(D, kv_width, bias=False)
        self.v_proj = nn.Linear(D, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, D, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: KVCache | None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: (B, T, D); rope: cos and sin, (B, 1, T, d / 2); visible: see `visible_keys`.
        Returns: (B, T, D), and the weights (B, H, T, S) if wanted.
        """
        q, k, v = products(x, self.q_proj, self.k_proj, self.v_proj)
        q = self._split(q, self.heads)  # (B, H, T, d)
        k, v = self._split(k, self.kv_heads), self._split(v, self.kv_heads)  # (B, G, T, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, d)
        out, weights = causal_attention(q, k, v, visible, self.scale, want_weights)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * d) -> (B, heads, T, d)."""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


class HeadWeights(nn.Module):
    """W_k and W_v of every head, which make keys and values from a latent, stored as one matrix.

    Not an nn.Linear, because attention in the latent space needs the two apart, and unpacked.
    """

    def __init__(self, rank: int, heads: int, sizes: tuple[int, int]):
        super().__init__()
        self.heads, self.sizes = heads, sizes
        self.weight = random_parameter(heads * sum(sizes), rank)

    def parts(self) -> tuple[Tensor, Tensor]:
        """W_k (H, nope, R) and W_v (H, v, R)."""
        return self.weight.unflatten(0, (self.heads, -1)).split(self.sizes, dim=1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, S, R) -> keys (B, H, S, nope) and values (B, H, S, v)."""
        kv = F.linear(latent[:, 0], self.weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return kv.split(self.sizes, dim=-1)


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

    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        sizes, D = config.latent, config.hidden_size
        self.layer, self.heads, self.config = layer, config.num_attention_heads, sizes
        query_dim = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        self.scale = softmax_scale(query_dim, config)
        if sizes.q_lora_rank is None:
            self.q_proj = nn.Linear(D, self.heads * query_dim, bias=False)
        else:  # queries through a latent of their own, which saves parameters
            self.q_a_proj = nn.Linear(D, sizes.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(sizes.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(sizes.q_lora_rank, self.heads * query_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, sizes.kv_lora_rank + sizes.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = HeadWeights(sizes.kv_lora_rank, self.heads, (sizes.qk_nope_head_dim, sizes.v_head_dim))
        self.o_proj = nn.Linear(self.heads * sizes.v_head_dim, D, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: KVCache | None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention.forward`."""
        sizes = self.config
        if sizes.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, nope + rope)
        q_nope, q_rope = q.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), dim=-1)
        q_rope = rotate(half_split(q_rope), *rope)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # (B, 1, T, R): one "head" for all
        k_rope = rotate(half_split(k_rope[:, None]), *rope)  # (B, 1, T, rope)
        stored = torch.cat((latent, k_rope), dim=-1)
        if cache is not None:
            (stored,) = cache.append(self.layer, stored)  # (B, 1, S, R + rope)

        cheaper = self.absorbed_is_cheaper(x.shape[1], stored.shape[2])
        attend = self.absorbed if cheaper else self.expanded
        out, weights = attend(q_nope, q_rope, stored, visible, want_weights)  # (B, H, T, v)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def absorbed_is_cheaper(self, T: int, S: int) -> bool:
        """Whether `absorbed` multiplies less than `expanded`, for T queries and S tokens to attend to.

        Multiplications a head:                expanded               absorbed
            into and out of the latent space   S R (nope + v)         T R (nope + v)
            attention                          T S (nope + rope + v)  T S (2 R + rope)
        """
        R, nope_and_v = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        return T * S * (2 * R - nope_and_v) < (S - T) * R * nope_and_v

    def expanded(
        self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The plain formula: keys and values of every head from the latents.

        Args:
            q_nope, q_rope: (B, H, T, nope or rope); stored: (B, 1, S, R + rope).
        Returns: (B, H, T, v) and the weights, if wanted.
        """
        sizes = self.config
        latent, k_rope = stored.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), dim=-1)
        k_nope, v = self.kv_b_proj(latent)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)
        v = F.pad(v, (0, max(0, q.shape[-1] - sizes.v_head_dim)))  # fused kernels want one width for all
        out, weights = causal_attention(q, k, v, visible, self.scale, want_weights)
        return out[..., : sizes.v_head_dim], weights

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same in the latent space. Args and result: as `expanded`."""
        W_k, W_v = self.kv_b_proj.parts()
        q = torch.cat((q_nope @ W_k, q_rope), dim=-1)  # (B, H, T, R + rope)
        out, weights = causal_attention(q, stored, stored, visible, self.scale, want_weights)
        return out[..., : self.config.kv_lora_rank] @ W_v.transpose(1, 2), weights


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the gate decides how much of each hidden value passes."""

    same_input = ("gate_proj", "up_proj")  # see `products`

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        gate, up = products(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Router(nn.Module):
    """Chooses the experts of each token, and how much each counts; all in float32.

    (DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2.)
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config.experts
        self.weight = random_parameter(self.config.n_routed_experts, config.hidden_size)
        if self.config.topk_method == "noaux_tc":  # raises the scores of experts that got too few tokens
            self.e_score_correction_bias = nn.Parameter(torch.zeros(self.config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (tokens, D).
        Returns: the chosen experts (tokens, k) int64, and their weights (tokens, k) float32.
        """
        c = self.config
        logits = F.linear(x.float(), self.weight.float())  # (tokens, E)
        scores = logits.softmax(dim=-1) if c.scoring_func == "softmax" else logits.sigmoid()  # (tokens, E)
        preference = scores
        if c.topk_method == "noaux_tc":  # the bias steers the choice, not the weights
            preference = scores + self.e_score_correction_bias.float()
        if c.topk_method != "greedy":
            preference = self.within_best_groups(preference)
        experts = preference.topk(c.num_experts_per_tok, dim=-1).indices  # (tokens, k)
        weights = scores.gather(-1, experts)
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor

    def within_best_groups(self, preference: Tensor) -> Tensor:
        """Experts stand in groups, one for each device of a cluster; outside the best groups they get 0.

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
    """Shared experts (if any) for every token, plus the k routed ones that the router chose for it.

    y = shared(x) + sum over chosen e of weight_e * expert_e(x)
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        D, e = config.hidden_size, config.experts
        self.gate = Router(config)
        self.experts = nn.ModuleList(SwiGLU(D, e.moe_intermediate_size) for _ in range(e.n_routed_experts))
        self.shared_experts = None
        if e.n_shared_experts:
            self.shared_experts = SwiGLU(D, e.n_shared_experts * e.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Experts that nobody chose are not touched: a decode step of one conversation reads k of them.
        """
        tokens = x.flatten(0, 1)
        experts, weights = self.gate(tokens)  # (tokens, k) both
        mix = self.mix_for_one_token if len(tokens) == 1 else self.mix
        routed = mix(tokens, experts, weights).to(x.dtype).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    @torch.compiler.disable  # what runs depends on values, which compiled code does not look at
    def mix(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sort by expert, so each runs once, over all its tokens; add its results to their sums.

        Args:
            tokens: (tokens, D); experts, weights: (tokens, k).
        Returns: (tokens, D), in float32 or wider.
        """
        k = experts.shape[-1]
        order = experts.flatten().argsort(stable=True)  # pairs of token and expert, by expert
        rows = order // k  # (tokens * k,): which token each pair is of
        weights = weights.flatten()[order, None]  # (tokens * k, 1)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()  # pairs of each expert
        wide = torch.promote_types(tokens.dtype, torch.float32)
        out = torch.zeros(tokens.shape, dtype=wide, device=tokens.device)
        start = 0
        for expert, count in zip(self.experts, counts):
            if count:
                mine = slice(start, start + count)
                out.index_add_(0, rows[mine], expert(tokens[rows[mine]]) * weights[mine])
                start += count
        return out

    @torch.compiler.disable
    def mix_for_one_token(self, token: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """`mix` where there is nothing to sort: the small operations around the experts take time, too."""
        packed = isinstance(self.experts[0].down_proj, PackedLinear)
        rows = PackedLinear.four_rows(token) if packed else token
        results = torch.cat([self.experts[expert](rows) for expert in experts[0].tolist()])
        results = results[:: len(rows)]  # (k, D)
        wide = torch.promote_types(token.dtype, torch.float32)
        return weights.to(wide) @ results.to(wide)


class DecoderLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LanguageConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.latent else Attention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.has_experts(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: KVCache | None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and the attention weights; arguments as of `Attention`."""
        attended, weights = self.self_attn(self.input_layernorm(x), rope, visible, cache, want_weights)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class Decoder(nn.Module):
    """The language model from embeddings to the last normalized hidden state."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(
            random_parameter(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        visible: Tensor | None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """
        Args:
            x: (B, T, D) embeddings; position_ids: (B, T); visible: see `visible_keys`.
        Returns: the last hidden state (B, T, D); if asked for, the embeddings, the output of
            every layer but the last, and the normalized last one; and every layer's weights.
        """
        cos, sin = rope_angles(position_ids, self.config)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = layer(x, rope, visible, cache, output_attentions)
            attentions.append(weights)
        if cache is not None:
            cache.advance(x.shape[1])
        x = self.norm(x)
        return (
            x,
            (*hidden_states, x) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


# ---------------------------------------------------------------------------- the whole model


@dataclass
class Output:
    """What a forward pass gives.

    logits (B, T or logits_to_keep, vocabulary); loss, a scalar, where labels were given;
    hidden_states, one more than layers, each (B, T, D); attentions, one for each layer, (B, H, T, S).
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def check_size(name: str, pixels: Tensor, size: int) -> None:
    """Raise ValueError for pixels that are not (images, 3, size, size)."""
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
        raise ValueError(f"{name} have shape {list(pixels.shape)}, expected [images, 3, {size}, {size}]")


class DeepseekVL(nn.Module):
    """DeepSeek-VL and DeepSeek-VL2: a vision tower, an aligner, a decoder and its head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.language.hidden_size
        if isinstance(config.vision, HybridConfig):
            self.vision = HybridTower(config.vision)
            high_width, low_width = config.vision.high.downsample_channels[-1], config.vision.low.width
            self.aligner = HybridAligner(high_width, low_width, D)
        else:
            self.vision = SigLIP(config.vision)
            if config.tiles is None:
                self.aligner = MLPAligner(config.vision.width, D)
            else:
                self.aligner = TileAligner(config.tiles, config.vision.width, D)
        self.language = Decoder(config.language)
        self.lm_head = nn.Linear(D, config.language.vocab_size, bias=False)
        if config.language.tie_word_embeddings:
            self.lm_head.weight = self.language.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.language.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language.embed_tokens.weight.device

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of the model's dtype, on its device."""
        return KVCache(self.config.language, batch_size, capacity, self.dtype, self.device)

    def pack(self) -> DeepseekVL:
        """Make a model that is to answer faster, for good: see `PackedLinear` and `PackedQuantizedLinear`.

        Layers that no packed kernel of this machine can do stay as they are.
        """
        pack_linears(self)
        return self

    def encode_images(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """See: the picture part of a batch -> features in the language model's width.

        Args:
            batch: `pixel_values` (images, 3, size, size). For a hybrid tower either in [0, 1]
                at the high resolution, as the official processor gives them, or normalized at
                the low one, beside `high_res_pixel_values`, as transformers' processor does.
                For DeepSeek-VL2 the tiles of all images, and `images_spatial_crop` (images, 2).
        Returns: one (N, D) tensor for each image, in the order of the batch.
        Raises: ValueError for pixels of another size, and tiles that do not fit images_spatial_crop.
        """
        pixels = batch["pixel_values"].to(self.device)
        if isinstance(self.vision, HybridTower):
            high_pixels = batch.get("high_res_pixel_values")
            if high_pixels is None:
                check_size("pixel_values", pixels, self.config.vision.high.image_size)
                high_pixels, pixels = self.vision.split(pixels)
            check_size("high_res_pixel_values", high_pixels, self.config.vision.high.image_size)
            check_size("pixel_values", pixels, self.config.vision.low.image_size)
            high_pixels = high_pixels.to(self.device, self.dtype)
            return list(self.aligner(*self.vision(high_pixels, pixels.to(self.dtype))))
        check_size("pixel_values", pixels, self.config.vision.image_size)
        tokens = self.vision(pixels.to(self.dtype))
        if isinstance(self.aligner, TileAligner):
            if batch.get("images_spatial_crop") is None:
                raise ValueError("pixel_values of tiles need images_spatial_crop, (images, 2)")
            return self.aligner(tokens, batch["images_spatial_crop"])
        return list(self.aligner(tokens))

    def embed(
        self,
        input_ids: Tensor,
        images_seq_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings, with image features in place of the image tokens.

        Args:
            input_ids: (B, T).
            images_seq_mask: bool (B, T), where image features go, in reading order over the
                batch; by default wherever the image token stands.
            the others: as `encode_images` takes them, or none.
        Returns: (B, T, D).
        Raises: ValueError where places and features differ in number.
        """
        embeddings = self.language.embed_tokens(input_ids.to(self.device))
        if pixel_values is None or len(pixel_values) == 0:
            if images_seq_mask is not None and images_seq_mask.any():
                raise ValueError(f"no pixel_values for {int(images_seq_mask.sum())} image tokens in input_ids")
            return embeddings
        if images_seq_mask is None:
            if self.config.image_token_id is None:
                raise ValueError("pixel_values need images_seq_mask: this model's config names no image token")
            images_seq_mask = input_ids == self.config.image_token_id
        pictures = dict(
            pixel_values=pixel_values,
            high_res_pixel_values=high_res_pixel_values,
            images_spatial_crop=images_spatial_crop,
        )
        features = torch.cat(self.encode_images(pictures))
        places = int(images_seq_mask.sum())
        if places != len(features):
            raise ValueError(f"{len(features)} image features for {places} image tokens in input_ids")
        return embeddings.masked_scatter(images_seq_mask.to(self.device)[..., None], features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """One pass over T tokens, after those already in `cache`.

        Args:
            input_ids: (B, T), with the mask and pictures that `embed` takes; or
            inputs_embeds: (B, T, D) in their place.
            attention_mask: (B, S), cached tokens included: 1 for real tokens, 0 for padding,
                which goes on the left. None where nothing is padding.
            position_ids: (B, T); by default counted from each row's first real token.
            labels: (B, T), what each token should have been predicted as by the one before
                it; -100 is ignored.
            logits_to_keep: compute logits only for that many tokens at the end; 0 for all.
        Raises: ValueError for both or neither of input_ids and inputs_embeds, for a mask of
            another length than the tokens, and for labels without all logits.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if labels is not None and logits_to_keep:
            raise ValueError("labels need all logits: logits_to_keep must be 0")
        if inputs_embeds is None:
            inputs_embeds = self.embed(
                input_ids, images_seq_mask, pixel_values, high_res_pixel_values, images_spatial_crop
            )
        inputs_embeds = inputs_embeds.to(self.device)
        T = inputs_embeds.shape[1]
        past = cache.length if cache is not None else 0
        S = past + T
        if attention_mask is not None:
            if attention_mask.shape[1] != S:
                raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, there are {S}")
            attention_mask = attention_mask.to(self.device)
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, S, device=self.device)[None]
            else:
                position_ids = positions_from_mask(attention_mask)[:, past:]
        visible = visible_keys(T, S, attention_mask, self.device)
        position_ids = position_ids.to(self.device)
        x, hidden_states, attentions = self.language(
            inputs_embeds, position_ids, visible, cache, output_hidden_states, output_attentions
        )
        logits = self.lm_head(x[:, -logits_to_keep:])  # [-0:] is all of them
        loss = None
        if labels is not None:
            predicted, expected = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(self.device)
            loss = F.cross_entropy(predicted.float(), expected, ignore_index=-100)
        return Output(logits, loss, hidden_states, attentions)

    def fixed_shape_step(
        self, ids: Tensor, position: Tensor, layers: list[list[Tensor]], attention_mask: Tensor | None
    ) -> Tensor:
        """A decode step in which only values change, no shape: what `forward` does, in a form to compile.

        Args:
            ids: (B, 1); position: (1,) int64, where in the cache they go; layers: a KVCache's.
            attention_mask: (B, capacity), 0 for padding on the left, or None.
        Returns: logits (B, vocabulary).
        """
        visible = (torch.arange(layers[0][0].shape[2], device=ids.device) <= position)[None, None, None]
        position_ids = position[None]  # (1, 1)
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None]
            position_ids = position_ids - (~attention_mask.bool()).sum(dim=-1, keepdim=True)
        x = self.language.embed_tokens(ids)
        x, _, _ = self.language(x, position_ids, visible, FixedShapeCache(layers, position))
        return self.lm_head(x)[:, -1]


# ---------------------------------------------------------------------------- weights in 8 or 4 bits

QUANTIZATIONS = {"int8": torch.int8, "int4": torch.uint8}  # how each is stored


def layers_to_quantize(model: DeepseekVL, kind: str) -> list[str]:
    """The rule: the names of the linear layers that become "int8" or "int4".

    The decoder's layers and the head, which every new token reads whole. All else keeps its 16 bits: embeddings, of
    which a token reads one row; norms and routers, which are small, and on which much hangs; what latent attention
    reads in two parts (`HeadWeights`); vision and aligner, which see an image once. So does a head that is the
    embedding, and for int4 a layer whose width no group divides.
    """
    tied = model.config.language.tie_word_embeddings
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.startswith("language.layers.") or (name == "lm_head" and not tied))
        and (kind == "int8" or module.in_features % INT4_GROUPS[-1] == 0)
    ]


INT4_GROUPS = (128, 64)  # inputs that share a scale: the first that divides a layer's width


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weights are small integers. Its input and output are as wide as ever.

    This is the plain form, which makes the weights wide again and multiplies:

        int8    W[n, k] = q[n, k] * scale[n]                                q from -127 to 127
        int4    W[n, k] = (q[n, k] - 8) * scale[k // g, n] + offset[k // g, n]     q from 0 to 15

    So int8 has a scale for each output, and int4 a scale and an offset for each group of g inputs of each output. They
    are chosen such that a row's largest weight, or a group's least and largest, are met; each weight goes to the
    nearest of the values (round to nearest; LLM.int8(), arXiv 2208.07339, and GPTQ, 2210.17323, call it the baseline).

    weight: int8 (out, in); for int4 uint8 (out, in / 2), in each byte two inputs, the first in its high half.
    scales: (out,), for int4 (in / g, out, 2), scale and offset, in the dtype of the layer's input and output.
    """

    def __init__(self, weight: Tensor, scales: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * (1 if self.weight.dtype == torch.int8 else 2)

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.in_features if self.scales.dim() == 1 else self.in_features // len(self.scales)

    @classmethod
    def empty(cls, shape: tuple[int, int], kind: str, dtype: torch.dtype | None = None) -> QuantizedLinear:
        """For a weight of this shape, without values, on torch's default device."""
        rows, width = shape
        if kind == "int8":
            return cls(torch.empty(rows, width, dtype=torch.int8), torch.empty(rows, dtype=dtype))
        groups = width // next(g for g in INT4_GROUPS if width % g == 0)
        return cls(torch.empty(rows, width // 2, dtype=torch.uint8), torch.empty(groups, rows, 2, dtype=dtype))

    @classmethod
    def from_weight(cls, weight: Tensor, kind: str, dtype: torch.dtype) -> QuantizedLinear:
        """Round a weight (out, in) of any float dtype.

        The scales are rounded to `dtype` first, so that the integers make up for what that changes.
        """
        pieces = weight.split(max(1, 2**20 // weight.shape[1]))
        if len(pieces) > 1:  # some rows at a time stay in a CPU's cache, and need little memory
            rounded = [cls.from_weight(piece, kind, dtype) for piece in pieces]
            scales = torch.cat([piece.scales for piece in rounded], dim=0 if kind == "int8" else 1)
            return cls(torch.cat([piece.weight for piece in rounded]), scales)
        tiny, wide = torch.finfo(torch.float32).tiny, weight.detach().float()
        if kind == "int8":
            scales = (wide.abs().amax(dim=1) / 127).to(dtype)
            q = (wide / scales.float().clamp(min=tiny)[:, None]).round_().clamp_(-127, 127)
            return cls(q.to(torch.int8), scales)
        group = next(g for g in INT4_GROUPS if weight.shape[1] % g == 0)
        wide = wide.unflatten(1, (-1, group))  # (out, groups, g)
        least, largest = wide.amin(dim=2), wide.amax(dim=2)  # aminmax, both in one, takes ten times as long
        scale = ((largest - least) / 15).to(dtype)
        offset = (least + 8 * scale.float()).to(dtype)  # the value of q = 8
        q = (wide - offset.float()[..., None]).div_(scale.float().clamp(min=tiny)[..., None])
        q = q.add_(8).round_().clamp_(0, 15).to(torch.uint8).flatten(1)  # (out, in)
        return cls(q[:, 0::2] << 4 | q[:, 1::2], torch.stack((scale.T, offset.T), dim=-1))

    def integers(self) -> Tensor:
        """q, (out, in): int8, or uint8 from 0 to 15."""
        return self.weight if self.weight.dtype == torch.int8 else self.halves(self.weight)

    @staticmethod
    def halves(weight: Tensor) -> Tensor:
        """(out, in / 2) of two inputs a byte -> (out, in), from 0 to 15."""
        return torch.stack((weight >> 4, weight & 15), dim=-1).flatten(1)

    def dequantized(self) -> Tensor:
        """W, (out, in), in the scales' dtype; the two equations above, in float32."""
        q, scales = self.integers().float(), self.scales.float()
        if self.weight.dtype == torch.int8:
            return (q * scales[:, None]).to(self.scales.dtype)
        scale, offset = scales.transpose(0, 1).unsqueeze(2).unbind(-1)  # (out, groups, 1) both
        W = (q.unflatten(1, (-1, self.group)) - 8) * scale + offset
        return W.flatten(1).to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), both in the scales' dtype."""
        return F.linear(x, self.dequantized())


# ---------------------------------------------------------------------------- packed weights


class Workspace:
    """A CPU's memory for one bfloat16 matrix after the other, while they are packed.

    Were it freed and asked for each time, the system would clear it each time, and what is free would end up in pieces
    between what stays.
    """

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.bfloat16, device="cpu")

    def take(self, rows: int, width: int) -> Tensor:
        """(rows, width), without values, and valid until the next is taken."""
        if rows * width > len(self.memory):
            self.memory = None  # freed before there is more
            self.memory = torch.empty(rows * width, dtype=torch.bfloat16, device="cpu")
        return self.memory[: rows * width].view(rows, width)


class PackedLinear(nn.Module):
    """Bfloat16 linear layers of one input as one, whose weight lies in the order in which the CPU's matmul reads it.

    oneDNN's kernels want the weight cut into blocks. Given a plain matrix they cut it anew at every
    call, which at one token a step costs as much as the multiplication. So it is done once here, with
    the operators that torch's own compiler uses. The arithmetic is that of nn.Linear; what is lost is
    the plain weight, so pack a model that is to answer, not to learn or to be saved.

    Layers of one input, as queries, keys and values are, become one with all their outputs side by side:
    a decode step is hundreds of products so short that starting each counts.
    """

    def __init__(self, *linears: nn.Linear, workspace: Workspace | None = None):
        """
        Args:
            linears: of any float dtype, which becomes bfloat16.
            workspace: where the weights are joined and converted, to be overwritten by what is packed next.
        """
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        weight = linears[0].weight.detach()
        if len(linears) > 1 or weight.dtype != torch.bfloat16:
            joined = (workspace or Workspace()).take(sum(self.sizes), linears[0].in_features)
            weight = torch.cat([linear.weight.detach() for linear in linears], out=joined)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # opaque
        has_bias = linears[0].bias is not None
        self.bias = torch.cat([linear.bias.detach() for linear in linears]).bfloat16() if has_bias else None

    @staticmethod
    def suits(*modules: nn.Module | None, dtype: torch.dtype | None = None) -> bool:
        """Whether the packed kernels of this machine can do these: plain linear layers in bfloat16.

        Args:
            dtype: what the layers are to be converted to; by default they stay as they are.
        """
        if not all(isinstance(module, nn.Linear) for module in modules):
            return False
        if any((dtype or module.weight.dtype) != torch.bfloat16 for module in modules):
            return False
        on_cpu = all(module.weight.device.type == "cpu" for module in modules) and torch.backends.mkldnn.is_available()
        return on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @torch.compiler.disable  # the compiler does not know such weights
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), both bfloat16."""
        if x.shape[:-1].numel() == 1:
            return self.multiply(self.four_rows(x))[:1].view(*x.shape[:-1], -1)
        return self.multiply(x)

    @staticmethod
    def four_rows(x: Tensor) -> Tensor:
        """One row, four times: alone it would take longer, because oneDNN does not use the blocks for it."""
        return x.reshape(1, -1).expand(4, -1).contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedQuantizedLinear(nn.Module):
    """Quantized layers of one input as one, in the layout of torch's own kernels, which widen what they read.

    For a few rows, as in a decode step, that is what makes it fast: half or a quarter of the bytes is read. For the
    many rows of a prompt, where the time goes into multiplying, those kernels are slower than a bfloat16 matmul, more
    than it takes to make the weights wide for a moment. So that is done there, a piece at a time. (int4 is
    widened from the layout of CPUs with 512-bit vectors alone; elsewhere its kernel does any number of rows.)
    """

    # With more rows than these the kernels were slower on a Zen 4 CPU than making the weights wide; those for other
    # dtypes than bfloat16 with any number but one.
    FEW_ROWS = {(8, torch.bfloat16): 12, (4, torch.bfloat16): 128}
    # In bytes. From 32 MiB on, glibc asks the system for the memory anew each time, which is slow.
    PIECE = 2**24

    def __init__(self, *linears: QuantizedLinear):
        super().__init__()
        self.sizes = [len(linear.weight) for linear in linears]
        self.in_features, self.group = linears[0].in_features, linears[0].group
        self.bits = 8 if linears[0].weight.dtype == torch.int8 else 4
        scales = [linear.scales for linear in linears]
        self.scales = torch.cat(scales, dim=0 if self.bits == 8 else 1)
        packed = [linear.weight if self.bits == 8 else self.int4_layout(linear) for linear in linears]
        # In 8 bits a copy, also of one: the kernel was seen to crash on weights in a mapped file, where a tensor may
        # begin anywhere; a copy is aligned.
        self.weight = torch.cat(packed) if len(packed) > 1 or self.bits == 8 else packed[0]

    @staticmethod
    def int4_layout(linear: QuantizedLinear) -> Tensor:
        """The integers as the device's kernel wants them; opaque but for what `widened` knows."""
        if linear.weight.device.type == "cuda":
            return torch.ops.aten._convert_weight_to_int4pack(linear.weight, 8)
        # int32 is large: some outputs at a time, a multiple of 64, stay in a CPU's cache.
        packed = torch.empty_like(linear.weight)
        for piece, room in zip(linear.weight.split(256), packed.split(256)):
            room.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.halves(piece).int(), 1))
        return packed

    @staticmethod
    def suits(*modules: nn.Module | None) -> bool:
        """Whether these are layers quantized alike that the kernels of this machine can do."""
        if not all(isinstance(module, QuantizedLinear) for module in modules):
            return False
        if len({module.weight.dtype for module in modules}) > 1:
            return False
        first, rows = modules[0], [len(module.weight) for module in modules]
        if first.weight.dtype == torch.int8:
            kind, fits = "int8", first.in_features % 32 == 0  # of other widths the kernel drops the rest, or worse
        else:
            least = 128 if first.weight.device.type == "cuda" else 64
            kind, fits = "int4", first.in_features % least == 0 and all(count % 64 == 0 for count in rows)
        return fits and kernel_agrees(kind, first.scales.dtype, first.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), both in the scales' dtype."""
        rows = x.flatten(0, -2)
        few = len(rows) <= self.FEW_ROWS.get((self.bits, self.scales.dtype), 1) or not self.can_widen()
        out = self.multiply(rows) if few else self.widen_and_multiply(rows)
        return out.view(*x.shape[:-1], -1)

    def multiply(self, rows: Tensor) -> Tensor:
        """The kernels. (rows, in) -> (rows, out)."""
        rows = rows.contiguous()
        if self.bits == 8:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)
        on_cpu = rows.device.type == "cpu"
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        return kernel(rows, self.weight, self.group, self.scales)

    def widen_and_multiply(self, rows: Tensor) -> Tensor:
        """A plain matmul, some outputs at a time, a multiple of 64."""
        outputs = sum(self.sizes)
        pieces = -(-outputs * self.in_features * rows.element_size() // self.PIECE)
        size = -(-outputs // (64 * pieces)) * 64
        out = [rows @ self.widened(start, min(start + size, outputs)) for start in range(0, outputs, size)]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def can_widen(self) -> bool:
        return self.bits == 8 or (self.weight.device.type == "cpu" and int4_layout_is_known())

    def widened(self, start: int, stop: int) -> Tensor:
        """W of the outputs from `start` to `stop`, transposed to (in, stop - start).

        int4's layout on a CPU has blocks of 64 outputs, and in them for each input 32 bytes: the low halves are the
        first 32 outputs, the high halves the others. q - 8 in four bits of two's complement is q with its top bit
        turned.
        """
        if self.bits == 8:
            return self.weight[start:stop].to(self.scales.dtype).mul_(self.scales[start:stop, None]).T
        width, blocks = self.in_features, (stop - start) // 64
        packed = self.weight.view(-1, width, 32)[start // 64 : stop // 64]
        signed = (packed ^ 0x88).view(torch.int8)
        wide = torch.empty(width, blocks, 64, dtype=self.scales.dtype)
        halves = wide.transpose(0, 1)
        halves[..., :32] = signed << 4 >> 4
        halves[..., 32:] = signed >> 4
        wide = wide.view(width // self.group, self.group, blocks * 64)
        scales = self.scales[:, None, start:stop]  # (groups, 1, out, 2)
        scale, offset = (part.contiguous() for part in scales.unbind(-1))
        return torch.addcmul(offset, wide, scale, out=wide).view(width, -1)


def small_example(kind: str, dtype: torch.dtype, device: torch.device) -> QuantizedLinear:
    weight = torch.linspace(-1, 1, 128 * 256).sin().view(128, 256).to(device)
    return QuantizedLinear.from_weight(weight, kind, dtype)


@lru_cache
def kernel_agrees(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this device has a kernel, and it gives the plain form's results for a small layer."""
    plain = small_example(kind, dtype, device)
    x = torch.linspace(-3, 3, 4 * 256).cos().view(4, 256).to(device, dtype)
    expected = plain(x).float()
    try:
        packed = PackedQuantizedLinear(plain)
        results = packed.multiply(x).float(), torch.cat((packed.multiply(x[:1]), packed.multiply(x[1:]))).float()
    except (RuntimeError, AttributeError):  # not for this device or dtype; not in this version of torch
        return False
    return all(bool((out - expected).norm() < 0.02 * expected.norm()) for out in results)


@lru_cache
def int4_layout_is_known() -> bool:
    """Whether this CPU's kernel uses the layout that `widened` reads: it depends on the width of its vectors."""
    plain = small_example("int4", torch.float32, torch.device("cpu"))
    return torch.allclose(PackedQuantizedLinear(plain).widened(64, 128).T, plain.dequantized()[64:], atol=1e-6)


PACKED = (PackedLinear, PackedQuantizedLinear)


def products(x: Tensor, *linears: nn.Module | None) -> Sequence[Tensor]:
    """x through each of several layers; packed, the first is all of them, and the others are None."""
    if isinstance(linears[0], PACKED):
        return linears[0](x).split(linears[0].sizes, dim=-1)
    return [linear(x) for linear in linears]


def pack_linears(module: nn.Module, dtype: torch.dtype | None = None, workspace: Workspace | None = None) -> None:
    """Replace every linear layer inside `module` that can be packed, and free it; those of the `same_input` by one.

    Of the `same_input` all are packed or none, since `products` takes them so.

    Args:
        dtype: what the caller is about to convert the module to: layers are packed as if they were of it already.
        workspace: see `PackedLinear`; by default one for this call.
    """
    workspace = workspace or Workspace()
    together = getattr(module, "same_input", ())
    groups = [together] if together else []
    groups += [(name,) for name, _ in module.named_children() if name not in together]
    for names in groups:
        layers = [getattr(module, name) for name in names]
        if PackedLinear.suits(*layers, dtype=dtype):
            packed = PackedLinear(*layers, workspace=workspace)
        elif PackedQuantizedLinear.suits(*layers):
            packed = PackedQuantizedLinear(*layers)
        else:
            if names != together:
                pack_linears(layers[0], dtype, workspace)
            continue
        setattr(module, names[0], packed)
        for name in names[1:]:
            setattr(module, name, None)
        layers.clear()  # the plain weights are gone before the next are packed
