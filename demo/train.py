"""Train the demo checkpoint from nothing: a DeepSeek-VL of the 7B's kind (SAM, SigLIP, hybrid aligner, Llama), 4.7 M.

    python demo/train.py                        all five stages; run it again to go on where it stopped
    python demo/train.py --minutes 1 --out /tmp/demo

The stages follow the paper (DeepSeek-VL, section 3.2). It starts from SAM, SigLIP and DeepSeek-LLM as others trained
them; the first two stages stand in for that:

    towers    SAM and SigLIP alone: say what is in each ninth of a crowded picture (for SAM also the letters),
              through linear layers that are thrown away afterwards. Stands in for their pretraining.
    language  Llama alone: next-token prediction on conversations about scenes told in words. For DeepSeek-LLM's.
    adaptor   the paper's stage 1: the aligner learns on captions; all else is frozen.
    joint     stage 2: aligner and language model; one conversation in five is text alone.
    chat      stage 3: everything (the paper leaves SAM frozen, to save memory).

In the last two the loss is on the answers alone: here questions are drawn by chance, and teach nothing.

Loss and held-out accuracy (of 16 pictures for the towers, of 50 questions of each kind for answers) print as it goes
and are kept in history.csv beside the checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from empty_checkpoint import write_empty_checkpoint
from evaluate import accuracy
from scenes import COLORS, KINDS, RADII, SIDE, TASKS, Scene, chat, draw, letters, random_scene

from generate import fail, pick_device
from load_weights import read_config, save_model
from model import DeepseekVL
from processor import Processor
from vision import HybridConfig, HybridTower


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int  # pictures or conversations a step
    rate: float  # the highest learning rate, reached after WARMUP steps, then a cosine down to a twentieth
    learns: tuple[str, ...]  # parts of the model


WARMUP = 100
STAGES = (
    Stage("towers", 2600, 16, 2e-3, ("vision",)),
    Stage("language", 2500, 16, 2e-3, ("language", "lm_head")),
    Stage("adaptor", 200, 16, 2e-3, ("aligner",)),
    Stage("joint", 5000, 16, 8e-4, ("aligner", "language", "lm_head")),
    Stage("chat", 4000, 16, 4e-4, ("vision", "aligner", "language", "lm_head")),
)
REPORT_EVERY, CHECK_EVERY, SAVE_SECONDS = 25, 500, 30
MEASURES = ("shapes", "signs", *TASKS)  # held out: what the towers name, what the model answers


# ------------------------------------------------------------------------------------------- data and losses

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


def letter_map(scene: Scene, grid: int) -> Tensor:
    """For each patch of SAM's grid the letter whose middle lies in it, or 0: int64 (grid * grid,)."""
    labels = torch.zeros(grid, grid, dtype=torch.long)
    for sign in scene.signs:
        for letter, x, y in letters(sign):
            column, row = (min(grid - 1, max(0, int(at * grid / SIDE))) for at in (x, y))
            labels[row, column] = LETTERS.index(letter)
    return labels.flatten()


class TowerLoss(nn.Module):
    """Linear layers on the towers' outputs, and what they are asked. None of this is kept.

    On the mean of each ninth's four tokens: what is in it? On each token: where is it, so that a language model can
    tell places apart? On each patch after SAM's last block, in the place of the segmentation that it was trained for:
    which letter is here?
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        choices = [len(CONTENTS), len(COLORS), len(RADII), *[len(LETTERS)] * SIGN_LENGTH]
        self.high = nn.ModuleList(nn.Linear(config.high.downsample_channels[-1], n) for n in choices)
        self.low = nn.ModuleList(nn.Linear(config.low.width, n) for n in choices[:3])
        widths = config.high.downsample_channels[-1], config.low.width
        self.place = nn.ModuleList(nn.Linear(width, config.low.grid**2) for width in widths)
        self.letter = nn.Linear(config.high.width, len(LETTERS))
        self.register_buffer("rarity", torch.tensor([0.1] + [1.0] * (len(LETTERS) - 1)))

    def forward(self, tower: HybridTower, batch: dict[str, Tensor]) -> Tensor:
        """The sum of all heads' mean cross entropies."""
        patches: list[Tensor] = []
        hook = tower.high.blocks[-1].register_forward_hook(lambda module, inputs, output: patches.append(output))
        high, low = tower(*tower.split(batch["pixel_values"].to(self.rarity.device)))
        hook.remove()
        letter_labels = batch["letters"].to(self.rarity.device).flatten()
        loss = F.cross_entropy(self.letter(patches[0]).flatten(0, 2), letter_labels, self.rarity)
        labels = batch["labels"].to(self.rarity.device)
        for heads, place, tokens in zip((self.high, self.low), self.place, (high, low)):
            here = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
            loss = loss + F.cross_entropy(place(tokens).flatten(0, 1), here)
            cells = self.mean_of_ninths(tokens)
            for i, head in enumerate(heads):
                loss = loss + F.cross_entropy(head(cells).flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORED)
        return loss

    @torch.no_grad()
    def scores(self, tower: HybridTower, batch: dict[str, Tensor]) -> dict[str, float]:
        """Of the shapes, the share whose kind, colour and size SAM's heads get right; of the signs, the share read."""
        high, _ = tower(*tower.split(batch["pixel_values"].to(self.rarity.device)))
        cells, labels = self.mean_of_ninths(high), batch["labels"].to(self.rarity.device)
        right = torch.stack([head(cells).argmax(-1) for head in self.high], dim=-1) == labels
        is_shape, is_sign = labels[..., 1] != IGNORED, labels[..., 3] != IGNORED
        shapes, signs = right[is_shape][:, :3].all(-1), right[is_sign][:, 3:].all(-1)
        return {"shapes": shapes.float().mean().item(), "signs": signs.float().mean().item()}

    @staticmethod
    def mean_of_ninths(tokens: Tensor) -> Tensor:
        """(B, 36, C) -> (B, 9, C)."""
        side = math.isqrt(tokens.shape[1])
        return F.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, (side, side)), 3).flatten(2).transpose(1, 2)


