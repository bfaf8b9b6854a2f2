"""From a conversation with pictures to the tensors that DeepSeek-VL and DeepSeek-VL2 read.

In the order of reading:

1. `Settings`: what a checkpoint's JSON files say, checked.
2. `load_tokenizer`: byte-level byte-pair encoding by hand; SentencePiece where a checkpoint ships that.
3. `load_image`: a path, an address or a PIL image becomes an upright RGB picture.
4. Pixels: the picture becomes square float32 inputs (DeepSeek-VL) or tiles (DeepSeek-VL2).
5. Prompts: a conversation becomes pieces of text, each either learnt in training or not.
6. `Processor`: all of it together, for a batch of conversations padded on the left.
7. `parse_boxes`, `draw_boxes`: what an answer of DeepSeek-VL2 locates.

Shape letters: B batch (conversations), T tokens of the longest prompt; sides in pixels are spelled out.
Sources: DeepSeek-VL (arXiv 2403.05525), DeepSeek-VL2 (arXiv 2412.10302) and their released code;
byte-pair encoding: arXiv 1508.07909; its byte-level form: the GPT-2 report (2019).
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import accumulate, cycle, groupby
from numbers import Real
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor


def reason(error: Exception | str) -> str:
    """What went wrong, in one line."""
    if isinstance(error, KeyError):
        return f"{str(error)[:80]} is missing"
    return " ".join(str(error).split())[:500] or type(error).__name__


# ----------------------------------------------------------------------------------------- 1. JSON files

MAX_COUNT = 10**12


def check_is_no_pointer(path: Path) -> None:
    """Raise ValueError for the small text that a clone without git-lfs has in a large file's place."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path}: a git-lfs pointer and not the file it stands for, run `git lfs pull`")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_is_no_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


class Settings:
    """The entries of a JSON object; None is an empty one. An error names the file, the key and what was expected."""

    def __init__(self, values: object, name: str):
        self.values: dict[str, object] = {}
        self.names: dict[str, str] = {}  # of the file of each key
        self.add({} if values is None else values, name)

    def add(self, values: object, name: str) -> None:
        """The entries of another file; they replace those of the same key."""
        if not isinstance(values, dict):
            raise ValueError(f"{name}: expected an object, found a {type(values).__name__}")
        self.values |= values
        self.names |= dict.fromkeys(values, name)
        self.name = name  # where a missing key should have been

    def section(self, key: str) -> Settings:
        """The object inside; an absent or null one is empty."""
        return type(self)(self.values.get(key), f"{self.name}: {key}")

    def refuse(self, key: str, expected: str) -> None:
        found = repr(self.values[key])[:80] if key in self.values else "missing"
        raise ValueError(f"{self.names.get(key, self.name)}: {key} is {found}, expected {expected}")

    def one_of(self, key: str, *choices: object) -> object:
        """One of a few values; the first where the key is absent. 1 and 1.0 are not True."""
        value = self.values.get(key, choices[0])
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            self.refuse(key, " or ".join(map(repr, choices)))
        return value

    def integer(self, key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        return self.numbers(key, (default,), 1, most, int)[0]

    def numbers(self, key: str, default: tuple, least: float, most: float, kind: type = float) -> tuple:
        """As many numbers as in `default`: a list, or one number alone. A `kind` of int refuses 3.0."""
        value = self.values.get(key, default)
        values = [value] if len(default) == 1 and key in self.values else value
        fits = isinstance(values, (list, tuple)) and len(values) == len(default)
        if not fits or not all(type(number) in (int, kind) and least <= number <= most for number in values):
            one, several = ("an integer", "integers") if kind is int else ("a number", "numbers")
            self.refuse(key, f"{one if len(default) == 1 else f'{len(default)} {several}'} from {least} to {most}")
        return tuple(values)


# ----------------------------------------------------------------------------------------- 2. Tokenizer


class Tokenizer:
    """Text to token ids and back. A subclass defines `encode_text` and `token_bytes`.

    Added tokens (`<image>`, end of sentence, ...) are matched in the raw text first. The leftmost match wins;
    of several that start there, the longest. As in the tokenizers library, there are two passes: tokens marked
    not normalized, then the others in the text that remains.

    tokenizer_config.json names bos_token_id, eos_token_id and pad_token_id; each is None where it does not.
    """

    def __init__(self, ids: dict[str, int], config: dict):
        self.ids = ids
        self.tokens = {id: token for token, id in ids.items()}
        self.added: dict[str, bool] = {}  # whether it is marked normalized
        self.special_ids: set[int] = set()
        self.config = config

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that holds no added token."""
        raise NotImplementedError

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, perhaps part of a character; b"" for an unused id."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids; added tokens in the text become their ids, and no begin token is put in front."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text with a lone surrogate at position {error.start} cannot be tokenized") from error
        ids: list[int] = []
        for outer in self.raw_pattern.split(text):
            for part in [outer] if outer in self.added else self.normalized_pattern.split(outer):
                if part in self.added:
                    ids.append(self.ids[part])
                elif part:
                    ids += self.encode_text(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of all token_bytes joined, with U+FFFD for bytes that are not UTF-8."""
        skipped = self.special_ids if skip_special_tokens else ()
        kept = (int(id) for id in ids if int(id) not in skipped)
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def add_special_tokens(self, tokens: Iterable[str]) -> None:
        """Makes each token special; those the vocabulary lacks are appended after the highest id."""
        for token in tokens:
            if token not in self.ids:
                self.ids[token] = self.vocab_size
                self.tokens[self.ids[token]] = token
            self.added.setdefault(token, False)
            self.special_ids.add(self.ids[token])
        self.compile_added()

    def compile_added(self) -> None:
        """The patterns that cut added tokens out of a text; a change of `added` makes them anew."""

        def either(normalized: bool) -> re.Pattern:
            tokens = [token for token in self.added if self.added[token] is normalized]
            longest_first = map(re.escape, sorted(tokens, key=len, reverse=True))
            return re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) matches nothing

        self.raw_pattern, self.normalized_pattern = either(False), either(True)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id in use."""
        return max(self.tokens) + 1

    def token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def is_special(self, id: int) -> bool:
        return id in self.special_ids

    def _named(self, role: str) -> int | None:
        token = self.config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(token) if isinstance(token, str) else None

    bos_token_id = property(lambda self: self._named("bos_token"))
    eos_token_id = property(lambda self: self._named("eos_token"))
    pad_token_id = property(lambda self: self._named("pad_token"))


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or in a tokenizer.json or tokenizer.model file.

    In a folder with both, tokenizer.json is read. Names of the begin, end and padding tokens come
    from a tokenizer_config.json beside it. Raises FileNotFoundError or ValueError, naming the file.
    """
    path = Path(path)
    files = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: expected a tokenizer.json or tokenizer.model")
    check_is_no_pointer(file)
    config_file = file.with_name("tokenizer_config.json")
    config = read_json(config_file) if config_file.exists() else {}
    return SentencePiece(file, config) if file.suffix == ".model" else ByteLevelBPE(file, config)


