"""What users bring: pictures and conversations in the shapes that other tools take."""

import base64
import io
import os
import threading
import urllib.parse
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden, golden_model
from PIL import Image

from processor import Processor, load_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
FILE = io.BytesIO()
PICTURE.save(FILE, "PNG")  # and stands at the file's end
PNG = FILE.getvalue()
CODE = base64.b64encode(PNG).decode()
ADDRESS = f"data:image/png;base64,{CODE}"


def user(content, *images) -> dict:
    return {"role": "user", "content": content, "images": list(images)}


def test_pictures_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(PNG)
    pipe, in_lines = io.BytesIO(PNG), base64.encodebytes(PNG).decode()
    sources = [
        PNG, memoryview(PNG), io.BytesIO(PNG), FILE, SimpleNamespace(read=lambda size: pipe.read(min(size, 7))),
        np.asarray(PICTURE), (tmp_path / "a b.png").as_uri(), "~/a b.png", next(os.scandir(os.fsencode(tmp_path))),
        ADDRESS, "data:;base64," + CODE.rstrip("="), "data:image/png;base64,\n" + in_lines,
        "DATA:image/png;charset=x;BASE64," + urllib.parse.quote(CODE, safe=""),
    ]  # fmt: skip
    for source in sources:
        assert np.array_equal(load_image(source), PICTURE), str(source)[:40]
    assert np.array_equal(load_image(np.asarray(PICTURE.convert("L"))), PICTURE.convert("L").convert("RGB"))


def test_errors_do_not_repeat_their_input():
    long = "x" * 10**6
    sources = [
        "data:image/png;base64," + "!" * 10**6, "data:image/png," + long, long, "ftp://" + long,
        "http://localhost:1/" + long, io.StringIO(long), SimpleNamespace(read=lambda size: 1 / 0),
        np.zeros((3, 4, 5, 6), dtype=np.uint8), np.zeros((3, 4)), b"no picture" * 10**5, 5,
    ]  # fmt: skip
    for source in sources:
        with pytest.raises((ValueError, OSError)) as caught:
            load_image(source)
        assert 0 < len(str(caught.value)) < 400


