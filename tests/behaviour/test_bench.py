"""The benchmark runs and prints its tables. What it measures is not asserted."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_small_benchmark_prints_its_table():
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "tests/bench.py"), "answer", "chat", "many", "--small", "--dtype", "float32"]
    uncompiled = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # test_generate.py compiles
    done = subprocess.run(command, capture_output=True, text=True, env=uncompiled)
    assert done.returncode == 0, done.stderr
    assert all(f"decode, {kind}" in done.stdout for kind in ("int8", "int4")) and "second turn" in done.stdout
