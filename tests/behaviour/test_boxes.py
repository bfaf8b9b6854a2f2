"""Boxes in an answer: read from any text, drawn on the image, saved by the command line."""

import itertools
import random

import numpy as np
import pytest
from conftest import golden, golden_model
from PIL import Image

import generate
from processor import Box, draw_boxes, parse_boxes


def grounded(label: str, coordinates: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{coordinates}<|/det|>"


def assert_inside(boxes: list[Box], size: tuple[int, int]) -> None:
    """Whole pixels, inside the image, with an area."""
    for box in boxes:
        assert isinstance(box.label, str) and all(type(side) is int for side in box[1:])
        assert 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1], box


# ------------------------------------------------------------------------------------ answers

GIRAFFE = grounded("The giraffe at the back.", "[[580, 270, 999, 900]]")


def test_coordinates_are_thousandths_from_0_to_999():
    """580 / 999 * 800 = 464.5, 270 / 999 * 600 = 162.2, 999 is the edge, 900 / 999 * 600 = 540.5."""
    assert parse_boxes(GIRAFFE, (800, 600)) == [Box("The giraffe at the back.", 464, 162, 800, 540)]
    for size in [(1, 1), (999, 999), (37, 4001)]:
        assert parse_boxes(grounded("all", "[[0, 0, 999, 999]]"), size) == [Box("all", 0, 0, *size)]
    for size in [(0, 10), (10, 0), (-5, 5)]:
        with pytest.raises(ValueError, match="expected a positive width and height"):
            parse_boxes(GIRAFFE, size)


