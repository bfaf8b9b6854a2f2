"""Write what DeepSeek's own code computes, stage by stage, for tests/verify.py --against and as golden files.

Runs in the environment of the original code (github.com/deepseek-ai/DeepSeek-VL or DeepSeek-VL2, `pip install -e .`),
imports nothing of this repository, and calls the original as its README does:

    python dump_original.py DIR --image photo.jpg --prompt "Describe this image." --out dump.safetensors
    python verify.py DIR --image photo.jpg --prompt "Describe this image." --against dump.safetensors
    python dump_original.py DIR --cases DIR/cases.json --out DIR/golden.safetensors

A dump holds input_ids (T,), greedy (ids,), greedy_logits (ids, vocabulary), and each stage twice: rounded/<stage>,
computed in --dtype, and exact/<stage>, computed from the same weights in a wider dtype. Golden files hold the float32
results of several conversations, and of each only what the tests read.
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

NEW_TOKENS, GOLDEN_NEW_TOKENS = 32, 12
DTYPES = {"float32": (torch.float32, torch.float64), "bfloat16": (torch.bfloat16, torch.float32)}

CLASSES = {  # by model_type: package, model and processor, the model's part that is the language model
    "multi_modality": ("deepseek_vl", "MultiModalityCausalLM", "VLChatProcessor", "language_model"),
    "deepseek_vl_v2": ("deepseek_vl2", "DeepseekVLV2ForCausalLM", "DeepseekVLV2Processor", "language"),
}
SAM, SAM_LAYERS = "vision_model.vision_tower_high.vision_tower", "model.high_res_vision_model.vision_encoder.layers"
LAYERS, THEIR_LAYERS, THEIR_SIGLIP = "LANGUAGE.model.layers", "model.language_model.layers", "model.vision_model"
# A stage, and the module that computes it: in the original, in this repository, in transformers.
# `<`: a module's input, `*`: each layer. What a model lacks matches nothing.
STAGES = [
    ("SAM pixels", f"<{SAM}", "<vision.high", "<model.high_res_vision_model"),
    ("SAM embedded", f"<{SAM}.blocks.0", "<vision.high.blocks.0", f"<{SAM_LAYERS}.0"),
    ("SAM layer *", f"{SAM}.blocks.*", "vision.high.blocks.*", f"{SAM_LAYERS}.*"),
    ("SAM neck", f"{SAM}.neck", "vision.high.neck", SAM_LAYERS.replace("layers", "neck")),
    ("SAM early neck", f"{SAM}.neck_hd", "vision.high.neck_hd", "model.high_res_vision_neck"),
    ("SAM", "<aligner.high_up_proj", "vision.high", "<model.aligner.high_res_vision_proj"),
    ("SigLIP pixels", "<SIGLIP", "<vision.low", f"<{THEIR_SIGLIP}"),
    ("SigLIP embedded", "<SIGLIP.blocks.0", "<vision.low.blocks.0", f"<{THEIR_SIGLIP}.encoder.layers.0"),
    ("SigLIP layer *", "SIGLIP.blocks.*", "vision.low.blocks.*", f"{THEIR_SIGLIP}.encoder.layers.*"),
    ("SigLIP", "SIGLIP", "vision.low", f"{THEIR_SIGLIP}.post_layernorm"),
    ("aligner", "", "aligner", "model.aligner"),  # of the original: from the embeddings
    ("embeddings", f"<{LAYERS}.0", "<language.layers.0", f"<{THEIR_LAYERS}.0"),
    ("experts *", f"{LAYERS}.*.mlp.gate", "language.layers.*.mlp.gate", ""),
    ("decoder layer *", f"{LAYERS}.*", "language.layers.*", f"{THEIR_LAYERS}.*"),
    ("decoder", "LANGUAGE.model.norm", "language.norm", "model.language_model.norm"),
    ("logits", "LANGUAGE.lm_head", "lm_head", "lm_head"),
]


def about(reference, model_type, prompt, images, dtype, given):
    """A dump's metadata. given: the stages that the reference did not compute itself."""
    pictures = " ".join(hashlib.sha256(Path(image).read_bytes()).hexdigest() for image in images)
    names = {"reference": reference, "model_type": model_type, "prompt": prompt, "pictures": pictures, "dtype": dtype}
    return {**names, "given": json.dumps(given)}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def collect(model, points, run):
    """What `run` makes the model compute, {stage: tensor}, in the order of computing; first calls of modules count.

    points: stages and paths of modules, from STAGES. Of a router: the weight of each expert for each token.
    """
    seen = {}

    def keep(stage, module, value):
        if isinstance(value, tuple) and value[0].dtype == torch.int64:  # a router's: experts and weights
            value = value[1].new_zeros(len(value[0]), len(module.weight)).scatter(1, value[0], value[1])
        elif isinstance(value, (tuple, list)):
            value = torch.cat(value) if isinstance(value, list) else value[0]
        seen.setdefault(stage, value.detach().to("cpu", copy=True).contiguous())

    with ExitStack() as stack:
        modules = [(name, module) for name, module in model.named_modules() if name]
        for (stage, path), (name, module) in itertools.product(points, modules):
            match = re.fullmatch(re.escape(path.lstrip("<")).replace(r"\*", r"(\d+)"), name)
            label = match and match.expand(stage.replace("*", r"\1"))
            if match and path.startswith("<"):
                hook = lambda m, args, kwargs, s=label: keep(s, m, next(iter((*args, *kwargs.values()))))  # noqa: E731
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif match:
                stack.enter_context(module.register_forward_hook(lambda m, args, out, s=label: keep(s, m, out)))
        run()
    return seen


