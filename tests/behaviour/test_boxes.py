"""Boxes in an answer: read from any text, drawn on the image, saved by the command line."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused, run_command
from conftest import golden, golden_model
from PIL import Image

import generate
from processor import Box, draw_boxes, parse_boxes


def grounded(label: str, coordinates: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{coordinates}<|/det|>"


GIRAFFE = grounded("The giraffe at the back.", "[[580, 270, 999, 900]]")
A, B, ONE, OTHER = ("a", 1, 2, 3, 4), ("b", 5, 6, 7, 8), "[[1, 2, 3, 4]]", "[[5, 6, 7, 8]]"
ANSWERS = [  # on an image of 999 x 999, where a coordinate is a pixel
    ("I see a giraffe.", []), (ONE + grounded("[5, 6, 7, 8]", "[]"), []), (f"<|det|>{ONE}<|/det|>", [("", 1, 2, 3, 4)]),
    (grounded("a", "[[1, 2, 3, 4], [5, 6, 7, 8]]"), [A, ("a", 5, 6, 7, 8)]),
    (f"Two: {grounded('a', ONE)} and {grounded('b', OTHER)}.", [A, B]),
    (f"{grounded('a', ONE)} <|det|>{OTHER}<|/det|>", [A, ("a", 5, 6, 7, 8)]),
    (grounded("左边的长颈鹿", "[[1,2,3,4]]"), [("左边的长颈鹿", 1, 2, 3, 4)]),
    (grounded("  a\n", " [ [\n1 , 2,\t3 ,4 ] ] ") + "<｜end▁of▁sentence｜>", [A]),
    (grounded("all", "[[-5, -1000, 1000, 123456789]]"), [("all", 0, 0, 999, 999)]),
]  # fmt: skip
REPAIRED = [  # what still tells the box 10, 20, 30, 40 inside <|det|>
    "[[30, 40, 10, 20]]", "[[30, 20, 10, 40]]", "[[10.9, 20.0, 30., 40.5]]", "[[+10, +20, +30, +40]]",
    "[10, 20, 30, 40]", "[[[10, 20, 30, 40]]]", "[[10, 20, 30, 40]", "[[10, 20, 30, 40]]<|/det",
    "at [[10, 20, 30, 40]] or so", "[[1, 2, 3], [10, 20, 30, 40], [1, 2, 3, 4, 5], [x], []]",
    "[[1, 2, [10, 20, 30, 40], 3, 4]]",
]  # fmt: skip


def test_answers():
    """Coordinates are thousandths from 0 to 999: 580 / 999 * 800 = 464.5, 999 is the edge."""
    assert parse_boxes(GIRAFFE, (800, 600)) == [Box("The giraffe at the back.", 464, 162, 800, 540)]
    for size in [(1, 1), (999, 999), (37, 4001)]:
        assert parse_boxes(grounded("all", "[[0, 0, 999, 999]]"), size) == [Box("all", 0, 0, *size)]
    for text, expected in ANSWERS:
        assert parse_boxes(text, (999, 999)) == expected, text
    for inside, end in itertools.product(REPAIRED, ["<|/det|>", ""]):
        assert parse_boxes(f"<|ref|>a<|/ref|><|det|>{inside}{end}", (999, 999)) == [("a", 10, 20, 30, 40)], inside


NOT_A_BOX = [
    "", "1", "1, 2", "1, 2, 3", "1, 2, 3, 4, 5", "1, 2, 3, 4, 5, 6, 7, 8", ",,,", "1,,3,4", "1, 2, 3,", "1 2 3 4",
    "5, 5, 5, 5", "5, 5, 5, 9", "-9, -9, -1, -1", "1000, 1000, 2000, 2000", "9" * 400 + ", 1, 2, 3", "1, 2, 3, 1e400",
    "1e2, 2e2, 3e2, 4e2", "nan, nan, nan, nan", "0, 0, inf, inf", "0, 0, -Infinity, NaN", "a, b, c, d", "1, 2, 3, x4",
    "None, True, False, None", "0x10, 0x20, 0x30, 0x40", "1_0, 2_0, 3_0, 4_0", "１, ２, ３, ４", "١, ٢, ٣, ٤",
    "½, 1, 2, ³", "1, 2, 3, \ud800", "1\x00, 2, 3, 4",
    "--1, 2, 3, 4", "1.2.3, 2, 3, 4", ".5, 2, 3, 4", "1; 2; 3; 4", "1, 2, 3, 4j", "'1', '2', '3', '4'", "1, 2, 3, 4)",
    "__import__('os').system('touch x'), 1, 2, 3", "open('x', 'w'), 2, 3, 4", "exec(\"open('x', 'w')\"), 1, 1, 1",
]  # fmt: skip
BRACKETS = ["[[{}]]", "[{}]", "{}", "[[{}", "{}]]", "]][[{}]]", "[[{}]], [[{}]]", "[[[[{}]]]]", "[({})]", "{{{}}}"]
WRAPPINGS = [
    "<|ref|>a<|/ref|><|det|>{}<|/det|>", "<|det|>{}", "<|ref|>a<|det|>{}<|/det|>", "<|det|><|det|>{}<|/ref|>",
    "{}<|/det|>", "<|/det|><|det|>{}<|ref|>",
]  # fmt: skip


def test_nothing_that_is_no_box_becomes_one(tmp_path, monkeypatch):
    """Every wrong list of numbers, in every bracket and between all sorts of tags. Nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    for wrapping, bracket, inside in itertools.product(WRAPPINGS, BRACKETS, NOT_A_BOX):
        text = wrapping.format(bracket.format(inside, inside))
        assert parse_boxes(text, (640, 480)) == [], text
    assert not list(tmp_path.iterdir())


