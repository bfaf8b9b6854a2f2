"""The demo: its scenes, its questions, and that its training learns and goes on after a stop."""

import csv
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

DEMO = Path(__file__).parent.parent / "demo"
sys.path.insert(0, str(DEMO))

import evaluate
import scenes
import train

# ---------------------------------------------------------------------------- scenes


def test_a_seed_gives_the_same_scene_picture_and_talk():
    first, second = (scenes.random_scene(Random(5)) for _ in range(2))
    assert first == second
    assert np.array_equal(np.asarray(scenes.draw(first)), np.asarray(scenes.draw(second)))
    without_pictures = [
        [{key: value for key, value in message.items() if key != "images"} for message in scenes.chat(Random(5))]
        for _ in range(2)
    ]
    assert without_pictures[0] == without_pictures[1]


def test_answers_follow_from_the_scene():
    """Every kind of answer, worked out again from the shapes, over 300 scenes."""
    asked = dict.fromkeys(scenes.TASKS, 0)
    for seed in range(300):
        rng = Random(seed)
        scene = scenes.random_scene(rng)
        where = {shape.name: shape for shape in scene.shapes}
        assert len(where) == len(scene.shapes) <= 4 and len(scene.signs) <= 1
        assert len({thing.cell for thing in scene.shapes + scene.signs}) == len(scene.shapes) + len(scene.signs)
        for task in scenes.TASKS:
            found = scenes.ask(scene, task, rng)
            if found is None:
                assert task == "relation"
                continue
            question, answer = found
            asked[task] += 1
            if task == "describe":
                for shape in scene.shapes:
                    assert f"{shape.size} {shape.color} {shape.kind} in the {scenes.CELLS[shape.cell]}" in answer
                assert answer.count(" in the ") == len(scene.shapes)
            elif task == "color":
                meant = [s for s in scene.shapes if question[:-1].endswith((f" the {s.kind}", s.place))]
                assert [shape.color.capitalize() + "." for shape in meant] == [answer]
            elif task == "count":
                word = (
                    question.replace("How many ", "").replace("Count the ", "").replace(" are there?", "").rstrip(".")
                )
                matching = [s for s in scene.shapes if word in ("shapes", f"{s.kind}s", f"{s.color} shapes")]
                assert answer == scenes.NUMBERS[len(matching)] + "."
            elif task == "position":
                named = [shape for name, shape in where.items() if name in question]
                if named:
                    assert answer == f"In the {scenes.CELLS[named[0].cell]}."
                else:
                    (shape,) = (s for s in scene.shapes if question == f"What is in the {scenes.CELLS[s.cell]}?")
                    assert answer == f"A {shape.size} {shape.name}."
            elif task == "relation":
                a, b = sorted((s for s in scene.shapes if s.name in question), key=lambda s: question.index(s.name))
                tests = {
                    ("left",): lambda p, q: p.x < q.x,
                    ("right",): lambda p, q: p.x > q.x,
                    ("above", "higher"): lambda p, q: p.y < q.y,
                    ("below", "lower"): lambda p, q: p.y > q.y,
                }
                (holds,) = (test for words, test in tests.items() if any(word in question for word in words))
                if question.startswith("Is"):
                    assert answer == ("Yes." if holds(a, b) else "No.")
                else:
                    assert answer == f"The {a.name if holds(a, b) else b.name}."
            else:
                assert answer == (f"{scene.text}." if scene.signs else "There is no text.")
    assert min(asked.values()) > 150


