"""demo/look.py shows what a plain forward pass computes, and demo/walk.py runs."""

import base64
import json
import os
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from types import SimpleNamespace

import look
import numpy as np
import pytest
import torch
from conftest import DEMO, GOLDEN, GOLDENS, ROOT, golden_model, run
from PIL import Image

from generate import generate
from load_weights import load_model
from model import record
from processor import Processor, load_image
from vision import TileAligner

ANSWER = 8  # tokens, of models with random weights
HOSTILE = "</script><script>document.title = 'stolen'</script><img src=x onerror=alert(1)> & <!-- \u2028"


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def arrays_of(data: dict) -> SimpleNamespace:
    """As the page's script unpacks: attention (tokens, layers, H, N), shares (tokens, layers, H, 4)."""
    raw = zlib.decompress(base64.b64decode(data["attention"]))
    shape = len(data["tokens"]), data["layers"], data["heads"]
    rows = int(np.prod(shape))
    floats = np.frombuffer(raw[: 20 * rows], "<f4")
    peaks, shares = floats[:rows].reshape(*shape, 1), floats[rows:].reshape(*shape, 4)
    weights = np.frombuffer(raw[20 * rows :], np.uint8).reshape(*shape, len(data["cells"]))
    return SimpleNamespace(attention=(weights / 255.0) ** 2 * peaks, peaks=peaks, shares=shares)


