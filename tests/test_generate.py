"""Sampling, prefill, decoding and streaming: against the golden files, transformers' generate, and the equations."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    KINDS,
    VL2_GOLDENS,
    VL_GOLDENS,
    VOCABULARY,
    alone,
    assert_close,
    golden,
    golden_model,
    needs_shared,
    random_batch,
    skip_unless_packable,
)

from generate import (
    CompiledStep,
    TextStream,
    choose,
    generate,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    prefill,
    stream,
)
from load_weights import load_model

both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------ golden files


@needs_shared
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_greedy_ids_equal_the_originals_alone_and_in_a_batch(name):
    (model, processor), data = golden_model(name), golden(name)
    expected = [data.tensors[f"{case}.greedy"].tolist() for case in range(len(data.conversations))]
    for conversation, ids in zip(data.conversations, expected):
        assert generate(model, processor(conversation), max_new_tokens=12) == [ids]
    assert generate(model, processor(data.conversations), max_new_tokens=12) == expected
    pair = processor([data.conversations[case] for case in data.batch])
    assert generate(model, pair, max_new_tokens=12) == data.tensors["batch.greedy"].tolist()


@needs_shared
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 512])
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_golden_prompt_in_chunks(name, chunk_size):
    (model, processor), data = golden_model(name), golden(name)
    case = 3 if chunk_size == 1 else 1  # the shortest; the longest, 1255 tokens of which 1152 are images
    batch = processor(data.conversations[case])
    cache = model.new_cache(*batch["input_ids"].shape)
    assert_close(prefill(model, batch, cache, None, chunk_size)[0], data.tensors[f"{case}.logits_last64"][-1])
    ids = generate(model, batch, max_new_tokens=12, chunk_size=chunk_size)
    assert ids == [data.tensors[f"{case}.greedy"].tolist()]


# ------------------------------------------------------------------------------------ sampling, step by step


def random_logits(kind: str) -> torch.Tensor:
    """(4, 50): all different; halves, so that many are equal; or all equal in a row."""
    logits = torch.randn(4, 50) * 3
    return {"different": logits, "ties": (logits * 2).round() / 2, "equal": logits[:, :1].repeat(1, 50)}[kind]


all_logits = pytest.mark.parametrize("logits", ["different", "ties", "equal"])


def transformers():
    return pytest.importorskip("transformers")


@all_logits
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(logits, penalty):
    logits, ids = random_logits(logits), torch.randint(0, 50, (4, 30))  # some ids more than once
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    expected = transformers().RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


@all_logits
@pytest.mark.parametrize("k", [1, 5, 49, 50, 1000])
def test_top_k_equals_transformers(logits, k):
    logits = random_logits(logits)
    assert torch.equal(keep_top_k(logits, k), transformers().TopKLogitsWarper(k)(None, logits))


@all_logits
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])  # 1 - 1e-9 is 1 in float32: one token must be left
def test_top_p_equals_transformers(logits, p):
    logits = random_logits(logits)
    assert torch.equal(keep_top_p(logits, p), transformers().TopPLogitsWarper(p)(None, logits))


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for p, kept in ((0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.91, [0, 1, 2, 3])):
        assert keep_top_p(logits, p).isfinite()[0].nonzero()[:, 0].tolist() == kept


def test_temperature_0_takes_the_largest_logit_whatever_else_is_asked():
    logits = random_logits("different")
    assert torch.equal(choose(logits, 0.0, 3, 0.1, None), logits.argmax(-1))


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (1.5, 5, 0.9)]
)
def test_samples_are_distributed_as_the_softmax_of_transformers_warpers(temperature, top_k, top_p):
    """Pearson's chi-squared test on 20,000 draws."""
    logits, draws, library = torch.randn(1, 10), 20_000, transformers()
    expected = library.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = library.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = library.TopPLogitsWarper(top_p)(None, expected)
    expected = expected.softmax(-1)[0].double() * draws

    drawn = choose(logits.expand(draws, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=10).double()
    possible = expected > 0
    assert not counts[~possible].any()
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < 28  # of at most 9 degrees of freedom: exceeded once in a thousand


# ------------------------------------------------------------------------------------ generate, against transformers


def until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """A row of transformers' answer without the padding behind its end token."""
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


def their_answer(theirs, batch: dict, ends: tuple[int, ...] = (), **options) -> list[list[int]]:
    ids = theirs.generate(**batch, pad_token_id=0, **{"do_sample": False} | options)
    return [until_end(row, ends) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


@both_kinds
def test_greedy_equals_transformers(small_pair, kind):
    pair, batch = small_pair(kind), random_batch(kind)
    assert generate(pair.ours, batch, max_new_tokens=20) == their_answer(pair.theirs, batch, max_new_tokens=20)


@both_kinds
def test_rows_end_where_transformers_end_them(small_pair, kind):
    """With two end tokens: of each row one that the other row does not say."""
    batch, options = random_batch(kind), dict(max_new_tokens=20, temperature=1.5)
    free = generate(small_pair(kind).ours, batch, seed=1, **options)
    ends = next(id for id in free[0][4:] if id not in free[1]), next(id for id in free[1][11:] if id not in free[0])
    expected = [until_end(row, ends) for row in free]
    assert len(expected[0]) != len(expected[1])

    pair = small_pair(kind, end=ends)
    assert pair.ours.config.end_token_ids == ends
    assert generate(pair.ours, batch, seed=1, **options) == expected
    torch.manual_seed(1)
    assert their_answer(pair.theirs, batch, ends, do_sample=True, top_k=0, **options) == expected


@both_kinds
def test_one_end_token(small_pair, kind):
    batch = random_batch(kind, (54,))
    end = generate(small_pair(kind).ours, batch, max_new_tokens=3)[0][-1]
    pair = small_pair(kind, end=end)
    assert pair.ours.config.end_token_ids == (end,)
    (row,) = generate(pair.ours, batch, max_new_tokens=20)
    assert row[-1] == end and [row] == their_answer(pair.theirs, batch, (end,), max_new_tokens=20)


OPTIONS = {
    "plain sampling": dict(temperature=1.0),
    "temperature": dict(temperature=0.6),
    "top-k": dict(temperature=1.0, top_k=5),
    "top-p": dict(temperature=1.0, top_p=0.7),
    "all": dict(temperature=1.3, top_k=20, top_p=0.9, repetition_penalty=1.2),
    "greedy with penalty": dict(temperature=0.0, repetition_penalty=1.5),
}


@both_kinds
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_equals_transformers(small_pair, kind, options):
    """Both draw with torch.multinomial, so one seed gives one answer, if every transform and their order agree."""
    options = OPTIONS[options]
    pair, batch = small_pair(kind), random_batch(kind, (54,))
    theirs = {"top_k": 0, "do_sample": options["temperature"] > 0} | options
    if not theirs["do_sample"]:
        del theirs["temperature"], theirs["top_k"]
    for seed in range(3):
        torch.manual_seed(seed)
        expected = their_answer(pair.theirs, batch, max_new_tokens=20, **theirs)
        assert generate(pair.ours, batch, max_new_tokens=20, seed=seed, **options) == expected


# ------------------------------------------------------------------------------------ generate, what it promises


@both_kinds
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"chunk_size": 8}])
def test_batch_equals_each_row_alone(small_pair, kind, options):
    model, batch = small_pair(kind).ours, random_batch(kind, (54, 42, 47))
    answers = [generate(model, alone(batch, row), max_new_tokens=12, **options)[0] for row in range(3)]
    assert generate(model, batch, max_new_tokens=12, **options) == answers


