"""The benchmark runs and prints its tables. What it measures is not asserted."""

import os

import pytest
from conftest import ROOT, run


def test_small_benchmark_prints_its_table():
    pytest.importorskip("transformers")
    uncompiled = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # test_generate.py compiles
    sections = "answer", "chat", "many"
    done = run(ROOT / "tests/bench.py", *sections, "--small", "--dtype", "float32", env=uncompiled)
    assert done.returncode == 0, done.stderr
    assert all(f"decode, {kind}" in done.stdout for kind in ("int8", "int4")) and "second turn" in done.stdout
