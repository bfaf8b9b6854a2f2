"""demo/web.py: several visitors, and what cannot be."""

import itertools
import socket

import pytest
import web
from commands import assert_refused, run_command
from conftest import DEMO, golden, golden_model

from generate import TextStream, generate


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


CANNOT_BE = {
    "--port 0": "error: --port 0: expected 1 to 65535\n",
    "--host none.invalid": "error: cannot listen on --host none.invalid --port 7860: ",
    "--chunk-size 0": "error: chunk_size is 0, expected ",
    "--port TAKEN": ": Address already in use\n",
    "--port FREE": "error: the page needs Gradio: pip install gradio\n",
}


@pytest.mark.parametrize("options, message", CANNOT_BE.items())
def test_what_cannot_be_is_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(web, "gr", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = options.replace("TAKEN", f"{server.getsockname()[1]}").replace("FREE", f"{free_port()}")
        assert_refused(run_command(web.main, options.split(), capsys), message)


@pytest.mark.parametrize("name", ["checkpoint", "vl2"])
def test_the_page_says_that_the_model_is_small(name, monkeypatch, capsys):
    def build_page(chat, title: str, notice: str):
        raise ValueError(notice)

    monkeypatch.setattr(web, "gr", web)
    monkeypatch.setattr(web, "build_page", build_page)
    done = run_command(web.main, ["--port", free_port(), "--model", DEMO / name], capsys)
    assert_refused(done, f"Asking the small model in demo/{name}, which knows drawn shapes")


def answer_alone(name: str, messages: list[dict]) -> str:
    """What `generate` gives a conversation."""
    model, processor = golden_model(name)
    (ids,) = generate(model, processor(messages), max_new_tokens=12)
    text = TextStream(processor.tokenizer)
    return ("".join(map(text.push, ids)) + text.finish()).strip()


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mla"])
def test_visitors_asking_at_once_do_not_mix(name):
    model, processor = golden_model(name)
    chat, pictures = web.Chat(model, processor, None), sorted((golden(name).folder / "images").iterdir())
    asked = ("What is this?", pictures[:1]), ("Why?", []), ("What is this?", pictures[1:3])
    conversations = [[{"role": "user", "content": text, "images": images}] for text, images in asked]
    for _ in range(2):  # turns
        answers = [chat.answer(f"{i}", processor(c), max_new_tokens=12) for i, c in enumerate(conversations)]
        said = list(itertools.zip_longest(*answers))  # a token for each in turn
        for i, conversation in enumerate(conversations):
            *_, last = (step[i][0] for step in said if step[i])
            assert last == answer_alone(name, conversation)
            reply = {"role": "assistant", "content": last or "Nothing."}
            conversation += [reply, {"role": "user", "content": "And now?"}]
    assert len(chat.caches) == 3


def test_a_stopped_answer_and_many_visitors_leave_the_caches_whole():
    model, processor = golden_model("vl-siglip")
    chat, messages = web.Chat(model, processor, 7), [{"role": "user", "content": "Why?"}]

    def answer(visitor: str, longest: int = 12):
        return chat.answer(visitor, processor(messages), max_new_tokens=longest)

    stopped = answer("a", 100)
    partial = [next(stopped)[0] for _ in range(5)][-1]
    twice = answer("a")  # by the same visitor, at the same time
    next(twice)
    stopped.close()
    assert [*twice][-1][0] == answer_alone("vl-siglip", messages)
    messages += [{"role": "assistant", "content": partial}, {"role": "user", "content": "And now?"}]
    assert [*answer("a")][-1][0] == answer_alone("vl-siglip", messages)
    for i in range(3 * web.VISITORS):
        assert [*answer(f"{i}", 1)][-1][0]
    assert len(chat.caches) == web.VISITORS
