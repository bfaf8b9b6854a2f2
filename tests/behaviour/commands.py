"""The commands, run in this process as a shell would run them in one of their own."""

import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest


def run_command(main: Callable, arguments: list, capsys, stdin: bytes = b"") -> SimpleNamespace:
    """The status, output and error of a script's `main` with these arguments and this standard input."""
    status = 0
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, arguments)])
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main()
        except SystemExit as end:
            status = end.code
    out, err = capsys.readouterr()
    return SimpleNamespace(status=status, out=out, err=err)


def assert_refused(result: SimpleNamespace, words: str) -> None:
    """One `error:` line with these words, nothing on standard output, and status 2."""
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.endswith("\n") and result.err.count("\n") == 1
    assert words in result.err
