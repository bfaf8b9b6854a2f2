"""What the towers are trained on, before there is a language model to ask: labels for each ninth of a picture.

This stands in for the pretraining that SAM and SigLIP come with in the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from empty_checkpoint import SAM_PATCH
from scenes import COLORS, KINDS, RADII, SIDE, Scene, letters, plate
from torch import Tensor, nn

from vision import HybridConfig, HybridTower

CONTENTS = ("nothing", *KINDS, "sign")
LETTERS = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIGN_LENGTH = 4
IGNORED = -100


def ninths(scene: Scene) -> Tensor:
    """What each of the nine cells holds: int64 (9, 7), of content, colour, size and four letters."""
    labels = torch.full((9, 3 + SIGN_LENGTH), IGNORED)
    labels[:, 0] = 0
    for shape in scene.shapes:
        found = 1 + KINDS.index(shape.kind), list(COLORS).index(shape.color), list(RADII).index(shape.size)
        labels[shape.cell, :3] = torch.tensor(found)
    for sign in scene.signs:
        labels[sign.cell, 0] = CONTENTS.index("sign")
        labels[sign.cell, 3:] = torch.tensor([LETTERS.index(letter) for letter in sign.text.ljust(SIGN_LENGTH)])
    return labels


def letter_map(scene: Scene, grid: int = SIDE // SAM_PATCH) -> Tensor:
    """For each patch of SAM's grid the letter whose middle lies in it, or 0: int64 (grid * grid,)."""
    labels = torch.zeros(grid, grid, dtype=torch.long)
    for sign in scene.signs:
        for letter, x, y in letters(sign):
            column, row = (min(grid - 1, max(0, int(at * grid / SIDE))) for at in (x, y))
            labels[row, column] = LETTERS.index(letter)
    return labels.flatten()


def shape_map(scene: Scene, grid: int = SIDE // SAM_PATCH) -> Tensor:
    """For each patch of SAM's grid what it shows: content, colour and size of a shape, int64 (grid * grid, 3).

    Patches at a shape's edge are ignored.
    """
    labels = torch.full((grid, grid, 3), IGNORED)
    labels[..., 0] = 0
    middles = (torch.arange(grid) + 0.5) * SIDE / grid
    for sign in scene.signs:
        left, top, right, bottom = plate(sign)
        across, down = ((middles > low - 4) & (middles < high + 4) for low, high in ((left, right), (top, bottom)))
        labels[down[:, None] & across, 0] = CONTENTS.index("sign")
    for shape in scene.shapes:
        distance = ((middles[:, None] - shape.y) ** 2 + (middles - shape.x) ** 2).sqrt()
        labels[(distance < shape.radius + 6) & (labels[..., 1] == IGNORED), 0] = IGNORED
        found = 1 + KINDS.index(shape.kind), list(COLORS).index(shape.color), list(RADII).index(shape.size)
        labels[distance < max(0.8 * shape.radius, SIDE / grid)] = torch.tensor(found)
    return labels.flatten(0, 1)


class TowerLoss(nn.Module):
    """Linear layers on the towers' outputs, and what they are asked. None of this is kept.

    On each token, one for each ninth of the picture: what is in it, and where is it, so that a language model can tell
    places apart? On each patch after SAM's last block, in the place of the segmentation that it was trained for:
    which shape or letter is here?
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        choices = [len(CONTENTS), len(COLORS), len(RADII), *[len(LETTERS)] * SIGN_LENGTH]
        self.high = nn.ModuleList(nn.Linear(config.high.downsample_channels[-1], n) for n in choices)
        self.low = nn.ModuleList(nn.Linear(config.low.width, n) for n in choices[:3])
        widths = config.high.downsample_channels[-1], config.low.width
        self.place = nn.ModuleList(nn.Linear(width, config.low.grid**2) for width in widths)
        self.shape = nn.ModuleList(nn.Linear(config.high.width, n) for n in choices[:3])
        self.letter = nn.Linear(config.high.width, len(LETTERS))
        self.register_buffer("rarity", torch.tensor([0.1] + [1.0] * (len(LETTERS) - 1)))

    def forward(self, patches: Tensor, high: Tensor, low: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The sum of all heads' mean cross entropies.

        Args:
            patches: SAM's last block's output, (B, g, g, D); high, low: the towers' tokens, (B, 9, D each).
        """
        letter_labels = batch["letters"].to(self.rarity.device).flatten()
        loss = F.cross_entropy(self.letter(patches).flatten(0, 2), letter_labels, self.rarity)
        labels = batch["cells"].to(self.rarity.device)
        shown, flat = batch["shapes"].to(self.rarity.device), patches.flatten(0, 2)
        rare = torch.tensor([0.2] + [1.0] * (len(CONTENTS) - 1), device=flat.device)
        for i, head in enumerate(self.shape):
            right = shown[..., i].flatten()
            if (right != IGNORED).any():
                weight = rare if i == 0 else None
                loss = loss + F.cross_entropy(head(flat), right, weight, ignore_index=IGNORED)
        for heads, place, tokens in zip((self.high, self.low), self.place, (high, low)):
            here = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
            loss = loss + F.cross_entropy(place(tokens).flatten(0, 1), here)
            for i, head in enumerate(heads):
                right = labels[..., i].flatten()
                if (right == IGNORED).all():
                    continue  # no signs in this batch
                weight = 3 if i == 0 else 1  # a small circle is almost a small square: kinds are what is learnt last
                loss = loss + weight * F.cross_entropy(head(tokens).flatten(0, 1), right, ignore_index=IGNORED)
        return loss

    @torch.no_grad()
    def scores(self, tower: HybridTower, batch: dict[str, Tensor]) -> dict[str, float]:
        """Of the shapes, the share whose kind, colour and size SAM's heads get right; of the signs, the share read."""
        high, _ = tower(*tower.split(batch["pixel_values"].to(self.rarity.device)))
        labels = batch["cells"].to(self.rarity.device)
        right = torch.stack([head(high).argmax(-1) for head in self.high], dim=-1) == labels
        is_shape, is_sign = labels[..., 1] != IGNORED, labels[..., 3] != IGNORED
        shapes, signs = right[is_shape][:, :3].all(-1), right[is_sign][:, 3:].all(-1)
        return {"shapes": shapes.float().mean().item(), "signs": signs.float().mean().item()}
