"""Train a demo checkpoint from nothing: a DeepSeek-VL of the 7B's kind, 4.8 M parameters, or a DeepSeek-VL2, 2.9 M.

    python demo/train.py                        all stages; run it again to go on where it stopped
    python demo/train.py --kind vl2             the same for the DeepSeek-VL2
    python demo/train.py --minutes 1            as far as a minute goes; so with --steps

What the stages teach stands in vl_lessons.py and vl2_lessons.py. `gallery` and `boxes` are for a GPU: six minutes on an
H200, hours on 2 cores. The others take these three hours for the first demo and two for the second; stopped within the
first stage, a model cannot speak yet.

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

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from muon import Muon
from stages import Batches, Lessons, Stage
from vl2_lessons import VL2Lessons
from vl_lessons import VLLessons

from generate import Parser, check_options, pick_device, told
from load_weights import read_config, save_model, unfinished
from model import DeepseekVL
from processor import Processor

KINDS = {"vl": VLLessons, "vl2": VL2Lessons}
WARMUP = 100
REPORT_EVERY, CHECK_EVERY, SAVE_SECONDS = 25, 500, 30
SAVED = {  # what a run is saved as
    "model": dict, "lessons": dict, "optimizers": list, "stage": int, "step": int, "seconds": float, "seed": int,
    "kind": str, "lines": int,
}  # fmt: skip


class Run:
    """What a run has learnt so far, and where it stands; saved often, so that stopping costs little."""

    def __init__(self, folder: Path, device: torch.device, seed: int, kind: str = "vl"):
        """Raises ValueError where the folder holds something else, or a run of another kind or seed."""
        self.folder, self.seed, self.kind, lessons = folder, seed, kind, KINDS[kind]
        self.file, self.history = folder / "unfinished.pt", folder / "history.csv"
        self.stage, self.step, self.seconds, self.optimizer_states = 0, 0, 0.0, []
        state = self.read() if self.file.exists() else None
        if state is None:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"--out {folder}: holds files, but no unfinished run; expected a new or empty folder")
            lessons.write_empty_checkpoint(folder)
            self.history.write_text(",".join(["stage", "step", "seconds", "loss", *lessons.measures]) + "\n")
        elif state["kind"] != kind:
            raise ValueError(f"--kind {kind}: the run in {folder} is of kind {state['kind']}")
        torch.manual_seed(seed)
        self.processor = Processor(folder)
        self.model = DeepseekVL(config := read_config(folder))
        self.lessons: Lessons = lessons(config)
        self.lessons.start(self.model, self.processor)
        self.model.to(device)
        self.lessons.to(device)
        if state is None:
            try:
                self.save()
            except OSError:  # a full disk, say: the same command may then start anew
                for file in folder.iterdir():
                    file.unlink()
                raise
        else:
            self.go_on(state)

    def read(self) -> dict:
        """What `save` wrote."""
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            wrong = [name for name, kind in SAVED.items() if not isinstance(state.get(name), kind)]
        except (UnpicklingError, EOFError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self.file}: not a run that this program saved ({type(error).__name__})") from error
        if wrong:
            raise ValueError(f"{self.file}: not a run that this program saved ({wrong[0]} is missing or damaged)")
        return state

    def go_on(self, state: dict) -> None:
        """From what was saved; history.csv without what was reported after that."""
        if state["seed"] != self.seed:
            raise ValueError(f"--seed {self.seed}: the run in {self.folder} has seed {state['seed']}")
        try:
            self.model.load_state_dict(state["model"])
            self.lessons.load_state_dict(state["lessons"])
        except RuntimeError as error:
            raise ValueError(f"{self.file}: not a run that this program saved ({str(error)[:200]})") from error
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.optimizer_states = state["optimizers"]
        lines = self.history.read_text(errors="replace").splitlines(keepends=True)
        self.history.write_text("".join(lines[: state["lines"]]))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "lessons": self.lessons.state_dict(),
            "optimizers": self.optimizer_states,
        }
        state |= {"stage": self.stage, "step": self.step, "seconds": self.seconds, "seed": self.seed, "kind": self.kind}
        state["lines"] = len(self.history.read_text().splitlines())
        with unfinished(self.file) as hidden:
            try:
                torch.save(state, hidden)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(str(error).partition("\n")[0]) from None

    def report(self, stage: Stage, loss: float, scores: dict[str, float]) -> None:
        """One line on the terminal and one in history.csv."""
        scores = self.lessons.state_of_reports() | scores
        told = "".join(f"  {task} {share:.0%}" for task, share in scores.items())
        left = self.seconds / max(self.step, 1) * (stage.steps - self.step)  # of this stage
        spent = f"{self.seconds:5.0f} s, {left:.0f} left"
        print(f"{stage.name:9} {self.step:5}/{stage.steps}  {spent}  loss {loss:.4f}{told}", flush=True)
        with self.history.open("a") as file:
            row = [stage.name, self.step, round(self.seconds), f"{loss:.4f}"]
            row += [scores.get(name, "") for name in self.lessons.measures]
            csv.writer(file, lineterminator="\n").writerow(row)

    def batches(self, stage: Stage, seed: int | str, first: int) -> Batches:
        return Batches(type(self.lessons), stage, self.folder, seed, first)

    def scores(self, stage: Stage) -> dict[str, float]:
        """Held-out accuracy."""
        self.model.eval()
        found = self.lessons.scores(stage, self.model, self.processor, self.batches(stage, "held-out", 0)[0])
        self.model.train()
        return found


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
    model, lessons = run.model, run.lessons
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(stage.learns))
    lessons.requires_grad_(stage.heads)
    learning = [p for p in [*model.parameters(), *lessons.parameters()] if p.requires_grad]
    optimizers = make_optimizers(model, learning)
    for optimizer, state in zip(optimizers, run.optimizer_states):
        optimizer.load_state_dict(state)
    workers = (cores // 2 - 1) if (cores := os.cpu_count() or 1) >= 4 else 0  # two cores are best left to the model
    batches = DataLoader(run.batches(stage, run.seed, run.step), batch_size=None, num_workers=workers)
    losses: list[Tensor] = []
    started, saved = time.perf_counter() - run.seconds, time.perf_counter()
    for batch in batches:
        warm, share = run.step / WARMUP, run.step / stage.steps
        pace = min(warm, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * pace
            optimizer.zero_grad()
        loss = lessons.loss(stage, model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        lessons.after_step(model, pace)
        losses.append(loss.detach())
        run.step += 1
        limits.steps -= 1
        now = time.perf_counter()
        run.seconds = now - started
        ends, stops = run.step == stage.steps, limits.reached
        if run.step % REPORT_EVERY == 0 or ends or stops:
            measured = run.step % CHECK_EVERY == 0 or ends
            scores = run.scores(stage) if measured and stage.held_out else {}
            run.report(stage, torch.stack(losses).mean().item(), scores)
            losses.clear()
        if now - saved > SAVE_SECONDS or ends or stops:
            saved = now
            run.optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
            run.save()
        if stops:
            break


def train(run: Run, limits: Limits, stages: Sequence[Stage] | None = None) -> None:
    """All stages, or as many as the limits allow."""
    stages = run.lessons.stages if stages is None else stages
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
    add("--kind", choices=tuple(KINDS), default="vl", help="DeepSeek-VL 7B or DeepSeek-VL2 (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, metavar="M", help="stop after M minutes; a later run goes on")
    add("--steps", type=int, default=math.inf, metavar="N", help="stop after N steps; a later run goes on")
    add("--seed", type=int, default=0, metavar="S", help="on one CPU the same seed gives the same run (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # on a GPU: products in TF32
    with told("stopped; the same command goes on from what was saved last"):
        check_options(seed=args.seed)
        limits = Limits(args.minutes, args.steps)
        train(Run(args.out, pick_device(args.device), args.seed, args.kind), limits)


if __name__ == "__main__":
    main()
