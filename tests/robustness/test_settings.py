"""Damaged settings of the processor: one line that names the file and the key, before any memory is taken."""

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
    5, "x", {"0": [98, 98]}, [98, 98], [[98]], [[98, 98], [98]], [[98.0, 98]], [["98", "98"]], [[0, 0]], [[True] * 2],
    [[14, 14], [9800, 9800]], [[98, 98], [98, 10**9]], [[-98, 98]], [[98, 98], [98, 100]], [[10**400] * 2],
]  # fmt: skip
BAD = [  # checkpoint, file, values of keys
    (VL, PREPROCESSOR, {
        "image_size": [*NUMBERS, 0, 96.0, 16383, 4097, {"height": 96}, {"height": 96, "width": 95}],
        "min_size": [*NUMBERS, 0, 14.0, 97], "resample": [*NUMBERS, 3.0, 6], "rescale_factor": [*NUMBERS, 1.01],
        "image_mean": [*NUMBERS, *([0.5, 0.5, x] for x in NUMBERS), {"0": 1}, "abc", [0.5] * 4],
        "image_std": [*NUMBERS, *([0.5, 0.5, x] for x in [*NUMBERS, 0, 5e-324, 1e-30]), [0.5] * 10**5],
        "do_normalize": FLAGS, "do_resize": [*FLAGS, False],
    }),
    (VL, PROCESSOR, {
        "num_image_tokens": [*NUMBERS, 0, 576.0, 2**63 - 1, 2**63], "mask_prompt": FLAGS,
        "add_special_token": ["false", True, 0, None], "sft_format": ["plain", None, ["deepseek"], {}],
        "image_processor": [[1], {"image_size": 0}],  # settings inside another file, as transformers 5 writes them
    }),
    (VL, CONFIG, {
        "language_config.max_position_embeddings": [*NUMBERS, 0, 4096.0, 2**63],
        "language_config": [[1], "x", 3], "vision_config": [[1], "x", 3],
    }),
    (VL7B, PREPROCESSOR, {"do_normalize": [*FLAGS, True]}),
    (VL2, PROCESSOR, {
        "patch_size": [*NUMBERS, 0, 14.0, 99], "downsample_ratio": [*NUMBERS, 0, 2.0], "normalize": FLAGS,
        "mask_prompt": FLAGS, "candidate_resolutions": RESOLUTIONS,
    }),
]  # fmt: skip


@pytest.mark.parametrize("name, file, bad", BAD)
def test_a_value_that_is_none_of_its_kind(name, file, bad, tmp_path):
    path = copy_checkpoint(name, tmp_path / "model") / file
    content = path.read_text()
    for key, value in ((key, value) for key, values in bad.items() for value in values):
        path.write_text(content)
        edit_json(path, {key: value})
        message = check_refused(path.parent, file, key.split(".")[-1], read=Processor)
        assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize("name, changes", [
    (VL, {PREPROCESSOR: {"image_size": 4096}, PROCESSOR: {"num_image_tokens": 10**12}}),
    (VL2, {PROCESSOR: {"candidate_resolutions": [[14, 14], [3500, 3500]]}}),
])  # fmt: skip
def test_tokens_are_counted_before_pixels_are_made(name, changes, tmp_path):
    """The largest sizes that are taken as such, in a prompt that is too long."""
    folder = copy_checkpoint(name, tmp_path / name)
    for file in changes:
        edit_json(folder / file, changes[file])
    processor = Processor(folder)
    tracemalloc.start()
    with pytest.raises(ValueError, match="over the model's context of 4096"):
        processor([{"role": "user", "content": "<image>", "images": [Image.new("RGB", (600, 600))]}])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
