"""demo/answer.py: files of questions, alone and under torchrun, stopped at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from conftest import ROOT, VL2_GOLDENS, VL_GOLDENS, copy_checkpoint, golden, golden_model

DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

import answer  # noqa: E402
import scenes  # noqa: E402

from generate import generate  # noqa: E402

SCENE, PHOTO = str(DEMO / "images" / "scene.png"), str(DEMO / "images" / "photo.png")
ANSWERED = [  # what README and test_demo.py show of the demo checkpoint
    ({"id": "sign", "prompt": "What does the sign say?", "images": [SCENE]}, "It says PUSH."),
    ({"id": 7, "prompt": "Where is the green circle?", "images": [PHOTO]}, "The green circle is in the top right."),
    ({"id": "text", "prompt": "Read the text.", "images": [PHOTO]}, "It says 36."),
]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(DEMO / "answer.py")]
MANY = 32
FLOAT32 = ["--dtype", "float32", "--device", "cpu"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def write(file: Path, lines: list) -> Path:
    """Lines of JSON; bytes are written as they are."""
    file.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def run(*arguments) -> None:
    answer.main([*map(str, arguments), *FLOAT32])


def start(command: list[str], *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *map(str, arguments), *FLOAT32], stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with q.jsonl, its pictures (the third question's is missing, the fifth is no JSON), and whole.jsonl."""
    folder, lines = tmp_path_factory.mktemp("many"), []
    for i in range(MANY):
        scene = scenes.random_scene(Random(f"answer-{i}"))
        scenes.draw(scene).save(folder / f"{i}.png")
        lines.append({"id": i, "prompt": "Describe this image.", "images": [f"{i}.png"]})
    lines[3]["images"], lines[5] = ["missing.png"], b"{cut\n"
    write(folder / "q.jsonl", lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("q.jsonl", "whole.jsonl")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_come_in_the_order_of_the_questions(batch_size, tmp_path):
    questions = write(tmp_path / "q.jsonl", [question for question, _ in ANSWERED])
    run(questions, tmp_path / "a.jsonl", "--batch-size", batch_size)
    assert read(tmp_path / "a.jsonl") == [{"id": question["id"], "answer": text} for question, text in ANSWERED]
    assert {file.name for file in tmp_path.iterdir()} == {"q.jsonl", "a.jsonl"}


@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_a_batch_gives_the_answers_of_each_question_alone(name, tmp_path):
    model, processor = golden_model(name)
    prompts = [
        "What is this?",
        "Tell me all about it, from the left to the right.",
        "Why?",
        "<image>And<image>now?",
        "?",
    ]
    pictures = sorted(str(file) for file in (golden(name).folder / "images").iterdir())
    picked = [pictures[:1], pictures[1:2], [], pictures[2:4], pictures[:3]]
    lines = [{"id": i, "prompt": prompt, "images": images} for i, (prompt, images) in enumerate(zip(prompts, picked))]
    questions = write(tmp_path / "q.jsonl", lines)
    run(questions, tmp_path / "a.jsonl", "--model", golden(name).folder, "--batch-size", 5, "--max-new-tokens", 12)
    for line, record in zip(lines, read(tmp_path / "a.jsonl")):
        message = {"role": "user", "content": line["prompt"], "images": line["images"]}
        (ids,) = generate(model, processor([message]), max_new_tokens=12)
        tags = processor.decode(ids, skip_special_tokens=False) if "<|" in record["answer"] else processor.decode(ids)
        assert record["answer"] == tags.strip() and record.get("cut", False) == (ids[-1] != processor.eos_token_id)


def test_a_long_prompt_in_a_batch_does_not_cut_the_answers_of_others(tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"id": 0, "prompt": "Why? " * 28}, {"id": 1, "prompt": "Why?"}, {"id": 2, "prompt": "Why? " * 500}]
    questions = write(tmp_path / "q.jsonl", lines)
    for batch_size in (1, 3):
        size = ["--batch-size", batch_size, "--max-new-tokens", 90]
        run(questions, tmp_path / f"{batch_size}.jsonl", "--model", folder, *size)
    records = read(tmp_path / "1.jsonl")
    assert records == read(tmp_path / "3.jsonl")
    assert "over the model's context of 200" in records[2]["error"] and all(
        "answer" in record for record in records[:2]
    )


