"""The tokenizer against the tokenizers library and sentencepiece, run live.

`python tests/test_tokenizer.py` prints encoding times beside the tokenizers library's.
"""

import json
import os
import random
import time
import unicodedata

import pytest
from conftest import SHARED, needs_shared

import processor
from processor import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

REAL = SHARED / "tokenizers" / "deepseek-llm"
SMALL_FAMILY = SHARED / "golden" / "vl-siglip"  # explicit letter ranges, single digits
LARGE_FAMILY = SHARED / "golden" / "vl2-mha"  # \p{L} and the like, digits in threes
FOLDERS = {"real": REAL, "small family": SMALL_FAMILY, "large family": LARGE_FAMILY}

# Unicode differs between Python's tables and those in the tokenizers library by what was added
# since; the comparison is over what this Python knows.
ASSIGNED = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
WORDS = """The quick brown fox can't describe DeepSeek-VL's image №7 über Øre øl Äpfel naïve ÿ þorn ÷ ö ú
    нещо на Български Ελληνικά 中文分词器。 图像 日本語のテキスト、カタカナ 한국어 문장 हिन्दी पाठ العربية עברית ไทย កាន់តែ ქართული
    ١٢٣ ½ ² ① Ⅷ 3.14159 1234567 0xFF x+=y; {"key": [1, 2]} <div class='a'>&nbsp;</div> ¡Hola! «quoted» “curly” …""".split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\x0b"]
SPACES += ["\x1c", "\x1f", "\x85", "\u00a0", "\u200b", "\u2028", "\u3000"]
EMOJI = ["😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "😶‍🌫️", "🦙"]
SPECIAL = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>", "<image>", "<|ref|>", "<|/ref|>", "<|det|>",
    "<|User|>", "<|Assistant|>", "<｜▁pad▁｜>", "<image", "<｜end▁of", "<<image>>",
]  # fmt: skip
QUIRKS = list("øöúÿõ÷ûýÀùÁþü")


def random_text(rng: random.Random) -> str:
    makers = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(SPACES),
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(SPECIAL),
        lambda: rng.choice(QUIRKS),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 12))),
        lambda: chr(rng.randrange(0x20)),
        lambda: rng.choice("!-/:-~[]{}()'\"\\.,;?&%$#@^*_`|") * rng.randrange(1, 5),
        lambda: "".join(rng.choices(ASSIGNED, k=rng.randrange(1, 6))),
        lambda: chr(rng.randrange(0x300)),
        lambda: rng.choice("aAbz \n") * rng.randrange(1, 30),
    ]
    return "".join(rng.choice(makers)() + rng.choice(["", " "]) for _ in range(rng.randrange(1, 16)))


def pair(name: str):
    """Our tokenizer and the library's, of one vocabulary."""
    folder = FOLDERS[name]
    return load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_equals_the_tokenizers_library_on_generated_texts(name):
    ours, library = pair(name)
    rng = random.Random(name)
    for _ in range(2500):
        text = random_text(rng)
        ids = ours.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids, repr(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip), repr(text)


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
def test_decodes_any_ids_as_the_tokenizers_library(name):
    ours, library = pair(name)
    rng = random.Random(name)
    for _ in range(1000):
        ids = rng.choices(range(ours.vocab_size), k=rng.randrange(1, 20))  # mostly not valid UTF-8
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)
        assert b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace") == ours.decode(ids)
    assert ours.decode([10**6]) == library.decode([10**6]) == ""  # models have rows that no token uses


@needs_shared
def test_vectors_of_the_released_tokenizer():
    tokenizer = load_tokenizer(REAL)
    for vector in json.loads((REAL / "vectors.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(vector["text"]) == vector["ids"], vector["text"]


@needs_shared
def test_letters_that_are_added_tokens():
    ours, library = pair("real")
    assert ours.encode("über") == [100014, 701]
    assert ours.encode("ø") == [100002]
    assert ours.token_bytes(100014) == b"\xfc"  # the raw byte, which alone is not UTF-8
    assert ours.decode([100014, 701]) == library.decode([100014, 701], skip_special_tokens=False) == "\ufffdber"
    assert not ours.is_special(100014)


@pytest.mark.parametrize("category", "LMNPS")
def test_unicode_categories_equal_onigurumas(category):
    text = "".join(ASSIGNED)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"\p{{{category}}}+"), "removed")
    outside = {char for piece, _ in split.pre_tokenize_str(text) for char in piece}
    assert {char for char in ASSIGNED if unicodedata.category(char)[0] != category} == outside
    pattern = processor.re.compile(f"[{processor.unicode_ranges()[category]}]")
    assert {char for char in ASSIGNED if not pattern.fullmatch(char)} == outside


