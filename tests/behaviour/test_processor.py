"""Images, prompts and batches against the golden files, transformers run live, and a local web server."""

import io
import json
import pickle
import random
import re
import socket
import socketserver
import struct
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from checkpoints import ABSENT, check_refused, edit_json
from conftest import GOLDENS, copy_checkpoint, golden, golden_model
from PIL import Image, ImageOps

import processor
from processor import Processor, load_image

SMALL = golden("vl-siglip").folder
CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
END = "<｜end▁of▁sentence｜>"


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that resizing has something to get wrong."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    small = small.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def user(content, *images, role: str = "user") -> dict:
    return {"role": role, "content": content} | ({"images": list(images)} if images else {})


def assistant(content, *images) -> dict:
    return user(content, *images, role="assistant")


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def edited(name: str, folder, file: str, **changes):
    """A golden checkpoint's copy in which a JSON file has other entries."""
    edit_json(copy_checkpoint(name, folder) / file, changes)
    return folder


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_cases_alone_and_in_a_batch(name):
    """Prompts, labels, and pixels bit for bit; ids are compared in tests/parity/test_architecture.py.

    Each row of the batch equals that conversation alone, in a processor that was sent to another process, too.
    """
    data, tested = golden(name), Processor(golden(name).folder)
    batch, tested = tested(data.conversations, labels=True), pickle.loads(pickle.dumps(tested))
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert torch.equal(batch["images_seq_mask"], batch["input_ids"] == tested.image_token_id)
    rows = [tested(conversation, labels=True) for conversation in data.conversations]
    for number, (conversation, alone) in enumerate(zip(data.conversations, rows)):
        assert tested.prompt(conversation) == data.prompts[number]
        assert ("pixel_values" in alone) == any(message.get("images") for message in conversation)
        for key in (f"{number}.pixel_values", f"{number}.images"):
            assert key not in data.tensors or torch.equal(alone["pixel_values"], data.tensors[key])
        if tested.is_vl2:
            assert torch.equal(alone["labels"][0], data.tensors[f"{number}.labels"])
        padding = batch["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for key in ("input_ids", "attention_mask", "images_seq_mask"):
            assert torch.equal(batch[key][number, padding:], alone[key][0])
        assert torch.equal(batch["labels"][number, padding + 1 :], alone["labels"][0, 1:])
        assert batch["attention_mask"][number, :padding].sum() == 0
        assert (batch["labels"][number, : padding + 1 if padding else 0] == -100).all()
    assert batch.keys() == set().union(*rows)
    for key in {"pixel_values", "images_spatial_crop"} & batch.keys():
        assert torch.equal(batch[key], torch.cat([alone[key] for alone in rows if key in alone]))


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha"])
def test_roles_markers_and_shapes_that_mean_the_same(name, tmp_path):
    tested, what, file = Processor(golden(name).folder), "What is this?", tmp_path / "a.png"
    image = random_image(60, 40)
    image.save(file)
    expected = tested([user(f"{tested.image_token}{what}", image, role="User")])
    for conversation in (
        [user(f"<image>{what}", image)],
        [user(f" <image_placeholder>{what}\n", image, role="<|User|>")],
        [user(f"<image>{what}", image), assistant("") | {"role": "Assistant"}],
        [user([{"type": "image", "image": image}, text(f"{what} ")])],
        [user([{"type": "image", "path": str(file)}, text(what)])],
        [user([{"type": "image", "url": file.as_uri()}, text(what)])],
    ):
        batch = tested(conversation)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)


def test_spaces_between_parts():
    """As the converted checkpoints' chat template has them."""
    tested, image, mark = golden_model("vl-siglip")[1], {"type": "image", "image": SERVED}, "<image_placeholder>"
    for parts, expected in (
        ([text(" a"), text("b\n")], "a b"),
        ([text("\na "), text(" b"), image, text(" c "), image, text("\nd ")], f"a   b{mark} c {mark}\nd"),
        ([image, image, text(" a")], f"{mark}{mark} a"),
        ([text("a\n"), image], f"a\n{mark}"),
    ):
        assert tested.prompt([user(parts)], system="") == f"User: {expected}\n\nAssistant:"
    answered = [user([text("a")]), assistant([text("b "), text("c ")]), user([text("d")])]
    assert tested.prompt(answered, system="") == f"User: a\n\nAssistant: b  c{END}User: d\n\nAssistant:"


