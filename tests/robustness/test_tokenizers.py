"""Damaged and hostile tokenizer.json files: one line that names the file, at once; what is read cuts as the library."""

import json
import random
import unicodedata

import pytest
from checkpoints import ABSENT
from conftest import golden

import processor
from processor import load_tokenizer

SMALL = (golden("vl-siglip").folder / "tokenizer.json").read_text(encoding="utf-8")
STEPS = ("pre_tokenizer", "pretokenizers")
REGEX = (*STEPS, 0, "pattern", "Regex")


def write(folder, path: tuple, value):
    """A new folder's tokenizer.json: the small family's with another value at one place."""
    *parents, last = path
    spec = place = json.loads(SMALL)
    for key in parents:
        place = place[key]
    place[last] = value
    if value is ABSENT:
        del place[last]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def assert_refused(folder, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(folder).encode("a" * 28)
    message = str(error.value)
    assert str(folder / "tokenizer.json") in message and "\n" not in message and len(message) < 400 + len(str(folder))


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAKEN = [GPT2, LLAMA3, r"[a-c\-\]^]+", r"a{2}|b{0,2}c", r"\s?[!-/:-~]+", "[\r\n]", r"\.|\\|\$", "x$", r"[^^&|~]+"]
TAKEN += [r"\s+", r"\S+", r"[^\s]+", r"\s+$", r"\s+(?!\S)", *(rf"\p{{{category}}}+" for category in "LMNPS")]
# The library's tables of Unicode are newer than Python's; the comparison is over what this Python knows.
ASSIGNED = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
LONG_TEXTS = ["".join(ASSIGNED), "x".join(char for char in ASSIGNED if char < "\u3100") + "a \n b  \n\n \r\n"]
ALPHABET = [*"aabcxyzéßſK'.-^&|~[]\\$ \t\r\n\u3000\x1c", "'S", "'ſ", "'LL", "'vE", "12345", "中文", "😀"]


@pytest.mark.parametrize("regex", TAKEN)
def test_regular_expressions_that_are_taken(regex, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file = write(tmp_path, REGEX, regex) / "tokenizer.json"
    ours, library = load_tokenizer(file), tokenizers.Tokenizer.from_file(str(file))
    cut = processor.split_pattern(json.loads(file.read_text())["pre_tokenizer"]["pretokenizers"][0])
    split, rng = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 12))) for _ in range(1000)]
    for text in [*texts, *LONG_TEXTS]:
        expected = [part for part, _ in split.pre_tokenize_str(text)]
        assert [part for part in cut.split(text) if part] == expected
    for text in texts:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text


REFUSED = [
    "(?:a+)+b", "(a+)+b", "(?:a|a)*b", "a?" * 28 + "a" * 28, r"a+a+b", r"\s+\s+\s+\s+b",  # backtracking
    "a{99999999999}", "a{1,99999999999}", "a{3,1}", "(?:" * 900 + "a" + ")" * 900, "[" * 900,
    "[a-z&&b]", "[a&&b]", "[a||b]", "[a~~b]", "[a--b]", "[[a]b]", "[[:alpha:]]", "[]a]", "[z-a]", r"[a-\s]", r"[\t-\s]",
    "a{2}+", "a{2}?", "a*+", "a+?", "a??", "a{,3}", "a{", "(?P<n>a)", "(?<n>a)", "(?i:ß)", "(?i:ss)", "(?i)a", "(?>a)",
    "(?=a)", "(?<=a)b", "(?#c)", r"a\b", r"\w", r"\d", r"\h", r"\X", r"\R", r"\1", r"\x41", r"\u0041",
    r"\A", r"\z", r"\G", r"\P{L}", r"\p{^L}", r"\p{Lu}", r"\p{Han}", r"\p{C}",
    "^a", ".", "a*", "a|", "|a", "", "$", r"(?!\S)", "(?!a)",
    "]", "}", "\\", "a)", "(a", "a**", "[a", "[\\", "$*", r"(?!\S)+",
]  # fmt: skip


