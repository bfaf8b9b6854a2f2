"""Images, prompts and batches against the golden files, transformers run live, and a local web server."""

import http.server
import io
import json
import pickle
import random
import shutil
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import SHARED, VL2_GOLDENS, VL_GOLDENS, golden
from PIL import Image, ImageOps

import processor
from processor import Processor, load_image

SMALL = SHARED / "golden" / "vl-siglip"


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that resizing has something to get wrong."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    small = small.resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


# ------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_golden_cases(name):
    """Prompts, ids, tile counts, labels identical, and pixels too: bit for bit, which is within 1e-6."""
    data, tested = golden(name), Processor(golden(name).folder)
    for index, conversation in enumerate(data.conversations):
        batch = tested(conversation, labels=True)
        assert tested.prompt(conversation) == data.prompts[index]
        assert batch["input_ids"][0].tolist() == data.tensors[f"{index}.input_ids"].tolist()
        assert batch["images_seq_mask"].sum() == (batch["input_ids"] == tested.image_token_id).sum()
        n_images = len([image for message in conversation for image in message.get("images", [])])
        assert ("pixel_values" in batch) == (n_images > 0)
        for key in (f"{index}.pixel_values", f"{index}.images"):
            if key in data.tensors:
                assert torch.equal(batch["pixel_values"], data.tensors[key])
        if name in VL2_GOLDENS:
            assert batch["labels"][0].tolist() == data.tensors[f"{index}.labels"].tolist()
            crop = data.tensors[f"{index}.images_spatial_crop"].tolist()  # [[0, 0]] stands for no image
            assert batch["images_spatial_crop"].tolist() == crop if n_images else crop == [[0, 0]]
            tiles = sum(1 + wide * high for wide, high in crop) if n_images else 0
            assert len(batch.get("pixel_values", [])) == tiles


@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_golden_batch_is_padded_on_the_left(name):
    data, tested = golden(name), Processor(golden(name).folder)
    batch = tested([data.conversations[index] for index in data.batch])
    assert batch["input_ids"].tolist() == data.tensors["batch.input_ids"].tolist()
    assert batch["attention_mask"].tolist() == data.tensors["batch.attention_mask"].tolist()
    assert {batch[key].dtype for key in ("input_ids", "attention_mask")} == {torch.int64}
    assert batch["images_seq_mask"].dtype == torch.bool and batch["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize("name", VL_GOLDENS + VL2_GOLDENS)
def test_each_row_of_a_batch_equals_that_row_alone(name):
    data, tested = golden(name), Processor(golden(name).folder)
    batch = tested(data.conversations, labels=True)
    pixels, crops = [], []
    for row, conversation in enumerate(data.conversations):
        alone = tested(conversation, labels=True)
        n = alone["input_ids"].shape[1]
        padding = batch["input_ids"].shape[1] - n
        for key in ("input_ids", "attention_mask", "images_seq_mask"):
            assert torch.equal(batch[key][row, padding:], alone[key][0])
        assert torch.equal(batch["labels"][row, padding + 1 :], alone["labels"][0, 1:])
        assert batch["attention_mask"][row, :padding].sum() == 0 and not batch["images_seq_mask"][row, :padding].any()
        assert (batch["labels"][row, : padding + 1 if padding else 0] == -100).all()
        pixels += alone.get("pixel_values", [])
        crops += alone.get("images_spatial_crop", torch.empty(0)).tolist()
    assert torch.equal(batch["pixel_values"], torch.stack(pixels))
    assert batch.get("images_spatial_crop", torch.empty(0)).tolist() == crops


def test_a_processor_can_be_sent_to_another_process():
    sent = pickle.loads(pickle.dumps(Processor(SMALL)))
    conversation = golden("vl-siglip").conversations[3]
    assert torch.equal(sent(conversation)["input_ids"], Processor(SMALL)(conversation)["input_ids"])


# ------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha"])
def test_roles_markers_and_shapes_that_mean_the_same(name):
    tested, image = Processor(golden(name).folder), random_image(60, 40)
    expected = tested([{"role": "User", "content": f"{tested.image_token}What is this?", "images": [image]}])
    for conversation in (
        [{"role": "user", "content": "<image>What is this?", "images": [image]}],
        [{"role": "<|User|>", "content": " <image_placeholder>What is this?\n", "images": [image]}],
        [
            {"role": "user", "content": "<image>What is this?", "images": [image]},
            {"role": "Assistant", "content": ""},
        ],
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this? "}]}],
    ):
        batch = tested(conversation)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_image_parts_by_path_address_and_image(tmp_path, server):
    image = random_image(30, 20)
    image.save(tmp_path / "a.png")
    parts = [
        {"type": "image", "image": image},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": f"{server}/ok.png"},
    ]
    pixels = Processor(SMALL)([{"role": "user", "content": parts}])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[2], Processor(SMALL).image_inputs(SERVED)[0]["pixel_values"][0])