BAD_LINES = {
    b"{cut": "line 2: Expecting",
    b"[1]": "line 2: expected",
    b"\xff": "line 2: ",
    b"[" * 100_000: "line 2: ",
    b'{"prompt": "x"}': "line 2: expected",
    b'{"id": true, "prompt": "x"}': "line 2: expected",
    b'{"id": "x"}': "line 2: expected",
    b'{"id": "x", "prompt": "x", "image": "a.png"}': "line 2: expected",
    b'{"id": "x", "prompt": "x", "images": "a.png"}': "line 2: expected",
    b'{"id": "x", "prompt": "x", "images": ["-"]}': "line 2: expected",
    b'{"id": "x", "prompt": "x", "images": ["no.png"]}': "no.png: no such image file",
    b'{"id": "x", "prompt": "<image><image>", "images": ["%s"]}' % SCENE.encode(): "the text has 2 image markers",
    b'{"id": "x", "prompt": "\\ud800"}': "text with a lone surrogate",
    b'{"id": "x", "prompt": "%s"}' % (b"Why? " * 5000): "the prompt has at least",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:50].decode(errors="replace"))
def test_a_bad_line_gets_an_error_and_the_others_an_answer(line, tmp_path):
    (first, text), (last, other), _ = ANSWERED
    questions = write(tmp_path / "q.jsonl", [first, line + b"\n", b" \r\n", last])
    run(questions, tmp_path / "a.jsonl")
    before, bad, after = read(tmp_path / "a.jsonl")
    assert (before["answer"], after["answer"]) == (text, other)
    assert bad.keys() == {"id", "error"} and bad["error"].startswith(BAD_LINES[line]) and len(bad["error"]) < 600
    assert bad["id"] == ("x" if b'"x", "prompt"' in line or line == b'{"id": "x"}' else None)


def test_ids_of_any_text_come_back(tmp_path):
    ids = ["", "a\nb", "\u2028", "猫", "\ud800", -1, 10**30, "1", 1]
    questions = write(tmp_path / "q.jsonl", [{"id": id, "prompt": "How many stars are there?"} for id in ids])
    for _ in range(2):
        run(questions, tmp_path / "a.jsonl", "--max-new-tokens", 2)
        assert [record["id"] for record in read(tmp_path / "a.jsonl")] == ids


