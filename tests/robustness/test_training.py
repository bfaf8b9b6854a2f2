"""Training and saving, as users of other models do it."""

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from checkpoints import assert_same_weights
from conftest import ROOT, copy_checkpoint, golden, golden_model, run
from torch import nn

import load_weights
from load_weights import Packed, QuantizedLinear, load_model, save_checkpoint, save_model

CHECKPOINT, IDS = ROOT / "demo/checkpoint", torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path):
    return copy_checkpoint("vl-siglip", tmp_path / "model")


def test_what_is_packed_says_that_it_cannot_learn(monkeypatch):
    monkeypatch.setattr(load_weights.HalfLinear, "LEAST", 0)
    for dtype, quantize in ((torch.bfloat16, None), *((torch.float32, kind) for kind in (None, "int8", "int4"))):
        model = load_model(CHECKPOINT, dtype=dtype, quantize=quantize, pack=True)
        if not any(isinstance(module, Packed) for module in model.modules()):
            continue  # this machine has no packed kernels for these
        assert model(input_ids=IDS).logits.isfinite().all()  # also where gradients are enabled
        with pytest.raises(ValueError, match="a packed layer cannot learn: to train, load the model without pack"):
            model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_packed_layers_under_autocast(quantize):
    options = {"dtype": torch.float32, "quantize": quantize}
    plain, packed = (load_model(CHECKPOINT, pack=pack, **options) for pack in (False, True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ids in (IDS, IDS[:, :1]):
            with torch.autocast("cpu", enabled=False):
                expected = plain(input_ids=ids).logits.flatten()
            assert F.cosine_similarity(packed(input_ids=ids).logits.float().flatten(), expected, dim=0) > 0.99


def test_quantized_layers_pass_gradients_on():
    """Their own weights are buffers and stay; what lies below them learns."""
    batch, models = golden_model("vl-hybrid")[1](golden("vl-hybrid").conversations[0]), []
    for quantize in (None, "int8"):
        models.append(load_model(golden("vl-hybrid").folder, dtype=torch.float32, quantize=quantize))
        labels = batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)
        models[-1](**batch, labels=labels).loss.backward()
    for expected, tested in zip(*(model.aligner.parameters() for model in models)):
        assert F.cosine_similarity(tested.grad.flatten(), expected.grad.flatten(), dim=0) > 0.99


class Wrapped(nn.Module):
    """A linear layer with a low-rank addition, as LoRA wraps it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def norm_of(*values: float, dtype: torch.dtype = torch.float32):
    """A change of a model: the values of its last norm, 64 by right."""

    def change(model) -> None:
        model.language.norm.weight = nn.Parameter(torch.tensor(values, dtype=dtype), requires_grad=False)

    return change


def sparse_norm(model) -> None:
    model.language.norm.weight = nn.Parameter(model.language.norm.weight.data.to_sparse())


def quantized(*layers: str, scales: torch.dtype = torch.float16):
    """A change of a model: the first of these layers becomes int8, the second int4."""

    def change(model) -> None:
        for name, kind in zip(layers, ("int8", "int4")):
            layer = QuantizedLinear.from_weight(model.get_submodule(name).weight, kind, torch.float16)
            model.set_submodule(name, QuantizedLinear(layer.weight, layer.scales.to(scales)))

    return change


def wrap(model) -> None:
    model.language.layers[0].mlp.up_proj = Wrapped(model.language.layers[0].mlp.up_proj)


UP, NEXT_UP, FC1 = "language.layers.0.mlp.up_proj", "language.layers.1.mlp.up_proj", "vision.blocks.0.mlp.fc1"
UNWRITABLE = {  # a change of the model, or a dtype to save in: words
    "a LoRA": (wrap, r"tensor language.layers.0.mlp.up_proj.\S+ .*"),
    "too large": (norm_of(*[1e30] * 64), "language.norm.weight is not finite in torch.float16, nothing is written"),
    "no number": (norm_of(*[torch.nan] * 64), "tensor language.norm.weight is not finite in torch.float16"),
    "another shape": (norm_of(1, 1, 1), r"tensor language.norm.weight of the model has shape \[3\], expected"),
    "8 bits": (norm_of(*[1] * 64, dtype=torch.int8), "tensor language.norm.weight is torch.int8, expected one of"),
    "sparse": (sparse_norm, "tensor language.norm.weight of the model has shape none, expected"),
    "a tower in int8": (quantized(FC1), f"tensor {FC1}.bias of the model has shape none, expected"),
    "int8 and int4": (quantized(UP, NEXT_UP), rf"tensor {NEXT_UP}.scales of the model has shape \[1, 160, 2\]"),
    "whole scales": (quantized(UP, scales=torch.int32), f"tensor {UP}.scales is torch.int32, expected one of"),
    "no values": (lambda model: model.lm_head.to("meta"), "lm_head.weight of the model has shape none, expected"),
    **{str(dtype): (dtype, "dtype is .*, expected one of")
       for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn, "float16")},
}  # fmt: skip


@pytest.mark.parametrize("change, message", UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_could_not_be_loaded_is_not_written(change, message, folder):
    before, model, dtype = (folder / "model.safetensors").read_bytes(), load_model(folder), torch.float16
    if callable(change):
        change(model)
    else:
        dtype = change
    with pytest.raises(ValueError, match=message):
        save_model(model, folder, dtype=dtype)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".*"))


def test_what_is_saved(folder):
    """Weights that were tied by hand, with the mode of other files; and no wrapper."""
    model = load_model(folder)
    model.lm_head.weight = model.language.embed_tokens.weight
    model.language.layers[2] = model.language.layers[1]
    (folder / "other").touch()
    save_model(model, folder)
    assert_same_weights(load_model(folder), model)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "other").stat().st_mode
    with pytest.raises(ValueError, match="a DataParallel is no DeepseekVL: save the model that it wraps"):
        save_model(nn.DataParallel(model), folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_checkpoint(model, folder / "nowhere", folder / "new")


def test_a_disk_that_is_full(folder, monkeypatch):
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
    shutil.copytree(ROOT / "demo/checkpoint", tmp_path / "tuned")
    loop = loop.replace('"tuned"', repr(str(tmp_path / "tuned"))).replace("range(100)", "range(3)")
    done = run("-c", loop)
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 3 and losses[-1] < losses[0]
    changed = load_model(tmp_path / "tuned").state_dict()
    original = load_model(ROOT / "demo/checkpoint").state_dict()
    for name, tensor in original.items():
        assert torch.equal(changed[name], tensor) == name.startswith("vision."), name