ANSWERS = {  # on an image of 999 x 999, where a coordinate is a pixel
    "no box": ("I see a giraffe.", []),
    "empty": ("", []),
    "several boxes": (grounded("a", "[[1, 2, 3, 4], [5, 6, 7, 8]]"), [("a", 1, 2, 3, 4), ("a", 5, 6, 7, 8)]),
    "several labels": (
        f"Two: {grounded('a', '[[1, 2, 3, 4]]')} and {grounded('b', '[[5, 6, 7, 8]]')}.",
        [("a", 1, 2, 3, 4), ("b", 5, 6, 7, 8)],
    ),
    "a label of another script": (grounded("左边的长颈鹿", "[[1,2,3,4]]"), [("左边的长颈鹿", 1, 2, 3, 4)]),
    "spaces and lines": (grounded("  a\n", " [ [\n1 , 2,\t3 ,4 ] ] "), [("a", 1, 2, 3, 4)]),
    "the end token": (grounded("a", "[[1, 2, 3, 4]]") + "<｜end▁of▁sentence｜>", [("a", 1, 2, 3, 4)]),
    "no label": ("<|det|>[[1, 2, 3, 4]]<|/det|>", [("", 1, 2, 3, 4)]),
    "one label, twice located": (
        "<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> <|det|>[[5, 6, 7, 8]]<|/det|>",
        [("a", 1, 2, 3, 4), ("a", 5, 6, 7, 8)],
    ),
    "numbers outside of the tags": ("[[1, 2, 3, 4]]" + grounded("[5, 6, 7, 8]", "[]"), []),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(case):
    text, expected = ANSWERS[case]
    assert parse_boxes(text, (999, 999)) == expected


REPAIRED = {  # what is inside <|det|>, and the one box that it gives on an image of 999 x 999
    "swapped corners": ("[[30, 40, 10, 20]]", (10, 20, 30, 40)),
    "one axis swapped": ("[[30, 20, 10, 40]]", (10, 20, 30, 40)),
    "beyond the image": ("[[-5, -1000, 1000, 123456789]]", (0, 0, 999, 999)),
    "fractions": ("[[10.9, 20.0, 30., 40.5]]", (10, 20, 30, 40)),
    "signs": ("[[+10, +20, +30, +40]]", (10, 20, 30, 40)),
    "one bracket": ("[10, 20, 30, 40]", (10, 20, 30, 40)),
    "a bracket too many": ("[[[10, 20, 30, 40]]]", (10, 20, 30, 40)),
    "half closed": ("[[10, 20, 30, 40]", (10, 20, 30, 40)),
    "a closing tag cut off": ("[[10, 20, 30, 40]]<|/det", (10, 20, 30, 40)),
    "text around": ("at [[10, 20, 30, 40]] or so", (10, 20, 30, 40)),
    "wrong neighbours": ("[[1, 2, 3], [10, 20, 30, 40], [1, 2, 3, 4, 5], [x], []]", (10, 20, 30, 40)),
    "nested": ("[[1, 2, [10, 20, 30, 40], 3, 4]]", (10, 20, 30, 40)),
}


@pytest.mark.parametrize("case", REPAIRED)
@pytest.mark.parametrize("end", ["<|/det|>", ""])
def test_what_still_tells_four_numbers_is_a_box(case, end):
    inside, box = REPAIRED[case]
    assert parse_boxes(f"<|ref|>a<|/ref|><|det|>{inside}{end}", (999, 999)) == [("a", *box)]


NOT_A_BOX = [
    "", "1", "1, 2", "1, 2, 3", "1, 2, 3, 4, 5", "1, 2, 3, 4, 5, 6, 7, 8", ",,,", "1,,3,4", "1, 2, 3,", "1 2 3 4",
    "5, 5, 5, 5", "5, 5, 5, 9", "-9, -9, -1, -1", "1000, 1000, 2000, 2000", "9" * 400 + ", 1, 2, 3", "1, 2, 3, 1e400",
    "1e2, 2e2, 3e2, 4e2", "nan, nan, nan, nan", "0, 0, inf, inf", "0, 0, -Infinity, NaN", "a, b, c, d", "1, 2, 3, x4",
    "None, True, False, None", "0x10, 0x20, 0x30, 0x40", "1_0, 2_0, 3_0, 4_0", "１, ２, ３, ４", "١, ٢, ٣, ٤",
    "½, 1, 2, ³", "1, 2, 3, \ud800", "1\x00, 2, 3, 4",
    "--1, 2, 3, 4", "1.2.3, 2, 3, 4", ".5, 2, 3, 4", "1; 2; 3; 4", "1, 2, 3, 4j", "'1', '2', '3', '4'", "1, 2, 3, 4)",
    "__import__('os').system('touch x'), 1, 2, 3", "1, 2, 3, __import__('os').system('touch x')",
    "open('x', 'w'), 2, 3, 4", "exec(\"open('x', 'w')\"), 1, 1, 1", "(lambda: 1)(), 2, 3, 4", "9**9**9, 1, 1, 1",
]  # fmt: skip
BRACKETS = ["[[{}]]", "[{}]", "{}", "[[{}", "{}]]", "]][[{}]]", "[[{}]], [[{}]]", "[[[[{}]]]]", "[({})]", "{{{}}}"]
WRAPPINGS = [
    "<|ref|>a<|/ref|><|det|>{}<|/det|>", "<|det|>{}", "<|ref|>a<|det|>{}<|/det|>", "<|det|><|det|>{}<|/ref|>",
    "{}<|/det|>", "<|/det|><|det|>{}<|ref|>",
]  # fmt: skip
MUTATIONS = [
    "[", "]", ",", "-", ".", "[[", "]]", "<|det|>", "<|/det|>", "<|ref|>", "<|/ref|>", "<|", "|>", "1e999", "NaN", "-0",
    "99999999999999999999", "0.0000000001", " ", "\n", "\x00", "é", "猫", "７", "\u202e",
    "__import__('os').system('touch x')",
]  # fmt: skip


def mutated(text: str, dice: random.Random) -> str:
    """The text with a few stretches cut out, doubled, or replaced by something unexpected."""
    for _ in range(dice.randint(1, 6)):
        start = dice.randint(0, len(text))
        end = min(len(text), start + dice.randint(0, 8))
        middle = dice.choice(["", text[start:end] * 2, dice.choice(MUTATIONS), text[start:end][::-1]])
        text = text[:start] + middle + text[end:]
    return text


def mutations(count: int) -> list[str]:
    dice = random.Random(0)
    whole = GIRAFFE + grounded("左", "[[10, 20, 500, 400], [0, 0, 999, 999]]")
    return [mutated(whole, dice) for _ in range(count)]


def test_nothing_that_is_no_box_becomes_one(tmp_path, monkeypatch):
    """Every wrong list of numbers, in every bracket and between all sorts of tags. Nothing of it is run."""
    monkeypatch.chdir(tmp_path)
    for wrapping, bracket, inside in itertools.product(WRAPPINGS, BRACKETS, NOT_A_BOX):
        text = wrapping.format(bracket.format(inside, inside))
        assert parse_boxes(text, (640, 480)) == [], text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(64, 48), (3, 2), (1, 1)])
