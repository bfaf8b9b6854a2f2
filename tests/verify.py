"""Are my weights right? One conversation through this code and through a reference, compared stage by stage.

    python tests/verify.py DIR [--image FILE ...] [--prompt TEXT] [--dtype float32|bfloat16] [--layers N]
    python tests/verify.py DIR --image FILE --against DUMP

The reference is transformers (DeepSeek-VL alone), or a file that tests/dump_original.py wrote with the original code.
It runs first and leaves its stages on disk, so that one model at a time is in memory:

    rounded/<stage>    computed in --dtype, as the model under test
    exact/<stage>      computed from the same weights in a wider dtype: float64 for float32, float32 for bfloat16

Both errors are against `exact`: that of this code (error), and the reference's own (rounding). A stage is ok where
its error is at most twice the reference's, plus one rounding of the dtype. Errors are relative to each token's
Euclidean norm and averaged over tokens (root mean square); of a decoder with experts, where one rounding may choose
another expert for a few tokens, it is the error that three quarters of the tokens do not exceed.

transformers gets its weights from the tables of load_weights.py. For a folder in the official layout a wrong row of
OFFICIAL_NAMES would therefore mislead both sides; --against DUMP, and the golden files of the tests, do not share it.

Exit status: 0 where all stages are ok, 1 where one is not, 2 where nothing could be compared.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "demo")]

from convert import transformers_files  # noqa: E402
from dump_original import DTYPES as WIDER  # noqa: E402
from dump_original import NEW_TOKENS, STAGES, about, collect, greedy, widen  # noqa: E402

from generate import DTYPES, Parser, generate, note, told  # noqa: E402
from load_weights import LAYOUTS, checkpoint_tensors, load_model, read_config  # noqa: E402
from model import DeepseekVL  # noqa: E402
from processor import Processor, load_image  # noqa: E402

PADDING = 8
LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# Where a checkpoint's SAM has other widths than transformers' class, which knows only 2 and 4 times the neck's.
OTHER_WIDTHS = ("model.high_res_vision_proj.", "model.aligner.high_res_vision_proj.")

# ---------------------------------------------------------------------------- transformers, the reference


def as_transformers_reads_it(folder: Path, processor: Processor, message: dict, batch: dict, dtype: torch.dtype):
    """A folder in transformers' layout: model, what its loading reports, inputs; nothing is given to it."""
    import transformers

    model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **LOADING)
    theirs = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    if theirs.chat_template is None:
        text = theirs.tokenizer.bos_token + processor.prompt([message])
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        return model, info, theirs(text=text, images=message["images"], **options), []
    texts = re.split("<image>|<image_placeholder>", message["content"])
    texts = texts if len(texts) > 1 else [""] * len(message["images"]) + texts
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(message["images"], texts[1:]):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    parts = [part for part in parts if part["type"] == "image" or part["text"].strip()]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return model, info, theirs.apply_chat_template([{"role": "user", "content": parts}], **options), []