def test_a_megabyte_is_read_in_one_go():
    """A search that starts anew at every place would take hours."""
    nines, spaces = "9" * 10**6, " " * 10**6
    for text in (
        "<|det|>" + "[" * 10**6, "<|det|>" + "]" * 10**6, "<|det|>" + "[1,2,3,4" * 10_000, "<|det|>" * 150_000,
        "<|det|" * 170_000, "<|ref|>" * 150_000, "<|det|>[" + "1," * 500_000 + "]", f"<|det|>[[1, 2, 3, {nines}]]",
        f"<|det|>[[1, 2, 3, 4.{nines}]]", f"<|det|>[[1,{spaces}x, 3, 4]]",
    ):  # fmt: skip
        assert parse_boxes(text, (999, 999)) == [], text[:20]
    for text in (f"<|det|>[[1,{spaces}2, 3, 4]]", grounded("a" * 10**6, ONE)):
        assert len(parse_boxes(text, (999, 999))) == 1, text[:20]


def test_boxes_are_whole_pixels_with_an_area_inside_the_image():
    """Also once drawn, and where an answer is cut off or garbled."""
    dice, found = random.Random(0), 0
    for _ in range(1200):
        size, corners = (dice.randint(1, 64), dice.randint(1, 48)), [dice.randint(-99, 1099) for _ in range(4)]
        text = grounded("左", f"[{corners}, [0, 0, 999, 999]]")
        cut, end = sorted(dice.sample(range(len(text)), 2))
        boxes = parse_boxes(text[:cut] + dice.choice([text[cut:end][::-1], "]", "<|det|>", ""]) + text[end:], size)
        for box in boxes:
            assert isinstance(box.label, str) and all(type(side) is int for side in box[1:])
            assert 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1], box
        assert draw_boxes(Image.new("RGB", size), boxes).size == size
        found += len(boxes)
    assert found > 200  # so that the above says something


# ------------------------------------------------------------------------------------ drawing


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool (height, width)."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


LABELS = [
    "The giraffe", "žirafa, Gürteltier, façade", "Жираф", "左边的长颈鹿", "زرافة", "🦒🦒", "e\u0301\u0301\u0301" * 5,
    "a\x00b\tc\nd\x1b[31me\u202ef", "\ud800", "", "   ", "a very long label " * 500, "giraffe 长颈鹿 Жираф \uffff",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS, ids=lambda label: ascii(label[:20]))
