"""tests/verify.py: it finds each fault of demo/ablate.py at the right stage, and none where there is none."""

import base64
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import dump_original
import pytest
import torch
import verify
from ablate import FAULTS, broken
from conftest import GOLDENS, VL2_GOLDENS, VL_GOLDENS, assert_close, copy_checkpoint, golden
from convert import convert
from PIL import Image
from safetensors.torch import load_file, save_file
from small_vl2 import randomized
from torch import nn

import load_weights
from generate import generate
from load_weights import load_model, read_config, save_model
from model import DeepseekVL
from processor import Processor, load_image
from vision import attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """Of a shape whose sides DeepSeek's processor rounds to another size than transformers'."""
    file = tmp_path_factory.mktemp("picture") / "tall.png"
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(file)
    return str(file)


def run(folder, picture, capsys, *options, status: int = 0) -> str:
    """What was printed, by a run with this exit status."""
    found = verify.main([str(folder), "--image", picture, *map(str, options)])
    printed = capsys.readouterr().out
    assert found == status, printed
    return printed


# ------------------------------------------------------------------------------------ a stand-in for the original code


class Root(nn.Module):
    """The original's tree of modules, by its names, around ours; attention is written out, so roundings differ."""

    def __init__(self, ours: DeepseekVL):
        super().__init__()
        for module in ours.modules():
            if hasattr(module, "attend"):
                module.attend = attention
        self.kept, decoder, tree = [ours], Decoder(ours), nn.ModuleDict  # in a list: not a submodule
        if ours.config.tiles is not None:
            self.vision, self.projector, self.language = ours.vision, ours.aligner, decoder
            return
        towers, first = {"vision_tower": ours.vision}, {}
        if hasattr(ours.vision, "high"):
            sides = {"high": ours.vision.high, "low": ours.vision.low}
            towers = {f"vision_tower_{side}": tree({"vision_tower": tower}) for side, tower in sides.items()}
            first = {"high_up_proj": ours.aligner.high_proj}
        self.language_model, self.vision_model, self.aligner = (
            decoder,
            tree(towers),
            tree(first | {"all": ours.aligner}),
        )

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype):
        return cls(load_model(folder, dtype=torch_dtype))

    def prepare_inputs_embeds(self, input_ids, images_seq_mask, pixel_values=None, images=None, **rest):
        (ours,), features = self.kept, ()
        if images_seq_mask.any():
            crop = None if images is None else rest["images_spatial_crop"][0]
            features = ours.encode_images((pixel_values if images is None else images)[0], images_spatial_crop=crop)
        return ours.embed(input_ids, features, images_seq_mask)