def test_mutated_answers_never_raise_and_never_leave_the_image(size):
    """Nor do their boxes, once drawn."""
    image, found = Image.new("RGB", size), 0
    for text in mutations(400):
        boxes = parse_boxes(text, size)
        assert_inside(boxes, size)
        assert draw_boxes(image, boxes).size == size
        found += len(boxes)
    assert found > 80  # so that the above says something


LONG = {  # a megabyte each, in which a search that starts anew at every place would take hours
    "opening brackets": ("<|det|>" + "[" * 10**6, 0),
    "closing brackets": ("<|det|>" + "]" * 10**6, 0),
    "opening tags": ("<|det|>" * 150_000, 0),
    "tags cut off": ("<|det|" * 170_000, 0),
    "labels": ("<|ref|>" * 150_000, 0),
    "one long number": ("<|det|>[[1, 2, 3, " + "9" * 10**6 + "]]", 0),
    "one long fraction": ("<|det|>[[1, 2, 3, 4." + "9" * 10**6 + "]]", 0),
    "spaces": ("<|det|>[[1," + " " * 10**6 + "x, 3, 4]]", 0),
    "spaces before a box": ("<|det|>[[1," + " " * 10**6 + "2, 3, 4]]", 1),
    "commas": ("<|det|>[" + "," * 10**6 + "]", 0),
    "numbers": ("<|det|>[" + "1," * 500_000 + "]", 0),
    "unclosed boxes": ("<|det|>" + "[1,2,3,4" * 10_000, 0),
    "a long label": (grounded("a" * 10**6, "[[1, 2, 3, 4]]"), 1),
}


@pytest.mark.parametrize("case", LONG)
def test_a_megabyte_is_read_in_one_go(case):
    text, count = LONG[case]
    boxes = parse_boxes(text, (999, 999))
    assert len(boxes) == count
    assert_inside(boxes, (999, 999))


# ------------------------------------------------------------------------------------ drawing

BLACK = Image.new("RGB", (800, 600))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool (height, width)."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def white_pixels(boxes: list[Box]) -> int:
    """How much text can be seen: pixels that letters cover whole, whatever the colour of their ground."""
    return int((np.asarray(draw_boxes(BLACK, boxes)).min(axis=-1) == 255).sum())


def same(labels: list[str], others: list[str]) -> bool:
    """Whether the boxes are drawn alike with these labels and with those."""
    places = [(0, 50, 99, 99), (100, 50, 199, 99), (0, 150, 99, 199)]
    image = Image.new("RGB", (200, 200))
    a, b = (draw_boxes(image, [Box(*box) for box in zip(of, *zip(*places))]) for of in (labels, others))
    return not changed(a, b).any()