class Batches(Dataset):
    """The batches of one stage. Batch i is always the same, whenever and wherever it is made."""

    def __init__(self, stage: Stage, folder: Path, seed: int | str, first: int):
        self.stage, self.seed, self.first = stage, seed, first
        self.processor = Processor(folder)
        self.grid = read_config(folder).vision.high.grid
        self.processor.mask_prompt = stage.name in ("joint", "chat")  # the loss is on answers alone

    def __len__(self) -> int:
        return self.stage.steps - self.first

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rngs = [
            Random(f"{self.stage.name}-{self.seed}-{(self.first + i) * self.stage.batch + row}")
            for row in range(self.stage.batch)
        ]
        if self.stage.name == "towers":
            scenes = [random_scene(rng, shapes=(1, 4), signs=(2, 5)) for rng in rngs]
            pixels = [self.processor.image_inputs(draw(scene))[0]["pixel_values"] for scene in scenes]
            labels = torch.stack([ninths(scene) for scene in scenes])
            letter_labels = torch.stack([letter_map(scene, self.grid) for scene in scenes])
            return {"pixel_values": torch.cat(pixels), "labels": labels, "letters": letter_labels}
        return self.processor([self.conversation(rng) for rng in rngs], labels=True)

    def conversation(self, rng: Random) -> list[dict]:
        if self.stage.name == "adaptor":
            return chat(rng, turns=1, tasks=("describe",))
        pictures = rng.random() < {"language": 0, "joint": 0.8, "chat": 0.95}[self.stage.name]
        return chat(rng, pictures=pictures)


def loss_of(stage: Stage, model: DeepseekVL, tower_loss: TowerLoss, batch: dict[str, Tensor]) -> Tensor:
    return tower_loss(model.vision, batch) if stage.name == "towers" else model(**batch).loss


# ------------------------------------------------------------------------------------------- training