def greedy(model, run):
    """The ids that `run` generates, and the logits (ids, vocabulary) that each was chosen by."""
    logits = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: logits.append(out[0, -1].float().cpu()))
    ids = run()
    hook.remove()
    return {"greedy": torch.tensor(ids), "greedy_logits": torch.stack(logits[: len(ids)])}


def widen(model, layers, narrow, wide):
    """Compute in `wide` from the weights as they are. Decoder layers, most of the memory, are wide one at a time."""

    def convert(parameters, to):
        for parameter in parameters:
            parameter.data = parameter.data.to(to)

    inner = {id(parameter) for parameter in layers.parameters()}
    convert((parameter for parameter in model.parameters() if id(parameter) not in inner), wide)
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: convert(module.parameters(), wide))
        layer.register_forward_hook(lambda module, args, out: convert(module.parameters(), narrow))
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):  # sines and cosines that were rounded to the narrow dtype
            module.max_seq_len_cached = None


class Original:
    """The original's model and processor, loaded from a folder."""

    def __init__(self, folder, dtype, device):
        self.kind = json.loads((folder / "config.json").read_text())["model_type"]
        self.is_vl2, self.dtype, self.device = self.kind == "deepseek_vl_v2", dtype, device
        if self.kind not in CLASSES:
            fail(f"{folder / 'config.json'}: model_type is {self.kind!r}, expected an official checkpoint")
        package, model_class, processor_class, language = CLASSES[self.kind]
        try:
            models, io = import_module(f"{package}.models"), import_module(f"{package}.utils.io")
            Model, Processor = getattr(models, model_class), getattr(models, processor_class)
            self.load_pictures = io.load_pil_images
        except (ImportError, AttributeError) as error:
            fail(f"the original code cannot be imported ({error}): pip install -e . in its repository")
        self.processor = Processor.from_pretrained(str(folder))
        # Not .to(dtype), as in README: that would also round the frequencies of the rotations.
        self.model = Model.from_pretrained(str(folder), torch_dtype=dtype).to(device).eval()
        self.language = getattr(self.model, language)
        hybrid = not self.is_vl2 and hasattr(self.model.vision_model, "vision_tower_high")
        siglip = "vision_model.vision_tower_low.vision_tower" if hybrid else "vision_model.vision_tower"
        siglip = "vision" if self.is_vl2 else siglip
        self.points = [
            (stage, path.replace("SIGLIP", siglip).replace("LANGUAGE", language)) for stage, path, *_ in STAGES
        ]

    def inputs(self, conversation, dtype):
        options = {"system_prompt": ""} if self.is_vl2 else {}
        pictures = self.load_pictures(conversation)
        prepared = self.processor(conversations=conversation, images=pictures, force_batchify=True, **options)
        return prepared.to(self.device, dtype=dtype)

    def stages(self, conversation, dtype):
        inputs = self.inputs(conversation, dtype)

        def run():
            embeddings = self.model.prepare_inputs_embeds(**inputs)
            self.language(inputs_embeds=embeddings, attention_mask=inputs.attention_mask, use_cache=False)

        seen = collect(self.model, self.points, run)
        features = seen["embeddings"][inputs.images_seq_mask.cpu().bool()]
        return inputs, seen | ({"aligner": features} if len(features) else {})

    def greedy(self, conversation, count):
        inputs, tokenizer = self.inputs(conversation, self.dtype), self.processor.tokenizer
        options = {"max_new_tokens": count, "do_sample": False, "use_cache": True}
        options.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        options.update(pad_token_id=tokenizer.eos_token_id, attention_mask=inputs.attention_mask)
        embeddings = self.model.prepare_inputs_embeds(**inputs)
        return greedy(self.language, lambda: self.language.generate(inputs_embeds=embeddings, **options)[0].tolist())