# Byte-level BPE writes each byte as one printable character. Bytes that are printable in Latin-1
# stand for themselves; the other 68 (controls, space, delete, soft hyphen) take U+0100 onwards.
PRINTABLE_BYTES = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
CHAR_TO_BYTE = {chr(byte): byte for byte in PRINTABLE_BYTES}
CHAR_TO_BYTE |= {chr(0x100 + index): byte for index, byte in enumerate(OTHER_BYTES)}
# These 13 bytes never occur in UTF-8. DeepSeek-LLM's vocabulary has them only as added tokens, one character each.
# Added tokens are matched in the text itself, so the letter `ü` becomes the token of byte 0xFC and decodes to it.
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}

# What ByteLevelBPE implements: the values that each part of a tokenizer.json may have; a missing key is None.
# `post_processor`, `truncation` and `padding` are ignored: they change only what surrounds the ids of a text.
OFF, FLAGS, UNUSED = [False], [True, False], [None, False, 0, 0.0, ""]
SUPPORTED = {
    "model": {
        "type": ["BPE"], "dropout": UNUSED, "unk_token": UNUSED, "continuing_subword_prefix": UNUSED,
        "end_of_word_suffix": UNUSED, "fuse_unk": UNUSED, "byte_fallback": UNUSED, "ignore_merges": UNUSED,
    },
    "normalizer": {"type": [None, "Sequence"], "normalizers": [[]]},
    "decoder": {"type": ["ByteLevel"]},
    "added token": {"single_word": OFF, "lstrip": OFF, "rstrip": OFF, "normalized": FLAGS, "special": FLAGS},
    "Split": {"behavior": ["Isolated"], "invert": OFF},
    "Digits": {"individual_digits": FLAGS},
    "ByteLevel": {"add_prefix_space": OFF, "use_regex": OFF},
}  # fmt: skip


def check_supported(part: object, kind: str, name: str = "") -> None:
    """Raises ValueError for a part of a tokenizer.json that says what SUPPORTED does not list."""
    settings = Settings(part, f"{kind} {name}".strip())
    settings.values = dict.fromkeys(SUPPORTED[kind]) | settings.values
    for key, choices in SUPPORTED[kind].items():
        settings.one_of(key, *choices)


class ByteLevelBPE(Tokenizer):
    """Byte-level byte-pair encoding from a tokenizer.json.

    A text is cut by a list of regular expressions into pieces (words, numbers, punctuation); each
    piece starts as its UTF-8 bytes, and the neighbouring pair whose merge was learnt earliest is
    merged, again and again, until no neighbours have a merge.
    """

    def __init__(self, file: Path, config: dict):
        super().__init__({}, config)
        spec = read_json(file)
        try:
            for part in ("model", "normalizer", "decoder"):
                if part == "model" or spec.get(part):
                    check_supported(spec[part], part)
            model, added = spec["model"], spec["added_tokens"]
            for token, id in [*model["vocab"].items(), *((token["content"], token["id"]) for token in added)]:
                if not isinstance(token, str) or not token or type(id) is not int or not 0 <= id < 2**31:
                    found = f"token {str(token)[:80]!r} has id {str(id)[:80]}"
                    raise ValueError(f"{found}, expected some text and a whole number from 0 to 2**31 - 1")
                if self.ids.setdefault(token, id) != id or self.tokens.setdefault(id, token) != token:
                    raise ValueError(f"token {token[:80]!r} with id {id} contradicts another token")
            for token in added:
                check_supported(token, "added token", repr(token["content"][:80]))
                self.added[token["content"]] = token["normalized"]
                if token["special"]:
                    self.special_ids.add(token["id"])
            self.split_patterns = [split_pattern(step) for step in pre_tokenizer_steps(spec["pre_tokenizer"])]
            self.byte_ids = {byte: self.ids[char] for char, byte in CHAR_TO_BYTE.items() if byte not in NEVER_IN_UTF8}
            # (left id, right id) -> rank, and rank -> id of the merged token; a low rank is merged first
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            self.ranks = {(self.ids[left], self.ids[right]): rank for rank, (left, right) in enumerate(merges)}
            self.merged_ids = [self.ids[left + right] for left, right in merges]
        except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
            raise ValueError(f"{file}: not a byte-level BPE tokenizer as expected: {reason(error)}") from error
        self.compile_added()

    def encode_text(self, text: str) -> list[int]:
        pieces = [text]
        for pattern in self.split_patterns:
            # split() with a group returns what lies between matches and the matches, in order
            pieces = [part for piece in pieces for part in pattern.split(piece) if part]
        ids = {piece: self.merge(piece) for piece in set(pieces)}  # words repeat
        return [id for piece in pieces for id in ids[piece]]

    def merge(self, piece: str) -> list[int]:
        """Ids of one piece, in n log n of its n bytes: a heap of possible merges over a linked list of tokens.

        A heap entry is `rank * n + position of the left token`, so that equal ranks go left to right.
        """
        ids = [self.byte_ids[byte] for byte in piece.encode()]
        n = len(ids)
        before, after = list(range(-1, n)), list(range(1, n + 1))  # position n is the end of the piece
        pairs = enumerate(zip(ids, ids[1:]))
        heap = [self.ranks[pair] * n + left for left, pair in pairs if pair in self.ranks]
        heapify(heap)
        while heap:
            rank, left = divmod(heappop(heap), n)
            right = after[left]
            if right == n or self.ranks.get((ids[left], ids[right])) != rank:
                continue  # an earlier merge took one of the two
            ids[left], ids[right] = self.merged_ids[rank], -1
            after[left] = after[right]
            before[after[right]] = left
            for a, b in ((before[left], left), (left, after[left])):  # the new token with either neighbour
                if a >= 0 and b < n and (rank := self.ranks.get((ids[a], ids[b]))) is not None:
                    heappush(heap, rank * n + a)
        return [id for id in ids if id >= 0]

    def token_bytes(self, id: int) -> bytes:
        token = self.tokens.get(id, "")
        try:
            return bytes(CHAR_TO_BYTE[char] for char in token)
        except KeyError:  # an added token is plain text, unless all of it happens to lie in the byte alphabet
            return token.encode()


