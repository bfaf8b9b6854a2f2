"""Break the model on purpose, one part at a time, and see what each part is good for.

    python demo/ablate.py                     a table, and demo/ablation.png
    python demo/ablate.py --scenes 100 --out FILE.png

Each fault is one line that a port of this model can get wrong. Some ruin every answer, some change only the logits,
and some do nothing at all here: what each does says how much a small error can hide. tests/verify.py finds them all
on small random checkpoints; the list is shared with its test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO), str(DEMO.parent)]

from evaluate import accuracy, exam
from scenes import TASKS

import model as model_file
import processor as processor_file
import vision as vision_file
from generate import Parser, note, told
from load_weights import load_model, unfinished
from processor import Processor

# ---------------------------------------------------------------------------- the faults


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this, `owner.name` is another."""
    right = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, right)


# Each takes what is right and returns what is wrong.


def other_gelu(_):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="none" if self.approximate == "tanh" else "tanh"))

    return forward


def larger_epsilon(forward):
    def wrong(self, pixels):
        with ExitStack() as stack:
            for norm in (module for module in self.modules() if isinstance(module, torch.nn.LayerNorm)):
                stack.enter_context(attribute(norm, "eps", 1e-5))
            return forward(self, pixels)

    return wrong


def scaled_query(relative_positions):
    return lambda table: relative_positions(table) * table.shape[-1] ** -0.5


def masked_padding(forward):
    def wrong(self, x):
        padding, attend = (x == 0).all(dim=-1).flatten(1)[:, None, None], self.attend
        masked = lambda q, k, v, bias: attend(q, k, v, bias.masked_fill(padding, -torch.inf))  # noqa: E731
        with attribute(self, "attend", masked):
            return forward(self, x)

    return wrong


def bicubic(tokens):
    def wrong(self, neck, x):
        right = F.interpolate
        with attribute(F, "interpolate", lambda *args, **options: right(*args, **options | {"mode": "bicubic"})):
            return tokens(self, neck, x)

    return wrong


def without_early_features(forward):
    def wrong(self, pixels):
        with attribute(self.hd_alpha_downsamples, "data", torch.zeros(1).to(self.hd_alpha_downsamples)):
            return forward(self, pixels)

    return wrong


def low_before_high(_):
    return lambda self, high, low: self.proj(F.gelu(torch.cat((self.low_proj(low), self.high_proj(high)), dim=-1)))


def interleaved_pairs(_):
    def rotate(x, cos, sin):
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    return rotate


def positions_from_padding(_):
    return lambda mask: torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)


def truncated_size(_):
    return processor_file.official_square


def without_newlines(_):
    return lambda self, grid: F.pad(grid, (0, 0, 0, 1)).flatten(0, 1)  # zeros in their places


def bias_in_weights(forward):
    def wrong(self, x):
        experts, weights = forward(self, x)
        if self.config.topk_method != "noaux_tc":
            return experts, weights
        scores = F.linear(x.float(), self.weight.float()).sigmoid() + self.e_score_correction_bias.float()
        chosen = scores.gather(-1, experts)
        return experts, chosen / chosen.sum(dim=-1, keepdim=True) * self.config.routed_scaling_factor

    return wrong


@dataclass(frozen=True)
class Fault:
    """A wrong `owner.attribute`, made from the right one; where it shows first, and in which checkpoints."""

    name: str
    owner: Any
    attribute: str
    wrong: Callable
    stage: str  # of tests/verify.py
    why: str  # of its effect on the demo
    where: str = "7B"  # or "VL2", or "transformers": of the 7B's kind in the layout of transformers


FAULTS = [
    Fault(
        "tanh GELU in SigLIP", vision_file.SigLIPMLP, "forward", other_gelu, "SigLIP layer 0",
        "the two curves are at most 0.0005 apart",
    ),
    Fault(
        "epsilon 1e-5 in SigLIP", vision_file.SigLIP, "forward", larger_epsilon, "SigLIP layer 0",
        "the variances are far above either epsilon",
    ),
    Fault(
        "scaled query in relative positions", vision_file, "relative_positions", scaled_query, "SAM layer 0",
        "places count less by the square root of a head's width",
    ),
    Fault(
        "window padding masked", vision_file.SAMAttention, "forward", masked_padding, "SAM layer 0",
        "the demo's grid of 16 divides by its window of 8: no padding",
    ),
    Fault(
        "bicubic resizing after the neck", vision_file.SAM, "_tokens", bicubic, "SAM",
        "between the grid's points alone",
    ),
    Fault(
        "alpha 0: no early features", vision_file.SAM, "forward", without_early_features, "SAM",
        "fine detail comes from the first global layer",
    ),
    Fault(
        "low before high in the aligner", vision_file.HybridAligner, "forward", low_before_high, "aligner",
        "each half of the last layer reads the other tower",
    ),
    Fault(
        "interleaved rotation", model_file, "rotate", interleaved_pairs, "decoder layer 0",
        "other pairs of values turn together",
    ),
    Fault(
        "positions from the padding on", model_file, "positions_from_mask", positions_from_padding,
        "positions behind padding", "rotations tell only how far apart two tokens are",
    ),
    Fault(
        "sizes truncated, not rounded", processor_file, "transformers_square", truncated_size, "SAM pixels",
        "in the layout of transformers alone", "transformers",
    ),
    Fault(
        "newlines missing", vision_file.TileAligner, "_with_newlines", without_newlines, "aligner",
        "in DeepSeek-VL2 alone", "VL2",
    ),
    Fault(
        "bias in the router's weights", model_file.Router, "forward", bias_in_weights, "experts 1",
        "in DeepSeek-VL2 alone", "VL2",
    ),
]  # fmt: skip


