"""The command line: the answer alone on standard output, and every bad input one `error:` line and status 2."""

import functools
import http.server
import io
import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, VL_GOLDENS, copy_checkpoint, golden, golden_model
from PIL import Image
from safetensors.torch import load, save_file

import generate
import load_weights
import processor
from load_weights import load_model, pack

SHORT = "--max-new-tokens 12 --dtype float32 --device cpu"
ASK = f"--model model --prompt Hello {SHORT}"
LOOK = f"--model model --image picture.png {SHORT}"


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 100000 x 100000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    png = bytearray(file.getvalue())
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder in which the commands run, with everything that they name."""
    desk = tmp_path_factory.mktemp("desk")
    picture = Image.open(golden("vl-siglip").folder / "images" / "0.png").convert("RGB")
    picture.save(desk / "picture.png")
    whole = (desk / "picture.png").read_bytes()
    (desk / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (desk / "empty.png").touch()
    (desk / "text.png").write_text("This is no picture.")
    (desk / "bomb.png").write_bytes(bomb())
    (desk / "large.png").write_bytes(whole + bytes(2**20))
    (desk / "folder").mkdir()
    copy_checkpoint("vl-siglip", desk / "model")
    for name, damage in DAMAGED_MODELS.items():
        damage(copy_checkpoint("vl-siglip", desk / name))
    return desk


@pytest.fixture
def run(desk, monkeypatch, capsys):
    """run(command) -> status, out, err of `python generate.py <command>`, run in this process."""
    monkeypatch.chdir(desk)

    def run(command: str) -> SimpleNamespace:
        status = 0
        try:
            generate.main(shlex.split(command))
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        lines = err.splitlines(keepends=True)
        cut = [line for line in lines if line.startswith("the answer was cut off")]
        return SimpleNamespace(status=status, out=out, err="".join(line for line in lines if line not in cut))

    return run


@pytest.fixture
def answer(run):
    """answer(command) -> what it printed; it must have gone well, with nothing on standard error."""

    def answer(command: str) -> str:
        result = run(command)
        assert (result.status, result.err) == (0, "")
        return result.out

    return answer


def by_hand(message: dict, name: str = "vl-siglip", dtype=torch.float32, system: str | None = None, **options) -> str:
    """What the command line should print, through the Python interface."""
    model, tested = golden_model(name)
    if dtype != torch.float32:
        model = pack(load_model(golden(name).folder, dtype=dtype))
    (ids,) = generate.generate(model, tested([message], system=system), max_new_tokens=12, **options)
    return tested.decode(ids).removeprefix(" ") + "\n"


HELLO = {"role": "user", "content": "Hello"}

# ------------------------------------------------------------------------------- answers


TWO_IMAGES = "<image_placeholder>A dog, and <image> what is the difference between 12 and 345?"


@pytest.mark.parametrize("name", VL_GOLDENS)
@pytest.mark.parametrize(
    "case, command",
    [
        (0, '--image 0.png --prompt "Describe this image in detail."'),
        (0, '--image 0.png --prompt "<image>Describe this image in detail."'),
        (1, f'--image 1.png --image 2.png --prompt "{TWO_IMAGES}"'),
        (3, '--prompt "Hello, who are you?"'),
    ],
    ids=["image first", "marker first", "two images, a marker in the middle", "text alone"],
)
def test_answers_are_the_originals(name, case, command, answer, monkeypatch):
    data = golden(name)
    monkeypatch.chdir(data.folder / "images")
    expected = golden_model(name)[1].decode(data.tensors[f"{case}.greedy"])
    assert answer(f"--model ../ {command} {SHORT}") == expected.removeprefix(" ") + "\n"


@pytest.mark.parametrize("length", range(1, 13))
def test_an_answer_cut_anywhere(length, answer):
    """What streams is the text of the tokens, a last character that is not whole included."""
    ids = golden("vl-siglip").tensors["3.greedy"][:length]
    text = answer(f'{ASK} --prompt "Hello, who are you?" --max-new-tokens {length}')
    assert text == golden_model("vl-siglip")[1].decode(ids) + "\n"


def test_default_prompt(answer):
    assert answer(LOOK) == answer(f'{LOOK} --prompt "<image>Describe this image."')


def test_system_text(answer):
    assert answer(f'{ASK} --system "Be brief."') == by_hand(HELLO, system="Be brief.")
    assert answer(f'{ASK} --system ""') == by_hand(HELLO, system="")
    assert answer(ASK) == by_hand(HELLO)


def test_sampling_options(answer):
    options = "--temperature 0.8 --top-k 30 --top-p 0.9 --repetition-penalty 1.3"
    first = answer(f"{ASK} {options} --seed 5")
    assert first == answer(f"{ASK} {options} --seed 5")
    assert first == by_hand(HELLO, temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.3, seed=5)
    assert first != answer(f"{ASK} {options} --seed 6")
    assert answer(f"{ASK} {options}")


@pytest.mark.parametrize("chunk_size", [100, 512, 10_000])
def test_chunks_change_nothing(chunk_size, answer):
    assert answer(f"{LOOK} --chunk-size {chunk_size}") == answer(LOOK)


@pytest.fixture
def loaded(monkeypatch) -> list:
    """The dtype and device of each model that a command loads."""
    loaded = []

    def load_and_note(path, *, dtype, device, **options):
        loaded.append((dtype, device.type))
        return load_model(path, dtype=dtype, device=device, **options)

    monkeypatch.setattr(generate, "load_model", load_and_note)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, answer, loaded):
    name = str(dtype).removeprefix("torch.")
    text = answer(f"--model model --prompt Hello --max-new-tokens 12 --device cpu --dtype {name}")
    assert text == by_hand(HELLO, dtype=dtype)
    assert loaded == [(dtype, "cpu")]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_and_saved(kind, run, desk):
    """The saved checkpoint gives the same answer, at once or later, and a failed --save leaves nothing behind."""

    def answer(command: str) -> str:
        result = run(command)
        assert result.status == 0 and (result.err == "" or "without a fast kernel here" in result.err)
        return result.out

    saved, other = f"--model saved-{kind}", {"int8": "int4", "int4": "int8"}[kind]
    first = answer(f"{LOOK} --quantize {kind} --save saved-{kind}")
    assert first == answer(f"{LOOK} --quantize {kind}") == answer(LOOK.replace("--model model", saved))
    refused = run(f"{ASK.replace('--model model', saved)} --quantize {other} --save no")
    assert refused.status == 2 and f"holds {kind} weights, which cannot become" in refused.err
    assert not (desk / "no").exists()


def test_layers_without_a_kernel_are_told_of(run, answer, monkeypatch):
    expected = answer(f"{LOOK} --quantize int8")
    monkeypatch.setattr("load_weights.kernel_agrees", lambda *_: False)
    result = run(f"{LOOK} --quantize int8")
    assert (result.status, result.out, result.err.count("\n")) == (0, expected, 1)
    assert "without a fast kernel here: 22, as language.layers.0." in result.err  # 3 times 7, and the head


def test_the_tokenizer_is_read_once(answer, monkeypatch):
    expected, read, folders = by_hand(HELLO), processor.load_tokenizer, []
    for module in (processor, load_weights):
        monkeypatch.setattr(module, "load_tokenizer", lambda path: folders.append(str(path)) or read(path))
    assert answer(ASK) == expected
    assert folders == ["model"]


def test_compile_changes_nothing_or_says_why_not(run, answer, monkeypatch):
    expected = answer(LOOK)
    result = run(f"{LOOK} --compile")
    assert result.status == 0 and result.out == expected
    assert result.err == "" or (result.err.startswith("--compile: not possible here") and result.err.count("\n") == 1)

    def broken(*arguments, **options):
        def fails(*arguments):
            raise RuntimeError("\nno C++ compiler\nmore")

        return fails

    monkeypatch.setattr(torch, "compile", broken)
    result = run(f"{LOOK} --compile")
    assert (result.status, result.out) == (0, expected)
    assert result.err == "--compile: not possible here, going on without it (no C++ compiler)\n"


@pytest.mark.parametrize("seconds, dtype", [(1.0, torch.bfloat16), (3.0, torch.float32)], ids=["native", "emulated"])
def test_auto_takes_what_is_here_and_fast(seconds, dtype, answer, loaded, monkeypatch):
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    monkeypatch.setattr(generate, "matmul_seconds", {torch.float32: 2.0, torch.bfloat16: seconds}.get)
    assert answer("--model model --prompt Hello --max-new-tokens 12") == by_hand(HELLO, dtype=dtype)
    assert loaded == [(dtype, "cpu")]


@pytest.mark.parametrize("file, mode", [("a.jpg", "RGB"), ("a.gif", "P"), ("a.png", "P"), ("b.png", "RGBA")])
def test_picture_formats(file, mode, answer, desk):
    """A picture of four greys, which every format keeps exactly, gives one answer."""
    greys = Image.new("L", (64, 48))
    for i, grey in enumerate((30, 90, 150, 210)):
        greys.paste(grey, (16 * i, 0, 16 * i + 16, 48))
    greys.convert("RGB").save(desk / "greys.png")
    greys.convert(mode).save(desk / file, **({"quality": 100} if file == "a.jpg" else {}))
    command = f"--model model {SHORT} --image"
    assert answer(f"{command} {file}") == answer(f"{command} greys.png") != answer(f"{command} picture.png")


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # the client has hung up, as it should


@pytest.fixture(scope="module")
def server(desk):
    """The address under which a local web server gives the files of the desk."""
    with Server(("127.0.0.1", 0), functools.partial(Files, directory=desk)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_image_by_address(answer, server):
    assert answer(f"--model model --image {server}/picture.png {SHORT}") == answer(LOOK)


def test_help(run):
    result = run("--help")
    assert (result.status, result.err) == (0, "")
    for option in (
        "image", "prompt", "model", "system", "max-new-tokens", "temperature", "top-k", "top-p", "repetition-penalty",
        "seed", "dtype", "device", "chunk-size", "quiet",
    ):  # fmt: skip
        assert f"--{option}" in result.out


# ------------------------------------------------------------------------------- streams


@contextmanager
def terminal():
    """Inside, standard error is a terminal; gives a function that tells what it has been sent."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()

    def sent() -> str:
        text = b""
        while select.select([ours], [], [], 0.2)[0]:  # a terminal passes on line by line, and not at once
            text += os.read(ours, 2**16)
        return text.decode()

    with open(theirs, "w") as file, redirect_stderr(file):
        yield sent
    os.close(ours)


