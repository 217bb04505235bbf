"""Capture against what transformers itself computes: logits against SDPA and eager, statistics against
`output_attentions=True` read by definition in float64; bad arguments, gradients, precision, memory."""

import copy
from typing import Any

import pytest
import torch
import transformers

import attnstats
from attnstats import FAI, WAAD, MeanDistance, Received, SegmentMass, TopKeys
from attnstats.transformers.capture import capture
from tests.guards import Largest
from tests.process import python
from tests.tiny import (
    HEADS,
    LARGEST_FACTOR,
    LAYERS,
    LENGTH,
    LOGITS_TOLERANCE,
    STATISTICS,
    WEIGHT_TOLERANCE,
    by_definition,
    gradients,
    padding,
    run_with,
    tiny,
    tokens,
)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_are_those_of_sdpa_and_eager(model, side):
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[1, 4]):
        ours = model(**inputs).logits
    real = padding(side).bool()
    for rival in ("sdpa", "eager"):
        theirs = run_with(model, rival, **inputs).logits
        torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "query_mask"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_statistics_are_those_of_the_eager_maps(model, side, masked):
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    counted = torch.ones(2, LENGTH, dtype=torch.bool)
    counted[:, :9] = not masked
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all", query_mask=counted) as run:
        model(**inputs)
    maps = run_with(model, "eager", **inputs).attentions
    for statistic in STATISTICS:
        expected = torch.stack([by_definition(statistic, a, padding(side), padding(side), counted) for a in maps])
        assert run[statistic].shape == (LAYERS, 2, HEADS, LENGTH)
        assert run[statistic].dtype == torch.float32
        tolerance = WEIGHT_TOLERANCE * LARGEST_FACTOR[statistic]
        torch.testing.assert_close(run[statistic].double(), expected, rtol=0, atol=tolerance)
    real = padding(side).bool()
    assert torch.equal(run.valid[WAAD(4)], real & counted)
    assert torch.equal(run.valid[Received()], real)
    assert not run.valid[FAI(2, 7)][:, -2:].any()


@pytest.mark.parametrize("side", [None, "left"])
def test_segments_and_largest_keys_are_those_of_the_eager_maps(model, side):
    """Positions count from the first key of the row, padding included; boundaries may differ by row."""
    inputs = {"input_ids": tokens(), "attention_mask": padding(side)}
    bounds = torch.tensor([[0, 5, -1], [9, 12, 20]])
    asked = [TopKeys(), SegmentMass((0, 12, None)), SegmentMass()]
    with torch.no_grad(), capture(model, statistics=asked, layers="all", segment_boundaries=bounds) as run:
        model(**inputs)
    maps = torch.stack(run_with(model, "eager", **inputs).attentions)
    maps = maps * padding(side).bool()[None, :, None, :, None]  # a row of padding looks at itself there
    values, indices = run["top_keys"]
    torch.testing.assert_close(values[..., 0], maps.amax(-1), rtol=0, atol=WEIGHT_TOLERANCE)
    picked = maps.gather(-1, indices.clamp(min=0))[..., 0]
    torch.testing.assert_close(picked, maps.amax(-1), rtol=0, atol=WEIGHT_TOLERANCE)
    found = run[asked[1]]
    torch.testing.assert_close(found[..., 0], maps[..., :12].sum(-1), rtol=0, atol=8 * WEIGHT_TOLERANCE)
    torch.testing.assert_close(found[..., 1], maps[..., 12:].sum(-1), rtol=0, atol=8 * WEIGHT_TOLERANCE)
    torch.testing.assert_close(
        run[asked[2]][:, 0, ..., 1], maps[:, 0, ..., 5:].sum(-1), rtol=0, atol=8 * WEIGHT_TOLERANCE
    )
    torch.testing.assert_close(
        run[asked[2]][:, 1, ..., 0], maps[:, 1, ..., 9:12].sum(-1), rtol=0, atol=8 * WEIGHT_TOLERANCE
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": [SegmentMass((0, 99))]}, "a boundary is past the end, 99 of 12 keys"),
        ({"segment_boundaries": torch.tensor([[0, 13]])}, "a boundary is past the end, 13 of 12 keys"),
        ({"query_weight": torch.ones(1, 9)}, r"query_weight must have shape \(1, 12\)"),
    ],
)
def test_what_does_not_fit_the_pass_is_named(llama, arguments, message):
    with (
        torch.no_grad(),
        capture(llama, **({"statistics": [SegmentMass()]} | arguments)),
        pytest.raises(ValueError, match=message),
    ):
        llama(tokens(1, 12))


