"""The tokenizer against the tokenizers library and sentencepiece, run live."""

import json
import random
import shutil
import unicodedata

import pytest
from conftest import SHARED, golden

import processor
from processor import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

REAL = SHARED / "tokenizers" / "deepseek-llm"
SMALL_FAMILY = golden("vl-siglip").folder  # explicit letter ranges, single digits
LARGE_FAMILY = golden("vl2-mha").folder  # \p{L} and the like, digits in threes

# The library's tables of Unicode are newer than Python's; the comparison is over what this Python knows.
ASSIGNED = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
WORDS = """The quick brown fox can't describe DeepSeek-VL's image №7 über Øre øl Äpfel naïve ÿ þorn ÷ ö ú
    нещо на Български Ελληνικά 中文分词器。 图像 日本語のテキスト、カタカナ 한국어 문장 हिन्दी पाठ العربية עברית ไทย កាន់តែ ქართული
    ١٢٣ ½ ² ① Ⅷ 3.14159 1234567 0xFF x+=y; {"key": [1, 2]} <div class='a'>&nbsp;</div> ¡Hola! «quoted» “curly” …""".split()
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", *"\x0b\x1c\x1f\x85\u00a0\u200b\u2028\u3000"]
EMOJI = ["😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "👍🏽", "❤️", "😶‍🌫️", "🦙"]
SPECIAL = """<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <image_placeholder> <image> <|ref|> <|/ref|> <|det|> <|User|>
    <|Assistant|> <｜▁pad▁｜> <image <｜end▁of <<image>>""".split()
QUIRKS = list("øöúÿõ÷ûýÀùÁþü")  # added tokens of the released vocabulary


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(1, 16)):
        number = str(rng.randrange(10 ** rng.randrange(1, 12)))
        run = rng.choice("aA \n.-{'%\x00") * rng.randrange(1, 30)
        strange = "".join(rng.choices(ASSIGNED, k=rng.randrange(1, 6)))
        known = rng.choice(rng.choice([WORDS, SPACES, EMOJI, SPECIAL, QUIRKS]))
        parts += rng.choices([known, number, run, strange], weights=[5, 1, 1, 1]) + [rng.choice(["", " "])]
    return "".join(parts)


LONG_PIECES = [
    "a" * 100_000, "".join(random.Random(0).choices("abcdefgh", k=50_000)), " " * 100_000, "\n" * 20_000,
    "".join(random.Random(1).choices("的一是了我不人在他有这个上们来到时大地", k=50_000)), "1234567890" * 2_000, "👩‍👩‍👧" * 3_000,
    "=-" * 20_000,
]  # fmt: skip


def assert_equals_the_library(folder, texts: int, sequences: int) -> tuple:
    """Ours, and the library's of the same file: on random texts, on random ids, on long pieces."""
    ours, library = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    rows = [rng.choices(range(ours.vocab_size), k=rng.randrange(1, 20)) for _ in range(sequences)]  # rarely UTF-8
    for text in [*(random_text(rng) for _ in range(texts)), *LONG_PIECES]:
        rows.append(ours.encode(text))
        assert rows[-1] == library.encode(text, add_special_tokens=False).ids, repr(text[:200])
    for ids in [*rows, [10**6]]:  # models have rows that no token uses
        for skip in (False, True):
            decoded = ours.decode(ids, skip_special_tokens=skip)
            assert decoded == library.decode(ids, skip_special_tokens=skip), ids[:50]
        assert b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace") == ours.decode(ids)
    return ours, library


@pytest.mark.parametrize("folder", [SMALL_FAMILY, LARGE_FAMILY], ids=["small family", "large family"])
def test_equals_the_tokenizers_library(folder):
    assert_equals_the_library(folder, texts=1200, sequences=400)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the released tokenizer is not at {REAL}")
def test_the_released_tokenizer():
    """Its vectors; the library; letters that are added tokens; VL2's tokens, appended behind them."""
    ours, library = assert_equals_the_library(REAL, texts=1200, sequences=300)
    for vector in json.loads((REAL / "vectors.json").read_text(encoding="utf-8")):
        assert ours.encode(vector["text"]) == vector["ids"], vector["text"]

    assert ours.encode("ø über") == [100002, 207, 100014, 701]
    assert ours.token_bytes(100014) == b"\xfc" and not ours.is_special(100014)  # the raw byte, which is not UTF-8
    assert ours.decode([100014, 701]) == "\ufffdber"

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


def test_merges_written_as_pairs_and_named_tokens(tmp_path):
    spec = json.loads((SMALL_FAMILY / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    as_strings, as_pairs = load_tokenizer(SMALL_FAMILY), load_tokenizer(tmp_path / "tokenizer.json")
    text = "the theatre was there, and then the other"
    assert as_pairs.encode(text) == as_strings.encode(text)
    assert as_pairs.bos_token_id is None and as_strings.bos_token_id == 400  # no tokenizer_config.json beside it
    large = load_tokenizer(LARGE_FAMILY)
    assert (large.bos_token_id, large.eos_token_id, large.pad_token_id, large.vocab_size) == (400, 401, 402, 411)
    assert all(large.is_special(id) for id in (400, 401, 402, 403))


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    begin, end, picture = SPECIAL[:3]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the cat {i} sat on the mat and the dog {i * 7} looked" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, control_symbols=[begin, end], user_defined_symbols=[picture],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    config = {"bos_token": {"content": begin}, "eos_token": end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in ("the cat", "  two  spaces ", f"A {picture}picture", "Ω 图像 😀", "", "12\n\n34", f"the{picture}"):
        ids = ours.encode(text)
        assert ids == library.encode(text)
        assert ours.decode(ids) == (" " + text if text else "")  # the space that this model puts first
        assert b"".join(map(ours.token_bytes, ids)).decode() == ours.decode(ids)
    assert (ours.bos_token_id, ours.eos_token_id) == (library.piece_to_id(begin), library.piece_to_id(end))
    ids = ours.encode(f"the cat{end}sat")
    assert ids == [*library.encode("the cat"), ours.eos_token_id, *library.encode("sat")]
    assert ours.decode(ids) == f" the cat{end} sat"
    assert ours.decode(ids, skip_special_tokens=True) == " the cat sat"
    ours.add_special_tokens([picture, "<|new", "<|new|>"])  # of tokens that begin at one place the longest counts
    assert ours.encode("<|new|>") == [ours.token_to_id("<|new|>")] == [library.get_piece_size() + 1]

    shutil.copy(SMALL_FAMILY / "tokenizer.json", tmp_path)  # read where a folder has both
    assert load_tokenizer(tmp_path).encode("the cat") == load_tokenizer(SMALL_FAMILY).encode("the cat")


def test_missing_and_broken_files_and_texts(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{folder.name}: expected a tokenizer.json"):
            load_tokenizer(folder)
    for name, content, message in (
        ("tokenizer.json", b"{", "tokenizer.json: not valid JSON"), ("tokenizer.json", b"[1]", "expected a JSON object"),
        ("tokenizer.model", b"not a model", "tokenizer.model: (not a SentencePiece model|reading this needs)"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="lone surrogate at position 3"):
        load_tokenizer(SMALL_FAMILY).encode("abc\ud800")
