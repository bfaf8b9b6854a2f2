"""tests/verify.py: it finds each fault of demo/ablate.py at the right stage, and none where there is none."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import dump_original
import pytest
import torch
from conftest import ROOT, VL2_GOLDENS, VL_GOLDENS, assert_close, copy_checkpoint, golden
from PIL import Image
from safetensors.torch import load_file, save_file
from small_vl2 import randomized
from torch import nn

sys.path.insert(0, str(ROOT / "demo"))

import verify  # noqa: E402
from ablate import FAULTS, broken  # noqa: E402
from convert import convert  # noqa: E402

import load_weights  # noqa: E402
from load_weights import load_model, read_config, save_model  # noqa: E402
from model import DeepseekVL  # noqa: E402
from processor import Processor, load_image  # noqa: E402
from vision import attention  # noqa: E402

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """Of a shape whose sides DeepSeek's processor rounds to another size than transformers'."""
    file = tmp_path_factory.mktemp("picture") / "tall.png"
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(file)
    return str(file)


def run(folder, picture, capsys, *options) -> tuple[int, str]:
    """Exit status, and what was printed."""
    status = verify.main([str(folder), "--image", picture, *map(str, options)])
    return status, capsys.readouterr().out


# ------------------------------------------------------------------------------------ a stand-in for the original code


class Root(nn.Module):
    """The original's tree of modules, by its names, around ours; attention is written out, so roundings differ."""

    def __init__(self, ours: DeepseekVL):
        super().__init__()
        for module in ours.modules():
            if hasattr(module, "attend"):
                module.attend = attention
        self.kept, vl2 = [ours], ours.config.tiles is not None  # in a list: not a submodule
        decoder = Decoder(ours)
        if vl2:
            self.vision, self.projector, self.language = ours.vision, ours.aligner, decoder
            return
        self.language_model, self.vision_model, self.aligner = decoder, nn.Module(), Aligner(ours)
        if hasattr(ours.vision, "high"):
            for side in ("high", "low"):
                tower = nn.Module()
                tower.vision_tower = getattr(ours.vision, side)
                setattr(self.vision_model, f"vision_tower_{side}", tower)
        else:
            self.vision_model.vision_tower = ours.vision

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype):
        return cls(load_model(folder, dtype=torch_dtype))

    def prepare_inputs_embeds(self, input_ids, images_seq_mask, pixel_values=None, images=None, **rest):
        ours, features = self.kept[0], ()
        if images_seq_mask.any():
            if images is None:
                pixels = pixel_values[0]
                if hasattr(ours.vision, "high"):
                    towers = self.vision_model
                    high, low = ours.vision.split(pixels)
                    dtype = ours.vision.low.pos_embed.dtype
                    high = towers.vision_tower_high.vision_tower(high.to(dtype))
                    features = self.aligner((high, towers.vision_tower_low.vision_tower(low.to(dtype))))
                else:
                    features = self.aligner(self.vision_model.vision_tower(pixels))
            else:
                features = ours.aligner(self.vision(images[0]), rest["images_spatial_crop"][0])
        return ours.embed(input_ids, list(features), images_seq_mask)


class Aligner(nn.Module):
    def __init__(self, ours: DeepseekVL):
        super().__init__()
        self.kept = [ours.aligner]
        if hasattr(ours.aligner, "high_proj"):
            self.high_up_proj = ours.aligner.high_proj
        self.parts = ours.aligner

    def forward(self, x):
        return self.kept[0](*x) if isinstance(x, tuple) else self.kept[0](x)


