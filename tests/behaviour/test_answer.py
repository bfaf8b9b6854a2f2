"""demo/answer.py: files of questions, alone and under torchrun, stopped at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import answer
import pytest
from checkpoints import edit_json
from commands import FLOAT32, PHOTO, SCENE, assert_refused, run_command
from conftest import DEMO, GOLDENS, copy_checkpoint, golden, golden_model

from generate import TextStream, generate

ANSWERED = [  # what the demo checkpoint answers
    ({"id": "sign", "prompt": "What does the sign say?", "images": [SCENE]}, "It says PUSH."),
    ({"id": 7, "prompt": "Where is the green circle?", "images": [PHOTO]}, "The green circle is in the top right."),
    ({"id": "text", "prompt": "Read the text.", "images": [PHOTO]}, "It says 36."),
]


def write(file: Path, lines: list) -> Path:
    """Lines of JSON; bytes are written as they are."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    file.write_bytes(b"\n".join([*encoded, b""]))
    return file


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*options): answers q.jsonl of the test's folder in a.jsonl; gives status, out and err."""
    monkeypatch.chdir(tmp_path)
    return lambda *options, to="a.jsonl": run_command(answer.main, ["q.jsonl", to, *options, *FLOAT32], capsys)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_batch_gives_the_answers_of_each_question_alone(name, run, tmp_path):
    model, processor = golden_model(name)
    prompts = "What is this?", "Tell me all about it, from the left to the right.", "Why?", "<image>And<image>now?"
    first, second, *others = sorted(str(file) for file in (golden(name).folder / "images").iterdir())
    pictures = [first], [second], [], others[:2]
    lines = [{"id": i, "prompt": prompt, "images": images} for i, (prompt, images) in enumerate(zip(prompts, pictures))]
    write(tmp_path / "q.jsonl", lines)
    run("--model", golden(name).folder, "--batch-size", 5, "--max-new-tokens", 12)
    for line, record in zip(lines, read(tmp_path / "a.jsonl"), strict=True):
        message = {"role": "user", "content": line["prompt"], "images": line["images"]}
        (ids,) = generate(model, processor([message]), max_new_tokens=12)
        text = TextStream(processor.tokenizer)
        assert record["answer"] == ("".join(map(text.push, ids)) + text.finish()).strip()
        assert record.get("cut", False) == (ids[-1] != processor.eos_token_id)


def test_a_long_prompt_in_a_batch_does_not_cut_the_answers_of_others(run, tmp_path):
    folder = copy_checkpoint("vl-siglip", tmp_path / "model")
    edit_json(folder / "config.json", {"language_config.max_position_embeddings": 200})
    write(tmp_path / "q.jsonl", [{"id": i, "prompt": "Why? " * count} for i, count in enumerate((28, 1, 500))])
    for batch_size in (1, 3):
        run("--batch-size", batch_size, "--max-new-tokens", 90, "--model", folder, to=f"{batch_size}.jsonl")
    first, second, third = read(tmp_path / "1.jsonl")
    assert [first, second, third] == read(tmp_path / "3.jsonl")
    assert "answer" in first and "answer" in second and "over the model's context of 200" in third["error"]


