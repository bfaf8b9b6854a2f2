"""Speed and memory beside transformers: the tables of README.

    python tests/bench.py                     all sections; needs 30 GB for random weights in the temporary folder
    python tests/bench.py towers              the vision towers, one image
    python tests/bench.py answer              DeepSeek-VL 1.3B: prefill of 640 tokens with one image, decode
    python tests/bench.py vl2                 DeepSeek-VL2 tiny: prefill of 471 tokens, decode
    python tests/bench.py chat                the second turn of a conversation beside its first
    python tests/bench.py many                demo/answer.py on the demo: batches of 8 beside one at a time
    python tests/bench.py load                seconds to load, and private memory at its peak
    python tests/bench.py --device cuda       towers, answer and vl2 on a GPU

Both sides read the same float16 files, as their users do. They run in turns after a warm-up turn, and a
figure is the median of its turns (of loading, of at most three without warm-up). A ratio above 1 is in favour of ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
sys.path[:0] = [str(ROOT), str(DEMO)]

from answer import Question, ask  # noqa: E402
from convert import transformers_files  # noqa: E402

from generate import ConversationCache, compile_steps, pick_dtype, stream  # noqa: E402
from load_weights import load_model, read_config, save_model  # noqa: E402
from model import MODELS, DeepseekVL, ModelConfig  # noqa: E402
from processor import Processor  # noqa: E402

ON_A_GPU = ("towers", "answer", "vl2")
SECTIONS = (*ON_A_GPU, "chat", "many", "load")


def private_mebibytes() -> float:
    """This process's memory that no file backs (Linux): what the system cannot drop."""
    return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_memory(run: Callable[[], object]) -> float:
    """The peak of private memory while `run` runs."""
    seen, done = [private_mebibytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(private_mebibytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(seen)


def prompt(vocabulary: int, text: int, image: int = 0, pixels: int = 0) -> dict[str, torch.Tensor]:
    """Random ids, and between them the tokens of a random image."""
    ids = torch.randint(10, vocabulary - 1, (1, text + image))
    ids[:, 30 : 30 + image] = vocabulary - 1  # the image token
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"pixel_values": torch.rand(1, 3, pixels, pixels)} if image else batch


class Side:
    """A program that is measured. It holds one model at a time."""

    model = None

    def open(self, folder: str, dtype: str, device: str = "cpu", **options) -> None:
        self.model = None  # frees the last one first
        self.dtype, self.device = getattr(torch, dtype), device
        self.model = self.load(folder, **options)

    @torch.inference_mode()
    def look(self, tower: str, shape: list[int]) -> list[float]:
        """Seconds of a vision tower."""
        pixels, run = torch.rand(shape).to(self.device, self.dtype), self.tower(tower)
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        run(pixels)
        wait()
        return [time.perf_counter() - start]

    def answer(self, new_tokens: int, *sizes: int) -> list[float]:
        """Seconds to the first token, and for each of those that follow. `sizes`: see `prompt`."""
        batch, start = prompt(*sizes), time.perf_counter()
        times = self.token_times(batch, new_tokens + 1)
        return [times[0] - start, (times[-1] - times[0]) / new_tokens]

    def weigh(self, folder: str, dtype: str, options: dict, *sizes: int) -> list[float]:
        """Seconds to load, and the peaks of private memory (MiB) while loading and while answering."""
        before, start = private_mebibytes(), time.perf_counter()
        loading, seconds = peak_memory(lambda: self.open(folder, dtype, **options)), time.perf_counter() - start
        return [seconds, loading - before, peak_memory(lambda: self.answer(8, *sizes)) - before]


class Ours(Side):
    def load(self, folder: str, compiled: bool = False, **options) -> torch.nn.Module:
        model = load_model(folder, dtype=self.dtype, device=self.device, **options)
        if compiled:
            compile_steps(model, failed=lambda why: print(f"not compiled: {why}", file=sys.stderr))
        return model

    def tower(self, name: str) -> Callable:
        return self.model.vision.high if name == "sam" else self.model.vision

    def token_times(self, batch: dict, count: int) -> list[float]:
        return [time.perf_counter() for _ in stream(self.model, batch, max_new_tokens=count)]

    def turns(self, *sizes: int) -> list[list[float]]:
        """Seconds to the first token of a conversation's second turn, and of its first. `sizes`: see `prompt`."""
        cache, batch, seconds = ConversationCache(self.model), prompt(*sizes), []
        for _ in range(2):
            start = time.perf_counter()
            answer = stream(self.model, batch, max_new_tokens=8, cache=cache)
            ids = [next(answer)]
            seconds.append([time.perf_counter() - start])
            ids = torch.tensor([[*ids, *answer, *range(10, 26)]])  # the answer, and a question of 16 tokens
            longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch = batch | {name: torch.cat([batch[name], more], dim=1) for name, more in longer.items()}
        return seconds[::-1]


class Transformers(Side):
    def __init__(self):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.auto = transformers.AutoModelForImageTextToText
        assert transformers.DeepseekVLForConditionalGeneration  # imported now: loading is timed

    def load(self, folder: str, **_) -> torch.nn.Module:
        return self.auto.from_pretrained(folder, dtype=self.dtype).to(self.device)

    def tower(self, name: str) -> Callable:
        return self.model.model.get_high_res_image_features if name == "sam" else self.model.model.vision_model

    def token_times(self, batch: dict, count: int) -> list[float]:
        self.times: list[float] = []  # `put` and `end` are what `generate` calls of a streamer
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=self)
        return self.times[1:]  # the first is the prompt, before it is fed

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