def test_of_packed_rows_positions_are_those_of_each_sequence(llama):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    inputs = {"input_ids": tokens(1, 12), "position_ids": positions, "use_cache": False}
    asked = [TopKeys(), SegmentMass((0, 2, None))]
    with torch.no_grad(), capture(llama, statistics=asked, layers=[0]) as run:
        llama(**inputs)
    for begin, end in ((0, 5), (5, 8), (8, 12)):
        with torch.no_grad(), capture(llama, statistics=asked, layers=[0]) as alone:
            llama(inputs["input_ids"][:, begin:end])
        torch.testing.assert_close(
            run["segment_mass"][..., begin:end, :], alone["segment_mass"], rtol=0, atol=WEIGHT_TOLERANCE
        )
        assert torch.equal(run["top_keys"].indices[..., begin:end, :], alone["top_keys"].indices)
    with (
        torch.no_grad(),
        capture(llama, statistics=[SegmentMass()], segment_boundaries=torch.tensor([[0, 2, 4]])),
        pytest.raises(ValueError, match=r"segment_boundaries: .* has packed rows"),
    ):
        llama(**inputs)


def test_statistics_of_the_real_model_are_those_of_its_eager_maps(capsys):
    from attnstats.study import models

    with capsys.disabled():
        loaded = models.load(dtype="float32", device="cpu")
    inputs = loaded.tokenizer("Tom has 3 apples and buys 2 more; how many has he now? 3 + 2 = 5.", return_tensors="pt")
    statistics = [WAAD(10), FAI(2, 10), MeanDistance()]
    with torch.no_grad(), capture(loaded.model, statistics=statistics) as run:
        ours = loaded.model(**inputs).logits
    theirs = run_with(loaded.model, "eager", **inputs)
    assert run.layers == (10, 12, 15, 18, 20)
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=2e-3)  # logits reach 30
    real = torch.ones_like(inputs["input_ids"])
    for statistic in statistics:
        expected = torch.stack([by_definition(statistic, theirs.attentions[i], real, real) for i in run.layers])
        torch.testing.assert_close(run[statistic].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "middle"}, ValueError, "layers must be 'middle-third'"),
        ({"layers": [6]}, ValueError, "layers: the model has 6 layers"),
        ({"layers": [-7]}, ValueError, "layers: the model has 6 layers"),
        ({"layers": []}, ValueError, "chooses none"),
        ({"layers": slice(9, None)}, ValueError, "chooses none"),
        ({"layers": [1, -5]}, ValueError, "given twice"),
        ({"layers": 3}, TypeError, "layers must be"),
        ({"layers": [1.5]}, TypeError, "layers must be"),
        ({"heads": [9]}, ValueError, r"query heads 0\.\.8"),
        ({"heads": [-1]}, ValueError, r"query heads 0\.\.8"),
        ({"heads": [1, 1]}, ValueError, "given twice"),
        ({"heads": 3}, TypeError, "heads must be"),
        ({"heads": []}, ValueError, "no head is chosen"),
        ({"heads": {0: [1]}}, ValueError, "layer 0 isn't captured"),
        ({"heads": {2: [1], 3: [1, 2], 4: [0]}}, ValueError, r"reduce=\('layers', 'heads'\)"),
        ({"heads": {2: [1]}}, ValueError, r"reduce=\('layers', 'heads'\)"),
        ({"heads": {"fai": [1]}}, ValueError, "'fai' isn't one of the statistics"),
        ({"heads": {"waad": [1], 2: [1]}}, ValueError, "key 2 isn't one of the statistics"),
        ({"statistics": [WAAD(3), WAAD(5)], "heads": {"waad": [1]}}, ValueError, "more than one"),
        ({"statistics": []}, ValueError, "statistics is empty"),
        ({"statistics": ["wad"]}, ValueError, "unknown name 'wad'"),
        ({"reduce": "sum"}, ValueError, "reduce must be"),
        ({"query_mask": torch.ones(2, 3)}, TypeError, "query_mask must be a bool"),
        ({"query_mask": [[True]]}, TypeError, "query_mask must be a bool"),
        ({"query_weight": torch.ones(2, 3, dtype=torch.long)}, TypeError, "query_weight must be a float tensor"),
        ({"statistics": ["top_keys"], "reduce": "heads"}, ValueError, r"TopKeys\(k=1\) names keys"),
        ({"query_mask": torch.ones(2, 3).bool().to_sparse()}, TypeError, "query_mask must be a plain dense tensor"),
    ],
)
def test_bad_arguments_are_named(llama, arguments, error, message):
    with pytest.raises(error, match=message), capture(llama, **({"statistics": ["waad"]} | arguments)):
        pass
    assert llama.config._attn_implementation == "sdpa"