def test_progress_on_a_terminal(answer):
    text = by_hand(HELLO)
    with terminal() as sent:
        assert answer(ASK) == text
        first, *steps = sent().split("\r\033[K")  # each takes the place of the last
        assert answer(f"{ASK} --quiet") == text
        assert sent().startswith("the answer was cut off")
    tokens = golden_model("vl-siglip")[1]([HELLO])["input_ids"].shape[1]
    *loading, loaded, cleared, summary = steps
    summary, cut = summary.split("\r\n", 1)
    assert first == "" and loading[0].endswith("% as float32 on cpu: loading model")
    shares = [int(step.partition("%")[0]) for step in loading]
    assert shares == sorted(shares) and shares[-1] == 100
    assert loaded == f"prefilling {tokens} tokens"
    assert cleared == ""
    assert summary.startswith(f"{tokens} tokens read in ") and summary.endswith(" tokens/s")
    assert "12 written in " in summary and cut == "the answer was cut off after 12 tokens, by --max-new-tokens\r\n"


@pytest.mark.parametrize("when", ["before the answer", "within it"])
def test_a_warning_on_a_terminal_has_its_own_line(when, answer, monkeypatch):
    """Also below the answer's unfinished line, which may stand on the same terminal: there a line's end comes first."""

    def fails(*arguments, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fails if when == "before the answer" else lambda *_, **__: fails)
    monkeypatch.setattr(generate.TextStream, "push", lambda self, id: "a")
    monkeypatch.setattr(generate.TextStream, "finish", lambda self: "")
    with terminal() as sent:
        assert answer(f"{ASK} --compile") == 12 * "a" + "\n"
        *lines, end = (line.rpartition("\r\033[K")[2] for line in sent().split("\r\n"))
    *above, summary, _ = lines
    warning = "--compile: not possible here, going on without it (no C++ compiler)"
    assert above == ([warning] if when == "before the answer" else ["", warning])
    assert " tokens read in " in summary and end == ""


