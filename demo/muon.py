"""Muon, an optimizer for the weights of linear layers (https://kellerjordan.github.io/posts/muon).

In float32: torch's own computes in bfloat16, which processors without instructions for it do a hundred times slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM, WEIGHT_DECAY = 0.95, 0.05
QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan's: singular values between 0 and 1 all end near 1


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices whose singular values are all about 1, by Newton-Schulz iterations: (n, rows, columns)."""
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Updates have the size of AdamW's (a root mean square of 0.2), so that one rate serves both."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)  # those of one shape are computed together
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for (rows, columns), parameters in alike.items():
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                gradients = [p.grad for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                updates = orthogonalized(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
                torch._foreach_mul_(parameters, 1 - group["lr"] * WEIGHT_DECAY)
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                torch._foreach_add_(parameters, updates.unbind(), alpha=-size)