def test_a_box_and_its_label_are_drawn_and_nothing_else(label):
    noise = np.random.default_rng(0).integers(0, 99, (240, 320, 3), dtype=np.uint8)  # dark: white text can be found
    image = Image.fromarray(noise)
    drawn = draw_boxes(image, [Box(label, 100, 80, 220, 160)])
    assert drawn.mode == "RGB" and np.array_equal(image, noise)  # a copy is drawn on
    new, edge = changed(image, drawn), np.asarray(drawn)[159, 100:220]
    assert (edge == edge[0]).all() and new[159, 100:220].all()
    assert not new[90:150, 110:210].any() and not new[160:].any()
    assert not new[81:, :100].any() and not new[81:, 220:].any()
    rows, columns = np.nonzero(new[:80])
    ground = np.s_[rows.min() : 80, columns.min() : columns.max() + 1]  # the label's, a full rectangle on its box
    assert new[ground].all()
    white = np.asarray(drawn).min(axis=-1) > 200
    assert white[ground].any() and white[ground].sum() == white.sum()


def test_labels_that_cannot_be_drawn_as_they_are():
    """A character that the font lacks, or nothing to see: the box's number. Else one line, cut to the image."""

    def drawn(*labels) -> bytes:
        places = [(0, 50, 99, 99), (100, 50, 199, 99), (0, 150, 99, 199)]
        boxes = [Box(label, *place) for label, place in zip(labels, places)]
        return draw_boxes(Image.new("RGB", (200, 200)), boxes).tobytes()

    assert drawn("a", "长颈鹿", "") == drawn("a", "2", "3") != drawn("a", "2", "4")
    assert drawn("giraffe 猫", " \n\t\x00 ", "a\nb\t\tc\x1b\u202ed") == drawn("1", "2", "a b c d")
    long = "A giraffe at the very back. " * 1000
    assert drawn(long, "b", "c") in (drawn(long[:length] + "…", "b", "c") for length in range(1, 38))


def test_random_labels_and_images_of_every_mode_and_size():
    """Labels of every part of Unicode: unassigned, combining, right to left, control characters, lone surrogates."""
    dice, image = random.Random(0), Image.new("RGB", (60, 40))
    limits = [128, 0x3000, 0x20000, 0x110000]
    for _ in range(300):
        label = "".join(chr(dice.randrange(dice.choice(limits))) for _ in range(dice.randint(1, 30)))
        assert draw_boxes(image, [Box(label, 1, 20, 40, 30)]).getbbox() is not None
    sizes, modes = [(1, 1), (2, 300), (300, 2), (13, 13), (30, 20)], ["RGB", "L", "RGBA", "P", "1", "CMYK"]
    for (label, size), mode in zip(itertools.product(LABELS, sizes), itertools.cycle(modes)):
        drawn = draw_boxes(Image.new(mode, size), [Box(label, 0, 0, *size)] * 2)
        assert (drawn.size, drawn.mode) == (size, "RGB") and drawn.getbbox() is not None


def test_a_photo_that_is_stored_turned_is_drawn_upright_as_the_model_saw_it():
    photo = Image.new("RGB", (40, 60))
    photo.getexif()[0x0112] = 6  # orientation
    assert draw_boxes(photo, [Box("a", 0, 0, 60, 40)]).size == (60, 40)


def random_boxes(count: int, width: int, height: int) -> list[Box]:
    dice = random.Random(0)
    corners = [[sorted(dice.sample(range(side + 1), 2)) for side in (width, height)] for _ in range(count)]
    return [Box(f"box {i}", left, top, right, bottom) for i, ((left, right), (top, bottom)) in enumerate(corners)]


BLACK = Image.new("RGB", (800, 600))
PLACES = [(100, 80, 300, 200), (300, 560, 500, 600), (300, 0, 500, 5)]
CROWDS = [[Box(f"box {i}", *place) for i in range(10)] for place in PLACES]
CROWDS += [
    [Box("giraffe", left, 300, left + 20, 320) for left in range(100, 200, 10)],
    [Box("giraffe", 0, 0, 1, 1), Box("giraffe", 799, 599, 800, 600), Box("giraffe", 799, 0, 800, 600)],
    random_boxes(50, 800, 600),
]


