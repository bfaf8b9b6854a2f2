"""Boxes in an answer: read from any text, drawn on the image, saved by the command line."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import golden, golden_model
from PIL import Image, ImageDraw, ImageFont

import generate
import processor
from processor import Box, draw_boxes, fit_label, parse_boxes


def grounded(label: str, coordinates: str) -> str:
    return f"<|ref|>{label}<|/ref|><|det|>{coordinates}<|/det|>"


def assert_inside(boxes: list[Box], size: tuple[int, int]) -> None:
    """Whole pixels, inside the image, with an area."""
    for box in boxes:
        assert isinstance(box.label, str) and all(type(side) is int for side in box[1:])
        assert 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1], box


# ------------------------------------------------------------------------------------ well-formed answers

GIRAFFE = grounded("The giraffe at the back.", "[[580, 270, 999, 900]]")


def test_coordinates_are_thousandths_from_0_to_999():
    """580 / 999 * 800 = 464.5, 270 / 999 * 600 = 162.2, 999 is the edge, 900 / 999 * 600 = 540.5."""
    assert parse_boxes(GIRAFFE, (800, 600)) == [Box("The giraffe at the back.", 464, 162, 800, 540)]


@pytest.mark.parametrize("size", [(1, 1), (999, 999), (37, 4001)])
def test_the_largest_box_is_the_image(size):
    assert parse_boxes(grounded("all", "[[0, 0, 999, 999]]"), size) == [Box("all", 0, 0, *size)]


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


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-5, 5)])
def test_an_image_must_have_a_size(size):
    with pytest.raises(ValueError, match="expected a positive width and height"):
        parse_boxes(GIRAFFE, size)


# ------------------------------------------------------------------------------------ malformed answers

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
MALFORMED = [
    wrapping.format(bracket.format(*[inside] * 2))
    for wrapping, bracket, inside in itertools.product(WRAPPINGS, BRACKETS, NOT_A_BOX)
]

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
    assert len(set(MALFORMED)) > 2000
    for text in MALFORMED:
        assert parse_boxes(text, (640, 480)) == [], text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(640, 480), (3, 2), (1, 1)])
def test_mutated_answers_never_raise_and_never_leave_the_image(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = 0
    for text in mutations(1000):
        boxes = parse_boxes(text, size)
        assert_inside(boxes, size)
        found += len(boxes)
    assert found > 200  # so that the above says something
    assert not list(tmp_path.iterdir())


def test_boxes_of_mutated_answers_can_be_drawn():
    image = Image.new("RGB", (64, 48))
    drawn = [draw_boxes(image, boxes) for text in mutations(400) if (boxes := parse_boxes(text, image.size))]
    assert len(drawn) > 200 and all(picture.size == image.size for picture in drawn)


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


class Watched:
    """What draw_boxes drew: the places of labels (left, top, right, bottom) and their texts."""

    def __init__(self, monkeypatch):
        self.places, self.texts = [], []
        rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text

        def watched_rectangle(draw, corners, fill=None, **options):
            if fill is not None:
                self.places.append(tuple(corners))
            return rectangle(draw, corners, fill=fill, **options)

        def watched_text(draw, place, words, *args, **options):
            self.texts.append(words)
            return text(draw, place, words, *args, **options)

        monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", watched_rectangle)
        monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched_text)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def covering(places: list[tuple]) -> list[tuple]:
    """Pairs of labels of which one covers a part of the other. They may touch."""
    return [
        (a, b)
        for a, b in itertools.combinations(places, 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool (height, width)."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def noise(width: int, height: int) -> Image.Image:
    """A dark picture, in which white text can be found."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 99, (height, width, 3), dtype=np.uint8))


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


@pytest.mark.parametrize("label", LABELS)
def test_a_box_and_its_label_are_drawn_and_nothing_else(label, watched):
    image = noise(320, 240)
    before, box = image.copy(), Box(LABELS[label], 100, 80, 220, 160)
    drawn = draw_boxes(image, [box])
    assert drawn.size == image.size and drawn.mode == "RGB"
    assert not changed(before, image).any()  # a copy is drawn on

    ((left, top, right, bottom),), (text,) = watched.places, watched.texts
    assert 0 <= left < right <= 320 and 0 <= top < bottom <= 240
    assert text.strip() and text.isprintable()
    inside = np.zeros((240, 320), dtype=bool)
    inside[top : bottom + 1, left : right + 1] = True
    white = np.asarray(drawn).min(axis=-1) > 200
    assert white.any() and not (white & ~inside).any()  # the text can be seen, and is all on its ground
    inside[80:160, 100:220] = True
    assert not (changed(before, drawn) & ~inside).any()
    edge = np.asarray(drawn)[159, 100:220]
    assert (edge == edge[0]).all() and changed(before, drawn)[159, 100:220].any()


