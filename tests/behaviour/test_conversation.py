"""Ways to ask: several turns, embeddings, several answers, stop texts, log probabilities, raw text, chat."""

import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
import torch
from conftest import (
    KINDS,
    ROOT,
    VL2_GOLDENS,
    VL_GOLDENS,
    alone,
    assert_close,
    encode_images,
    golden,
    golden_model,
    random_batch,
)
from PIL import Image

from generate import ConversationCache, TextStream, generate, main, stream
from processor import Processor

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")

every_golden = pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
LIMIT = 8


def picture(seed: int) -> Image.Image:
    """A wide picture of noise, which DeepSeek-VL2 cuts into tiles."""
    pixels = torch.randint(0, 256, (80, 150, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def user(text: str, *images: Image.Image) -> dict:
    return {"role": "user", "content": text, "images": list(images)}


class TowerCalls:
    """How many pictures (DeepSeek-VL2: tiles) the vision tower has seen."""

    def __init__(self, model):
        self.count = 0
        self.hook = model.vision.register_forward_pre_hook(self.see)

    def see(self, module, inputs):
        self.count += len(inputs[0])


# ---------------------------------------------------------------------------- several turns


@every_golden
@pytest.mark.parametrize("fixed_shape, ending", [(False, "at its limit"), (True, "stopped early")])
def test_a_later_turn_equals_a_fresh_start(name, ending, fixed_shape, monkeypatch):
    """Greedy. The first, third and fourth turn bring a picture; with three DeepSeek-VL2 cuts other tiles of all."""
    model, processor = golden_model(name)
    monkeypatch.setattr(model, "fixed_shape_steps", fixed_shape)  # as for compiled steps
    cache, messages, calls = ConversationCache(model), [], TowerCalls(model)
    for turn, images in enumerate([[picture(0)], [], [picture(1)], [picture(2)]]):
        messages.append(user(f"And what of {turn}?", *images))
        batch, seen = processor(messages), calls.count
        ids = []
        for id in stream(model, batch, LIMIT, cache=cache):
            ids.append(id)
            if ending == "stopped early" and len(ids) == 3:
                break
        pictures = len(batch["pixel_values"]) if not processor.is_vl2 else batch["images_spatial_crop"].prod(1) + 1
        all_again = processor.is_vl2 and turn == 3
        new = sum(pictures) if all_again else pictures[-1] if images and processor.is_vl2 else len(images)
        assert calls.count - seen == new
        assert (cache.reused > len(batch["input_ids"][0]) // 3) == (turn > 0 and not all_again)
        assert ids == generate(model, batch, LIMIT)[0][: len(ids)]
        messages.append({"role": "assistant", "content": processor.decode(ids)})
    calls.hook.remove()


@every_golden
def test_another_picture_in_the_same_place_is_not_taken_for_the_first(name):
    model, processor = golden_model(name)
    cache = ConversationCache(model)
    for seed in (0, 1, 0):
        batch = processor([user("What is this?", picture(seed))])
        assert generate(model, batch, LIMIT, cache=cache)[0] == generate(model, batch, LIMIT)[0]
        again = generate(model, batch, LIMIT, cache=cache)[0]  # nothing is new but the last token
        assert again == generate(model, batch, LIMIT)[0] and cache.reused == batch["input_ids"].shape[1] - 1


def test_a_cache_has_one_conversation(small_pair):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    x = model.embed(batch["input_ids"], encode_images(model, batch))
    for wrong, options in ((batch, {}), ({"inputs_embeds": x[:1]}, {}), (alone(batch, 0), {"n": 2, "temperature": 1})):
        with pytest.raises(ValueError, match="a cache continues one conversation"):
            generate(model, wrong, 3, cache=ConversationCache(model), **options)


def test_penalty_and_chunks_with_a_cache(small_pair):
    model, cache = small_pair("siglip").ours, ConversationCache(small_pair("siglip").ours)
    batch = alone(random_batch("siglip"), 0)
    options = dict(repetition_penalty=1.5, chunk_size=7)
    first = generate(model, batch, LIMIT, cache=cache, **options)
    names = "input_ids", "attention_mask"
    longer = batch | {name: torch.cat([batch[name], torch.ones(1, 9, dtype=torch.long)], dim=1) for name in names}
    assert first == generate(model, batch, LIMIT, **options)
    assert generate(model, longer, LIMIT, cache=cache, **options) == generate(model, longer, LIMIT, **options)
    assert cache.reused == batch["input_ids"].shape[1]


# ---------------------------------------------------------------------------- embeddings, several answers


@pytest.mark.parametrize("kind", KINDS)
def test_from_embeddings_equals_from_ids(small_pair, kind):
    model, batch = small_pair(kind).ours, random_batch(kind)
    x = model.embed(batch["input_ids"], encode_images(model, batch))
    given = {"inputs_embeds": x, "attention_mask": batch["attention_mask"]}
    assert generate(model, given, LIMIT) == generate(model, batch, LIMIT)
    options = dict(temperature=1.0, seed=3, repetition_penalty=1.4)
    assert generate(model, given | {"input_ids": batch["input_ids"]}, LIMIT, **options) == generate(
        model, batch, LIMIT, **options
    )
    assert list(stream(model, {"inputs_embeds": x[:1]}, LIMIT)) == generate(model, alone(batch, 0), LIMIT)[0]


def test_embeddings_of_another_shape(small_pair):
    model = small_pair("siglip").ours
    for shape in ((1, 4, 47), (4, 48)):
        with pytest.raises(ValueError, match=r"inputs_embeds have shape \[.*expected \[B, T, 48\]"):
            model(inputs_embeds=torch.zeros(shape))
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        generate(model, {"attention_mask": torch.ones(1, 4)})
    with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 9\]: expected \[1, 4\]"):
        generate(model, {"inputs_embeds": torch.zeros(1, 4, 48), "attention_mask": torch.ones(1, 9)})


@pytest.mark.parametrize("kind", KINDS)
def test_n_answers_are_those_of_the_prompt_given_n_times(small_pair, kind):
    """Both draw from the same logits with the same generator."""
    model, batch, calls = small_pair(kind).ours, random_batch(kind), None
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in batch.items()}
    options = dict(temperature=1.0, seed=5, repetition_penalty=1.2)
    expected = generate(model, repeated, LIMIT, **options)
    calls = TowerCalls(model)
    rows = generate(model, batch, LIMIT, n=3, **options)
    calls.hook.remove()
    assert rows == expected and len({tuple(row) for row in rows}) == 6
    assert calls.count == 2
    with pytest.raises(ValueError, match="n is 2 at temperature 0"):
        generate(model, batch, n=2)


# ---------------------------------------------------------------------------- what an answer says, and how sure it is


@pytest.mark.parametrize("kind", KINDS)
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
    assert_close(torch.tensor([[[p for _, p in token.likeliest] for token in row] for row in rows]), top.values)


@every_golden
def test_stop_texts(name):
    """Every text of an answer as a stop text: the answer ends with the token that completes it."""
    model, processor = golden_model(name)
    batch = processor([user("What is this?")])
    (free,) = generate(model, batch, 20)
    text = TextStream(processor.tokenizer)
    whole = "".join(map(text.push, free)) + text.finish()
    for start in range(0, len(whole) - 3, 2):
        stop = [whole[start : start + 3], "never said"]
        (ids,) = generate(model, batch, 20, stop=stop, tokenizer=processor.tokenizer)
        assert ids == free[: len(ids)] == [*stream(model, batch, 20, stop=stop, tokenizer=processor.tokenizer)]
        text = TextStream(processor.tokenizer, stop)
        pieces = [text.push(id) for id in free]
        assert text.stopped and "".join(pieces) + text.finish() == whole[: whole.index(stop[0])]
        assert not any(pieces[len(ids) :])
        text, stopped = TextStream(processor.tokenizer, stop), []
        for id in ids:
            text.push(id)
            stopped.append(text.stopped)
        assert stopped == [False] * (len(ids) - 1) + [True]
    for wrong in (dict(stop=["a"]), dict(stop="a", tokenizer=processor.tokenizer),
                  dict(stop=[""], tokenizer=processor.tokenizer)):  # fmt: skip
        with pytest.raises(ValueError, match="stop is a list of texts"):
            generate(model, batch, **wrong)


# ---------------------------------------------------------------------------- raw text


@every_golden
def test_raw_text_follows_the_begin_token_as_it_is(name):
    _, processor = golden_model(name)
    encode, begin, marker = processor.tokenizer.encode, processor.bos_token_id, processor.image_token
    assert processor([user(" The sky is ")], raw=True)["input_ids"].tolist() == [[begin, *encode(" The sky is ")]]
    image = picture(0)
    batch = processor([user("Left <image_placeholder> right ", image)], raw=True, labels=True)
    before, after = (encode(text) for text in (f"Left {marker}", " right "))
    count = processor.image_tokens(image.size)
    expected = [begin, *before[:-1], *[processor.image_token_id] * count, *after]
    if processor.is_vl2:  # each stretch of text is tokenized on its own
        assert before[:-1] == encode("Left ")
    assert batch["input_ids"].tolist() == [expected]
    learnt = batch["labels"][0] >= 0  # whether of the begin token does not matter: nothing predicts it
    assert learnt[1:].tolist() == [id != processor.image_token_id for id in expected[1:]]


@pytest.mark.parametrize(
    "conversation, system",
    [([user("a"), user("b")], None), ([{"role": "assistant", "content": "a"}], None), ([user("a")], "Be kind."),
     ([{"role": "system", "content": "x"}, user("a")], None)],
)  # fmt: skip
def test_raw_text_is_one_message(conversation, system):
    with pytest.raises(ValueError, match="a raw text is one message of a user"):
        golden_model("vl-siglip")[1](conversation, system, raw=True)


def test_raw_from_the_command_line(capsys):
    model, processor = golden_model("vl-siglip")
    folder, image = str(golden("vl-siglip").folder), str(golden("vl-siglip").folder / "images" / "0.png")
    main(["--raw", "--model", folder, "--prompt", "A <image_placeholder> of", "--image", image, "--max-new-tokens", "9",
          "--dtype", "float32", "--device", "cpu"])  # fmt: skip
    (ids,) = generate(model, processor([user("A <image_placeholder> of", image)], raw=True), 9)
    assert capsys.readouterr().out.rstrip("\n") == processor.decode(ids).rstrip("\n")


# ---------------------------------------------------------------------------- chat

GENERATE = [sys.executable, str(ROOT / "generate.py"), "--chat", "--dtype", "float32", "--device", "cpu"]
SCENE = str(ROOT / "demo/images/scene.png")


def chat(lines: str | bytes, *arguments: str) -> subprocess.CompletedProcess:
    """`generate.py --chat` with these lines on standard input."""
    lines = lines.encode() if isinstance(lines, str) else lines
    done = subprocess.run([*GENERATE, *arguments], input=lines, capture_output=True)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


def test_chat_asks_about_pictures_and_saves_what_was_said(tmp_path):
    file = tmp_path / "said.json"
    questions = "What does the sign say?\nHow many shapes are there?\n"
    done = chat(f"/image {SCENE}\n\n{questions}/save {file}\n/quit\nnever asked\n")
    assert done.returncode == 0
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0] == {"role": "user", "content": "What does the sign say?", "images": [SCENE]}
    assert done.stdout == "".join(message["content"] + "\n" for message in messages[1::2])
    assert "PUSH" in messages[1]["content"] and "four" in messages[3]["content"]
    processor = Processor(ROOT / "demo/checkpoint")
    assert processor(messages[:3])["input_ids"].shape[1] > 20  # as the Python interface takes them