BAD_LINES = {  # and what the error begins with
    b"{cut": "line 2: Expecting", b"[1]": "line 3: expected", b"\xff": "line 4: ", b"[" * 100_000: "line 5: ",
    b'{"prompt": "x"}': "line 6: expected", b'{"id": true, "prompt": "x"}': "line 7: expected",
    b'{"id": "a"}': "line 8: expected", b'{"id": "b", "prompt": "x", "image": "a.png"}': "line 9: expected",
    b'{"id": "c", "prompt": "x", "images": "a.png"}': "line 10: expected",
    b'{"id": "d", "prompt": "x", "images": ["-"]}': "line 11: expected",
    b'{"id": "e", "prompt": "x", "images": ["no.png"]}': "no.png: no such image file",
    b'{"id": "f", "prompt": "<image><image>", "images": ["%s"]}' % SCENE.encode(): "the text has 2 image markers",
    b'{"id": "g", "prompt": "\\ud800"}': "text with a lone surrogate",
    b'{"id": "h", "prompt": "%s"}' % (b"Why? " * 5000): "the prompt has at least",
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_lines_get_an_error_each_and_the_others_an_answer_in_their_order(batch_size, run, tmp_path):
    first, *others = [question for question, _ in ANSWERED]
    write(tmp_path / "q.jsonl", [first, *BAD_LINES, b" \r", *others])
    done = run("--batch-size", batch_size)
    before, *bad, after, last = read(tmp_path / "a.jsonl")
    answers = [{"id": question["id"], "answer": text} for question, text in ANSWERED]
    assert [before, after, last] == answers and (done.status, done.out) == (0, "")
    assert f"3 of {len(BAD_LINES) + 3} questions answered, {len(BAD_LINES)} errors" in done.err
    assert {file.name for file in tmp_path.iterdir()} == {"q.jsonl", "a.jsonl"}
    for (line, words), record in zip(BAD_LINES.items(), bad, strict=True):
        assert record["error"].startswith(words) and len(record["error"]) < 600
        assert record["id"] == (chr(line[8]) if line.startswith(b'{"id": "') else None) and len(record) == 2


def test_ids_of_any_text_come_back(run, tmp_path):
    ids = ["", "a\nb", "\u2028", "猫", "\ud800", -1, 10**30, "1", 1]
    write(tmp_path / "q.jsonl", [{"id": id, "prompt": "How many stars are there?"} for id in ids])
    for _ in range(2):
        run("--max-new-tokens", 2)
        assert [record["id"] for record in read(tmp_path / "a.jsonl")] == ids


GOOD = json.dumps(ANSWERED[0][0]) + "\n"
TAKEN = "a.jsonl: line 1 answers none of the questions"
REFUSED = [  # questions, answers, options, words of the error
    (None, None, "", "q.jsonl: no such file"),
    ("\n \n", None, "", "q.jsonl: holds no questions"),
    (GOOD + "\n" + GOOD, None, "", "q.jsonl: lines 1 and 3 have the same id 'sign'"),
    (GOOD, "my notes", "", TAKEN),
    (GOOD, '{"id": 3, "answer": ""}\n', "", TAKEN),
    (GOOD, None, "--batch-size 0", "--batch-size 0: expected at least 1"),
    (GOOD, None, "--max-new-tokens 0", "max_new_tokens is 0, expected"),
    (GOOD, None, "--model none", "none/config.json: no such file"),
]


@pytest.mark.parametrize("asked, answered, options, message", REFUSED)
def test_what_cannot_be_is_one_line_and_changes_no_file(asked, answered, options, message, run, tmp_path):
    files = {name: text for name, text in (("q.jsonl", asked), ("a.jsonl", answered)) if text is not None}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert_refused(run(*options.split()), message)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


def test_answers_go_to_a_file_of_their_own(run, tmp_path):
    (tmp_path / "q.jsonl").write_text(GOOD)
    for target in ("q.jsonl", ".", "gone/a.jsonl", "/dev/null"):
        assert_refused(run(to=target), "expected the name of a file for the answers")
    assert (tmp_path / "q.jsonl").read_text() == GOOD


def test_a_part_cut_anywhere_is_repaired(tmp_path):
    questions = answer.read_questions(write(tmp_path / "q.jsonl", [question for question, _ in ANSWERED]))
    whole = [{"id": question["id"], "answer": text + " 猫"} for question, text in ANSWERED]
    written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in whole).encode()
    answers = tmp_path / "a.jsonl"
    parts = [tmp_path / f"a.jsonl.part-{rank}" for rank in (0, 11)]
    (tmp_path / "a.jsonl.new").write_bytes(written[:5])  # of a stop while parts were joined
    for cut in range(len(written) + 1):
        parts[0].touch()
        parts[1].write_bytes(written[:cut])
        answers.unlink(missing_ok=True)
        answer.join_parts(answers, questions, ended=False)
        assert (read(answers) if answers.exists() else []) == whole[: written[:cut].count(b"\n")]
        answers.write_bytes(written[:cut])  # the file itself, as some copy of it may be
        answer.join_parts(answers, questions, ended=False)
        assert read(answers) == whole[: written[:cut].count(b"\n")]
        assert not any(part.exists() for part in parts)
    for part in parts:  # of a stop between the last two steps: joined, but not yet removed
        part.write_bytes(written[written.index(b"\n") + 1 :])
    answer.join_parts(answers, questions, ended=True)
    assert read(answers) == whole and not list(tmp_path.glob("a.jsonl.*"))


