"""Weights in 8 and 4 bits: rounding, fast forms against the equation, loading, saving, answers."""

from collections.abc import Callable

import pytest
import torch
from checkpoints import assert_same_weights
from conftest import GOLDENS, assert_close, golden, golden_model, relative_error, released_model
from torch import nn

import load_weights
from generate import generate
from load_weights import DigitLinear, PackedQuantizedLinear, QuantizedLinear, layers_to_quantize, load_model, pack
from model import MODELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(8, 16)[None]

every_kind = pytest.mark.parametrize("kind", ["int8", "int4"])


def random_weight(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * width**-0.5


@pytest.fixture(autouse=True)
def kernels_win_their_races(monkeypatch):
    """Whatever this machine is busy with."""
    load_weights.pays.cache_clear()
    monkeypatch.setattr(load_weights, "is_faster", lambda *_: True)
    yield
    load_weights.pays.cache_clear()


@pytest.fixture(params=[DigitLinear, PackedQuantizedLinear])
def fast(request, monkeypatch) -> Callable[[QuantizedLinear], nn.Module]:
    """A quantized layer's fast form, also where this machine would take another; the layer itself where it has none.

    `DigitLinear` is for int8 in float32 alone; any other form that agrees with the equation here must be had.
    """
    agrees = load_weights.agrees
    monkeypatch.setattr(load_weights, "agrees", lambda form, *of: form is request.param and agrees(form, *of))

    def fastest(layer: QuantizedLinear) -> nn.Module:
        kind, dtype = "int8" if layer.weight.dtype == torch.int8 else "int4", layer.scales.dtype
        wanted = request.param is PackedQuantizedLinear or (kind, dtype) == ("int8", torch.float32)
        tested = load_weights.packed("", layer)
        assert isinstance(tested, request.param) == (wanted and agrees(request.param, kind, dtype, torch.device("cpu")))
        return tested

    return fastest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 192, 256])
@every_kind
def test_weights_go_to_the_nearest_value(kind, width, dtype):
    """Which reach to a row's largest weight, or from a group's least to its largest, but for the scales' rounding."""
    weight = random_weight(96, width)
    layer = QuantizedLinear.from_weight(weight, kind, dtype)
    scales, group = layer.scales.float(), width if kind == "int8" else 128 if width % 128 == 0 else 64
    grouped = weight.unflatten(1, (-1, group))  # (out, groups, g)
    if kind == "int8":
        values, extremes = scales[:, None, None] * torch.arange(-127, 128), [grouped.abs().amax(-1)]
    else:
        scale, middle = scales.transpose(0, 1)[..., None].unbind(2)  # (out, groups, 1)
        values, extremes = middle + scale * torch.arange(-8, 8), [grouped.amax(-1), grouped.amin(-1)]
    assert layer.scales.dtype == dtype and values.shape == (96, width // group, 255 if kind == "int8" else 16)
    nearest = (grouped[..., None] - values[:, :, None]).abs().amin(-1)
    found = (grouped - layer.dequantized().float().unflatten(1, (-1, group))).abs()
    rounding = 2 * torch.finfo(dtype).eps * weight.abs().max()  # of the dequantized weight itself
    assert (found - nearest).abs().max() <= rounding
    for extreme, reached in zip(extremes, (values[..., -1], values[..., 0])):
        assert (reached - extreme).abs().max() <= 8 * rounding


@every_kind
def test_weights_on_the_grid_are_kept(kind):
    """Also rows and groups of one value, zero among them, whose scale is zero or has nothing to divide."""
    steps = torch.arange(128).remainder(16).float() - 8 if kind == "int4" else torch.arange(128).float()
    weight = torch.stack((steps / 64, -steps / 4, torch.zeros(128), torch.full((128,), 0.5)))
    assert torch.equal(QuantizedLinear.from_weight(weight, kind, torch.float32).dequantized(), weight)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 13, 128, 129, 200])
