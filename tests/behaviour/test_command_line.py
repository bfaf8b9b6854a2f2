"""The command line: the answer alone on standard output, and every bad input one `error:` line and status 2."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from types import SimpleNamespace

import figures
import pytest
import torch
from commands import SCENE, assert_refused, open_terminal, run_command
from conftest import DEMO, ROOT, VL_GOLDENS, copy_checkpoint, golden, golden_model

import generate
from load_weights import load_model, pack

SHORT = "--max-new-tokens 12 --dtype float32 --device cpu"
ASK = f"--model model --prompt Hello {SHORT}"
LOOK = f"--model model --image picture.png {SHORT}"
CUT = "the answer was cut off after 12 tokens, by --max-new-tokens\n"
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder in which the commands run, with everything that they name."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "picture.png").symlink_to(golden("vl-siglip").folder / "images" / "0.png")
    (desk / "model").symlink_to(golden("vl-siglip").folder)
    (copy_checkpoint("vl-siglip", desk / "endless") / "generation_config.json").write_text('{"eos_token_id": []}')
    weights = copy_checkpoint("vl-siglip", desk / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    tokenizer = copy_checkpoint("vl-siglip", desk / "other-tokenizer") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"id": 400', '"id": 600'))  # an id that the model lacks
    return desk


@pytest.fixture
def run(desk, monkeypatch, capsys):
    """run(command) -> status, out, err of `python generate.py <command>`, run in this process."""
    monkeypatch.chdir(desk)
    return lambda command, stdin=b"": run_command(generate.main, shlex.split(command), capsys, stdin)


@pytest.fixture
def answer(run):
    """answer(command) -> what it printed; it must have gone well, with no word but that the answer was cut off."""

    def answer(command: str, err: str = CUT) -> str:
        result = run(command)
        told = [line for line in result.err.splitlines(True) if "without a fast kernel here" not in line]
        assert (result.status, "".join(told)) == (0, err)
        return result.out

    return answer


def start(command: str, folder: Path = ROOT, stderr=subprocess.PIPE, **environment: str) -> subprocess.Popen:
    """`python generate.py <command>` in a process of its own."""
    # Ctrl-C as a shell sets it up, even where these tests run in the background, which ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *shlex.split(command)],
        cwd=folder, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        bufsize=0,
    )  # fmt: skip


def by_hand(message: dict = HELLO, dtype=torch.float32, system: str | None = None, raw: bool = False, **options) -> str:
    """What the command line should print, through the Python interface."""
    model, processor = golden_model("vl-siglip")
    if dtype != torch.float32:
        model = pack(load_model(golden("vl-siglip").folder, dtype=dtype))
    (ids,) = generate.generate(model, processor([message], system, raw=raw), max_new_tokens=12, **options)
    text = processor.decode(ids)
    return (text if raw else text.removeprefix(" ")) + "\n"


# ------------------------------------------------------------------------------- answers

TWO_IMAGES = "<image_placeholder>A dog, and <image> what is the difference between 12 and 345?"
QUESTIONS = {  # of the golden cases
    0: "--image 0.png --prompt 'Describe this image in detail.'",
    1: f"--image 1.png --image 2.png --prompt '{TWO_IMAGES}'",
    3: "--prompt 'Hello, who are you?'",
}


@pytest.mark.parametrize("name", VL_GOLDENS)
def test_answers_are_the_originals(name, answer, monkeypatch):
    data = golden(name)
    monkeypatch.chdir(data.folder / "images")
    for case, question in QUESTIONS.items():
        expected = golden_model(name)[1].decode(data.tensors[f"{case}.greedy"])
        assert answer(f"--model ../ {question} {SHORT}") == expected.removeprefix(" ") + "\n"


OPTIONS = {
    "--system 'Be brief.'": {"system": "Be brief."}, "--system ''": {"system": ""},
    "--raw": {"raw": True}, "--chunk-size 3": {},
    "--dtype bfloat16": {"dtype": torch.bfloat16}, "--dtype float16": {"dtype": torch.float16},
    "--temperature 0.8 --top-k 30 --top-p 0.9 --repetition-penalty 1.3 --seed 5":
        dict(temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.3, seed=5),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_options_do_what_they_do_in_python(options, answer):
    assert answer(f"{ASK} {options}") == by_hand(**OPTIONS[options])


def test_prompts_by_default_and_from_standard_input(run, answer):
    assert answer(LOOK) == answer(f"{LOOK} --prompt '<image>Describe this image.'")
    picture, question = Path(SCENE).read_bytes(), "What does the sign say?"
    assert run(f"--image - --prompt '{question}'", stdin=picture).out == "It says PUSH.\n"
    assert run(f"--prompt - --image {SCENE}", stdin=question.encode()).out == "It says PUSH.\n"
    assert_refused(run("--prompt -", stdin=b"\xff"), "error: standard input is not valid UTF-8\n")


def test_an_answer_ends_before_a_stop_text_and_shows_what_was_cut_within_a_character(answer):
    text = by_hand()
    assert answer(f"{ASK} --stop {shlex.quote(text[5:8])} --stop never", err="") == text[: text.index(text[5:8])] + "\n"
    ids, decode = golden("vl-siglip").tensors["3.greedy"].tolist(), golden_model("vl-siglip")[1].decode
    length = next(n for n in range(2, 12) if decode(ids[:n]).endswith("\ufffd"))
    shown = answer(f'{ASK} --prompt "Hello, who are you?" --max-new-tokens {length}', CUT.replace("12", f"{length}"))
    assert shown == decode(ids[:length]) + "\n"


def test_quantized_and_saved(run, answer, desk):
    """The saved checkpoint gives the same answer, at once or later, and a failed --save leaves nothing behind."""
    first = answer(f"{LOOK} --quantize int4 --save four")
    assert first == answer(f"{LOOK} --quantize int4") == answer(f"{LOOK} --model four")
    assert run("--model model --quantize int8 --save eight --dtype float32 --device cpu") == SimpleNamespace(
        status=0, out="", err=""
    )
    assert answer(f"{LOOK} --quantize int8") == answer(f"{LOOK} --model eight")
    assert_refused(run(f"{ASK} --model four --quantize int8 --save no"), "holds int4 weights, which cannot become")
    assert not (desk / "no").exists()


def test_layers_without_a_kernel_are_told_of(run, monkeypatch):
    expected = run(f"{LOOK} --quantize int8")
    assert (expected.status, expected.err) == (0, CUT)
    monkeypatch.setattr("load_weights.agrees", lambda *_: False)
    monkeypatch.setattr("load_weights.pays", lambda *_: False)
    result = run(f"{LOOK} --quantize int8")
    assert (result.status, result.out, result.err.count("\n")) == (0, expected.out, 2)
    assert "without a fast kernel here: 22, as language.layers.0." in result.err  # 3 times 7, and the head


@pytest.fixture
def without_gpu(monkeypatch):
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)


@pytest.mark.parametrize("seconds, dtype", [(1.0, torch.bfloat16), (3.0, torch.float32)], ids=["native", "emulated"])
def test_auto_takes_what_is_here_and_fast(seconds, dtype, without_gpu, monkeypatch):
    monkeypatch.setattr(generate, "matmul_seconds", {torch.float32: 2.0, torch.bfloat16: seconds}.get)
    assert generate.pick_dtype("auto", generate.pick_device("auto")) == dtype


def test_warnings_are_no_part_of_the_first_command():
    out, err = start(f"--image {SCENE}", PYTHONWARNINGS="error").communicate()
    assert err.decode() == generate.DEMO_NOTICE + "\n"
    assert out.startswith(b"In the top left a small black circle, in the top right a small yellow star")


def test_the_notice_of_the_demos_comes_by_any_name(run, desk):
    (desk / "link").symlink_to(DEMO / "checkpoint")
    for folder in (DEMO / "checkpoint", f"{DEMO}/../demo/checkpoint/", "link", DEMO / "vl2"):
        name = "vl2" if folder == DEMO / "vl2" else "checkpoint"
        told = run(f"--model {folder} --prompt 'How many stars are there?' {SHORT}").err
        assert f"the small model in demo/{name}, which knows" in told


def test_the_python_snippet_of_readme_runs(monkeypatch, capsys):
    snippet = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(ROOT)
    exec(snippet, {})
    assert capsys.readouterr().out.lstrip().startswith("It says PUSH.\n")


@contextmanager
def terminal(columns: int = 0):
    """Inside, standard error is a terminal; gives a function that tells what it has been sent."""
    ours, theirs = open_terminal(columns)

    def sent() -> str:
        os.write(theirs, b"\0")  # behind all else: a terminal passes on line by line, and not at once
        text = b""
        while not text.endswith(b"\0"):
            text += os.read(ours, 2**16)
        return text[:-1].decode()

    with open(theirs, "w") as file, redirect_stderr(file):
        yield sent
    os.close(ours)


def test_progress_on_a_terminal(answer):
    text = by_hand()
    with terminal() as sent:
        assert answer(ASK, err="") == text
        first, *steps = sent().split("\r\033[K")  # each takes the place of the last
        assert answer(f"{ASK} --quiet", err="") == text
        assert sent() == CUT.replace("\n", "\r\n")
    tokens = golden_model("vl-siglip")[1]([HELLO])["input_ids"].shape[1]
    *loading, loaded, cleared, summary = steps
    summary, cut = summary.split("\r\n", 1)
    assert first == "" and loading[0].endswith("% as float32 on cpu: loading model")
    shares = [int(step.partition("%")[0]) for step in loading]
    assert shares == sorted(shares) and shares[-1] == 100
    assert (loaded, cleared, cut) == (f"prefilling {tokens} tokens", "", CUT.replace("\n", "\r\n"))
    assert re.fullmatch(rf"{tokens} tokens read in .*12 written in .* tokens/s", summary)


def test_progress_fits_the_window(answer, desk):
    (desk / ("long" * 20)).symlink_to(desk / "model")
    with terminal(columns=40) as sent:
        answer(f"{ASK} --model {'long' * 20}", err="")
        progress = [step.split("\r\n")[0] for step in sent().split("\r\033[K")]
    assert any("100%" in step for step in progress) and all(len(step) < 40 for step in progress)


@pytest.mark.parametrize("early", [True, False], ids=["before the answer", "within it"])
def test_where_nothing_compiles_one_line_says_why(early, answer, monkeypatch):
    """On a terminal a line of its own, also below the answer's unfinished line, which may stand on the same one."""
    warning = "--compile: not possible here, going on without it (no C++ compiler)"

    def fail(*_, **__):
        raise RuntimeError("no C++ compiler" if early else "\nno C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail if early else lambda *_, **__: fail)
    assert answer(f"{ASK} --compile", err=f"{warning}\n{CUT}") == by_hand()
    monkeypatch.setattr(generate.TextStream, "push", lambda self, id: "a")
    monkeypatch.setattr(generate.TextStream, "finish", lambda self: "")
    with terminal() as sent:
        assert answer(f"{ASK} --compile", err="") == 12 * "a" + "\n"
        *lines, end = (line.rpartition("\r\033[K")[2] for line in sent().split("\r\n"))
    *above, summary, _ = lines
    assert above == ([warning] if early else ["", warning])
    assert " tokens read in " in summary and end == ""


# ------------------------------------------------------------------------------- streams, Ctrl-C


def test_an_output_that_lacks_characters(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run(LOOK).status == 0
    text = by_hand({"role": "user", "content": "<image>Describe this image.", "images": ["picture.png"]})
    assert not text.isascii()
    assert sys.stdout.buffer.getvalue() == text.encode("ascii", errors="replace")


def test_streams_that_are_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(ASK) == SimpleNamespace(status=0, out="", err=CUT)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(f"{ASK} --top-p 2") == SimpleNamespace(status=2, out="", err="")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_is_full(run, monkeypatch):
    """For the answer it is an error; for messages it changes nothing, not even the status at the process's end."""
    full = open("/dev/full", "w")
    process = start(f"--prompt Hello {SHORT}", stderr=full)
    assert process.communicate()[0] and process.returncode == 0
    monkeypatch.setattr(sys, "stdout", full)
    assert run(ASK) == SimpleNamespace(status=2, out="", err="error: [Errno 28] No space left on device\n")
    with suppress(OSError):
        full.close()


@pytest.mark.parametrize("module", ["argparse", "torch"])
def test_ctrl_c_while_importing_ends_in_silence(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    process = start("--prompt Hello", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"") and process.returncode == 130


def test_interrupted_while_loading(run, monkeypatch):
    def interrupted(*_, progress, **__):
        progress(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_model", interrupted)
    with terminal() as sent:
        assert run(ASK) == SimpleNamespace(status=130, out="", err="")
        assert sent().endswith("\r\033[K")  # no half line is left behind


ENDLESS = f"--model endless --prompt Hello {SHORT} --max-new-tokens 3500"


def test_ctrl_c_keeps_what_was_said(desk):
    process = start(ENDLESS, desk)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    answer = (first + out).decode()
    assert answer.startswith(by_hand()[:1]) and answer.endswith("\n") and len(answer) < 3000


def test_a_reader_that_leaves(desk):
    process = start(ENDLESS, desk)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments", ["--help", "--imag x --foo", "--temperature nan", "--save a", ""])
def test_help_and_wrong_options_do_not_wait_for_torch(arguments, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    process = start(arguments, PYTHONPATH=str(tmp_path))
    out, err = process.communicate()
    if arguments == "--help":
        assert process.returncode == 0 and out.startswith(b"usage:")
    else:
        assert process.returncode == 2 and re.fullmatch(rb"error: [^\n]+\n", err)


# What is wrong with the command: words of the one line that says so. What `generate`, the processor and the loading
# of checkpoints refuse is in the tests of each; here is one of a kind.
BAD_COMMANDS = {
    "": "nothing to do: give --image, --prompt or both", "--a": "unrecognized arguments: --a\n",
    "photo.jpg": "unrecognized arguments: photo.jpg; pictures are given with --image",
    "--prompt - --image -": "--prompt and --image both read standard input, give a file for one",
    "--prompt \udcff\udcfe": "--prompt is not valid UTF-8", f"{ASK} --stop \udcff": "--stop is not valid UTF-8",
    f"{ASK} --system \udcff": "--system is not valid UTF-8", f"{ASK} --stop ''": "--stop needs a text",
    f"{ASK} --max-new-tokens many": "argument --max-new-tokens: invalid int value: 'many'",
    f"{ASK} --temperature 1 --top-p 1.1": "top_p is 1.1, expected",
    f"{ASK} --top-p 0.5": "--top-p has no effect at temperature 0, give --temperature",
    f"{ASK} --top-k 5": "--top-k has no effect at temperature 0, give --temperature",
    f"{ASK} --seed 1": "--seed has no effect at temperature 0, give --temperature",
    f"{ASK} --raw --system Hi": "--system has no place in a --raw prompt",
    "--quantize int8 --save new --stop x": "--save alone answers nothing, its options are --model",
    f"{ASK} --save new": "--save writes a quantized checkpoint, give --quantize",
    f"{ASK} --quantize int8 --save model": "--save model: is there already, expected the name of a new folder",
    f"{ASK} --device cuda": "--device cuda: there is none here, expected one of cpu",
    f"{ASK} --image 'two\nlines.png'": "two lines.png: no such image file",
    f"{ASK} --boxes found.png --image picture.png": "--boxes needs a DeepSeek-VL2",
    f"{LOOK} --prompt '<image> or <image>?'": "the text has 2 image markers, but 1 image is given",
    f"{ASK} --model nowhere": "--model 'nowhere' is not there, expected a checkpoint folder",
    f"{ASK} --model ~nobody": "--model '~nobody' is not there, expected a checkpoint folder",
    f"{ASK} --model ''": "--model '' is not there, expected a checkpoint folder",
    f"{ASK} --model model/config.json": "is a file, expected a checkpoint folder",
    f"{ASK} --model {'a' * 10**5}": "File name too long", f"{ASK} --model .": "config.json: no such file",
    f"{ASK} --model damaged": "damaged/model.safetensors: not a readable weight file",
    f"{ASK} --model other-tokenizer": "to 600, expected 0 to 511; does the tokenizer fit?",
}  # fmt: skip


@pytest.mark.parametrize("command", BAD_COMMANDS, ids=lambda command: command.removeprefix(ASK)[-60:])
def test_bad_input_is_one_line(command, run, without_gpu):
    assert_refused(run(command), BAD_COMMANDS[command])


def test_bad_input_elsewhere(run, monkeypatch, capsys, tmp_path):
    """Where a program takes no pictures, and where the demo is not there."""
    assert_refused(run_command(figures.main, ["photo.jpg"], capsys), "unrecognized arguments: photo.jpg\n")
    monkeypatch.setattr(generate, "DEMO", tmp_path / "demo")
    assert_refused(run("--prompt Hello"), "error: --model is missing, expected a")