def test_system_texts():
    vl, vl2 = Processor(SMALL), Processor(golden("vl2-mha").folder)
    hello = {"role": "user", "content": "Hello"}
    system = {"role": "system", "content": " Be brief. "}
    brief = "Be brief.\n\nUser: Hello\n\nAssistant:"
    assert vl.prompt([system, hello]) == vl.prompt([hello], system="Be brief.") == brief
    assert vl.prompt([hello], system="") == "User: Hello\n\nAssistant:"
    assert vl.prompt([hello]).startswith(processor.SYSTEM_TEXT + "\n\nUser: Hello")
    assert vl2.prompt([system, hello]) == "Be brief.<|User|>: Hello\n\n<|Assistant|>:"
    ids = vl2([system, hello])["input_ids"][0].tolist()
    encode = vl2.tokenizer.encode
    assert ids == [vl2.bos_token_id, *encode("Be brief."), *encode("<|User|>: Hello\n\n<|Assistant|>:")]
    for wrong in ([hello, system], [system, system, hello]):
        with pytest.raises(ValueError, match="system"):
            vl.prompt(wrong)
    with pytest.raises(ValueError, match="system"):
        vl.prompt([system, hello], system="Other.")


TRAINING = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": ' "A red circle." '},
    {"role": "user", "content": "<image>\nAnd this? ü"},
    {"role": "assistant", "content": "über\n12 dogs"},
]


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha", "vl2-mla"])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_labels(name, mask_prompt, tmp_path):
    """With mask_prompt only the answers and their end tokens are learnt: decoding the labels gives them back."""
    folder = shutil.copytree(golden(name).folder, tmp_path / name)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"mask_prompt": mask_prompt}))
    tested = Processor(folder)
    conversation = [dict(message) for message in TRAINING]
    conversation[2]["images"] = [random_image(50, 50)]
    batch = tested([conversation, conversation[:1]], labels=True)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learnt = labels != -100
    assert torch.equal(labels[learnt], ids[learnt])
    end = tested.tokenizer.tokens[tested.eos_token_id]
    assert ids[-1] == tested.eos_token_id
    if mask_prompt:
        space = "" if tested.is_vl2 else " "
        answers = f'{space}"A red circle."{end}{space}über\n12 dogs{end}'
        assert tested.decode(labels[learnt], skip_special_tokens=False) == answers
        assert (batch["labels"][1] == -100).all()
    else:
        assert torch.equal(~learnt, batch["images_seq_mask"][0])
        padding = (batch["attention_mask"][1] == 0).sum()
        assert (batch["labels"][1, : padding + 1] == -100).all() and (batch["labels"][1, padding + 1 :] >= 0).all()
    assert torch.equal(tested(conversation)["input_ids"][0], ids)  # asking for labels changes no id


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha", "vl2-mla"])
def test_labels_of_any_answer(name):
    """No token crosses from a prompt into an answer, whatever the answer starts with."""
    tested, rng = Processor(golden(name).folder), random.Random(0)
    tested.mask_prompt = True
    starts = ['"', "1", " 1", "图", "ü", "-", "\n", "a", "😀", ".", "<|ref|>", "\u3000", "é", "'s", "٣"]
    for _ in range(150):
        question, answer = ("".join(rng.choices(starts, k=4)).strip() or "a" for _ in range(2))
        asked = {"role": "user", "content": question}
        labels = tested([asked, {"role": "assistant", "content": answer}, asked], labels=True)["labels"][0]
        text = ("" if tested.is_vl2 else " ") + answer + "<｜end▁of▁sentence｜>"
        assert labels[labels != -100].tolist() == tested.tokenizer.encode(text)


