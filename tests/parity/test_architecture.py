"""The architecture, from pixels to text, each stage against what the original code computed.

Start reading here. The five golden checkpoints are small random models in the official layouts; their golden files
hold the originals' float32 results for four conversations each, with no image, with one, and with several:

    vl-siglip        as DeepSeek-VL 1.3B: SigLIP
    vl-hybrid        as DeepSeek-VL 7B: SAM and SigLIP
    vl2-mha          as DeepSeek-VL2 tiny: tiles, experts, plain attention
    vl2-mla          as DeepSeek-VL2 small: and latent attention
    vl2-mla-sigmoid  as DeepSeek-VL2 base: and sigmoid routing

Ids must be equal; pixels differ by at most 1e-6; all else by at most 1e-5 of its Euclidean norm, whatever the stage:
errors are not reset between stages, every comparison starts from the text and the pictures.
"""

import pytest
import torch
from conftest import GOLDENS, VL2_GOLDENS, VL_GOLDENS, assert_close, encode_images, golden, golden_model, inside

from generate import generate

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")

every_golden = pytest.mark.parametrize("name", GOLDENS)
every_case = pytest.mark.parametrize("case", range(4))
every_case_with_images = pytest.mark.parametrize("case", range(3))


def prepared(name: str, case: int) -> tuple:
    """The model, one conversation as its input, and the original's tensors for it."""
    (model, processor), data = golden_model(name), golden(name)
    expected = {key[2:]: tensor for key, tensor in data.tensors.items() if key.startswith(f"{case}.")}
    return model, processor(data.conversations[case]), expected


# ------------------------------------------------------------------------------------ text and pictures to numbers


@every_case
@every_golden
def test_1_a_conversation_becomes_token_ids_and_pixels(name, case):
    """Squares of the model's size; in VL2 each whole picture and its tiles. Not every case has them in its file."""
    _, batch, expected = prepared(name, case)
    assert batch["input_ids"][0].tolist() == expected["input_ids"].tolist()
    assert batch["attention_mask"].all()
    if "images_spatial_crop" in expected and "pixel_values" in batch:
        assert batch["images_spatial_crop"].tolist() == expected["images_spatial_crop"].tolist()
    pixels = expected.get("images", expected.get("pixel_values"))
    if pixels is not None:
        torch.testing.assert_close(batch["pixel_values"], pixels, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------ vision.py: pixels to features


def test_2_siglip_sees_every_patch_and_the_aligner_widens_its_tokens():
    model, batch, expected = prepared("vl-siglip", 0)
    tokens = model.vision(batch["pixel_values"])
    assert_close(tokens, expected["vision"])
    assert_close(model.aligner(tokens), expected["image_features"])


def test_2_sam_and_siglip_see_the_same_picture_and_the_aligner_joins_their_tokens():
    """SAM at 256 pixels a side, SigLIP at 96 (1024 and 384 in the 7B), both normalized from one picture in [0, 1]."""
    model, batch, expected = prepared("vl-hybrid", 0)
    high_pixels, low_pixels = model.vision.split(batch["pixel_values"])
    high, low = model.vision(high_pixels, low_pixels)
    assert_close(high, expected["vision_high"])
    assert_close(low, expected["vision_low"])
    assert_close(model.aligner(high, low), expected["image_features"])


@every_case_with_images
@pytest.mark.parametrize("name", VL2_GOLDENS)
def test_2_siglip_sees_every_tile_and_the_aligner_lays_them_out_in_rows(name, case):
    model, batch, expected = prepared(name, case)
    tiles = model.vision(batch["pixel_values"])
    assert_close(tiles[0], expected["vision_tile0"])
    assert_close(model.aligner.project(tiles)[-1].flatten(0, 1), expected["projector_tile_last"])
    features = torch.cat(model.aligner(tiles, batch["images_spatial_crop"]))
    assert_close(features[:64], expected["image_embeds_head64"])
    assert_close(features[-64:], expected["image_embeds_tail64"])


# ------------------------------------------------------------------------------------ model.py: features to logits


@every_case_with_images
@every_golden
def test_3_features_take_the_place_of_image_tokens(name, case):
    model, batch, _ = prepared(name, case)
    features = encode_images(model, batch)
    embeddings = model.embed(batch["input_ids"], features, batch.get("images_seq_mask"))
    where = batch.get("images_seq_mask", batch["input_ids"] == model.config.image_token_id)
    assert torch.equal(embeddings[where], torch.cat(features))
    assert torch.equal(embeddings[~where], model.language.embed_tokens(batch["input_ids"][~where]))


@every_case
@every_golden
def test_4_the_decoder_turns_embeddings_into_hidden_states_and_logits(name, case):
    """After the first layer, after the last and its norm, and the logits; of the last 64 positions."""
    model, batch, expected = prepared(name, case)
    output, hidden_states, _ = inside(model, batch)
    assert_close(output.logits[0, -64:], expected["logits_last64"])
    for stage, tensor in (("hidden_layer1", hidden_states[1]), ("hidden_final", hidden_states[-1])):
        if f"{stage}_last64" in expected:
            assert_close(tensor[0, -64:], expected[f"{stage}_last64"])


@every_golden
def test_5_a_padded_batch_gives_each_conversation_its_own_logits(name):
    """And the ids and the mask of the conversations that the original padded."""
    (model, processor), data = golden_model(name), golden(name)
    batch = processor([data.conversations[case] for case in data.batch])
    for key in ("input_ids", "attention_mask"):
        assert batch[key].tolist() == data.tensors[f"batch.{key}"].tolist()
    logits = model(**processor(data.conversations), logits_to_keep=1).logits
    for case, row in enumerate(logits):
        assert_close(row[-1], data.tensors[f"{case}.logits_last64"][-1])


# ------------------------------------------------------------------------------------ generate.py: logits to text


@every_case
@every_golden
def test_6_the_answer_is_the_originals_id_by_id(name, case):
    """Greedy, 12 ids; the prompt in one pass or in chunks; and where it is there, with a repetition penalty."""
    model, batch, expected = prepared(name, case)
    for chunk_size in [None, 1, 7, 512] if batch["input_ids"].shape[1] < 300 else [None, 50]:
        assert generate(model, batch, 12, chunk_size=chunk_size) == [expected["greedy"].tolist()]
    if "greedy_repetition_penalty_1.3" in expected:
        penalized = expected["greedy_repetition_penalty_1.3"].tolist()
        assert generate(model, batch, 12, repetition_penalty=1.3) == [penalized]


@every_golden
def test_6_answers_of_a_batch_are_those_of_each_alone(name):
    (model, processor), data = golden_model(name), golden(name)
    expected = [data.tensors[f"{case}.greedy"].tolist() for case in range(len(data.conversations))]
    for chunk_size in (None, 50):
        assert generate(model, processor(data.conversations), 12, chunk_size=chunk_size) == expected
    if name in VL_GOLDENS:  # VL2's golden files hold no answers of the original's batch
        assert [expected[case] for case in data.batch] == data.tensors["batch.greedy"].tolist()
