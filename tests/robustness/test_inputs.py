"""What users bring: pictures and conversations in the shapes that other tools take."""

import base64
import http.server
import io
import os
import struct
import threading
import urllib.parse
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden, golden_model
from PIL import Image

from processor import Processor, load_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def png(image: Image.Image = PICTURE) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["bytes", "memory", "file object", "file at its end", "pipe", "array", "grey array", "file address", "home",
     "path in bytes", "data address", "data in lines", "escaped data", "data without padding"],
)  # fmt: skip
def test_pictures_of_every_kind(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(png())
    at_its_end, pipe, code = io.BytesIO(png()), io.BytesIO(png()), base64.b64encode(png()).decode()
    at_its_end.seek(0, io.SEEK_END)  # as after Image.save
    source = {
        "bytes": png(),
        "memory": memoryview(png()),
        "file object": io.BytesIO(png()),
        "file at its end": at_its_end,
        "pipe": SimpleNamespace(read=lambda size: pipe.read(min(size, 7))),
        "array": np.asarray(PICTURE),
        "grey array": np.asarray(PICTURE.convert("L")),
        "data address": "data:image/png;base64," + code,
        "data in lines": "data:image/png;base64,\n" + base64.encodebytes(png()).decode(),
        "escaped data": "DATA:image/png;charset=x;BASE64," + urllib.parse.quote(code, safe=""),
        "data without padding": "data:;base64," + code.rstrip("="),
        "file address": (tmp_path / "a b.png").as_uri(),
        "home": "~/a b.png",
        "path in bytes": next(os.scandir(os.fsencode(tmp_path))),
    }[kind]
    expected = PICTURE.convert("L").convert("RGB") if kind == "grey array" else PICTURE
    assert np.array_equal(load_image(source), expected)


@pytest.mark.parametrize(
    "source",
    [
        "data:image/png;base64," + "!" * 10**6,
        "data:image/png," + "a" * 10**6,
        "x" * 10**6,
        "ftp://" + "x" * 10**6,
        "http://localhost:1/" + "x" * 10**6,
        io.StringIO("x" * 10**6),
        SimpleNamespace(read=lambda size: 1 / 0),
        np.zeros((3, 4, 5, 6), dtype=np.uint8),
        np.zeros((3, 4)),
        b"no picture" * 10**5,
        5,
    ],
    ids="payload,no base64,path,address,no host,text file,broken file,dimensions,dtype,bytes,number".split(","),
)
def test_errors_do_not_repeat_their_input(source):
    with pytest.raises((ValueError, OSError)) as caught:
        load_image(source)
    assert 0 < len(str(caught.value)) < 400


def written_png(bits: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "file, other",
    [
        (written_png(2, 0, bytes([0b01100000]), struct.pack(">H", 1)), 170),
        (written_png(4, 0, bytes([0x5A]), struct.pack(">H", 5)), 170),
        (written_png(16, 2, struct.pack(">6H", *[0x1234] * 3, *[0xAAAA] * 3), struct.pack(">3H", *[0x1234] * 3)), 170),
    ],
    ids=["2 bits", "4 bits", "16 bits RGB"],
)
def test_transparency_is_in_the_file_s_own_scale(file, other):
    """The first of two pixels is the transparent one, and becomes white."""
    assert np.asarray(load_image(file))[0, :, 0].tolist() == [255, other]


def test_parts_of_other_tools():
    tested = golden_model("vl-siglip")[1]
    expected = tested([{"role": "user", "content": "<image>What?", "images": [PICTURE]}])
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    for part in (
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": address},
        {"type": "image", "base64": base64.b64encode(png()).decode()},
        {"type": "image", "base64": address},
    ):
        batch = tested([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mla"])
def test_markers(name):
    """A checkpoint's own marker counts first; without any, the pictures come first."""
    tested = Processor(golden(name).folder)
    own, other = ("<image>", "<image_placeholder>") if tested.is_vl2 else ("<image_placeholder>", "<image>")

    def prompt(content: str, images: int) -> str:
        return tested.prompt([{"role": "user", "content": content, "images": [PICTURE] * images}])

    assert f"{own}Is {other} a tag?" in prompt(f"{own}Is {other} a tag?", 1)
    assert f"{own}What?" in prompt(f"{other}What?", 1)
    assert prompt("What?", 2).count(own) == 2
    turns = [{"role": "user", "content": f"{own}A?", "images": [PICTURE]}, {"role": "assistant", "content": "a"}]
    for first, second, then in (("A?", "B?", f"{own}"), (f"{other}A?", "B?", f"{own}"), (f"{own}A?", f"{other}B?", "")):
        turns[0]["content"] = first
        talk = [*turns, {"role": "user", "content": second, "images": [PICTURE] * bool(then)}]
        told = tested.prompt(talk)
        assert told.count(own) == 1 + bool(then) and told.index(own) < told.index("A?")
        assert f"User: {then}" in told.replace("<|User|>", "User").replace(f"{own}\n", own) and "B?" in told
    with pytest.raises(ValueError, match="the text has 1 image marker, but 2 images are given"):
        prompt(f"{other}What?", 2)


def test_conversations_of_other_shapes():
    tested = golden_model("vl-siglip")[1]
    message = {"role": "user", "content": "Hello"}
    expected = tested([message])["input_ids"]
    for same in (message, (message,), iter([message]), [[message]]):
        assert torch.equal(tested(same)["input_ids"], expected)
    images = [5, iter([PICTURE]), np.asarray(PICTURE), torch.zeros(3, 4, 4), PICTURE, png(), "a.png", False]
    for wrong in (5, None, "Hello", b"Hello", [], [5], [message | {"role": "x" * 10**6}], [message | {"content": 5}],
                  *([message | {"images": value}] for value in images)):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            tested(wrong)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="system is a int, expected a text"):
        tested([message], system=5)


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image.new("RGB", (4000, 1)), "an image of 4000 x 1 pixels is too thin"),
        (Image.new("1", (70_000, 1)), "image: 70000 x 1 pixels, over the limit"),
        ("nowhere.png", "nowhere.png: no such image file"),
        (png()[:60], "image bytes: damaged image data"),
        (None, "an image must be a path"),
    ],
    ids=["thin", "large", "missing", "damaged", "none"],
)
def test_a_batch_names_the_conversation_and_picture_at_fault(picture, message):
    tested = Processor(golden("vl2-mla").folder)
    good = [{"role": "user", "content": "<image>a", "images": [PICTURE]}]
    bad = [{"role": "user", "content": "<image><image>a", "images": [PICTURE, picture]}]
    with pytest.raises(ValueError, match=f"conversation 2 of 2: image 2 of 2: {message}"):
        tested([good, bad])


@pytest.mark.parametrize("path", ["/a b.png", "/ä/图.png?q=ü x", "/a%20b.png"])
def test_addresses_with_any_character(path):
    """Spaces and characters outside ASCII are escaped; what is escaped already stays."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(urllib.parse.unquote(self.path))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request).start()
        assert np.array_equal(load_image(f"http://127.0.0.1:{server.server_port}{path}"), PICTURE)
    assert asked == [urllib.parse.unquote(path)]


def test_a_registered_opener_is_used(tmp_path, monkeypatch):
    """HEIC files of phones, where a package such as pillow-heif has registered its opener."""
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    opened = Image.OPEN["PNG"][0]
    Image.register_open("HEIF", lambda file, name: opened(io.BytesIO(png()), name), lambda start: start[4:8] == b"ftyp")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    assert np.array_equal(load_image(tmp_path / "a.heic"), PICTURE)


def test_a_phone_s_200_megapixels(tmp_path):
    Image.new("1", (16_320, 12_240)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png").size == (16_320, 12_240)