def test_system_texts():
    vl, vl2 = Processor(SMALL), Processor(golden("vl2-mha").folder)
    hello, system = user("Hello"), {"role": "system", "content": " Be brief. "}
    brief = "Be brief.\n\nUser: Hello\n\nAssistant:"
    assert vl.prompt([system, hello]) == vl.prompt([hello], system="Be brief.") == brief
    assert vl.prompt([hello], system="") == "User: Hello\n\nAssistant:"
    assert vl.prompt([hello]).startswith(processor.SYSTEM_TEXT + "\n\nUser: Hello")
    assert vl2.prompt([system, hello]) == "Be brief.<|User|>: Hello\n\n<|Assistant|>:"
    encode = vl2.tokenizer.encode  # a piece at a time
    ids = [vl2.bos_token_id, *encode("Be brief."), *encode("<|User|>: Hello\n\n<|Assistant|>:")]
    assert vl2([system, hello])["input_ids"][0].tolist() == ids
    for wrong, given in (([hello, system], None), ([system, system, hello], None), ([system, hello], "Other.")):
        with pytest.raises(ValueError, match="system"):
            vl.prompt(wrong, system=given)


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha", "vl2-mla"])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_labels(name, mask_prompt, tmp_path):
    """With mask_prompt only the answers and their end tokens are learnt: decoding the labels gives them back."""
    tested = Processor(edited(name, tmp_path / name, PROCESSOR, mask_prompt=mask_prompt))
    conversation = [user("What is this?"), assistant(' "A red circle." ')]
    conversation += [user("<image>\nAnd this? ü", random_image(50, 50)), assistant("über\n12 dogs")]
    batch = tested([conversation, conversation[:1]], labels=True)
    ids, labels, space = batch["input_ids"][0], batch["labels"][0], "" if tested.is_vl2 else " "
    learnt = labels != -100
    assert torch.equal(labels[learnt], ids[learnt]) and ids[-1] == tested.eos_token_id
    assert torch.equal(tested(conversation)["input_ids"][0], ids)  # asking for labels changes no id
    if not mask_prompt:
        assert torch.equal(~learnt, batch["images_seq_mask"][0])
        padding = (batch["attention_mask"][1] == 0).sum()
        assert (batch["labels"][1, : padding + 1] == -100).all() and (batch["labels"][1, padding + 1 :] >= 0).all()
        return
    answers = f'{space}"A red circle."{END}{space}über\n12 dogs{END}'
    assert tested.decode(labels[learnt], skip_special_tokens=False) == answers
    assert (batch["labels"][1] == -100).all()
    # No token crosses from a prompt into an answer, whatever the answer starts with.
    rng = random.Random(0)
    starts = ['"', "1", " 1", "图", "ü", "-", "\n", "a", "😀", ".", "<|ref|>", "\u3000", "é", "'s", "٣"]
    for _ in range(150):
        question, answer = ("".join(rng.choices(starts, k=4)).strip() or "a" for _ in range(2))
        labels = tested([user(question), assistant(answer), user(question)], labels=True)["labels"][0]
        assert labels[labels != -100].tolist() == tested.tokenizer.encode(space + answer + END)


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha"])
def test_markers_and_images_must_agree(name):
    tested, image = Processor(golden(name).folder), random_image(9, 9)
    for markers, images in ((1, 0), (2, 1), (1, 3)):  # no marker at all is fine: the images come first
        with pytest.raises(ValueError, match=f"{markers} image markers?, but {images} images? "):
            tested([user("<image>" * markers + "What?", *[image] * images)])
    # Counted over the conversation: the images may all stand with its first message.
    assert tested([user("<image>a", image, image), assistant("b"), user("<image>b")])["images_seq_mask"].any()
    # A special token written in a text is special, as in the originals; it marks no place for an image.
    batch = tested([user(f"a{END}b")])
    assert (batch["input_ids"] == tested.eos_token_id).sum() == 1 and not batch["images_seq_mask"].any()


