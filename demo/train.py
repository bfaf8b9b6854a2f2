"""Train the demo checkpoint from nothing: a DeepSeek-VL of the 7B's kind (SAM, SigLIP, hybrid aligner, Llama), 4.8 M.

    python demo/train.py                        all seven stages; run it again to go on where it stopped
    python demo/train.py --minutes 1            as far as a minute goes; so with --steps

The stages follow the paper (DeepSeek-VL, section 3.2). It starts from SAM, SigLIP and DeepSeek-LLM as others trained
them; the first two stages stand in for that:

    towers    SAM and SigLIP alone: say what is in each ninth of a crowded picture (for SAM also the letters),
              through linear layers that are thrown away afterwards. Stands in for their pretraining.
    language  Llama alone, on conversations about scenes told in words. Stands in for DeepSeek-LLM's.
    adaptor   the paper's stage 1: the aligner learns on captions; all else is frozen.
    joint     stage 2: aligner and language model; one conversation in five is text alone.
    chat      stage 3: everything but SAM.
    practice  stage 3 a little longer, with more to count.
    drawings  everything, on pictures as people draw them: canvases of other sizes, white and black grounds, pure
              colours, and pictures without shapes.

From `language` on the loss is on answers alone (`mask_prompt`): stories and questions are drawn by chance, and teach
nothing. All stages take about two hours on 2 cores; stopped within `towers`, the model cannot speak yet.

Loss and held-out accuracy (of 16 pictures for the towers, of 50 questions of each kind for answers) print as it goes
and are kept in history.csv beside the checkpoint, with the seconds since the stage began.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from random import Random

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from drawings import drawing_chat
from empty_checkpoint import write_empty_checkpoint
from evaluate import DRAWINGS, accuracy
from muon import Muon
from scenes import TASKS, chat, draw, random_scene
from towers import TowerLoss, letter_map, ninths

from generate import Parser, fail, pick_device
from load_weights import read_config, save_model
from model import DeepseekVL
from processor import Processor


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int  # pictures or conversations a step
    rate: float  # learning rate: rises over WARMUP steps, below a cosine from this down to a twentieth
    learns: tuple[str, ...]  # parts of the model, by the beginnings of their parameters' names
    held_out: int = 50  # questions of each kind that are asked every CHECK_EVERY steps and at the end; 0: none


WARMUP = 100
STAGES = (
    Stage("towers", 2200, 16, 2e-3, ("vision",)),
    Stage("language", 700, 16, 3e-3, ("language", "lm_head")),
    Stage("adaptor", 200, 16, 2e-3, ("aligner",)),
    Stage("joint", 6000, 16, 2e-3, ("aligner", "language", "lm_head")),
    Stage("chat", 1200, 16, 1e-3, ("vision.low", "aligner", "language", "lm_head")),
    Stage("practice", 450, 16, 5e-4, ("aligner", "language", "lm_head")),
    Stage("drawings", 1000, 16, 6e-4, ("vision", "aligner", "language", "lm_head")),
)
# Asked for more often, because in held-out answers they were the weakest by then.
WEAK = {"chat": ("relation", "relation"), "practice": ("count", "count", "count")}
REPORT_EVERY, CHECK_EVERY, SAVE_SECONDS = 25, 500, 30
ALSO = (*DRAWINGS, "no shapes")  # measured in the stage "drawings"
MEASURES = ("shapes", "signs", *TASKS, *ALSO)  # held out: what the towers name, what the model answers


# ------------------------------------------------------------------------------------------- data


class Batches(Dataset):
    """The batches of one stage. Batch i is always the same, whenever and wherever it is made."""

    def __init__(self, stage: Stage, folder: Path, seed: int | str, first: int):
        self.stage, self.seed, self.first = stage, seed, first
        self.processor = Processor(folder)
        self.grid = read_config(folder).vision.high.grid

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
            return chat(rng, tasks=("describe",))
        if self.stage.name == "drawings":
            return drawing_chat(rng)
        if self.stage.name in WEAK:
            tasks = (*TASKS, *WEAK[self.stage.name])
            return chat(rng, tasks, pictures=rng.random() < 0.95, describe_ends=False)
        return chat(rng, pictures=rng.random() < {"language": 0, "joint": 0.8}[self.stage.name])


def loss_of(stage: Stage, model: DeepseekVL, tower_loss: TowerLoss, batch: dict[str, Tensor]) -> Tensor:
    return tower_loss(model.vision, batch) if stage.name == "towers" else model(**batch).loss


# ------------------------------------------------------------------------------------------- training


def start_small(model: DeepseekVL) -> None:
    """Start the language model with small embeddings and layers that add little to them, as GPT-2 does, and its head as
    a copy of the embeddings: then to repeat a word seen before needs no learning word by word."""
    for name, p in model.language.named_parameters():
        if p.dim() == 2:
            std = 0.02 if "embed" in name else p.shape[1] ** -0.5
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=std / math.sqrt(2 * len(model.language.layers)) if adds else std)
    model.lm_head.weight.data.copy_(model.language.embed_tokens.weight)


class Run:
    """What a run has learnt so far, and where it stands; saved often, so that stopping costs little."""

    def __init__(self, folder: Path, device: torch.device, seed: int):
        """Raises ValueError where the folder holds something else, or a run with another seed."""
        self.folder, self.seed = folder, seed
        self.file, self.history = folder / "unfinished.pt", folder / "history.csv"
        self.stage, self.step, self.seconds, self.optimizer_states = 0, 0, 0.0, []
        state = self.read() if self.file.exists() else None
        if state is None:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"--out {folder}: holds files, but no unfinished run; expected a new or empty folder")
            write_empty_checkpoint(folder)
            self.history.write_text(",".join(["stage", "step", "seconds", "loss", *MEASURES]) + "\n")
        torch.manual_seed(seed)
        config = read_config(folder)
        self.model = DeepseekVL(config).to(device)
        start_small(self.model)
        nn.init.ones_(self.model.vision.high.hd_alpha_downsamples)  # SAM's early and late features start as equals
        self.tower_loss = TowerLoss(config.vision).to(device)
        self.processor = Processor(folder)
        if state is None:
            self.save()
        else:
            self.go_on(state)

    def read(self) -> dict:
        """What `save` wrote."""
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            missing = {"model", "tower_loss", "optimizers", "stage", "step", "seconds", "seed", "lines"} - set(state)
        except (UnpicklingError, EOFError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.file}: not a run that this program saved ({type(error).__name__})") from error
        if missing:
            raise ValueError(f"{self.file}: not a run that this program saved (no {min(missing)})")
        return state

    def go_on(self, state: dict) -> None:
        """From what was saved; history.csv without what was reported after that."""
        if state["seed"] != self.seed:
            raise ValueError(f"--seed {self.seed}: the run in {self.folder} has seed {state['seed']}")
        self.model.load_state_dict(state["model"])
        self.tower_loss.load_state_dict(state["tower_loss"])
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.optimizer_states = state["optimizers"]
        lines = self.history.read_text().splitlines(keepends=True)
        self.history.write_text("".join(lines[: state["lines"]]))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "tower_loss": self.tower_loss.state_dict(),
            "optimizers": self.optimizer_states,
        }
        state |= {"stage": self.stage, "step": self.step, "seconds": self.seconds, "seed": self.seed}
        state["lines"] = len(self.history.read_text().splitlines())
        unfinished = self.file.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def report(self, stage: Stage, loss: float, scores: dict[str, float]) -> None:
        """One line on the terminal and one in history.csv."""
        told = "".join(f"  {task} {share:.0%}" for task, share in scores.items())
        left = self.seconds / max(self.step, 1) * (stage.steps - self.step)  # of this stage
        spent = f"{self.seconds:5.0f} s, {left:.0f} left"
        print(f"{stage.name:9} {self.step:5}/{stage.steps}  {spent}  loss {loss:.4f}{told}", flush=True)
        with self.history.open("a") as file:
            row = [stage.name, self.step, round(self.seconds), f"{loss:.4f}"]
            csv.writer(file, lineterminator="\n").writerow(row + [scores.get(name, "") for name in MEASURES])

    def scores(self, stage: Stage) -> dict[str, float]:
        """Held-out accuracy: of SAM's linear layers in the first stage, of answers in the others."""
        if not stage.held_out:
            return {}
        if stage.name == "towers":
            return self.tower_loss.scores(self.model.vision, Batches(stage, self.folder, "held-out", 0)[0])
        tasks = (*TASKS, *ALSO) if stage.name == "drawings" else TASKS
        pictures = stage.name != "language"
        return accuracy(self.model, self.processor, stage.held_out, tasks, pictures, split="held-out")


