"""What train.py asks of each kind of model: stages, batches, a loss and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from model import DeepseekVL, ModelConfig
from processor import Processor


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int  # pictures or conversations a step
    rate: float  # learning rate: rises over WARMUP steps, below a cosine from this down to a twentieth
    learns: tuple[str, ...]  # parts of the model, by the beginnings of their parameters' names
    held_out: int = 50  # questions of each kind, asked every CHECK_EVERY steps and at the end; 0: nothing is measured
    heads: bool = False  # whether the lessons' own layers learn too


class Lessons(nn.Module):
    """How one kind of model is taught. Its layers are needed for a loss alone, and are not part of the checkpoint."""

    stages: tuple[Stage, ...]
    measures: tuple[str, ...]  # the names of all scores

    def __init__(self, config: ModelConfig):
        super().__init__()

    @staticmethod
    def write_empty_checkpoint(folder: Path) -> None:
        """Everything but the weights."""
        raise NotImplementedError

    @staticmethod
    def batch(stage: Stage, processor: Processor, rngs: list[Random]) -> dict[str, Tensor]:
        """One picture or conversation for each random generator."""
        raise NotImplementedError

    def start(self, model: DeepseekVL, processor: Processor) -> None:
        """Prepare a model of random weights."""

    def loss(self, stage: Stage, model: DeepseekVL, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def after_step(self, model: DeepseekVL, pace: float) -> None:
        """What changes without a gradient; `pace` is the share of the stage's learning rate that the step had."""

    def scores(self, stage: Stage, model: DeepseekVL, processor: Processor, batch: dict[str, Tensor]) -> dict:
        """Held-out accuracy, from a held-out batch of the stage or from answers."""
        raise NotImplementedError

    def state_of_reports(self) -> dict[str, float]:
        """What else a report shows, since the last one."""
        return {}


@contextmanager
def outputs(**modules: nn.Module) -> Iterator[dict[str, Any]]:
    """Within this, the dict holds what each module gave last."""
    kept: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, out, name=name: kept.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def start_small(model: DeepseekVL) -> None:
    """Start the language model with small embeddings and layers that add little to them, as GPT-2 does, and its head as
    a copy of the embeddings: then to repeat a word seen before needs no learning word by word."""
    for name, p in model.language.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name or "gate.weight" in name else p.shape[1] ** -0.5
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=std / math.sqrt(2 * len(model.language.layers)) if adds else std)
    model.lm_head.weight.data.copy_(model.language.embed_tokens.weight)


class Batches(Dataset):
    """The batches of one stage. Batch i is always the same, whenever and wherever it is made."""

    def __init__(self, lessons: type[Lessons], stage: Stage, folder: Path, seed: int | str, first: int):
        self.lessons, self.stage, self.seed, self.first = lessons, stage, seed, first
        self.processor = Processor(folder)

    def __len__(self) -> int:
        return self.stage.steps - self.first

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rows = range((self.first + i) * self.stage.batch, (self.first + i + 1) * self.stage.batch)
        rngs = [Random(f"{self.stage.name}-{self.seed}-{row}") for row in rows]
        return self.lessons.batch(self.stage, self.processor, rngs)
