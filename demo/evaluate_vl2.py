"""How often a DeepSeek-VL2 that train.py made answers right about scenes it was never trained on, and how well it
locates. Called by evaluate.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import torch
from drawings import random_emptiness
from stages import outputs
from torch import Tensor
from vl2_scenes import TASKS, Scene, ask, chat, draw, drawn_scene, random_scene

from generate import generate
from model import DeepseekVL, Router
from processor import Box, Processor, parse_boxes

MEASURED = (*TASKS, "box overlap")  # the mean intersection over union of "ground"
DRAWINGS = {"drawing": (1, 1), "drawings": (2, 4)}  # least and most shapes
ALL_TASKS = ("describe", "color", "count", "text", "no text", *DRAWINGS, "no shapes", "ground", "grounded")
BATCH = 50
FINE = (99900, 99900)  # a picture's size in which no thousandth is rounded away


def exam(task: str, scenes: int, split: str = "test") -> list[tuple[list[dict], str]]:
    """One question on each of that many fresh scenes, and the right answer."""
    questions = []
    for i in range(scenes):
        rng, found = Random(f"vl2-{split}-{task}-{i}"), None
        while found is None:
            if task == "no shapes":
                _, picture = random_emptiness(rng, held_out=True)
                found = ask(Scene((), (), 1, 1, 1, (0, 0, 0), 0, False, 0), "describe", rng)
            elif task in DRAWINGS:
                scene, picture = drawn_scene(rng, DRAWINGS[task])
                found = ask(scene, "describe", rng)
            else:
                scene = random_scene(rng, sign={"text": True, "no text": False}.get(task))
                picture, found = draw(scene), ask(scene, task.removeprefix("no "), rng)
        message = {"role": "user", "content": f"<image>\n{found[0]}", "images": [picture]}
        questions.append(([message], found[1]))
    return questions


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    wide, high = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
    both = max(0, wide) * max(0, high)
    areas = [(box.right - box.left) * (box.bottom - box.top) for box in (a, b)]
    return both / (sum(areas) - both)


def overlaps(given: str, right: str) -> list[float]:
    """For each box of the right answer its overlap with the given answer's, in order; one too few or many counts 0."""
    theirs, ours = parse_boxes(given, FINE), parse_boxes(right, FINE)
    pairs = zip(theirs, ours)
    return [overlap(*pair) for pair in pairs] + [0.0] * abs(len(theirs) - len(ours))


def answers(
    model: DeepseekVL, processor: Processor, conversations: list[list[dict]], local_view: bool = True
) -> list[str]:
    """The greedy answer to each, with its tags; without `local_view` all tiles but the whole picture's are grey."""
    texts = []
    for start in range(0, len(conversations), BATCH):
        batch = processor(conversations[start : start + BATCH])
        if not local_view:
            at = 0
            for wide, high in batch["images_spatial_crop"].tolist():
                batch["pixel_values"][at + 1 : at + 1 + wide * high] = 0
                at += 1 + wide * high
        for ids in generate(model, batch, max_new_tokens=150):
            text = processor.decode(ids, skip_special_tokens=False)
            texts.append(text.removesuffix(processor.tokenizer.tokens[processor.eos_token_id]).strip())
    return texts


def without_boxes(text: str) -> str:
    """A description without its tags and numbers."""
    return re.sub(r"<\|det\|>.*?<\|/det\|>|<\|/?ref\|>", "", text)


@torch.inference_mode()
def accuracy(
    model: DeepseekVL,
    processor: Processor,
    scenes: int,
    tasks: Sequence[str] = TASKS,
    split: str = "test",
    local_view: bool = True,
) -> dict[str, float]:
    """For each kind of question the share answered right.

    "ground" and "grounded" are right where the words are, there are as many boxes as things, and each overlaps by
    more than a half. "box overlap" is the mean over all boxes of "ground".
    """
    shares = {}
    for task in tasks:
        questions = exam(task, scenes, split)
        given = answers(model, processor, [conversation for conversation, _ in questions], local_view)
        pairs = [(text, right) for text, (_, right) in zip(given, questions)]
        if task in ("ground", "grounded"):
            found = [overlaps(*pair) for pair in pairs]
            same = [without_boxes(text) == without_boxes(right) for text, right in pairs]
            shares[task] = sum(words and min(all_boxes) > 0.5 for words, all_boxes in zip(same, found)) / scenes
            if task == "ground":
                boxes = [value for all_boxes in found for value in all_boxes]
                shares["box overlap"] = sum(boxes) / len(boxes)
        else:
            shares[task] = sum(text == right for text, right in pairs) / scenes
    return shares


@torch.inference_mode()
def expert_load(model: DeepseekVL, processor: Processor, scenes: int, split: str = "test") -> dict[str, Tensor]:
    """How many tokens each expert of each layer gets, of conversations about that many scenes, without padding."""
    load: dict[str, Tensor] = {}
    talks = [chat(Random(f"vl2-{split}-talk-{i}"))[2] for i in range(scenes)]
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    for start in range(0, scenes, BATCH):
        batch = processor(talks[start : start + BATCH])
        with outputs(**{name.replace(".", "_"): router for name, router in routers.items()}) as kept:
            model(**batch, logits_to_keep=1)
        real = batch["attention_mask"].flatten().bool()
        for name, router in routers.items():
            experts = kept[name.replace(".", "_")][0].cpu()[real].flatten()
            counts = torch.bincount(experts, minlength=router.config.n_routed_experts).float()
            load[name] = load.get(name, 0) + counts
    return load