@pytest.mark.parametrize("boxes", CROWDS, ids=["middle", "bottom", "top", "side by side", "corners", "fifty"])
def test_labels_are_inside_and_do_not_cover_each_other_where_there_is_room(boxes):
    """As much of the letters is seen as with each label alone. Where there is no room, nothing fails."""

    def white_pixels(boxes: list[Box]) -> int:
        return (np.asarray(draw_boxes(BLACK, boxes)).min(axis=-1) == 255).sum()

    assert white_pixels(boxes) == sum(white_pixels([Box(box.label, 300, 300, 400, 400)]) for box in boxes) > 30
    assert draw_boxes(Image.new("RGB", (90, 40)), random_boxes(50, 90, 40)).size == (90, 40)


def test_neighbouring_boxes_have_different_colours_that_white_can_be_read_on():
    """A contrast of 4.5 to 1 and more, as the web's accessibility guidelines ask for."""
    drawn = draw_boxes(BLACK, [Box("a", left, 100, left + 40, 140) for left in range(0, 800, 50)])
    colours = np.array([drawn.getpixel((left, 139)) for left in range(0, 800, 50)]) / 255
    assert (colours[1:] != colours[:-1]).any(axis=1).all()
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    assert (1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 4.5).all()


# ------------------------------------------------------------------------------------ command line

PICTURES = golden("vl2-mla").folder / "images"
LAST = ("--image", PICTURES / "5.png")
TWO = grounded("左 the giraffe", "[[100, 200, 500, 600]]") + " and " + grounded("b", "[[0, 0, 9, 99]]")


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(answer, *options): status, output and error of a command line whose model gives that answer."""

    def ask(answer: str, *options):
        tokenizer = golden_model("vl2-mla")[1].tokenizer
        ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        monkeypatch.setattr(generate, "stream", lambda model, batch, **_: iter(ids))
        command = ["--model", golden("vl2-mla").folder, "--device", "cpu", "--dtype", "float32", "--prompt", "Where?"]
        return run_command(generate.main, [*command, *options], capsys)

    return ask


@pytest.mark.parametrize("name", ["out.png", "out.PNG", "out.webp", "out.jpg"])
def test_boxes_are_drawn_on_the_last_image(name, ask, tmp_path):
    file = tmp_path / name
    done = ask(TWO, "--image", PICTURES / "2.png", *LAST, "--boxes", file)
    assert done.out == TWO + "\n"  # the tags are part of the answer, the end token is not
    assert (done.status, done.err) == (0, f"2 boxes drawn in {file}\n")
    assert list(tmp_path.iterdir()) == [file]  # nothing else is left behind
    last, saved = Image.open(PICTURES / "5.png").convert("RGB"), Image.open(file)
    assert saved.size == last.size
    if name.lower().endswith(".png"):
        assert not changed(draw_boxes(last, parse_boxes(TWO, last.size)), saved).any()


def test_a_disk_that_fills_up_leaves_the_picture_that_was_there(ask, tmp_path, monkeypatch):
    def save_half(image, path):
        Path(path).write_bytes(b"half a pict")
        raise OSError("No space left on device")

    file = tmp_path / "out.png"
    file.write_bytes(b"an earlier picture")
    monkeypatch.setattr(Image.Image, "save", save_half)
    done = ask(TWO, *LAST, "--boxes", file)
    assert (done.status, done.err) == (2, f"error: {file}: cannot be written (No space left on device)\n")
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"an earlier picture"


def test_nothing_located_writes_no_file(ask, tmp_path):
    for text in ("I see nothing.", grounded("it", "[[1, 2, 3]]"), grounded("it", "[[5, 5, 5, 5]]")):
        done = ask(text, *LAST, "--boxes", tmp_path / "out.png")
        assert (done.out, done.err) == (text + "\n", f"the answer locates nothing, {tmp_path}/out.png is not written\n")
        assert not list(tmp_path.iterdir())


def test_what_could_not_be_saved_is_refused_before_anything_is_read(ask, tmp_path):
    for name, image, message in (
        *((name, LAST, "expected a name that ends in .png, .jpg or .webp") for name in ("out.gif", "out", ".png")),
        ("absent/out.png", LAST, "expected the name of a file, in a folder that is there"),
        ("out.png", (), "--boxes draws on an image, give --image"),
    ):
        assert_refused(ask(TWO, "--model", tmp_path, *image, "--boxes", tmp_path / name), message)  # no checkpoint
        assert not list(tmp_path.iterdir())
