"""Training and saving, as users of other models do it."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, copy_checkpoint, golden, golden_model
from torch import nn

import load_weights
from load_weights import PackedLinear, PackedQuantizedLinear, load_model, save_model


def learnable(name: str = "vl-hybrid") -> dict:
    batch = golden_model(name)[1](golden(name).conversations[0])
    return batch | {"labels": batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)}


def test_what_is_packed_says_that_it_cannot_learn():
    ids = torch.arange(20)[None]
    for dtype, quantize in ((torch.bfloat16, None), (torch.float32, "int8"), (torch.float32, "int4")):
        model = load_model(ROOT / "demo/checkpoint", dtype=dtype, quantize=quantize, pack=True)
        if not any(isinstance(module, (PackedLinear, PackedQuantizedLinear)) for module in model.modules()):
            continue  # this machine has no packed kernels for these
        assert model(input_ids=ids).logits.isfinite().all()  # also where gradients are enabled
        with pytest.raises(ValueError, match="a packed layer cannot learn: to train, load the model without pack"):
            model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_packed_layers_under_autocast(quantize):
    ids = torch.arange(20)[None]
    model = load_model(ROOT / "demo/checkpoint", dtype=torch.float32, quantize=quantize, pack=True)
    expected = load_model(ROOT / "demo/checkpoint", dtype=torch.float32, quantize=quantize)(input_ids=ids).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits.float()
        first = model(input_ids=ids[:, :1]).logits.float()
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.99
    assert torch.nn.functional.cosine_similarity(first[0, 0], expected[0, 0], dim=0) > 0.99


def test_quantized_layers_pass_gradients_on():
    """Their own weights are buffers and stay; what lies below them learns."""
    plain = load_model(golden("vl-hybrid").folder, dtype=torch.float32)
    model = load_model(golden("vl-hybrid").folder, dtype=torch.float32, quantize="int8")
    for tested in (plain, model):
        tested(**learnable()).loss.backward()
    for ours, theirs in zip(model.aligner.parameters(), plain.aligner.parameters()):
        assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.99


class Wrapped(nn.Module):
    """A linear layer with a low-rank addition, as LoRA wraps it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrapped(model):
    model.language.layers[0].mlp.up_proj = Wrapped(model.language.layers[0].mlp.up_proj)


def too_large(model):
    model.language.norm.weight.data[0] = 1e30


def reshaped(model):
    model.language.norm.weight = nn.Parameter(torch.ones(3))


def not_a_number(model):
    model.lm_head.weight.data[1, 2] = torch.nan


def without_values(model):
    model.lm_head.to("meta")


def of_8_bits(model):
    model.language.norm.weight = nn.Parameter(model.language.norm.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (wrapped, r"tensor language.layers.0.mlp.up_proj.\S+ .*"),
        (too_large, "tensor language.norm.weight is not finite in torch.float16, nothing is written"),
        (reshaped, r"tensor language.norm.weight of the model has shape \[3\], expected"),
        (not_a_number, "tensor lm_head.weight is not finite in torch.float16"),
        (without_values, "tensor lm_head.weight of the model has shape none, expected"),
        (of_8_bits, "tensor language.norm.weight is torch.int8, expected one of"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(change, message, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    change(model)
    with pytest.raises(ValueError, match=message):
        save_model(model, folder, dtype=torch.float16)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float16"])
def test_dtypes_that_could_not_be_loaded_are_not_written(dtype, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="dtype is .*, expected one of"):
        save_model(load_model(folder), folder, dtype=dtype)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_wrapper_is_not_saved(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    with pytest.raises(ValueError, match="a DataParallel is no DeepseekVL: save the model that it wraps"):
        save_model(nn.DataParallel(load_model(folder)), folder)


def test_a_head_that_was_tied_by_hand(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    model = load_model(folder)
    model.lm_head.weight = model.language.embed_tokens.weight
    save_model(model, folder)
    assert torch.equal(load_model(folder).lm_head.weight, model.language.embed_tokens.weight)


def test_saved_weights_have_the_mode_of_other_files(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    (folder / "other").touch()
    save_model(load_model(folder), folder)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "other").stat().st_mode


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    model, before = load_model(folder), (folder / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device", "a temporary name")

    monkeypatch.setattr(load_weights, "save_file", full)
    with pytest.raises(OSError, match=r"model.safetensors: cannot be written \(No space left on device\)$"):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".*"))


def test_the_fine_tuning_loop_of_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (loop,) = (block for block in blocks if "save_model" in block)
    subprocess.run(["cp", "-r", str(ROOT / "demo/checkpoint"), str(tmp_path / "tuned")], check=True)
    loop = loop.replace('"tuned"', repr(str(tmp_path / "tuned"))).replace("range(100)", "range(4)")
    done = subprocess.run([sys.executable, "-c", loop], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    changed = load_model(tmp_path / "tuned").state_dict()
    original = load_model(ROOT / "demo/checkpoint").state_dict()
    for name, tensor in original.items():
        assert torch.equal(changed[name], tensor) == name.startswith("vision."), name