def test_an_error_takes_the_place_of_progress(run):
    with terminal() as sent:
        assert run("--model truncated-weights --prompt Hello").status == 2
        *_, last = sent().split("\r\033[K")
    assert last.startswith("error: truncated-weights/model.safetensors") and last.count("\n") == 1


def test_an_output_that_lacks_characters(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(LOOK).status == 0
    text = by_hand({"role": "user", "content": "<image>Describe this image.", "images": ["picture.png"]})
    assert not text.isascii()
    assert sys.stdout.buffer.getvalue() == text.encode("ascii", errors="replace")


def test_streams_that_are_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(ASK) == SimpleNamespace(status=0, out="", err="")
    monkeypatch.setattr(sys, "stderr", None)
    assert run(f"{ASK} --top-p 2") == SimpleNamespace(status=2, out="", err="")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_output_that_is_full(run, monkeypatch):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    assert run(ASK) == SimpleNamespace(status=2, out="", err="error: [Errno 28] No space left on device\n")
    with suppress(OSError):
        full.close()


def test_interrupted_while_loading(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_model", interrupted)
    with terminal() as sent:
        assert run(ASK) == SimpleNamespace(status=130, out="", err="")
        assert sent().endswith("\r\033[K")  # no half line is left behind


# As users run it: a process of its own.


def start(command: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *shlex.split(command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C as a shell sets it up, even where these tests run in the background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture
def endless(desk) -> str:
    """A command whose answer goes on for thousands of tokens."""
    (desk / "model" / "generation_config.json").write_text('{"eos_token_id": []}')
    yield "--model model --prompt Hello --max-new-tokens 3500 --dtype float32 --device cpu"
    (desk / "model" / "generation_config.json").unlink()


def test_a_process_of_its_own(desk):
    process = start(LOOK, desk)
    out, err = process.communicate(timeout=60)
    message = {"role": "user", "content": "<image>Describe this image.", "images": [str(desk / "picture.png")]}
    assert (process.returncode, out.decode()) == (0, by_hand(message))
    assert err.decode() == "the answer was cut off after 12 tokens, by --max-new-tokens\n"


def test_ctrl_c_keeps_what_was_said(desk, endless):
    process = start(endless, desk)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    answer = (first + out).decode()
    assert answer.startswith(by_hand(HELLO)[:1]) and answer.endswith("\n")
    assert len(answer) < 3000


def test_a_reader_that_leaves(desk, endless):
    process = start(endless, desk)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


# ------------------------------------------------------------------------------- bad input


def edit_weights(folder: Path, changes: dict) -> None:
    """Change the tensors of a checkpoint; None takes one away."""
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes()) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def lose_a_shard(folder: Path) -> None:
    names = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "lost.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def take_another_tokenizer(folder: Path) -> None:
    """One with ids that the model does not have."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["id"] = 600
    file.write_text(json.dumps(content))


def rewrite(name: str, change):
    """A damage that changes the bytes of one file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


NORM = "language_model.model.norm.weight"
WEIGHTS = "model.safetensors: not a readable weight file"
DAMAGED_MODELS = {
    "without-config": lambda folder: (folder / "config.json").unlink(),
    "broken-json": rewrite("config.json", lambda raw: raw[:-20]),
    "unknown-architecture": rewrite("config.json", lambda raw: raw.replace(b"multi_modality", b"llava")),
    "without-tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "without-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "without-shard": lose_a_shard,
    "truncated-weights": rewrite("model.safetensors", lambda raw: raw[:-1]),
    "truncated-header": rewrite("model.safetensors", lambda raw: raw[:100]),
    "lying-header": rewrite("model.safetensors", lambda raw: struct.pack("<Q", 2**60) + raw[8:]),
    "missing-tensor": lambda folder: edit_weights(folder, {NORM: None}),
    "extra-tensor": lambda folder: edit_weights(folder, {"extra": torch.ones(1)}),
    "wrong-shape": lambda folder: edit_weights(folder, {NORM: torch.ones(65)}),
    "other-tokenizer": take_another_tokenizer,
}

# What is wrong with the command: words of the one line that says so.
BAD_COMMANDS = {
    # The command itself.
    "": "nothing to do: give --image, --prompt or both",
    f"{ASK} --save new": "--save writes a quantized checkpoint, give --quantize",
    f"{ASK} --quantize int3": "--quantize: invalid choice",
    f"{ASK} --quantize int8 --save model": "--save model: is there already, expected the name of a new folder",
    f"{ASK} --quantize int8 --save nowhere/new": "expected the name of a new folder, in a folder that is there",
    "--model model": "nothing to do: give --image, --prompt or both",
    f"{ASK} --verbose": "unrecognized arguments: --verbose",
    f"{ASK} picture.png": "unrecognized arguments: picture.png",
    f"{ASK} --image": "argument --image: expected one argument",
    # Options out of range, or no numbers.
    f"{ASK} --max-new-tokens 0": "max_new_tokens is 0, expected",
    f"{ASK} --max-new-tokens many": "argument --max-new-tokens: invalid int value: 'many'",
    f"{ASK} --temperature -0.1": "temperature is -0.1, expected",
    f"{ASK} --temperature 1e-300": "temperature is 1e-300, expected",
    f"{ASK} --temperature nan": "temperature is nan, expected",
    f"{ASK} --temperature inf": "temperature is inf, expected",
    f"{ASK} --temperature hot": "argument --temperature: invalid float value: 'hot'",
    f"{ASK} --temperature 1 --top-k -1": "top_k is -1, expected",
    f"{ASK} --top-k 1.5": "argument --top-k: invalid int value: '1.5'",
    f"{ASK} --temperature 1 --top-p 0": "top_p is 0.0, expected",
    f"{ASK} --temperature 1 --top-p 1.1": "top_p is 1.1, expected",
    f"{ASK} --temperature 1 --top-p nan": "top_p is nan, expected",
    f"{ASK} --repetition-penalty 0": "repetition_penalty is 0.0, expected",
    f"{ASK} --repetition-penalty -2": "repetition_penalty is -2.0, expected",
    f"{ASK} --temperature 1 --seed -1": "seed is -1, expected",
    f"{ASK} --temperature 1 --seed 9223372036854775808": "seed is 9223372036854775808, expected",
    f"{ASK} --seed one": "argument --seed: invalid int value: 'one'",
    f"{ASK} --chunk-size 0": "chunk_size is 0, expected",
    f"{ASK} --chunk-size {10**30}": f"chunk_size is {10**30}, expected",
    f"{ASK} --chunk-size half": "argument --chunk-size: invalid int value: 'half'",
    f"{ASK} --dtype int8": "argument --dtype: invalid choice: 'int8'",
    f"{ASK} --device tpu": "argument --device: invalid choice: 'tpu'",
    f"{ASK} --device cuda": "--device cuda: there is none here, expected one of cpu",
    f"{ASK} --device mps": "--device mps: there is none here, expected one of cpu",
    # Images.
    f"{ASK} --image missing.png": "missing.png: no such image file",
    f"{LOOK} --image missing.png": "missing.png: no such image file",
    f"{ASK} --image ''": "no such image file",
    f"{ASK} --image 'two\nlines.png'": "two lines.png: no such image file",
    f"{ASK} --image empty.png": "empty.png: not an image",
    f"{ASK} --image text.png": "text.png: not an image",
    f"{ASK} --image truncated.png": "truncated.png: damaged image data",
    f"{ASK} --image folder": "folder: not a file",
    f"{ASK} --image bomb.png": "bomb.png: 100000 x 100000 pixels, over the limit of 256000000 pixels",
    f"{ASK} --image ftp://127.0.0.1/a.png": "ftp://127.0.0.1/a.png: only http, https, data and file addresses are read",
    f"{ASK} --image file:///picture.png": "file:///picture.png: no such image file",
    f"{ASK} --image SERVER/missing.png": "/missing.png: HTTP Error 404",
    f"{ASK} --image SERVER/text.png": "/text.png: not an image",
    f"{ASK} --image SERVER/large.png": "/large.png: more than the limit of 1000000 bytes",
    f"{ASK} --image UNREACHABLE/a.png": "Connection refused",
    # Prompts.
    f"{LOOK} --prompt '<image> or <image>?'": "the text has 2 image markers, but 1 image is given",
    f"{LOOK} --image picture.png --prompt '<image>?'": "the text has 1 image marker, but 2 images are given",
    f"{ASK} --prompt 'What is <image>?'": "the text has 1 image marker, but 0 images are given",
    f"{LOOK} {'--image picture.png ' * 7}": "over the model's context of 4096",
    f"{ASK} --prompt '{'word ' * 5000}'": "over the model's context of 4096",
    # Checkpoints.
    "--model nowhere --prompt Hello": "--model 'nowhere' is not there, expected a checkpoint folder",
    "--model picture.png --prompt Hello": "--model 'picture.png' is a file, expected a checkpoint folder",
    f"{ASK} --top-p 0.5": "--top-p has no effect at temperature 0, give --temperature",
    f"{ASK} --boxes found.png --image picture.png": "--boxes needs a DeepSeek-VL2",
    "--model without-config --prompt Hello": "without-config/config.json: no such file",
    "--model broken-json --prompt Hello": "broken-json/config.json: not valid JSON",
    "--model unknown-architecture --prompt Hello": "unknown-architecture/config.json: model_type 'llava', expected",
    "--model without-tokenizer --prompt Hello": "without-tokenizer: expected a tokenizer.json or tokenizer.model",
    "--model without-weights --prompt Hello": "without-weights: no weights, expected model.safetensors or",
    "--model without-shard --prompt Hello": "without-shard/lost.safetensors: no such file",
    "--model truncated-weights --prompt Hello": f"truncated-weights/{WEIGHTS}",
    "--model truncated-header --prompt Hello": f"truncated-header/{WEIGHTS}",
    "--model lying-header --prompt Hello": f"lying-header/{WEIGHTS}",
    "--model missing-tensor --prompt Hello": f"missing-tensor: missing tensor {NORM}, expected shape [64]",
    "--model extra-tensor --prompt Hello": "extra-tensor: unexpected tensor extra",
    "--model wrong-shape --prompt Hello": f"tensor {NORM} has shape [65], config.json says [64]",
    "--model other-tokenizer --prompt Hello": "to 600, expected 0 to 511; does the tokenizer fit?",
}


def test_without_a_model_and_without_the_demo(run, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "DEMO", tmp_path / "demo")
    result = run("--prompt Hello")
    assert (result.status, result.out) == (2, "") and result.err.startswith("error: --model is missing, expected a")


@pytest.mark.parametrize(
    "command, words", BAD_COMMANDS.items(), ids=[command.replace(SHORT, "")[-60:] for command in BAD_COMMANDS]
)
def test_bad_input_is_one_line(command, words, run, server, monkeypatch):
    monkeypatch.setattr(processor, "MAX_DOWNLOAD_BYTES", 1_000_000)
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        unreachable = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = run(command.replace("SERVER", server).replace("UNREACHABLE", unreachable))
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.endswith("\n") and result.err.count("\n") == 1
    assert words in result.err


def test_the_python_snippet_of_readme_runs():
    snippet = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    result = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.lstrip().startswith("It says PUSH.\n")