def test_chat_starts_over_and_takes_options(tmp_path):
    file = tmp_path / "said.json"
    first = ["--image", SCENE, "--prompt", "What is in the center?"]
    done = chat(f"/clear\nWhat is in the top left?\n/save {file}\n", *first)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "What is in the top left?", "images": []}


def test_bad_lines_in_chat_are_one_error_each_and_the_chat_goes_on(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    wrong = {
        "/shout": "/shout is no command",
        "/image": "needs the name of a file",
        "/image -": "needs the name of a file",
        "/image nowhere.png": "no such image file",
        f"/image {tmp_path}/text.png": "not an image",
        "/save": "expected a name that ends in .json",
        f"/save {tmp_path}/nowhere/a.json": "cannot be written",
        "<image_placeholder> and <image_placeholder>?": "2 image markers, but 1 image is given",
        "shape " * 3000: "/clear starts over",
        b"\xff\xfe": "the question is not valid UTF-8",
    }
    lines = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in wrong)
    done = chat(lines + b"\nHow many stars are there?\n", "--image", SCENE)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for error, expected in zip(errors, wrong.values(), strict=True):
        assert expected in error and len(error) < 400
    assert os.listdir(tmp_path) == ["text.png"]


def test_chat_near_the_end_of_the_context(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (ROOT / "demo/checkpoint").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 128
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    done = chat("How many shapes are there?\n" * 9, "--image", SCENE, "--model", str(folder))
    assert done.returncode == 0
    assert "tokens are left of the model's context of 128: /clear starts over" in done.stderr
    assert "over the model's context of 128" in done.stderr.splitlines()[-1]


def test_a_picture_given_twice_is_two_pictures(tmp_path):
    file = tmp_path / "said.json"
    done = chat(f"/image {SCENE}\n/image {SCENE}\nWhat is in the center?\n/save {file}\n", "--image", SCENE)
    assert done.returncode == 0 and json.loads(file.read_text())[0]["images"] == [SCENE] * 3


@pytest.mark.parametrize("option", ["--chat", "--prompt -", "--image -"])
def test_standard_input_that_is_closed_is_one_line(option):
    command = [sys.executable, str(ROOT / "generate.py"), *option.split()]
    done = subprocess.run(command, preexec_fn=lambda: os.close(0), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard input is closed\n")


@pytest.mark.parametrize("option", ["--raw", "--boxes x.png", "--prompt -", "--image -"])
def test_options_that_have_no_place_in_a_chat(option):
    done = chat("", *option.split())
    assert done.returncode == 2 and done.stderr.startswith("error: --") and done.stderr.count("\n") == 1


class Terminal:
    """A process on a terminal of so many columns: what it prints is read as it comes."""

    def __init__(self, command: list[str], columns: int):
        self.ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def read_until(self, text: str) -> str:
        """What came up to this text, and the text."""
        while text not in self.seen:
            try:
                piece = os.read(self.ours, 4096)
            except OSError:
                raise AssertionError(f"ended before {text!r}: {self.seen!r}") from None
            self.seen += piece.decode()
        before, text, self.seen = self.seen.partition(text)
        return before + text

    def say(self, keys: str) -> None:
        os.write(self.ours, keys.encode())


@pytest.mark.parametrize("columns", [80, 40])
def test_chat_on_a_terminal(columns):
    terminal = Terminal([*GENERATE, "--image", SCENE], columns)
    greeting = terminal.read_until("> ")
    lines = [line.rpartition("\r\033[K")[2] for line in greeting.split("\r\n")[-5:]]
    assert lines[0].startswith("/image FILE") and all(len(line) < 40 for line in lines)
    terminal.say("What does the sign say?\n")
    terminal.read_until("PUSH")
    terminal.read_until("> ")
    terminal.say("\x04")
    assert terminal.process.wait() == 0


def test_ctrl_c_gives_up_a_line_on_a_terminal(monkeypatch, capsys):
    class Keyboard(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    lines = iter([KeyboardInterrupt, "How many stars are there?", EOFError])

    def typed(prompt: str) -> str:
        if not isinstance(line := next(lines), str):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", Keyboard(io.BytesIO()))
    monkeypatch.setattr("builtins.input", typed)
    main(["--chat", "--image", SCENE, "--dtype", "float32", "--device", "cpu"])
    assert capsys.readouterr().out == "\nThe number of stars is one.\n\n"


def test_ctrl_c_stops_an_answer_which_stays_as_far_as_it_came(monkeypatch, capsys, tmp_path):
    """The first question gets no word, the second three tokens, the third its whole answer."""
    stops = iter([0, 3])

    def interrupted(*inputs, **options):
        left = next(stops, None)
        for id in stream(*inputs, **options):
            if left == 0:
                raise KeyboardInterrupt
            left = left and left - 1
            yield id

    file = tmp_path / "said.json"
    questions = "How many stars are there?", "Describe this image.", "What does the sign say?"
    lines = "\n".join([*questions, f"/save {file}"]).encode()
    monkeypatch.setattr("generate.stream", interrupted)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    main(["--chat", "--image", SCENE, "--dtype", "float32", "--device", "cpu"])
    said = json.loads(file.read_text())
    assert [message["content"] for message in said[::2]] == list(questions[1:]) and said[0]["images"] == [SCENE]
    assert 0 < len(said[1]["content"]) < 40 and said[3]["content"] == "It says PUSH."
    assert capsys.readouterr().out == f"{said[1]['content']}\nIt says PUSH.\n"