# PNG files that Pillow would not write, behind their first 8 bytes.
TRANSPARENT = {
    "2 bits": "AAAADUlIRFIAAAACAAAAAQIAAAAAm/k49wAAAAJ0Uk5TAAEBlP2uAAAACklEQVR4nGNIAAAAYgBhsZh58gAAAABJRU5ErkJggg==",
    "4 bits": "AAAADUlIRFIAAAACAAAAAQQAAAAAFLnNVwAAAAJ0Uk5TAAUG+Tm3AAAACklEQVR4nGOIAgAAXABb2LRWWgAAAABJRU5ErkJggg==",
    "16 bits": "AAAADUlIRFIAAAACAAAAARACAAAAK9A0ngAAAAZ0Uk5TEjQSNBI09CvseQAAAA9JREFUeJxjEDIBwVVgAAAVlwTP0QoWHgAAAABJRU5"
    "ErkJggg==",
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_in_the_file_s_own_scale(kind):
    """The first of two pixels is the transparent one, and becomes white."""
    picture = load_image(b"\x89PNG\r\n\x1a\n" + base64.b64decode(TRANSPARENT[kind]))
    assert np.asarray(picture)[0, :, 0].tolist() == [255, 170]


def test_parts_of_other_tools():
    tested = golden_model("vl-siglip")[1]
    expected = tested([user("<image>What?", PICTURE)])
    parts = [{"type": "image_url", "image_url": {"url": ADDRESS}}, {"type": "image_url", "image_url": ADDRESS}]
    parts += [{"type": "image", "base64": CODE}, {"type": "image", "base64": ADDRESS}]
    for part in parts:
        batch = tested([user([part, {"type": "text", "text": "What?"}])])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mla"])
def test_markers(name):
    """A checkpoint's own marker counts first; without any, the pictures come first."""
    tested = Processor(golden(name).folder)
    own, other = ("<image>", "<image_placeholder>") if tested.is_vl2 else ("<image_placeholder>", "<image>")

    def prompt(*messages: dict) -> str:
        return tested.prompt(messages).replace(f"{own}\n", own).replace("<|User|>", "User")

    assert f"{own}Is {other} a tag?" in prompt(user(f"{own}Is {other} a tag?", PICTURE))
    assert f"{own}What?" in prompt(user(f"{other}What?", PICTURE))
    assert prompt(user("What?", PICTURE, PICTURE)).count(own) == 2
    answer = {"role": "assistant", "content": "a"}
    for first, second, then in (
        ("A?", "B?", own),
        (f"{other}A?", "B?", own),
        (f"{own}A?", f"{other}B?", ""),
        ("A?", f"{other}B?", ""),
    ):
        told = prompt(user(first, PICTURE), answer, user(second, *[PICTURE] * bool(then)))
        assert told.count(own) == 1 + bool(then) and told.index(own) < told.index("A?")
        assert f"User: {then}" in told and "B?" in told
    for first, second, then in (("A?", f"{own}B?", []), ("A?", f"{own}B{own}?", [PICTURE])):  # no picture moves
        with pytest.raises(ValueError, match=f"has {2 + len(then)} image markers, but {1 + len(then)} "):
            prompt(user(first, PICTURE), answer, user(second, *then))
    with pytest.raises(ValueError, match="the text has 1 image marker, but 2 images are given"):
        prompt(user(f"{other}What?", PICTURE, PICTURE))


def test_conversations_of_other_shapes():
    tested, message = golden_model("vl-siglip")[1], user("Hello")
    expected = tested([message])["input_ids"]
    for same in (message, (message,), iter([message]), [[message]]):
        assert torch.equal(tested(same)["input_ids"], expected)
    images = [5, iter([PICTURE]), np.asarray(PICTURE), torch.zeros(3, 4, 4), PICTURE, PNG, "a.png", False]
    wrong = [message | {"images": value} for value in images]
    wrong += [message | {"role": "x" * 10**6}, message | {"content": 5}]
    for conversation in (5, None, "Hello", b"Hello", [], [5], *([message] for message in wrong)):
        with pytest.raises(ValueError) as caught:
            tested(conversation)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="system is a int, expected a text"):
        tested([message], system=5)


def test_a_batch_names_the_conversation_and_picture_at_fault():
    tested, text = Processor(golden("vl2-mla").folder), "<image><image>a"
    for picture, message in (
        (Image.new("RGB", (4000, 1)), "an image of 4000 x 1 pixels is too thin"),
        (Image.new("1", (70_000, 1)), "image: 70000 x 1 pixels, over the limit"),
        ("nowhere.png", "nowhere.png: no such image file"),
        (PNG[:60], "image bytes: damaged image data"),
        (None, "an image must be a path"),
    ):
        with pytest.raises(ValueError, match=f"conversation 2 of 2: image 2 of 2: {message}"):
            tested([[user(text, PICTURE, PICTURE)], [user(text, PICTURE, picture)]])


def test_addresses_with_any_character(tmp_path, monkeypatch):
    """Spaces and characters outside ASCII are escaped; what is escaped already stays."""
    monkeypatch.setenv("no_proxy", "*")
    for name in ("a b.png", "图.png"):
        (tmp_path / name).write_bytes(PNG)
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in ("a b.png", "图.png?q=ü x", "a%20b.png"):
            assert np.array_equal(load_image(f"http://127.0.0.1:{server.server_port}/{path}"), PICTURE)
        server.shutdown()


def test_a_registered_opener_is_used(tmp_path, monkeypatch):
    """HEIC files of phones, where a package such as pillow-heif has registered its opener."""
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    opened = Image.OPEN["PNG"][0]
    Image.register_open("HEIF", lambda file, name: opened(io.BytesIO(PNG), name), lambda start: start[4:8] == b"ftyp")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    assert np.array_equal(load_image(tmp_path / "a.heic"), PICTURE)


def test_a_phone_s_200_megapixels(tmp_path):
    Image.new("1", (16_320, 12_240)).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png").size == (16_320, 12_240)
