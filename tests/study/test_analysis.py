"""The pipeline on a tiny random model: against eager attention, one pass per prompt, and every bad setting."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from attnstats.errors import InputError
from attnstats.statistics import FAI, WAAD, MeanDistance
from attnstats.study import analysis as pipeline
from attnstats.study import corpus, models
from attnstats.study.analysis import Settings, analyze
from attnstats.study.verify import differences
from tests.tiny import VOCABULARY, Silent, save_tiny_model

SETTINGS = Settings(max_tokens=40, fai_lo=3, fai_hi=12, window=4, layers="all", system="")
QUESTIONS = ("how many rolls", "are w1 w2 w3 w4 left w5 w6 w7", "so")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.load(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def analyses(tiny):
    return analyze(tiny, QUESTIONS, SETTINGS, Silent())


@pytest.mark.parametrize("changes", [
    {},
    {"fai_hi": None, "fai_lo": 0},
    {"window": 1, "layers": "middle-third"},
    {"layers": (0, 5), "head_share": 0.5},
    {"max_tokens": 1},
    {"temperature": 0.7, "seed": 3},
])  # fmt: skip
def test_agrees_with_eager_attention(tiny, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    found = analyze(tiny, QUESTIONS, settings, Silent())
    largest = differences(tiny, found, settings, Silent())
    assert max(largest.values()) < 2e-5, largest


def test_curves_are_means_over_their_heads_and_deltas_come_after(analyses):
    for analysis in analyses:
        heads = [(i, j) for i in range(6) for j in range(4)]
        count = int(0.3 * len(heads))
        by_distance = sorted(heads, key=lambda head: float(analysis.distance[head]))
        local, global_ = by_distance[:count], by_distance[-count:]
        waad = torch.stack([analysis.head_waad[head] for head in local]).mean(0)
        torch.testing.assert_close(analysis.waad, waad)
        torch.testing.assert_close(analysis.fai, torch.stack([analysis.head_fai[head] for head in global_]).mean(0))
        response = waad[analysis.response]
        torch.testing.assert_close(analysis.delta[:-1], (response[1:] - response[:-1]).abs())
        assert analysis.delta[-1] == 0


def test_head_distance_is_a_mean_over_the_response_only(analyses):
    for analysis in analyses:
        rows = analysis.head_mean_distance[..., analysis.response_start :]
        torch.testing.assert_close(analysis.distance, rows.double().mean(-1))


def test_fai_is_valid_where_a_response_token_is_far_enough(analyses):
    for analysis in analyses:
        length, start = len(analysis.tokens), analysis.response_start
        expected = [any(start <= t < length for t in range(s + 3, s + 13)) for s in range(length)]
        assert analysis.fai_valid.tolist() == expected
        assert analysis.fai[~analysis.fai_valid].abs().sum() == 0
        assert all(analysis.fai_valid[i] for i in analysis.anchors(10))


def test_entropy_is_of_the_distribution_that_the_token_was_drawn_from(tiny, analyses):
    for analysis in analyses:
        with torch.no_grad():
            logits = tiny.model(input_ids=analysis.token_ids[None]).logits[0].double()
        p = logits.softmax(-1)
        expected = -(p * p.log()).sum(-1)
        assert analysis.entropy[0].isnan()
        torch.testing.assert_close(analysis.entropy[1:].double(), expected[:-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_entropy_is_that_of_the_temperature(tiny, temperature):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    (analysis,) = analyze(tiny, QUESTIONS[:1], settings, Silent())
    with torch.no_grad():
        logits = tiny.model(input_ids=analysis.token_ids[None]).logits[0].double()
    p = (logits / temperature).softmax(-1)
    torch.testing.assert_close(analysis.entropy[1:].double(), -(p * p.log()).sum(-1)[:-1], atol=1e-5, rtol=1e-5)
    wrong = differences(tiny, [analysis], SETTINGS, Silent())
    assert wrong.pop("entropy") > 1e-2
    assert max(wrong.values()) < 2e-5


@pytest.mark.parametrize("rows", [1, 7])
def test_entropy_is_made_in_chunks(tiny, analyses, monkeypatch, rows):
    sizes: list[int] = []
    handle = tiny.model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-2]))
    monkeypatch.setattr(pipeline, "ENTROPY_ROWS", rows)
    first = analyses[0]
    start = first.response_start
    try:
        again = pipeline.measure(
            tiny, first.question, first.token_ids[:start].tolist(), first.token_ids[start:].tolist(), SETTINGS
        )
    finally:
        handle.remove()
    assert max(sizes) == rows
    torch.testing.assert_close(again.entropy, first.entropy, equal_nan=True)


def test_one_pass_for_the_statistics_and_one_for_the_maps(tiny, analyses):
    lengths: list[int] = []
    handle = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = analyses[0]
    try:
        pipeline.measure(tiny, "", first.token_ids[:4].tolist(), first.token_ids[4:].tolist(), SETTINGS)
    finally:
        handle.remove()
    assert lengths == [len(first.tokens)] * 2


def test_greedy_responses_do_not_depend_on_the_batch(tiny, analyses):
    for question, together in zip(QUESTIONS, analyses, strict=True):
        (alone,) = analyze(tiny, [question], SETTINGS, Silent())
        assert alone.token_ids.tolist() == together.token_ids.tolist()
        torch.testing.assert_close(alone.waad, together.waad)


def test_more_prompts_than_a_batch(tiny, analyses, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 2)
    progress = Silent()
    again = analyze(tiny, QUESTIONS, SETTINGS, progress)
    assert [a.token_ids.tolist() for a in again] == [a.token_ids.tolist() for a in analyses]


def test_greedy_takes_the_likeliest_token_whatever_the_model_prefers(tiny, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "repetition_penalty", 50.0)
    monkeypatch.setattr(tiny.model.generation_config, "do_sample", True)
    (analysis,) = analyze(tiny, QUESTIONS[:1], SETTINGS, Silent())
    with torch.no_grad():
        likeliest = tiny.model(input_ids=analysis.token_ids[None]).logits[0].argmax(-1)
    start = analysis.response_start
    assert analysis.token_ids[start:].tolist() == likeliest[start - 1 : -1].tolist()


def test_sampling_follows_the_seed(tiny):
    settings = dataclasses.replace(SETTINGS, temperature=1.0)

    def drawn(seed):
        (analysis,) = analyze(tiny, QUESTIONS[:1], dataclasses.replace(settings, seed=seed), Silent())
        return analysis.token_ids.tolist()

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_a_response_ends_with_its_end_token(tiny, monkeypatch):
    (free,) = analyze(tiny, QUESTIONS[:1], SETTINGS, Silent())
    response = free.token_ids[free.response].tolist()
    end = response[5]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [end])
    (ended,) = analyze(tiny, QUESTIONS[:1], SETTINGS, Silent())
    assert ended.token_ids[ended.response].tolist() == response[: response.index(end) + 1]


def test_the_system_text_goes_before_the_question(tiny):
    settings = dataclasses.replace(SETTINGS, system="are left", max_tokens=2)
    (analysis,) = analyze(tiny, ["how many"], settings, Silent())
    expected = ["system", "are", "left", "user", "how", "many", "so"]
    assert analysis.tokens[: analysis.response_start] == expected


TEXTS = (
    "how many rolls? 48 - 30 = 18.",
    "  two spaces,\n\n\ttabs and don't . clean up",
    "漢字 é 🥐🥖 ß",
    "a🥐",
    "�� a real replacement character",
    "",
)


def words_with_a_mark_for_spaces():
    """As Llama 2 has it: `▁` for a space, bytes for what isn't in the vocabulary, the first space dropped."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,.'", "▁h", "ma"]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [("▁", "h"), ("m", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    drop = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), drop])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def bytes_alone():
    """As GPT-2 has it, without a merge: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [words_with_a_mark_for_spaces, bytes_alone])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text(make, text):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    pieces = pipeline.pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    # Each character is whole, in the token that ends it.
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_pieces_keep_the_spaces_between_words():
    tokenizer = words_with_a_mark_for_spaces()
    assert pipeline.pieces(tokenizer, tokenizer("so how ma é")["input_ids"]) == [
        "", "s", "o", " h", "o", "w", " ", "ma", " ", "", "é",
    ]  # fmt: skip


def test_bytes_that_are_no_text_do_not_hold_up_the_rest():
    tokenizer = bytes_alone()
    lone, rest = tokenizer.convert_tokens_to_ids("\u0122"), tokenizer("a b")["input_ids"]  # the byte 0x80
    ids = [lone] * 9 + rest
    pieces = pipeline.pieces(tokenizer, ids)
    assert "".join(pieces) == "\ufffd" * 9 + "a b"
    assert pieces[-2:] == [" ", "b"]
    assert next(i for i, piece in enumerate(pieces) if piece) < 5


def test_tokens_are_the_pieces_of_prompt_and_response(tiny, analyses):
    for analysis in analyses:
        assert "".join(analysis.tokens) == tiny.tokenizer.decode(analysis.token_ids)
        assert analysis.response_text == "".join(analysis.tokens[analysis.response_start :])


def test_the_models_own_attention_is_back(tiny, analyses):
    assert tiny.model.config._attn_implementation == "sdpa"


def test_timings_of_each_stage(tiny):
    timings: dict[str, float] = {}
    analyze(tiny, QUESTIONS[:1], SETTINGS, Silent(), timings)
    assert set(timings) == {"generate", "statistics"}


@pytest.mark.parametrize("changes", [
    {"seed": 2**64 - 1}, {"seed": -(2**63)}, {"temperature": 1e-6}, {"temperature": 1e6}, {"window": 2**31 - 2},
])  # fmt: skip
def test_the_last_setting_that_is_allowed_works(tiny, changes):
    settings = dataclasses.replace(SETTINGS, **{"temperature": 1.0, **changes})
    (analysis,) = analyze(tiny, QUESTIONS[:1], settings, Silent())
    assert analysis.entropy[1:].isfinite().all()
    assert analysis.waad.isfinite().all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"window": 0}, "--window: WAAD: window must be an integer >= 1, got 0"),
    ({"fai_lo": 20, "fai_hi": 10}, "--horizon: FAI: lo must be <= hi, got lo=20, hi=10"),
    ({"fai_lo": -1}, "--horizon: FAI: lo must be an integer >= 0"),
    ({"head_share": 0.6}, r"--head-share must be in \(0, 0.5\], got 0.6"),
    ({"head_share": float("nan")}, "--head-share"),
    ({"max_tokens": 0}, "--max-tokens must be >= 1, got 0"),
    ({"max_tokens": 1000}, r"--max-tokens 1000: with a prompt of \d+ tokens .* at most \d+ fit"),
    ({"window": 2**31}, r"--window: WAAD: window must be below 2\*\*31 - 1, got 2147483648"),
    ({"fai_hi": 2**31 - 1}, "--horizon: FAI: hi must be below"),
    ({"temperature": -1.0}, r"--temperature must be 0 \(greedy\) or from 1e-06 to 1e\+06, got -1.0"),
    ({"temperature": float("nan")}, "--temperature must be .* got nan"),
    ({"temperature": float("inf")}, "--temperature must be .* got inf"),
    ({"temperature": 1e-40}, "--temperature must be .* got 1e-40"),
    ({"seed": 2**64}, "--seed must be a 64-bit integer"),
    ({"seed": -(2**63) - 1}, "--seed must be a 64-bit integer"),
    ({"layers": (6,)}, "--layers: the model has 6 layers"),
    ({"layers": ()}, "--layers"),
])  # fmt: skip
def test_bad_settings(tiny, changes, message):
    with pytest.raises(InputError, match=message):
        analyze(tiny, QUESTIONS, dataclasses.replace(SETTINGS, **changes), Silent())


@pytest.mark.parametrize("questions", [[], [""], ["so", " \n"]])
def test_empty_prompts(tiny, questions):
    with pytest.raises(InputError, match="prompt"):
        analyze(tiny, questions, SETTINGS, Silent())


def test_models_that_cannot_be_analysed_say_so_before_generating(tmp_path):
    bloom = save_tiny_model(tmp_path / "bloom", kind="Bloom")
    loaded = models.load(str(bloom), dtype="float32", device="cpu")
    loaded.model.generate = None
    with pytest.raises(InputError, match=f"--model {loaded.name}: "):
        analyze(loaded, QUESTIONS, SETTINGS, Silent())


def test_logits_that_are_not_the_output_embedding_are_refused(tiny, monkeypatch):
    original = tiny.model.forward

    def scaled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output

    monkeypatch.setattr(tiny.model, "forward", scaled)
    with pytest.raises(InputError, match="its logits are not its output embedding"):
        pipeline.measure(tiny, "", [3, 5], [6, 7, 8], SETTINGS)


def test_attention_that_overflows_is_an_error(tiny, monkeypatch):
    weight = tiny.model.model.layers[0].self_attn.q_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(torch.nan)
        with pytest.raises(InputError, match=r"--dtype float32: attention of .* overflows"):
            pipeline.measure(tiny, "", [3, 5], [6, 7, 8], SETTINGS)
    finally:
        weight.data.copy_(kept)


def test_defaults_are_the_papers():
    assert Settings().statistics == (WAAD(10), FAI(10, 100), MeanDistance())
    assert Settings().layers == "middle-third"
    assert VOCABULARY > 30