@pytest.mark.parametrize("regex", [r"\s+", r"\S+", r"[^\s]+", r"\s+$", r"\s+(?!\S)"])
def test_white_space_equals_onigurumas(regex):
    text = "x".join(map(chr, range(0x3100))) + "a \n b  \n\n \r\n"
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    ours = [part for part in processor.split_pattern(step).split(text) if part]
    assert ours == [part for part, _ in split.pre_tokenize_str(text)]


LONG_PIECES = {
    "one letter": "a" * 100_000,
    "letters": "".join(random.Random(0).choices("abcdefgh", k=50_000)),
    "Chinese without punctuation": "".join(random.Random(1).choices("的一是了我不人在他有这个上们来到时大地", k=50_000)),
    "spaces": " " * 100_000,
    "newlines": "\n" * 20_000,
    "digits": "1234567890" * 2_000,
    "emoji": "👩‍👩‍👧" * 3_000,
    "punctuation": "=-" * 20_000,
}


@needs_shared
@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("text", LONG_PIECES.values(), ids=LONG_PIECES.keys())
def test_long_pieces(name, text):
    ours, library = pair(name)
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


@needs_shared
def test_merges_written_as_pairs(tmp_path):
    spec = json.loads((SMALL_FAMILY / "tokenizer.json").read_text(encoding="utf-8"))
    as_strings = load_tokenizer(SMALL_FAMILY)
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    as_pairs = load_tokenizer(tmp_path / "tokenizer.json")
    text = "the theatre was there, and then the other"
    assert as_pairs.encode(text) == as_strings.encode(text)
    assert as_pairs.bos_token_id is None and as_strings.bos_token_id == 400  # no tokenizer_config.json beside it


@needs_shared
def test_appended_special_tokens_equal_the_librarys():
    ours, library = pair("real")
    n = ours.vocab_size
    assert ours.token_to_id("<|ref|>") is None
    ours.add_special_tokens(["<image_placeholder>", *processor.VL2_SPECIAL_TOKENS])
    library.add_special_tokens(list(processor.VL2_SPECIAL_TOKENS))
    assert [ours.token_to_id(token) for token in processor.VL2_SPECIAL_TOKENS] == list(range(n, n + 9))
    assert ours.vocab_size == library.get_vocab_size(with_added_tokens=True)
    text = "<|User|>: <image>\n<|ref|>ü <image_placeholder><|/ref|>.\n\n<|Assistant|>:"
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == library.decode(ours.encode(text))
    assert ours.is_special(n) and not ours.is_special(n - 2)


@needs_shared
def test_named_tokens():
    tokenizer = load_tokenizer(LARGE_FAMILY)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (400, 401, 402)
    assert {400, 401, 402, 403} <= tokenizer.special_ids
    assert tokenizer.vocab_size == 411


# ------------------------------------------------------------------------------------- sentencepiece


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"the cat {i} sat on the mat and the dog {i * 7} looked" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        control_symbols=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        user_defined_symbols=["<image_placeholder>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    config = {"bos_token": {"content": "<｜begin▁of▁sentence｜>"}, "eos_token": "<｜end▁of▁sentence｜>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.model"


def test_sentencepiece(sentencepiece_file):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ours = load_tokenizer(sentencepiece_file.parent)
    texts = ["the cat", "  two  spaces ", "A <image_placeholder>picture", "Ω 图像 😀", "", "12\n\n34", "the<image_placeholder>"]
    for text in texts:
        ids = ours.encode(text)
        assert ids == library.encode(text)
        assert ours.decode(ids) == (" " + text if text else "")  # the space that this model puts first
        assert b"".join(map(ours.token_bytes, ids)).decode() == ours.decode(ids)
    end = library.piece_to_id("<｜end▁of▁sentence｜>")
    assert ours.eos_token_id == end and ours.bos_token_id == library.piece_to_id("<｜begin▁of▁sentence｜>")
    ids = ours.encode("the cat<｜end▁of▁sentence｜>sat")
    assert ids == [*library.encode("the cat"), end, *library.encode("sat")]
    assert ours.decode(ids) == " the cat<｜end▁of▁sentence｜> sat"
    assert ours.decode(ids, skip_special_tokens=True) == " the cat sat"
    ours.add_special_tokens(["<image_placeholder>", "<|new|>"])
    assert ours.token_to_id("<|new|>") == library.get_piece_size()
    assert ours.encode("<|new|>") == [library.get_piece_size()]


def test_tokenizer_json_wins_over_tokenizer_model(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), processor.SentencePiece)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------- bad input