@pytest.mark.parametrize("regex", REFUSED, ids=lambda regex: ascii(regex[:20]))
def test_other_regular_expressions_are_refused(regex, tmp_path):
    assert_refused(write(tmp_path, REGEX, regex), "regular expression|min repeat|character range")


def test_a_long_text_does_not_backtrack_without_end(tmp_path):
    """The slowest shape that is taken; it would never return if it took more than quadratic time."""
    tokenizer = load_tokenizer(write(tmp_path, REGEX, r"a?a{0,9}a+b"))
    assert tokenizer.decode(tokenizer.encode("a" * 2000)) == "a" * 2000


*CUTS, BYTES = json.loads(SMALL)["pre_tokenizer"]["pretokenizers"]
TOKENS = json.loads(SMALL)["added_tokens"]
(PICTURE,) = (token for token in TOKENS if token["content"] == "<image_placeholder>")
NOT_BPE, WHITESPACE, NEW = "not a byte-level BPE tokenizer", {"type": "Whitespace"}, TOKENS[0] | {"content": "<new>"}
BAD = [  # where in tokenizer.json, what stands there, words of the error
    (("model", "type"), "Unigram", "Unigram"), (("model", "byte_fallback"), True, "byte_fallback"),
    (("model", "dropout"), 0.1, "dropout"), (("model", "vocab"), {"a": 0}, NOT_BPE),
    (("model", "vocab", "zzz"), -1, "whole number"), (("model", "vocab", "zzz"), True, "whole number"),
    (("model", "vocab", "zzz"), 2**63, "whole number"), (("model", "vocab", "zzz"), 5, "contradicts another token"),
    (("model", "merges"), ABSENT, "merges"), (("model", "merges"), ["a b c"], NOT_BPE),
    (("model", "merges"), ["zzzz yyyy"], "zzzz"), (("model", "merges"), [["x" * 10**6, "y"]], "xxx.* is missing"),
    (("normalizer",), {"type": "NFC"}, "NFC"), (("decoder",), {"type": "Metaspace"}, "Metaspace"),
    (("pre_tokenizer",), None, NOT_BPE), (("pre_tokenizer",), WHITESPACE, "ByteLevel"),
    ((*STEPS, 0), WHITESPACE, "Whitespace"), ((*STEPS, 0, "behavior"), "Removed", "Removed"),
    ((*STEPS, -2, "individual_digits"), "false", "individual_digits is"),
    ((*STEPS, -1, "add_prefix_space"), True, "ByteLevel"),
    (STEPS, [BYTES, *CUTS], "last step"), (STEPS, [*CUTS[:-1], BYTES, CUTS[-1]], "last step"),
    (STEPS, [BYTES, *CUTS, BYTES], "last step"), (STEPS, [*CUTS, BYTES, BYTES], "last step"),
    (("added_tokens", 0, "lstrip"), True, "lstrip"),
    *((("added_tokens",), [*TOKENS, token], words) for token, words in (
        (NEW | {"id": -1}, "whole number"), (NEW | {"content": "", "id": 500}, "some text"),
        (NEW | {"content": "x" * 10**6, "id": "y" * 10**6}, "some text"), (TOKENS[0] | {"id": 500}, "contradicts"),
        (NEW, "contradicts"), (NEW | {"id": 5}, "contradicts"),  # the id of another token
        (PICTURE | {"content": "<other>"}, "<other>.*contradicts"),  # it would count as a picture
        (NEW | {"id": 500, "special": "false"}, "expected True or False"),
    )),
]  # fmt: skip


@pytest.mark.parametrize("path, value, words", BAD, ids=map(str, range(len(BAD))))
def test_what_is_not_carried_out_is_refused(path, value, words, tmp_path):
    assert_refused(write(tmp_path, path, value), words)