class Decoder(nn.Module):
    """A language model as `AutoModelForCausalLM` has it."""

    def __init__(self, ours: DeepseekVL):
        super().__init__()
        self.kept, self.model, self.lm_head = [ours], ours.language, ours.lm_head

    def forward(self, inputs_embeds, attention_mask, use_cache):
        return self.kept[0](inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    def generate(self, inputs_embeds, max_new_tokens, eos_token_id, **options):
        ours, ids, x = self.kept[0], [], inputs_embeds
        cache = ours.new_cache(1, x.shape[1] + max_new_tokens)
        while len(ids) < max_new_tokens and eos_token_id not in ids:
            logits = ours(inputs_embeds=x, cache=cache).logits
            ids.append(int(logits[0, -1].argmax()))
            x = ours.language.embed_tokens(torch.tensor([ids[-1:]]))
        return torch.tensor([ids])


class Inputs(SimpleNamespace):
    """As the originals' processors return them: attributes, keys for `**`, and a `to` that works in place."""

    def keys(self):
        return self.__dict__.keys()

    def __getitem__(self, key):
        return self.__dict__[key]

    def to(self, device, dtype):
        for key, value in self.__dict__.items():
            setattr(self, key, value.to(dtype) if value.is_floating_point() else value)
        return self


class OriginalProcessor:
    def __init__(self, folder: str):
        self.ours = Processor(folder)
        self.tokenizer = SimpleNamespace(
            eos_token_id=self.ours.eos_token_id,
            bos_token_id=self.ours.bos_token_id,
            pad_token_id=self.ours.pad_token_id,
        )

    from_pretrained = classmethod(lambda cls, folder: cls(folder))

    def __call__(self, *, conversations, images, force_batchify, system_prompt=None):
        batch = self.ours(conversations)
        pixels = batch.pop("pixel_values", torch.zeros(1, 3, 8, 8))[None]
        crop = batch.pop("images_spatial_crop", torch.zeros(1, 2, dtype=torch.long))[None]
        extra = {"images": pixels, "images_spatial_crop": crop} if self.ours.is_vl2 else {"pixel_values": pixels}
        return Inputs(**batch, **extra)


@pytest.fixture
def originals(monkeypatch):
    """`import deepseek_vl` and `deepseek_vl2` find the stand-in."""
    classes = {"deepseek_vl": ("MultiModalityCausalLM", "VLChatProcessor")}
    classes["deepseek_vl2"] = ("DeepseekVLV2ForCausalLM", "DeepseekVLV2Processor")
    for package, (model, processor) in classes.items():
        models, io = ModuleType(f"{package}.models"), ModuleType(f"{package}.utils.io")
        setattr(models, model, Root)
        setattr(models, processor, OriginalProcessor)
        io.load_pil_images = lambda talk: [load_image(i) for message in talk for i in message.get("images", [])]
        for name, module in ((f"{package}.models", models), (f"{package}.utils.io", io)):
            monkeypatch.setitem(sys.modules, name, module)
        for name in (package, f"{package}.utils"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))


# ------------------------------------------------------------------------------------ no false alarm


@cache
def transformers_folder(name: str, parent: Path) -> Path:
    convert(golden(name).folder, parent / name, "transformers")
    return parent / name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_random_checkpoints_are_right(name, dtype, tmp_path, picture, capsys):
    """In the official layout and in that of transformers, whose own processor prepares the pixels."""
    folder = copy_checkpoint(name, tmp_path / "official")
    save_model(randomized(DeepseekVL(read_config(folder)), 0), folder)
    convert(folder, tmp_path / "converted", "transformers")
    for tested in (folder, tmp_path / "converted"):
        status, printed = run(tested, picture, capsys, "--dtype", dtype, "--prompt", "Is this <image> a cat?")
        assert status == 0, printed
        assert printed.splitlines()[-1].startswith("RIGHT") and "SigLIP layer 2" in printed
        assert ("given" in printed) == (tested == folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*VL_GOLDENS, *VL2_GOLDENS])
def test_a_dump_of_the_original(name, dtype, tmp_path, picture, capsys, originals):
    folder, dump = golden(name).folder, tmp_path / "dump"
    dump_original.main([str(folder), "--image", picture, "--out", str(dump), "--dtype", dtype, "--device", "cpu"])
    status, printed = run(folder, picture, capsys, "--against", dump)
    assert status == 0, printed
    assert "given" not in printed and f"in {dtype}, against the original code" in printed
    assert ("of the experts equal" in printed) == (name in VL2_GOLDENS)


@pytest.mark.parametrize("name", [*VL_GOLDENS, *VL2_GOLDENS])
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


def test_every_fourth_layer(picture, capsys):
    status, printed = run(golden("vl-hybrid").folder, picture, capsys, "--layers", 4)
    assert status == 0 and "SAM layer 3" in printed and "SAM layer 2" not in printed, printed


# ------------------------------------------------------------------------------------ faults


def first_difference(printed: str) -> str:
    return printed.strip().splitlines()[-1].removeprefix("WRONG: the first difference is in ")


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """references(where, picture, ...) -> a folder, and a file of the right stages for it."""
    parent = tmp_path_factory.mktemp("references")

    def make(where: str, picture: str) -> tuple[Path, Path]:
        file = parent / f"{where}.safetensors"
        folder = golden("vl2-mla-sigmoid" if where == "VL2" else "vl-hybrid").folder
        folder = transformers_folder("vl-hybrid", parent) if where == "transformers" else folder
        if not file.exists() and where == "VL2":
            options = ["--image", picture, "--out", str(file), "--dtype", "float32", "--device", "cpu"]
            dump_original.main([str(folder), *options])
        elif not file.exists():
            verify.run_transformers(folder, [picture], "Describe this image.", "float32", file)
        return folder, file

    return make


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_table_points_to_the_fault(fault, picture, capsys, references, originals):
    folder, file = references(fault.where, picture)
    with broken(fault):
        status, printed = run(folder, picture, capsys, "--against", file)
    assert status == 1 and first_difference(printed) == fault.stage, printed
    assert run(folder, picture, capsys, "--against", file)[0] == 0