def make_optimizers(model: DeepseekVL, learning: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for the weights of linear layers; AdamW for all else: embeddings, the head, convolutions, vectors, the
    towers' loss."""
    linear = {module.weight for part in (model.vision, model.aligner, model.language) for module in part.modules()
              if isinstance(module, nn.Linear)}  # fmt: skip
    hidden = [p for p in learning if p in linear]
    rest = [p for p in learning if p not in linear]
    matrices, vectors = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return [*([Muon(hidden)] if hidden else []), torch.optim.AdamW(groups, betas=(0.9, 0.98))]


@dataclass
class Limits:
    """How far one run of this program goes."""

    minutes: float = math.inf
    steps: float = math.inf

    def __post_init__(self):
        """Raises ValueError for limits that leave nothing to do."""
        if not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes:g}: expected more than 0")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: expected at least 1")
        self.deadline = time.perf_counter() + 60 * self.minutes

    @property
    def reached(self) -> bool:
        return self.steps < 1 or time.perf_counter() > self.deadline


def train_stage(run: Run, stage: Stage, limits: Limits) -> None:
    """Train until the stage ends or a limit is reached."""
    model, tower_loss = run.model, run.tower_loss
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(stage.learns))
    tower_loss.requires_grad_(stage.name == "towers")
    learning = [p for p in [*model.parameters(), *tower_loss.parameters()] if p.requires_grad]
    optimizers = make_optimizers(model, learning)
    for optimizer, state in zip(optimizers, run.optimizer_states):
        optimizer.load_state_dict(state)
    workers = min(4, cores - 1) if (cores := os.cpu_count() or 1) >= 4 else 0  # two cores are best left to the model
    batches = DataLoader(Batches(stage, run.folder, run.seed, run.step), batch_size=None, num_workers=workers)
    losses: list[Tensor] = []
    started, saved = time.perf_counter() - run.seconds, time.perf_counter()
    for batch in batches:
        warm, share = run.step / WARMUP, run.step / stage.steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * min(warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
            optimizer.zero_grad()
        loss = loss_of(stage, model, tower_loss, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
        run.step += 1
        limits.steps -= 1
        now = time.perf_counter()
        run.seconds = now - started
        ends, stops = run.step == stage.steps, limits.reached
        if run.step % REPORT_EVERY == 0 or ends or stops:
            measured = run.step % CHECK_EVERY == 0 or ends
            run.report(stage, torch.stack(losses).mean().item(), run.scores(stage) if measured else {})
            losses.clear()
        if now - saved > SAVE_SECONDS or ends or stops:
            saved = now
            run.optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
            run.save()
        if stops:
            break


def train(run: Run, limits: Limits, stages: Sequence[Stage] = STAGES) -> None:
    """All stages, or as many as the limits allow."""
    while run.stage < len(stages):
        stage = stages[run.stage]
        train_stage(run, stage, limits)
        save_model(run.model, run.folder, torch.float16)
        if run.step == stage.steps:
            run.stage, run.step, run.seconds, run.optimizer_states = run.stage + 1, 0, 0.0, []
            run.save()
        if run.stage < len(stages) and limits.reached:
            print(f"stopped; the same command goes on from here. So far: {run.folder}")
            return
    run.file.unlink()
    print(f"done: {run.folder}")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "retrained", metavar="DIR", help="default: %(default)s")
    add("--minutes", type=float, default=math.inf, metavar="M", help="stop after M minutes; a later run goes on")
    add("--steps", type=int, default=math.inf, metavar="N", help="stop after N steps; a later run goes on")
    add("--seed", type=int, default=0, metavar="S", help="on one CPU the same seed gives the same run (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # on a GPU: products in TF32
    try:
        limits = Limits(args.minutes, args.steps)
        train(Run(args.out, pick_device(args.device), args.seed), limits)
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved last", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