LABELS = {
    "Latin": "The giraffe",
    "accents": "žirafa, Gürteltier, façade",
    "Cyrillic": "Жираф",
    "Greek": "Καμηλοπάρδαλη",
    "CJK": "左边的长颈鹿",
    "Arabic": "زرافة",
    "emoji": "🦒🦒",
    "control characters": "a\x00b\tc\nd\x1b[31me\u202ef",
    "lone surrogate": "\ud800",
    "empty": "",
    "spaces": "   ",
    "combining marks": "e\u0301\u0301\u0301" * 5,
    "very long": "a very long label " * 500,
    "mixed": "giraffe 长颈鹿 Жираф \uffff",
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_a_box_and_its_label_are_drawn_and_nothing_else(label):
    noise = np.random.default_rng(0).integers(0, 99, (240, 320, 3), dtype=np.uint8)  # dark: white text can be found
    image, before = Image.fromarray(noise), Image.fromarray(noise)
    drawn = draw_boxes(image, [Box(label, 100, 80, 220, 160)])
    assert drawn.size == image.size and drawn.mode == "RGB"
    assert not changed(before, image).any()  # a copy is drawn on

    new = changed(before, drawn)
    edge = np.asarray(drawn)[159, 100:220]
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
    assert same(["a", "长颈鹿", ""], ["a", "2", "3"])
    assert same(["giraffe 猫", " \n\t\x00 ", "a\nb\t\tc\x1b\u202ed"], ["1", "2", "a b c d"])
    assert not same(["a", "b", "c"], ["a", "b", "d"])
    long = "A giraffe at the very back. " * 1000
    assert any(same([long, "b", "c"], [long[:length] + "…", "b", "c"]) for length in range(1, 60))


def test_random_labels_and_tiny_images():
    """Labels of every part of Unicode: unassigned, combining, right to left, control characters, lone surrogates."""
    dice, image = random.Random(0), Image.new("RGB", (60, 40))
    limits = [128, 0x3000, 0x20000, 0x110000]
    for _ in range(300):
        label = "".join(chr(dice.randrange(dice.choice(limits))) for _ in range(dice.randint(1, 30)))
        assert draw_boxes(image, [Box(label, 1, 20, 40, 30)]).getbbox() is not None
    for label, size in itertools.product(LABELS.values(), [(1, 1), (2, 300), (300, 2), (13, 13), (30, 20)]):
        drawn = draw_boxes(Image.new("RGB", size), [Box(label, 0, 0, *size)] * 2)
        assert drawn.size == size and drawn.getbbox() is not None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode(mode):
    drawn = draw_boxes(Image.new(mode, (80, 60)), [Box("a", 10, 20, 50, 50)])
    assert drawn.mode == "RGB" and drawn.size == (80, 60)


def random_boxes(count: int, width: int, height: int) -> list[Box]:
    dice = random.Random(0)
    corners = [
        (*sorted(dice.sample(range(width + 1), 2)), *sorted(dice.sample(range(height + 1), 2))) for _ in range(count)
    ]
    return [Box(f"box {i}", left, top, right, bottom) for i, (left, right, top, bottom) in enumerate(corners)]


CROWDS = {
    "one place": [Box(f"box {i}", 100, 80, 300, 200) for i in range(10)],
    "the whole image": [Box(f"box {i}", 0, 0, 800, 600) for i in range(10)],
    "the bottom": [Box(f"box {i}", 300, 560, 500, 600) for i in range(10)],
    "the top": [Box(f"box {i}", 300, 0, 500, 5) for i in range(10)],
    "side by side": [Box("giraffe", left, 300, left + 20, 320) for left in range(100, 200, 10)],
    "corners": [Box("giraffe", 0, 0, 1, 1), Box("giraffe", 799, 599, 800, 600), Box("giraffe", 799, 0, 800, 600)],
    "one line": [Box("giraffe", 0, 300, 800, 301)],
    "fifty": random_boxes(50, 800, 600),
}


@pytest.mark.parametrize("boxes", CROWDS.values(), ids=CROWDS)
def test_labels_are_inside_and_do_not_cover_each_other_where_there_is_room(boxes):
    """As much of the letters is seen as with each label alone. Where there is no room, nothing fails."""
    assert white_pixels(boxes) == sum(white_pixels([Box(box.label, 300, 300, 400, 400)]) for box in boxes) > 30
    assert draw_boxes(Image.new("RGB", (90, 40)), random_boxes(50, 90, 40)).size == (90, 40)


def test_neighbouring_boxes_have_different_colours_that_white_can_be_read_on():
    """A contrast of 4.5 to 1 and more, as the web's accessibility guidelines ask for."""
    boxes = [Box("a", left, 100, left + 40, 140) for left in range(0, 800, 50)]
    drawn = draw_boxes(BLACK, boxes)
    colours = [drawn.getpixel((box.left, box.bottom - 1)) for box in boxes]
    assert all(a != b for a, b in zip(colours, colours[1:]))
    for colour in set(colours):
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, colour


# ------------------------------------------------------------------------------------ command line

PICTURES = golden("vl2-mla").folder / "images"
TWO = grounded("左 the giraffe", "[[100, 200, 500, 600]]") + " and " + grounded("b", "[[0, 0, 9, 99]]")


@pytest.fixture
def ask(monkeypatch, capsys):
    """ask(answer, *options): standard output and error of a command line whose model gives that answer."""

    def ask(answer: str, *options) -> tuple[str, str]:
        def say(model, batch, **_):
            tokenizer = golden_model("vl2-mla")[1].tokenizer
            yield from tokenizer.encode(answer)
            yield tokenizer.eos_token_id

        monkeypatch.setattr(generate, "stream", say)
        command = ["--model", golden("vl2-mla").folder, "--device", "cpu", "--dtype", "float32", "--prompt", "Where?"]
        generate.main([str(part) for part in (*command, *options)])
        return capsys.readouterr()

    return ask


@pytest.mark.parametrize("name", ["out.png", "out.PNG", "out.webp", "out.jpg"])
def test_boxes_are_drawn_on_the_last_image(name, ask, tmp_path):
    file = tmp_path / name
    output = ask(TWO, "--image", PICTURES / "2.png", "--image", PICTURES / "5.png", "--boxes", file)
    assert output == (TWO + "\n", f"2 boxes drawn in {file}\n")  # the tags are part of the answer, the end token is not
    assert list(tmp_path.iterdir()) == [file]  # nothing else is left behind
    last, saved = Image.open(PICTURES / "5.png").convert("RGB"), Image.open(file)
    assert saved.size == last.size
    if name.lower().endswith(".png"):
        assert not changed(draw_boxes(last, parse_boxes(TWO, last.size)), saved).any()


def test_a_disk_that_fills_up_leaves_the_picture_that_was_there(ask, tmp_path, monkeypatch, capsys):
    def save_half(image, path):
        with open(path, "wb") as file:
            file.write(b"half a pict")
        raise OSError("No space left on device")

    file = tmp_path / "out.png"
    file.write_bytes(b"an earlier picture")
    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(SystemExit, match="2"):
        ask(TWO, "--image", PICTURES / "5.png", "--boxes", file)
    assert capsys.readouterr().err == f"error: {file}: cannot be written (No space left on device)\n"
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"an earlier picture"


@pytest.mark.parametrize("text", ["I see nothing.", grounded("it", "[[1, 2, 3]]"), grounded("it", "[[5, 5, 5, 5]]")])
def test_nothing_located_writes_no_file(text, ask, tmp_path):
    file = tmp_path / "out.png"
    output = ask(text, "--image", PICTURES / "5.png", "--boxes", file)
    assert output == (text + "\n", f"the answer locates nothing, {file} is not written\n")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "another kind of file": ("out.gif", "expected a name that ends in .png, .jpg or .webp"),
    "no ending": ("out", "expected a name that ends in .png, .jpg or .webp"),
    "an ending alone": (".png", "expected a name that ends in .png, .jpg or .webp"),
    "no such folder": ("absent/out.png", "expected the name of a file, in a folder that is there"),
    "no image": ("out.png", "--boxes draws on an image, give --image"),
}


@pytest.mark.parametrize("name, message", REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_saved_is_refused_before_anything_is_read(name, message, ask, tmp_path, capsys):
    image = [] if name == "out.png" else ["--image", PICTURES / "5.png"]
    with pytest.raises(SystemExit, match="2"):
        ask(TWO, "--model", tmp_path, *image, "--boxes", tmp_path / name)  # a folder without a checkpoint
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())
