"""The pipeline on a tiny random model: against eager attention, one pass per prompt, and every bad setting."""

import dataclasses

import pytest
import torch

from attnstats.errors import InputError
from attnstats.study import models
from attnstats.study.analysis import Analysis, Settings
from attnstats.study.corpus import BATCH
from attnstats.study.pipeline import analyze, measure
from attnstats.study.reading import ENTROPY_ROWS
from attnstats.study.verify import errors
from tests.tiny import VOCABULARY, Silent, save_tiny_model

SETTINGS = Settings(max_tokens=40, fai_lo=3, fai_hi=12, window=4, layers="all", system="")
QUESTIONS = ("how many rolls", "are w1 w2 w3 w4 left w5 w6 w7", "so")


@pytest.fixture(scope="module")
def analyses(tiny):
    return analyze(tiny, QUESTIONS, SETTINGS, Silent())


@pytest.mark.parametrize(("kind", "config"), [
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    ("Cohere", {"logit_scale": 0.3}),
    ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3}),
])  # fmt: skip
def test_entropies_are_of_logits_with_scale_and_softcap(tmp_path, kind, config):
    loaded = models.load(str(save_tiny_model(tmp_path, kind=kind, **config)), dtype="float32", device="cpu")
    settings = dataclasses.replace(SETTINGS, temperature=0.7)
    found = analyze(loaded, QUESTIONS[:1], settings, Silent())
    largest = errors(loaded, found, settings, Silent())
    assert all(error.passes and error.ours < 4e-5 for error in largest.values()), largest


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
    largest = errors(tiny, found, settings, Silent())
    assert all(error.passes and error.ours < 4e-5 for error in largest.values()), largest


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
    wrong = errors(tiny, [analysis], SETTINGS, Silent())
    assert wrong.pop("entropy").ours > 1e-2
    assert all(error.passes for error in wrong.values())


def test_logits_of_a_long_response_are_never_all_there(tiny):
    sizes: list[int] = []
    handle = tiny.model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-2]))
    ids = torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        analysis = measure(tiny, "", ids[:4], ids[4:], SETTINGS)
    finally:
        handle.remove()
    assert max(sizes) == ENTROPY_ROWS < 200
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=tiny.model(torch.tensor([ids])).logits[0]).entropy()
    torch.testing.assert_close(analysis.entropy[1:], entropy[:-1], atol=1e-5, rtol=1e-5)


def test_one_pass_for_the_statistics_and_one_for_the_maps(tiny, analyses):
    lengths: list[int] = []
    handle = tiny.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = analyses[0]
    try:
        measure(tiny, "", first.token_ids[:4].tolist(), first.token_ids[4:].tolist(), SETTINGS)
    finally:
        handle.remove()
    assert lengths == [len(first.tokens)] * 2


def test_greedy_responses_do_not_depend_on_the_batch(tiny, analyses):
    for question, together in zip(QUESTIONS, analyses, strict=True):
        (alone,) = analyze(tiny, [question], SETTINGS, Silent())
        assert alone.token_ids.tolist() == together.token_ids.tolist()
        torch.testing.assert_close(alone.waad, together.waad)


def test_more_prompts_than_a_batch(tiny):
    settings = dataclasses.replace(SETTINGS, max_tokens=6)
    alone = [analyze(tiny, [question], settings, Silent())[0].token_ids.tolist() for question in QUESTIONS]
    repeats = BATCH // len(QUESTIONS) + 1
    assert [a.token_ids.tolist() for a in analyze(tiny, QUESTIONS * repeats, settings, Silent())] == alone * repeats


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


def test_bytes_of_a_token_are_kept_beside_its_text(analyses):
    shown = [f"{token}<0xF0>" if i % 3 else token for i, token in enumerate(analyses[0].tokens)]
    item = dataclasses.replace(analyses[0], shown=shown).stored()
    assert Analysis.restored(*item).shown == shown
    assert Analysis.restored(*item).tokens == analyses[0].tokens


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


def test_logits_that_are_not_the_output_embedding_are_refused_before_generating(tiny, monkeypatch):
    forward = tiny.model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output

    monkeypatch.setattr(tiny.model, "forward", scaled)
    monkeypatch.setattr(tiny.model, "generate", None)
    with pytest.raises(InputError, match=r"--model .*: its logits are not its output embedding"):
        analyze(tiny, QUESTIONS, SETTINGS, Silent())


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
        measure(tiny, "", [3, 5], [6, 7, 8], SETTINGS)


def test_attention_that_overflows_is_an_error(tiny, monkeypatch):
    weight = tiny.model.model.layers[0].self_attn.q_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(torch.nan)
        with pytest.raises(InputError, match=r"--dtype float32: attention of .* overflows"):
            measure(tiny, "", [3, 5], [6, 7, 8], SETTINGS)
    finally:
        weight.data.copy_(kept)
