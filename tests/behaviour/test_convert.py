"""demo/convert.py: official to transformers and back, what transformers makes of it, shards, and errors."""

import runpy
from functools import partial

import convert as convert_file
import pytest
import torch
from checkpoints import assert_same_weights, edit_json, read_tensors
from commands import assert_refused, run_command
from conftest import ROOT, VL_GOLDENS, assert_close, copy_checkpoint, golden
from convert import convert

from load_weights import load_model, save_checkpoint
from processor import Processor

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


@pytest.mark.parametrize("name", VL_GOLDENS)
def test_there_and_back(name, tmp_path):
    """Equal tensors of equal dtype, but for what no model uses; config and processor say the same again."""
    source, there, back = golden(name).folder, tmp_path / "there", tmp_path / "back"
    convert(source, there, "transformers")
    convert(there, back, "official")
    before, after = (read_tensors(folder / "model.safetensors") for folder in (source, back))
    unused = {key for key in before if ".attn_pool." in key or "_layer_norm." in key and "vision_model." in key[:13]}
    assert before.keys() - after.keys() == unused and after.keys() <= before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])
    models = [load_model(folder) for folder in (source, there, back)]
    assert models[0].config == models[1].config == models[2].config
    prompts = [Processor(folder)(golden(name).conversations[1]) for folder in (source, back)]
    assert all(torch.equal(prompts[0][key], prompts[1][key]) for key in prompts[0])


@pytest.mark.parametrize("name", VL_GOLDENS)
def test_transformers_loads_the_result(name, tmp_path, monkeypatch):
    """Model in shards, processor, tokenizer, chat template and end token: the same ids, pixels and logits."""
    transformers, folder = pytest.importorskip("transformers"), tmp_path / "converted"
    monkeypatch.setattr(convert_file, "SHARD_BYTES", 200_000)
    convert(golden(name).folder, folder, "transformers", torch.float32)
    shards = [read_tensors(file) for file in folder.glob("*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert len(sizes) > 3 and 0 < min(sizes) and max(sizes) <= 200_000
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    image = {"type": "image", "path": str(golden(name).folder / "images" / "1.png")}
    texts = [{"type": "text", "text": text} for text in (" What is 12 ü? ", "And", "this?\n")]
    user, answer = {"role": "user", "content": [image, *texts]}, {"role": "assistant", "content": [texts[1]]}
    ours, model_of_ours = Processor(folder), load_model(folder)
    for talk in ([user], [{"role": "system", "content": [texts[2]]}, user, answer, user]):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        expected, batch = processor.apply_chat_template(talk, **options), ours(talk)
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        for key in ("pixel_values", "high_res_pixel_values"):
            assert (key in batch) == (key in expected)
            assert key not in batch or torch.equal(batch[key], expected[key])
        assert_close(model_of_ours(**batch).logits, model(**expected).logits)
    assert model.generation_config.eos_token_id == list(model_of_ours.config.end_token_ids)


def test_what_cannot_be_converted(tmp_path):
    """Nothing is left behind."""
    int8 = tmp_path / "int8"
    save_checkpoint(load_model(golden("vl-siglip").folder, quantize="int8"), golden("vl-siglip").folder, int8)
    odd = copy_checkpoint("vl-hybrid", tmp_path / "odd")
    edit_json(odd / "config.json", {"vision_config.params.high_res_cfg.pixel_mean": [0.1, 0.2, 0.3]})
    demo, new = ROOT / "demo" / "checkpoint", tmp_path / "new"
    before = {*tmp_path.iterdir()}
    for source, layout, words in (
        (golden("vl2-mha").folder, "official", "a DeepSeek-VL2, which has no other layout"),
        (int8, "transformers", "holds quantized weights"),
        (odd, "transformers", "config.json of the transformers layout has no word for"),
        (demo, "transformers", r"no word for downsample_channels \(64, 128\) \(it would become \(128, 256\)\)"),
        (golden("vl-siglip").folder, "gguf", "layout is 'gguf', expected official or transformers"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(source, new, layout)
    with pytest.raises(ValueError, match="is there already"):
        convert(golden("vl-siglip").folder, odd, "transformers")
    unreadable = copy_checkpoint("vl-siglip", tmp_path / "unreadable") / "tokenizer.model"
    before.add(unreadable.parent)
    unreadable.mkdir()
    with pytest.raises(OSError, match="unreadable/tokenizer.model"):  # not the new folder
        convert(unreadable.parent, new, "transformers")
    assert {*tmp_path.iterdir()} == before


def test_command_line(tmp_path, capsys):
    source, new = golden("vl-siglip").folder, tmp_path / "new"
    main = partial(runpy.run_path, str(ROOT / "demo" / "convert.py"), run_name="__main__")
    done = run_command(main, [source, new, "--layout", "transformers", "--dtype", "bfloat16"], capsys)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert_same_weights(load_model(new), load_model(source, dtype=torch.bfloat16))
    refused = run_command(main, [source, new, "--layout", "transformers"], capsys)
    assert_refused(refused, f"error: {new}: is there already, expected the name of a new folder\n")
