"""How often a checkpoint that train.py made answers exactly right about scenes it was never trained on.

    python demo/evaluate.py --model demo/checkpoint --scenes 500
    python demo/evaluate.py --model demo/vl2 --scenes 500

Prints a table: each kind of question, as the model is, and with a part of what it sees taken away: SAM's features, or
DeepSeek-VL2's tiles. For DeepSeek-VL2 also how its tokens spread over its experts.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import evaluate_vl2
from drawings import paint, random_drawing, random_emptiness
from scenes import TASKS, Scene, ask, draw, random_scene, tell

from generate import DTYPES, Parser, generate, note, pick_device, pick_dtype, told
from load_weights import load_model
from model import DeepseekVL
from processor import Processor

BATCH = 50
DRAWINGS = {"drawing": (1, 1), "drawings": (2, 4)}  # least and most shapes
ALL_TASKS = (*TASKS, "no text", *DRAWINGS, "no shapes")


def picture_for(task: str, rng: Random) -> tuple[Scene, Image.Image]:
    """A scene that the task can be asked about, and its picture."""
    if task in DRAWINGS:
        drawing = random_drawing(rng, DRAWINGS[task])
        return drawing, paint(drawing)
    if task == "no shapes":
        return random_emptiness(rng, held_out=True)
    while True:
        scene = random_scene(rng)
        if task not in ("text", "no text") or bool(scene.text) == (task == "text"):
            return scene, draw(scene)


def exam(task: str, scenes: int, pictures: bool = True, split: str = "test") -> list[tuple[list[dict], str]]:
    """One question on each of that many fresh scenes, and the right answer.

    "text" asks where there is a sign, and "no text" where there is none. "drawing", "drawings" and "no shapes" ask for
    descriptions: of one shape on a canvas of any size, white, black, grey or muted; of two to four; of textures,
    gradients and a photograph's part that training never saw.
    """
    questions = []
    for i in range(scenes):
        rng, found = Random(f"{split}-{task}-{i}"), None
        kind = "describe" if task in (*DRAWINGS, "no shapes") else task.removeprefix("no ")
        while found is None:
            scene, picture = picture_for(task, rng)
            found = ask(scene, kind, rng)
        opening, images = ("<image>", [picture]) if pictures else (tell(scene), [])
        questions.append(([{"role": "user", "content": opening + found[0], "images": images}], found[1]))
    return questions


def answers(model: DeepseekVL, processor: Processor, conversations: list[list[dict]]) -> list[str]:
    """The greedy answer to each."""
    texts = []
    for start in range(0, len(conversations), BATCH):
        batch = processor(conversations[start : start + BATCH])
        texts += [processor.decode(ids).strip() for ids in generate(model, batch, max_new_tokens=80)]
    return texts


def accuracy(
    model: DeepseekVL,
    processor: Processor,
    scenes: int,
    tasks: Sequence[str] = TASKS,
    pictures: bool = True,
    split: str = "test",
) -> dict[str, float]:
    """For each kind of question the share answered exactly right."""
    shares = {}
    for task in tasks:
        questions = exam(task, scenes, pictures, split)
        given = answers(model, processor, [conversation for conversation, _ in questions])
        shares[task] = sum(text == right for text, (_, right) in zip(given, questions)) / scenes
    return shares


@contextmanager
def without_high_resolution(model: DeepseekVL):
    """Within this, SAM's features are zeros."""
    hook = model.vision.high.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        hook.remove()


def vl_shares(model: DeepseekVL, processor: Processor, scenes: int, task: str) -> dict[str, tuple[float, float]]:
    """For a kind of question the share answered right, and the same without SAM."""
    whole = accuracy(model, processor, scenes, [task])
    with without_high_resolution(model):
        part = accuracy(model, processor, scenes, [task])
    return {name: (share, part[name]) for name, share in whole.items()}


def vl2_shares(model: DeepseekVL, processor: Processor, scenes: int, task: str) -> dict[str, tuple[float, float]]:
    """The same for DeepSeek-VL2, without its local view."""
    whole, part = (
        evaluate_vl2.accuracy(model, processor, scenes, [task], local_view=local_view) for local_view in (True, False)
    )
    return {name: (share, part[name]) for name, share in whole.items()}


def evaluate(args: Namespace) -> None:
    """Print the tables."""
    if args.scenes < 1:
        raise ValueError(f"--scenes {args.scenes}: expected at least 1")
    device = pick_device(args.device)
    model = load_model(args.model, dtype=pick_dtype(args.dtype, device), device=device)
    processor = Processor(args.model)
    tasks, shares, columns = ALL_TASKS, vl_shares, "SAM and SigLIP | SAM's features zeros"
    if processor.is_vl2:
        tasks, shares, columns = evaluate_vl2.ALL_TASKS, vl2_shares, "both views | local view grey"
    rows, start = {}, time.perf_counter()
    for done, task in enumerate(tasks, start=1):
        rows |= shares(model, processor, args.scenes, task)
        left = (time.perf_counter() - start) / done * (len(tasks) - done)
        note(f"{done} of {len(tasks)} kinds, {left:.0f} s left")
    note("")
    print(f"in {str(model.dtype).removeprefix('torch.')} on {device}, {args.scenes} questions of each kind:\n")
    print(f"| right | {columns} |\n|---|---|---|")
    for task, (whole, part) in rows.items():
        print(f"| {task} | {whole:.1%} | {part:.1%} |")
    if processor.is_vl2:
        print("\nExperts' shares of tokens, over equal ones, least and most busy:")
        for name, counts in evaluate_vl2.expert_load(model, processor, args.scenes).items():
            relative = counts / counts.mean()
            print(f"{name}: {relative.min():.2f} and {relative.max():.2f}")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add, folder = parser.add_argument, Path(__file__).parent / "checkpoint"
    add("--model", type=Path, default=folder, metavar="DIR", help="default: %(default)s")
    add("--scenes", type=int, default=500, metavar="N", help="questions of each kind (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    with told():
        evaluate(parser.parse_args())


if __name__ == "__main__":
    main()
