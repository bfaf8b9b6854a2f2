"""How the DeepSeek-VL demo is trained, in ten stages.

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
              colours, and pictures without shapes. The towers are asked again what they see, beside the answers.
    canvases  the same, longer and at a higher rate; every other batch is of crowded drawings, for the towers alone.
    signs     answers alone; half of the conversations are about usual scenes, with more signs to read.
    gallery   everything together, on a GPU, with what the towers see; one in two about usual scenes. The demo's was
              stopped after 3023 of 3500 steps.

From `language` on the loss is on answers alone (`mask_prompt`): stories and questions are drawn by chance, and teach
nothing.
"""

from __future__ import annotations

from random import Random

import torch
from drawings import Drawing, drawing_chat, on_the_square, paint, random_drawing
from empty_checkpoint import write_empty_checkpoint
from evaluate import DRAWINGS, accuracy
from scenes import TASKS, Scene, chat, draw, random_scene, talk
from stages import Lessons, Stage, outputs, start_small
from torch import Tensor, nn
from towers import TowerLoss, letter_map, ninths, shape_map

from model import DeepseekVL, ModelConfig
from processor import Processor

# Asked for more often, because in held-out answers they were the weakest by then.
WEAK = {"chat": ("relation", "relation"), "practice": ("count", "count", "count")}
LABELS = ("cells", "letters", "shapes")
DRAWN = ("drawings", "canvases", "signs", "gallery")
ALSO = (*DRAWINGS, "no shapes")  # measured in these stages


def conversation(stage: Stage, rng: Random) -> list[dict]:
    if stage.name == "signs":
        usual = rng.random() < 0.5
        return chat(rng, (*TASKS, "text", "text", "count"), describe_ends=False) if usual else drawing_chat(rng)[1]
    if stage.name == "adaptor":
        return chat(rng, tasks=("describe",))
    if stage.name in WEAK:
        return chat(rng, (*TASKS, *WEAK[stage.name]), pictures=rng.random() < 0.95, describe_ends=False)
    return chat(rng, pictures=rng.random() < {"language": 0, "joint": 0.8}[stage.name])


def gallery_chat(rng: Random) -> tuple[Scene, list[dict]]:
    """A scene and a conversation: one in two about usual scenes, with more signs to read."""
    if rng.random() < 0.7:
        return drawing_chat(rng)
    scene = random_scene(rng)
    return scene, talk(scene, draw(scene), rng, (*TASKS, "text", "text", "count"), turns=4, describe_ends=False)


class VLLessons(Lessons):
    stages = (
        Stage("towers", 2200, 16, 2e-3, ("vision",), heads=True),
        Stage("language", 700, 16, 3e-3, ("language", "lm_head")),
        Stage("adaptor", 200, 16, 2e-3, ("aligner",)),
        Stage("joint", 6000, 16, 2e-3, ("aligner", "language", "lm_head")),
        Stage("chat", 1200, 16, 1e-3, ("vision.low", "aligner", "language", "lm_head")),
        Stage("practice", 450, 16, 5e-4, ("aligner", "language", "lm_head")),
        Stage("drawings", 320, 16, 8e-4, ("vision", "aligner", "language", "lm_head"), heads=True),
        Stage("canvases", 1400, 16, 1.5e-3, ("vision", "aligner", "language", "lm_head"), heads=True),
        Stage("signs", 1000, 16, 8e-4, ("vision", "aligner", "language", "lm_head")),
        Stage("gallery", 3500, 32, 1.5e-3, ("vision", "aligner", "language", "lm_head"), 24, heads=True),
    )
    measures = ("shapes", "signs", *TASKS, *ALSO)  # held out: what the towers name, what the model answers
    write_empty_checkpoint = staticmethod(write_empty_checkpoint)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.towers = TowerLoss(config.vision)

    @staticmethod
    def batch(stage: Stage, processor: Processor, rngs: list[Random]) -> dict[str, Tensor]:
        if stage.name == "towers":
            scenes = [random_scene(rng, shapes=(1, 4), signs=(2, 5)) for rng in rngs]
            pixels = [processor.image_inputs(draw(scene))[0]["pixel_values"] for scene in scenes]
            batch = {"pixel_values": torch.cat(pixels)}
        elif stage.name == "canvases" and rngs[0].random() < 0.5:  # for the towers alone: much to see in each picture
            drawings = [random_drawing(rng, (5, 8)) for rng in rngs]
            pixels = [processor.image_inputs(paint(drawing))[0]["pixel_values"] for drawing in drawings]
            scenes, batch = [on_the_square(drawing) for drawing in drawings], {"pixel_values": torch.cat(pixels)}
        elif stage.heads:
            scenes, talks = zip(*map(gallery_chat if stage.name == "gallery" else drawing_chat, rngs))
            scenes = [on_the_square(scene) if isinstance(scene, Drawing) else scene for scene in scenes]
            batch = processor(list(talks), labels=True)
        else:
            return processor([conversation(stage, rng) for rng in rngs], labels=True)
        labels = {"cells": ninths, "letters": letter_map, "shapes": shape_map}
        return batch | {name: torch.stack([f(scene) for scene in scenes]) for name, f in labels.items()}

    def start(self, model: DeepseekVL, processor: Processor) -> None:
        start_small(model)
        nn.init.ones_(model.vision.high.hd_alpha_downsamples)  # SAM's early and late features start as equals

    def loss(self, stage: Stage, model: DeepseekVL, batch: dict[str, Tensor]) -> Tensor:
        if not stage.heads:
            return model(**batch).loss
        with outputs(patches=model.vision.high.blocks[-1], towers=model.vision) as kept:
            if "input_ids" not in batch:
                model.vision(*model.vision.split(batch["pixel_values"].to(model.device)))
                answers = 0.0
            else:
                answers = model(**{key: value for key, value in batch.items() if key not in LABELS}).loss
        return answers + (0.3 if stage.name in DRAWN else 1) * self.towers(kept["patches"], *kept["towers"], batch)

    def scores(self, stage: Stage, model: DeepseekVL, processor: Processor, batch: dict[str, Tensor]) -> dict:
        if stage.name == "towers":
            return self.towers.scores(model.vision, batch)
        tasks, pictures = (*TASKS, *ALSO) if stage.name in DRAWN else TASKS, stage.name != "language"
        return accuracy(model, processor, stage.held_out, tasks, pictures, split="held-out")