@every_kind
def test_fast_is_exactly_the_equation(kind, rows, fast):
    """With small whole numbers and scales of powers of two no sum is rounded, so not a bit may differ.

    But for a CPU's kernels, whose results are bfloat16.
    """

    def whole(least: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, most, shape, generator=random)

    random = torch.Generator().manual_seed(rows)
    if kind == "int8":
        layer = QuantizedLinear(whole(-127, 128, 192, 192).to(torch.int8), torch.full((192,), 0.25))
    else:
        scales = torch.stack((2.0 ** whole(-3, 3, 3, 192), whole(-8, 8, 3, 192) / 4), dim=-1)
        layer = QuantizedLinear(whole(0, 256, 192, 96).to(torch.uint8), scales)
    x, tested = whole(-8, 9, rows, 192).float(), fast(layer)
    expected = layer(x)
    if isinstance(tested, PackedQuantizedLinear) and rows <= tested.few:
        expected = expected.bfloat16().float()
    assert torch.equal(tested(x), expected)
    assert torch.equal(tested(x[None, :, None])[0, :, 0], expected)  # any leading dimensions


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_fast_on_a_full_size_layer(kind, dtype, rows, fast):
    """As near to the float32 result of the same integers as the equation; in float32 as the form rounds its inputs."""
    layer = QuantizedLinear.from_weight(random_weight(1024, 5632), kind, dtype)
    x = torch.randn(rows, 5632, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = x.float() @ QuantizedLinear(layer.weight, layer.scales.float()).dequantized().T
    tested = fast(layer)
    if dtype == torch.float32:  # digits: inputs to a 2^-13 of the largest, about 4; kernels: bfloat16 throughout
        most = 4 * 2**-13 / 12**0.5 * 1.5 if isinstance(tested, DigitLinear) else 2**-8
    else:
        most = 1.2 * relative_error(layer(x), exact)
    assert relative_error(tested(x), exact) <= most


def test_layers_of_any_size_are_packed_or_stay_plain():
    """Kernels drop what is left over at widths and heights that they were not made for."""
    for dtype, error in ((torch.float32, 5e-6), (torch.bfloat16, 2**-7)):
        for kind, rows, width in (("int8", 64, 36), ("int8", 33, 64), ("int4", 80, 128), ("int4", 900, 64)):
            layer = QuantizedLinear.from_weight(random_weight(rows, width), kind, dtype)
            x = torch.ones(3, width, dtype=dtype)
            assert_close(pack(nn.Sequential(layer))(x), layer(x), error)


@every_kind
def test_a_kernel_that_is_slower_than_plain_weights_is_not_used(kind, monkeypatch):
    quantized, here = QuantizedLinear.from_weight(random_weight(64, 128), kind, torch.bfloat16), torch.device("cpu")
    for wins in (True, False):
        load_weights.pays.cache_clear()
        monkeypatch.setattr(load_weights, "is_faster", lambda *_, wins=wins: wins)
        is_packed = wins and load_weights.agrees(PackedQuantizedLinear, kind, torch.bfloat16, here)
        assert isinstance(pack(nn.Sequential(quantized))[0], QuantizedLinear) != is_packed
        with torch.device("meta"):  # the device that counts is the layer's
            load_weights.pays.cache_clear()
            assert isinstance(pack(nn.Sequential(quantized))[0], QuantizedLinear) != is_packed


def test_int8_in_float16_does_not_overflow(fast):
    """Integers times activations exceed 65504 long before weights times activations do."""
    layer = QuantizedLinear.from_weight(torch.full((32, 64), 0.5), "int8", torch.float16)
    x = torch.full((200, 64), 20.0, dtype=torch.float16)
    assert_close(fast(layer)(x).float(), torch.full((200, 32), 640.0), 1e-3)


@every_kind
@pytest.mark.parametrize("name", MODELS)
def test_which_layers(name, kind):
    """All linear layers of decoder and head, but for the weight that latent attention reads as a matrix."""
    linears = {name for name, module in released_model(name).named_modules() if isinstance(module, nn.Linear)}
    left = {name for name in linears if name.startswith(("vision.", "aligner.")) or name.endswith("kv_b_proj")}
    assert set(layers_to_quantize(released_model(name), kind)) == linears - left


@every_kind
@pytest.mark.parametrize("name", GOLDENS)
def test_loaded_packed_and_saved_are_the_rounded_model(name, kind, tmp_path):
    folder, (_, processor) = golden(name).folder, golden_model(name)
    batch, plain = processor(golden(name).conversations[0]), load_model(folder, dtype=torch.float32)
    half = load_model(folder, dtype=torch.bfloat16, quantize=kind).state_dict()
    for key in layers_to_quantize(plain, kind):
        layer = plain.get_submodule(key)
        rounded = QuantizedLinear.from_weight(layer.weight, kind, torch.bfloat16)  # from the file's own values
        assert torch.equal(half[f"{key}.weight"], rounded.weight) and torch.equal(half[f"{key}.scales"], rounded.scales)
        layer.weight.data = QuantizedLinear.from_weight(layer.weight, kind, torch.float32).dequantized()
    expected = plain(**batch).logits
    model = load_model(folder, dtype=torch.float32, quantize=kind)
    assert_close(model(**batch).logits, expected, 1e-6)
    load_weights.save_checkpoint(model, folder, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert_close(again(**batch).logits, expected, 1e-6)
    assert load_model(tmp_path / "saved", quantize=kind).state_dict().keys() == again.state_dict().keys()
    # int8's inputs are rounded to 14 bits; int4's kernel for a CPU computes in bfloat16
    assert_close(pack(again)(**batch).logits, expected, 1e-3 if kind == "int8" else 0.05)
    if kind == "int8":
        assert generate(again, batch, max_new_tokens=8) == generate(plain, batch, max_new_tokens=8)
    if any(isinstance(module, load_weights.Packed) for module in again.modules()):  # where there is a kernel
        with pytest.raises(ValueError, match="save it before pack"):
            load_weights.save_checkpoint(again, folder, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # nothing half-written


def test_quantize_must_be_known_and_fit_the_file(tmp_path):
    folder, target, save = golden("vl-siglip").folder, tmp_path / "eight", load_weights.save_checkpoint
    model = load_model(folder, quantize="int8")
    save(model, folder, target)
    for words, refused in (
        ("quantize is 'int3', expected one of int8, int4", lambda: load_model(folder, quantize="int3")),
        ("holds int8 weights, which cannot become int4", lambda: load_model(target, quantize="int4")),
        ("expected the name of a new folder", lambda: save(model, folder, target)),
        ("in a folder that is there", lambda: save(model, folder, tmp_path / "nowhere" / "new")),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    (target / "broken.json").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="eight/broken.json"):  # not the new folder
        save(model, target, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["eight"]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["vl-hybrid", "vl2-mla-sigmoid", "siglip", "tied head"])
def test_packing_while_loading_equals_packing_after_it(name, stored, small_pair, tmp_path):
    """From saved files of every dtype, rounded or not, to every dtype: the same modules, dtypes and logits, bit by bit.

    And on the device that is told, whatever torch's default device is.
    """
    source = golden(name).folder if name.startswith("vl") else small_pair("siglip", tie=name == "tied head").folder
    for kind in (None, "int8", "int4"):
        folder, model = tmp_path / str(kind), load_model(source, dtype=stored, quantize=kind)
        load_weights.save_checkpoint(model, source, folder)
        assert_same_weights(load_model(folder, dtype=stored), model)
        fits = kind == "int8" and name != "tied head" or kind == "int4" and name.startswith("vl")  # a group of 64
        assert isinstance(model.lm_head, QuantizedLinear) == fits
        for dtype in DTYPES:
            after = pack(load_model(folder, dtype=dtype))
            with torch.device("meta"):
                during = load_model(folder, dtype=dtype, pack=True, device="cpu")
            assert [type(module) for module in after.modules()] == [type(module) for module in during.modules()]
            assert {parameter.dtype for parameter in during.parameters()} == {dtype}
            logits = during(IDS).logits
            assert logits.dtype == dtype and torch.equal(logits, after(IDS).logits)