SIDES = {"ours": Ours, "transformers": Transformers}


def weigh_elsewhere(side: str, *arguments) -> list[float]:
    """`weigh`, in a process of its own."""
    command = [sys.executable, __file__, "--weigh", json.dumps([side, *arguments])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def shrunk(config: ModelConfig) -> ModelConfig:
    """The config with sizes that take little time."""
    vision = low = replace(getattr(config.vision, "low", config.vision), image_size=96, layers=2, mlp_width=512)
    if hasattr(config.vision, "high"):
        high = replace(config.vision.high, image_size=256, layers=3, global_layers=(2,))
        vision = replace(config.vision, low=low, high=high)
    experts = config.language.experts and replace(config.language.experts, n_routed_experts=8)
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=128)
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "experts": experts}
    return replace(config, vision=vision, language=replace(config.language, **sizes))


def config_json(config: ModelConfig) -> dict:
    """DeepSeek-VL in the layout of transformers, DeepSeek-VL2 in its own."""
    if not config.tiles:
        files = transformers_files(config, Processor(DEMO / "checkpoint"))
        return files["config.json"] | {"image_token_id": config.language.vocab_size - 1}
    vision, language = asdict(config.vision), asdict(config.language)
    vision |= {"model_name": "siglip_so400m_patch14_384", "mlp_ratio": (vision["mlp_width"] + 0.5) / vision["width"]}
    projector = {"n_embed": language["hidden_size"], "input_dim": vision["width"]}
    values = {"model_type": "deepseek_vl_v2", "vision_config": vision, "projector_config": projector}
    return values | {"language_config": language | language["experts"] | {"use_mla": False}}


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path):
        self.folder, self.ours, self.other = folder, Ours(), Transformers()
        self.dtype = args.dtype or str(pick_dtype("auto", torch.device(args.device))).split(".")[-1]
        self.turns, self.small, self.device, self.configs = args.turns, args.small, args.device, dict(MODELS)
        for name, big in (("siglip", "deepseek-vl-1.3b"), ("sam", "deepseek-vl-7b")):  # with next to no decoder
            language = replace(MODELS[big].language, num_hidden_layers=1, vocab_size=512)
            self.configs[name] = replace(MODELS[big], language=language)
        if args.small:
            self.configs = {name: shrunk(config) for name, config in self.configs.items()}

    def checkpoint(self, name: str) -> str:
        """Random float16 weights: each parameter starts elsewhere in one block of noise; vectors are ones."""
        folder = self.folder / name
        if folder.exists():
            return str(folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_json(self.configs[name])))
        with torch.device("meta"):
            model = DeepseekVL(read_config(folder)).half()
        model, noise = model.to_empty(device="cpu"), (torch.rand(2**20) - 0.5) * 0.06
        for parameter in model.parameters():
            noise = noise.roll(int(torch.randint(len(noise), ())))
            for piece in parameter.data.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)] if parameter.dim() > 1 else 1)
        save_model(model, folder)
        return str(folder)

    def sizes(self, name: str) -> tuple[int, ...]:
        """The arguments of `prompt`."""
        vision, vocabulary = self.configs[name].vision, self.configs[name].language.vocab_size
        if self.configs[name].tiles:  # text alone: features of a random tower would all choose the same experts
            return vocabulary, 471
        low, high = getattr(vision, "low", vision), getattr(vision, "high", vision)
        return vocabulary, 64, low.grid**2, high.image_size  # 64 beside an image's 576: 640

    def compare(self, name: str, method: str, *arguments, **options) -> list[tuple[float, ...]]:
        """Medians of what a method of each side returns, called in turns: for each value, ours and the other one."""
        sides = [self.ours] if self.configs[name].tiles else [self.ours, self.other]  # transformers has no DeepSeek-VL2
        for side in sides:
            side.open(self.checkpoint(name), self.dtype, self.device, pack=True, **options)
        return self.in_turns(lambda: [getattr(side, method)(*arguments) for side in sides])

    def in_turns(self, turn: Callable[[], list[list[float]]]) -> list[tuple[float, ...]]:
        return medians([turn() for _ in range(self.turns + 1)][1:])

    def head(self, title: str, ours: str = "ours", other: str = "transformers") -> None:
        print(f"\n| {title} | {ours} | {other} | ratio |\n|---|---|---|---|", flush=True)

    def row(self, label: str, values: tuple[float, ...], show: Callable[[float], str]) -> None:
        other, ratio = (show(values[1]), f"{values[1] / values[0]:.2f}") if len(values) > 1 else ("", "")
        print(f"| {label} | {show(values[0])} | {other} | {ratio} |", flush=True)

    def towers(self) -> None:
        self.head(f"vision towers, one image ({self.dtype})")
        for label, name in (("SigLIP of DeepSeek-VL", "siglip"), ("SAM branch of DeepSeek-VL 7B", "sam")):
            size = self.sizes(name)[-1]
            self.row(label, *self.compare(name, "look", name, [1, 3, size, size]), "{:.3f} s".format)

    def answer(self, title: str = "DeepSeek-VL 1.3B", bits: tuple = (None, "int8", "int4")) -> None:
        self.head(f"{title} ({self.dtype})")
        name = title.lower().replace(" ", "-")
        for quantize, compiled in itertools.product(bits, (False, True)):
            if compiled and not quantize and self.device == "cpu":
                continue
            options = {"quantize": quantize, "compiled": compiled}
            first, step = self.compare(name, "answer", 4 if self.small else 32, *self.sizes(name), **options)
            kind = " ".join(filter(None, (quantize, "compiled" if compiled else None)))
            label = f", {kind}" if kind else ""
            if not compiled:  # only steps are
                self.row(f"prefill, {sum(self.sizes(name)[1:3])} tokens{label}", first, "{:.2f} s".format)
            self.row(f"decode{label}", step, lambda value: f"{1 / value:.1f} tokens/s")

    def vl2(self) -> None:
        self.answer("DeepSeek-VL2 tiny", (None,))

    def chat(self) -> None:
        self.head("to the first token", "second turn", "first turn")
        sizes = self.sizes("deepseek-vl-1.3b")
        self.ours.open(self.checkpoint("deepseek-vl-1.3b"), self.dtype, pack=True)
        label = f"after {sum(sizes[1:3])} tokens with one image, {self.dtype}"
        self.row(label, *self.in_turns(lambda: self.ours.turns(*sizes)), "{:.2f} s".format)

    def many(self) -> None:
        self.head("questions a minute", "batches of 8", "alone")
        processor, (count, length) = Processor(DEMO / "checkpoint"), (8, 4) if self.small else (32, 80)
        questions = [Question(i, "Describe this image.", [str(DEMO / "images" / "scene.png")]) for i in range(count)]

        def seconds(size: int) -> list[float]:
            start = time.perf_counter()
            for i in range(0, count, size):
                ask(self.ours.model, processor, questions[i : i + size], length)
            return [(time.perf_counter() - start) / count]

        for kind, quantize in (("", None), (", int8", "int8")):
            self.ours.open(str(DEMO / "checkpoint"), self.dtype, pack=True, quantize=quantize)
            label = f"demo, Describe this image., {self.dtype}{kind}"
            self.row(label, *self.in_turns(lambda: [seconds(8), seconds(1)]), lambda value: f"{60 / value:.0f}")

    def load(self) -> None:
        self.head(f"load: peaks are of private memory ({self.dtype})")
        int4 = {"pack": True, "quantize": "int4"}
        for kind, options in (("1.3B", {}), ("1.3B packed", {"pack": True}), ("1.3B int4", int4), ("7B int4", int4)):
            name = f"deepseek-vl-{kind.split()[0].lower()}"
            arguments = self.checkpoint(name), self.dtype, options, *self.sizes(name)
            sides = ["ours"] if options is int4 else SIDES
            runs = [[weigh_elsewhere(side, *arguments) for side in sides] for _ in range(min(self.turns, 3))]
            for what, values in zip(("seconds", "peak MiB while loading", "peak MiB while answering"), medians(runs)):
                self.row(f"{kind}, {what}", values, "{:.1f}".format)


