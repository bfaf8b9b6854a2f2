"""Sampling, prefill, decoding and streaming: against transformers' generate, and what generate.py promises."""

import math

import pytest
import torch
from conftest import DEMO, GOLDENS, KINDS, VL_GOLDENS, VOCABULARY, alone, golden, golden_model, random_batch

from generate import TextStream, compile_steps, generate, keep_top_k, keep_top_p, penalize_repetition, stream
from load_weights import DigitLinear, HalfLinear, PackedLinear, load_model, pack

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")


@pytest.mark.parametrize("kind", ["different", "ties", "equal"])
def test_every_transform_equals_transformers(kind):
    library = pytest.importorskip("transformers")
    logits, ids = torch.randn(4, 50) * 3, torch.randint(0, 50, (4, 30))  # some ids more than once
    logits = {"different": logits, "ties": (logits * 2).round() / 2, "equal": logits[:, :1].repeat(1, 50)}[kind]
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.5, 1.0, 1.3):
        expected = library.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)
    for k in (1, 5, 49, 50, 1000):
        assert torch.equal(keep_top_k(logits, k), library.TopKLogitsWarper(k)(None, logits))
    for p in (1e-9, 0.1, 0.5, 0.9, 0.999):  # 1 - 1e-9 is 1 in float32: one token must be left
        assert torch.equal(keep_top_p(logits, p), library.TopPLogitsWarper(p)(None, logits))


def until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """A row without what follows its end token."""
    return row[: next((i + 1 for i, id in enumerate(row) if id in ends), len(row))]


def their_answer(theirs, batch: dict, ends: tuple[int, ...] = (), **options) -> list[list[int]]:
    ids = theirs.generate(**batch, pad_token_id=0, **options)
    return [until_end(row, ends) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_where_transformers_end_them(small_pair, kind):
    """With two end tokens: of each row one that the other row does not say."""
    batch, options = random_batch(kind), dict(max_new_tokens=20, temperature=1.5)
    free = generate(small_pair(kind).ours, batch, seed=1, **options)
    ends = next(id for id in free[0][4:] if id not in free[1]), next(id for id in free[1][11:] if id not in free[0])
    expected = [until_end(row, ends) for row in free]
    assert len(expected[0]) != len(expected[1])

    pair = small_pair(kind, end=ends)
    assert generate(pair.ours, batch, seed=1, **options) == expected
    torch.manual_seed(1)
    assert their_answer(pair.theirs, batch, ends, do_sample=True, top_k=0, **options) == expected


ALL = dict(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.2)
OPTIONS = [  # ours, and what they are for transformers
    (dict(temperature=0.0, top_k=3, top_p=0.1), dict(do_sample=False)),
    (dict(repetition_penalty=1.5), dict(do_sample=False, repetition_penalty=1.5)),
    (dict(temperature=1.0), dict(do_sample=True, top_k=0)),
    (dict(temperature=0.6), dict(do_sample=True, top_k=0, temperature=0.6)),
    (dict(temperature=1.0, top_k=5), dict(do_sample=True, top_k=5)),
    (dict(temperature=1.0, top_p=0.7), dict(do_sample=True, top_k=0, top_p=0.7)),
    (ALL, dict(do_sample=True) | ALL),
]


@pytest.mark.parametrize("options, theirs", OPTIONS)
def test_every_option_equals_transformers(small_pair, options, theirs):
    """Both draw with torch.multinomial, so one seed gives one answer, if every transform and their order agree."""
    pair, batch = small_pair("siglip"), random_batch("siglip", (54,))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = their_answer(pair.theirs, batch, max_new_tokens=20, **theirs)
        assert generate(pair.ours, batch, 20, seed=seed, **options) == expected
        assert [*stream(pair.ours, batch, 20, seed=seed, **options)] == expected[0]


# ------------------------------------------------------------------------------------ what generate promises


def test_padding_is_not_seen_by_the_penalty(small_pair):
    """The padding is a token that the shorter row says first, and would not, had the row said it before."""
    model, batch = small_pair("siglip").ours, random_batch("siglip", (54, 42))
    ((first,),) = generate(model, alone(batch, 1), max_new_tokens=1)
    assert first not in alone(batch, 1)["input_ids"]
    batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, first)
    assert generate(model, batch, max_new_tokens=1, repetition_penalty=10.0)[1] == [first]