def test_random_labels_never_raise():
    """Of every part of Unicode: unassigned, combining, right to left, control characters, lone surrogates."""
    dice, image = random.Random(0), Image.new("RGB", (60, 40))
    limits = [128, 0x3000, 0x20000, 0x110000]
    for _ in range(300):
        label = "".join(chr(dice.randrange(dice.choice(limits))) for _ in range(dice.randint(1, 30)))
        assert draw_boxes(image, [Box(label, 1, 20, 40, 30)]).getbbox() is not None


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (13, 13), (30, 20)])
def test_tiny_images(size, label):
    """Too small to read anything, but drawn without an error."""
    drawn = draw_boxes(Image.new("RGB", size), [Box(LABELS[label], 0, 0, *size)] * 2)
    assert drawn.size == size and np.asarray(drawn).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode(mode):
    drawn = draw_boxes(Image.new(mode, (80, 60)), [Box("a", 10, 20, 50, 50)])
    assert drawn.mode == "RGB" and drawn.size == (80, 60)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (79, 59, 80, 60), (0, 0, 80, 60), (0, 30, 80, 31), (79, 0, 80, 60)])
def test_the_label_is_inside_wherever_the_box_is(box, watched):
    draw_boxes(Image.new("RGB", (80, 60)), [Box("giraffe", *box)])
    ((left, top, right, bottom),) = watched.places
    assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60


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
    "fifty": random_boxes(50, 800, 600),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_labels_do_not_cover_each_other_where_there_is_room(crowd, watched):
    boxes = CROWDS[crowd]
    draw_boxes(Image.new("RGB", (800, 600)), boxes)
    assert watched.texts == [box.label for box in boxes]
    assert all(0 <= left and 0 <= top and right <= 800 and bottom <= 600 for left, top, right, bottom in watched.places)
    assert covering(watched.places) == []


def test_no_room_is_no_error(watched):
    drawn = draw_boxes(Image.new("RGB", (90, 40)), random_boxes(50, 90, 40))
    assert drawn.size == (90, 40) and len(watched.places) == 50


def test_neighbouring_boxes_have_different_colours_that_white_can_be_read_on():
    """A contrast of 4.5 to 1 and more, as the web's accessibility guidelines ask for."""
    assert len(set(processor.BOX_COLOURS)) == len(processor.BOX_COLOURS)
    for colour in processor.BOX_COLOURS:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, colour


# ------------------------------------------------------------------------------------ labels and fonts


def test_a_label_that_no_font_can_draw_becomes_the_number_of_its_box(watched):
    boxes = [Box("a", 0, 50, 99, 99), Box("长颈鹿", 100, 50, 199, 99), Box("", 0, 150, 99, 199)]
    draw_boxes(Image.new("RGB", (200, 200)), boxes)
    assert watched.texts == ["a", "2", "3"]


FITTED = {
    "as it is": ("giraffe", "giraffe"),
    "what the font lacks": ("giraffe 猫", ""),
    "nothing that it has": ("长颈鹿", ""),
    "nothing to see": (" \n\t\x00 ", ""),
    "one line": ("a\nb\t\tc\x1b\u202ed", "a b c d"),
}


@pytest.mark.parametrize("case", FITTED)
def test_fit_label(case):
    label, expected = FITTED[case]
    assert fit_label(label, ImageFont.load_default(14), 500) == expected


@pytest.mark.parametrize("width", [100, 30, 5, 0, -10])
def test_a_long_label_is_cut_to_its_width(width):
    """Where there is room for nothing, what is left is the sign that something was cut."""
    font, label = ImageFont.load_default(14), "A giraffe at the very back. " * 1000
    fitted = fit_label(label, font, width)
    assert font.getlength(fitted) <= width or fitted == "…"
    assert fitted[-1] == "…" and label.startswith(fitted[:-1])


