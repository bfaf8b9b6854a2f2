"""Damaged settings of the processor: one line that names the file and the key, before any memory is taken."""

import json
import tracemalloc

import pytest
from checkpoints import check_refused, edit_json
from conftest import copy_checkpoint
from PIL import Image

from processor import Processor

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
VL, VL7B, VL2 = "vl-siglip", "vl-hybrid", "vl2-mha"
NUMBERS = [True, "1", "x" * 10**5, None, [], [1], {}, -1, 10**400, float("nan"), float("inf"), float("-inf")]
FLAGS = ["false", "true", "", 0, 1, 1.0, None, [], {}]
RESOLUTIONS = [
    [[98]], [[98, 98], [98]], [[98.0, 98]], [["98", "98"]], [[0, 0]], [[True] * 2], [[14, 14], [9800, 9800]],
    [[98, 98], [98, 10**9]], [[-98, 98]], [[98, 98], [98, 100]], [[10**400] * 2],
]  # fmt: skip
BAD = [  # checkpoint, file, key, values
    (VL, PREPROCESSOR, "image_size", [*NUMBERS, 0, 96.0, 16383, 4097, {"height": 96}, {"height": 96, "width": 95}]),
    (VL, PREPROCESSOR, "min_size", [*NUMBERS, 0, 14.0, 97]),
    (VL, PREPROCESSOR, "resample", [*NUMBERS, 3.0, 6]),
    (VL, PREPROCESSOR, "rescale_factor", [*NUMBERS, 1.01]),
    (VL, PREPROCESSOR, "image_mean", [*NUMBERS, *([0.5, 0.5, x] for x in NUMBERS), {"0": 1}, "abc", [0.5] * 4]),
    (VL, PREPROCESSOR, "image_std", [*NUMBERS, *([0.5, 0.5, x] for x in [*NUMBERS, 0, 5e-324, 1e-30]), [0.5] * 10**5]),
    (VL, PREPROCESSOR, "do_normalize", FLAGS),
    (VL, PREPROCESSOR, "do_resize", [*FLAGS, False]),
    (VL7B, PREPROCESSOR, "do_normalize", [*FLAGS, True]),
    (VL, PROCESSOR, "mask_prompt", FLAGS),
    (VL2, PROCESSOR, "mask_prompt", FLAGS),
    (VL, PROCESSOR, "num_image_tokens", [*NUMBERS, 0, 576.0, 2**63 - 1, 2**63]),
    (VL, PROCESSOR, "add_special_token", ["false", True, 0, None]),
    (VL, PROCESSOR, "sft_format", ["plain", None, ["deepseek"], {}]),
    (VL2, PROCESSOR, "patch_size", [*NUMBERS, 0, 14.0, 99]),
    (VL2, PROCESSOR, "downsample_ratio", [*NUMBERS, 0, 2.0]),
    (VL2, PROCESSOR, "normalize", FLAGS),
    (VL2, PROCESSOR, "candidate_resolutions", [5, "x", {"0": [98, 98]}, [98, 98], *RESOLUTIONS]),
    (VL, CONFIG, "language_config.max_position_embeddings", [*NUMBERS, 0, 4096.0, 2**63]),
    (VL, CONFIG, "language_config", [[1], "x", 3]),
    (VL, CONFIG, "vision_config", [[1], "x", 3]),
]


@pytest.mark.parametrize("name, file, key, values", BAD, ids=lambda value: str(value)[:24])
def test_a_value_that_is_none_of_its_kind(name, file, key, values, tmp_path):
    path = copy_checkpoint(name, tmp_path / "model") / file
    content = path.read_text()
    for value in values:
        path.write_text(content)
        edit_json(path, {key: value})
        message = check_refused(path.parent, file, key.split(".")[-1], read=Processor)
        assert len(message) < 400 + len(str(path))


def test_settings_inside_another_file(tmp_path):
    """As transformers 5 writes them."""
    folder = copy_checkpoint(VL, tmp_path / "model")
    for value, words in (([1], "expected an object"), ({"image_size": 0}, "image_size")):
        (folder / PROCESSOR).write_text(json.dumps({"image_processor": value}))
        check_refused(folder, f"{PROCESSOR}: image_processor: {words}", read=Processor)


@pytest.mark.parametrize("name, file, changes", [
    (VL, PREPROCESSOR, {"image_size": 4096}),
    (VL2, PROCESSOR, {"candidate_resolutions": [[14, 14], [3500, 3500]]}),
    (VL, PROCESSOR, {"num_image_tokens": 10**12}),
], ids=["pixels", "tiles", "tokens"])  # fmt: skip
def test_tokens_are_counted_before_pixels_are_made(name, file, changes, tmp_path):
    """The largest sizes that are taken as such, in a prompt that is too long."""
    folder = copy_checkpoint(name, tmp_path / name)
    edit_json(folder / file, changes)
    if file == PREPROCESSOR:
        edit_json(folder / PROCESSOR, {"num_image_tokens": 5000})
    processor = Processor(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match="over the model's context of 4096"):
        processor([{"role": "user", "content": "<image>", "images": [Image.new("RGB", (600, 600))]}])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