def change(spec, path, value):
    *parents, last = path
    for key in parents:
        spec = spec[key]
    if value is KeyError:
        del spec[last]
    else:
        spec[last] = value


BAD_LAYOUTS = {
    "another model": (["model", "type"], "Unigram", "Unigram"),
    "a byte without a token": (["model", "vocab"], {"a": 0}, "not a byte-level BPE tokenizer"),
    "no merges": (["model", "merges"], KeyError, "merges"),
    "a merge of three": (["model", "merges"], ["a b c"], "not a byte-level BPE tokenizer"),
    "a merge of unknown tokens": (["model", "merges"], ["zzzz yyyy"], "zzzz"),
    "byte fallback": (["model", "byte_fallback"], True, "byte_fallback"),
    "dropout": (["model", "dropout"], 0.1, "dropout"),
    "a normalizer": (["normalizer"], {"type": "NFC"}, "NFC"),
    "another decoder": (["decoder"], {"type": "Metaspace"}, "Metaspace"),
    "no pre-tokenizer": (["pre_tokenizer"], None, "not a byte-level BPE tokenizer"),
    "pre-tokenizer without bytes": (["pre_tokenizer"], {"type": "Whitespace"}, "ByteLevel"),
    "unknown step": (["pre_tokenizer", "pretokenizers", 0], {"type": "Whitespace"}, "Whitespace"),
    "another behaviour": (["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed", "Removed"),
    "unknown class in a regex": (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": r"\w+"}, "w"),
    "unknown category in a regex": (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": r"\p{Han}"}, "Han"),
    "a broken regex": (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"Regex": "[a"}, "unterminated"),
    "prefix space": (["pre_tokenizer", "pretokenizers", -1, "add_prefix_space"], True, "ByteLevel"),
    "an added token that strips": (["added_tokens", 0, "lstrip"], True, "lstrip"),
}


@needs_shared
@pytest.mark.parametrize("path, value, message", BAD_LAYOUTS.values(), ids=BAD_LAYOUTS.keys())
def test_a_layout_that_is_not_carried_out_is_refused(path, value, message, tmp_path):
    spec = json.loads((SMALL_FAMILY / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec, path, value)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


@needs_shared
def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at position 3"):
        load_tokenizer(SMALL_FAMILY).encode("abc\ud800")


# ----------------------------------------------------------------------------------------- speed


def print_times() -> None:
    """Seconds to encode 1 MB, ours beside the tokenizers library's on one thread; both with cold caches."""
    rng = random.Random(0)
    mixed = "".join(random_text(rng) for _ in range(30_000)).encode()[:1_000_000].decode(errors="ignore")
    texts = {
        "generated, all scripts": mixed,
        "words of many languages": " ".join(rng.choices(WORDS, k=120_000)),
        "this file, repeated": open(__file__, encoding="utf-8").read() * 70,
        "one letter": "a" * 1_000_000,
        "Chinese, no punctuation": "".join(rng.choices("的一是了我不人在他有这个上们来到时大地为子", k=333_333)),
    }
    for name in ("real", "large family"):
        for kind, text in texts.items():
            ours, library = pair(name)
            start = time.perf_counter()
            ids = ours.encode(text)
            middle = time.perf_counter()
            (expected,) = library.encode_batch_fast([text], add_special_tokens=False)  # no offsets, as ours
            a, b = middle - start, time.perf_counter() - middle
            assert ids == expected.ids
            times = f"ours {a:5.2f} s  tokenizers {b:5.2f} s  ratio {a / b:4.1f}"
            print(f"{name:13} {kind:25} {len(text.encode()):8} bytes  {times}")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print_times()