class Decoder(nn.Module):
    """A language model as `AutoModelForCausalLM` has it."""

    def __init__(self, ours: DeepseekVL):
        super().__init__()
        self.kept, self.model, self.lm_head = [ours], ours.language, ours.lm_head

    def forward(self, inputs_embeds, attention_mask, use_cache):
        return self.kept[0](inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    def generate(self, inputs_embeds, attention_mask, max_new_tokens, **options):
        return torch.tensor(generate(self.kept[0], {"inputs_embeds": inputs_embeds}, max_new_tokens))


class Inputs(dict):
    """As the originals' processors return them: attributes, keys for `**`, and a `to` that works in place."""

    __getattr__ = dict.__getitem__

    def to(self, device, dtype):
        self.update({key: value.to(dtype) if value.is_floating_point() else value for key, value in self.items()})
        return self


class OriginalProcessor:
    def __init__(self, folder: str):
        self.ours = self.tokenizer = Processor(folder)

    from_pretrained = classmethod(lambda cls, folder: cls(folder))

    def __call__(self, *, conversations, images, force_batchify, system_prompt=None):
        batch = self.ours(conversations)
        pixels = batch.pop("pixel_values", torch.zeros(1, 3, 8, 8))[None]
        crop = batch.pop("images_spatial_crop", torch.zeros(1, 2, dtype=torch.long))[None]
        extra = {"images": pixels, "images_spatial_crop": crop} if self.ours.is_vl2 else {"pixel_values": pixels}
        return Inputs(**batch, **extra)


@pytest.fixture
def originals(monkeypatch):
    """`deepseek_vl` and `deepseek_vl2` are the stand-in."""
    dtype = property(lambda self: self.language.embed_tokens.weight.dtype)  # the layers are wide one at a time
    monkeypatch.setattr(DeepseekVL, "dtype", dtype)
    load = lambda talk: [load_image(i) for message in talk for i in message.get("images", [])]  # noqa: E731
    for package, model, processor, _ in dump_original.CLASSES.values():
        models = SimpleNamespace(**{model: Root, processor: OriginalProcessor})
        monkeypatch.setitem(sys.modules, f"{package}.models", models)
        monkeypatch.setitem(sys.modules, f"{package}.utils.io", SimpleNamespace(load_pil_images=load))


# ------------------------------------------------------------------------------------ no false alarm


@pytest.mark.parametrize("layout, dtype", [("official", "float32"), ("transformers", "bfloat16")])
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_random_checkpoints_are_right(name, layout, dtype, tmp_path, picture, capsys):
    """In the official layout and in that of transformers, whose own processor prepares the pixels."""
    folder = copy_checkpoint(name, tmp_path / "official")
    save_model(randomized(DeepseekVL(read_config(folder)), 0), folder)
    if layout == "transformers":
        convert(folder, tmp_path / layout, layout)
    printed = run(tmp_path / layout, picture, capsys, "--dtype", dtype, "--prompt", "Is this <image> a cat?")
    assert printed.splitlines()[-1].startswith("RIGHT") and "SigLIP layer 2" in printed
    assert ("given" in printed) == (layout == "official")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_dump_of_the_original(name, dtype, tmp_path, picture, capsys, originals):
    folder, dump = golden(name).folder, tmp_path / "dump"
    dump_original.main([str(folder), "--image", picture, "--out", str(dump), "--dtype", dtype, "--device", "cpu"])
    printed = run(folder, picture, capsys, "--against", dump)
    assert "given" not in printed and f"in {dtype}, against the original code" in printed
    assert ("of the experts equal" in printed) == (name in VL2_GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files_are_made_anew(name, tmp_path, originals):
    """From the stand-in, by the original's names: all that it writes is in tests/golden, and equal."""
    file, folder = tmp_path / "golden", golden(name).folder
    dump_original.main([str(folder), "--cases", str(folder / "cases.json"), "--out", str(file), "--device", "cpu"])
    made, right = load_file(file), golden(name).tensors
    assert {key for key in right if key.endswith(("last64", "input_ids"))} - made.keys() == {"batch.input_ids"}
    for key, tensor in made.items():
        if key not in right:  # pixels of a few cases alone are kept
            assert key[2:] in {other[2:] for other in right}
        elif tensor.is_floating_point():
            assert_close(tensor, right[key])
        else:
            assert torch.equal(tensor, right[key]), key


# ------------------------------------------------------------------------------------ faults


@pytest.fixture(scope="session")
def references(tmp_path_factory, picture):
    """references(where) -> a folder, and a file of the right stages for it."""
    parent = tmp_path_factory.mktemp("references")

    @cache
    def make(where: str) -> tuple[Path, Path]:
        file, folder = parent / where, golden("vl2-mla-sigmoid" if where == "VL2" else "vl-hybrid").folder
        if where == "VL2":
            dump_original.main([str(folder), "--image", picture, "--out", str(file), "--dtype", "float32"])
            return folder, file
        if where == "transformers":
            convert(folder, parent / "converted", "transformers")
            folder = parent / "converted"
        verify.run_transformers(folder, [picture], "Describe this image.", "float32", file)
        return folder, file

    return make


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_table_points_to_the_fault(fault, picture, capsys, references, originals):
    folder, file = references(fault.where)
    with broken(fault):
        printed = run(folder, picture, capsys, "--against", file, status=1)
    assert printed.strip().endswith(f"WRONG: the first difference is in {fault.stage}"), printed


def test_wrong_rows_of_the_table_of_names(picture, capsys, monkeypatch):
    """Two of equal shape exchanged, and one that names nothing."""

    def take_table(rows: list) -> None:
        layout = load_weights.LAYOUTS["deepseek_vl_hybrid"]._replace(names=rows)
        monkeypatch.setattr(load_weights, "TRANSFORMERS_NAMES", rows)
        monkeypatch.setitem(load_weights.LAYOUTS, "deepseek_vl_hybrid", layout)

    table, folder = load_weights.TRANSFORMERS_NAMES, golden("vl-hybrid").folder
    sides = {"aligner.high_proj.*": "aligner.low_proj.*", "aligner.low_proj.*": "aligner.high_proj.*"}
    take_table([(theirs, sides.get(ours, ours)) for theirs, ours in table])
    assert run(folder, picture, capsys, status=1).strip().endswith("WRONG: the first difference is in aligner")
    take_table([(theirs.replace("high_res_vision_alpha", "alpha"), ours) for theirs, ours in table])
    with pytest.raises(SystemExit):
        run(folder, picture, capsys)
    assert "transformers has missing keys: model.high_res_vision_alpha" in capsys.readouterr().err


def test_every_fourth_layer(picture, capsys, references):
    folder, file = references("7B")
    printed = run(folder, picture, capsys, "--against", file, "--layers", 4)
    assert "SAM layer 3" in printed and "SAM layer 2" not in printed, printed


def test_another_answer(picture, capsys, tmp_path, references):
    """Greedy ids of the reference that its logits do not explain: a wrong cache. And a near tie, which is rounding."""
    folder, file = references("7B")
    with verify.safe_open(file, "pt") as opened:
        tensors, about = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    ours = int(tensors["greedy"][3])
    other = (ours + 1) % 500
    for logit, status, words in ((9.0, 1, "apart: look at the cache"), (-1e-9, 0, "apart: rounding")):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed["greedy"][3] = other
        changed["greedy_logits"][3, other] = changed["greedy_logits"][3, ours] + logit
        save_file(changed, tmp_path / "dump", metadata=about)
        printed = run(folder, picture, capsys, "--against", tmp_path / "dump", status=status)
        assert words in printed and "3 greedy tokens equal" in printed, printed


# ------------------------------------------------------------------------------------ what cannot be compared


def test_errors_are_one_line(picture, capsys, tmp_path, references, monkeypatch):
    folder, file = references("7B")
    vl2, other = golden("vl2-mha").folder, str(golden("vl-hybrid").folder / "images" / "0.png")
    (tmp_path / "text").write_text("no tensors")
    for name, given in (("bare", {"dtype": "int3"}), ("cut", {"reference": "", "given": "{"})):
        save_file({"ids": torch.zeros(1)}, tmp_path / name, metadata=given)
    cases = [
        ((folder, picture, "--against", file, "--prompt", "What?"), "made from another prompt: 'Describe this image.'"),
        ((folder, other, "--against", file), "made from another pictures"),
        ((folder, picture, "--against", file, "--dtype", "bfloat16"), "made from another dtype: 'float32'"),
        ((vl2, picture, "--against", file), "made from another model type: 'multi_modality'"),
        ((folder, picture, "--against", tmp_path / "none"), "no such file, expected transformers or a file"),
        ((folder, picture, "--against", tmp_path / "text"), "no file of tests/dump_original.py"),
        ((folder, picture, "--against", tmp_path / "bare"), "of its metadata some is missing or damaged"),
        ((folder, picture, "--against", tmp_path / "cut"), "cut: no file of tests/dump_original.py (of its metadata"),
        ((vl2, picture), "transformers has no DeepSeek-VL2; --against DUMP"),
        ((tmp_path, picture), "config.json: no such file"),
        ((folder, str(tmp_path / "none.png")), "none.png: no such image file"),
        (
            (folder, "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()),
            "--image data:image",
        ),
        ((folder, picture, "--layers", 0), "--layers 0: expected at least 1"),
        ((folder, picture), "pip install -r tests/requirements.txt"),  # comes last: then transformers is gone
    ]
    for (tested, image, *options), words in cases:
        if words.startswith("pip"):
            monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit) as end:
            run(tested, image, capsys, *options)
        *_, error = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and error.startswith("error: ") and words in error, error