@pytest.mark.parametrize("name", ["vl-siglip", "vl2-mha"])
def test_markers_and_images_must_agree(name):
    tested, image = Processor(golden(name).folder), random_image(9, 9)
    for markers, images in ((1, 0), (0, 1), (2, 1), (1, 3)):
        message = {"role": "user", "content": "<image>" * markers + "What?", "images": [image] * images}
        with pytest.raises(ValueError, match=f"{markers} image markers, but {images} images"):
            tested([message])
    # Counted over the conversation: the images may all stand with its first message.
    first = {"role": "user", "content": "<image>a", "images": [image] * 2}
    last = {"role": "user", "content": "<image>b"}
    assert tested([first, {"role": "assistant", "content": "b"}, last])["images_seq_mask"].any()


BAD_CONVERSATIONS = {
    "no messages": [],
    "no message in a batch": [[]],
    "only a system message": [{"role": "system", "content": "a"}],
    "not a message": ["hello"],
    "unknown role": [{"role": "tool", "content": "a"}],
    "no content": [{"role": "user"}],
    "misspelt key": [{"role": "user", "content": "a", "image": ["a.png"]}],
    "content of another type": [{"role": "user", "content": 3}],
    "images not in a list": [{"role": "user", "content": "<image>", "images": "a.png"}],
    "parts and images": [{"role": "user", "content": [{"type": "text", "text": "a"}], "images": ["a.png"]}],
    "part of another type": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}],
    "image part without a source": [{"role": "user", "content": [{"type": "image"}]}],
    "image part with two sources": [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}],
    "text part without text": [{"role": "user", "content": [{"type": "text"}]}],
    "image of another type": [{"role": "user", "content": "<image>", "images": [3]}],
    "missing image": [{"role": "user", "content": "<image>", "images": ["nowhere.png"]}],
    "surrogate": [{"role": "user", "content": "\udcff"}],
}


@pytest.mark.parametrize("conversation", BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS.keys())
def test_a_bad_conversation_is_one_clear_line(conversation):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Processor(SMALL)(conversation)
    assert str(error.value) and "\n" not in str(error.value)


def test_an_image_in_an_answer_is_refused_by_vl2():
    answer = {"role": "assistant", "content": "<image>", "images": [random_image(9, 9)]}
    with pytest.raises(ValueError, match="assistant"):
        Processor(golden("vl2-mha").folder)([{"role": "user", "content": "a"}, answer])