def seen_by(name: str) -> SimpleNamespace:
    """A page about a question, and one forward pass over the prompt and the whole answer under `record`."""
    if name == "demo":
        model, processor = load_model(DEMO / "checkpoint", dtype=torch.float32), Processor(DEMO / "checkpoint")
        message = {"role": "user", "content": "Describe this image.", "images": [load_image(DEMO / "images/scene.png")]}
    else:
        model, processor = golden_model(name)
        images = [load_image(GOLDEN / name / "images" / f"{i}.png") for i in (2, 1)]
        message = {"role": "user", "content": "What changed?", "images": images}
    seen = look.look(model, processor, message, 80 if name == "demo" else ANSWER)
    batch, ids = processor([message]), [step.id for step in seen.steps]
    T, answer = batch["input_ids"].shape[1], torch.tensor([ids])
    whole = batch | {"input_ids": torch.cat((batch["input_ids"], answer), dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["images_seq_mask"] = torch.cat((batch["images_seq_mask"], torch.zeros_like(answer, dtype=torch.bool)), dim=1)
    with torch.inference_mode(), record(model) as inside:
        logits = model(**whole).logits
    chose = range(T - 1, T - 1 + len(ids))  # the positions whose logits chose the answer's tokens
    names = [f"language.layers.{i}" for i in range(len(model.language.layers))]
    attention = torch.stack([inside[f"{name}.self_attn"][0, :, T - 1 : -1] for name in names])  # (layers, H, tokens, S)
    routers = [inside[f"{name}.mlp.gate"] for name in names if f"{name}.mlp.gate" in inside]
    return SimpleNamespace(
        seen=seen,
        page=look.write_page(seen, "a <b> model"),
        model=model,
        processor=processor,
        batch=batch,
        ids=ids,
        probabilities=logits[0, chose].softmax(dim=-1),
        attention=attention.permute(2, 0, 1, 3).numpy(),  # (tokens, layers, H, S)
        experts=[[experts[at].tolist() for experts, _ in routers] for at in chose],
        is_image=whole["images_seq_mask"][0].numpy(),
    )


@pytest.fixture(scope="module", params=["demo", *GOLDENS])
def case(request):
    return seen_by(request.param)


@pytest.fixture(scope="module")
def demo():
    return seen_by("demo")


def test_the_answer_is_that_of_generate(case):
    (ids,) = generate(case.model, case.batch, max_new_tokens=len(case.ids))
    assert case.ids == ids
    untagged = re.sub(r"<\|/?(ref|det|grounding)\|>", "", data_of(case.page)["answer"])
    assert untagged.strip() == case.processor.decode(ids).strip()


def test_probabilities_are_those_of_a_plain_forward_pass(case):
    likeliest, data = case.probabilities.topk(look.LIKELIEST), data_of(case.page)
    for i, token in enumerate(data["tokens"]):
        assert token["probability"] == pytest.approx(case.probabilities[i, case.ids[i]].item(), rel=1e-4)
        assert [p for _, p in token["likeliest"]] == pytest.approx(likeliest.values[i].tolist(), rel=1e-3, abs=1e-9)
        spelled = [look.spell(case.processor.tokenizer, id) for id in likeliest.indices[i].tolist()]
        assert [text for text, p in token["likeliest"] if p > 1e-6] == spelled[: sum(likeliest.values[i] > 1e-6)]


def test_attention_is_what_record_gives(case):
    shown, T = arrays_of(data_of(case.page)), case.batch["input_ids"].shape[1]
    picture = case.attention[..., case.is_image]
    assert np.all(np.abs(shown.attention - picture) <= 0.004 * shown.peaks + 1e-6)
    text = ~case.is_image
    text[0] = False
    parts = [picture, case.attention[..., :1], case.attention[..., :T][..., text[:T]], case.attention[..., T:]]
    expected = np.stack([part.sum(axis=-1) for part in parts], axis=-1)
    np.testing.assert_allclose(shown.shares, expected, atol=1e-5)
    np.testing.assert_allclose(shown.shares.sum(axis=-1), 1, atol=1e-5)


def test_experts_are_those_that_the_routers_chose(case):
    data = data_of(case.page)
    for token, expected in zip(data["tokens"], case.experts):
        assert [sorted(expert for expert, _ in picks) for picks in token["experts"]] == [sorted(e) for e in expected]
    assert len(data["expert_layers"]) == len(case.experts[0])


@pytest.mark.parametrize("global_view_first", [True, False])
@pytest.mark.parametrize("size", [(366, 274), (121, 268), (569, 154)])
def test_cells_stand_in_the_order_of_the_models_tokens(size, global_view_first):
    """The aligner lays out grids whose features are their own places: (view, top, left); its newlines are -1."""
    model, processor = golden_model("vl2-mha")
    tiles = replace(model.config.tiles, global_view_first=global_view_first)
    image = Image.new("RGB", size)
    batch = processor([{"role": "user", "content": "", "images": [image]}])
    _, cells = look.lay_out(replace(model.config, tiles=tiles), processor, batch, [image], "")
    ((wide, high),) = batch["images_spatial_crop"].tolist()
    side, step, s = 98, 28, 4  # 7 patches of 14 pixels, folded two by two
    within = torch.stack(torch.meshgrid(torch.arange(s) * step, torch.arange(s) * step, indexing="ij"), dim=-1)
    corners = [(0, 0, 0)] + [(1, row * side, column * side) for row in range(high) for column in range(wide)]
    grids = torch.stack([torch.cat((torch.zeros(s, s, 1), within), dim=-1) + torch.tensor(c) for c in corners])
    aligner = TileAligner(tiles, 1, 3)
    with torch.no_grad():
        aligner.image_newline.fill_(-1)
        aligner.view_seperator.fill_(-2)
        places = aligner.lay_out(grids, wide, high).tolist()
    assert len(cells) == len(places) == int(batch["images_seq_mask"].sum())
    for cell, (view, top, left) in zip(cells, places):
        if view < 0:
            assert cell.name.startswith("newline of row" if view == -1 else "separator")
        else:
            assert (cell.view, cell.top, cell.left) == (view, top, left) and 0 < cell.right - cell.left <= step
            row, column = (int(at // side * s + at % side / step + 1) for at in (top, left))
            assert cell.name == f"row {row}, column {column}"


def test_boxes_lie_where_the_picture_lies_in_each_view():
    model, processor = golden_model("vl2-mha")
    image = Image.new("RGB", (300, 100), "red")
    batch = processor([{"role": "user", "content": "", "images": [image]}])
    views, _ = look.lay_out(
        model.config, processor, batch, [image], "<|ref|>all<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    )
    for view in views:
        red, green, _ = np.asarray(view.picture).astype(int).transpose(2, 0, 1)
        rows, columns = (np.nonzero((red - green > 128).any(axis=axis))[0] for axis in (1, 0))  # the padding is grey
        ((label, *box),) = view.boxes
        found = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        assert label == "all" and box == pytest.approx(found, abs=1)


def test_no_text_becomes_markup_and_nothing_is_fetched(demo):
    step = demo.seen.steps[0]
    hostile = demo.seen._replace(question=HOSTILE, answer=HOSTILE, steps=[step])
    page = look.write_page(hostile, HOSTILE)
    template = (DEMO / "look_page.html").read_text(encoding="utf-8")
    assert re.findall(r"<[/!a-z]", page) == re.findall(r"<[/!a-z]", template)
    data = data_of(page)
    assert data["question"] == data["answer"] == data["model"] == HOSTILE
    for source in (template, re.sub(r"[A-Za-z0-9+/=]{100,}", "", demo.page)):  # without what is base64
        assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|src=|eval\(|innerHTML|document\.write", source)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
def test_in_a_browser_a_click_shows_the_map_and_hostile_text_stays_text(demo, tmp_path):
    script = """<script>
    const at = (k, layer, head) => {
      document.querySelectorAll("#tokens button")[k].click();
      for (const [id, value] of [["layer", layer], ["head", head]]) {
        document.getElementById(id).value = value;
        document.getElementById(id).onchange();
      }
      const {view, cells, canvas, scale} = views[0], pen = canvas.getContext("2d");
      const lights = cells.map(([, , left, top, right, bottom]) => {
        const size = [left, top, right - left, bottom - top].map(side => Math.round(side * scale));
        const pixels = pen.getImageData(...size).data;
        return pixels.reduce((sum, value) => sum + value, 0) / pixels.length;
      });
      return {mean: [...map.mean], lights, first: document.querySelector("#likeliest td").textContent};
    };
    setTimeout(() => {
      const found = [at(4, "mean", "mean"), at(11, "mean", "mean"), at(11, 3, 2)];
      const texts = ["question", "answer", "model"].map(id => document.getElementById(id).textContent);
      const done = document.createElement("div");
      done.id = "done";
      done.dataset.found = btoa(unescape(encodeURIComponent(JSON.stringify({found, texts, title: document.title}))));
      document.body.append(done);
    }, 500);
    </script>"""
    page = look.write_page(demo.seen._replace(question=HOSTILE, answer=HOSTILE), HOSTILE)
    (tmp_path / "page.html").write_text(page + script, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    result = json.loads(base64.b64decode(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert result["texts"] == [HOSTILE] * 3 and result["title"] == "Look inside one answer"
    picture = demo.attention[..., demo.is_image]
    expected = [picture[4].mean(axis=(0, 1)), picture[11].mean(axis=(0, 1)), picture[11, 3, 2]]
    for shown, weights, token in zip(result["found"], expected, (4, 11, 11)):
        assert shown["mean"] == pytest.approx(weights.tolist(), abs=0.004 * float(picture[token].max()))
        assert shown["first"] == look.spell(demo.processor.tokenizer, demo.ids[token])
        assert np.argmax(shown["lights"]) == np.argmax(weights)  # the brightest cell is the most attended


def test_the_command_writes_page_and_picture(tmp_path, demo, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    question = ["--image", DEMO / "images/scene.png", "--prompt", "Describe this image."]
    result = run_here(look, *question, "--out", "look.html", "--png", "look.png", "--dtype", "float32")
    assert result.status == 0 and result.out.count("\n") == 2, result.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["look.html", "look.png"]
    page = data_of((tmp_path / "look.html").read_text(encoding="utf-8"))
    assert [token["text"] for token in page["tokens"]] == [token["text"] for token in data_of(demo.page)["tokens"]]
    assert load_image(tmp_path / "look.png").width > 900
    other = run_here(look, *question, "--png", "vl2.png", "--model", DEMO / "vl2", "--max-new-tokens", 2)
    for done, name in ((result, "checkpoint"), (other, "vl2")):
        assert f"asking the small model in demo/{name}, which knows" in done.err


BAD_INPUT = {
    "--image scene.png": "nothing to write: give --out FILE.html, --png FILE.png or both",
    "--image scene.png --out page.txt": "--out page.txt: expected a name that ends in .html or .htm",
    "--image scene.png --png nowhere/a.png": "--png nowhere/a.png: expected the name of a file, in a folder that is",
    "--image scene.png --out a.html --model nowhere": "nowhere/config.json: no such file",
    "--image missing.png --out a.html": "missing.png: no such image file",
    "--image scene.png --out a.html --max-new-tokens 0": "max_new_tokens is 0, expected a whole number",
    "--out a.html": "the following arguments are required: --image",
}


@pytest.mark.parametrize("options", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(options, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(DEMO / "images/scene.png", "scene.png")
    result = run_here(look, *options.split())
    assert result.status == 2 and result.err.startswith(f"error: {BAD_INPUT[options]}") and result.err.count("\n") == 1
    assert os.listdir() == ["scene.png"]


def test_the_walk_runs_writes_pictures_and_changes_nothing(tmp_path):
    def files() -> dict:
        kept = (file for file in ROOT.rglob("*") if not {".git", "__pycache__"} & set(file.parts))
        return {file: file.stat().st_mtime_ns for file in kept}

    before = files()
    result = run(DEMO / "walk.py", "--out", tmp_path / "walk", folder=tmp_path)
    assert result.returncode == 0 and "all equal" in result.stdout, result.stderr
    pictures = [*(tmp_path / "walk").iterdir()]
    assert len(pictures) >= 10 and all(load_image(file).width > 80 for file in pictures)
    assert files() == before
    assert len((DEMO / "walk.py").read_text().splitlines()) <= 150
    (tmp_path / "file").write_text("")
    result = run(DEMO / "walk.py", "--out", tmp_path / "file")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