def pre_tokenizer_steps(pre_tokenizer: dict) -> list[dict]:
    """The steps before ByteLevel, which must be last. ByteLevel cuts nothing; merge() does its byte mapping."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if [index for index, step in enumerate(steps) if step["type"] == "ByteLevel"] != [len(steps) - 1]:
        raise ValueError("expected a pre-tokenizer whose last step, and no other, is ByteLevel")
    check_supported(steps[-1], "ByteLevel")
    return steps[:-1]


def split_pattern(step: dict) -> re.Pattern:
    """One step of the pre-tokenizer as a pattern with one group around the whole match."""
    if step["type"] not in ("Split", "Digits"):
        raise ValueError(f"pre-tokenizer step {json.dumps(step)[:200]} is not supported")
    check_supported(step, step["type"])
    if step["type"] == "Split":
        regex = step["pattern"]["Regex"]
    else:
        regex = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    return re.compile(f"({python_regex(regex)})", re.MULTILINE)  # Oniguruma's $: any line's end


# The supported subset of regular expressions covers the released files, GPT-2 and Llama 3. Each construct below
# means the same in Python as in Oniguruma, and no group can be repeated.
ESCAPE = r"\\[rnt\\\[\](){}|?*+.^$/-]"
CATEGORY = r"\\p\{[LMNPS]\}"
CLASS_CHARACTER = rf"(?:{ESCAPE}|(?!&&|\|\||~~)[^\\\[\]-])"  # doubled, those three are or may become set operations
REGEX_ITEM = (
    rf"(?:\[\^?(?:{CLASS_CHARACTER}(?:-{CLASS_CHARACTER})?|\\s|{CATEGORY})+\]"  # a class
    rf"|{CATEGORY}|\\[sS]|{ESCAPE}|[^\\\[\](){{}}|?*+.^$])"  # one character
    r"(?P<quantifier>[?*+]|\{\d(?:,\d)?\})?"
    r"|\(\?!\\S\)|\$|\|"
    r"|\(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)"  # no letters here fold to several, as ss to ß does
)


def python_regex(pattern: str) -> str:
    """Oniguruma's syntax in Python's: \\p{L}, \\s, \\S as explicit ranges.

    Raises ValueError for other constructs than REGEX_ITEM's, for a pattern that matches an empty text, and for one
    that could take more than quadratic time: an alternative has at most three quantifiers, of which at most one
    before its last item is * or +.
    """
    unknown = pattern[re.match(f"(?:{REGEX_ITEM})*", pattern).end() :]
    if unknown:
        raise ValueError(f"a regular expression is not supported, or unterminated, from {unknown[:40]!r} on")
    quantifiers: list[str | None] = []
    for item in re.finditer(REGEX_ITEM, pattern):
        quantifiers = [] if item[0] == "|" else [*quantifiers, item["quantifier"]]
        loops = [quantifier for quantifier in quantifiers[:-1] if quantifier in ("*", "+")]
        if len(quantifiers) - quantifiers.count(None) > 3 or len(loops) > 1:
            raise ValueError(f"too many quantifiers in the regular expression {pattern[:80]!r}")
    ranges = character_ranges()

    def translate(item: re.Match) -> str:
        form = "{}" if item[0].startswith("[") else "[{}]"
        parts = re.split(r"(\\p\{.\}|\\.)", item[0])
        return "".join(form.format(ranges[part]) if part in ranges else part for part in parts)

    result = re.sub(REGEX_ITEM, translate, pattern)
    if re.compile(result).match(""):
        raise ValueError(f"the regular expression {pattern[:80]!r} matches an empty text")
    return result


@cache
def character_ranges() -> dict[str, str]:
    r"""Oniguruma's \s, \S and \p{L} (M, N, P, S: marks, numbers, punctuation, symbols), each as the inside of a class.

    From Python's own Unicode tables, so characters that Unicode added later than those are in no category.
    """
    white_space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's adds U+001C to U+001F
    ranges = {r"\s": white_space, r"\S": f"^{white_space}"}
    first = 0
    for category, run in groupby(range(0x110000), lambda code: unicodedata.category(chr(code))[0]):
        key, last = rf"\p{{{category}}}", first + sum(1 for _ in run) - 1
        ranges[key] = f"{ranges.get(key, '')}\\U{first:08x}-\\U{last:08x}"
        first = last + 1
    return ranges


class SentencePiece(Tokenizer):
    """A tokenizer.model through the sentencepiece package, with the same interface.

    Control pieces and tokens added later are found in the text first; the rest, user-defined pieces
    included, is sentencepiece's. It puts a space before a text if the model was trained so, and
    decode() keeps that space, because decode() is the tokens' bytes joined, wherever they start.
    """

    def __init__(self, file: Path, config: dict):
        try:
            import sentencepiece

            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except ImportError as error:
            raise ValueError(f"{file}: reading this needs the sentencepiece package") from error
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file}: not a SentencePiece model") from error
        super().__init__({self.model.id_to_piece(id): id for id in range(self.model.get_piece_size())}, config)
        self.add_special_tokens([token for token, id in self.ids.items() if self.model.is_control(id)])

    def encode_text(self, text: str) -> list[int]:
        return self.model.encode(text)

    def token_bytes(self, id: int) -> bytes:
        piece = self.tokens.get(id, "")
        if id in self.special_ids or not piece:
            return piece.encode()
        if self.model.is_unknown(id):
            return " \u2047 ".encode()  # what sentencepiece prints for it
        if self.model.is_byte(id):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        return piece.replace("\u2581", " ").encode()


# --------------------------------------------------------------------------------------- 3. Pictures in

# Raster formats whose header states the decoded size and whose decoders start no other program.
# Pillow also opens EPS, which starts Ghostscript, and containers of other files.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 256_000_000  # phones make 200 million
MAX_IMAGE_SIDE = 65_535
PILLOW_LIMIT = threading.Lock()  # held while Pillow's own limit (a global, 179 million pixels) is lifted
MAX_DOWNLOAD_BYTES = 32 * 2**20
MAX_STREAM_BYTES = 256 * 2**20
DOWNLOAD_SECONDS = 30.0
# From the scale in which a PNG file writes its transparent colour to that of the 8 bits that Pillow decodes to.
TRANSPARENT_SCALE = {"L;2": 255 / 3, "L;4": 255 / 15, "RGB;16B": 1 / 256}


def load_image(source: str | os.PathLike | bytes | BinaryIO | np.ndarray | Image.Image) -> Image.Image:
    """An RGB picture as a viewer would show it: upright, transparency on white, first frame.

    `source` is a path (also `~/...` and `file://...`; `-` is standard input), an http(s) or data address, the
    bytes of an image file, an open binary file, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, or a PIL image.
    Raises FileNotFoundError for a missing file and ValueError, naming the source, for anything else that cannot
    be shown. A picture over MAX_IMAGE_PIXELS is refused from its header, before memory is spent on decoding it.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source, "image")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,), (4,)):
            found = f"{source.dtype} of shape {source.shape}"
            raise ValueError(f"an image array is {found}, expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        return upright_rgb(Image.fromarray(np.ascontiguousarray(source)), "image array")
    name, file = open_source(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata
        with open_image(file, name) as image:
            return upright_rgb(image, name)


def open_source(source: object) -> tuple[str, str | BinaryIO]:
    """A name for errors, of at most 200 characters, and what Pillow can open."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image bytes", io.BytesIO(source)
    if hasattr(source, "read"):
        return "image file object", read_stream(source, "image file object")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"an image must be a path, an address, bytes or a PIL image, not a {type(source).__name__}")
    path = os.fsdecode(source)
    name = path if len(path) <= 200 else f"{path[:200]}..."
    if path == "-":
        return "standard input", read_stream(getattr(sys.stdin, "buffer", io.BytesIO()), "standard input")
    scheme = re.match(r"(\w+://|data:)?", path.lower())[0]
    if scheme in ("http://", "https://"):
        return name, io.BytesIO(download(path))
    if scheme == "data:":
        header, _, payload = path.partition(",")
        payload = "".join(urllib.parse.unquote(payload).split()).rstrip("=")  # as browsers read it
        with suppress(ValueError):
            if header.lower().endswith(";base64"):
                body = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
                return f"{header[:80]},...", io.BytesIO(body)
        raise ValueError(f"{header[:80]}: not a readable data address, expected data:image/...;base64,...")
    if scheme == "file://":
        path = urllib.request.url2pathname(path[7:].removeprefix("localhost"))
    elif scheme:
        raise ValueError(f"{name}: only http, https, data and file addresses are read")
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}: no such image file")
    if not os.path.isfile(path):
        raise ValueError(f"{name}: not a file, expected an image file")
    return name, path


def read_stream(file: BinaryIO, name: str) -> BinaryIO:
    """All of a file object, from its start where it can go back, as Pillow reads it; at most MAX_STREAM_BYTES."""
    body = bytearray()
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)
        while len(body) <= MAX_STREAM_BYTES and (chunk := file.read(2**20)):  # which may give less than asked for
            body += chunk
    except Exception as error:  # file objects raise errors of many types
        raise ValueError(f"{name}: cannot be read as a binary file ({reason(error)})") from error
    if len(body) > MAX_STREAM_BYTES:
        raise ValueError(f"{name}: more than the limit of {MAX_STREAM_BYTES} bytes")
    return io.BytesIO(body)


def open_image(file: str | BinaryIO, name: str) -> Image.Image:
    """An image of any size, of which the header is read; `name` is for errors."""
    Image.init()  # fills Image.OPEN, so that formats this build of Pillow lacks are left out
    formats = [format for format in IMAGE_FORMATS if format in Image.OPEN]
    with PILLOW_LIMIT:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit follows
        try:
            return Image.open(file, formats=formats)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"{name}: not an image in one of the formats {', '.join(formats)}") from error
        except Exception as error:  # decoders raise errors of many types on a broken header
            raise ValueError(f"{name}: cannot be opened as an image ({reason(error)})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Checks an opened image's size, then decodes it and makes it upright RGB; `name` is for errors."""
    width, height = image.size
    if width * height == 0:
        raise ValueError(f"{name}: an image of {width} x {height} pixels has nothing to see")
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        limit = f"{MAX_IMAGE_PIXELS} pixels and {MAX_IMAGE_SIDE} a side"
        raise ValueError(f"{name}: {width} x {height} pixels, over the limit of {limit}")
    try:
        rgb = to_rgb(image)
    except Exception as error:  # decoders raise errors of many types on damaged data
        raise ValueError(f"{name}: damaged image data ({reason(error)})") from error
    rgb.info.clear()
    with suppress(Exception):  # a damaged EXIF block turns nothing; viewers show such pictures as stored
        rgb.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB, decoded; transparency is composited on white, deep grey is scaled and not clipped."""
    scale = TRANSPARENT_SCALE.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    image.load()
    if scale and "transparency" in image.info:
        scaled = np.multiply(image.info["transparency"], scale).astype(int).tolist()
        image.info["transparency"] = tuple(scaled) if isinstance(scaled, list) else scaled
    if image.mode == "F" or image.mode.startswith("I"):  # I;16 in either byte order, I
        image = grey_to_8bit(image)
    if image.mode == "LAB":
        from PIL import ImageCms  # Image.convert has no LAB

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it only to LA
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def grey_to_8bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating point, to mode L.

    The file does not say which value is white. It is taken as 65535 for integers; for floats as the
    first of 1, 255 and 65535 that no value exceeds. Values outside any of those (negative, or
    larger) are stretched from the darkest to the brightest. Transparent pixels become white.
    """
    values = np.asarray(image).astype(np.float64)  # (H, W)
    values[~np.isfinite(values)] = 0.0
    darkest, brightest = values.min(), values.max()
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if darkest >= 0 and brightest <= white), None)
    if white is None:
        values, white = values - darkest, brightest - darkest or 1.0
    if isinstance(image.info.get("transparency"), int):
        values[values == image.info["transparency"]] = white
    return Image.fromarray((values * 255 / white + 0.5).astype(np.uint8))