ROWS = {  # of TRANSFORMERS_NAMES, two of equal shape, and where their exchange shows first
    "SigLIP layer 0": ("vision_model.encoder.layers.*.layer_norm1.*", "vision_model.encoder.layers.*.layer_norm2.*"),
    "aligner": ("model.aligner.high_res_vision_proj.*", "model.aligner.vision_proj.*"),
    "SAM neck": ("vision_encoder.neck.layer_norm1.*", "vision_encoder.neck.layer_norm2.*"),
}


@pytest.mark.parametrize("stage", ROWS)
def test_two_exchanged_rows_of_the_table_of_names(stage, picture, capsys, monkeypatch):
    table = list(load_weights.TRANSFORMERS_NAMES)
    low = [i for i, row in enumerate(table) if row[1].startswith("vision.low.") or "vision.low" not in row[1]]
    first, second = (next(i for i in low if table[i][0].endswith(end)) for end in ROWS[stage])
    table[first], table[second] = (table[first][0], table[second][1]), (table[second][0], table[first][1])
    layout = load_weights.LAYOUTS["deepseek_vl_hybrid"]._replace(names=table)
    monkeypatch.setattr(load_weights, "TRANSFORMERS_NAMES", table)
    monkeypatch.setitem(load_weights.LAYOUTS, "deepseek_vl_hybrid", layout)
    status, printed = run(golden("vl-hybrid").folder, picture, capsys)
    assert status == 1 and first_difference(printed) == stage, printed


def test_a_row_of_the_table_that_names_nothing(picture, capsys, monkeypatch):
    table = [
        (theirs.replace("high_res_vision_alpha", "alpha"), ours) for theirs, ours in load_weights.TRANSFORMERS_NAMES
    ]
    layout = load_weights.LAYOUTS["deepseek_vl_hybrid"]._replace(names=table)
    monkeypatch.setitem(load_weights.LAYOUTS, "deepseek_vl_hybrid", layout)
    with pytest.raises(SystemExit):
        run(golden("vl-hybrid").folder, picture, capsys)
    assert "transformers has missing keys: model.high_res_vision_alpha" in capsys.readouterr().err


def test_another_answer(picture, capsys, tmp_path, references):
    """Greedy ids of the reference that its logits do not explain: a wrong cache. And a near tie, which is rounding."""
    folder, file = references("7B", picture)
    with verify.safe_open(file, "pt") as opened:
        tensors, about = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    ours = int(tensors["greedy"][3])
    other = (ours + 1) % 500
    for logit, status, words in ((9.0, 1, "apart: look at the cache"), (-1e-9, 0, "apart: rounding")):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed["greedy"][3] = other
        changed["greedy_logits"][3, other] = changed["greedy_logits"][3, ours] + logit
        save_file(changed, tmp_path / "dump", metadata=about)
        found, printed = run(folder, picture, capsys, "--against", tmp_path / "dump")
        assert found == status and words in printed and "3 greedy tokens equal" in printed, printed


# ------------------------------------------------------------------------------------ what cannot be compared


def test_errors_are_one_line(picture, capsys, tmp_path, references, monkeypatch):
    folder, file = references("7B", picture)
    other = str(golden("vl-hybrid").folder / "images" / "0.png")
    text = tmp_path / "text"
    text.write_text("no tensors")
    vl2 = golden("vl2-mha").folder
    cases = [
        ((folder, picture, "--against", file, "--prompt", "What?"), "made from another prompt: 'Describe this image.'"),
        ((folder, other, "--against", file), "made from another pictures"),
        ((folder, picture, "--against", file, "--dtype", "bfloat16"), "made from another dtype: 'float32'"),
        ((golden("vl2-mha").folder, picture, "--against", file), "made from another model type: 'multi_modality'"),
        ((folder, picture, "--against", tmp_path / "none"), "no such file, expected transformers or a file"),
        ((folder, picture, "--against", text), "no file of tests/dump_original.py"),
        ((vl2, picture), "transformers has no DeepSeek-VL2; --against DUMP"),
        ((tmp_path, picture), "config.json: no such file"),
        ((folder, str(tmp_path / "none.png")), "none.png: no such image file"),
        ((folder, picture, "--layers", 0), "--layers 0: expected at least 1"),
    ]
    for (tested, image, *options), words in cases:
        with pytest.raises(SystemExit) as end:
            run(tested, image, capsys, *options)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit):
        run(folder, picture, capsys)
    error = capsys.readouterr().err
    assert "transformers cannot be used" in error and "pip install -r tests/requirements.txt" in error