def test_a_prompt_beyond_the_context(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    hello = [{"role": "user", "content": "Hello"}]
    n = Processor(folder)(hello)["input_ids"].shape[1]
    for limit, fits in ((n, True), (n - 1, False)):
        config["language_config"]["max_position_embeddings"] = limit
        (folder / "config.json").write_text(json.dumps(config))
        if fits:
            Processor(folder)(hello)
        else:
            with pytest.raises(ValueError, match=f"{n} tokens.*{limit}"):
                Processor(folder)(hello)


def test_a_literal_special_token_in_a_text_is_special():
    """As in the originals, which tokenize the whole string; it marks no place for an image."""
    tested = Processor(SMALL)
    batch = tested([{"role": "user", "content": "a<｜end▁of▁sentence｜>b"}])
    assert (batch["input_ids"] == tested.eos_token_id).sum() == 1 and not batch["images_seq_mask"].any()


# --------------------------------------------------------------------------------------- VL2's tiles


def test_best_resolution_keeps_most_pixels():
    candidates = [(w * 384, h * 384) for w in range(1, 10) for h in range(1, 10) if w * h <= 9]
    rng = random.Random(0)
    for _ in range(300):
        size = rng.randrange(1, 3000), rng.randrange(1, 3000)
        chosen = processor.best_resolution(size, candidates)

        def kept(candidate, size=size):
            scale = min(candidate[0] / size[0], candidate[1] / size[1])
            return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

        best = max(map(kept, candidates))
        least_area = min(w * h for w, h in candidates if kept((w, h)) == best)
        assert kept(chosen) == best and chosen[0] * chosen[1] == least_area
    assert processor.best_resolution((384, 384), candidates) == (384, 384)
    assert processor.best_resolution((800, 400), candidates) == (1152, 768)  # 768 x 384 would lose pixels


def test_tiles_at_full_size(tmp_path):
    """The token count of the paper's layout, and tiles that put together are the padded picture."""
    folder = shutil.copytree(golden("vl2-mha").folder, tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["candidate_resolutions"] = [[384, 384], [384, 768], [768, 384], [768, 768], [1152, 384]]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    tested = Processor(folder)
    tilings = {(300, 300): (1, 1), (700, 300): (2, 1), (320, 700): (1, 2), (900, 800): (2, 2)}
    for (width, height), (wide, high) in tilings.items():
        image = random_image(width, height)
        batch = tested([{"role": "user", "content": "<image>", "images": [image]}])
        assert batch["images_spatial_crop"].tolist() == [[wide, high]]
        assert batch["images_seq_mask"].sum() == 210 + 1 + (14 * high) * (14 * wide + 1)
        whole, *tiles = batch["pixel_values"]
        rows = [torch.cat(tiles[row * wide : (row + 1) * wide], dim=2) for row in range(high)]
        padded = ImageOps.pad(image, (wide * 384, high * 384), Image.Resampling.BICUBIC, (127, 127, 127))
        expected = torch.tensor(np.asarray(padded)).permute(2, 0, 1) / 255
        torch.testing.assert_close(torch.cat(rows, dim=1), (expected - 0.5) / 0.5)
        assert whole.shape == (3, 384, 384)
    three = [{"role": "user", "content": "<image>" * 3, "images": [random_image(700, 300)] * 3}]
    assert tested(three)["images_spatial_crop"].tolist() == [[1, 1]] * 3
    with pytest.raises(ValueError, match="too thin"):
        tested.image_inputs(random_image(2000, 1))


# ------------------------------------------------------------------------------ transformers, live


def transformers_checkpoint(folder, kind: str, era: int, **settings):
    """Processor files as transformers saves them; era 4 keeps the image processor in a file of its own."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
    from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
        DeepseekVLHybridImageProcessorPil,
    )

    hybrid = kind == "deepseek_vl_hybrid"
    image_processor = (DeepseekVLHybridImageProcessorPil if hybrid else DeepseekVLImageProcessorPil)(**settings)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(SMALL / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜end▁of▁sentence｜>",
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )
    whole = (transformers.DeepseekVLHybridProcessor if hybrid else transformers.DeepseekVLProcessor)(
        image_processor, tokenizer, num_image_tokens=576
    )
    folder.mkdir()
    whole.save_pretrained(folder)
    if era == 4:
        content = json.loads((folder / "processor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(content.pop("image_processor")))
        (folder / "processor_config.json").write_text(json.dumps(content))
    config = {"model_type": kind, "image_token_id": 402, "text_config": {"max_position_embeddings": 16384}}
    (folder / "config.json").write_text(json.dumps(config))
    return Processor(folder), image_processor, whole


SIZES = [(384, 384), (1, 1), (1, 300), (300, 1), (2000, 3), (1024, 768), (500, 333), (37, 1100), (14, 14), (385, 383)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
HIGH = {"high_res_image_mean": list(processor.CLIP_MEAN), "high_res_image_std": list(processor.CLIP_STD)}


@pytest.mark.parametrize("era", [4, 5])
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("deepseek_vl", HALF),
        ("deepseek_vl", {"size": {"height": 200, "width": 200}, "min_size": 20, "resample": 2}),
        ("deepseek_vl_hybrid", HALF | HIGH | {"resample": 2}),
        ("deepseek_vl_hybrid", {"high_res_size": {"height": 300, "width": 300}, "do_normalize": False}),
    ],
    ids=["1.3B", "1.3B, changed", "7B", "7B, changed"],
)
def test_pixels_equal_transformers(kind, settings, era, tmp_path):
    ours, library, _ = transformers_checkpoint(tmp_path / "model", kind, era, **settings)
    rng = random.Random(era)
    small = settings.get("high_res_size") or kind == "deepseek_vl"
    sizes = SIZES if small else rng.sample(SIZES, 4)
    for size in sizes + [(rng.randrange(1, 900), rng.randrange(1, 900)) for _ in range(10 if small else 2)]:
        image = random_image(*size, seed=sum(size))
        expected = library(image, return_tensors="pt")
        inputs, n_tokens = ours.image_inputs(image)
        assert inputs.keys() == expected.keys() and n_tokens == 576
        for key, pixels in inputs.items():
            assert pixels.dtype == torch.float32
            error = (pixels - expected[key]).norm() / expected[key].norm().clamp_min(1e-9)
            assert error <= 1e-6, (size, key)


# The chat template of the converted checkpoints: written anew from what it does.
TEMPLATE = (
    "{{ system }}\n\n"
    "{% for message in messages %}"
    "{% set answer = message.role == 'assistant' %}"
    "{{ 'Assistant:' if answer else 'User:' }}"
    "{% if message.content or not loop.last %} {% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image_placeholder>{% else %}"
    "{% if not loop.first and loop.previtem.type == 'text' %} {% endif %}"
    "{% set text = part.text.lstrip() if loop.first else part.text %}"
    "{{ text.rstrip() if loop.last else text }}"
    "{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}{{ end if answer else '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def test_chat_template_equals_jinja():
    jinja2 = pytest.importorskip("jinja2")
    template, tested, rng = jinja2.Template(TEMPLATE), Processor(SMALL), random.Random(0)
    values = {"system": processor.SYSTEM_TEXT, "end": "<｜end▁of▁sentence｜>", "add_generation_prompt": True}

    def part(role):
        if role == "user" and rng.random() < 0.4:
            return {"type": "image", "path": "a.png"}
        text = rng.choice(["", " ", "\n"]) + rng.choice("abc") + rng.choice([" d", "\n", "  ", ""])
        return {"type": "text", "text": text}

    for _ in range(300):
        roles = ["user", "assistant"] * rng.randrange(3) + ["user"]
        messages = [{"role": role, "content": [part(role) for _ in range(rng.randrange(1, 5))]} for role in roles]
        assert tested.prompt(messages) == template.render(messages=messages, **values)


@pytest.mark.parametrize("kind", ["deepseek_vl", "deepseek_vl_hybrid"])
def test_batch_equals_transformers_processor(kind, tmp_path):
    sizes = {"size": {"height": 96, "width": 96}}
    if kind == "deepseek_vl_hybrid":
        sizes["high_res_size"] = {"height": 128, "width": 128}
    ours, _, library = transformers_checkpoint(tmp_path / "model", kind, 5, **sizes)
    images = [random_image(50, 80), random_image(90, 20), random_image(33, 33)]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "12 ü?"}]}],
        [
            {"role": "user", "content": [{"type": "image", "image": image} for image in images[1:]]},
            {"role": "assistant", "content": [{"type": "text", "text": "Dogs."}]},
            {"role": "user", "content": [{"type": "text", "text": "图像?"}, {"type": "text", "text": "And?"}]},
        ],
    ]
    library.tokenizer.padding_side = "left"
    prompts = ["<｜begin▁of▁sentence｜>" + ours.prompt(conversation) for conversation in conversations]
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    expected = library(text=prompts, images=[images[:1], images[1:]], **options)
    batch = ours(conversations)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(batch[key], expected[key])
    for key in set(batch) - {"input_ids", "attention_mask", "images_seq_mask"}:
        torch.testing.assert_close(batch[key], expected[key], rtol=1e-6, atol=1e-6)
    assert torch.equal(batch["images_seq_mask"], expected["input_ids"] == 402)


# ------------------------------------------------------------------------------------ reading images


def through_file(image: Image.Image, tmp_path, name: str, **options) -> Image.Image:
    image.save(tmp_path / name, **options)
    return load_image(tmp_path / name)


def test_plain_rgb_is_not_touched(tmp_path):
    image = random_image(31, 17)
    assert load_image(image).tobytes() == image.tobytes()
    for name in ("a.png", "a.bmp", "a.ppm", "a.tiff", "a.jpg"):
        read = through_file(image, tmp_path, name)
        assert read.mode == "RGB" and read.tobytes() == Image.open(tmp_path / name).convert("RGB").tobytes()
    assert load_image(str(tmp_path / "a.png")).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_that_pillow_converts(mode):
    image = random_image(16, 16).convert(mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_transparency_is_shown_on_white(mode):
    grey, alpha = random_image(16, 16, "L"), Image.linear_gradient("L").resize((16, 16))
    image = grey.convert("P" if mode == "PA" else mode.upper()[:-1])
    image.putalpha(alpha)
    image = image.convert(mode)
    opacity = np.asarray(alpha, dtype=float)[..., None] / 255
    expected = np.asarray(grey.convert("RGB"), dtype=float) * opacity + 255 * (1 - opacity)
    error = np.abs(np.asarray(load_image(image), dtype=float) - expected).max()
    assert error <= (2 if mode in ("La", "RGBa") else 0.51)  # premultiplied values were rounded before


def test_transparent_colours_are_shown_on_white(tmp_path):
    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.putdata([0, 1, 2, 3])
    white = [255, 255, 255]
    one = through_file(palette, tmp_path, "a.png", transparency=1)
    assert np.asarray(one)[0].tolist() == [[255, 0, 0], white, [0, 0, 255], [9, 9, 9]]
    graded = through_file(palette, tmp_path, "b.png", transparency=bytes([255, 0, 128, 0]))
    assert np.asarray(graded)[0].tolist() == [[255, 0, 0], white, [127, 127, 255], white]
    gif = through_file(palette, tmp_path, "c.gif", transparency=2)
    assert np.asarray(gif)[0].tolist() == [[255, 0, 0], [0, 255, 0], white, [9, 9, 9]]
    rgb = through_file(palette.convert("RGB"), tmp_path, "d.png", transparency=(0, 255, 0))
    assert np.asarray(rgb)[0, 1].tolist() == white
    grey = through_file(Image.fromarray(np.array([[0, 7, 9]], dtype=np.uint8)), tmp_path, "e.png", transparency=7)
    assert np.asarray(grey)[0, :, 0].tolist() == [0, 255, 9]


DEEP_GREY = {
    "I;16": np.array([[0, 257, 32768, 65535]], dtype="<u2"),
    "I;16B": np.array([[0, 257, 32768, 65535]], dtype=">u2"),
    "I": np.array([[0, 257, 32768, 65535]], dtype=np.int32),
    "I, beyond 16 bits": np.array([[-100, 0, 100, 300]], dtype=np.int32),
    "F, to 1": np.array([[0, 0.25, 0.5, 1]], dtype=np.float32),
    "F, to 255": np.array([[0, 1, 128, 255]], dtype=np.float32),
    "F, to 65535": np.array([[0, 257, 32768, 65535]], dtype=np.float32),
    "F, negative": np.array([[-1, 0, 1, 3]], dtype=np.float32),
    "F, not finite": np.array([[np.nan, 0, 0.5, 1]], dtype=np.float32),
    "F, flat": np.array([[-5, -5, -5, -5]], dtype=np.float32),
}
EXPECTED_GREY = {
    "I, beyond 16 bits": [0, 64, 128, 255], "F, to 1": [0, 64, 128, 255], "F, to 255": [0, 1, 128, 255],
    "F, negative": [0, 64, 128, 255], "F, not finite": [0, 0, 128, 255], "F, flat": [0, 0, 0, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP_GREY)
def test_deep_grey_is_scaled_not_clipped(name):
    mode, values = name.split(",")[0], DEEP_GREY[name]
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    shown = np.asarray(load_image(image))[0]
    assert shown[:, 0].tolist() == EXPECTED_GREY.get(name, [0, 1, 128, 255])
    assert (shown == shown[:, :1]).all()


def test_16_bit_files(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for name in ("a.png", "a.tiff"):
        read = through_file(Image.fromarray(values), tmp_path, name)
        assert np.abs(np.asarray(read)[..., 0].astype(float) - values / 257).max() <= 0.51


def test_lab(tmp_path):
    ImageCms = pytest.importorskip("PIL.ImageCms")
    image = Image.new("RGB", (4, 4), (200, 40, 90))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    shown = np.asarray(through_file(lab, tmp_path, "a.tiff")).astype(int)
    assert np.abs(shown - (200, 40, 90)).max() <= 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(load_image(tmp_path / name))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_exif_orientation(orientation, name, tmp_path):
    """The stored picture is turned as a viewer turns it; 0 and 9 are not orientations and turn nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    random_image(48, 32).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    read = load_image(tmp_path / name)
    assert read.size == expected.size and read.tobytes() == expected.tobytes()
    assert read.size == ((32, 48) if orientation in (5, 6, 7, 8) else (48, 32))


def test_a_damaged_exif_block_turns_nothing(tmp_path):
    random_image(20, 10).save(tmp_path / "a.png", exif=b"Exif\x00\x00not a TIFF header")
    assert load_image(tmp_path / "a.png").size == (20, 10)


# ------------------------------------------------------------------------------------ images refused


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (10_001, 10_000), (70_000, 10), (1, 2**31 - 1)])
@pytest.mark.parametrize("pillow_limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_bomb_is_refused_from_its_header(size, pillow_limit, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=r"bomb\.png.*(limit|exceeds)"):
        load_image(tmp_path / "bomb.png")
    assert not [warning for warning in recwarn if "Bomb" in warning.category.__name__]


def test_a_picture_given_directly_has_the_same_limit(monkeypatch):
    monkeypatch.setattr(processor, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match="10 x 10 pixels, over the limit"):
        load_image(random_image(10, 10))


def test_files_that_are_not_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (tmp_path / "header.png").write_bytes(png_header(50, 50)[:20])
    for name in ("empty.png", "text.png", "script.eps", "header.png"):
        with pytest.raises(ValueError, match=name) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="not a file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="only http"):
        load_image("file:///etc/hostname")
    with pytest.raises(ValueError, match="must be a path"):
        load_image(b"bytes")
    with pytest.raises(ValueError, match="0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tiff", "a.bmp"])
