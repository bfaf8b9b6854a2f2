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
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert import transformers_files  # noqa: E402
from generate import DTYPES, Parser, fail, generate, note  # noqa: E402
from load_weights import LAYOUTS, checkpoint_tensors, load_model, read_config  # noqa: E402
from model import DeepseekVL  # noqa: E402
from processor import Processor, load_image  # noqa: E402

NEW_TOKENS, PADDING = 32, 8
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
_SAM, _LANGUAGE = "model.high_res_vision_model.vision_encoder", "model.language_model"
STAGES = [  # a stage, where our model computes it, where transformers' does; `<`: a module's input, `*`: each layer
    ("SAM pixels", "<vision.high", "<model.high_res_vision_model"),
    ("SAM embedded", "<vision.high.blocks.0", f"<{_SAM}.layers.0"),
    ("SAM layer *", "vision.high.blocks.*", f"{_SAM}.layers.*"),
    ("SAM neck", "vision.high.neck", f"{_SAM}.neck"),
    ("SAM early neck", "vision.high.neck_hd", "model.high_res_vision_neck"),
    ("SAM", "vision.high", "<model.aligner.high_res_vision_proj"),
    ("SigLIP pixels", "<vision.low", "<model.vision_model"),
    ("SigLIP embedded", "<vision.low.blocks.0", "<model.vision_model.encoder.layers.0"),
    ("SigLIP layer *", "vision.low.blocks.*", "model.vision_model.encoder.layers.*"),
    ("SigLIP", "vision.low", "model.vision_model.post_layernorm"),
    ("aligner", "aligner", "model.aligner"),
    ("embeddings", "<language.layers.0", f"<{_LANGUAGE}.layers.0"),
    ("experts *", "language.layers.*.mlp.gate", None),
    ("decoder layer *", "language.layers.*", f"{_LANGUAGE}.layers.*"),
    ("decoder", "language.norm", f"{_LANGUAGE}.norm"),
    ("logits", "lm_head", "lm_head"),
]
# Where a checkpoint's SAM has other widths than transformers' class, which knows only 2 and 4 times the neck's.
OTHER_WIDTHS = ("model.high_res_vision_proj.", "model.aligner.high_res_vision_proj.")

# ---------------------------------------------------------------------------- collecting stages


def one_tensor(module: nn.Module, value: Any) -> Tensor:
    """A stage as one tensor. Of a router: the weight of each expert for each token, zero where it is not chosen."""
    if isinstance(value, tuple) and isinstance(value[0], Tensor) and not value[0].is_floating_point():
        experts, weights = value[:2]
        return weights.new_zeros(len(experts), len(module.weight)).scatter(1, experts, weights)
    if isinstance(value, list):  # DeepSeek-VL2's aligner: one tensor for each image
        return torch.cat(value)
    return value if isinstance(value, Tensor) else one_tensor(module, value[0])


def collect(model: nn.Module, points: list[tuple[str, str]], every: int, run: Callable) -> dict[str, Tensor]:
    """What `run` makes the model compute, by stage, in the order of computing.

    Args:
        points: stages and paths, as in STAGES; every: of layers, each of that many.
    """
    seen: dict[str, Tensor] = {}

    def keep(stage: str, module: nn.Module, value: Any) -> None:
        seen.setdefault(stage, one_tensor(module, value).detach().to("cpu", copy=True).contiguous())

    def before(stage: str) -> Callable:
        return lambda module, args, kwargs: keep(stage, module, next(iter((*args, *kwargs.values()))))

    def after(stage: str) -> Callable:
        return lambda module, args, value: keep(stage, module, value)

    with ExitStack() as stack:
        for stage, path in points:
            pattern = re.escape(path.lstrip("<")).replace(r"\*", r"(\d+)")
            for name, module in model.named_modules():
                match = re.fullmatch(pattern, name)
                if match is None or ("layer *" in stage and (int(match[1]) + 1) % every):
                    continue
                label = stage.replace("*", match[1]) if match.groups() else stage
                if path.startswith("<"):
                    stack.enter_context(module.register_forward_pre_hook(before(label), with_kwargs=True))
                else:
                    stack.enter_context(module.register_forward_hook(after(label)))
        run()
    return seen


def greedy(model: nn.Module, run: Callable[[], list[int]]) -> dict[str, Tensor]:
    """The ids that `run` generates, and the logits (ids, vocabulary) that each was chosen by."""
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, out: logits.append(out[0, -1].float().cpu()))
    ids = run()
    hook.remove()
    return {"greedy": torch.tensor(ids), "greedy_logits": torch.stack(logits[: len(ids)])}


