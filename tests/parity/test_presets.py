"""The released models as they stand in code, against the configs and tensor names that were released with them.

The files are 3 MB and not in a clone: one skip where they are missing.
"""

import json
import math
import re
from dataclasses import replace

import pytest
from conftest import SHARED, released_model

from load_weights import expected_tensors, read_layout_and_config
from model import MODELS, ModelConfig
from processor import CANDIDATE_RESOLUTIONS, IMAGE_TOKENS, PIXELS
from vision import HybridConfig

UNUSED = r"attn_pool\.|vision_model\.(head|(high|low)_layer_norm)\."  # SigLIP's pooling head, two norms of the 7B
PARAMETERS = {  # of the model; published, in billions, with SigLIP's pooling head: in the files, and active for a token
    "deepseek-vl-1.3b": (1_962_640_384, 1.98, None),
    "deepseek-vl-7b": (7_331_390_721, 7.34, None),
    "deepseek-vl2-tiny": (3_355_263_088, 3.37, 1.0),
    "deepseek-vl2-small": (16_133_111_152, 16.1, 2.8),
    "deepseek-vl2": (27_464_895_896, 27.5, 4.5),
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameters_and_pixels(preset):
    """Their number; and the processor's sizes, means and deviations are those that the towers are built for."""
    config, pixels, (exact, _, active) = MODELS[preset], PIXELS[preset], PARAMETERS[preset]
    sizes = {key: parameter.numel() for key, parameter in released_model(preset).named_parameters()}
    assert sum(sizes.values()) == exact
    if active is not None:  # the experts chosen for a token and all else, but of the embeddings only one row
        experts = config.language.experts
        routed = sum(size for key, size in sizes.items() if ".experts." in key)
        idle = routed * (experts.n_routed_experts - experts.num_experts_per_tok) // experts.n_routed_experts
        used = exact - idle - sizes["language.embed_tokens.weight"]
        assert used / 1e9 == pytest.approx(active, rel=0.03)
    hybrid = isinstance(config.vision, HybridConfig)  # which normalizes for each of its towers
    high, low = (config.vision.high, config.vision.low) if hybrid else (config.vision, config.vision)
    assert (pixels.side, pixels.normalize) == (high.image_size, not hybrid)
    assert pixels.mean == (config.vision.high_norm.mean if hybrid else (0.5, 0.5, 0.5))
    assert hybrid or pixels.std == (0.5, 0.5, 0.5)
    assert config.tiles is not None or low.grid**2 == IMAGE_TOKENS


def test_presets_equal_the_released_files():
    assert MODELS.keys() == PARAMETERS.keys()
    if not SHARED.is_dir():
        pytest.skip(f"the released configs and names are not at {SHARED}")
    for preset, config in MODELS.items():
        chat, model = f"{preset}-chat", released_model(preset)
        assert config.image_token_id is None and config.end_token_ids == ()
        for name in [preset] if config.tiles else [chat, f"deepseek-community--{chat}"]:
            folder = SHARED / "checkpoints" / name
            resolutions = json.loads((folder / "config.json").read_text()).get("candidate_resolutions")
            assert resolutions is None or {*map(tuple, resolutions)} == {*CANDIDATE_RESOLUTIONS}
            layout, released = read_layout_and_config(folder)
            language = replace(released.language, tie_word_embeddings=False)  # all files hold a head of their own
            assert ModelConfig(released.vision, language, released.tiles) == config, folder
            names = {key: tuple(shape) for key, shape in json.loads((folder / "names.json").read_text()).items()}
            expected = expected_tensors(model, layout, set(names))
            used = {key: shape for key, shape in names.items() if not re.search(UNUSED, key)}
            assert {key: tuple(target.shape) for key, target in expected.items()} == used
            assert {target.parameter for target in expected.values()} == dict(model.named_parameters()).keys()
            if name in (preset, chat):  # those of deepseek-community leave out the pooling head
                assert f"{sum(map(math.prod, names.values())) / 1e9:.3g}" == f"{PARAMETERS[preset][1]}"
