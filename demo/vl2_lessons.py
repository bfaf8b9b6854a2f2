"""How the DeepSeek-VL2 demo is trained: what its picture's tokens must know, and how its experts are kept busy.

towers  SigLIP and the aligner alone, in place of SigLIP's pretraining: each token of a tile says, in words of the
        vocabulary, what stands there (kind, colour, size, a sign's text), and how far it reaches; each patch says
        its letter. All through linear layers that are thrown away.
look    the decoder's first layers too: where in the picture is it? Each token says also the four numbers of its
        thing's box, its own place, and which thing it is in the order.
joint   everything, on conversations: the loss on answers, and half of what `look` asks.
answers everything, on answers alone.
longer  the same again, at a higher rate.
boxes   everything as in `joint`, on a GPU: more pictures a step, more questions each, and in a box a number near the
        right one counts in part. It was stopped after 2269 of 3000 steps.
canvases  answers alone; half of the pictures are drawings as people make them.
settle  a third of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from empty_vl2 import write_empty_vl2
from evaluate_vl2 import MEASURED, accuracy
from stages import Lessons, Stage, outputs, start_small
from torch import Tensor, nn
from vl2_scenes import (
    FIELDS,
    IGNORED,
    LETTERS,
    TASKS,
    chat,
    draw,
    letter_labels,
    number_ids,
    random_scene,
    token_labels,
    word_id,
)

from model import DeepseekVL, MixtureOfExperts, ModelConfig, Router
from processor import COORDINATES, Processor
from vision import attention

LAYERS = 3  # the decoder's first, after which tokens say what they see
TILE_FIELDS = ("kind", "color", "size", "text")  # what a tile alone can show
LABELS = ("seen", "reach", "letters")
NUMBER_FIELDS = ("left", "top", "right", "bottom", "across", "down")
FEWER = 5  # of what every token has, its place or nothing, every fifth token is asked
BLUR, BOX_BLUR = 6.0, 4.0  # standard deviations, in thousandths, of what counts as the right number; in an answer's box
BALANCE = 0.01  # the step of a bias; DeepSeek-V3 has 0.001, and four hundred times as many steps
EVERYTHING = ("vision", "aligner", "language", "lm_head")
SOFT = ("boxes", "canvases", "settle")  # stages in which a number near the right one counts in part
DRAWINGS = {"canvases": 0.5, "settle": 0.33}  # their share of the pictures


class Balance:
    """Keeps a model's experts equally busy without a loss (DeepSeek-V3, section 2.1.2).

    After each step an expert that got fewer tokens than the mean has its bias raised by BALANCE, less as the
    learning rate falls; one that got more, lowered. The bias takes part in the choice of experts alone.
    """

    def __init__(self):
        self.real: Tensor | None = None  # bool (tokens,): padding does not count
        self.counts: dict[Router, Tensor] = {}

    def watch(self, model: DeepseekVL) -> None:
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self.count)

    def count(self, router: Router, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        if router.training and self.real is not None:
            chosen = output[0][self.real].flatten()
            self.counts[router] = torch.bincount(chosen, minlength=router.config.n_routed_experts)

    @torch.no_grad()
    def step(self, pace: float) -> None:
        for router, count in self.counts.items():
            count = count.float()
            router.e_score_correction_bias += BALANCE * pace * torch.sign(count.mean() - count)


def mix_all(mixture: MixtureOfExperts, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """`MixtureOfExperts.mix` by every expert over all tokens: on a GPU few large products are fastest."""
    gate, up, down = (
        torch.stack([getattr(expert, name).weight for expert in mixture.experts])
        for name in ("gate_proj", "up_proj", "down_proj")
    )  # (E, hidden, D) twice, (E, D, hidden)
    share = weights.new_zeros(len(tokens), len(gate)).scatter(1, experts, weights)  # 0 for experts not chosen
    return torch.einsum("etd,te->td", (F.silu(tokens @ gate.mT) * (tokens @ up.mT)) @ down.mT, share)


def mix(mixture: MixtureOfExperts, tokens: Tensor, *chosen: Tensor) -> Tensor:
    return (mix_all if tokens.is_cuda else MixtureOfExperts.mix)(mixture, tokens, *chosen)


class VL2Lessons(Lessons):
    stages = (
        Stage("towers", 1800, 16, 3e-3, ("vision", "aligner", "lm_head"), heads=True),
        Stage("look", 300, 16, 2.5e-3, EVERYTHING, heads=True),
        Stage("joint", 1300, 16, 2e-3, EVERYTHING, 24, heads=True),
        Stage("answers", 100, 16, 5e-4, EVERYTHING, 50),
        Stage("longer", 1750, 16, 2e-3, EVERYTHING, 24),
        Stage("boxes", 3000, 64, 3e-3, EVERYTHING, 24, heads=True),
        Stage("canvases", 500, 16, 1.2e-3, EVERYTHING, 24),
        Stage("settle", 300, 16, 8e-4, EVERYTHING, 24),
    )
    measures = ("named", "placed", "read", *MEASURED, "least busy", "busiest")
    write_empty_checkpoint = staticmethod(write_empty_vl2)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        D = config.language.hidden_size
        self.fields = nn.ModuleList(nn.Linear(D, D) for _ in FIELDS)
        self.reach = nn.Linear(D, 4)
        self.letter = nn.Linear(config.vision.width, len(LETTERS))
        self.balance, self.load, self.nothing = Balance(), [], 0
        self.grid = config.vision.grid

    def start(self, model: DeepseekVL, processor: Processor) -> None:
        """Neighbouring numbers start alike: the embeddings of 0 to 999 are waves of several lengths."""
        start_small(model)
        embeddings = model.language.embed_tokens.weight.data
        D = embeddings.shape[1]
        waves = torch.logspace(math.log10(0.5), 2, D // 2) * 2 * math.pi / (COORDINATES + 1)
        angles = torch.arange(COORDINATES + 1)[:, None] * waves
        self.number_ids, self.nothing = number_ids(processor), word_id(processor, "\n")
        self.box_tags = [processor.tokenizer.token_to_id(tag) for tag in ("<|det|>", "<|/det|>")]
        embeddings[self.number_ids] = torch.cat((angles.sin(), angles.cos()), dim=1) * 0.02 * 2**0.5
        model.lm_head.weight.data.copy_(embeddings)
        self.balance.watch(model)
        for block in model.vision.blocks:
            block.attn.attend = attention  # with a gradient and so few patches, faster than the fused kernel
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.mix = partial(mix, module)

    @staticmethod
    def batch(stage: Stage, processor: Processor, rngs: list[Random]) -> dict[str, Tensor]:
        if stage.name in ("towers", "look"):  # only pictures, and what one can see there
            scenes = [random_scene(rng, crowded=stage.name == "towers") for rng in rngs]
            found = [(scene, draw(scene)) for scene in scenes]
            batch = processor([[{"role": "user", "content": "", "images": [picture]}] for _, picture in found])
        else:
            tasks, turns = ((*TASKS, "ground", "color", "count"), 4) if stage.name in SOFT else (TASKS, 3)
            found = [chat(rng, tasks, turns, drawn=DRAWINGS.get(stage.name, 0.0)) for rng in rngs]
            batch = processor([messages for *_, messages in found], labels=True)
            found = [pair for *pair, _ in found]
        if stage.heads:
            patches = processor.pixels.side // 6
            seen, reach = zip(*(token_labels(*pair, processor) for pair in found))
            batch |= {"seen": torch.cat(seen), "reach": torch.cat(reach)}
            batch["letters"] = torch.cat([letter_labels(*pair, processor, patches) for pair in found])
        return batch

    def see(self, model: DeepseekVL, batch: dict[str, Tensor], patches: Tensor, tokens: Tensor, fields: Sequence[str]):
        """What each token of a picture says is there, and each patch which letter, against what is: a scalar.

        Args:
            patches: SigLIP's (tiles, N, C); tokens: (tokens, D), of all pictures.
        """
        labels, normed = batch["seen"].to(tokens.device), F.rms_norm(tokens, tokens.shape[-1:])
        letters = batch["letters"].to(tokens.device).flatten()
        rarity = torch.ones(len(LETTERS), device=tokens.device)
        rarity[0] = 0.1
        loss = F.cross_entropy(self.letter(patches).flatten(0, 1), letters, rarity, ignore_index=IGNORED)
        some = torch.arange(len(labels), device=tokens.device) % FEWER == 0
        nothing = labels[:, 0] == self.nothing
        for field in fields:
            known = (right := labels[:, FIELDS.index(field)]) != IGNORED
            if field in ("across", "down"):
                known &= some
            elif field == "kind":
                known &= ~nothing | some
            if not known.any():
                continue
            right, words = right[known], self.fields[FIELDS.index(field)](normed[known])
            if field in NUMBER_FIELDS:  # a number near the right one is not quite wrong
                logits = F.linear(words, model.lm_head.weight[self.number_ids])
                loss = loss + 0.5 * F.cross_entropy(logits, self.near(self.values(right), BLUR))
            else:
                loss = loss + F.cross_entropy(model.lm_head(words), right)
        return loss

    def reach_loss(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """How far things reach from the tokens that show them: the mean error of the four sides, in tokens."""
        known = batch["seen"][:, FIELDS.index("left")] != IGNORED
        told = self.reach(F.rms_norm(tokens[known], tokens.shape[-1:]))
        return F.l1_loss(told, batch["reach"][known].to(tokens.device))

    def loss(self, stage: Stage, model: DeepseekVL, batch: dict[str, Tensor]) -> Tensor:
        if stage.name == "towers":
            patches = model.vision(batch["pixel_values"].to(model.device))
            tokens = torch.cat(model.aligner(patches, batch["images_spatial_crop"]))
            return self.see(model, batch, patches, tokens, TILE_FIELDS) + 4 * self.reach_loss(batch, tokens)
        inputs = {key: value for key, value in batch.items() if key not in (*LABELS, "labels")}
        self.balance.real = batch["attention_mask"].bool().flatten().to(model.device)
        parts = {"patches": model.vision, "tokens": model.aligner, "hidden": model.language.layers[LAYERS - 1]}
        with outputs(**parts, last=model.language) as kept:
            model(**inputs, logits_to_keep=1)
        self.balance.real, seen = None, 0.0
        if stage.heads:
            shown = kept["hidden"][batch["images_seq_mask"].to(model.device)]
            seen = self.see(model, batch, kept["patches"], shown, FIELDS)
            seen = seen + 2 * self.reach_loss(batch, torch.cat(kept["tokens"]))
        if stage.name == "look":
            return seen
        # As DeepseekVL's own loss, but logits of answers alone: most of a sequence is picture.
        expected = batch["labels"][:, 1:].to(model.device)
        asked = expected != IGNORED
        logits, right = model.lm_head(kept["last"][:, :-1][asked]), expected[asked]
        losses = F.cross_entropy(logits, right, reduction="none")
        if stage.name in SOFT:
            numbers = self.in_boxes(batch["input_ids"].to(model.device))[:, 1:][asked]
            near = self.near(self.values(right[numbers]), BOX_BLUR)
            losses[numbers] = -(near * logits[numbers].log_softmax(1)[:, self.number_ids]).sum(1)
        return losses.mean() + 0.5 * seen

    def in_boxes(self, ids: Tensor) -> Tensor:
        """Which of the ids (B, T) are a box's numbers: bool (B, T)."""
        opened, closed = ((ids == tag).cumsum(1) for tag in self.box_tags)
        return (opened > closed) & torch.isin(ids, self.number_ids.to(ids.device))

    def values(self, ids: Tensor) -> Tensor:
        """The numbers that these ids stand for."""
        table = torch.zeros(int(self.number_ids.max()) + 1, dtype=torch.long)
        table[self.number_ids] = torch.arange(len(self.number_ids))
        return table.to(ids.device)[ids]

    def near(self, values: Tensor, deviation: float) -> Tensor:
        """What passes for each of these numbers: probabilities (n, 1000), most for itself, less for its neighbours."""
        every = torch.arange(len(self.number_ids), device=values.device)
        return torch.softmax(-0.5 * ((every - values[:, None]) / deviation) ** 2, dim=1)

    def after_step(self, model: DeepseekVL, pace: float) -> None:
        if not self.balance.counts:
            return
        self.balance.step(pace)
        self.load.append(torch.stack(list(self.balance.counts.values())).cpu())

    def state_of_reports(self) -> dict[str, float]:
        """The share of the least busy expert, and of the busiest, over an equal share, since the last report."""
        if not self.load:
            return {}
        load = torch.stack(self.load).sum(0).float()
        self.load = []
        relative = load / load.mean(1, keepdim=True)
        return {"least busy": round(relative.min().item(), 3), "busiest": round(relative.max().item(), 3)}

    @torch.no_grad()
    def scores(self, stage: Stage, model: DeepseekVL, processor: Processor, batch: dict[str, Tensor]) -> dict:
        if stage.name not in ("towers", "look"):
            return accuracy(model, processor, stage.held_out, split="held-out")
        with outputs(tokens=model.aligner, hidden=model.language.layers[LAYERS - 1]) as kept:
            model(**{key: value for key, value in batch.items() if key not in LABELS}, logits_to_keep=1)
        hidden = kept["hidden"][batch["images_seq_mask"].to(model.device)]
        normed = F.rms_norm(torch.cat(kept["tokens"]) if stage.name == "towers" else hidden, hidden.shape[-1:])
        labels = batch["seen"].to(model.device)
        said = torch.stack([model.lm_head(field(normed)).argmax(1) for field in self.fields], dim=1)
        right, shapes, signs = said == labels, labels[:, 1] != IGNORED, labels[:, 8] != IGNORED
        found = {"named": right[shapes][:, :3].all(1).float().mean(), "read": right[signs][:, 8].float().mean()}
        if stage.name == "look":
            value = torch.full((model.lm_head.out_features,), -1000, device=model.device)
            value[self.number_ids] = torch.arange(COORDINATES + 1, device=model.device)
            off = value[said[shapes][:, 3:7]] - value[labels[shapes][:, 3:7]]
            found["placed"] = (off.abs().amax(1) < 40).float().mean()
        return {name: share.item() for name, share in found.items()}
