"""Training and saving, as users of other models do it."""

import re
import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from checkpoints import assert_same_weights
from conftest import DEMO, ROOT, copy_checkpoint, golden, golden_model, run
from torch import nn

import load_weights
from load_weights import Packed, QuantizedLinear, load_model, save_checkpoint, save_model

CHECKPOINT, IDS = DEMO / "checkpoint", torch.arange(10, 30)[None]


@pytest.fixture
def folder(tmp_path):
    return copy_checkpoint("vl-siglip", tmp_path / "model")


@contextmanager
def error_that_writes_nothing(folder, kind: type, message: str):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(kind, match=message):
        yield
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".*"))


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
    for ids in (IDS, IDS[:, :1]):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tested = packed(input_ids=ids).logits.float()
        assert F.cosine_similarity(tested.flatten(), plain(input_ids=ids).logits.flatten(), dim=0) > 0.99


def test_quantized_layers_pass_gradients_on():
    """Their own weights are buffers and stay; what lies below them learns."""
    batch, models = golden_model("vl-hybrid")[1](golden("vl-hybrid").conversations[0]), []
    labels = batch["input_ids"].masked_fill(batch["images_seq_mask"], -100)
    for quantize in (None, "int8"):
        models.append(load_model(golden("vl-hybrid").folder, dtype=torch.float32, quantize=quantize))
        models[-1](**batch, labels=labels).loss.backward()
    for expected, tested in zip(*(model.aligner.parameters() for model in models)):
        assert F.cosine_similarity(tested.grad.flatten(), expected.grad.flatten(), dim=0) > 0.99


def rounded(linear: nn.Linear, kind: str = "int8", scales: torch.dtype = torch.float16) -> QuantizedLinear:
    layer = QuantizedLinear.from_weight(linear.weight, kind, torch.float16)
    return QuantizedLinear(layer.weight, layer.scales.to(scales))


UP, NEXT_UP, FC1 = "language.layers.0.mlp.up_proj", "language.layers.1.mlp.up_proj", "vision.blocks.0.mlp.fc1"
NORM = "tensor language.norm.weight"
UNWRITABLE = [  # the last norm's weight, or what becomes of layers; words
    (torch.full((64,), 1e30), f"{NORM} is not finite in torch.float16, nothing is written"),
    (torch.full((64,), torch.nan), f"{NORM} is not finite in torch.float16"),
    (torch.ones(3), rf"{NORM} of the model has shape \[3\], expected"),
    (torch.ones(64, dtype=torch.int8), f"{NORM} is torch.int8, expected one of"),
    (torch.ones(64).to_sparse(), f"{NORM} of the model has shape none, expected"),
    ({UP: nn.Sequential}, rf"tensor {UP}.\S+ .*"),  # a wrapper, as of LoRA
    ({FC1: rounded}, f"tensor {FC1}.bias of the model has shape none, expected"),
    ({UP: rounded, NEXT_UP: lambda linear: rounded(linear, "int4")},
     rf"tensor {NEXT_UP}.scales of the model has shape \[1, 160, 2\]"),
    ({UP: lambda linear: rounded(linear, scales=torch.int32)}, f"tensor {UP}.scales is torch.int32, expected one of"),
    ({"lm_head": lambda linear: linear.to("meta")}, "lm_head.weight of the model has shape none, expected"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", UNWRITABLE)
def test_what_could_not_be_loaded_is_not_written(change, message, folder):
    model = load_model(folder)
    if isinstance(change, torch.Tensor):
        model.language.norm.weight = nn.Parameter(change, requires_grad=False)
    else:
        for name, become in change.items():
            model.set_submodule(name, become(model.get_submodule(name)))
    with error_that_writes_nothing(folder, ValueError, message):
        save_model(model, folder, dtype=torch.float16)


def test_saving_in_what_is_no_dtype_of_a_checkpoint_and_on_a_full_disk(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "a temporary name")

    model = load_model(folder)
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn, "float16"):
        with error_that_writes_nothing(folder, ValueError, "dtype is .*, expected one of"):
            save_model(model, folder, dtype=dtype)
    monkeypatch.setattr(load_weights, "save_file", full)
    with error_that_writes_nothing(folder, OSError, r"safetensors: cannot be written \(No space left on device\)$"):
        save_model(model, folder)
    with pytest.raises(OSError, match=r"/new: cannot be written \(No space left on device\)$") as told:
        save_checkpoint(model, folder, folder.with_name("new"))
    assert str(told.value).count("cannot") == 1 and not folder.with_name("new").exists()


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


def test_the_fine_tuning_loop_of_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (loop,) = (block for block in blocks if "save_model" in block)
    shutil.copytree(CHECKPOINT, tmp_path / "tuned")
    done = run("-c", loop.replace('"tuned"', repr(str(tmp_path / "tuned"))).replace("range(100)", "range(3)"))
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 3 and losses[-1] < losses[0]
    changed = load_model(tmp_path / "tuned").state_dict()
    for name, tensor in load_model(CHECKPOINT).state_dict().items():
        assert torch.equal(changed[name], tensor) == name.startswith("vision."), name