def widen(model: nn.Module, layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype` from the weights it has. Decoder layers are wide only while they compute."""

    def convert(parameters, to: torch.dtype) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.to(to)

    narrow, inner = layers[0].input_layernorm.weight.dtype, {id(parameter) for parameter in layers.parameters()}
    convert((parameter for parameter in model.parameters() if id(parameter) not in inner), dtype)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: convert(module.parameters(), dtype))
        layer.register_forward_hook(lambda module, args, out: convert(module.parameters(), narrow))


def pictures_hash(images: list[str]) -> str:
    return " ".join(hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in images)


# ---------------------------------------------------------------------------- transformers, the reference


def transformers_model(folder: Path, processor: Processor, dtype: torch.dtype) -> tuple[nn.Module, DeepseekVL | None]:
    """transformers' model of the folder: as it loads it, or for the official layout from the tensors of ours.

    Returns: the model, and ours where it was needed.
    """
    import transformers

    options, ours = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}, None
    if processor.model_type != "multi_modality":
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
    else:
        ours = load_model(folder, dtype=dtype, tokenizer=processor.tokenizer)
        config = transformers_files(ours.config, processor)["config.json"]
        tensors = checkpoint_tensors(ours, ours.state_dict(), LAYOUTS[config["model_type"]])
        state = {name: tensor.contiguous() for name, (_, tensor) in tensors.items()}
        kind = getattr(transformers, config["architectures"][0])
        model, info = kind.from_pretrained(
            None, config=kind.config_class.from_dict(config), state_dict=state, **options
        )
        for name, *_ in list(info["mismatched_keys"]):
            if name.startswith(OTHER_WIDTHS):
                module, _, parameter = name.rpartition(".")
                setattr(model.get_submodule(module), parameter, nn.Parameter(state[name]))
                info["mismatched_keys"] = {key for key in info["mismatched_keys"] if key[0] != name}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{folder}: transformers has {problem.replace('_', ' ')}: {str(min(info[problem]))[:200]}")
    return model.eval(), ours


def transformers_inputs(folder: Path, processor: Processor, message: dict, batch: dict, ours: DeepseekVL | None):
    """What transformers' model takes: from its own processor, or for the official layout, which that does not read,
    ours and the ids of its tokenizer. Returns the inputs and the stages that were not computed by transformers."""
    import transformers

    if ours is None:
        theirs = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        if theirs.chat_template is None:
            text = theirs.tokenizer.bos_token + processor.prompt([message])
            return theirs(text=text, images=message["images"], add_special_tokens=False, return_tensors="pt"), []
        texts, images = re.split("<image>|<image_placeholder>", message["content"]), iter(message["images"])
        texts = texts if len(texts) > 1 else [""] * len(message["images"]) + texts
        parts = []
        for index, text in enumerate(texts):
            parts += [{"type": "image", "image": next(images)}] if index else []
            parts += [{"type": "text", "text": text}] if text.strip() else []
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return theirs.apply_chat_template([{"role": "user", "content": parts}], **options), []
    inputs, given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}, []
    if "pixel_values" in batch:
        given = ["SigLIP pixels"]
        if hasattr(ours.vision, "split"):
            given, (high, low) = ["SAM pixels", *given], ours.vision.split(batch["pixel_values"])
            inputs |= {"high_res_pixel_values": high, "pixel_values": low}
    if not (folder / "tokenizer.json").exists():
        return inputs, ["token ids", *given]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    marker, count = processor.image_token, processor.num_image_tokens
    text = processor.prompt([message]).replace(marker, marker * count)
    ids = [processor.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    return inputs | {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }, given


@torch.no_grad()
def run_transformers(folder: Path, images: list[str], prompt: str, dtype: torch.dtype, file: Path, every: int = 1):
    """Write transformers' stages for one conversation into a file, as tests/dump_original.py does the original's."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is missing: pip install -r tests/requirements.txt") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processor = Processor(folder)
    if processor.is_vl2:
        raise ValueError(
            f"{folder}: transformers has no DeepSeek-VL2; --against DUMP takes tests/dump_original.py's file"
        )
    message = {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}
    batch = processor([message])
    model, ours = transformers_model(folder, processor, dtype)
    inputs, given = transformers_inputs(folder, processor, message, batch, ours)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": processor.pad_token_id}
    options["eos_token_id"] = list(read_config(folder, processor.tokenizer).end_token_ids) or None
    del ours

    def cast(to: torch.dtype) -> dict[str, Tensor]:
        return {key: value.to(to) if value.is_floating_point() else value for key, value in inputs.items()}

    length, points = inputs["input_ids"].shape[1], [(stage, theirs) for stage, _, theirs in STAGES if theirs]
    tensors = {"input_ids": inputs["input_ids"][0]}
    tensors |= greedy(model, lambda: model.generate(**cast(dtype), **options)[0, length:].tolist())
    for prefix, run_dtype in (("rounded", dtype), ("exact", WIDER[dtype])):
        if prefix == "exact":
            widen(model, model.model.language_model.layers, run_dtype)
        seen = collect(model, points, every, lambda to=run_dtype: model(**cast(to), use_cache=False))
        tensors |= {f"{prefix}/{stage}": tensor for stage, tensor in seen.items()}
    about = {"reference": f"transformers {transformers.__version__}", "model_type": processor.model_type}
    about |= {"prompt": prompt, "pictures": pictures_hash(images), "given": json.dumps(given)}
    save_file(tensors, file, metadata=about | {"dtype": str(dtype).removeprefix("torch.")})


# ---------------------------------------------------------------------------- this code


@torch.no_grad()
def run_ours(model: DeepseekVL, batch: dict[str, Tensor], every: int) -> dict[str, Tensor]:
    """Our stages, the logits and positions of the same prompt behind padding, and the greedy answer."""
    tower = "vision.low" if hasattr(model.vision, "low") else "vision"
    points = [(stage, ours.replace("vision.low", tower)) for stage, ours, _ in STAGES]
    seen = collect(model, points, every, lambda: model(**batch))
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


def tokens(stage: str, tensor: Tensor) -> Tensor:
    """(tokens, width); of pixels one row a picture."""
    tensor = tensor.double().movedim(1, -1) if "neck" in stage else tensor.double()
    return tensor.flatten(1) if "pixels" in stage else tensor.flatten(0, -2)


def relative_error(stage: str, tested: Tensor, exact: Tensor, robust: bool) -> float:
    tested, exact = tokens(stage, tested), tokens(stage, exact)
    norms = exact.norm(dim=-1)
    errors = (tested - exact).norm(dim=-1) / norms.clamp_min(1e-3 * norms.mean().item() + 1e-30)
    return (errors.quantile(0.75) if robust else errors.square().mean().sqrt()).item()


def compare(ours: dict[str, Tensor], ids: Tensor, reference: Any, dtype: torch.dtype, every: int) -> list[tuple]:
    """Rows of the table: stage, shape, error, rounding, largest difference, verdict. A verdict in capitals is bad."""
    given = json.loads(reference.metadata()["given"])
    theirs = reference.get_tensor("input_ids")
    same = "given" if "token ids" in given else "same" if torch.equal(ids, theirs) else "DIFFERENT"
    rows, names = [("token ids", list(ids.shape), None, None, None, same)], set(reference.keys())
    robust = any(stage.startswith("experts") for stage in ours)
    for stage, tested in ours.items():
        decodes = robust and re.match("experts|decoder|logits", stage) is not None
        if stage.startswith("greedy"):
            continue
        if stage.startswith("positions"):
            right = tested.flatten().tolist() == list(range(tested.numel()))
            rows.append((stage, list(tested.shape), None, None, None, "same" if right else "DIFFERENT"))
            continue
        name = stage.removesuffix(" behind padding")
        if f"exact/{name}" not in names:
            rows.append((stage, list(tested.shape), None, None, None, "MISSING in the reference"))
            continue
        exact, rounded = (reference.get_tensor(f"{kind}/{name}") for kind in ("exact", "rounded"))
        if tokens(stage, tested).shape != tokens(stage, exact).shape:
            rows.append((stage, list(tested.shape), None, None, None, f"SHAPE, expected {list(exact.shape)}"))
            continue
        exact, rounded = exact.reshape(tested.shape), rounded.reshape(tested.shape)
        error, rounding = (relative_error(stage, tensor, exact, decodes) for tensor in (tested, rounded))
        wrong = not error <= 2 * rounding + torch.finfo(dtype).eps
        verdict = "given" if stage in given and not wrong else "WRONG" if wrong else "ok"
        if stage.startswith("experts"):
            equal, usual = (((t > 0) & (exact > 0)).sum() / (exact > 0).sum() for t in (tested, rounded))
            verdict = "WRONG" if wrong or 1 - equal > 2 * (1 - usual) + 0.02 else "ok"
            verdict += f", {equal:.1%} of the experts equal"
        rows.append((stage, list(tested.shape), error, rounding, (tested - exact).abs().max().item(), verdict))
    expected = {key[6:] for key in names if key.startswith("exact/")}
    expected = {stage for stage in expected if "layer " not in stage or (int(stage.split()[-1]) + 1) % every == 0}
    return rows + [(stage, [], None, None, None, "MISSING in this code") for stage in sorted(expected - ours.keys())]


def bad(row: tuple) -> bool:
    return row[-1].split(",")[0].split(" ")[0].isupper()


def compare_answers(ours: dict[str, Tensor], reference: Any, decode: Callable, first: str | None) -> tuple[str, bool]:
    """A line about the greedy answers, and whether they are equal but for rounding."""
    ids, theirs = ours["greedy"].tolist(), reference.get_tensor("greedy").tolist()
    at = next((i for i, pair in enumerate(zip(ids, theirs)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(theirs)} of {len(theirs)} greedy tokens equal", len(ids) == len(theirs)
    pair = [ids[at], theirs[at]]
    sides = ours["greedy_logits"][at][pair].tolist(), reference.get_tensor("greedy_logits")[at][pair].tolist()
    margin = sides[1][1] - sides[1][0]
    exact, rounded = (reference.get_tensor(f"{kind}/logits") for kind in ("exact", "rounded"))
    usual = 2 * (rounded.double() - exact.double()).abs().max().item()
    why = "rounding" if margin <= usual else f"look at {first or 'the cache'}"
    logits = "; ".join(
        f"{who}: {decode(pair[:1])!r} {side[0]:.3f}, {decode(pair[1:])!r} {side[1]:.3f}"
        for who, side in zip(("this code", "reference"), sides)
    )
    return f"{at} greedy tokens equal, then {logits}: {margin:.3g} apart: {why}", margin <= usual


def verify(folder: Path, images: list[str], prompt: str, against: str, dtype: torch.dtype | None, every: int) -> int:
    processor = Processor(folder)
    message = {"role": "user", "content": prompt, "images": [load_image(image) for image in images]}
    batch = processor([message])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(against)
        if against == "transformers":
            file, dtype = Path(scratch) / "reference.safetensors", dtype or torch.float32
            note("running transformers")
            run_transformers(folder, images, prompt, dtype, file, every)
            gc.collect()
        elif not file.is_file():
            raise ValueError(
                f"--against {file}: no such file, expected transformers or a file of tests/dump_original.py"
            )
        try:
            with safe_open(file, "pt") as reference:
                about = reference.metadata() or {}
                expected = {"model_type": processor.model_type, "prompt": prompt, "pictures": pictures_hash(images)}
                expected |= {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
                for key, value in expected.items():
                    if about.get(key) != value:
                        found, what = str(about.get(key))[:80], key.replace("_", " ")
                        raise ValueError(f"{file}: made from another {what}: {found!r}, expected {value[:80]!r}")
                dtype = DTYPES[about["dtype"]]
                note("running this code")
                ours = run_ours(load_model(folder, dtype=dtype, tokenizer=processor.tokenizer), batch, every)
                rows = compare(ours, batch["input_ids"][0], reference, dtype, every)
                first = next((row[0] for row in rows if bad(row)), None)
                line, equal = compare_answers(ours, reference, processor.decode, first)
                answers = [processor.decode(ids.tolist()) for ids in (ours["greedy"], reference.get_tensor("greedy"))]
        except SafetensorError as error:
            raise ValueError(f"{file}: no file of tests/dump_original.py ({str(error)[:200]})") from None
    note("")
    print(f"{folder} in {about['dtype']}, against {about['reference']}\n")
    print(f"{'stage':26}{'shape':22}{'error':>9}{'rounding':>10}{'largest':>10}  verdict")
    for stage, shape, *numbers, verdict in rows:
        columns = "".join(f"{'' if n is None else f'{n:.1e}':>{width}}" for n, width in zip(numbers, (9, 10, 10)))
        print(f"{stage:26}{' x '.join(map(str, shape)):22}{columns}  {verdict}")
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
    try:
        if args.layers < 1:
            raise ValueError(f"--layers {args.layers}: expected at least 1")
        return verify(args.folder, images, args.prompt, args.against, DTYPES.get(args.dtype), args.layers)
    except (ValueError, OSError) as error:
        fail(str(error) or type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
