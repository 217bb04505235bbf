"""The calls of a model: padding, masks made as tensors, packed rows, chunks, caches, dropout, cross-attention."""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch
import transformers

import attnstats
from attnstats import WAAD, Received
from attnstats.core import packing
from attnstats.transformers.capture import capture
from tests.tiny import (
    HEADS,
    LARGEST_FACTOR,
    LAYERS,
    LENGTH,
    LOGITS_TOLERANCE,
    STATISTICS,
    WEIGHT_TOLERANCE,
    by_definition,
    padding,
    run_with,
    tiny,
    tiny_bart,
    tokens,
)
from tests.writes import UNNOTICED, write


def test_full_attention_follows_the_config(llama):
    llama.config.is_causal = False
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    with torch.no_grad(), capture(llama, statistics=[WAAD(4)]) as run:
        ours = llama(**inputs).logits
    real = padding("left").bool()
    torch.testing.assert_close(
        ours[real], run_with(llama, "sdpa", **inputs).logits[real], rtol=0, atol=LOGITS_TOLERANCE
    )
    maps = run_with(llama, "eager", **inputs).attentions
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().clamp(max=4)
    expected = torch.stack([(maps[i] * distance).sum(-1) for i in run.layers]) * real[:, None]
    torch.testing.assert_close(run["waad"], expected, rtol=0, atol=4 * WEIGHT_TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({}, LENGTH),
        ({"query_mask": torch.arange(LENGTH)[None].expand(2, -1) >= 9}, 14),
    ],
)
def test_dropout_leaves_the_statistics_as_they_are(changes, counted):
    model = tiny(attention_dropout=0.3)
    ids = tokens()
    with torch.no_grad(), capture(model, statistics=[WAAD(4), Received()], layers=[0], **changes) as run:
        model(ids)
        still = run[WAAD(4)], run[Received()]
        model.train()
        torch.manual_seed(3)
        dropped = model(ids).logits
        for s, x in zip((WAAD(4), Received()), still, strict=True):  # the first layer sees the same input
            torch.testing.assert_close(run[s], x, rtol=0, atol=2e-5)
        torch.manual_seed(3)
        assert torch.equal(model(ids).logits, dropped)
        assert not torch.equal(model(ids).logits, dropped)
    torch.testing.assert_close(still[1].sum(-1), torch.full((1, 2, HEADS), float(counted)))