def download(url: str) -> bytes:
    """The body of an http(s) address, within MAX_DOWNLOAD_BYTES and DOWNLOAD_SECONDS in all.

    A socket's timeout restarts with every byte, so it does not stop a server that sends one byte at a time.
    Therefore the request runs in a thread, and the caller waits for it no longer than DOWNLOAD_SECONDS.
    """
    outcome: list[bytes | Exception] = []
    worker = threading.Thread(target=read_url, args=(url, outcome), daemon=True)
    worker.start()
    worker.join(DOWNLOAD_SECONDS)
    result = outcome[0] if outcome else TimeoutError(f"no complete answer within {DOWNLOAD_SECONDS:g} seconds")
    if isinstance(result, bytes):
        return result
    cause = result.reason if type(result) is urllib.error.URLError else result
    raise ValueError(f"{url[:200]}: {reason(cause)}") from result


class StayOnHttp(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"redirected to {url}, which is not an http or https address")
        return super().redirect_request(request, file, code, message, headers, url)


def read_url(url: str, outcome: list[bytes | Exception]) -> None:
    """Appends the body, or what went wrong. Redirects are followed as long as they stay http(s)."""
    deadline, body = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    try:
        url = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~-._")  # spaces and characters outside ASCII
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (deepseek-vl image loader)"})
        with urllib.request.build_opener(StayOnHttp).open(request, timeout=DOWNLOAD_SECONDS) as response:
            size = response.length or 0  # Content-Length, which is optional and can be wrong
            while size <= MAX_DOWNLOAD_BYTES and (chunk := response.read1(2**16)):  # what has arrived, without waiting
                body += chunk
                size = max(size, len(body))
                if time.monotonic() > deadline:
                    raise TimeoutError
        if size > MAX_DOWNLOAD_BYTES:
            raise ValueError(f"more than the limit of {MAX_DOWNLOAD_BYTES} bytes")
        outcome.append(bytes(body))
    except Exception as error:  # sockets, TLS, HTTP and URL parsing share no base class
        outcome.append(error)


# -------------------------------------------------------------------------------------------- 4. Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelSettings:
    """How a picture becomes one (3, side, side) input of a vision tower, as a checkpoint's files say.

    `side` and `min_size` (the least that the shorter side is resized to, before padding) are in
    pixels, `mean` and `std` per channel of values in [0, 1], `resample` is one of PIL's filters.
    """

    side: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    normalize: bool = True
    min_size: int = 14
    resample: int = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255

    @property
    def background(self) -> tuple[int, ...]:
        """The colour of padding, 0 to 255: the mean, so that padding is near zero once normalized."""
        return tuple(int(value * 255) for value in self.mean)


HALF = (0.5, 0.5, 0.5)
VL2_PIXELS = PixelSettings(side=384, mean=HALF, std=HALF)  # of one tile
# What the released checkpoints' files say of pixels. The 7B's processor does not normalize: its model does, with a
# mean and deviation for each of its towers. Its mean here is only the colour of padding.
PIXELS = {
    "deepseek-vl-1.3b": PixelSettings(side=384, mean=HALF, std=HALF),
    "deepseek-vl-7b": PixelSettings(side=1024, normalize=False),
    "deepseek-vl2-tiny": VL2_PIXELS,
    "deepseek-vl2-small": VL2_PIXELS,
    "deepseek-vl2": VL2_PIXELS,
}
IMAGE_TOKENS = 576  # of a picture in DeepSeek-VL: a grid of 24 x 24. DeepSeek-VL2's rule is Processor.image_tokens
# Of DeepSeek-VL2: every width and height of at most nine tiles (section 2), in tiles and in pixels.
TILINGS = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
    (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
)  # fmt: skip
CANDIDATE_RESOLUTIONS = tuple((wide * 384, high * 384) for wide, high in TILINGS)