# ------------------------------------------------------------------------------------ command line


@pytest.fixture
def answer(monkeypatch):
    """answer(text) has the model say it, token by token."""

    def stub(text: str) -> None:
        def say(model, batch, **_):
            tokenizer = golden_model("vl2-mla")[1].tokenizer
            yield from tokenizer.encode(text)
            yield tokenizer.eos_token_id

        monkeypatch.setattr(generate, "stream", say)

    return stub


def command(boxes: Path | str | None, *images: int | Path) -> list[str]:
    """Arguments for an image of the golden files by number, or for a file."""
    folder = golden("vl2-mla").folder
    files = [str(folder / "images" / f"{image}.png") if isinstance(image, int) else str(image) for image in images]
    arguments = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--prompt", "Where is it?"]
    arguments += [argument for file in files for argument in ("--image", file)]
    return arguments + (["--boxes", str(boxes)] if boxes else [])


TWO = grounded("左 the giraffe", "[[100, 200, 500, 600]]") + " and " + grounded("b", "[[0, 0, 9, 99]]")


@pytest.mark.parametrize("name", ["out.png", "out.PNG", "out.webp", "out.jpg"])
def test_boxes_are_drawn_on_the_last_image(name, answer, tmp_path, capsys):
    answer(TWO)
    generate.main(command(tmp_path / name, 2, 5))
    output = capsys.readouterr()
    assert output.out == TWO + "\n"  # the tags are part of the answer, the end token is not
    assert output.err == f"2 boxes drawn in {tmp_path / name}\n"
    assert [file.name for file in tmp_path.iterdir()] == [name]  # nothing else is left behind
    last = Image.open(golden("vl2-mla").folder / "images" / "5.png").convert("RGB")
    expected = draw_boxes(last, parse_boxes(TWO, last.size))
    saved = Image.open(tmp_path / name)
    assert saved.size == last.size
    if name.lower().endswith(".png"):
        assert not changed(expected, saved).any()


def test_the_picture_is_written_once_and_whole(answer, tmp_path, monkeypatch, capsys):
    """A disk that fills up half-way leaves the picture that was there, and no other file."""
    answer(TWO)
    file, attempts = tmp_path / "out.png", []
    file.write_bytes(b"an earlier picture")

    def save_half(image, path):
        attempts.append(Path(path))
        Path(path).write_bytes(b"half a pict")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(SystemExit) as caught:
        generate.main(command(file, 5))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert len(attempts) == 1 and attempts[0].parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"] and file.read_bytes() == b"an earlier picture"


@pytest.mark.parametrize("text", ["I see nothing.", grounded("it", "[[1, 2, 3]]"), grounded("it", "[[5, 5, 5, 5]]")])
def test_nothing_located_writes_no_file(text, answer, tmp_path, capsys):
    answer(text)
    generate.main(command(tmp_path / "out.png", 5))
    output = capsys.readouterr()
    assert output.out == text + "\n"
    assert output.err == f"the answer locates nothing, {tmp_path / 'out.png'} is not written\n"
    assert not list(tmp_path.iterdir())


def test_without_the_option_nothing_is_drawn(answer, tmp_path, monkeypatch, capsys):
    answer(TWO)
    monkeypatch.chdir(tmp_path)
    generate.main(command(None, 5))
    assert capsys.readouterr() == (TWO + "\n", "")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "another kind of file": ("out.gif", [5], "expected a name that ends in .png, .jpg or .webp"),
    "no ending": ("out", [5], "expected a name that ends in .png, .jpg or .webp"),
    "an ending alone": (".png", [5], "expected a name that ends in .png, .jpg or .webp"),
    "no such folder": ("absent/out.png", [5], "expected the name of a file, in a folder that is there"),
    "no image": ("out.png", [], "--boxes draws on an image, give --image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_saved_is_refused_before_anything_is_loaded(case, tmp_path, monkeypatch, capsys):
    name, images, message = REFUSED[case]

    def too_late(*_, **__):
        raise AssertionError("loaded before the options were checked")

    for loader in ("load_model", "Processor", "load_image"):
        monkeypatch.setattr(generate, loader, too_late)
    with pytest.raises(SystemExit) as caught:
        generate.main(command(tmp_path / name, *images))
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", output.err) and message in output.err
    assert not list(tmp_path.iterdir())