def test_generate_gives_the_tokens_of_sdpa(model):
    ids = tokens(length=8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    with capture(model, statistics=["waad", "received"]) as run:
        ours = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(ours, expected)
    assert torch.equal(static, expected)
    assert run["waad"].shape == (3, 2, HEADS, 1)
    assert run["received"].shape == (3, 2, HEADS, 8 + 12 - 1)  # unused slots of the static cache left out


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_prefill_in_chunks_gives_the_rows_of_one_pass(model, static, side):
    ids, mask = tokens(), padding(side)
    if static:
        cache: Any = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 9)
    else:
        cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), capture(model, statistics=[WAAD(4), Received()], layers="all") as run:
        whole = model(ids, attention_mask=mask).logits
        waad, received = run["waad"], run["received"]
        for start, end in ((0, 10), (10, 18), (18, 19), (19, LENGTH)):
            part = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            real = mask[:, start:end].bool()
            torch.testing.assert_close(part[real], whole[:, start:end][real], rtol=0, atol=LOGITS_TOLERANCE)
            torch.testing.assert_close(run["waad"], waad[..., start:end], rtol=0, atol=4 * WEIGHT_TOLERANCE)
            received = received - torch.nn.functional.pad(run["received"], (0, LENGTH - end))
    torch.testing.assert_close(received, torch.zeros_like(received), rtol=0, atol=LENGTH * WEIGHT_TOLERANCE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradients_are_those_of_sdpa_with_and_without_checkpointing(llama):
    ids = tokens()
    expected = gradients(llama.train(), ids)
    for checkpointing in (False, True):
        if checkpointing:
            llama.gradient_checkpointing_enable()
        with capture(llama, statistics=["waad", "fai"], reduce=("layers", "heads")) as run:
            actual = gradients(llama, ids)
        assert not run["waad"].requires_grad
        if not checkpointing:
            waad = run["waad"]
        assert torch.equal(run["waad"], waad)  # the repeated calls of checkpointing aren't added
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models(llama, dtype):
    ids = tokens()
    expected = {}
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers=[0]) as run:
        llama(ids)
        expected = {s: run[s] for s in STATISTICS}
        with torch.autocast("cpu", dtype=dtype):
            ours = llama(ids).logits
            cast = {s: run[s] for s in STATISTICS}
    half = copy.deepcopy(llama).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        theirs = llama(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=64 * torch.finfo(dtype).eps)
    with torch.no_grad(), capture(half, statistics=STATISTICS, layers=[0]) as run:
        half(ids)
    for s in STATISTICS:
        # Weights of A are off by some roundings of the scores, which reach 4 here.
        tolerance = 8 * torch.finfo(dtype).eps * max(1.0, float(expected[s].abs().max()))
        for found in (cast[s], run[s]):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected[s], rtol=0, atol=tolerance)


def test_nothing_of_size_t_by_t_is_allocated():
    length = 4096
    model = tiny(
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=length, num_hidden_layers=2
    ).model
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.long)
    mask[:, :5] = 0
    with torch.no_grad(), Largest() as sdpa:
        model(ids, attention_mask=mask)
    assert sdpa.largest >= length**2  # what SDPA's mask takes: the measure sees it
    with torch.no_grad(), capture(model, statistics=["waad", "fai"], layers="all"), Largest() as ours:
        model(ids, attention_mask=mask)
    assert ours.largest <= length**2 // 8


def test_the_import_does_not_bring_transformers():
    code = "import sys, attnstats.transformers.capture; sys.exit('transformers' in sys.modules)"
    python("-c", code)


def test_public_name():
    assert attnstats.capture is capture