def letterbox(image: Image.Image, size: Sequence[int], settings: PixelSettings) -> Image.Image:
    """Resizes to `size` (width, height) and centres the result on a square of its longer side."""
    side = max(size)
    square = Image.new("RGB", (side, side), settings.background)
    square.paste(image.resize(tuple(size), settings.resample), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def official_square(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """The longest side becomes settings.side, as DeepSeek's own processor computes it."""
    longest = max(image.size)
    size = [max(int(side / longest * settings.side), settings.min_size) for side in image.size]
    return letterbox(image, size, settings)


def transformers_square(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """The same as transformers computes it: sides are rounded to nearest, and not down as in official_square."""
    scale = settings.side / max(image.size)
    return letterbox(image, [max(round(side * scale), settings.min_size) for side in image.size], settings)


def to_tensor(image: Image.Image, settings: PixelSettings) -> Tensor:
    """RGB picture (H, W) to float32 (3, H, W): in [0, 1], or minus mean over std where the settings say so."""
    pixels = (np.asarray(image, dtype=np.float64) * settings.rescale_factor).astype(np.float32)  # (H, W, 3)
    if settings.normalize:
        pixels = (pixels - np.float32(settings.mean)) / np.float32(settings.std)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def best_resolution(size: tuple[int, int], candidates: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (width, height) among `candidates` that keeps most of a picture's pixels, the least wasteful on a tie.

    Kept are the pixels of the picture scaled to fit, but never more than it has (DeepSeek-VL2, section 2).
    """
    width, height = size

    def kept_and_unused(candidate: Sequence[int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]  # the pixels left empty, below zero

    return tuple(max(candidates, key=kept_and_unused))


def cut_tiles(image: Image.Image, resolution: tuple[int, int], settings: PixelSettings) -> list[Image.Image]:
    """The whole picture as one square tile, then the picture at `resolution` as tiles row by row.

    Returns 1 + tiles_high * tiles_wide pictures. Raises ValueError for a picture so thin that
    fitting it to a tile leaves less than half a pixel.
    """
    longest, shortest = max(image.size), min(image.size)
    if round(shortest / longest * settings.side) == 0:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is too thin for tiles of {settings.side}")
    side = settings.side
    whole = ImageOps.pad(image, (side, side), settings.resample, settings.background)
    local = ImageOps.pad(image, resolution, settings.resample, settings.background)
    corners = ((left, top) for top in range(0, resolution[1], side) for left in range(0, resolution[0], side))
    return [whole, *(local.crop((left, top, left + side, top + side)) for left, top in corners)]


# ------------------------------------------------------------------------------------------- 5. Prompts

SYSTEM_TEXT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
    " provides, and assist the user with a variety of tasks using natural language."
)
IMAGE_MARKERS = ("<image_placeholder>", "<image>")  # of DeepSeek-VL, of DeepSeek-VL2
ROLES = {"user": "User", "assistant": "Assistant", "system": "System"}


class Piece(NamedTuple):
    """A stretch of the prompt; `learnt` marks what an assistant answered, end-of-sentence token included."""

    text: str
    learnt: bool = False


def message_text(message: dict, marker: str, raw: bool) -> tuple[str, str, list]:
    """A message's role (User, Assistant or System), its text, with its outer white space if `raw`, and its images.

    Content is either text with markers, images beside it, or a list of parts as transformers has it.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys() <= {"role", "content", "images"}:
        raise ValueError(f"a message must have role, content and perhaps images, found {str(message)[:80]}")
    role = ROLES.get(str(message["role"]).strip("<|>").lower())
    if role is None:
        raise ValueError(f"role {repr(message['role'])[:80]}: expected user, assistant or system")
    content, images = message["content"], message.get("images")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"the images of a message must be a list, even of one, not a {type(images).__name__}")
    if isinstance(content, str):
        text = content if raw else content.strip()
    elif isinstance(content, Sequence) and not images:
        text, images = join_parts(content, marker)
    else:
        raise ValueError("content must be text with images beside it, or a list of parts without")
    return role, text, list(images)


def join_parts(parts: Sequence[dict], marker: str) -> tuple[str, list]:
    """The text and the images of a message in parts, as transformers' chat template joins them.

    An image becomes its marker. A space separates adjacent texts. The first part is stripped on the left, the last
    on the right.
    """
    text, images, previous = "", [], None
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):  # transformers' and OpenAI's
            sources = [part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None]
            sources = [source.get("url") if isinstance(source, dict) else source for source in sources]
            if isinstance(code := part.get("base64"), str):
                sources.append(code if code.startswith("data:") else f"data:image;base64,{code}")
            if len(sources) != 1:
                raise ValueError("a part of type image must have one of image, path, url, image_url and base64")
            images += sources
            text += marker
        elif kind == "text" and isinstance(part.get("text"), str):
            words = part["text"].lstrip() if index == 0 else part["text"]
            words = words.rstrip() if index == len(parts) - 1 else words
            text += f" {words}" if previous == "text" else words
        else:
            raise ValueError(f"a part of a message must be a text or an image, found {str(part)[:80]}")
        previous = kind
    return text, images


def vl_pieces(system: str, messages: list[tuple[str, str]], end: str) -> list[Piece]:
    """DeepSeek-VL: `{system}\\n\\nUser: {text}\\n\\nAssistant: {text}{end}...Assistant:`; no space after the last."""
    pieces = [Piece(f"{system}\n\n")] if system else []
    for role, text in messages:
        if role == "Assistant":
            pieces += [Piece("Assistant:"), Piece(f" {text}{end}", learnt=True)] if text else [Piece("Assistant:")]
        else:
            pieces.append(Piece(f"User: {text}\n\n" if text else "User:"))
    return pieces


def vl2_pieces(system: str, messages: list[tuple[str, str]], end: str) -> list[Piece]:
    """DeepSeek-VL2: `{system}<|User|>: {text}\\n\\n<|Assistant|>: {text}{end}...<|Assistant|>:`."""
    pieces = [Piece(system)] if system else []
    for role, text in messages:
        if role == "User":
            pieces.append(Piece(f"<|User|>: {text}\n\n<|Assistant|>:" if text else "<|User|>:<|Assistant|>:"))
        elif text:
            pieces.append(Piece(f" {text}{end}", learnt=True))
    return pieces


# ------------------------------------------------------------------------------- 6. Everything together

IGNORED = -100  # the label that cross_entropy skips
GROUNDING_TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
VL2_SPECIAL_TOKENS = ("<｜▁pad▁｜>", "<image>", *GROUNDING_TAGS, "<|User|>", "<|Assistant|>")
MODEL_TYPES = ("multi_modality", "deepseek_vl", "deepseek_vl_hybrid", "deepseek_vl_v2")
MAX_INPUT_PIXELS = 2**24  # of all inputs made from one picture; the released VL2 models make at most 10 of 384 x 384


def read_settings(folder: Path) -> Settings:
    """What a checkpoint's preprocessor_config.json and processor_config.json say, as one.

    transformers 5 writes the image settings inside processor_config.json and ignores the other file then.
    """
    settings = Settings({}, str(folder))
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.exists():
            content = read_json(file)
            nested = content.pop("image_processor", None)
            if nested is not None:
                settings = Settings(nested, f"{file}: image_processor")
            settings.add(content, str(file))
    if not settings.values:
        raise FileNotFoundError(f"{folder}: expected a preprocessor_config.json or processor_config.json")
    return settings


def read_pixels(settings: Settings, defaults: PixelSettings, prefix: str = "") -> PixelSettings:
    """PixelSettings of inputs of the defaults' side; `prefix` stands before the keys of the 7B's second tower."""
    for key in ("do_resize", "do_rescale", "do_pad"):
        settings.one_of(key, True)
    return PixelSettings(
        side=defaults.side,
        mean=settings.numbers(f"{prefix}image_mean", defaults.mean, 0, 1),
        std=settings.numbers(f"{prefix}image_std", defaults.std, 0.001, 1000),
        normalize=settings.one_of("do_normalize", defaults.normalize, not defaults.normalize),
        min_size=settings.integer("min_size", min(defaults.min_size, defaults.side), defaults.side),
        resample=settings.one_of(f"{prefix}resample", int(defaults.resample), *range(6)),
        rescale_factor=settings.numbers("rescale_factor", (defaults.rescale_factor,), 0, 1)[0],
    )


def read_side(settings: Settings, key: str, default: int | None = None) -> int:
    """The side of a square input, written as one number or as its height and width."""
    size = settings.values.get(key)
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        settings.values[key] = size.get("height")
    return settings.integer(key, default, math.isqrt(MAX_INPUT_PIXELS))


def read_resolutions(settings: Settings) -> list[list[int]]:
    """DeepSeek-VL2's candidate_resolutions, each a width and height in tiles of the first one's width."""
    key = "candidate_resolutions"
    sizes = settings.values[key]
    for size in sizes if isinstance(sizes, list) and sizes else [sizes]:
        pair = isinstance(size, list) and len(size) == 2 and all(type(length) is int and length > 0 for length in size)
        if not pair or any(length % sizes[0][0] for length in size):
            settings.refuse(key, f"a list of widths and heights in whole tiles, not {str(size)[:80]}")
        if size[0] * size[1] + sizes[0][0] ** 2 > MAX_INPUT_PIXELS:  # the tiles and the whole picture
            settings.refuse(key, f"at most {MAX_INPUT_PIXELS} pixels, not {str(size)[:80]} and a tile")
    return sizes


def pad_left(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows of different lengths (T_i,) as one (B, T) tensor, `value` in front of the shorter ones."""
    length = max(map(len, rows))
    return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])


class Processor:
    """Conversations to a batch for the model, and ids back to text, as a checkpoint's files say.

    A conversation is a list of messages `{"role", "content", "images"}`: role user, assistant or
    system (or as the originals spell them: User, <|User|>, ...), content a text with `<image>` or
    `<image_placeholder>` where each image goes. Or `{"role", "content": [parts]}`, each part
    `{"type": "text", "text"}` or `{"type": "image", "image" | "path" | "url"}`. A system message
    comes first and replaces the checkpoint's system text. A conversation ends with the prompt for
    an answer, unless it ends with an answer, as for training.

    Four kinds of checkpoint, by config.json's model_type: multi_modality (DeepSeek-VL as DeepSeek
    published it), deepseek_vl and deepseek_vl_hybrid (1.3B and 7B as transformers writes them), and
    deepseek_vl_v2. Raises ValueError or FileNotFoundError, naming the file, for anything else.
    """

    def __init__(self, path: str | os.PathLike):
        folder = Path(path)
        config = Settings(read_json(folder / "config.json"), str(folder / "config.json"))
        self.model_type = config.values.get("model_type")
        if self.model_type not in MODEL_TYPES:
            config.refuse("model_type", f"one of {', '.join(MODEL_TYPES)}")
        self.is_vl2 = self.model_type == "deepseek_vl_v2"
        language = config.section("language_config" if config.values.get("language_config") else "text_config")
        self.max_positions = language.integer("max_position_embeddings", 2048)
        tower = config.section("vision_config").values.get("cls")
        settings = read_settings(folder)
        self.mask_prompt = settings.one_of("mask_prompt", True, False)
        settings.one_of("sft_format", "deepseek")
        settings.one_of("add_special_token", False)
        if self.is_vl2:
            self._read_tiles(settings, config)
        else:
            self._read_squares(settings, hybrid=tower == "HybridVisionTower")

        self.tokenizer = load_tokenizer(folder)
        self.image_token = IMAGE_MARKERS[self.is_vl2]
        self.tokenizer.add_special_tokens(VL2_SPECIAL_TOKENS if self.is_vl2 else [self.image_token])
        self.image_token_id = self.tokenizer.token_to_id(self.image_token)
        if config.values.get("image_token_id", self.image_token_id) != self.image_token_id:
            config.refuse("image_token_id", f"{self.image_token_id}, which is {self.image_token} of the tokenizer")
        self.bos_token_id, self.eos_token_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.bos_token_id is None or self.eos_token_id is None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: expected a bos_token and an eos_token with an id")
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else pad

    def _read_tiles(self, settings: Settings, config: Settings) -> None:
        """Settings of DeepSeek-VL2's tiles."""
        if settings.values.get("candidate_resolutions") is None:
            settings.add({"candidate_resolutions": config.values.get("candidate_resolutions")}, config.name)
        self.candidate_resolutions = read_resolutions(settings)
        side = self.candidate_resolutions[0][0]
        normalize = settings.one_of("normalize", True, False)
        self.pixels = read_pixels(settings, replace(VL2_PIXELS, side=side, normalize=normalize))
        patches = side // settings.integer("patch_size", most=side)
        self.tile_tokens = math.ceil(patches / settings.integer("downsample_ratio"))

    def _read_squares(self, settings: Settings, hybrid: bool) -> None:
        """Settings of DeepSeek-VL's square inputs."""
        official = self.model_type == "multi_modality"
        side = read_side(settings, "image_size") if official else read_side(settings, "size", 384)
        defaults = PixelSettings(side)
        if official and hybrid:  # the model normalizes, for each of its towers
            defaults = replace(defaults, normalize=settings.one_of("do_normalize", False))
        self.pixels = read_pixels(settings, defaults)
        if self.model_type == "deepseek_vl_hybrid":
            high = PixelSettings(read_side(settings, "high_res_size", 1024))
            self.high_res_pixels = read_pixels(settings, high, prefix="high_res_")
        self.num_image_tokens = settings.integer("num_image_tokens", IMAGE_TOKENS)

    def image_tokens(self, size: tuple[int, int], tiled: bool = True) -> int:
        """How many tokens a picture of this size takes."""
        if not self.is_vl2:
            return self.num_image_tokens
        wide, high = self._tiles(size, tiled)
        h = self.tile_tokens  # the grid of one tile is h x h; every row of a grid ends with a newline token
        return h * (h + 1) + 1 + high * h * (wide * h + 1)  # whole picture, separator, tiles as one grid

    def _tiles(self, size: tuple[int, int], tiled: bool) -> tuple[int, int]:
        """How many tiles wide and high DeepSeek-VL2 makes of a picture."""
        wide, high = best_resolution(size, self.candidate_resolutions) if tiled else (self.pixels.side,) * 2
        return wide // self.pixels.side, high // self.pixels.side

    def image_inputs(self, image: Image.Image, tiled: bool = True) -> tuple[dict[str, Tensor], int]:
        """One RGB picture's tensors, each with the picture (or its tiles) first, and how many tokens it takes.

        pixel_values float32 (1, 3, side, side); with deepseek_vl_hybrid also high_res_pixel_values. For
        DeepSeek-VL2 pixel_values is (1 + tiles, 3, side, side), the whole picture first, and
        images_spatial_crop int64 (1, 2) says how many tiles wide and high; `tiled` False takes one.
        """
        settings, n_tokens = self.pixels, self.image_tokens(image.size, tiled)
        if self.is_vl2:
            wide, high = self._tiles(image.size, tiled)
            tiles = cut_tiles(image, (wide * settings.side, high * settings.side), settings)
            pixels = torch.stack([to_tensor(tile, settings) for tile in tiles])
            return {"pixel_values": pixels, "images_spatial_crop": torch.tensor([[wide, high]])}, n_tokens
        inputs = {}
        if self.model_type == "deepseek_vl_hybrid":
            image = transformers_square(image, self.high_res_pixels)  # SigLIP's input is made from SAM's, in 8 bits
            inputs["high_res_pixel_values"] = to_tensor(image, self.high_res_pixels)[None]
        to_square = official_square if self.model_type == "multi_modality" else transformers_square
        return inputs | {"pixel_values": to_tensor(to_square(image, settings), settings)[None]}, n_tokens

    def prompt(self, conversation: Sequence[dict], system: str | None = None, raw: bool = False) -> str:
        """A conversation as one text, with one marker an image.

        DeepSeek-VL tokenizes this text as it is. DeepSeek-VL2 tokenizes it piece by piece, without
        the space that is shown here before an answer.
        """
        return "".join(piece.text for piece in self._pieces(conversation, system, raw)[0])

    def _pieces(self, conversation: Sequence[dict], system: str | None, raw: bool) -> tuple[list[Piece], list]:
        """The prompt in pieces, and the conversation's images in order."""
        if system is not None and not isinstance(system, str):
            raise ValueError(f"system is a {type(system).__name__}, expected a text")
        marker, other = self.image_token, IMAGE_MARKERS[not self.is_vl2]
        parsed = [message_text(message, marker, raw) for message in conversation]
        images = [image for _, _, found in parsed for image in found]
        texts, first = [], f"{marker}\n" if self.is_vl2 else marker
        for _, text, own in parsed:
            if own and text.count(marker) != len(own):
                text = text.replace(other, marker)  # the other generation's marker is taken as well
            texts.append(text if marker in text else first * len(own) + text)  # without a marker, pictures come first
        if not images or sum(text.count(marker) for text in texts) != len(images):
            texts = [text.replace(other, marker) for text in texts]  # images may all stand with the first message
        messages = [(role, text) for text, (role, _, _) in zip(texts, parsed)]
        if system is None and messages and messages[0][0] == "System":
            system = messages.pop(0)[1]
        if any(role == "System" for role, _ in messages):
            raise ValueError("a system message must be the first, and the only system text given")
        if not messages:
            raise ValueError("a conversation needs at least one message of a user")
        if raw and (len(messages) > 1 or messages[0][0] != "User" or system is not None):
            raise ValueError("a raw text is one message of a user, without a system text")
        if messages[-1][0] == "User":
            messages.append(("Assistant", ""))
        if system is None:
            system = "" if self.is_vl2 else SYSTEM_TEXT
        if raw:
            pieces = [Piece(messages[0][1], learnt=True)]
        else:
            end = self.tokenizer.tokens[self.eos_token_id]
            pieces = (vl2_pieces if self.is_vl2 else vl_pieces)(system.strip(), messages, end)
        n_markers = sum(piece.text.count(marker) for piece in pieces)
        if n_markers != len(images):
            markers = f"{n_markers} image marker{'s' * (n_markers != 1)}"
            given = "1 image is" if len(images) == 1 else f"{len(images)} images are"
            raise ValueError(f"the text has {markers}, but {given} given")
        if self.is_vl2 and not raw and any(marker in piece.text for piece in pieces if piece.learnt):
            raise ValueError("an assistant's message holds an image, which DeepSeek-VL2 does not take")
        return pieces, images

    def _tokenize(self, pieces: list[Piece], labels: bool, raw: bool) -> tuple[list[int], list[bool]]:
        """Ids with the begin token in front and one id an image. With `labels`, also whether each is learnt."""
        encode = self.tokenizer.encode
        if self.is_vl2:
            runs = [encode(piece.text if raw else piece.text.lstrip(" ")) for piece in pieces]
            ids, ends = [id for run in runs for id in run], accumulate(map(len, runs))
        else:
            *prefixes, text = accumulate(piece.text for piece in pieces)
            # No token crosses the space before an answer, so the ids of each prefix are the first ids of the text.
            ids = encode(text)
            ends = [*(len(encode(prefix)) for prefix in prefixes if labels), len(ids)]
        learnt: list[bool] = []
        for end, piece in zip(ends, pieces):
            learnt += [piece.learnt] * (end - len(learnt))
        return [self.bos_token_id, *ids], [False, *learnt]

    def _row(self, conversation: Sequence[dict], system: str | None, labels: bool, raw: bool) -> tuple:
        """One conversation: ids int64 (T,), where image features go bool (T,), labels int64 (T,), images' tensors."""
        pieces, sources = self._pieces(conversation, system, raw)
        tokens, flags = self._tokenize(pieces, labels, raw)
        tiled = len(sources) <= 2  # DeepSeek-VL2 gives each of three or more images one local tile
        repeats, inputs, length = [], [], len(tokens)
        self._check_length(length)
        for index, source in enumerate(sources):
            try:
                image = load_image(source)
                repeats.append(self.image_tokens(image.size, tiled))
                length += repeats[-1] - 1
                if length <= self.max_positions:  # before pixels take memory
                    inputs.append(self.image_inputs(image, tiled)[0])
            except (ValueError, OSError) as error:
                which = f"image {index + 1} of {len(sources)}: " if len(sources) > 1 else ""
                raise ValueError(f"{which}{reason(error)}") from error
            self._check_length(length)

        ids, learnt, counts = torch.tensor(tokens), torch.tensor(flags), torch.ones(len(tokens), dtype=torch.long)
        counts[ids == self.image_token_id] = torch.tensor(repeats, dtype=torch.long)
        ids, learnt = ids.repeat_interleave(counts), learnt.repeat_interleave(counts)  # (T,)
        is_image = ids == self.image_token_id
        ignored = is_image | ~learnt if self.mask_prompt else is_image
        return ids, is_image, ids.masked_fill(ignored, IGNORED), inputs

    def _check_length(self, length: int) -> None:
        if length > self.max_positions:
            limit = f"{self.max_positions} (max_position_embeddings)"
            raise ValueError(f"the prompt has at least {length} tokens, over the model's context of {limit}")

    def __call__(
        self, conversations: Sequence, system: str | None = None, labels: bool = False, raw: bool = False
    ) -> dict[str, Tensor]:
        """A batch for the model from one conversation or a list of them, shorter ones padded on the left.

        Always: input_ids int64 (B, T); attention_mask int64 (B, T), 0 on padding; images_seq_mask
        bool (B, T), true where an image feature takes the place of an embedding. With images, the
        tensors of `image_inputs`, those of all images joined in order, row by row. With `labels`,
        labels int64 (B, T): -100 on padding and images, and outside the answers unless the
        checkpoint sets mask_prompt to false. `system` replaces the system text; "" leaves it out. With `raw`, for
        base models, a conversation is one message, whose text follows the begin token as it is, and is all learnt.

        Raises ValueError where image markers and images differ in number, where a prompt is longer
        than the model's context, and where a conversation or an image cannot be read.
        """
        if isinstance(conversations, dict):  # a message alone
            conversations = [conversations]
        found = f"a {type(conversations).__name__} without messages"
        conversations = list(conversations) if isinstance(conversations, Iterable) else []
        if not conversations or isinstance(conversations[0], (str, int)):
            raise ValueError(f"expected a conversation or a list of conversations, found {found}")
        if isinstance(conversations[0], dict):
            conversations = [conversations]
        rows = []
        for index, conversation in enumerate(conversations):
            try:
                rows.append(self._row(list(conversation), system, labels, raw))
            except (ValueError, TypeError) as error:
                if len(conversations) == 1 and isinstance(error, ValueError):
                    raise
                raise ValueError(f"conversation {index + 1} of {len(conversations)}: {reason(error)}") from error
        ids, is_image, targets, inputs = zip(*rows)
        batch = {
            "input_ids": pad_left(ids, self.pad_token_id),
            "attention_mask": pad_left([torch.ones_like(row) for row in ids], 0),
            "images_seq_mask": pad_left(is_image, False),
        }
        if labels:
            batch["labels"] = pad_left(targets, IGNORED)
            # A begin token after padding is not learnt: only padding precedes it.
            batch["labels"][:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, IGNORED)
        images = [tensors for row in inputs for tensors in row]
        return batch | {key: torch.cat([tensors[key] for tensors in images]) for key in (images[0] if images else ())}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)


# ------------------------------------------------------------------------------------------- 7. Boxes

# DeepSeek-VL2 answers where something is with <|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>,
# in thousandths of the image's width and height, 0 to 999. The tags (GROUNDING_TAGS) are special tokens.
COORDINATES = 999
NUMBER = r"\s*([-+]?\d{1,12}(?:\.\d{0,12})?)\s*"
FOUR_NUMBERS = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]", re.ASCII)