def test_padding_is_not_seen_by_the_penalty(small_pair):
    """The padding is a token that the shorter row says first, and would not, had the row said it before."""
    model, batch = small_pair("siglip").ours, random_batch("siglip", (54, 42))
    ((first,),) = generate(model, alone(batch, 1), max_new_tokens=1)
    assert first not in alone(batch, 1)["input_ids"]
    batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, first)
    assert generate(model, batch, max_new_tokens=1, repetition_penalty=10.0)[1] == [first]


@both_kinds
@pytest.mark.parametrize("chunk_size", [1, 7, 53, 54, 1000])
@pytest.mark.parametrize("lengths", [(54,), (54, 42)], ids=["one row", "padded"])
def test_prompt_in_chunks_equals_one_pass(small_pair, kind, chunk_size, lengths):
    model, batch = small_pair(kind).ours, random_batch(kind, lengths)
    mask = batch["attention_mask"] if len(lengths) > 1 else None
    whole, chunked = (
        prefill(model, batch, model.new_cache(len(lengths), 54), mask, size) for size in (None, chunk_size)
    )
    assert_close(chunked, whole)
    assert generate(model, batch, 12, chunk_size=chunk_size) == generate(model, batch, 12)


def test_the_prompt_is_fed_in_pieces_and_its_images_are_seen_once(small_pair):
    model, seen, fed = small_pair("siglip").ours, [], []
    hooks = (
        model.vision.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))),
        model.language.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1])),
    )
    generate(model, random_batch("siglip"), max_new_tokens=3, chunk_size=20)
    for hook in hooks:
        hook.remove()
    assert seen == [2]
    assert fed == [20, 20, 14, 1, 1]  # 54 tokens of the prompt, then two of the three new ones