def broken(fault: Fault) -> AbstractContextManager:
    """Within this, every model and processor has the fault."""
    return attribute(fault.owner, fault.attribute, fault.wrong(getattr(fault.owner, fault.attribute)))


# ---------------------------------------------------------------------------- what they do to the demo

INK, BAR, ERROR, PAPER = "#28282e", "#1f77b4", "#d62728", "white"


def measure(model: torch.nn.Module, processor: Processor, scenes: int) -> tuple[torch.Tensor, float]:
    """Logits of a padded batch of questions, of the real tokens, and the share of answers that are exactly right."""
    conversations = [exam(task, 2)[i][0] for task in TASKS for i in range(2)]
    batch = processor(conversations)
    with torch.no_grad():
        logits = model(**batch).logits[batch["attention_mask"].bool()]
    return logits, sum(accuracy(model, processor, scenes).values()) / len(TASKS)


def draw_ablation(rows: list[tuple[str, float, float]]) -> Image.Image:
    """For each fault the share of right answers, and its error on a scale of powers of ten."""
    left, width, line = 330, 330, 26
    canvas = Image.new("RGB", (left + 2 * width + 130, 60 + line * len(rows)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for x, text, colour in ((left, "answers exactly right", BAR), (left + width + 70, "error of the logits", ERROR)):
        pen.text((x, 14), text, fill=colour, font=font)
    for i, (name, error, right) in enumerate(rows):
        y = 44 + line * i
        size = max(0.0, 1 + torch.tensor(error + 1e-30).log10().item() / 8)  # from 1e-8 to 1
        pen.text((left - 12, y + 9), name, fill=INK, font=font, anchor="rm")
        for x, share, text, colour in (
            (left, right, f"{right:.0%}", BAR),
            (left + width + 70, min(1.0, size), f"{error:.0e}" if error else "0", ERROR),
        ):
            pen.rectangle((x, y, x + max(1, share * (width - 60)), y + 18), fill=colour)
            pen.text((x + share * (width - 60) + 6, y + 9), text, fill=INK, font=font, anchor="lm")
    return canvas


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scenes", type=int, default=25, metavar="N", help="questions of each kind (default: %(default)s)")
    add("--out", type=Path, default=DEMO / "ablation.png", metavar="FILE", help="picture (default: %(default)s)")
    args = parser.parse_args()
    with told():
        if args.scenes < 1:
            raise ValueError(f"--scenes {args.scenes}: expected at least 1")
        if args.out.suffix.lower() not in (".png", ".jpg", ".webp") or not args.out.resolve().parent.is_dir():
            raise ValueError(
                f"--out {args.out}: expected a name that ends in .png, .jpg or .webp, in a folder that is there"
            )
        model, processor = load_model(DEMO / "checkpoint", dtype=torch.float32), Processor(DEMO / "checkpoint")
        exact, right = measure(model, processor, args.scenes)
        rows = [("as it should be", 0.0, right)]
        print("| fault | first wrong stage | error of the logits | answers exactly right | |\n|---|---|---|---|---|")
        print(f"| none | | | {right:.1%} | |")
        for fault in FAULTS:
            columns = ["", ""]
            if fault.where == "7B":
                note(fault.name)
                with broken(fault):
                    logits, right = measure(model, processor, args.scenes)
                error = ((logits - exact).norm() / exact.norm()).item()
                rows.append((fault.name, error, right))
                columns = [f"{error:.1e}" if error else "0", f"{right:.1%}"]
                note("")
            print(f"| {fault.name} | {fault.stage} | {' | '.join(columns)} | {fault.why} |", flush=True)
        with unfinished(args.out) as hidden:
            draw_ablation(rows).save(hidden, optimize=True)


if __name__ == "__main__":
    main()
