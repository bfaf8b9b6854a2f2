"""Ways to ask: several turns, embeddings, several answers, stop texts, log probabilities, raw text, chat."""

import json
import os
import pickle
import select
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from checkpoints import edit_json
from commands import FLOAT32, PHOTO, SCENE, assert_refused, open_terminal, run_command
from conftest import DEMO, GOLDENS, KINDS, ROOT, alone, assert_close, encode_images, golden_model, random_batch
from PIL import Image

from generate import ConversationCache, TextStream, generate, main, stream
from processor import Processor

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")
every_golden = pytest.mark.parametrize("name", GOLDENS)
every_kind = pytest.mark.parametrize("kind", KINDS)
LIMIT = 8


def picture(seed: int) -> Image.Image:
    """A wide picture of noise, which DeepSeek-VL2 cuts into tiles."""
    pixels = torch.randint(0, 256, (80, 150, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def user(text: str, *images: Image.Image) -> dict:
    return {"role": "user", "content": text, "images": list(images)}


@pytest.fixture
def seen(monkeypatch):
    """seen(model) -> a list with an entry for each picture (DeepSeek-VL2: tile) that its vision tower sees."""

    def watch(model) -> list:
        pictures, look = [], model.vision.forward
        monkeypatch.setattr(model.vision, "forward", lambda *pixels: pictures.extend(pixels[0]) or look(*pixels))
        return pictures

    return watch


# ---------------------------------------------------------------------------- several turns

COMPILED = [("vl-siglip", True), ("vl2-mla", True)]  # steps of a fixed shape, as for the compiler


@pytest.mark.parametrize("name, fixed_shape", [(name, False) for name in GOLDENS] + COMPILED)
def test_a_later_turn_equals_a_fresh_start(name, fixed_shape, seen, monkeypatch):
    """Of answers to the limit and stopped early. With the third picture DeepSeek-VL2 cuts other tiles of all."""
    model, processor = golden_model(name)
    monkeypatch.setattr(model, "fixed_shape_steps", fixed_shape)
    cache, messages, pictures = ConversationCache(model), [], seen(model)
    options = dict(repetition_penalty=1.3, chunk_size=100)
    turns = [([picture(0)], 3), ([], LIMIT), ([picture(1)], LIMIT), ([picture(2)], 3)]
    for turn, (images, longest) in enumerate(turns):
        messages.append(user(f"And what of {turn}?", *images))
        batch = processor(messages)
        pictures.clear()
        answer = stream(model, batch, LIMIT, cache=cache, **options)
        ids = [id for id, _ in zip(answer, range(longest))]
        answer.close()
        tiles = (batch["images_spatial_crop"].prod(1) + 1).tolist() if processor.is_vl2 else [1] * 3
        all_again = processor.is_vl2 and turn == 3
        assert len(pictures) == (sum(tiles) if all_again else tiles[-1] if images else 0)
        assert (cache.reused > len(batch["input_ids"][0]) // 3) == (turn > 0 and not all_again)
        (fresh,) = generate(model, batch, LIMIT, **options)
        assert ids == fresh[:longest]
        messages.append({"role": "assistant", "content": processor.decode(ids)})
    assert generate(model, batch, LIMIT, cache=cache, **options) == [fresh]  # again: nothing is new but the last token
    assert cache.reused == batch["input_ids"].shape[1] - 1
    messages[0] = user("And what of 0?", picture(3))  # not to be taken for the first one
    batch = processor(messages[:-1])
    assert generate(model, batch, LIMIT, cache=cache, **options) == generate(model, batch, LIMIT, **options)


def test_a_cache_takes_a_conversation_without_pictures(monkeypatch):
    """As the original's processor gives it, with a row of zeros; also where a config names no image token."""
    model, processor = golden_model("vl2-mla")
    batch, size = processor([user("Hello")]), model.config.vision.image_size
    batch |= {"pixel_values": torch.zeros(0, 3, size, size), "images_spatial_crop": torch.zeros(1, 2).long()}
    expected = generate(model, batch, LIMIT)
    assert generate(model, batch, LIMIT, cache=ConversationCache(model)) == expected
    monkeypatch.setattr(model, "config", replace(model.config, image_token_id=None))
    del batch["images_seq_mask"]
    assert generate(model, batch, LIMIT, cache=ConversationCache(model)) == expected


def test_what_a_cache_does_not_take(small_pair, monkeypatch):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    cache, one = ConversationCache(model), alone(batch, 0)
    x = model.embed(one["input_ids"], encode_images(model, one))
    padded = one | {"attention_mask": (one["input_ids"] != one["input_ids"][0, 0]).long()}
    for wrong, options in ((batch, {}), (padded, {}), ({"inputs_embeds": x}, {}), (one, {"n": 2, "temperature": 1})):
        with pytest.raises(ValueError, match="a cache continues one conversation"):
            generate(model, wrong, 3, cache=cache, **options)
    with pytest.raises(ValueError, match=r"says 2 tiles .* hold 1"):
        generate(golden_model("vl2-mla")[0], one | {"images_spatial_crop": torch.tensor([[1, 1]])}, 3, cache=cache)
    monkeypatch.setattr(model, "fixed_shape_steps", True)
    with pytest.raises(ValueError, match="the cache was made before compile_steps"):
        generate(model, one, 3, cache=cache)


# ---------------------------------------------------------------------------- embeddings, several answers


@every_kind
def test_from_embeddings_equals_from_ids(small_pair, kind):
    model, batch = small_pair(kind).ours, random_batch(kind)
    x = model.embed(batch["input_ids"], encode_images(model, batch))
    given = {"inputs_embeds": x, "attention_mask": batch["attention_mask"]}
    assert generate(model, given, LIMIT) == generate(model, batch, LIMIT)
    options = dict(temperature=1.0, seed=3, repetition_penalty=1.4)
    with_ids = given | {"input_ids": batch["input_ids"]}
    assert generate(model, with_ids, LIMIT, **options) == generate(model, batch, LIMIT, **options)
    assert list(stream(model, {"inputs_embeds": x[:1]}, LIMIT)) == generate(model, alone(batch, 0), LIMIT)[0]


def test_embeddings_of_another_shape(small_pair):
    x = torch.zeros(1, 4, 48)
    for wrong, message in (
        ({"inputs_embeds": x[..., 1:]}, r"inputs_embeds has shape \[1, 4, 47\], expected \[B, T, 48\]"),
        ({"inputs_embeds": x[0]}, r"inputs_embeds has shape \[4, 48\], expected \[B, T, 48\]"),
        ({"attention_mask": torch.ones(1, 4)}, "neither input_ids nor inputs_embeds"),
        ({"inputs_embeds": x, "attention_mask": torch.ones(1, 9)}, r"of shape \[1, 9\]: expected \[1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(small_pair("siglip").ours, wrong)


@every_kind
def test_n_answers_are_those_of_the_prompt_given_n_times(small_pair, kind, seen):
    """The towers see each picture once."""
    model, batch = small_pair(kind).ours, random_batch(kind)
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in batch.items()}
    options = dict(temperature=1.0, seed=5, repetition_penalty=1.2)
    expected, pictures = generate(model, repeated, LIMIT, **options), seen(model)
    rows = generate(model, batch, LIMIT, n=3, **options)
    assert rows == expected and len({tuple(row) for row in rows}) == 6 and len(pictures) == 2
    with pytest.raises(ValueError, match="n is 2 at temperature 0"):
        generate(model, batch, n=2)


@every_kind
@pytest.mark.parametrize("options", [{}, dict(temperature=1.3, seed=1, top_k=20, repetition_penalty=1.3)])
def test_log_probabilities_are_those_of_a_forward_pass(small_pair, kind, options):
    model, batch = small_pair(kind).ours, random_batch(kind)
    rows = generate(model, batch, LIMIT, log_probs=4, **options)
    assert rows == generate(model, batch, LIMIT, **options)
    ids = torch.cat([batch["input_ids"], torch.tensor(rows)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, LIMIT, dtype=torch.long)], dim=1)
    expected = model(**batch | {"input_ids": ids, "attention_mask": mask}).logits[:, -LIMIT - 1 : -1].log_softmax(-1)
    chosen = torch.tensor([[token.log_prob for token in row] for row in rows])
    assert_close(chosen, expected.gather(2, torch.tensor(rows)[..., None])[..., 0])
    top = expected.topk(4)
    assert [[[id for id, _ in token.likeliest] for token in row] for row in rows] == top.indices.tolist()
    assert [[vars(token) for token in row] for row in pickle.loads(pickle.dumps(rows))] == [
        [vars(token) for token in row] for row in rows
    ]
    assert_close(torch.tensor([[[p for _, p in token.likeliest] for token in row] for row in rows]), top.values)


@every_golden
def test_stop_texts(name):
    """Every text of an answer as a stop text: the answer ends with the token that completes the first."""
    model, processor = golden_model(name)
    batch, tokenizer = processor([user("What is this?")]), processor.tokenizer

    def shown(ids: list[int], stop: tuple = ()) -> tuple[str, bool]:
        text = TextStream(tokenizer, stop)
        pieces, stopped = [*map(text.push, ids)], text.stopped
        return "".join(pieces) + text.finish(), stopped

    (free,) = generate(model, batch, 20)
    whole, _ = shown(free)
    for start in range(0, len(whole) - 3, 5):
        stop = "never said", whole[start + 1 : start + 4], whole[start : start + 3]
        said = whole[: min(whole.index(text) for text in stop[1:])]
        (ids,) = generate(model, batch, 20, stop=stop, tokenizer=tokenizer)
        assert shown(ids, stop) == shown(free, stop) == (said, True)
        assert not shown(ids[:-1], stop)[1]
        assert [*stream(model, batch, 20, stop=stop, tokenizer=tokenizer)] == ids == free[: len(ids)]


@every_golden
def test_raw_text_follows_the_begin_token_as_it_is(name):
    _, processor = golden_model(name)
    encode, begin, marker = processor.tokenizer.encode, processor.bos_token_id, processor.image_token
    assert processor([user(" The sky is ")], raw=True)["input_ids"].tolist() == [[begin, *encode(" The sky is ")]]
    image = picture(0)
    batch = processor([user("Left <image_placeholder> right ", image)], raw=True, labels=True)
    before, after = (encode(text) for text in (f"Left {marker}", " right "))
    expected = [begin, *before[:-1], *[processor.image_token_id] * processor.image_tokens(image.size), *after]
    assert batch["input_ids"].tolist() == [expected]
    learnt = batch["labels"][0] >= 0  # whether of the begin token does not matter: nothing predicts it
    assert learnt[1:].tolist() == [id != processor.image_token_id for id in expected[1:]]


def test_raw_text_is_one_message():
    one, system = [user("a")], {"role": "system", "content": "a"}
    answer = {"role": "assistant", "content": "a"}
    for conversation, text in ((one * 2, None), ([answer], None), ([system, *one], None), (one, "a")):
        with pytest.raises(ValueError, match="a raw text is one message of a user"):
            golden_model("vl-siglip")[1](conversation, text, raw=True)


# ---------------------------------------------------------------------------- chat


@pytest.fixture
def chat(capsys):
    """chat(lines, *arguments) -> status, out, err of `generate.py --chat` with these lines on standard input."""

    def chat(lines: str, *arguments: str):
        stdin = lines.encode(errors="surrogateescape")
        return run_command(main, ["--chat", *FLOAT32, *arguments], capsys, stdin)

    return chat


def test_chat_asks_about_pictures_and_saves_what_was_said(chat, tmp_path):
    file = tmp_path / "said.json"
    first = "--image", SCENE, "--prompt", "What is in the center?"
    pictures = f"/image {PHOTO}\n/clear\n/image {SCENE}\n/image {SCENE}\n\n"
    questions = "What does the sign say?\nHow many shapes are there?\n"
    done = chat(f"{pictures}{questions}/save {file}\n/quit\nnever asked\n", *first)
    assert done.status == 0
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0] == {"role": "user", "content": "What does the sign say?", "images": [SCENE] * 2}
    assert done.out.splitlines()[1:] == [message["content"] for message in messages[1::2]]
    assert "PUSH" in messages[1]["content"] and "four" in messages[3]["content"]
    assert Processor(DEMO / "checkpoint")(messages[:3])  # as the Python interface takes them


def test_bad_lines_in_chat_are_one_error_each_and_the_chat_goes_on(chat, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    wrong = {
        "/shout": "/shout is no command", "/image nowhere.png": "no such image file",
        "/image": "needs the name of a file", "/image -": "needs the name of a file",
        f"/image {tmp_path}/text.png": "not an image", f"/save {tmp_path}/nowhere/a.json": "cannot be written",
        "/save ~nobody/a.json": "cannot be written",
        "/save": "expected a name that ends in .json", "shape " * 3000: "/clear starts over",
        "<image_placeholder> and <image_placeholder>?": "2 image markers, but 1 image is given",
        "\udcff\udcfe": "the question is not valid UTF-8",
    }  # fmt: skip
    done = chat("\n".join([*wrong, "How many stars are there?"]), "--image", SCENE)
    assert done.status == 0 and len(done.out.splitlines()) == 1
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for error, expected in zip(errors, wrong.values(), strict=True):
        assert expected in error and len(error) < 400
    assert os.listdir(tmp_path) == ["text.png"]


def test_chat_near_the_end_of_the_context(chat, tmp_path):
    folder = shutil.copytree(DEMO / "checkpoint", tmp_path / "model")
    edit_json(folder / "config.json", {"language_config.max_position_embeddings": 128})
    done = chat("How many shapes are there?\n" * 9, "--image", SCENE, "--model", str(folder))
    assert done.status == 0
    assert "tokens are left of the model's context of 128: /clear starts over" in done.err
    assert "over the model's context of 128" in done.err.splitlines()[-1]


REFUSED = {  # with standard input, or with one that is closed
    ("--chat --raw", b""): "--raw answers one question, not a --chat",
    (f"--chat --image {SCENE} --boxes x.png", b""): "--boxes answers one question, not a --chat",
    ("--chat --prompt -", b""): "--chat and - both read standard input",
    ("--chat --image -", b""): "--chat and - both read standard input",
    **{(command, None): "standard input is closed\n" for command in ("--chat", "--prompt -", "--image -")},
}


@pytest.mark.parametrize("command, stdin", REFUSED)
def test_a_chat_that_cannot_be_is_refused(command, stdin, capsys):
    assert_refused(run_command(main, command.split(), capsys, stdin), REFUSED[command, stdin])


# First thing in a process of its own: the terminal that it is given becomes the one whose Ctrl-C it gets.
TAKE_TERMINAL = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


def test_chat_on_a_terminal():
    """In a process of its own, on a window of 40 columns. Ctrl-C gives up a line, Ctrl-D ends."""
    ours, theirs = open_terminal(columns=40)
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, ROOT / "generate.py", "--chat", *FLOAT32, "--image", SCENE],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)

    def press(keys: bytes, until: str, seconds: int = 300) -> str:
        """What the process shows up to these words. Without a word for five seconds, a Ctrl-C is pressed again:
        Python forgets one that comes between readline's echo of a key and its wait for the next."""
        os.write(ours, keys)
        seen = ""
        while not seen.endswith(until):
            if select.select([ours], [], [], 5)[0]:
                seen += os.read(ours, 1).decode()  # at the process's end an OSError
            else:
                assert (seconds := seconds - 5) > 0, seen
                os.write(ours, b"\x03" if keys == b"\x03" else b"")
        return seen

    greeting = press(b"", until="\n> ")
    assert "/image FILE" in greeting and all(len(line) < 40 for line in greeting.split("\r\n")[-4:])
    press(b"/quit", until="/quit")
    press(b"\x03", until="\n> ")
    press(b"What does the sign say?\n", until="PUSH")
    press(b"", until="> ")
    press(b"\x04", until="\n")
    assert process.wait(60) == 0
    os.close(ours)


def test_ctrl_c_stops_an_answer_which_stays_as_far_as_it_came(monkeypatch, chat, tmp_path):
    """The first question gets no word, the second three tokens, the third its whole answer."""
    stops = iter([0, 3])

    def interrupted(*inputs, **options):
        left = next(stops, None)
        for id in stream(*inputs, **options):
            if left == 0:
                raise KeyboardInterrupt
            left = left and left - 1
            yield id

    monkeypatch.setattr("generate.stream", interrupted)
    file = tmp_path / "said.json"
    questions = "How many stars are there?", "Describe this image.", "What does the sign say?"
    done = chat("\n".join([*questions, f"/save {file}"]), "--image", SCENE)
    said = json.loads(file.read_text())
    assert [message["content"] for message in said[::2]] == list(questions[1:]) and said[0]["images"] == [SCENE]
    assert 0 < len(said[1]["content"]) < 40 and said[3]["content"] == "It says PUSH."
    assert done.out == f"{said[1]['content']}\nIt says PUSH.\n"