def test_text_without_images(small_pair):
    pair, ids = small_pair("siglip"), torch.randint(10, VOCABULARY, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answer = generate(pair.ours, batch, max_new_tokens=8)
    assert answer == their_answer(pair.theirs, batch, max_new_tokens=8)
    assert answer == generate(pair.ours, {"input_ids": ids}, max_new_tokens=8)


def test_a_seed_gives_one_answer_and_no_seed_another_each_time(small_pair):
    model, batch = small_pair("siglip").ours, random_batch("siglip")

    def answer(seed):
        return generate(model, batch, max_new_tokens=20, temperature=1.5, seed=seed)

    assert answer(1) == answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_the_global_random_state_is_left_alone(small_pair):
    before = torch.get_rng_state()
    generate(small_pair("siglip").ours, random_batch("siglip"), max_new_tokens=3, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_new_tokens(small_pair, count):
    rows = generate(small_pair("siglip").ours, random_batch("siglip"), max_new_tokens=count)
    assert [len(row) for row in rows] == [count, count]


def test_generation_stops_where_the_context_is_full(small_pair):
    """64 positions hold the 54 tokens of the prompt and ten new ones; an eleventh is said, but never fed."""
    model, batch = small_pair("siglip", max_position_embeddings=64).ours, random_batch("siglip")
    unlimited = small_pair("siglip").ours
    assert generate(model, batch, max_new_tokens=100) == generate(unlimited, batch, max_new_tokens=11)


def test_prompt_beyond_the_context(small_pair):
    model = small_pair("siglip", max_position_embeddings=53).ours
    with pytest.raises(ValueError, match="54 tokens.* holds 53"):
        generate(model, random_batch("siglip"))


def test_a_prompt_without_tokens(small_pair):
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(small_pair("siglip").ours, {"input_ids": torch.ones(1, 0).long()})


def test_padding_on_the_right(small_pair):
    batch = {"input_ids": torch.tensor([[11, 12, 13, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with pytest.raises(ValueError, match="expected the padding on the left"):
        generate(small_pair("siglip").ours, batch)


def test_labels_in_a_batch_do_not_matter(small_pair):
    model, batch = small_pair("siglip").ours, random_batch("siglip")
    assert generate(model, batch | {"labels": batch["input_ids"]}, 4) == generate(model, batch, 4)


WRONG_OPTIONS = [
    ("max_new_tokens", [0, -1, 2.5]),
    ("temperature", [-0.1, 1e-39, math.inf, math.nan]),
    ("top_k", [-1, 2.5]),
    ("top_p", [0.0, -0.5, 1.1, math.nan]),
    ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
    ("seed", [-1, 2**63]),
    ("chunk_size", [0, -5]),
]


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG_OPTIONS for value in values])
def test_options_out_of_range_are_named(small_pair, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        generate(small_pair("siglip").ours, random_batch("siglip"), **{name: value})


# ------------------------------------------------------------------------------------ streaming


@both_kinds
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}])
def test_stream_yields_what_generate_returns(small_pair, kind, options):
    batch = random_batch(kind, (54,))
    (free,) = generate(small_pair(kind).ours, batch, max_new_tokens=20, **options)
    for end in (None, free[5]):
        model = small_pair(kind, end=end).ours
        answer = generate(model, batch, max_new_tokens=20, **options)
        assert [*stream(model, batch, max_new_tokens=20, **options)] == answer[0] == until_end(free, (end,))


def test_stream_yields_each_id_before_the_next_is_computed(small_pair):
    model, fed = small_pair("siglip").ours, []
    hook = model.lm_head.register_forward_hook(lambda *_: fed.append(1))
    for count, _ in enumerate(stream(model, random_batch("siglip", (54,)), max_new_tokens=4), start=1):
        assert len(fed) == count
    hook.remove()


def test_stream_takes_one_conversation(small_pair):
    with pytest.raises(ValueError, match="this batch has 2"):
        next(stream(small_pair("siglip").ours, random_batch("siglip")))


# A tokenizer with a token for every byte, and one special token.
SPECIAL = 256
BYTES = SimpleNamespace(
    is_special=lambda token: token == SPECIAL,
    token_bytes=lambda token: bytes([token]),
    token_to_id=lambda text: None,
)


@pytest.mark.parametrize("text", ["plain", "déjà vu", "图像 日本語 한국어", "😀👩‍👩‍👧🇩🇪", "e\u0301 ½ é\n\ttab"])
def test_text_stream_never_shows_half_a_character(text):
    """After every byte, what was shown is the longest part of the text that is whole characters."""
    shown, pushed, text_stream = "", b"", TextStream(BYTES)
    for byte in text.encode():
        pushed += bytes([byte])
        shown += text_stream.push(byte)
        assert shown == pushed.decode(errors="ignore")
    assert shown == text and text_stream.finish() == ""


def test_text_stream_passes_over_special_tokens():
    text_stream = TextStream(BYTES)
    start, *rest = "é".encode()
    assert [text_stream.push(token) for token in (SPECIAL, start, SPECIAL, *rest, SPECIAL)] == ["", "", "", "é", ""]


def test_text_stream_shows_what_never_became_a_character_at_the_end():
    text_stream = TextStream(BYTES)
    assert "".join(text_stream.push(byte) for byte in "图".encode()[:2] + b"a") == "\ufffda"
    assert text_stream.push("图".encode()[0]) == ""
    assert text_stream.finish() == "\ufffd"


@needs_shared
@pytest.mark.parametrize("name", VL_GOLDENS)
def test_text_stream_equals_decoding_all_at_once(name):
    """Of text in many scripts, and of random ids, most of which make no valid UTF-8."""
    tokenizer = golden_model(name)[1].tokenizer
    random_ids = torch.randint(0, tokenizer.vocab_size, (20, 40)).tolist()
    for ids in [tokenizer.encode("A 图像 is worth 1,000 words: 😀👍🏽 über naïve Ω"), *random_ids]:
        text_stream = TextStream(tokenizer)
        shown = "".join(text_stream.push(token) for token in ids) + text_stream.finish()
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------ steps of one shape, compiled


@needs_shared
@pytest.mark.parametrize("name", [*VL_GOLDENS, *VL2_GOLDENS])
def test_a_step_of_fixed_shape_is_a_decode_step(name):
    """Uncompiled, for a padded batch and for one row alone, without a mask: the same ids and the same logits."""
    model, processor = golden_model(name)
    conversations = [[{"role": "user", "content": text}] for text in ("Hello", "A longer question than that?")]
    for batch in (processor(conversations), processor(conversations[0])):
        plain, fixed = generate(model, batch, max_new_tokens=9), uncompiled(model)
        assert generate(model, batch, max_new_tokens=9, compiled=fixed) == plain
        assert generate(model, batch, max_new_tokens=9, compiled=fixed, repetition_penalty=1.3) == generate(
            model, batch, max_new_tokens=9, repetition_penalty=1.3
        )


@needs_shared
def test_a_step_of_fixed_shape_is_not_spoilt_by_what_memory_held():
    """With this setting torch fills new memory with NaN: what lies beyond the tokens fed must not reach the logits."""
    model, processor = golden_model("vl-siglip")
    batch = processor([{"role": "user", "content": "Hello"}])
    plain = generate(model, batch, max_new_tokens=9)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert generate(model, batch, max_new_tokens=9, compiled=uncompiled(model)) == plain
    finally:
        torch.use_deterministic_algorithms(False)


def uncompiled(model) -> CompiledStep:
    step = CompiledStep(model)
    step.compiled = model.fixed_shape_step
    return step


@needs_shared
@pytest.mark.parametrize("name, kind", [("vl-siglip", None), ("vl-siglip", "int4"), ("vl2-mla", "int8")])
def test_compiled(name, kind):
    """Really through torch.compile, where there is a C++ compiler: the same ids."""
    folder = golden(name).folder
    model, processor = load_model(folder, dtype=torch.float32, quantize=kind).pack(), golden_model(name)[1]
    batch = processor([{"role": "user", "content": "Hello"}])
    reasons: list[str] = []
    compiled = generate(model, batch, max_new_tokens=6, compiled=CompiledStep(model, reasons.append))
    assert compiled == generate(model, batch, max_new_tokens=6)
    if reasons:
        pytest.skip(f"cannot compile here: {reasons[0]}")


@needs_shared
def test_bfloat16_packed_for_a_cpu_is_not_compiled():
    model = load_model(golden("vl-siglip").folder, dtype=torch.bfloat16)
    skip_unless_packable(model.lm_head)
    reasons: list[str] = []
    assert CompiledStep(model.pack(), reasons.append).compiled is None and "packed" in reasons[0]


@needs_shared
def test_without_a_compiler_steps_are_as_they_were(monkeypatch):
    def unsupported(*_, **__):
        raise RuntimeError("not for this Python")

    monkeypatch.setattr(torch, "compile", unsupported)
    model, processor = golden_model("vl-siglip")
    reasons: list[str] = []
    batch = processor([{"role": "user", "content": "Hello"}])
    step = CompiledStep(model, reasons.append)
    assert reasons == ["not for this Python"]
    assert generate(model, batch, max_new_tokens=4, compiled=step) == generate(model, batch, max_new_tokens=4)