# What the command refuses before it loads anything: files, options, the beginning of the error.
(GOOD,) = [json.dumps(ANSWERED[0][0]) + "\n"]
REFUSED = {
    "no file": ({}, [], "q.jsonl: no such file"),
    "empty": ({"q.jsonl": "\n \n"}, [], "q.jsonl: holds no questions"),
    "id twice": ({"q.jsonl": GOOD + "\n" + GOOD}, [], "q.jsonl: lines 1 and 3 have the same id 'sign'"),
    "other file": ({"q.jsonl": GOOD, "a.jsonl": "my notes"}, [], "a.jsonl: line 1 answers none of the questions"),
    "other answers": ({"q.jsonl": GOOD, "a.jsonl": '{"id": 3, "answer": ""}\n'}, [], "a.jsonl: line 1 answers none"),
    "batch size": ({"q.jsonl": GOOD}, ["--batch-size", "0"], "--batch-size 0: expected at least 1"),
    "longest": ({"q.jsonl": GOOD}, ["--max-new-tokens", "0"], "max_new_tokens is 0, expected"),
    "model": ({"q.jsonl": GOOD}, ["--model", "none"], "none/config.json: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line_and_changes_no_file(case, tmp_path, monkeypatch, capsys):
    files, options, message = REFUSED[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run("q.jsonl", "a.jsonl", *options)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("error: ") and message in said.err
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


@pytest.mark.parametrize("target", ["q.jsonl", ".", "gone/a.jsonl", "/dev/null"])
def test_answers_go_to_a_file_of_their_own(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(GOOD)
    with pytest.raises(SystemExit):
        run("q.jsonl", target)
    assert "expected the name of a file for the answers" in capsys.readouterr().err
    assert (tmp_path / "q.jsonl").read_text() == GOOD


def test_a_part_cut_anywhere_is_repaired(tmp_path):
    questions = write(tmp_path / "q.jsonl", [question for question, _ in ANSWERED])
    parsed, answers = answer.read_questions(questions), tmp_path / "a.jsonl"
    whole = [{"id": question["id"], "answer": text + " 猫"} for question, text in ANSWERED]
    part = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in whole).encode()
    (tmp_path / "a.jsonl.new").write_bytes(part[:5])  # of a stop while parts were joined
    for cut in range(len(part) + 1):
        for rank, piece in ((0, b""), (11, part[:cut])):
            (tmp_path / f"a.jsonl.part-{rank}").write_bytes(piece)
        answers.unlink(missing_ok=True)
        answer.join_parts(answers, parsed, ended=False)
        assert (read(answers) if answers.exists() else []) == whole[: part[:cut].count(b"\n")]
        answers.write_bytes(part[:cut])  # the file itself, as some copy of it may be
        answer.join_parts(answers, parsed, ended=False)
        assert read(answers) == whole[: part[:cut].count(b"\n")]
        assert answers.exists() and not list(tmp_path.glob("a.jsonl.part-*"))
    for rank in (0, 1):  # of a stop between the last two steps: joined, but not yet removed
        (tmp_path / f"a.jsonl.part-{rank}").write_bytes(part[part.index(b"\n") + 1 :])
    answer.join_parts(answers, parsed, ended=True)
    assert read(answers) == whole and not list(tmp_path.glob("a.jsonl.*"))


def test_a_second_run_asks_only_what_has_no_answer(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    lines = [ANSWERED[0][0], {"id": "late", "prompt": "Read the text.", "images": [str(picture)]}]
    questions, answers = write(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl"
    kept = {"id": "sign", "answer": "an answer that the model would not give"}
    write(answers, [kept])
    run(questions, answers)
    assert read(answers)[0] == kept and "no such image file" in read(answers)[1]["error"]
    picture.write_bytes(Path(PHOTO).read_bytes())
    run(questions, answers)
    assert read(answers) == [kept, {"id": "late", "answer": "It says 36."}]
    write(questions, [*lines, {"id": "new", "prompt": "Read the text.", "images": [PHOTO]}])
    run(questions, answers)
    assert read(answers) == [kept, {"id": "late", "answer": "It says 36."}, {"id": "new", "answer": "It says 36."}]
    assert "1 of 2 questions answered before" in capsys.readouterr().err


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(folder.name))
            except (OSError, ValueError):
                continue
    return found


@needs_proc
def test_two_processes_killed_midway_and_started_again(many, tmp_path, monkeypatch):
    folder = shutil.copytree(many, tmp_path / "run")
    monkeypatch.chdir(folder)
    process = start(TWO, "q.jsonl", "a.jsonl", "--batch-size", 1)
    parts = [folder / f"a.jsonl.part-{rank}" for rank in range(2)]
    while not all(part.exists() and part.read_bytes().count(b"\n") >= 2 for part in parts):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.communicate()
    assert process.returncode and not (folder / "a.jsonl").exists()
    lines = [line for part in parts for line in part.read_bytes().split(b"\n")[:-1]]
    done = {record["id"] for record in map(json.loads, lines) if "answer" in record}
    assert 2 <= len(done) < MANY - 2
    for id in done:  # to ask it again would now be an error
        (folder / f"{id}.png").unlink()
    process = start(TWO, "q.jsonl", "a.jsonl", "--batch-size", 1)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert read(folder / "a.jsonl") == read(folder / "whole.jsonl")
    assert f"{MANY - 2} of {MANY} questions answered, 2 errors in a.jsonl\n" in said
    assert not list(folder.glob("a.jsonl.*"))
    process = start(TWO, "q.jsonl", "a.jsonl")  # nothing is left but the errors
    _, said = process.communicate()
    assert process.returncode == 0 and read(folder / "a.jsonl") == read(folder / "whole.jsonl"), said


def test_an_error_under_torchrun_is_told(tmp_path):
    questions = write(tmp_path / "q.jsonl", [b"\n"])
    process = start(TWO, questions, tmp_path / "a.jsonl")
    _, said = process.communicate()
    assert process.returncode and f"error: process 0: {questions}: holds no questions\n" in said
    assert list(tmp_path.iterdir()) == [questions]