class Run:
    """What a run has learnt so far, and where it stands; saved often, so that stopping costs little."""

    def __init__(self, folder: Path, device: torch.device, seed: int):
        """Raises ValueError where the folder holds something else, or a run with another seed."""
        self.folder, self.seed = folder, seed
        self.file, self.history = folder / "unfinished.pt", folder / "history.csv"
        self.stage, self.step, self.seconds, self.optimizer_state = 0, 0, 0.0, {}
        state = torch.load(self.file, map_location="cpu", weights_only=True) if self.file.exists() else None
        if state is None:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"--out {folder}: holds files, but no unfinished run; expected a new or empty folder")
            write_empty_checkpoint(folder)
            self.history.write_text(",".join(["stage", "step", "seconds", "loss", *MEASURES]) + "\n")
        torch.manual_seed(seed)
        config = read_config(folder)
        self.model = DeepseekVL(config).to(device)
        nn.init.ones_(self.model.vision.high.hd_alpha_downsamples)  # SAM's early and late features start as equals
        self.tower_loss = TowerLoss(config.vision).to(device)
        self.processor = Processor(folder)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.tower_loss.load_state_dict(state["tower_loss"])
            self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
            self.optimizer_state = state["optimizer"]
            if state["seed"] != seed:
                raise ValueError(f"--seed {seed}: the run in {folder} has seed {state['seed']}")
            lines = self.history.read_text().splitlines(keepends=True)  # without what was reported, but not saved
            self.history.write_text("".join(lines[: state["lines"]]))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "tower_loss": self.tower_loss.state_dict(),
            "optimizer": self.optimizer_state,
        }
        state |= {"stage": self.stage, "step": self.step, "seconds": self.seconds, "seed": self.seed}
        state["lines"] = len(self.history.read_text().splitlines())
        unfinished = self.file.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def report(self, stage: Stage, loss: float, scores: dict[str, float]) -> None:
        """One line on the terminal and one in history.csv."""
        told = "".join(f"  {task} {share:.0%}" for task, share in scores.items())
        print(f"{stage.name:9} {self.step:5}/{stage.steps}  {self.seconds:5.0f} s  loss {loss:.4f}{told}", flush=True)
        with self.history.open("a") as file:
            row = [stage.name, self.step, round(self.seconds), f"{loss:.4f}"]
            csv.writer(file, lineterminator="\n").writerow(row + [scores.get(name, "") for name in MEASURES])

    def scores(self, stage: Stage) -> dict[str, float]:
        """Held-out accuracy: of SAM's linear layers in the first stage, of answers in the others."""
        if stage.name == "towers":
            return self.tower_loss.scores(self.model.vision, Batches(stage, self.folder, "held-out", 0)[0])
        return accuracy(self.model, self.processor, 50, pictures=stage.name != "language", split="held-out")


def train_stage(run: Run, stage: Stage, deadline: float) -> bool:
    """Train until the stage ends, or the time does. Returns whether the stage ended."""
    model, tower_loss = run.model, run.tower_loss
    for name, part in model.named_children():
        part.requires_grad_(name in stage.learns)
    tower_loss.requires_grad_(stage.name == "towers")
    learning = [p for p in [*model.parameters(), *tower_loss.parameters()] if p.requires_grad]
    matrices, vectors = [p for p in learning if p.dim() > 1], [p for p in learning if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    if run.optimizer_state:
        optimizer.load_state_dict(run.optimizer_state)
    workers = min(4, cores - 1) if (cores := os.cpu_count() or 1) >= 4 else 0  # two cores are best left to the model
    batches = DataLoader(
        Batches(stage, run.folder, run.seed, run.step), batch_size=None, num_workers=workers,
        prefetch_factor=2 if workers else None,
    )  # fmt: skip
    losses: list[Tensor] = []
    started, saved = time.perf_counter() - run.seconds, time.perf_counter()
    for batch in batches:
        warm, share = run.step / WARMUP, run.step / stage.steps
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * min(warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        loss = loss_of(stage, model, tower_loss, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        run.step += 1
        now = time.perf_counter()
        run.seconds = now - started
        ends = run.step == stage.steps
        if run.step % REPORT_EVERY == 0 or ends or now > deadline:
            measured = run.step % CHECK_EVERY == 0 or ends
            run.report(stage, torch.stack(losses).mean().item(), run.scores(stage) if measured else {})
            losses.clear()
        if now - saved > SAVE_SECONDS or ends or now > deadline:
            saved = now
            run.optimizer_state = optimizer.state_dict()
            run.save()
        if now > deadline:
            break
    return run.step == stage.steps


def train(run: Run, deadline: float) -> None:
    """All stages, or as many as there is time for."""
    while run.stage < len(STAGES):
        ended = train_stage(run, STAGES[run.stage], deadline)
        save_model(run.model, run.folder, torch.float16)
        if not ended:
            print(f"stopped; the same command goes on from here. So far: {run.folder}")
            return
        run.stage, run.step, run.seconds, run.optimizer_state = run.stage + 1, 0, 0.0, {}
        run.save()
    run.file.unlink()
    print(f"done: {run.folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "retrained", metavar="DIR", help="default: %(default)s")
    add("--minutes", type=float, default=math.inf, metavar="M", help="stop after M minutes; a later run goes on")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the same seed on the same machine gives the same run (default: 0)",
    )
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # on a GPU: products in TF32
    try:
        run = Run(args.out, pick_device(args.device), args.seed)
        train(run, time.perf_counter() + 60 * args.minutes)
    except (ValueError, OSError) as error:
        fail(str(error))
    except (UnpicklingError, KeyError, RuntimeError) as error:
        fail(f"{args.out / 'unfinished.pt'}: not a run that this program saved ({type(error).__name__})")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