def dump(original, images, prompt, name):
    """The tensors of a dump and its metadata, for verify.py."""
    roles = ("<|User|>", "<|Assistant|>") if original.is_vl2 else ("User", "Assistant")
    marker, after = ("<image>", "\n") if original.is_vl2 else ("<image_placeholder>", "")
    content = re.sub("<image>|<image_placeholder>", marker, prompt)
    content = content if marker in content else (marker + after) * len(images) + prompt
    message = {"role": roles[0], "content": content, "images": images}
    conversation, (narrow, wide) = [message, {"role": roles[1], "content": ""}], DTYPES[name]
    tensors = original.greedy(conversation, NEW_TOKENS)
    for prefix, dtype in (("rounded", narrow), ("exact", wide)):
        if prefix == "exact":
            widen(original.model, original.language.model.layers, narrow, wide)
        inputs, seen = original.stages(conversation, dtype)
        tensors.update({f"{prefix}/{stage}": tensor for stage, tensor in seen.items()})
    tensors["input_ids"] = inputs.input_ids[0].cpu()
    return tensors, about("the original code", original.kind, prompt, images, name, [])


def golden(original, file):
    """The tensors of a golden file: `<case>.<tensor>`, see tests/parity/test_architecture.py."""
    tensors = {}
    for case, entry in enumerate(json.loads(file.read_text(encoding="utf-8"))["cases"]):
        for message in entry["conversation"]:
            if "images" in message:
                message["images"] = [str(file.parent / "images" / image) for image in message["images"]]
        inputs, seen = original.stages(entry["conversation"], torch.float32)
        ids = original.greedy(entry["conversation"], GOLDEN_NEW_TOKENS)["greedy"]
        found = {"input_ids": inputs.input_ids[0], "greedy": ids, "logits_last64": seen["logits"][0, -64:]}
        found.update(
            hidden_layer1_last64=seen["decoder layer 0"][0, -64:], hidden_final_last64=seen["decoder"][0, -64:]
        )
        if "aligner" in seen and original.is_vl2:
            found.update(images=inputs.images[0], images_spatial_crop=inputs.images_spatial_crop[0])
            found.update(vision_tile0=seen["SigLIP"][0], image_embeds_head64=seen["aligner"][:64])
            found["image_embeds_tail64"] = seen["aligner"][-64:]
        elif "aligner" in seen:
            features = seen["aligner"].unflatten(0, (len(inputs.pixel_values[0]), -1))
            found.update(pixel_values=inputs.pixel_values[0], image_features=features)
            towers = {"vision_high": "SAM", "vision_low": "SigLIP"} if "SAM" in seen else {"vision": "SigLIP"}
            found.update({key: seen[stage] for key, stage in towers.items()})
        tensors.update({f"{case}.{key}": tensor.cpu().clone() for key, tensor in found.items()})
    return tensors, {}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="official checkpoint folder")
    parser.add_argument("--image", action="append", default=[], help="picture; may be repeated")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--cases", type=Path, help="write a golden file of these conversations, in float32")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    name = "float32" if args.cases else args.dtype
    try:
        with torch.no_grad():
            original = Original(args.folder, DTYPES[name][0], args.device)
            made = golden(original, args.cases) if args.cases else dump(original, args.image, args.prompt, name)
        unfinished = args.out.with_name(f".{args.out.name}.unfinished")
        save_file(made[0], unfinished, metadata=made[1])
        unfinished.replace(args.out)
    except (OSError, KeyError, ValueError) as error:
        fail(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