def copied() -> float:
    """How fast a GPU copies within its memory, in GB/s."""
    source, seconds = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(), []
    target = torch.empty_like(source)
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * len(source) / statistics.median(seconds) / 1e9


def medians(runs: list[list[list[float]]]) -> list[tuple[float, ...]]:
    """[turn][side][value] -> [value][side]."""
    return list(zip(*([statistics.median(values) for values in zip(*side)] for side in zip(*runs))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory beside transformers.")
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the device's fastest")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--turns", type=int, default=5, help="after the warm-up (default: %(default)s)")
    add("--small", action="store_true", help="small sizes, to see that it runs")
    add("--weigh", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.weigh:
        side, *arguments = args.weigh
        return print(json.dumps(SIDES[side]().weigh(*arguments)))
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if args.device == "cuda" and (wrong := set(args.sections) - set(ON_A_GPU)):
        parser.error(f"on a GPU there are {', '.join(ON_A_GPU)}, not {', '.join(sorted(wrong))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none here")
    if args.small:  # threads would only wait for each other
        args.turns = 1
        os.environ["OMP_NUM_THREADS"] = "1"  # of the other process
        torch.set_num_threads(1)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)|$", info.read_text() if info.exists() else "")[1] or "unknown CPU"
    versions = f"torch {torch.__version__}, transformers {version('transformers')}, {time.strftime('%Y-%m-%d')}"
    print(f"{name}, {torch.get_num_threads()} threads, {versions}{', small sizes' * args.small}", flush=True)
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, which copies {copied():.0f} GB/s (bytes read and written)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for section in args.sections or (SECTIONS if args.device == "cpu" else ON_A_GPU):
            getattr(bench, section)()


if __name__ == "__main__":
    main()