def test_truncated_files(name, tmp_path):
    random_image(64, 64).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for part in (0.2, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ValueError, match=name) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng = random.Random(0)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.tiff", "a.bmp", "a.ppm", "a.jp2"):
        random_image(24, 24).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (tmp_path / name).write_bytes(damaged)
            try:
                assert load_image(tmp_path / name).mode == "RGB"
            except ValueError as error:
                assert name in str(error)


# --------------------------------------------------------------------------------------- addresses

SERVED = random_image(40, 30, seed=5)
REQUESTS = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        REQUESTS.append(self.path)
        file = io.BytesIO()
        SERVED.save(file, "PNG")
        body = file.getvalue()
        try:
            if self.path == "/ok.png":
                self.reply(200, {"Content-Length": len(body)}, body)
            elif self.path == "/no-length.png":
                self.reply(200, {}, body)
            elif self.path == "/cut.png":
                self.reply(200, {"Content-Length": len(body)}, body[: len(body) // 2])
            elif self.path == "/page":
                self.reply(200, {}, b"<html></html>")
            elif self.path == "/large":
                self.reply(200, {"Content-Length": 10**9}, b"x")
            elif self.path == "/large-unsaid":
                self.reply(200, {}, b"")
                for _ in range(100):
                    self.wfile.write(bytes(2**16))
            elif self.path == "/slow-body":
                self.reply(200, {"Content-Length": 10**6}, b"")
                self.drip()
            elif self.path == "/slow-headers":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
                self.drip()
            elif self.path.startswith("/to/"):
                self.reply(302, {"Location": self.path.removeprefix("/to/")}, b"")
            else:
                self.send_error(404)
        except OSError:
            pass  # the client has hung up, as it should

    def reply(self, status, headers, body):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("path", ["/ok.png", "/no-length.png", "/to//ok.png"])
def test_an_image_by_address(server, path):
    assert load_image(server + path).tobytes() == SERVED.tobytes()


@pytest.mark.parametrize(
    "path, message",
    {
        "/missing": "404: Not Found",
        "/cut.png": "damaged|cannot be opened",
        "/page": "not an image",
        "/large": "more than the limit",
        "/large-unsaid": "more than the limit",
        "/slow-body": "within 0.5 seconds",
        "/slow-headers": "within 0.5 seconds",
        "/to/file:///etc/hostname": "file",
        "/to/ftp://127.0.0.1/a.png": "redirected to ftp",
        "/to//to//missing": "Not Found",
    }.items(),
)
def test_an_address_that_gives_no_image(server, path, message, monkeypatch):
    monkeypatch.setattr(processor, "MAX_DOWNLOAD_BYTES", 2**20)
    monkeypatch.setattr(processor, "DOWNLOAD_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        load_image(server + path)
    assert time.monotonic() - start < 2
    assert server + path in str(error.value) and "\n" not in str(error.value)


def test_addresses_that_cannot_be_reached():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/a.png", "http://", "http://[", "http://a b/", "http://127.0.0.1:notaport/"):
        with pytest.raises(ValueError) as error:
            load_image(url)
        assert str(error.value).startswith(f"{url}: ") and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- checkpoint files


def edit(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    content.update(changes)
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not KeyError}))


BAD_FILES = {
    "unknown architecture": ("vl-siglip", "config.json", {"model_type": "llava"}, "model_type 'llava'"),
    "no image size": ("vl-siglip", "preprocessor_config.json", {"image_size": KeyError}, "image_size"),
    "negative image size": ("vl-siglip", "preprocessor_config.json", {"image_size": -1}, "image_size"),
    "mean of two": ("vl-siglip", "preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "image_mean"),
    "mean missing": ("vl-siglip", "preprocessor_config.json", {"image_mean": None}, "image_mean|iterable"),
    "std of zero": ("vl-siglip", "preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std"),
    "no resizing": ("vl-siglip", "preprocessor_config.json", {"do_resize": False}, "do_resize"),
    "no image tokens": ("vl-siglip", "processor_config.json", {"num_image_tokens": 0}, "num_image_tokens"),
    "another template": ("vl-siglip", "processor_config.json", {"sft_format": "plain"}, "sft_format"),
    "no end token": ("vl-siglip", "tokenizer_config.json", {"eos_token": KeyError}, "tokenizer_config.json"),
    "unknown begin token": ("vl-siglip", "tokenizer_config.json", {"bos_token": "<s>"}, "tokenizer_config.json"),
    "another image token": ("vl-siglip", "config.json", {"image_token_id": 7}, "image_token_id 7"),
    "no patch size": ("vl2-mha", "processor_config.json", {"patch_size": KeyError}, "patch_size"),
    "patches of no size": ("vl2-mha", "processor_config.json", {"patch_size": 0}, "zero"),
    "no number": ("vl-siglip", "config.json", {"language_config": {"max_position_embeddings": []}}, "int"),
    "tiles without a height": (
        "vl2-mha", "processor_config.json", {"candidate_resolutions": [[98, 98], [98]]}, "candidate",
    ),
    "mean beyond white": ("vl-siglip", "preprocessor_config.json", {"image_mean": [0.5, 0.5, 1e40]}, "image_mean"),
    "sides longer than any picture": ("vl-siglip", "preprocessor_config.json", {"image_size": 10**9}, "image_size"),
    "a shorter side longer than the longest": ("vl-siglip", "preprocessor_config.json", {"min_size": 97}, "min_size"),
    "uneven tiles": ("vl2-mha", "processor_config.json", {"candidate_resolutions": [[98, 98], [98, 100]]}, "candidate"),
}  # fmt: skip


@pytest.mark.parametrize("name, file, changes, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_checkpoint_with_bad_settings(name, file, changes, message, tmp_path):
    folder = shutil.copytree(golden(name).folder, tmp_path / name)
    edit(folder, file, **changes)
    with pytest.raises(ValueError, match=message) as error:
        Processor(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_of_more_tokens_than_the_context_takes_no_memory(tmp_path):
    folder = shutil.copytree(SMALL, tmp_path / "model")
    edit(folder, "processor_config.json", num_image_tokens=10**12)
    picture = {"role": "user", "content": "<image>", "images": [Image.new("RGB", (8, 8))]}
    with pytest.raises(ValueError, match="over the model's context of 4096"):
        Processor(folder)([picture])


def test_a_checkpoint_with_missing_or_broken_files(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        folder = shutil.copytree(SMALL, tmp_path / f"without {name}")
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Processor(folder)
        (folder / name).write_text("{broken")
        with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
            Processor(folder)
    folder = shutil.copytree(SMALL, tmp_path / "without settings")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        Processor(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Processor(tmp_path / "nowhere")