def test_a_bad_conversation_is_one_clear_line():
    for conversation in (
        [], [[]], ["hello"], [user("\udcff")], [{"role": "user"}], [user(3)], [user("<image>", 3)],
        [user("a", role="system")], [user("a", role="tool")], [user("a") | {"image": ["a.png"]}],
        [user("<image>") | {"images": "a.png"}], [user([text("a")], "a.png")], [user([{"type": "text"}])],
        [user([{"type": "video", "path": "a.mp4"}])], [user([{"type": "image"}])],
        [user([{"type": "image", "path": str(SMALL / "images/1.png"), "url": "data:,"}])],
        [user("<image>", "nowhere.png")], [user("a"), assistant("<image>", random_image(9, 9))],
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            golden_model("vl2-mha")[1](conversation)
        assert str(error.value) and "\n" not in str(error.value), conversation


def test_a_prompt_beyond_the_context(tmp_path):
    n, key = Processor(SMALL)([user("Hello")])["input_ids"].shape[1], "language_config.max_position_embeddings"
    fits, short = (edited("vl-siglip", tmp_path / f"{limit}", CONFIG, **{key: limit}) for limit in (n, n - 1))
    assert Processor(fits)([user("Hello")])["input_ids"].shape[1] == n
    with pytest.raises(ValueError, match=f"{n} tokens.*{n - 1}"):
        Processor(short)([user("Hello")])


def test_tiles_at_full_size(tmp_path):
    """The token count of the paper's layout, and tiles that put together are the padded picture."""
    candidates = [[384, 384], [384, 768], [768, 384], [768, 768], [1152, 384]]
    tested = Processor(edited("vl2-mha", tmp_path / "model", PROCESSOR, candidate_resolutions=candidates))
    tilings = {(300, 300): (1, 1), (700, 300): (2, 1), (320, 700): (1, 2), (900, 800): (2, 2)}
    for size, (wide, high) in tilings.items():
        image = random_image(*size)
        batch = tested([user("<image>", image)])
        assert batch["images_spatial_crop"].tolist() == [[wide, high]]
        assert batch["images_seq_mask"].sum() == 210 + 1 + (14 * high) * (14 * wide + 1)
        whole, *tiles = batch["pixel_values"]
        rows = [torch.cat(tiles[row * wide : (row + 1) * wide], dim=2) for row in range(high)]
        padded = ImageOps.pad(image, (wide * 384, high * 384), Image.Resampling.BICUBIC, (127, 127, 127))
        expected = torch.tensor(np.asarray(padded)).permute(2, 0, 1) / 255
        torch.testing.assert_close(torch.cat(rows, dim=1), (expected - 0.5) / 0.5)
        assert whole.shape == (3, 384, 384)
    three = [user("<image>" * 3, *[random_image(700, 300)] * 3)]
    assert tested(three)["images_spatial_crop"].tolist() == [[1, 1]] * 3


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
HIGH = {"high_res_image_mean": list(processor.CLIP_MEAN), "high_res_image_std": list(processor.CLIP_STD)}
TRANSFORMERS = [  # name, settings, and whether they have a file of their own, as in transformers 4
    ("DeepseekVL", HALF, False),
    ("DeepseekVL", {"size": {"height": 200, "width": 200}, "min_size": 20, "resample": 2}, True),
    ("DeepseekVLHybrid", HALF | HIGH | {"resample": 2}, True),
    ("DeepseekVLHybrid", {"high_res_size": {"height": 300, "width": 300}, "do_normalize": False}, False),
]


@pytest.mark.parametrize("name, settings, own_file", TRANSFORMERS, ids=["1.3B", "1.3B changed", "7B", "7B changed"])
def test_pixels_equal_transformers(name, settings, own_file, tmp_path):
    """Of files as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    kind = "deepseek_vl_hybrid" if name == "DeepseekVLHybrid" else "deepseek_vl"
    module = pytest.importorskip(f"transformers.models.{kind}.image_processing_pil_{kind}")
    library = getattr(module, f"{name}ImageProcessorPil")(**settings)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(SMALL / "tokenizer.json"), bos_token="<｜begin▁of▁sentence｜>", eos_token=END, pad_token=END,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )  # fmt: skip
    getattr(transformers, f"{name}Processor")(library, tokenizer, num_image_tokens=576).save_pretrained(tmp_path)
    if own_file:
        content = json.loads((tmp_path / PROCESSOR).read_text())
        (tmp_path / PREPROCESSOR).write_text(json.dumps(content.pop("image_processor")))
        (tmp_path / PROCESSOR).write_text(json.dumps(content))
    config = {"model_type": kind, "image_token_id": 402, "text_config": {"max_position_embeddings": 16384}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    ours = Processor(tmp_path)
    for size in ((384, 384), (1, 1), (1, 300), (2000, 3), (500, 333), (37, 1100), (385, 383)):
        image = random_image(*size, seed=sum(size))
        expected = library(image, return_tensors="pt")
        inputs, n_tokens = ours.image_inputs(image)
        assert inputs.keys() == expected.keys() and n_tokens == 576
        for key, pixels in inputs.items():
            torch.testing.assert_close(pixels, expected[key], rtol=0, atol=1e-6)


def through_file(image: Image.Image, file, **options) -> np.ndarray:
    image.save(file, **options)
    return np.asarray(load_image(file))


def test_what_pillow_converts_is_read_as_pillow_reads_it(tmp_path):
    image = random_image(31, 17)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"):
        assert load_image(image.convert(mode)).tobytes() == image.convert(mode).convert("RGB").tobytes()
    for name in ("a.png", "a.bmp", "a.ppm", "a.tiff", "a.jpg"):
        image.save(tmp_path / name)
        read = load_image(str(tmp_path / name))
        assert read.mode == "RGB" and read.tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()
    red, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime"))
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):  # the first frame of an animation
        options = {"lossless": True} if name == "a.webp" else {}
        shown = through_file(red, tmp_path / name, save_all=True, append_images=others, **options)
        assert shown[0, 0].tolist() == [255, 0, 0]


def test_transparency_is_shown_on_white(tmp_path):
    grey, alpha = random_image(16, 16, "L"), Image.linear_gradient("L").resize((16, 16))
    opacity = np.asarray(alpha, dtype=float)[..., None] / 255
    expected = np.asarray(grey.convert("RGB"), dtype=float) * opacity + 255 * (1 - opacity)
    for mode, most in {"LA": 0.51, "RGBA": 0.51, "PA": 0.51, "La": 2, "RGBa": 2}.items():  # La, RGBa: rounded before
        image = grey.convert("P" if mode == "PA" else mode.upper()[:-1])
        image.putalpha(alpha)
        assert np.abs(np.asarray(load_image(image.convert(mode)), dtype=float) - expected).max() <= most, mode

    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.putdata([0, 1, 2, 3])
    grey = Image.fromarray(np.array([[0, 7, 9]], dtype=np.uint8))
    red, green, blue, dark, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 255, 255]
    for image, name, transparency, expected in (
        (palette, "a.png", 1, [red, white, blue, dark]),
        (palette, "a.png", bytes([255, 0, 128, 0]), [red, white, [127, 127, 255], white]),
        (palette, "a.gif", 2, [red, green, white, dark]),
        (palette.convert("RGB"), "a.png", (0, 255, 0), [red, white, blue, dark]),
        (grey, "a.png", 7, [[0, 0, 0], white, dark]),
    ):
        assert through_file(image, tmp_path / name, transparency=transparency)[0].tolist() == expected


def test_deep_grey_is_scaled_not_clipped_and_lab_is_converted(tmp_path):
    deep, shown = [0, 257, 32768, 65535], [0, 1, 128, 255]
    for mode, kind, values, expected in (
        ("I;16", "<u2", deep, shown), ("I;16B", ">u2", deep, shown), ("I", "i4", deep, shown), ("F", "f4", deep, shown),
        ("F", "f4", [0, 1, 128, 255], shown), ("F", "f4", [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ("I", "i4", [-100, 0, 100, 300], [0, 64, 128, 255]), ("F", "f4", [-1, 0, 1, 3], [0, 64, 128, 255]),
        ("F", "f4", [np.nan, 0, 0.5, 1], [0, 0, 128, 255]), ("F", "f4", [-5, -5, -5, -5], [0, 0, 0, 0]),
    ):  # fmt: skip
        read = load_image(Image.frombytes(mode, (4, 1), np.array(values, dtype=kind).tobytes()))
        assert np.asarray(read)[0].tolist() == [[value] * 3 for value in expected], (mode, values)
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        assert np.abs(through_file(Image.fromarray(values), tmp_path / name)[..., 0] - values / 257).max() <= 0.51
    ImageCms = pytest.importorskip("PIL.ImageCms")
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 40, 90)), *profiles, outputMode="LAB")
    assert np.abs(through_file(lab, tmp_path / "lab.tiff").astype(int) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_exif_orientation(name, tmp_path):
    """A picture is turned as a viewer turns it; 0, 9 and a damaged EXIF block turn nothing."""
    exif = Image.Exif()
    for orientation in range(10):
        exif[0x0112] = orientation
        read = through_file(random_image(48, 32), tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as stored:
            assert np.array_equal(read, ImageOps.exif_transpose(stored).convert("RGB"))
        assert read.shape == ((48, 32, 3) if orientation in (5, 6, 7, 8) else (32, 48, 3))
    damaged = {"exif": b"Exif\x00\x00not a TIFF header"}
    assert through_file(random_image(20, 10), tmp_path / "damaged.png", **damaged).shape == (10, 20, 3)


SERVED, PNG, BMP = random_image(40, 30, seed=5), io.BytesIO(), io.BytesIO()
SERVED.save(PNG, "PNG")
SERVED.save(BMP, "BMP")
PNG, BMP = PNG.getvalue(), BMP.getvalue()


@pytest.mark.parametrize("pillow_limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_bomb_is_refused_from_its_header(pillow_limit, tmp_path, monkeypatch, recwarn):
    """As over the limit: were it decoded, its data would be damaged."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    for size in ((100_000, 100_000), (16_001, 16_000), (70_000, 10), (1, 2**31 - 1)):
        (tmp_path / "bomb.bmp").write_bytes(BMP[:18] + struct.pack("<ii", *size) + BMP[26:])
        with pytest.raises(ValueError, match=r"bomb\.bmp.*(limit|exceeds)"):
            load_image(tmp_path / "bomb.bmp")
    assert Image.MAX_IMAGE_PIXELS == pillow_limit
    assert not [warning for warning in recwarn if "Bomb" in warning.category.__name__]


def refusal(source) -> str:
    """The one line that says why an image is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_image(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_not_an_image_is_refused(tmp_path, monkeypatch):
    (tmp_path / "header.png").write_bytes(PNG[:20])
    (tmp_path / "empty.png").touch()
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    monkeypatch.setattr(processor, "MAX_IMAGE_PIXELS", 99)
    for source, message in (
        (tmp_path / "header.png", "header.png"), (tmp_path / "empty.png", "empty.png: not an image in one of"),
        (tmp_path / "script.eps", "script.eps: not an image in one of"), (b"bytes", "image bytes: not an image"),
        (tmp_path / "missing.png", "missing.png: no such image file"), ("", "no such image file"),
        (tmp_path, "not a file"), ("file:///etc/hostname", "not an image in one of"), (5, "must be a path"),
        ("ftp://example.org/a.png", "only http, https, data and file"), (Image.new("RGB", (0, 5)), "0 x 5"),
        (random_image(10, 10), "10 x 10 pixels, over the limit"),
    ):  # fmt: skip
        assert message in refusal(source)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "jp2"])
def test_damaged_files_raise_nothing_else(kind, tmp_path):
    file, rng = tmp_path / f"a.{kind}", random.Random(0)
    random_image(64, 64).save(file)
    whole = file.read_bytes()
    for part in (0.2, 0.5, 0.9) if kind not in ("ppm", "jp2") else ():
        file.write_bytes(whole[: int(len(whole) * part)])
        assert file.name in refusal(file)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            assert load_image(file).mode == "RGB"
        except ValueError as error:
            assert file.name in str(error)


OK, SIZE, SLOW = b"HTTP/1.0 200 OK\r\n", b"Content-Length: %d\r\n\r\n", "within 0.05 seconds|[Tt]ime"
SENT = {  # path: what the server sends (on /slow paths bytes follow until the test ends), and words of the error
    "/ok.png": (OK + SIZE % len(PNG) + PNG, None),
    "/no-length.png": (OK + b"\r\n" + PNG, None),
    "/to//ok.png": (b"", None),
    "/missing": (b"HTTP/1.0 404 Not Found\r\n\r\n", "404: Not Found"),
    "/cut.png": (OK + SIZE % len(PNG) + PNG[: len(PNG) // 2], "damaged|cannot be opened"),
    "/page": (OK + b"\r\n<html></html>", "not an image"),
    "/large": (OK + SIZE % 10**9 + b"x", "more than the limit"),
    "/large-unsaid": (OK + b"\r\n" + bytes(2**22), "more than the limit"),
    "/slow-body": (OK + SIZE % 10**6, SLOW),  # whichever of the limits is met first
    "/slow-headers": (OK + b"X: ", SLOW),
    "/to/file:///etc/hostname": (b"", "not allowed"),
    "/to/ftp://127.0.0.1/a.png": (b"", "redirected to ftp"),
    "/to//to//missing": (b"", "Not Found"),
}


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        path = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        answer = b"HTTP/1.0 302 Found\r\nLocation: %s\r\n\r\n" % path.removeprefix("/to/").encode()
        answer = answer if path.startswith("/to/") else SENT[path][0]
        with suppress(OSError):  # the client hangs up, as it should
            self.wfile.write(answer)
            for _ in range(3000 * path.startswith("/slow")):  # a client that never gives up fails, and does not hang
                if self.server.stopped.wait(0.01):
                    break
                self.wfile.write(b"x")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads, running.block_on_close, running.stopped = True, False, threading.Event()
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.stopped.set()
        running.shutdown()


def test_images_by_address(server, monkeypatch):
    monkeypatch.setattr(processor, "MAX_DOWNLOAD_BYTES", 2**20)
    for path, (_, words) in SENT.items():
        if words is None:
            assert load_image(server + path).tobytes() == SERVED.tobytes()
            continue
        with monkeypatch.context() as patch:
            patch.setattr(processor, "DOWNLOAD_SECONDS", 0.05 if words is SLOW else 30)
            said = refusal(server + path)
        assert said.startswith(server + path) and re.search(words, said)
    with socket.create_server(("127.0.0.1", 0)) as closed:  # before it is asked
        unused = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    for url in (unused, "http://", "http://[", "http://a b/", "http://127.0.0.1:notaport/"):
        assert refusal(url).startswith(f"{url}: ")


def test_settings_that_are_bad_or_absent(tmp_path):
    """Values that are out of range or of another type: tests/robustness/test_settings.py."""
    names = "tokenizer_config.json"
    for number, (name, file, key, value, words) in enumerate((
        ("vl-siglip", CONFIG, "model_type", "llava", "model_type is 'llava'"),
        ("vl-siglip", CONFIG, "image_token_id", 7, "image_token_id is 7"),
        ("vl-siglip", PREPROCESSOR, "image_size", ABSENT, "image_size"),
        ("vl-hybrid", PREPROCESSOR, "do_normalize", True, "do_normalize is True, expected False"),
        ("vl-siglip", names, "eos_token", ABSENT, names), ("vl-siglip", names, "bos_token", "<s>", names),
        ("vl2-mha", PROCESSOR, "patch_size", ABSENT, "patch_size"),
    )):  # fmt: skip
        check_refused(edited(name, tmp_path / str(number), file, **{key: value}), words, read=Processor)
    # The 7B's model normalizes, for each of its towers: a file that does not say so means the same.
    silent = Processor(edited("vl-hybrid", tmp_path / "silent", PREPROCESSOR, do_normalize=ABSENT))
    talk = [user("<image>", random_image(90, 60))]
    pixels, expected = (tested(talk)["pixel_values"] for tested in (silent, golden_model("vl-hybrid")[1]))
    assert torch.equal(pixels, expected) and pixels.min() >= 0 and pixels.max() <= 1
    folder = copy_checkpoint("vl-siglip", tmp_path / "none")
    for file in (PREPROCESSOR, PROCESSOR):
        (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected a {PREPROCESSOR} or {PROCESSOR}"):
        Processor(folder)