def test_a_change_is_the_one_that_is_told():
    told = set()
    for seed in range(200):
        rng = Random(seed)
        before = scenes.random_scene(rng)
        after, answer = scenes.change(before, rng)
        old, new = ({shape.name: shape for shape in scene.shapes} for scene in (before, after))
        if answer == "Nothing changed.":
            assert old == new
        elif answer.endswith("is gone."):
            assert [f"The {name} is gone." for name in old.keys() - new.keys()] == [answer] and len(new) < len(old)
        elif answer.startswith("There is a new"):
            (name,) = new.keys() - old.keys()
            assert answer == f"There is a new {name} {new[name].place}."
        elif "moved" in answer:
            (name,) = (name for name in old if old[name].cell != new[name].cell)
            assert answer == f"The {name} moved to the {scenes.CELLS[new[name].cell]}."
        else:
            (was,), (now,) = old.keys() - new.keys(), new.keys() - old.keys()
            assert answer == f"The {was} became {new[now].color}."
        told.add(answer.split()[2] if answer.startswith("The ") else answer.split()[0])
    assert len(told) >= 3


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("task", evaluate.ALL_TASKS)
def test_exams_ask_fresh_scenes_what_they_say(task):
    """Each kind of question with its pictures; the other split asks about other scenes."""
    questions = evaluate.exam(task, 20)
    for ((message,), answer), ((other,), _) in zip(questions, evaluate.exam(task, 20, split="held-out")):
        assert message["content"].count("<image>") == len(message["images"]) == (2 if task == "change" else 1)
        assert (answer == "There is no text.") == (task == "no text")
        assert not np.array_equal(np.asarray(message["images"][0]), np.asarray(other["images"][0]))


def test_accuracy_counts_exact_answers(monkeypatch):
    """A model that always says "Two." is right as often as that is the answer."""
    monkeypatch.setattr(evaluate, "answers", lambda model, processor, conversations: ["Two."] * len(conversations))
    right = sum(answer == "Two." for _, answer in evaluate.exam("count", 40))
    assert 0 < right < 40
    assert evaluate.accuracy(None, None, 40, tasks=["count"]) == {"count": right / 40}


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path):
    command = (DEMO / "train.py", "--out", tmp_path / "out", "--device", "cpu", "--minutes")
    first = run(*command, 0.5)
    assert first.returncode == 0, first.stderr
    history = tmp_path / "out" / "history.csv"
    steps = [int(row["step"]) for row in csv.DictReader(history.open())]
    second = run(*command, 0.4)
    assert second.returncode == 0, second.stderr
    rows = list(csv.DictReader(history.open()))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.9 * losses[0], losses
    assert int(rows[-1]["step"]) > steps[-1] and [int(row["step"]) for row in rows] == sorted(
        int(row["step"]) for row in rows
    )
    # A stopped run leaves a checkpoint that the command answers with, and that can be examined.
    picture = DEMO / "images" / "board.jpg"
    answer = run(DEMO.parent / "generate.py", "--model", tmp_path / "out", "--image", picture, "--max-new-tokens", 5)
    assert answer.returncode == 0 and answer.stderr == ""
    table = run(DEMO / "evaluate.py", "--model", tmp_path / "out", "--scenes", 1, "--dtype", "float32")
    assert table.returncode == 0 and all(f"| {task} |" in table.stdout for task in evaluate.ALL_TASKS), table.stderr


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("train.py", "--out", "full"), "error: --out full: holds files, but no unfinished run"),
        (("train.py", "--out", "broken"), "error: broken/unfinished.pt: not a run that this program saved"),
        (("evaluate.py", "--model", "nowhere"), "error: nowhere/config.json: no such file"),
        (("evaluate.py", "--scenes", "0"), "error: --scenes 0: expected at least 1"),
    ],
)
def test_bad_input_of_the_demo_is_one_line(tmp_path, monkeypatch, arguments, complaint):
    for folder, file in (("full", "config.json"), ("broken", "unfinished.pt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    result = run(DEMO / arguments[0], *arguments[1:])
    assert result.returncode == 2 and result.stderr.startswith(complaint) and result.stderr.count("\n") == 1


def test_every_stage_learns_what_it_says(tmp_path):
    """One step of each: the parts that it names get gradients, the others none, and the loss is finite."""
    from dataclasses import replace

    training = train.Run(tmp_path / "out", torch.device("cpu"), seed=0)
    for stage in train.STAGES:
        stage = replace(stage, batch=2)
        for name, part in training.model.named_children():
            part.requires_grad_(name in stage.learns)
        training.model.zero_grad()
        batch = train.Batches(stage, training.folder, 0, 0)[0]
        loss = train.loss_of(stage, training.model, training.tower_loss, batch)
        loss.backward()
        assert torch.isfinite(loss)
        learnt = {name.split(".")[0] for name, p in training.model.named_parameters() if p.grad is not None}
        assert learnt == set(stage.learns)
        assert (batch["labels"] != -100).any()