class Box(NamedTuple):
    """Something that an answer located, in pixels: 0 <= left < right <= width, 0 <= top < bottom <= height."""

    label: str
    left: int
    top: int
    right: int
    bottom: int


def parse_boxes(text: str, image_size: tuple[int, int]) -> list[Box]:
    """The boxes in an answer; malformed ones are skipped.

    Inside <|det|>, every innermost closed bracket of exactly four numbers is a box. An unclosed one is skipped,
    because its last number may be cut off. Corners may be swapped, and boxes are cut at the image's edge.
    Brackets of other contents and boxes without an area are skipped. Nothing is evaluated.

    Args:
        text: decoded with its special tokens; image_size: width and height of the picture as `load_image` gives it,
            which is what the model saw: a photo may be stored turned.
    Raises: ValueError for an image size that is not positive.
    """
    sides = tuple(image_size) if isinstance(image_size, Iterable) else ()
    if len(sides) != 2 or not all(isinstance(side, Real) and 1 <= side <= MAX_COUNT for side in sides):
        raise ValueError(f"image_size is {str(image_size)[:80]}, expected a positive width and height")
    width, height = sides
    boxes, label = [], ""
    parts = re.split(r"<\|(/?ref|/?det)\|>", text)
    for tag, part in zip(parts[1::2], parts[2::2]):
        label = part.strip() if tag == "ref" else label
        for corners in FOUR_NUMBERS.findall(part) if tag == "det" else ():
            x1, y1, x2, y2 = (min(max(float(number), 0), COORDINATES) / COORDINATES for number in corners)
            left, right = sorted((int(x1 * width), int(x2 * width)))
            top, bottom = sorted((int(y1 * height), int(y2 * height)))
            if left < right and top < bottom:
                boxes.append(Box(label, left, top, right, bottom))
    return boxes