def test_a_batch_may_have_rows_of_nothing_but_padding(llama):
    mask = padding(None)
    mask[1] = 0
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        llama(tokens(), attention_mask=mask)
        both = {s: run[s] for s in STATISTICS}
        llama(tokens()[:1])
        for s in STATISTICS:
            assert not both[s][:, 1].any()
            torch.testing.assert_close(both[s][:, :1], run[s], rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_a_mask_of_another_length_is_refused(llama):
    with pytest.raises(ValueError, match="23 queries and 23 keys"), capture(llama, statistics=["waad"], layers=[0]):
        llama(tokens(), attention_mask=torch.ones(2, LENGTH + 4), use_cache=False)


def visible(side, window=None):
    """(2, 1, T, T) bool, who sees whom."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if window:
        mask = mask.triu(1 - window)
    return mask & padding(side).bool()[:, None, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("side", "window"), [(None, None), ("left", None), ("right", None), ("left", 5)])
def test_masks_made_as_tensors_are_understood(llama, side, window, additive):
    mask = visible(side, window)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    inputs = {"input_ids": tokens(), "attention_mask": given, "use_cache": False}
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        ours = llama(**inputs).logits
    theirs = run_with(llama, "eager", **(inputs | {"attention_mask": torch.where(mask, 0.0, -1e30)}))
    real = padding(side).bool()
    torch.testing.assert_close(ours[real], theirs.logits[real], rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        expected = torch.stack(
            [by_definition(s, a, padding(side), padding(side), torch.ones(2, LENGTH)) for a in theirs.attentions]
        )
        torch.testing.assert_close(run[s].double(), expected, rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_one_mask_of_all_batch_rows_may_hide_keys(llama):
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril().bool()
    mask[..., :4] = False
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        logits = llama(tokens(), attention_mask=mask, use_cache=False).logits
        found = {s: run[s] for s in STATISTICS}
        assert torch.equal(llama(tokens(), attention_mask=mask.repeat(2, 1, 1, 1), use_cache=False).logits, logits)
        assert all(torch.equal(run[s], found[s]) for s in STATISTICS)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("way", UNNOTICED)
def test_a_mask_made_as_a_tensor_may_be_written_between_passes(llama, way, captured):
    mask, other, ids = visible(None), visible("left", 5), tokens()
    attended = capture(llama, statistics=["received"], layers="all") if captured else contextlib.nullcontext({})
    attnstats.transformers.attach.attach(llama)
    with torch.no_grad(), attended as run:

        def results(mask):
            logits = llama(ids, attention_mask=mask, use_cache=False).logits
            return [logits, run["received"]] if captured else [logits]

        before = results(mask)
        write(mask, other, way)
        after, expected = results(mask), results(other)
    for x, y, z in zip(before, after, expected, strict=True):
        assert torch.equal(y, z)
        assert not torch.equal(x, y)


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_of_a_pass_is_kept_when_it_is_over(llama, kind, error):
    model = tiny_bart() if kind == "cross" else llama
    mask, ids, positions = visible(None), tokens(), torch.arange(LENGTH)[None]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if kind == "cross":
        mask, ids = padding("right").bool(), tokens()
        inputs = {"input_ids": tokens(), "decoder_input_ids": ids, "decoder_attention_mask": mask, "use_cache": False}
    last = model.model.decoder.layers[-1].fc2 if kind == "cross" else model.model.layers[-1].mlp
    statistics = ["received"] if kind == "cross" else ["waad", "received"]
    with torch.no_grad(), capture(model, statistics=statistics, layers="all", attention=kind) as run:

        def fail(*_):
            raise error("in the last layer")

        hook = last.register_forward_hook(fail) if error else None
        with contextlib.suppress(ValueError):
            model(**inputs)
        if hook is not None:
            hook.remove()
        watched = [weakref.ref(x) for x in (mask, ids, positions)]
        held = [x for x in vars(run).values() if isinstance(x, torch.Tensor)]
        del mask, ids, positions, inputs
        gc.collect()
        assert held == []
        assert [x for x in watched if x() is not None] == []


def test_other_masks_are_refused_or_dense_with_a_warning(llama):
    holes = visible(None) & (torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3)
    holes |= torch.eye(LENGTH, dtype=torch.bool)
    inputs = {"input_ids": tokens(), "attention_mask": holes, "use_cache": False}
    message = r"\(2, 1, 23, 23\) that was passed as a tensor.*allow_dense=True"
    with capture(llama, statistics=STATISTICS), pytest.raises(ValueError, match=message):
        llama(**inputs)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="on the whole map"),
        capture(llama, statistics=STATISTICS, layers="all", allow_dense=True) as run,
    ):
        ours = llama(**inputs).logits
    theirs = run_with(llama, "eager", **(inputs | {"attention_mask": torch.where(holes, 0.0, -1e30)}))
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=LOGITS_TOLERANCE)
    for s in STATISTICS:
        expected = torch.stack(
            [by_definition(s, a, torch.ones(2, LENGTH), torch.ones(2, LENGTH)) for a in theirs.attentions]
        )
        torch.testing.assert_close(run[s].double(), expected, rtol=0, atol=WEIGHT_TOLERANCE * LARGEST_FACTOR[s])


def test_dropout_falls_on_dense_and_packed_calls_too():
    model = tiny(attention_dropout=0.5).train()
    holes = visible(None) & (torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3)
    position = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    for inputs in ({"attention_mask": holes | torch.eye(LENGTH, dtype=torch.bool)}, {"position_ids": position}):
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            capture(model, statistics=["waad"], layers=[0], allow_dense=True) as run,
        ):
            warnings.simplefilter("ignore", RuntimeWarning)
            first, again = (model(tokens(), use_cache=False, **inputs).logits for _ in range(2))
            waad = run["waad"]
            model.eval()
            model(tokens(), use_cache=False, **inputs)
            torch.testing.assert_close(run["waad"], waad, rtol=0, atol=2e-5)
            model.train()
        assert not torch.equal(first, again)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_are_sequences_of_their_own(family):
    model = tiny(family, **({"sliding_window": 5} if family == "mistral" else {}))
    lengths = (9, 1, 13)
    position = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    ids = tokens()
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all") as run:
        packed = model(ids, position_ids=position, use_cache=False).logits
        together = {s: run[s] for s in STATISTICS}
        valid = {s: run.valid[s] for s in STATISTICS}
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            alone = model(ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=LOGITS_TOLERANCE)
            for s in STATISTICS:
                tolerance = WEIGHT_TOLERANCE * LARGEST_FACTOR[s]
                torch.testing.assert_close(together[s][..., part], run[s], rtol=0, atol=tolerance)
                assert torch.equal(valid[s][:, part], run.valid[s])
            start += n


def test_only_the_first_layer_of_packed_rows_waits_for_a_gpu(llama, monkeypatch):
    """The others are told how long the longest sequence is."""
    read, believed = packing.read, []

    def reading(*arguments):
        found = read(*arguments)
        believed.append(found[0].believed)
        return found

    inputs = {"position_ids": torch.tensor([[*range(9), *range(14)]]), "use_cache": False}
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        llama(tokens(1), **inputs)
        expected = {s: run[s] for s in STATISTICS}
        monkeypatch.setattr(packing, "read", reading)
        monkeypatch.setattr(packing, "believes", lambda device: True)
        llama(tokens(1), **inputs)
        assert all(torch.equal(run[s], expected[s]) for s in STATISTICS)
    assert believed == [True] * LAYERS


def test_chunks_have_no_first_and_last_tokens_of_the_sequence():
    model = tiny("llama4_text", attention_chunk_size=8, num_local_experts=2, num_hidden_layers=4)
    for statistic in (attnstats.SinkMass(2), Received(last=4), attnstats.SegmentMass((0, 2)), attnstats.TopKeys()):
        with (
            torch.no_grad(),
            capture(model, statistics=[statistic], layers=[0]),
            pytest.raises(ValueError, match="would be each chunk's own"),
        ):
            model(tokens())


def test_masks_made_for_a_cache_place_their_queries(llama):
    ids, slots = tokens(1, 14), torch.arange(30)
    cache = transformers.StaticCache(config=llama.config, max_cache_len=30)
    with torch.no_grad(), capture(llama, statistics=[WAAD(4), Received()], layers="all") as run:
        llama(ids)
        whole = run[WAAD(4)]
        for start, end in ((0, 9), (9, 13), (13, 14)):
            mask = (slots <= torch.arange(start, end)[:, None])[None, None]
            position = torch.arange(start, end)[None]
            llama(ids[:, start:end], past_key_values=cache, attention_mask=mask, position_ids=position)
            torch.testing.assert_close(run[WAAD(4)], whole[..., start:end], rtol=0, atol=4 * WEIGHT_TOLERANCE)


def test_packed_rows_that_leak_into_each_other_are_refused(llama):
    cu_seqlens = torch.tensor([0, 9, LENGTH], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q of packed sequences"), capture(llama, statistics=["waad"]):
        llama(tokens()[:1], cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, use_cache=True)


@pytest.mark.parametrize("length", [11, LENGTH])  # as long as the source: still another sequence, without its padding
def test_each_kind_of_attention_of_an_encoder_decoder(length):
    model = tiny_bart()
    mask = padding("right")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(length=length, seed=4)}
    maps = run_with(model, "eager", **inputs)
    real, all_real = mask, torch.ones(2, length)
    for kind, expected, layers in (
        ("encoder", maps.encoder_attentions, (0, 1)),
        ("self", maps.decoder_attentions, (0, 1, 2)),
        ("cross", maps.cross_attentions, (0, 1, 2)),
    ):
        statistics = [Received(), attnstats.Entropy()] + ([] if kind == "cross" else [WAAD(4)])
        with torch.no_grad(), capture(model, statistics=statistics, layers="all", attention=kind) as run:
            logits = model(**inputs).logits
        torch.testing.assert_close(logits, maps.logits, rtol=0, atol=LOGITS_TOLERANCE * float(maps.logits.std()))
        assert run.layers == layers
        of_queries, of_keys = (real if kind == "encoder" else all_real), (all_real if kind == "self" else real)
        a = torch.stack(expected).double() * of_queries[:, None, :, None] * of_keys[:, None, None]
        torch.testing.assert_close(run["received"].double(), a.sum(-2), rtol=0, atol=LENGTH * WEIGHT_TOLERANCE)
        entropy = -torch.special.xlogy(a, a).sum(-1)
        torch.testing.assert_close(run["entropy"].double(), entropy, rtol=0, atol=1e-4)
        if kind != "cross":
            t = torch.arange(a.shape[-1])
            waad = (a * (t[:, None] - t).abs().clamp(max=4)).sum(-1)
            torch.testing.assert_close(run["waad"].double(), waad, rtol=0, atol=4 * WEIGHT_TOLERANCE)
    with (
        pytest.raises(ValueError, match="needs distances, and cross-attention has none"),
        capture(model, statistics=["waad"], attention="cross"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="attention='encoder': LlamaForCausalLM has no such attention"),
        capture(tiny(), statistics=["waad"], attention="encoder"),
    ):
        pass
