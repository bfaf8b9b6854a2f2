"""The vision towers and aligners of DeepSeek-VL: from pixels to image tokens of the language model's width.

Read top to bottom, each part is met just before it is used:

    SigLIP         a plain vision transformer at low resolution (all models)
    SAM            the Segment Anything encoder at high resolution (DeepSeek-VL 7B)
    HybridTower    both of them looking at one picture (7B)
    MLPAligner, HybridAligner, TileAligner    into the language model's width

    1.3B  (B, 3, 384, 384) -> SigLIP (B, 576, 1024) -> MLPAligner (B, 576, 2048)
    7B    (B, 3, 1024, 1024) -> SAM (B, 576, 1024) and SigLIP (B, 576, 1024)
                             -> HybridAligner (B, 576, 4096)
    VL2   (tiles, 3, 384, 384) -> SigLIP (tiles, 729, 1152)
                             -> TileAligner: 196 tokens a tile, laid out in rows, one image after another

Shape letters:

    B  batch of images or tiles   H  attention heads   d  width of a head, D = H * d
    N  patches of one, N = g * g  D  width of a token  C  channels, or the width of the module before or after
    g  patches along a side       s  tokens along a tile's side, after folding (VL2)

In the attention of SAM's windows B counts windows, and g and N are of a window.

Papers: DeepSeek-VL (arXiv 2403.05525, section 3.1), DeepSeek-VL2 (2412.10302, section 2),
SigLIP (2303.15343), Segment Anything (2304.02643, appendix A), ViTDet (2203.16527) for windows
and the neck. This file imports torch alone, so it can be lifted out as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6  # every LayerNorm in these towers; torch's own default is 1e-5


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP tower. The defaults are SigLIP-L/16 at 384, as in DeepSeek-VL."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    gelu: str = "exact"  # or "tanh", its approximation (DeepSeek-VL2)

    @property
    def grid(self) -> int:
        """Patches along a side; pixels beyond the last whole patch are dropped."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SAMConfig:
    """Sizes of the SAM tower with DeepSeek's additions. The defaults are those of the 7B."""

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    window: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    neck_channels: int = 256
    downsample_channels: tuple[int, int] = (512, 1024)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


# ---------------------------------------------------------------------------- shared parts


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + bias) v, written out. `fast_attention` computes the same.

    Args:
        q: (B, H, T, d); k: (B, G, S, d); v: (B, G, S, any), of one float dtype. H / G query heads share a
            key/value head (GQA, arXiv 2305.13245).
        bias: broadcastable to (B, H, T, S), of the same dtype; minus infinity hides a key from a query.
        causal: in place of a bias: the queries are the last T of S tokens, and none sees a later one.
        scale: 1 / sqrt(d) by default.
    Returns: (B, H, T, any).
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # (B, H, T, S)
    if causal:
        bias = causal_bias(*scores.shape[-2:], q)
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def causal_bias(T: int, S: int, like: Tensor) -> Tensor:
    """(T, S): 0 where one of the last T tokens sees one of S, itself and all before it; elsewhere minus infinity."""
    return like.new_full((T, S), -torch.inf).triu(S - T + 1)


SCORES_AT_ONCE = 2**20  # in one block: 2 MiB in bfloat16, of which a CPU's caches hold a few