BOX_COLOURS = ("#e6194b", "#0a7a3b", "#0050c8", "#a0388e", "#8a5200", "#00707a")  # dark enough for white text


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """A copy of the image, as `load_image` makes it, with each box outlined and its label beside it, inside the image.

    A label goes above its box, else below, else inside, and where it would cover another label, further down or up.
    """
    image = load_image(image).copy()
    draw = ImageDraw.Draw(image)
    size = max(12, min(image.size) // 32)
    line = max(2, size // 6)
    coloured = list(zip(boxes, cycle(BOX_COLOURS)))
    for box, colour in coloured:
        corners = (box.left, box.top, max(box.right - 1, box.left), max(box.bottom - 1, box.top))
        draw.rectangle(corners, outline=colour, width=line)
    font = ImageFont.load_default(size)
    taken: list[tuple[int, int, int, int]] = []
    for number, (box, colour) in enumerate(coloured, 1):
        text = fit_label(box.label, font, image.width - size) or str(number)
        wide, high = (int(side) + size // 2 for side in font.getbbox(text, anchor="lt")[2:])
        left = max(0, min(box.left, image.width - wide))
        tops = [box.top - high, box.bottom, *range(box.top, image.height, high), *range(box.top, -1, -high)]
        tops = [top for top in tops if 0 <= top <= image.height - high] or [0]
        places = [(left, top, left + wide, top + high) for top in tops]
        place = next((place for place in places if not any(overlap(place, other) for other in taken)), places[0])
        taken.append(place)
        draw.rectangle(place, fill=colour)
        draw.text((place[0] + size // 4, place[1] + size // 4), text, fill="white", font=font, anchor="lt")
    return image


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def fit_label(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """One line of printable text, cut to `width` pixels; empty where the font lacks one of its characters."""
    label = " ".join("".join(c if c.isprintable() else " " for c in label[:200]).split())
    missing = bytes(font.getmask("\uffff"))
    if any(bytes(font.getmask(c)) == missing for c in set(label) if c != " "):
        return ""
    while font.getlength(label) > width and len(label) > 1:
        label = label[:-2] + "…"
    return label
