"""The command's first seconds and its terminal."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stderr

import pytest
from conftest import ROOT, copy_checkpoint, run

import generate

GENERATE, SCENE = ROOT / "generate.py", str(ROOT / "demo/images/scene.png")
ASK = ["--prompt", "How many stars are there?", "--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]


def without_torch(tmp_path, then: str, module: str = "torch") -> dict[str, str]:
    """An environment in which `import torch`, or of another module, runs `then`."""
    (tmp_path / f"{module}.py").write_text(then)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--imag x --foo", "--top-k 5", "--seed 1", "--temperature nan", "--max-new-tokens 0", "--chunk-size -1",
     "--temperature 1 --top-p 2", "--repetition-penalty inf", "--save a", "", "--quiet"],
)  # fmt: skip
def test_help_and_wrong_options_do_not_wait_for_torch(arguments, tmp_path):
    arguments, status = arguments.split(), 2 * (arguments != "--help")
    done = run(GENERATE, *arguments, env=without_torch(tmp_path, "raise SystemExit('imported')"))
    assert done.returncode == status and "imported" not in done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) if status else done.stdout.startswith("usage:")


@pytest.mark.parametrize("module", ["argparse", "torch"])
def test_ctrl_c_while_importing_ends_in_silence(module, tmp_path):
    environment = without_torch(tmp_path, "import time\nprint('importing', flush=True)\ntime.sleep(60)", module)
    process = subprocess.Popen(
        [sys.executable, GENERATE, *ASK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"") and process.returncode == 130


def test_a_full_disk_for_messages_changes_nothing():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, GENERATE, *ASK], stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("name", ["checkpoint", "../demo/checkpoint/", "a link", "vl2"])
def test_the_notice_of_the_demos_comes_by_any_name(name, tmp_path, capsys):
    (tmp_path / "link").symlink_to(ROOT / "demo/checkpoint")
    folder = tmp_path / "link" if name == "a link" else ROOT / "demo" / name
    generate.main([*ASK, "--model", str(folder)])
    told = capsys.readouterr().err
    assert f"the small model in demo/{'vl2' if name == 'vl2' else 'checkpoint'}, which knows" in told


def test_warnings_are_no_part_of_the_first_command():
    done = run("-W", "error", GENERATE, "--image", SCENE)
    assert (done.returncode, done.stderr) == (0, generate.DEMO_NOTICE + "\n")
    assert done.stdout.startswith("In the top left a small black circle, in the top right a small yellow star")


def test_progress_fits_the_window(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "a folder with a long name, as they are in home folders of people")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(theirs, "w") as file, redirect_stderr(file):
        generate.main([*ASK, "--model", str(folder)])
        sent = os.read(ours, 2**20)
    os.close(ours)
    progress = [line for line in sent.decode().replace("\r\n", "\n").split("\r\033[K") if line.strip()]
    assert any("100%" in line for line in progress)
    assert all(len(line.split("\n")[0]) < 40 for line in progress)


def test_quantize_and_save_need_no_question(tmp_path, capsys):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    generate.main(["--model", str(folder), "--quantize", "int8", "--save", str(tmp_path / "small")])
    assert capsys.readouterr() == ("", "")
    generate.main([*ASK, "--model", str(tmp_path / "small")])
    assert capsys.readouterr().out


BAD_OPTIONS = [
    (["photo.jpg"], "unrecognized arguments: photo.jpg; pictures are given with --image"),
    ([*ASK, "--model", ""], "--model '' is not there, expected a checkpoint folder"),
    ([*ASK, "--model", str(ROOT / "demo/checkpoint/config.json")], "is a file, expected a checkpoint folder"),
    (["--prompt", "\udcff\udcfe"], "--prompt is not valid UTF-8"),
    (["--prompt", "a", "--stop", "\udcff"], "--stop is not valid UTF-8"),
    ([*ASK, "--model", "a" * 10**5], "File name too long"),
    ([*ASK, "--image", "x" * 10**5], "no such image file"),
    (["--prompt", "-", "--image", "-"], "--prompt and --image both read standard input, give a file for one"),
]


@pytest.mark.parametrize("arguments, message", BAD_OPTIONS, ids=[message[:20] for _, message in BAD_OPTIONS])
def test_errors_name_the_option(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        generate.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1 and len(error) < 1100


@pytest.mark.parametrize(
    "script, word, hint", [("generate", "a", True), ("generate", "--a", False), ("demo/figures", "a", False)]
)
def test_only_a_picture_without_its_option_is_told_of_it(script, word, hint):
    done = run(ROOT / f"{script}.py", word)
    assert done.returncode == 2 and ("pictures are given with --image" in done.stderr) == hint


def test_a_prompt_from_standard_input_that_is_no_text(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "-"])
    assert capsys.readouterr().err == "error: standard input is not valid UTF-8\n"


def test_prompt_and_picture_from_standard_input(capsys, monkeypatch):
    with open(SCENE, "rb") as picture:
        given = {"--image": picture.read(), "--prompt": b"What does the sign say?"}
    for option, other in (("--image", ["--prompt", "What does the sign say?"]), ("--prompt", ["--image", SCENE])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given[option])))
        generate.main([option, "-", *other])
        assert capsys.readouterr().out == "It says PUSH.\n"
