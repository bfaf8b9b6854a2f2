"""The command's first seconds and its terminal, as a process of its own."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, copy_checkpoint

GENERATE = [sys.executable, str(ROOT / "generate.py")]
ASK = ["--prompt", "How many stars are there?", "--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]


def without_torch(tmp_path, then: str) -> dict[str, str]:
    """An environment in which `import torch` runs `then`."""
    (tmp_path / "torch.py").write_text(then)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    "arguments, status", [(["--help"], 0), (["--imag", "x", "--foo"], 2), (["--top-k", "5"], 2), (["--seed", "1"], 2)]
)
def test_help_and_wrong_options_do_not_wait_for_torch(arguments, status, tmp_path):
    environment = without_torch(tmp_path, "raise SystemExit('imported')")
    done = subprocess.run([*GENERATE, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == status and "imported" not in done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) if status else done.stdout.startswith("usage:")


def test_ctrl_c_while_importing_ends_in_silence(tmp_path):
    environment = without_torch(tmp_path, "import time\nprint('importing', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        [*GENERATE, *ASK], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", b"") and process.returncode == 130


def test_a_full_disk_for_messages_changes_nothing():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*GENERATE, *ASK], stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("columns", [80, 40])
def test_progress_fits_the_window(columns, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "a folder with a long name, as they are in home folders of people")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([*GENERATE, *ASK, "--model", str(folder)], stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    sent = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        sent += piece
    assert process.wait() == 0
    progress = [line for line in sent.decode().replace("\r\n", "\n").split("\r\033[K") if line.strip()]
    assert "starting" in progress[0] and any("100%" in line for line in progress)
    assert all(len(line.split("\n")[0]) < columns for line in progress)


def test_quantize_and_save_need_no_question(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    done = subprocess.run(
        [*GENERATE, "--model", str(folder), "--quantize", "int8", "--save", str(tmp_path / "small")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    again = subprocess.run([*GENERATE, *ASK, "--model", str(tmp_path / "small")], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout


def test_warnings_are_no_part_of_the_first_command():
    command = [sys.executable, "-W", "error", str(ROOT / "generate.py"), "--image", str(ROOT / "demo/images/scene.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["photo.jpg"], "unrecognized arguments: photo.jpg; pictures are given with --image"),
        ([*ASK, "--model", ""], "--model '' is not there, expected a checkpoint folder"),
        ([*ASK, "--model", str(ROOT / "demo/checkpoint/config.json")], "is a file, expected a checkpoint folder"),
        (["--prompt", b"\xff\xfe"], "--prompt is not valid UTF-8"),
        (["--prompt", "-", "--image", "-"], "--prompt and --image both read standard input, give a file for one"),
    ],
    ids=["no option", "no model", "a file", "no text", "twice"],
)
def test_errors_name_the_option(arguments, message):
    done = subprocess.run([*GENERATE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_prompt_and_picture_from_standard_input():
    picture = (ROOT / "demo/images/scene.png").read_bytes()
    command = [*GENERATE, "--image", "-", "--prompt", "What does the sign say?"]
    asked = subprocess.run(command, input=picture, capture_output=True)
    assert asked.stdout == b"It says PUSH.\n"
    command = [*GENERATE, "--image", str(ROOT / "demo/images/scene.png"), "--prompt", "-"]
    assert subprocess.run(command, input=b"What does the sign say?", capture_output=True).stdout == asked.stdout
