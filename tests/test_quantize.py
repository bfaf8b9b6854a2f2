"""Weights in 8 and 4 bits: rounding, the packed kernels against the plain form, loading, saving, answers."""

import itertools

import pytest
import torch
from conftest import (
    SHARED,
    VL2_GOLDENS,
    VL_GOLDENS,
    assert_close,
    golden,
    golden_model,
    needs_shared,
    relative_error,
)
from safetensors.torch import load, save_file
from torch import nn

import load_weights
from generate import generate
from load_weights import load_model, read_config, save_checkpoint
from model import (
    Attention,
    DeepseekVL,
    LanguageConfig,
    PackedQuantizedLinear,
    QuantizedLinear,
    kernel_agrees,
    layers_to_quantize,
    pack_linears,
    rope_angles,
)
from processor import Processor

KINDS = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5


def skip_without_kernel(kind: str, dtype: torch.dtype) -> None:
    if not kernel_agrees(kind, dtype, torch.device("cpu")):
        pytest.skip(f"this machine has no packed kernel for {kind} in {dtype}")


# ---------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_int4_goes_to_the_nearest_of_sixteen_values(width, dtype):
    weight = random_weight(96, width)
    layer = QuantizedLinear.from_weight(weight, "int4", dtype)
    group = 128 if width % 128 == 0 else 64
    assert layer.group == group and layer.scales.shape == (width // group, 96, 2) and layer.scales.dtype == dtype
    scale, middle = layer.scales.float().transpose(0, 1).unbind(-1)  # (out, groups)
    values = middle[..., None] + scale[..., None] * torch.arange(-8, 8)  # (out, groups, 16)
    grouped = weight.unflatten(1, (-1, group))
    nearest = (grouped[..., None] - values[:, :, None]).abs().amin(-1)
    found = (grouped - layer.dequantized().float().unflatten(1, (-1, group))).abs()
    rounding = 2 * torch.finfo(dtype).eps * weight.abs().max()  # of the dequantized weight itself
    assert (found - nearest).abs().max() <= rounding
    # The values reach from a group's least weight to its largest, but for the rounding of scale and middle.
    assert (values[..., 0] - grouped.amin(-1)).abs().max() <= 8 * rounding
    assert (values[..., 15] - grouped.amax(-1)).abs().max() <= 8 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_goes_to_the_nearest_multiple_of_its_scale(dtype):
    weight = random_weight(96, 100)
    layer = QuantizedLinear.from_weight(weight, "int8", dtype)
    assert layer.weight.dtype == torch.int8 and layer.scales.dtype == dtype
    assert_close(layer.scales.float(), weight.abs().amax(1) / 127, torch.finfo(dtype).eps)
    scales = layer.scales.float()[:, None]
    assert torch.equal(layer.weight.float(), (weight / scales).round().clamp(-127, 127))
    assert_close(layer.dequantized().float(), layer.weight * scales, torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_the_grid_are_kept(kind):
    """Also rows and groups of one value, zero among them, whose scale is zero or has nothing to divide."""
    steps = torch.arange(128).remainder(16).float() - 8 if kind == "int4" else torch.arange(128).float()
    weight = torch.stack((steps / 64, -steps / 4, torch.zeros(128), torch.full((128,), 0.5)))
    assert torch.equal(QuantizedLinear.from_weight(weight, kind, torch.float32).dequantized(), weight)


def symmetric_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Plain round to nearest without a middle: q from -7 to 7, the scale met by the largest weight of a group."""
    grouped = weight.unflatten(1, (-1, group))
    scale = grouped.abs().amax(2, keepdim=True) / 7
    return ((grouped / scale).round().clamp(-7, 7) * scale).flatten(1)


def asymmetric_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Plain round to nearest between least and largest, with scale and offset in float32."""
    grouped = weight.unflatten(1, (-1, group))
    least, largest = grouped.aminmax(dim=2, keepdim=True)
    scale = (largest - least) / 15
    return (((grouped - least) / scale).round() * scale + least).flatten(1)


@pytest.mark.parametrize("width, rows", [(2048, 2048), (2048, 5632), (5632, 2048), (6848, 1280)])
def test_errors_on_full_size_layers(width, rows):
    """Outputs for random inputs: int8 to 1%; int4 as near as plain group rounding with float32 scales."""
    weight = random_weight(rows, width)
    x = torch.randn(16, width, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.T
    eighth, fourth = (QuantizedLinear.from_weight(weight, kind, torch.bfloat16) for kind in KINDS)
    assert relative_error(x @ eighth.dequantized().float().T, exact) <= 0.01
    ours = relative_error(x @ fourth.dequantized().float().T, exact)
    assert ours <= 1.02 * relative_error(x @ asymmetric_int4(weight, fourth.group).T, exact)
    assert ours <= relative_error(x @ symmetric_int4(weight, fourth.group).T, exact)


# ---------------------------------------------------------------------------- packed against plain


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 128, 129, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_exactly_plain(kind, rows):
    """With small whole numbers and scales of powers of two no sum is rounded, so not a bit may differ."""
    skip_without_kernel(kind, torch.float32)
    random = torch.Generator().manual_seed(rows)
    layers = []
    for out in (64, 128):
        if kind == "int8":
            weight, scales = torch.randint(-127, 128, (out, 192), generator=random), torch.full((out,), 0.25)
            layers.append(QuantizedLinear(weight.to(torch.int8), scales))
        else:
            weight = torch.randint(0, 256, (out, 96), generator=random).to(torch.uint8)
            exponents = torch.randint(-3, 3, (3, out), generator=random)
            middle = torch.randint(-8, 8, (3, out), generator=random) / 4
            layers.append(QuantizedLinear(weight, torch.stack((2.0**exponents, middle), dim=-1)))
    x = torch.randint(-8, 9, (rows, 192), generator=random).float()
    packed = PackedQuantizedLinear(*layers)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert torch.equal(packed(x), expected)
    assert torch.equal(packed.multiply(x), expected)  # the kernel also where it is slow, and not used
    assert torch.equal(packed(x[None, :, None])[0, :, 0], packed(x))  # any leading dimensions


@pytest.mark.parametrize(
    "kind, dtype, most",
    [
        ("int8", torch.bfloat16, 12),
        ("int4", torch.bfloat16, 128),
        ("int8", torch.float32, 1),
        ("int4", torch.float32, 1),
    ],
    ids=str,
)
def test_kernels_are_for_few_rows(kind, dtype, most, monkeypatch):
    skip_without_kernel(kind, dtype)
    packed, used = PackedQuantizedLinear(QuantizedLinear.from_weight(random_weight(64, 128), kind, dtype)), []
    for way in ("multiply", "widen_and_multiply"):
        run = getattr(packed, way)
        monkeypatch.setattr(packed, way, lambda rows, run=run, way=way: used.append(way) or run(rows))
    for rows in (1, most, most + 1):
        packed(torch.ones(rows, 128, dtype=dtype))
    assert used == ["multiply", "multiply", "widen_and_multiply" if packed.can_widen() else "multiply"]


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_on_a_full_size_layer(kind, dtype, rows):
    """In float32 to 5e-6; in 16 bits as near to the float32 result of the same integers as plain."""
    skip_without_kernel(kind, dtype)
    layer = QuantizedLinear.from_weight(random_weight(2048, 5632), kind, dtype)
    x = torch.randn(rows, 5632, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = QuantizedLinear(layer.weight, layer.scales.float())
    exact = x.float() @ wide.dequantized().T
    error = relative_error(PackedQuantizedLinear(layer)(x), exact)
    if dtype == torch.float32:
        assert error <= 5e-6  # the kernels add up 5632 products in fewer lanes than a matmul
    else:
        assert error <= 1.2 * relative_error(layer(x), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_widened_is_the_dequantized_weight(kind):
    """Of some outputs, which here belong to two layers."""
    skip_without_kernel(kind, torch.float32)
    layers = [QuantizedLinear.from_weight(random_weight(rows, 256), kind, torch.float32) for rows in (192, 64)]
    expected, packed = torch.cat([layer.dequantized() for layer in layers]), PackedQuantizedLinear(*layers)
    if not packed.can_widen():
        pytest.skip("this CPU's layout of int4 is not known")
    for start, stop in ((0, 256), (0, 64), (64, 256)):
        assert_close(packed.widened(start, stop).T, expected[start:stop], 1e-7)


@pytest.mark.parametrize("outputs, size", [(0, 64), (64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_layer_make_the_whole(kind, outputs, size, monkeypatch):
    """Of 256 outputs: as many at a time, of equal pieces, as a piece has bytes for, but at least 64."""
    skip_without_kernel(kind, torch.float32)
    layer, x = QuantizedLinear.from_weight(random_weight(256, 256), kind, torch.float32), torch.randn(200, 256)
    packed, asked = PackedQuantizedLinear(layer), []
    if not packed.can_widen():
        pytest.skip("this CPU's layout of int4 is not known")
    monkeypatch.setattr(PackedQuantizedLinear, "PIECE", max(1, outputs * 256 * 4))
    widened = packed.widened
    monkeypatch.setattr(packed, "widened", lambda *outputs: asked.append(outputs) or widened(*outputs))
    assert_close(packed.widen_and_multiply(x), layer(x), 1e-6)
    assert asked == [(start, start + size) for start in range(0, 256, size)]


def test_layers_that_no_kernel_can_do_stay_plain():
    for kind, rows, width in (("int8", 64, 40), ("int4", 80, 128), ("int4", 900, 64)):
        assert not PackedQuantizedLinear.suits(
            QuantizedLinear.from_weight(random_weight(rows, width), kind, torch.float32)
        )
    assert not PackedQuantizedLinear.suits(nn.Linear(64, 64))


@needs_shared
@pytest.mark.parametrize("lacking", ["multiply", "can_widen"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_without_kernels_or_their_layout_answers_the_same(kind, lacking, monkeypatch):
    """Two conversations at once, packed with what the machine has, and unpacked."""
    folder = golden("vl-siglip").folder
    batch = Processor(folder)(golden("vl-siglip").conversations[:2])
    ids = generate(load_model(folder, dtype=torch.float32, quantize=kind), batch, max_new_tokens=6)
    assert generate(load_model(folder, dtype=torch.float32, quantize=kind).pack(), batch, max_new_tokens=6) == ids

    def absent(*arguments):
        raise NotImplementedError("no such kernel on this device")

    monkeypatch.setattr(PackedQuantizedLinear, lacking, absent if lacking == "multiply" else lambda self: False)
    kernel_agrees.cache_clear()
    model = load_model(folder, dtype=torch.float32, quantize=kind).pack()
    packed = any(isinstance(module, PackedQuantizedLinear) for module in model.modules())
    assert generate(model, batch, max_new_tokens=6) == ids
    kernel_agrees.cache_clear()
    assert packed == (lacking == "can_widen") or not kernel_agrees(kind, torch.float32, torch.device("cpu"))


def test_layers_of_one_input_are_packed_together_or_not_at_all():
    """Keys too narrow for the kernel: then the queries stay plain, too."""
    config = LanguageConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    attention, x = Attention(config, 0), torch.randn(1, 5, 128)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(attention, name).weight
        setattr(attention, name, QuantizedLinear.from_weight(weight, "int4", torch.float32))
    rope = rope_angles(torch.arange(5)[None], config)
    expected, _ = attention(x, rope, None, None)
    pack_linears(attention)
    assert isinstance(attention.q_proj, QuantizedLinear)
    assert_close(attention(x, rope, None, None)[0], expected, 1e-6)


def test_int8_in_float16_does_not_overflow():
    """Integers times activations exceed 65504 long before weights times activations do."""
    layer = QuantizedLinear.from_weight(torch.full((32, 64), 0.5), "int8", torch.float16)
    x = torch.full((200, 64), 20.0, dtype=torch.float16)
    assert_close(PackedQuantizedLinear(layer)(x).float(), torch.full((200, 32), 640.0), 1e-3)


# ---------------------------------------------------------------------------- which layers


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["deepseek-vl-1.3b-chat", "deepseek-vl-7b-chat", "deepseek-vl2-tiny", "deepseek-vl2-small", "deepseek-vl2"]
)
def test_which_layers_of_the_released_models(name, kind):
    with torch.device("meta"):
        model = DeepseekVL(read_config(SHARED / "checkpoints" / name))
    chosen = set(layers_to_quantize(model, kind))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    eyes = {name for name in linears if name.startswith(("vision.", "aligner."))}
    assert chosen == linears - eyes  # embeddings, norms, router and HeadWeights are no nn.Linear
    left = sum(
        p.numel() for n, p in model.language.named_parameters() if f"language.{n.rpartition('.')[0]}" not in chosen
    )
    embedding = model.language.embed_tokens.weight.numel()
    heads = sum(p.numel() for n, p in model.language.named_parameters() if "kv_b_proj" in n)
    assert left - embedding - heads < 0.01 * embedding * len(model.language.layers)  # norms and routers


# ---------------------------------------------------------------------------- loading, saving, answering


def plainly_rounded(name: str, kind: str) -> DeepseekVL:
    """The golden model with each weight that is to be rounded replaced by its rounded value: nn.Linear throughout."""
    model = load_model(golden(name).folder, dtype=torch.float32)
    for layer in layers_to_quantize(model, kind):
        linear = model.get_submodule(layer)
        linear.weight = nn.Parameter(QuantizedLinear.from_weight(linear.weight, kind, torch.float32).dequantized())
    return model


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_loaded_packed_and_saved_are_the_rounded_model(name, kind, tmp_path):
    case = golden(name)
    batch = Processor(case.folder)(case.conversations[0])
    expected = plainly_rounded(name, kind)(**batch).logits
    ids = generate(plainly_rounded(name, kind), batch, max_new_tokens=8)
    model = load_model(case.folder, dtype=torch.float32, quantize=kind)
    assert_close(model(**batch).logits, expected, 1e-6)
    save_checkpoint(model, case.folder, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert_close(again(**batch).logits, expected, 1e-6)
    assert load_model(tmp_path / "saved", quantize=kind).state_dict().keys() == again.state_dict().keys()
    assert_close(again.pack()(**batch).logits, expected, 1e-5)
    assert generate(again, batch, max_new_tokens=8) == ids
    with pytest.raises(ValueError, match="packed"):
        save_checkpoint(again, case.folder, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]  # nothing half-written


@needs_shared
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_logits_move_little(name):
    """Of tiny random models without experts; a router may choose others, and then all moves."""
    case = golden(name)
    model, processor = golden_model(name)
    batch = processor(case.conversations[0])
    exact = model(**batch).logits
    errors = [relative_error(plainly_rounded(name, kind)(**batch).logits, exact) for kind in KINDS]
    assert errors[0] <= 0.02 and errors[0] < errors[1] <= 0.35, errors


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_rounded_before_the_next_is_read(kind, monkeypatch):
    """A 7B never exists whole in 16 bits: when a weight is rounded, none to be rounded is there as it was."""
    seen = []

    def from_weight(weight, kind, dtype, original=QuantizedLinear.from_weight):
        seen.append(weight.dtype)
        return original(weight, kind, dtype)

    reads = []
    original_read = load_weights.WeightFile.read

    def read(self, name):
        reads.append((name, len(seen)))
        return original_read(self, name)

    monkeypatch.setattr(QuantizedLinear, "from_weight", from_weight)
    monkeypatch.setattr(load_weights.WeightFile, "read", read)
    model = load_model(golden("vl-siglip").folder, dtype=torch.bfloat16, quantize=kind)
    chosen = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(seen) == len(chosen) and set(seen) == {torch.float16}  # rounded from the file's values, not bfloat16's
    layers = [count for name, count in reads if name.startswith("language_model.model.layers.0.self_attn")]
    assert layers == list(range(layers[0], layers[0] + 4))
    assert not any(isinstance(module, nn.Linear) for layer in chosen for module in [model.get_submodule(layer)])


@needs_shared
def test_quantize_must_be_known_and_fit_the_file(tmp_path):
    folder = golden("vl-siglip").folder
    with pytest.raises(ValueError, match="quantize is 'int3', expected one of int8, int4"):
        load_model(folder, quantize="int3")
    save_checkpoint(load_model(folder, quantize="int8"), folder, tmp_path / "eight")
    with pytest.raises(ValueError, match="holds int8 weights, which cannot become int4"):
        load_model(tmp_path / "eight", quantize="int4")
    with pytest.raises(ValueError, match="expected the name of a new folder"):
        save_checkpoint(load_model(folder, quantize="int8"), folder, tmp_path / "eight")


DAMAGE = {
    "no weight": (lambda tensors, w, s: tensors.pop(w), "missing tensor"),
    "no scales": (lambda tensors, w, s: tensors.pop(s), "has shape"),
    "both kinds": (
        lambda tensors, w, s: tensors.update(
            {w: torch.zeros(64, 64, dtype=torch.int8), s: torch.ones(64)}
        ),
        "both int8 and int4",
    ),
    "floating weight": (lambda tensors, w, s: tensors.update({w: tensors[w].float()}), "expected int8 or uint8"),
    "whole scales": (lambda tensors, w, s: tensors.update({s: tensors[s].int()}), "expected one of"),
    "too few scales": (lambda tensors, w, s: tensors.update({s: tensors[s][:, :3].clone()}), "has shape"),
    "too few columns": (lambda tensors, w, s: tensors.update({w: tensors[w][:, :5].clone()}), "has shape"),
    "width of no group": (
        lambda tensors, w, s: tensors.update(
            {name.replace("self_attn.q", "mlp.down"): tensors[name].clone() for name in (w, s)}
        ),
        "fits no group",
    ),
}  # fmt: skip


@needs_shared
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_quantized_files(damage, tmp_path):
    folder = golden("vl-siglip").folder
    save_checkpoint(load_model(folder, quantize="int4"), folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load(file.read_bytes())
    change, words = DAMAGE[damage]
    layer = "language_model.model.layers.1.self_attn.q_proj"
    change(tensors, f"{layer}.weight", f"{layer}.scales")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=words) as error:
        load_model(tmp_path / "model")
    assert ("layers.1" in str(error.value) or damage == "both kinds") and "\n" not in str(error.value)


@needs_shared
def test_shards_and_both_layouts_of_names(small_pair, tmp_path):
    """transformers' names, a tied head, and widths that int4 leaves alone."""
    for tie, kind in itertools.product((False, True), KINDS):
        folder = small_pair("siglip", tie=tie).folder
        model = load_model(folder, quantize=kind)
        quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        assert ("lm_head" in quantized) == (not tie and kind == "int8")  # a width of 48 fits no group
        target = tmp_path / f"{tie}-{kind}"
        save_checkpoint(model, folder, target)
        again = load_model(target)
        ids = torch.arange(1, 9)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)


@needs_shared
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_packed_part_by_part_is_packed(name, kind, tmp_path):
    """The same modules and dtypes, and the same logits to 1e-6."""
    case = golden(name)
    batch = Processor(case.folder)(case.conversations[0])
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_model(case.folder, dtype=dtype, quantize=kind).pack()
        parts = load_model(case.folder, dtype=dtype, quantize=kind, pack=True)
        kinds = [[type(module) for module in model.modules()] for model in (whole, parts)]
        assert kinds[0] == kinds[1]
        assert {parameter.dtype for parameter in parts.parameters()} == {dtype}
        assert_close(parts(**batch).logits.float(), whole(**batch).logits.float(), 1e-6)
        if kind is not None:  # and from what was saved
            saved = tmp_path / str(dtype)
            save_checkpoint(load_model(case.folder, dtype=dtype, quantize=kind), case.folder, saved)
            again = load_model(saved, dtype=dtype, pack=True)
            assert [type(module) for module in again.modules()] == kinds[0]
            assert_close(again(**batch).logits.float(), whole(**batch).logits.float(), 1e-6)


@needs_shared
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["vl-hybrid", "vl2-mla-sigmoid", "tied head"])
def test_packing_while_loading_equals_packing_after_it(name, stored, small_pair, tmp_path):
    """From files of every dtype, rounded or not, to every dtype: the same modules, dtypes and logits, bit by bit."""
    source = small_pair("siglip", tie=True).folder if name == "tied head" else golden(name).folder
    ids = torch.arange(1, 9)[None]
    for kind in (None, *KINDS):
        folder = tmp_path / str(kind)
        save_checkpoint(load_model(source, dtype=stored, quantize=kind), source, folder)
        for dtype in DTYPES:
            after, during = load_model(folder, dtype=dtype).pack(), load_model(folder, dtype=dtype, pack=True)
            assert [type(module) for module in after.modules()] == [type(module) for module in during.modules()]
            assert {parameter.dtype for parameter in during.parameters()} == {dtype}
            logits = during(ids).logits
            assert logits.dtype == dtype and torch.equal(logits, after(ids).logits)


@needs_shared
def test_packing_while_loading_keeps_to_the_device_it_was_told():
    """Whatever torch's default device is."""
    folder, ids = golden("vl-siglip").folder, torch.arange(1, 9)[None]
    expected = load_model(folder, dtype=torch.bfloat16).pack()(ids).logits
    with torch.device("meta"):
        model = load_model(folder, dtype=torch.bfloat16, device="cpu", pack=True)
    assert torch.equal(model(ids).logits, expected)