def test_text_without_images_without_a_mask_and_with_labels(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = their_answer(pair.theirs, batch, max_new_tokens=8, do_sample=False)
    for same in (batch, {"input_ids": ids}, batch | {"labels": ids}):
        assert generate(pair.ours, same, 8) == expected


def test_a_seed_gives_one_answer_no_seed_another_each_time_and_the_global_state_stays(small_pair):
    model, batch, before = small_pair("siglip").ours, random_batch("siglip"), torch.get_rng_state()
    a, b, c, d, e = (generate(model, batch, 20, temperature=1.5, seed=seed) for seed in (1, 1, 2, None, None))
    assert a == b != c and d != e
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_at_its_limit_or_where_the_context_is_full(small_pair):
    """64 positions hold the 54 tokens of the prompt and ten new ones; an eleventh is said, but never fed."""
    unlimited, batch = small_pair("siglip").ours, random_batch("siglip")
    eleven = generate(unlimited, batch, max_new_tokens=11)
    for count in (1, 2, 9):
        assert generate(unlimited, batch, max_new_tokens=count) == [row[:count] for row in eleven]
    assert generate(small_pair("siglip", max_position_embeddings=64).ours, batch, max_new_tokens=100) == eleven


def test_prompts_that_cannot_be_answered(small_pair):
    model, short = small_pair("siglip").ours, small_pair("siglip", max_position_embeddings=53).ours
    on_the_right = {"input_ids": torch.tensor([[11, 12, 13, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    for tested, batch, message in (
        (short, random_batch("siglip"), "54 tokens.* holds 53"),
        (model, {"input_ids": torch.ones(1, 0).long()}, "the prompt is empty"),
        (model, on_the_right, "without padding at the end"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(tested, batch)
    with pytest.raises(ValueError, match="this batch has 2"):
        next(stream(model, random_batch("siglip")))


WRONG_OPTIONS = {
    "max_new_tokens": [0, -1, 2.5], "temperature": [-0.1, 1e-39, math.inf, math.nan], "top_k": [-1, 2.5],
    "top_p": [0.0, -0.5, 1.1, math.nan], "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "seed": [-1, 2**63], "chunk_size": [0, -5], "n": [0], "log_probs": [-1],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_out_of_range_are_named(small_pair, name):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    for value in WRONG_OPTIONS[name]:
        with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
            generate(model, batch, **{name: value})
    with pytest.raises(TypeError, match="unknown option temprature, expected one of"):
        generate(model, batch, temprature=1.0)


def test_stream_yields_each_id_as_it_comes(small_pair):
    model, fed = small_pair("siglip").ours, []
    hook = model.lm_head.register_forward_hook(lambda *_: fed.append(1))
    for count, _ in enumerate(stream(model, random_batch("siglip", (54,)), max_new_tokens=4), start=1):
        assert len(fed) == count
    hook.remove()


@pytest.mark.parametrize("name", VL_GOLDENS)
def test_text_stream_never_shows_half_a_character(name):
    """After every id, what was shown is the longest part of the text that is whole characters."""
    tokenizer, end = golden_model(name)[1].tokenizer, golden_model(name)[1].eos_token_id
    text = "A 图像 is worth 1,000 words: 日本語 한국어 déjà vu 😀👍🏽👩‍👩‍👧🇩🇪 e\u0301 ½\n\ttab"
    shown, pushed, text_stream = "", b"", TextStream(tokenizer)
    for id in tokenizer.encode(text):
        pushed += tokenizer.token_bytes(id)
        shown += text_stream.push(end) + text_stream.push(id)
        assert shown == pushed.decode(errors="ignore")
    assert shown == text and text_stream.finish() == ""
    for ids in torch.randint(0, tokenizer.vocab_size, (20, 40)).tolist():  # most of which make no valid UTF-8
        text_stream = TextStream(tokenizer)
        shown = "".join(map(text_stream.push, ids)) + text_stream.finish()
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------ compiled steps


def two_texts(name: str) -> dict:
    """A batch with padding."""
    texts = "Hello", "A longer question than that?"
    return golden_model(name)[1]([[{"role": "user", "content": text}] for text in texts])


@pytest.mark.parametrize("name", GOLDENS)
def test_steps_of_fixed_shape_are_decode_steps(name, monkeypatch):
    """As the compiler gets them: the same ids for a padded batch and for one row alone."""
    model, batch = golden_model(name)[0], two_texts(name)
    batches = batch, {key: value[1:] for key, value in batch.items()}
    expected = [generate(model, batch, max_new_tokens=9) for batch in batches]
    monkeypatch.setattr(model, "fixed_shape_steps", True)
    assert [generate(model, batch, max_new_tokens=9) for batch in batches] == expected


@pytest.mark.parametrize("name, kind", [("vl-siglip", "int4"), ("vl2-mla", None)])
def test_compiled_steps_give_the_same_ids(name, kind):
    """Through torch.compile; where it cannot compile at all, with one reason and steps as before."""
    model, batch, reasons = load_model(golden(name).folder, dtype=torch.float32, quantize=kind), two_texts(name), []
    expected = generate(pack(model), batch, max_new_tokens=4)
    compile_steps(model, failed=reasons.append)
    assert generate(model, batch, max_new_tokens=4) == expected
    try:
        torch.compile(lambda x: x + 1)(torch.ones(3))
    except (RuntimeError, OSError):
        assert len(reasons) == 1
    else:
        assert not reasons


@pytest.mark.parametrize("dtype, quantize", [(torch.bfloat16, None), (torch.float32, None), (torch.float32, "int8")])
def test_weights_packed_for_a_cpu_are_not_compiled(dtype, quantize, monkeypatch):
    """Where this CPU has kernels for such weights; elsewhere nothing is packed, and nothing is said."""
    monkeypatch.setattr(HalfLinear, "LEAST", 0)
    model, reasons = load_model(DEMO / "checkpoint", dtype=dtype, quantize=quantize, pack=True), []
    compile_steps(model, failed=reasons.append)
    packed = any(isinstance(module, (PackedLinear, HalfLinear, DigitLinear)) for module in model.modules())
    assert ["packed for this CPU" in reason for reason in reasons] == [True] * packed