def from_official_layout(folder: Path, processor: Processor, message: dict, batch: dict, dtype: torch.dtype):
    """A folder in the official layout: a model of our tensors; our pixels, and the ids of its tokenizer if it has one.

    Returns: the model, what its loading reports, its inputs, and the stages that are given to it.
    """
    import transformers

    ours = load_model(folder, dtype=dtype, tokenizer=processor.tokenizer)
    config = transformers_files(ours.config, processor)["config.json"]
    tensors = checkpoint_tensors(ours, ours.state_dict(), LAYOUTS[config["model_type"]])
    state = {name: tensor.contiguous() for name, (_, tensor) in tensors.items()}
    kind = getattr(transformers, config["architectures"][0])
    options = {"config": kind.config_class.from_dict(config), "state_dict": state, "dtype": dtype}
    model, info = kind.from_pretrained(None, **options, **LOADING)
    for name, *_ in info["mismatched_keys"]:
        if name.startswith(OTHER_WIDTHS):
            module, _, parameter = name.rpartition(".")
            setattr(model.get_submodule(module), parameter, nn.Parameter(state[name]))
    info["mismatched_keys"] = [key for key in info["mismatched_keys"] if not key[0].startswith(OTHER_WIDTHS)]
    given, pixels = ["SigLIP pixels"], {"pixel_values": batch["pixel_values"]}
    if hasattr(ours.vision, "split"):
        high, low = ours.vision.split(batch["pixel_values"])
        given, pixels = ["SAM pixels", *given], {"high_res_pixel_values": high, "pixel_values": low}
    if (folder / "tokenizer.json").exists():
        tokenizer, marker = transformers.AutoTokenizer.from_pretrained(folder), processor.image_token
        text = processor.prompt([message]).replace(marker, marker * processor.num_image_tokens)
        ids = torch.tensor([[processor.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    else:
        ids, given = batch["input_ids"], ["token ids", *given]
    return model, info, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}, given


@torch.no_grad()
def run_transformers(folder: Path, images: list[str], prompt: str, name: str, file: Path) -> None:
    """Write transformers' stages for one conversation into a file, as tests/dump_original.py does the original's."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processor, message, batch = prepare(folder, images, prompt)
    if processor.is_vl2:
        dump = "--against DUMP takes tests/dump_original.py's file"
        raise ValueError(f"{folder}: transformers has no DeepSeek-VL2; {dump}")
    read = from_official_layout if processor.model_type == "multi_modality" else as_transformers_reads_it
    model, info, inputs, given = read(folder, processor, message, batch, WIDER[name][0])
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(key)[:200] for key in info[problem] if ".vision_model.head." not in str(key)]  # nothing reads it
        if names:
            raise ValueError(f"{folder}: transformers has {problem.replace('_', ' ')}: {min(names)}")
    model.eval()

    def cast(to: torch.dtype) -> dict[str, Tensor]:
        return {key: value.to(to) if value.is_floating_point() else value for key, value in inputs.items()}

    (dtype, wide), length, tensors = WIDER[name], inputs["input_ids"].shape[1], {"input_ids": inputs["input_ids"][0]}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": processor.pad_token_id}
    options["eos_token_id"] = list(read_config(folder, processor.tokenizer).end_token_ids) or None
    tensors |= greedy(model, lambda: model.generate(**cast(dtype), **options)[0, length:].tolist())
    points = [(stage, theirs) for stage, _, _, theirs in STAGES]
    for prefix, to in (("rounded", dtype), ("exact", wide)):
        if prefix == "exact":
            widen(model, model.model.language_model.layers, dtype, wide)
        seen = collect(model, points, lambda to=to: model(**cast(to), use_cache=False))
        tensors |= {f"{prefix}/{stage}": tensor for stage, tensor in seen.items()}
    reference = f"transformers {transformers.__version__}"
    save_file(tensors, file, metadata=about(reference, processor.model_type, prompt, images, name, given))


# ---------------------------------------------------------------------------- this code


@torch.no_grad()
def run_ours(model: DeepseekVL, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our stages, the logits and positions of the same prompt behind padding, and the greedy answer."""
    tower = "vision.low" if hasattr(model.vision, "low") else "vision"
    points = [(stage, ours.replace("vision.low", tower)) for stage, _, ours, _ in STAGES]
    seen = collect(model, points, lambda: model(**batch))
    x, mask = seen["embeddings"], torch.ones(1, PADDING + batch["input_ids"].shape[1], dtype=torch.long)
    mask[:, :PADDING] = 0
    padded = torch.cat((torch.zeros_like(x[:, :PADDING]), x), dim=1)

    def positions(module: nn.Module, args: tuple) -> None:
        seen["positions behind padding"] = args[1][:, PADDING:].clone()

    with model.language.register_forward_pre_hook(positions):
        logits = model(inputs_embeds=padded, attention_mask=mask).logits
    seen["logits behind padding"] = logits[:, PADDING:]
    return seen | greedy(model, lambda: generate(model, batch, NEW_TOKENS)[0])


# ---------------------------------------------------------------------------- comparing


class Row(NamedTuple):
    """A line of the table. `right`: nothing is wrong; `numbers`: error, rounding, largest, where they say something."""

    stage: str
    shape: Sequence[int]
    verdict: str
    right: bool
    numbers: tuple[float, ...] = ()

    def __str__(self) -> str:
        columns = "".join(f"{number:{width}.1e}" for number, width in zip(self.numbers, (9, 10, 10)))
        return f"{self.stage:26}{' x '.join(map(str, self.shape)):22}{columns:29}  {self.verdict}"


def tokens(stage: str, tensor: Tensor) -> Tensor:
    """(tokens, width); of pixels one row a picture."""
    tensor = tensor.double().movedim(1, -1) if "neck" in stage else tensor.double()
    return tensor.flatten(1) if "pixels" in stage else tensor.flatten(0, -2)


def relative_error(stage: str, tested: Tensor, exact: Tensor, robust: bool) -> float:
    tested, exact = tokens(stage, tested), tokens(stage, exact)
    norms = exact.norm(dim=-1)
    errors = (tested - exact).norm(dim=-1) / norms.clamp_min(1e-3 * norms.mean().item() + 1e-30)
    return (errors.quantile(0.75) if robust else errors.square().mean().sqrt()).item()


def compare_stage(stage: str, tested: Tensor, reference: Any, given: bool, eps: float, experts: bool) -> Row:
    """One row. eps: of the dtype; experts: whether the decoder has some."""
    name = stage.removesuffix(" behind padding")
    if f"exact/{name}" not in reference.keys():
        return Row(stage, tested.shape, "MISSING in the reference", False)
    exact, rounded = (reference.get_tensor(f"{kind}/{name}") for kind in ("exact", "rounded"))
    if tokens(stage, tested).shape != tokens(stage, exact).shape:
        return Row(stage, tested.shape, f"SHAPE, expected {list(exact.shape)}", False)
    exact, rounded = exact.reshape(tested.shape), rounded.reshape(tested.shape)
    robust = experts and stage.startswith(("experts", "decoder", "logits"))
    error, rounding = (relative_error(stage, tensor, exact, robust) for tensor in (tested, rounded))
    right, note = error <= 2 * rounding + eps, ""
    if stage.startswith("experts"):
        equal, usual = (((t > 0) & (exact > 0)).sum() / (exact > 0).sum() for t in (tested, rounded))
        right, note = right and 1 - equal <= 2 * (1 - usual) + 0.02, f", {equal:.1%} of the experts equal"
    verdict = ("given" if given else "ok") if right else "WRONG"
    largest = (tested.double() - exact).abs().max().item()
    return Row(stage, tested.shape, verdict + note, bool(right), (error, rounding, largest))


def compare(ours: dict[str, Tensor], ids: Tensor, reference: Any, eps: float, every: int) -> list[Row]:
    """The table: ids, then the stages in the order of computing; of layers each of `every`."""
    given, equal = json.loads(reference.metadata()["given"]), torch.equal(ids, reference.get_tensor("input_ids"))
    verdict = ("given" if "token ids" in given else "same") if equal else "DIFFERENT"
    rows, experts = [Row("token ids", ids.shape, verdict, equal)], any(stage.startswith("experts") for stage in ours)
    expected = {key.removeprefix("exact/") for key in reference.keys() if key.startswith("exact/")}
    for stage in [*ours, *sorted(expected - ours.keys())]:
        skipped = " layer " in stage and (int(stage.split()[-1]) + 1) % every
        if skipped or stage.startswith("greedy"):
            continue
        if stage not in ours:
            rows.append(Row(stage, (), "MISSING in this code", False))
        elif stage.startswith("positions"):
            right = ours[stage].flatten().tolist() == list(range(ours[stage].numel()))
            rows.append(Row(stage, ours[stage].shape, "same" if right else "DIFFERENT", right))
        else:
            rows.append(compare_stage(stage, ours[stage], reference, stage in given, eps, experts))
    return rows


def compare_answers(ours: dict[str, Tensor], reference: Any, decode: Callable, first: str | None) -> tuple[str, bool]:
    """A line about the greedy answers, and whether they are equal but for rounding."""
    ids, theirs = ours["greedy"].tolist(), reference.get_tensor("greedy").tolist()
    at = next((i for i, pair in enumerate(zip(ids, theirs)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{min(len(ids), len(theirs))} of {len(theirs)} greedy tokens equal", len(ids) == len(theirs)
    pair, logits = [ids[at], theirs[at]], ""
    for who, chosen in (("this code", ours["greedy_logits"]), ("reference", reference.get_tensor("greedy_logits"))):
        mine, other = chosen[at][pair].tolist()
        logits += f"{who}: {decode(pair[:1])!r} {mine:.3f}, {decode(pair[1:])!r} {other:.3f}; "
    margin = other - mine  # of the reference
    exact, rounded = (reference.get_tensor(f"{kind}/logits").double() for kind in ("exact", "rounded"))
    is_rounding = margin <= 2 * (rounded - exact).abs().max().item()
    why = "rounding" if is_rounding else f"look at {first or 'the cache'}"
    return f"{at} greedy tokens equal, then {logits[:-2]}: {margin:.3g} apart: {why}", is_rounding


def prepare(folder: Path, images: list[str], prompt: str) -> tuple[Processor, dict, dict[str, Tensor]]:
    """The processor, the one message of the conversation, and our inputs for it."""
    processor = Processor(folder)
    message = {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}
    return processor, message, processor([message])


def verify(folder: Path, images: list[str], prompt: str, against: str, name: str | None, every: int) -> int:
    """Run, compare and print; returns the exit status. name: of the dtype; None: the dump's, otherwise float32."""
    processor, _, batch = prepare(folder, images, prompt)
    for image in images:
        if not os.path.isfile(image):  # of which a dump has the hash
            raise ValueError(f"--image {image[:80]}: expected the name of a file")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(against)
        if against == "transformers":
            file, name = Path(scratch) / "reference.safetensors", name or "float32"
            note("running transformers")
            try:
                run_transformers(folder, images, prompt, name, file)
            except ImportError as error:
                hint = "pip install -r tests/requirements.txt"
                raise ValueError(f"transformers cannot be used ({error}): {hint}") from None
            gc.collect()
        elif not file.is_file():
            wanted = "transformers or a file of tests/dump_original.py"
            raise ValueError(f"--against {file}: no such file, expected {wanted}")
        try:
            with safe_open(file, "pt") as reference:
                metadata = reference.metadata() or {}
                name = name or metadata.get("dtype", "float32")
                try:
                    _ = WIDER[name], metadata["reference"], json.loads(metadata["given"])
                except (KeyError, ValueError):
                    found = "of its metadata some is missing or damaged"
                    raise ValueError(f"{file}: no file of tests/dump_original.py ({found})") from None
                for key, right in about("", processor.model_type, prompt, images, name, []).items():
                    if key not in ("reference", "given") and metadata.get(key) != right:
                        found = f"made from another {key.replace('_', ' ')}: {str(metadata.get(key))[:80]!r}"
                        raise ValueError(f"{file}: {found}, expected {right[:80]!r}")
                note("running this code")
                ours = run_ours(load_model(folder, dtype=DTYPES[name], tokenizer=processor.tokenizer), batch)
                rows = compare(ours, batch["input_ids"][0], reference, torch.finfo(DTYPES[name]).eps, every)
                first = next((row.stage for row in rows if not row.right), None)
                line, equal = compare_answers(ours, reference, processor.decode, first)
                answers = [processor.decode(ids.tolist()) for ids in (ours["greedy"], reference.get_tensor("greedy"))]
        except SafetensorError as error:
            raise ValueError(f"{file}: no file of tests/dump_original.py ({str(error)[:200]})") from None
    note("")
    print(f"{folder} in {name}, against {metadata['reference']}\n")
    print(f"{'stage':26}{'shape':22}{'error':>9}{'rounding':>10}{'largest':>10}  verdict", *rows, sep="\n")
    print(f"\nthis code: {answers[0]!r}\nreference: {answers[1]!r}\n{line}\n")
    if first is None and equal:
        print(f"RIGHT: {len(rows)} stages as close to the exact values as the reference's, and the same answer")
        return 0
    print(f"WRONG: the first difference is in {first or 'decoding, after equal logits: look at the cache'}")
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="checkpoint folder")
    add("--image", action="append", metavar="FILE", help="may be repeated (default: demo/images/scene.png)")
    add("--prompt", default="Describe this image.", metavar="TEXT", help="default: %(default)s")
    add("--against", default="transformers", metavar="transformers|DUMP", help="default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the dump's; with transformers float32")
    add("--layers", type=int, default=1, metavar="N", help="compare every Nth layer (default: 1, all)")
    args = parser.parse_args(arguments)
    images = args.image or [str(ROOT / "demo" / "images" / "scene.png")]
    with told():
        if args.layers < 1:
            raise ValueError(f"--layers {args.layers}: expected at least 1")
        return verify(args.folder, images, args.prompt, args.against, args.dtype, args.layers)


if __name__ == "__main__":
    sys.exit(main())
