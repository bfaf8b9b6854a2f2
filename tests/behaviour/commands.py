"""The commands, run in this process as a shell would run them in one of their own."""

import fcntl
import io
import pty
import signal
import struct
import termios
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from conftest import DEMO

SCENE, PHOTO = str(DEMO / "images" / "scene.png"), str(DEMO / "images" / "photo.png")
FLOAT32 = ["--dtype", "float32", "--device", "cpu"]


def run_command(main: Callable, arguments: list, capsys, stdin: bytes | None = b"") -> SimpleNamespace:
    """The status, output and error of a script's `main`; without `stdin`, whoever started it has closed that."""
    status, at_interrupt = 0, signal.getsignal(signal.SIGINT)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, arguments)])
        patch.setattr("sys.stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main()
        except SystemExit as end:
            status = end.code
        finally:
            signal.signal(signal.SIGINT, at_interrupt)  # generate.py's own would end the tests in silence
    return SimpleNamespace(status=status, **capsys.readouterr()._asdict())


def open_terminal(columns: int = 0) -> tuple[int, int]:
    """Both ends of a terminal, ours and a program's; with 0 columns it does not say how wide it is."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


def assert_refused(result: SimpleNamespace, words: str) -> None:
    """One `error:` line of at most 1000 characters with these words, nothing on standard output, and status 2."""
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.endswith("\n") and result.err.count("\n") == 1
    assert words in result.err and len(result.err) <= 1001