def fast_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """`attention` without all attention weights (T x S a head) in memory. The bias must be the same for all heads.

    Torch's fused kernel, except where `attention` is faster on a CPU, a few heads at a time (measured on a Zen 4):
        one query (a decode step)                  computed in float32: a third of fused's time in bfloat16
        bfloat16, neither causal nor with a bias   (SigLIP): two thirds of fused's time
    One query in float32, not compiled, is fused: a third to two thirds of the other's time (Zen 3).
    A prompt, padded or not, takes the fused kernel. So do inputs that learn: `attention` keeps all weights for a
    gradient.
    """
    (B, H, T), (G, S) = q.shape[:3], k.shape[1:3]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    narrow = q.dtype == torch.bfloat16 and bias is None and not causal and H == G
    one = T == 1 and (q.dtype != torch.float32 or H != G or torch.compiler.is_compiling())
    if q.device.type == "cpu" and not learns and (one or narrow):
        dtype = torch.promote_types(q.dtype, torch.float32) if T == 1 else q.dtype
        queries = q.reshape(B, G, H // G * T, -1)  # at T = 1 the H / G queries of a key head become its rows
        heads = max(1, 2 * SCORES_AT_ONCE // (S * (k.shape[-1] if T == 1 else T)))  # a block: its keys, or its scores
        heads = G if torch.compiler.is_compiling() else 2 ** (heads.bit_length() - 1)  # equal blocks, for the cores
        parts = zip(*(t.split(heads, dim=1) for t in (queries, k, v)))
        out = [attention(*(t.to(dtype) for t in part), bias, scale=scale) for part in parts]
        return torch.cat(out, dim=1).to(q.dtype).view(B, H, T, -1)
    if causal and 1 < T < S:  # the kernel's own mask would let the first query see the first key alone
        bias = causal_bias(T, S, q)
    fused, is_causal = F.scaled_dot_product_attention, causal and 1 < T == S
    return fused(q, k, v, bias, is_causal=is_causal, scale=scale, enable_gqa=H != G)


def random_parameter(*shape: int, std: float = 0.02) -> nn.Parameter:
    """Where training from nothing starts: uniform values with this standard deviation."""
    return nn.Parameter(torch.empty(shape).uniform_(-std * 3**0.5, std * 3**0.5))


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each: a convolution whose stride is its size."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, rows, columns, D), contiguous: later norms and sums are faster."""
        return self.proj(pixels).permute(0, 2, 3, 1).contiguous()


# ---------------------------------------------------------------------------- SigLIP


class SigLIPAttention(nn.Module):
    """Multi-head self-attention; every patch sees every patch."""

    attend = staticmethod(attention)  # DeepseekVL installs fast_attention

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous()  # 3 x (B, H, N, d)
        return self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class SigLIPMLP(nn.Module):
    """Linear, GELU, Linear: exact GELU in DeepSeek-VL, the tanh form in DeepSeek-VL2."""

    def __init__(self, width: int, hidden: int, gelu: str):
        super().__init__()
        self.approximate = {"exact": "none", "tanh": "tanh"}[gelu]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SigLIPBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = SigLIPAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = SigLIPMLP(config.width, config.mlp_width, config.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SigLIP(nn.Module):
    """SigLIP's image tower, all patch tokens out.

    There is no class token, and the pooling head that SigLIP was trained with is not used
    here, though its tensors are in the checkpoints.
    """

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = random_parameter(1, config.grid**2, config.width)
        self.blocks = nn.ModuleList(SigLIPBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """
        Args:
            pixels: (B, 3, image_size, image_size), normalized.
        Returns: (B, N, D), patches row by row.
        """
        x = self.patch_embed(pixels).flatten(1, 2) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------- SAM


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut a grid into windows, after padding it with zeros on the right and at the bottom.

    64 x 64 does not divide by 14, so it becomes 70 x 70: 25 windows. The padding is not
    masked: its keys are not zero (they have the projection's bias), so it takes part in
    the attention, and the trained weights expect that.

    Args:
        x: (B, height, width, D).
    Returns: (B * windows, window, window, D).
    """
    B, height, width, D = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.view(B, rows, window, columns, window, D).transpose(2, 3)
    return x.reshape(-1, window, window, D)


def window_unpartition(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `window_partition`: (B * windows, window, window, D) -> (B, height, width, D)."""
    rows, columns = -(-height // window), -(-width // window)
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, rows * window, columns * window, windows.shape[-1])[:, :height, :width]


def relative_positions(table: Tensor) -> Tensor:
    """For each query and key coordinate along one axis, the learned vector of their offset.

    Args:
        table: (2 * g - 1, d), row `query - key + g - 1` for that offset.
    Returns: (g, g, d), indexed by [query, key].
    """
    g = (len(table) + 1) // 2
    coordinates = torch.arange(g, device=table.device)
    return table[coordinates[:, None] - coordinates[None, :] + g - 1]


class SAMAttention(nn.Module):
    """Self-attention over a square grid, with decomposed relative positions (ViTDet, section 3; MViTv2, 2112.01526).

        score[(qh, qw), (kh, kw)] = q . k / sqrt(d) + q . rel_pos_h[qh - kh] + q . rel_pos_w[qw - kw]

    In the positions' terms the query is not scaled.
    """

    attend = staticmethod(attention)  # DeepseekVL leaves it: here the work is in blocks already

    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, g, g, D) -> (B, g, g, D).

        A global layer has 4096 x 4096 scores a head. So one head attends at a time, and a few rows of the grid.
        """
        B, g = x.shape[:2]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # 3 x (B, H, N, d)
        grid = q.unflatten(2, (g, g))  # (B, H, g, g, d)
        # Of each query, for the keys' rows (B, H, g, g, g, 1) and columns (B, H, g, g, 1, g).
        by_row = torch.einsum("bhyxd,ykd->bhyxk", grid, relative_positions(self.rel_pos_h))[..., :, None]
        by_column = torch.einsum("bhyxd,xkd->bhyxk", grid, relative_positions(self.rel_pos_w))[..., None, :]
        rows, out = max(1, SCORES_AT_ONCE // (B * g**3)), []  # a row of the grid has B * g * g**2 scores
        for *head, keys, values in zip(*(t.split(1, dim=1) for t in (grid, by_row, by_column, k, v))):
            for queries, row, column in zip(*(t.split(rows, dim=2) for t in head)):
                bias = (row + column).flatten(4).flatten(2, 3)  # (B, 1, rows * g, N)
                out.append(self.attend(queries.flatten(2, 3), keys, values, bias))
        out = torch.cat(out, dim=2).view(B, self.heads, g * g, -1)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class SAMMLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.lin2(F.gelu(self.lin1(x)))


class SAMBlock(nn.Module):
    """Pre-norm block on a grid; `window` 0 means global attention.

    Windows are cut after the norm, so what `qkv` sees in the padding is zeros, not the norm's bias.
    """

    def __init__(self, config: SAMConfig, window: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = SAMAttention(config.width, config.heads, window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = SAMMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, g, g, D) -> (B, g, g, D)."""
        y = self.norm1(x)
        if self.window:
            y = self.attn(window_partition(y, self.window))
            y = window_unpartition(y, self.window, *x.shape[1:3])
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_neck(width: int, channels: int) -> nn.Sequential:
    """1x1 convolution, norm, 3x3 convolution, norm: (B, width, g, g) -> (B, channels, g, g)."""
    return nn.Sequential(
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        ChannelNorm(channels, eps=LAYER_NORM_EPS),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(channels, eps=LAYER_NORM_EPS),
    )


class SAM(nn.Module):
    """SAM-B's image encoder and what DeepSeek-VL builds on it (DeepSeek-VL, section 3.1).

    The 64 x 64 grid must become as many tokens as SigLIP's 24 x 24, so that the aligner can
    join them one to one. Two convolutions of stride 2 divide a side by four, hence the neck's
    output is first resized to 4 x 24 = 96.

    Fine detail fades on the way up the tower. So the output of the first global layer takes a
    second path: its own neck (`neck_hd`), the same resizing and the same two convolutions. It
    is multiplied by one learned scalar, `hd_alpha_downsamples` (alpha), and added. The scalar
    starts at zero: training decides how much of the early features to let in. (The paper does
    not speak of this path; the released code has it.)
    """

    def __init__(self, config: SAMConfig, tokens_per_side: int):
        super().__init__()
        self.config = config
        self.tokens_per_side = tokens_per_side
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = random_parameter(1, config.grid, config.grid, config.width)
        windows = (0 if i in config.global_layers else config.window for i in range(config.layers))
        self.blocks = nn.ModuleList(SAMBlock(config, window) for window in windows)
        self.neck = make_neck(config.width, config.neck_channels)
        self.neck_hd = make_neck(config.width, config.neck_channels)
        channels = (config.neck_channels, *config.downsample_channels)
        convs = (nn.Conv2d(*pair, 3, stride=2, padding=1, bias=False) for pair in zip(channels, channels[1:]))
        self.downsamples = nn.ModuleList(convs)
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor) -> Tensor:
        """
        Args:
            pixels: (B, 3, image_size, image_size), normalized.
        Returns: (B, tokens_per_side ** 2, C), C = downsample_channels[-1], row by row.
        """
        x = self.patch_embed(pixels) + self.pos_embed  # (B, g, g, D)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.config.global_layers[0]:
                early = x
        late = self._tokens(self.neck, x)
        early = self._tokens(self.neck_hd, early)
        return late + early * self.hd_alpha_downsamples

    def _tokens(self, neck: nn.Module, x: Tensor) -> Tensor:
        """(B, g, g, D) -> (B, tokens_per_side ** 2, C): neck, resize, two strided convolutions."""
        x = neck(x.permute(0, 3, 1, 2))  # (B, 256, 64, 64)
        side = 4 * self.tokens_per_side
        x = F.interpolate(x.float(), size=(side, side), mode="bilinear", align_corners=False).to(x.dtype)
        for conv in self.downsamples:
            x = conv(x)  # (B, 512, 48, 48), then (B, 1024, 24, 24); no activation between
        return x.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------- hybrid tower


@dataclass(frozen=True)
class PixelNorm:
    """Mean and standard deviation a channel, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, height, width) -> the same shape, (pixels - mean) / std."""
        mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class HybridConfig:
    """The 7B's two towers and how each wants its pixels."""

    low: SigLIPConfig = SigLIPConfig()
    high: SAMConfig = SAMConfig()
    low_norm: PixelNorm = PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    high_norm: PixelNorm = PixelNorm((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class HybridTower(nn.Module):
    """SAM for detail at high resolution, SigLIP for meaning at low resolution."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.high = SAM(config.high, tokens_per_side=config.low.grid)
        self.low = SigLIP(config.low)

    def split(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One picture in [0, 1] -> what each tower takes, normalized its own way.

        Args:
            pixels: (B, 3, 1024, 1024) in [0, 1].
        Returns: high (B, 3, 1024, 1024) and low (B, 3, 384, 384), float32.
        """
        pixels = pixels.float()
        size = (self.config.low.image_size, self.config.low.image_size)
        low = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self.config.high_norm(pixels), self.config.low_norm(low)

    def forward(self, high_pixels: Tensor, low_pixels: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            high_pixels, low_pixels: as `split` returns them, in the weights' dtype.
        Returns: SAM's and SigLIP's tokens, (B, N, C) each, patch for patch of the same place.
        """
        return self.high(high_pixels), self.low(low_pixels)


# ---------------------------------------------------------------------------- aligners


class MLPAligner(nn.Module):
    """Vision width to language width: Linear, exact GELU, Linear (1.3B)."""

    def __init__(self, vision_width: int, language_width: int):
        super().__init__()
        self.linear1 = nn.Linear(vision_width, language_width)
        self.linear2 = nn.Linear(language_width, language_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, vision width) -> (B, N, language width)."""
        return self.linear2(F.gelu(self.linear1(x)))


class HybridAligner(nn.Module):
    """Each tower to half the language width, joined high first, exact GELU, Linear (7B)."""

    def __init__(self, high_width: int, low_width: int, language_width: int):
        super().__init__()
        self.high_proj = nn.Linear(high_width, language_width // 2)
        self.low_proj = nn.Linear(low_width, language_width // 2)
        self.proj = nn.Linear(language_width, language_width)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """(B, N, high width), (B, N, low width) -> (B, N, language width)."""
        x = torch.cat((self.high_proj(high), self.low_proj(low)), dim=-1)
        return self.proj(F.gelu(x))


@dataclass(frozen=True)
class TileConfig:
    """How DeepSeek-VL2 turns the tiles of an image into one sequence."""

    downsample_ratio: int = 2  # r x r patches become one token
    mlp_ratio: int = 1  # hidden width of the projector over the language model's
    global_view_first: bool = True  # before the tiles ("head") or after them ("tail")


class TileAligner(nn.Module):
    """Tiles to tokens in reading order: fold, Linear, exact GELU, Linear, lay out (VL2, section 2).

    Every image is seen twice: whole, as one tile (the global view), and cut into th rows of tw tiles
    (the local view). A learned newline ends each row of tokens, a learned separator parts the views.
    The checkpoints spell it `view_seperator`, and so do we.
    """

    def __init__(self, config: TileConfig, vision_width: int, language_width: int):
        super().__init__()
        self.config = config
        hidden = language_width * config.mlp_ratio
        self.linear1 = nn.Linear(vision_width * config.downsample_ratio**2, hidden)
        self.linear2 = nn.Linear(hidden, language_width)
        self.image_newline = random_parameter(language_width, std=language_width**-0.5)
        self.view_seperator = random_parameter(language_width, std=language_width**-0.5)

    def project(self, x: Tensor) -> Tensor:
        """Patches of each tile to a smaller grid: (tiles, g * g, C) -> (tiles, s, s, D), s = ceil(g / r).

        27 patches a side do not divide by 2, so a 28th row and column of zeros is added: s = 14.
        """
        tiles, N, C = x.shape
        g, r = int(N**0.5), self.config.downsample_ratio
        x = F.pad(x.view(tiles, g, g, C), (0, 0, 0, -g % r, 0, -g % r))
        s = x.shape[1] // r
        # The trained weights expect F.unfold's order: channel slowest, then row and column within the fold.
        x = x.view(tiles, s, r, s, r, C).permute(0, 1, 3, 5, 2, 4)  # (tiles, s, s, C, r, r)
        return self.linear2(F.gelu(self.linear1(x.flatten(3))))

    def lay_out(self, grids: Tensor, tiles_wide: int, tiles_high: int) -> Tensor:
        """One image's views to one sequence.

            global view   s rows of s tokens, each with a newline
            separator
            local view    th * s rows of tw * s tokens: the tiles side by side, each row with a newline

        Without `global_view_first` the local view stands first.

        Args:
            grids: (1 + tw * th, s, s, D), the global view first, then the tiles row by row.
            tiles_wide, tiles_high: tw and th.
        Returns: (s (s + 1) + 1 + th s (tw s + 1), D).
        """
        s, D = grids.shape[1], grids.shape[-1]
        tiles = grids[1:].view(tiles_high, tiles_wide, s, s, D).transpose(1, 2)
        local_view = self._with_newlines(tiles.reshape(tiles_high * s, tiles_wide * s, D))
        global_view = self._with_newlines(grids[0])
        views = (global_view, local_view) if self.config.global_view_first else (local_view, global_view)
        return torch.cat((views[0], self.view_seperator[None], views[1]))

    def _with_newlines(self, grid: Tensor) -> Tensor:
        """(rows, columns, D) -> (rows * (columns + 1), D)."""
        return torch.cat((grid, self.image_newline.expand(len(grid), 1, -1)), dim=1).flatten(0, 1)

    @staticmethod
    def crops(spatial_crop: Tensor, tiles: int) -> list[tuple[int, int]]:
        """Each image's tiles wide and high. Raises: ValueError where with the global views these are not `tiles`."""
        # The original's processor gives a row of zeros for a conversation without images.
        crops = [(wide, high) for wide, high in spatial_crop.long().tolist() if wide > 0 and high > 0]
        count = sum(1 + wide * high for wide, high in crops)
        if count != tiles:
            raise ValueError(f"images_spatial_crop says {count} tiles with the global views, pixel_values hold {tiles}")
        return crops

    def forward(self, x: Tensor, spatial_crop: Tensor) -> list[Tensor]:
        """
        Args:
            x: (tiles, g * g, C), of each image in turn the global view and then its tiles.
            spatial_crop: (images, 2) integers, tiles wide and tiles high.
        Returns: one (tokens, D) tensor for each image.
        Raises: ValueError where the tiles are not as many as spatial_crop says.
        """
        crops = self.crops(spatial_crop, len(x))
        grids = self.project(x).split([1 + wide * high for wide, high in crops])
        return [self.lay_out(grid, *crop) for grid, crop in zip(grids, crops)]
