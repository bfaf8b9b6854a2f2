"""Damaged and hostile tokenizer.json files: one line that names the file, at once; what is read cuts as the library."""

import json
import random

import pytest
from conftest import golden

import processor
from processor import load_tokenizer

FOLDER = golden("vl-siglip").folder
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAKEN = [GPT2, LLAMA3, r"[a-c\-\]^]+", r"a{2}|b{0,2}c", r"\s?[!-/:-~]+", "[\r\n]", r"\.|\\|\$", "x$", r"[^^&|~]+"]


def write(folder, change):
    """The small family's tokenizer.json with one change, in a new folder."""
    spec = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def set_regex(spec, regex):
    steps_of(spec)[0]["pattern"] = {"Regex": regex}


def assert_refused(folder, words=""):
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(folder).encode("a" * 28)
    message = str(error.value)
    assert str(folder / "tokenizer.json") in message and "\n" not in message and len(message) < 400 + len(str(folder))


@pytest.mark.parametrize("regex", TAKEN)
def test_regular_expressions_that_are_taken(regex, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = write(tmp_path, lambda spec: set_regex(spec, regex))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    ours, library = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut, rng = processor.split_pattern(step), random.Random(0)
    alphabet = [*"aabcxyzéßſK'.-^&|~[]\\$ \t\r\n\u3000\x1c", "'S", "'ſ", "'LL", "'vE", "12345", "中文", "😀"]
    for _ in range(1000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        assert [part for part in cut.split(text) if part] == [part for part, _ in split.pre_tokenize_str(text)], text
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text


REFUSED = [
    "(?:a+)+b", "(a+)+b", "(?:a|a)*b", "a?" * 28 + "a" * 28, r"a+a+b", r"\s+\s+\s+\s+b",  # backtracking
    "a{99999999999}", "a{1,99999999999}", "a{3,1}", "(?:" * 900 + "a" + ")" * 900, "[" * 900,
    "[a-z&&b]", "[a&&b]", "[a||b]", "[a~~b]", "[a--b]", "[[a]b]", "[[:alpha:]]", "[]a]", "[z-a]", r"[a-\s]", r"[\t-\s]",
    "a{2}+", "a{2}?", "a*+", "a+?", "a??", "a{,3}", "a{", "(?P<n>a)", "(?<n>a)", "(?i:ß)", "(?i:ss)", "(?i)a", "(?>a)",
    "(?=a)", "(?<=a)b", "(?#c)", r"a\b", r"\w", r"\d", r"\h", r"\X", r"\R", r"\1", r"\x41", r"\u0041",
    r"\A", r"\z", r"\G", r"\P{L}", r"\p{^L}", r"\p{Lu}", r"\p{Han}", r"\p{C}",
    "^a", ".", "a*", "a|", "|a", "", "$", r"(?!\S)", "(?!a)",
    "]", "}", "\\", "a)", "(a", "a**", "[\\", "$*", r"(?!\S)+",
]  # fmt: skip


@pytest.mark.parametrize("regex", REFUSED, ids=lambda regex: ascii(regex[:20]))
def test_other_regular_expressions_are_refused(regex, tmp_path):
    folder = write(tmp_path, lambda spec: set_regex(spec, regex))
    assert_refused(folder, "regular expression|min repeat|character range")


def add_token(**changes):
    return lambda spec: spec["added_tokens"].append(spec["added_tokens"][0] | changes)


def second_picture(spec):
    picture = next(token for token in spec["added_tokens"] if token["content"] == "<image_placeholder>")
    spec["added_tokens"].append(picture | {"content": "<other>"})


def steps_of(spec) -> list:
    return spec["pre_tokenizer"]["pretokenizers"]


def byte_level(*places):
    """Puts ByteLevel at the given places and nowhere else."""

    def change(spec):
        last = steps_of(spec).pop()
        for place in places:
            steps_of(spec).insert(place, last)

    return change


BAD = {
    "a negative id": (lambda spec: spec["model"]["vocab"].update(zzz=-1), "whole number"),
    "an id of a truth": (lambda spec: spec["model"]["vocab"].update(zzz=True), "whole number"),
    "an id beyond any": (lambda spec: spec["model"]["vocab"].update(zzz=2**63), "whole number"),
    "one id for two": (lambda spec: spec["model"]["vocab"].update(zzz=5), "contradicts another token"),
    "a negative added id": (add_token(content="<new>", id=-1), "whole number"),
    "a long token of a merge": (lambda spec: spec["model"]["merges"].append(["x" * 10**6, "y"]), "xxx.* is missing"),
    "an empty added token": (add_token(content="", id=500), "some text"),
    "a long added token of no id": (add_token(content="x" * 10**6, id="y" * 10**6), "some text"),
    "the id of another added token": (add_token(content="<new>"), "contradicts"),
    "the id of a token": (add_token(content="<new>", id=5), "contradicts"),
    "another id for an added token": (add_token(id=500), "contradicts"),
    "a flag as text": (add_token(content="<new>", id=500, special="false"), "expected True or False"),
    "digits as text": (lambda spec: steps_of(spec)[-2].update(individual_digits="false"), "individual_digits is"),
    "a second token with the picture's id": (second_picture, "<other>.*contradicts"),  # it would count as a picture
    "ByteLevel first": (byte_level(0), "last step"),
    "ByteLevel before the last": (byte_level(-1), "last step"),
    "ByteLevel twice": (byte_level(0, 100), "last step"),
    "ByteLevel twice at the end": (byte_level(100, 100), "last step"),
}


@pytest.mark.parametrize("change, words", BAD.values(), ids=BAD)
def test_bad_entries(change, words, tmp_path):
    assert_refused(write(tmp_path, change), words)


def test_a_long_text_does_not_backtrack_without_end(tmp_path):
    """The slowest shape that is taken; it would never return if it took more than quadratic time."""
    tokenizer = load_tokenizer(write(tmp_path, lambda spec: set_regex(spec, r"a?a{0,9}a+b")))
    assert tokenizer.decode(tokenizer.encode("a" * 2000)) == "a" * 2000