def test_a_second_run_asks_only_what_has_no_answer(run, tmp_path):
    """The answer that is there stays, an error is asked again, and a question is new."""
    picture, answers = tmp_path / "picture.png", tmp_path / "a.jsonl"
    lines = [ANSWERED[0][0], {"id": "late", "prompt": "Read the text.", "images": [str(picture)]}]
    kept = {"id": "sign", "answer": "an answer that the model would not give"}
    write(tmp_path / "q.jsonl", lines)
    write(answers, [kept])
    assert "1 of 2 questions answered before" in run().err
    assert read(answers)[0] == kept and "no such image file" in read(answers)[1]["error"]
    shutil.copyfile(PHOTO, picture)
    write(tmp_path / "q.jsonl", [*lines, ANSWERED[2][0]])
    run()
    assert read(answers) == [kept, {"id": "late", "answer": "It says 36."}, {"id": "text", "answer": "It says 36."}]


def start_two(folder: Path, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", DEMO / "answer.py"]
    return subprocess.Popen(
        [*command, "q.jsonl", "a.jsonl", *map(str, options), *FLOAT32],
        cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


CHILDREN = "/proc/{0}/task/{0}/children"  # where Linux lists the processes that a process's main thread has started


@pytest.mark.skipif(not os.path.exists(CHILDREN.format(os.getpid())), reason="needs Linux's /proc")
def test_two_processes_killed_midway_and_started_again(run, tmp_path):
    """Of twelve questions the fourth's picture is missing, and the sixth is no JSON."""
    folder, parts = golden("vl-siglip").folder, [tmp_path / f"a.jsonl.part-{rank}" for rank in range(2)]
    options = ["--model", folder, "--batch-size", 1, "--max-new-tokens", 100]
    lines = [{"id": i, "prompt": "Describe this image.", "images": [f"{i}.png"]} for i in range(12)]
    for i in {*range(12)} - {3}:
        shutil.copyfile(folder / "images" / f"{i % 4}.png", tmp_path / f"{i}.png")
    write(tmp_path / "q.jsonl", [*lines[:5], b"{cut", *lines[6:]])
    run(*options, to="whole.jsonl")
    process = start_two(tmp_path, *options)
    while not all(part.exists() and b"\n" in part.read_bytes() for part in parts):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(int(Path(CHILDREN.format(process.pid)).read_text().split()[-1]), signal.SIGKILL)
    process.communicate()
    assert process.returncode and not (tmp_path / "a.jsonl").exists()
    records = [json.loads(line) for part in parts for line in part.read_bytes().split(b"\n")[:-1]]
    done = {record["id"] for record in records if "answer" in record}
    assert 1 <= len(done) < 10
    for id in done:  # to ask it again would now be an error
        (tmp_path / f"{id}.png").unlink()
    process = start_two(tmp_path, *options)
    _, said = process.communicate()
    assert process.returncode == 0 and "10 of 12 questions answered, 2 errors in a.jsonl\n" in said, said
    run(*options)  # with one process: nothing is left but the errors
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "whole.jsonl") and not list(tmp_path.glob("a.jsonl.*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_no_picture_and_holds_nothing_up(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "q.jsonl", [{"id": 1, "prompt": "Hi", "images": ["pipe"]}])
    run("--model", golden("vl2-mha").folder)
    assert read(tmp_path / "a.jsonl") == [{"id": 1, "error": "pipe: not a file, expected an image file"}]


def test_an_error_under_torchrun_is_told(tmp_path):
    write(tmp_path / "q.jsonl", [b""])
    process = start_two(tmp_path)
    _, said = process.communicate()
    assert process.returncode and "error: process 0: q.jsonl: holds no questions\n" in said
    assert [file.name for file in tmp_path.iterdir()] == ["q.jsonl"]
