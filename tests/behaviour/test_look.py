"""demo/look.py shows what a plain forward pass computes, and demo/walk.py runs. Bad input is in test_demo.py."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import look
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import assert_refused, run_command
from conftest import DEMO, GOLDENS, golden, golden_model, run
from PIL import Image

from generate import generate
from load_weights import load_model
from model import record
from processor import Processor, load_image
from vision import TileAligner

HOSTILE = "</script><script>document.title = 'stolen'</script><img src=x onerror=alert(1)> & <!-- \u2028"


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@cache
def looked(name: str) -> tuple:
    """A model, its processor, a question, and what look.py makes of it."""
    if name == "demo":
        model, processor = load_model(DEMO / "checkpoint", dtype=torch.float32), Processor(DEMO / "checkpoint")
        question, images, longest = "Describe this image.", [DEMO / "images" / "scene.png"], 80
    else:  # random weights
        model, processor = golden_model(name)
        question, images, longest = "What changed?", [golden(name).folder / "images" / f"{i}.png" for i in (2, 1)], 8
    message = {"role": "user", "content": question, "images": [load_image(image) for image in images]}
    return model, processor, message, look.look(model, processor, message, longest)


@pytest.mark.parametrize("name", ["demo", *GOLDENS])
def test_answer_probabilities_experts_and_attention_are_those_of_a_plain_forward_pass(name):
    """Of one over the prompt and the whole answer, under `record`."""
    model, processor, message, seen = looked(name)
    batch, data, ids = processor([message]), data_of(look.write_page(seen, "a model")), [step.id for step in seen.steps]
    assert generate(model, batch, max_new_tokens=len(ids)) == [ids]
    assert re.sub(r"<\|/?(ref|det|grounding)\|>", "", data["answer"]).strip() == processor.decode(ids).strip()
    batch["input_ids"] = torch.cat((batch["input_ids"], torch.tensor([ids])), dim=1)
    batch["images_seq_mask"], batch["attention_mask"] = F.pad(batch["images_seq_mask"], (0, len(ids))), None
    with torch.inference_mode(), record(model) as inside:
        logits = model(**batch).logits[0]
    T, is_image = len(logits) - len(ids), batch["images_seq_mask"][0].numpy()
    chose = slice(T - 1, -1)  # the positions whose logits chose the answer's tokens
    layers = [f"language.layers.{i}" for i in range(data["layers"])]
    routed = [inside[f"{layer}.mlp.gate"][0][chose] for layer in layers if f"{layer}.mlp.gate" in inside]
    assert len(data["expert_layers"]) == len(routed) and len(data["tokens"]) == len(ids)
    for i, (token, probabilities) in enumerate(zip(data["tokens"], logits[chose].softmax(dim=-1))):
        (values, likeliest), (texts, shown) = probabilities.topk(look.LIKELIEST), zip(*token["likeliest"])
        assert token["probability"] == pytest.approx(probabilities[ids[i]].item(), rel=1e-4)
        assert shown == pytest.approx(values.tolist(), rel=1e-3, abs=1e-9)
        clear = int((values > 1e-6).sum())
        assert [*texts[:clear]] == [look.spell(processor.tokenizer, id) for id in likeliest[:clear].tolist()]
        chosen = [sorted(expert for expert, _ in picks) for picks in token["experts"]]
        assert chosen == [sorted(experts[i].tolist()) for experts in routed]

    shape = len(ids), data["layers"], data["heads"]
    rows, raw = int(np.prod(shape)), zlib.decompress(base64.b64decode(data["attention"]))  # as the page unpacks it
    peaks, shares = np.split(np.frombuffer(raw[: 20 * rows], "<f4"), [rows])
    peaks, shares = peaks.reshape(*shape, 1), shares.reshape(*shape, 4)
    shown = (np.frombuffer(raw[20 * rows :], np.uint8).reshape(*shape, len(data["cells"])) / 255.0) ** 2 * peaks
    attention = torch.cat([inside[f"{layer}.self_attn"] for layer in layers])[:, :, chose]  # (layers, H, tokens, S)
    attention, text = attention.permute(2, 0, 1, 3).numpy(), ~is_image[:T]
    text[0] = False
    picture, prompt, answer = attention[..., is_image], attention[..., :T], attention[..., T:]
    assert np.all(np.abs(shown - picture) <= 0.004 * peaks + 1e-6)
    expected = np.stack([part.sum(-1) for part in (picture, prompt[..., :1], prompt[..., text], answer)], axis=-1)
    np.testing.assert_allclose(shares, expected, atol=1e-5)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-5)


def laid_out(image: Image.Image, text: str = "", **tiles) -> tuple:
    """The config of a small DeepSeek-VL2 and its batch about an image; the views and cells of it."""
    model, processor = golden_model("vl2-mha")
    config = replace(model.config, tiles=replace(model.config.tiles, **tiles))
    batch = processor([{"role": "user", "content": "", "images": [image]}])
    return config, batch, *look.lay_out(config, processor, batch, [image], text)


@pytest.mark.parametrize("global_view_first", [True, False])
@pytest.mark.parametrize("size", [(366, 274), (121, 268), (569, 154)])
def test_cells_stand_in_the_order_of_the_models_tokens(size, global_view_first):
    """The aligner lays out grids whose features are their own places: (view, top, left); its newlines are -1."""
    config, batch, _, cells = laid_out(Image.new("RGB", size), global_view_first=global_view_first)
    ((wide, high),) = batch["images_spatial_crop"].tolist()
    side, step, s = 98, 28, 4  # 7 patches of 14 pixels, folded two by two
    tiles = [(0, 0, 0)] + [(1, row * side, column * side) for row in range(high) for column in range(wide)]
    steps = range(0, s * step, step)
    grids = torch.tensor([[[(view, y + top, x + left) for x in steps] for y in steps] for view, top, left in tiles])
    aligner = TileAligner(config.tiles, 1, 3)
    with torch.no_grad():
        aligner.image_newline.fill_(-1)
        aligner.view_seperator.fill_(-2)
        places = aligner.lay_out(grids.float(), wide, high).tolist()
    assert len(cells) == len(places) == int(batch["images_seq_mask"].sum())
    for cell, (view, top, left) in zip(cells, places):
        if view < 0:
            assert cell.name.startswith("newline of row" if view == -1 else "separator")
        else:
            assert (cell.view, cell.top, cell.left) == (view, top, left) and 0 < cell.right - cell.left <= step
            row, column = (int(at // side * s + at % side / step + 1) for at in (top, left))
            assert cell.name == f"row {row}, column {column}"


def test_boxes_lie_where_the_picture_lies_in_each_view():
    picture, answer = Image.new("RGB", (300, 100), "red"), "<|ref|>all<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    _, _, views, _ = laid_out(picture, answer)
    for view in views:
        red, green, _ = np.asarray(view.picture).astype(int).transpose(2, 0, 1)
        rows, columns = (np.nonzero((red - green > 128).any(axis=axis))[0] for axis in (1, 0))  # the padding is grey
        ((label, *box),) = view.boxes
        assert label == "all" and box == pytest.approx((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), abs=1)


def hostile_page() -> str:
    return look.write_page(looked("demo")[-1]._replace(question=HOSTILE, answer=HOSTILE), HOSTILE)


def test_no_text_becomes_markup_and_nothing_is_fetched():
    page, template = hostile_page(), (DEMO / "look_page.html").read_text(encoding="utf-8")
    assert re.findall(r"<[/!a-z]", page) == re.findall(r"<[/!a-z]", template)
    assert [data_of(page)[key] for key in ("question", "answer", "model")] == [HOSTILE] * 3
    page = re.sub(r"[A-Za-z0-9+/=]{100,}", "", look.write_page(looked("demo")[-1], "a model"))  # without base64
    for source in (template, page):
        assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|src=|eval\(|innerHTML|document\.write", source)


SCRIPT = """<script>
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
  const told = JSON.stringify({found, texts, title: document.title});
  document.body.dataset.found = btoa(unescape(encodeURIComponent(told)));
}, 500);
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not here")
def test_in_a_browser_a_click_shows_the_map_and_hostile_text_stays_text(tmp_path):
    (tmp_path / "page.html").write_text(hostile_page() + SCRIPT, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    result = json.loads(base64.b64decode(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert result["texts"] == [HOSTILE] * 3 and result["title"] == "Look inside one answer"
    steps = looked("demo")[-1].steps
    for shown, token, rows in zip(result["found"], (4, 11, 11), (np.s_[:, :], np.s_[:, :], np.s_[3:4, 2:3])):
        weights = look.attention_of(steps[token])[rows].mean(axis=(0, 1))
        assert shown["mean"] == pytest.approx(weights.tolist(), abs=1e-6)
        assert shown["first"] == look.spell(looked("demo")[1].tokenizer, steps[token].id)
        assert np.argmax(shown["lights"]) == np.argmax(weights)  # the brightest cell is the most attended


def test_the_command_writes_page_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    question = ["--image", DEMO / "images/scene.png", "--prompt", "Describe this image."]
    result = run_command(
        look.main, [*question, "--out", "look.html", "--png", "look.png", "--dtype", "float32"], capsys
    )
    assert result.status == 0 and result.out.count("\n") == 2, result.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["look.html", "look.png"]
    page, (_, processor, _, seen) = data_of((tmp_path / "look.html").read_text(encoding="utf-8")), looked("demo")
    texts = [look.spell(processor.tokenizer, step.id) for step in seen.steps]
    assert [token["text"] for token in page["tokens"]] == texts
    assert load_image(tmp_path / "look.png").width > 900
    other = run_command(
        look.main, [*question, "--png", "vl2.png", "--model", DEMO / "vl2", "--max-new-tokens", 2], capsys
    )
    for done, name in ((result, "checkpoint"), (other, "vl2")):
        assert f"asking the small model in demo/{name}, which knows" in done.err


def test_the_walk_runs_writes_pictures_and_changes_nothing(tmp_path):
    def files() -> dict:
        return {file: file.stat().st_mtime_ns for file in DEMO.rglob("*") if "__pycache__" not in file.parts}

    before = files()
    result = run(DEMO / "walk.py", "--out", tmp_path / "walk", folder=tmp_path)
    assert result.returncode == 0 and "all equal" in result.stdout, result.stderr
    pictures = [*(tmp_path / "walk").iterdir()]
    assert len(pictures) >= 10 and all(load_image(file).width > 80 for file in pictures)
    assert files() == before
    (tmp_path / "file").write_text("")
    refused = run(DEMO / "walk.py", "--out", tmp_path / "file")
    assert_refused(SimpleNamespace(status=refused.returncode, out=refused.stdout, err=refused.stderr), "file")
