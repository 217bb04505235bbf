"""Distances are those of the positions that a model is given: pruned caches, prefixes, offsets by row, packed rows.

The truth is the eager maps of the same steps over the same cache, their keys put at the positions that they had.
"""

import copy
from typing import Any

import pytest
import torch
import transformers

from attnstats import FAI, WAAD, Entropy, MeanDistance, Received, SegmentMass, SinkMass, TopKeys
from attnstats.transformers.capture import capture
from attnstats.transformers.masks import MaskDescription
from attnstats.transformers.positions import holds_every_key, text_positions
from tests.tiny import LENGTH, by_definition, padding, tiny, tokens

STATISTICS = (WAAD(4), MeanDistance(), Entropy(), FAI(1, 18), FAI(2, None), Received())
TOTAL = LENGTH + 7
SPANS = ((0, LENGTH), (LENGTH, LENGTH + 1), (LENGTH + 1, LENGTH + 4), (LENGTH + 4, TOTAL - 1), (TOTAL - 1, TOTAL))
TOLERANCE = 3e-4  # a last bit of the hidden states, times the longest distance
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def llama():
    return tiny(num_hidden_layers=2)


def whole_mask(side=None):
    return torch.cat([padding(side), torch.ones(2, TOTAL - LENGTH, dtype=torch.long)], 1)


class Pruning:
    """Steps of a model over a cache from which keys are removed after the first step, and the maps that they give.

    `kept` has the places that stay, (B | 1, key heads | 1, n), by layer.
    """

    def __init__(self, model, kept, side=None, spans=SPANS, shift=0):
        self.model, self.kept, self.spans = model, kept, spans
        self.mask = whole_mask(side)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0) + shift
        self.ids = tokens(2, TOTAL)

    def begin(self):
        """Run the first step and remove its keys."""
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.cached = torch.zeros(2, 0, dtype=torch.long)
        output = self.step(*self.spans[0])
        for layer, places in self.kept.items():
            of_layer = self.cache.layers[layer]
            index = places[..., None].expand(2, of_layer.keys.shape[1], -1, 16)
            of_layer.keys, of_layer.values = (x.gather(2, index) for x in (of_layer.keys, of_layer.values))
        self.cached = self.cached.gather(1, self.kept[0][:, 0].expand(2, -1))
        return output

    def step(self, begin, end):
        self.cached = torch.cat([self.cached[:, : self.cache.get_seq_length()], self.mask[:, begin:end]], 1)
        inputs = {"attention_mask": self.cached, "position_ids": self.positions[:, begin:end]}
        return self.model(self.ids[:, begin:end], past_key_values=self.cache, **inputs)

    def run(self, run=None, keys=None):
        """Run all steps; `keys`, by layer, are set on the run after the first."""
        outputs = [self.begin()]
        if keys is not None:
            run.key_positions = keys
        return outputs + [self.step(*span) for span in self.spans[1:]]

    def key_positions(self):
        """By layer, (B, key heads | 1, n)."""
        batch = [(layer, places.expand(2, -1, -1)) for layer, places in self.kept.items()]
        return {layer: self.positions[:, None].expand(-1, p.shape[1], -1).gather(2, p) for layer, p in batch}

    def maps(self):
        """By layer (B, H, TOTAL, TOTAL) with every key at its place."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        self.model.config.output_attentions = True
        try:
            with torch.no_grad():
                steps = [output.attentions for output in self.run()]
        finally:
            self.model.set_attn_implementation(before)
            self.model.config.output_attentions = False
        whole = {}
        for layer, kept in self.kept.items():
            whole[layer] = torch.zeros(2, 9, TOTAL, TOTAL)
            for i, (begin, end) in enumerate(self.spans):
                own = torch.arange(0 if i == 0 else self.spans[0][1], end).expand(2, 3, -1)
                place = own if i == 0 else torch.cat([kept.expand(2, 3, -1), own], -1)
                place = place.repeat_interleave(3, 1)[:, :, None].expand(-1, -1, end - begin, -1)
                whole[layer][:, :, begin:end].scatter_(3, place, steps[i][layer])
        return whole


def uniform(*places):
    return dict.fromkeys(range(2), torch.tensor(places)[None, None])


def by_head(count=9):
    draw = torch.Generator().manual_seed(0)
    chosen = [torch.rand(2, 3, LENGTH, generator=draw).argsort(-1)[..., :count].sort(-1).values for _ in range(2)]
    return dict(enumerate(chosen))


SINK_AND_LAST = uniform(0, 1, *range(LENGTH - 5, LENGTH))
PRUNED: dict[str, Any] = {
    "sink and last": (SINK_AND_LAST, None),
    "arbitrary": (uniform(2, 3, 7, 8, 15, 20), None),
    "left padding": (uniform(3, 7, 8, 15, 20), "left"),
    "other keys by head and layer": (by_head(), None),
}


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_cache_needs_the_positions_of_its_keys(llama, name):
    case = Pruning(llama, *PRUNED[name])
    maps = case.maps()
    for live in (False, True):
        with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=live) as run:
            with pytest.raises(
                ValueError, match=r"layer 0: position_ids begin at .*holds .* tokens before.*set run.key_positions"
            ):
                case.run()
            case.run(run, case.key_positions())
        check(case, run, maps, live)


def check(case, run, maps, live):
    """The run is of all queries if live, with columns over positions, else of the last step, over the cache."""
    begin = 0 if live else case.spans[-1][0]
    for s in STATISTICS:
        counted = case.mask * (torch.arange(TOTAL) >= begin)
        valid = counted.bool() if s.axis == "row" else case.mask.bool()
        if s.is_mean:
            distance = torch.arange(TOTAL)[:, None] - torch.arange(TOTAL)
            reached = (distance >= s.lo) & (distance <= (TOTAL if s.hi is None else s.hi))
            valid = valid & ((counted[:, :, None] * reached).sum(1) > 0)
        valid_here = torch.ones_like(run.valid[s])
        for layer, whole in maps.items():
            expected = by_definition(s, whole * (torch.arange(TOTAL) >= begin)[:, None], case.mask, case.mask, counted)
            is_valid = valid[:, None].expand(-1, 9, -1)
            if s.axis == "row":
                expected, is_valid = expected[..., begin:], is_valid[..., begin:]
            elif not live:
                new = torch.arange(LENGTH, TOTAL).expand(2, 3, -1)
                place = torch.cat([case.kept[layer].expand(2, 3, -1), new], -1).repeat_interleave(3, 1)
                expected, is_valid = expected.gather(-1, place), is_valid.gather(-1, place)
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=TOLERANCE)
            valid_here &= is_valid.all(1)
        assert torch.equal(run.valid[s], valid_here)


@pytest.mark.parametrize("live", [False, True])
def test_positions_may_be_passed_once_for_all_layers(llama, live):
    case = Pruning(llama, SINK_AND_LAST)
    keys = torch.cat([torch.arange(2), torch.arange(LENGTH - 5, LENGTH)])[None]
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=live) as run:
        case.run(run, keys)
        assert run.key_positions.shape == (2, 7 + TOTAL - LENGTH)
        assert torch.equal(run.key_positions[:, 7:], case.positions[:, LENGTH:])
        results = {s: run[s] for s in STATISTICS}
        case.cache.crop(-1)
        assert torch.equal(run.key_positions[:, 7:], case.positions[:, LENGTH:-1])
        case.step(*SPANS[-1])
        for s in STATISTICS:
            torch.testing.assert_close(run[s], results[s], rtol=0, atol=TOLERANCE)
    check(case, run, case.maps(), live)


def test_tokens_behind_a_pruned_cache_are_taken_back(llama, monkeypatch):
    monkeypatch.setattr("attnstats.transformers.live.UNDOABLE_ROWS", 2)
    case = Pruning(llama, by_head(), spans=SPANS[:-2])
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        case.run(run, case.key_positions())
        cache, begin = case.cache, case.spans[-1][1]
        drafted = torch.cat([case.ids[:, begin : begin + 1], torch.full((2, 2), 5)], 1)
        llama(drafted, position_ids=torch.arange(begin, begin + 3)[None], past_key_values=cache)
        cache.crop(-2)
        assert run.length == begin + 1
        assert run.key_positions[0].shape == (2, 3, cache.get_seq_length())
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(run.key_positions[0][0], run.key_positions[0][1])
        rest = {"position_ids": case.positions[:, begin + 1 :], "past_key_values": cache}
        llama(case.ids[1:, begin + 1 :].expand(2, -1), **rest)
    case.spans = (*SPANS[:-2], (begin, begin + 1), (begin + 1, TOTAL))
    maps = case.maps()
    for s in STATISTICS:
        for layer, whole in maps.items():
            expected = by_definition(s, whole, case.mask, case.mask)[[1, 1]]
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("live", [False, True])
def test_a_cache_that_evicts_in_every_step(llama, live):
    """StreamingLLM: the first two keys and the last six stay; the caller says so before each step."""
    ids, cache = tokens(2, TOTAL), transformers.DynamicCache(config=llama.config)
    position, kept = torch.arange(TOTAL), torch.arange(LENGTH)
    whole = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=live) as run:
        for begin in [0, *range(LENGTH, TOTAL)]:
            end = begin + 1 if begin else LENGTH
            if begin:
                stays = (kept < 2) | (kept >= begin - 6)
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, stays], layer.values[:, :, stays]
                kept = kept[stays]
                whole[begin, 2 : begin - 6] = False
                run.key_positions = kept[None]
                kept = torch.cat([kept, position[begin:end]])
            llama(ids[:, begin:end], position_ids=position[None, begin:end], past_key_values=cache)
    mask = torch.zeros(1, 1, TOTAL, TOTAL).masked_fill(~whole, torch.finfo(torch.float32).min)
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        maps = llama(ids, attention_mask=mask, output_attentions=True).attentions
    llama.set_attn_implementation("sdpa")
    real = torch.ones(2, TOTAL)
    for s in STATISTICS:
        for layer in range(2):
            counted = real if live else real * (position == TOTAL - 1)
            expected = by_definition(s, maps[layer] * counted[:, None, :, None], real, real, counted)
            if not live:
                expected = expected[..., -1:] if s.axis == "row" else expected[..., kept]
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=TOLERANCE)


def test_heads_and_reductions_of_a_pruned_cache(llama):
    case = Pruning(llama, by_head())
    heads = {"waad": [8, 1], "fai": {0: [4, 2], 1: [0, 7]}, "entropy": [3, 3 + 1]}
    options: dict[str, Any] = {"statistics": [WAAD(4), FAI(1, 6), Entropy()], "layers": "all"}
    for live in (False, True):
        found = []
        for chosen, reduce in ((None, None), (heads, None), (heads, ("layers", "heads"))):
            with torch.no_grad(), capture(llama, **options, heads=chosen, reduce=reduce, live=live) as run:
                case.run(run, case.key_positions())
                found.append({s.name: run[s] for s in run.statistics})
        for name, of_layers in heads.items():
            of_layers = of_layers if isinstance(of_layers, dict) else dict.fromkeys(range(2), of_layers)
            chosen = torch.stack([found[0][name][layer][:, own] for layer, own in of_layers.items()])
            torch.testing.assert_close(found[1][name], chosen, rtol=0, atol=1e-6)
            torch.testing.assert_close(found[2][name], chosen.mean((0, 2)), rtol=0, atol=1e-6)


def test_a_cache_that_was_pruned_before_the_with(llama):
    """Its layers begin at different keys; a live run has columns from the first of them on."""
    kept = {0: torch.tensor([[[4, 9, 21]]]), 1: torch.tensor([[[2, 9, 21]]])}
    case = Pruning(llama, kept)
    with torch.no_grad():
        case.begin()
        with capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
            run.key_positions = case.key_positions()
            for span in case.spans[1:]:
                case.step(*span)
    assert run.length == TOTAL - LENGTH
    maps, counted = case.maps(), case.mask * (torch.arange(TOTAL) >= LENGTH)
    for s in STATISTICS:
        for layer, whole in maps.items():
            expected = by_definition(s, whole * counted[:, None, :, None], case.mask, case.mask, counted)
            expected = expected[..., 2:] if s.axis == "column" else expected[..., LENGTH:]
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=TOLERANCE)


def test_sinks_and_other_keys_by_head():
    sizes = {"num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 99}
    model = tiny("gpt_oss", layer_types=["full_attention"] * 2, **sizes)
    case = Pruning(model, by_head())
    for live in (False, True):
        with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all", live=live) as run:
            case.run(run, case.key_positions())
        check(case, run, case.maps(), live)


def test_the_output_of_a_pruned_cache_keeps_its_bits(llama):
    case = Pruning(llama, by_head())
    logits = []
    with torch.no_grad():
        for statistics in ([Entropy()], STATISTICS):
            with capture(llama, statistics=statistics, layers="all") as run:
                logits.append([output.logits for output in case.run(run, case.key_positions())])
    for a, b in zip(*logits, strict=True):
        assert torch.equal(a, b)


def test_statistics_without_positions_need_none(llama):
    case = Pruning(llama, SINK_AND_LAST)
    whole = case.maps()
    with torch.no_grad(), capture(llama, statistics=[Entropy(), Received()], layers="all") as run:
        case.run()
    expected = torch.stack([by_definition(Entropy(), m, case.mask, case.mask)[..., -1:] for m in whole.values()])
    torch.testing.assert_close(run["entropy"].double(), expected, rtol=0, atol=TOLERANCE)
    with torch.no_grad(), capture(llama, statistics=[SinkMass(2)], layers="all") as run:
        with pytest.raises(ValueError, match=r"set run\.key_positions"):
            case.run()
        with pytest.raises(ValueError, match="may have lost the first keys, which SinkMass"):
            case.run(run, case.key_positions())
    for statistic in (TopKeys(), SegmentMass((0, 2, None))):  # places are known among the keys alone
        with (
            torch.no_grad(),
            capture(llama, statistics=[statistic], layers="all") as run,
            pytest.raises(ValueError, match="counts from the first key of the sequence"),
        ):
            case.run(run, case.key_positions())
    with torch.no_grad(), capture(llama, statistics=[Entropy()], live=True), pytest.raises(ValueError, match="hold"):
        case.run()


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (torch.zeros(2, 5), TypeError, r"key_positions must be integers.*float32 \(2, 5\)"),
        ([[1, 2]], TypeError, "key_positions must be integers.*list"),
        ({0: torch.arange(7)}, TypeError, r"int64 \(7,\) for layer 0"),
        (torch.arange(6)[None], ValueError, r"\(1, 1, 6\).*for the 7 keys"),
        (torch.arange(7).expand(2, 2, 7), ValueError, r"\(2, 2, 7\).*3 key heads"),
        (torch.arange(7)[None] + 20, ValueError, r"behind the queries, whose position_ids begin at 23, 23"),
        (torch.tensor([[0, 1, 1, 2, 3, 4, 5]]), ValueError, "same position"),
        ({1: torch.arange(7)[None]}, ValueError, r"names layers \['1'\], and not 0"),
        (torch.arange(7)[None] - 9, ValueError, "32 positions before the queries, but only 23 tokens were seen"),
    ],
)
def test_wrong_positions_are_named(llama, keys, error, message):
    case = Pruning(llama, SINK_AND_LAST)
    with (
        torch.no_grad(),
        capture(llama, statistics=["waad"], layers="all", live=True) as run,
        pytest.raises(error, match=message),
    ):
        case.run(run, keys)


def test_a_window_needs_every_key():
    model, cache = tiny("mistral", num_hidden_layers=1, sliding_window=8), transformers.DynamicCache()
    with torch.no_grad(), capture(model, statistics=["waad"]) as run:
        model(tokens(), past_key_values=cache)
        cache.layers[0].keys, cache.layers[0].values = (x[:, :, -9:] for x in (cache.layers[0].keys,) * 2)
        run.key_positions = torch.arange(LENGTH - 9, LENGTH)[None]
        with pytest.raises(ValueError, match=r"layer 0 has a window.*run.key_positions \(1, 1, 9\) cannot be used"):
            model(tokens(length=1), position_ids=torch.tensor([[LENGTH]]), past_key_values=cache)


# A cache that is filled before the first token

PREFIX = 5


def prefix(model, kind=transformers.DynamicCache, batch=2):
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is transformers.StaticCache else {}))
    draw = torch.Generator().manual_seed(3)
    for layer in range(model.config.num_hidden_layers):
        keys, values = torch.randn(2, 2, 3, PREFIX, 16, generator=draw)[:, :batch]
        cache.update(keys, values, layer)
    return cache


def check_prefix(model, run, mask, inputs, roll=0):
    """The live run has a row for each token and a column for each key; `roll`: places that row 1's prefix moves up."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(tokens(), past_key_values=prefix(model), output_attentions=True, **inputs).attentions
    model.set_attn_implementation(before)
    prefixed = torch.nn.functional.pad(mask, (PREFIX, 0), value=1)
    if roll:
        prefixed[1, : PREFIX + roll] = prefixed[1, : PREFIX + roll].roll(roll)
    for s in STATISTICS:
        for layer, whole in enumerate(maps):
            whole = torch.nn.functional.pad(whole, (0, 0, PREFIX, 0))
            if roll:
                whole[1, ..., : PREFIX + roll] = whole[1, ..., : PREFIX + roll].roll(roll, -1)
            queries = torch.nn.functional.pad(mask, (PREFIX, 0), value=0)
            expected = by_definition(s, whole, queries, prefixed)
            expected = expected[..., PREFIX:] if s.axis == "row" else expected
            torch.testing.assert_close(run[s][layer].double(), expected, rtol=0, atol=TOLERANCE)
        if s == Received():
            assert torch.equal(run.valid[s], prefixed.bool())


@pytest.mark.parametrize("kind", [transformers.DynamicCache, transformers.StaticCache])
@pytest.mark.parametrize("counted", ["by the model", "by position_ids", "not"])
@pytest.mark.parametrize("side", [None, "left"])
def test_a_prefix_has_columns_and_no_rows(llama, kind, counted, side):
    mask = padding(side)
    attention_mask = torch.nn.functional.pad(mask, (PREFIX, 0), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + (PREFIX if counted == "by position_ids" else 0)
    given = {} if counted == "by the model" else {"position_ids": positions}
    keys, roll = None, 0
    if given and (side or counted == "not"):  # what the prefix counts as only the caller knows
        keys, roll = torch.arange(PREFIX)[None] - (PREFIX if counted == "not" else 0), 6 if side else 0
    cache = prefix(llama, kind)
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all", live=True) as run:
        for begin, end in ((0, 9), (9, 10), (10, LENGTH)):
            inputs = {name: x[:, begin:end] for name, x in given.items()}
            step = {"attention_mask": attention_mask[:, : PREFIX + end], "past_key_values": cache} | inputs
            if begin == 0 and keys is not None:
                with pytest.raises(ValueError, match=r"set run\.key_positions"):
                    llama(tokens()[:, begin:end], **step | {"past_key_values": prefix(llama, kind)})
                run.key_positions = keys
            llama(tokens()[:, begin:end], **step)
        assert run.length == LENGTH
        assert torch.equal(run.tokens, tokens())
    check_prefix(llama, run, mask, {"attention_mask": attention_mask} | given, roll)


def test_a_prefix_before_generation_beams_and_rollback(llama):
    ids = torch.cat([torch.ones(2, PREFIX, dtype=torch.long), tokens()], 1)  # generate takes the first as cached
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt_alone = torch.zeros(2, LENGTH, dtype=torch.bool)
    asked: dict[str, Any] = {"statistics": STATISTICS, "layers": "all"}
    for beams in (1, 2):
        caches = [prefix(llama), prefix(llama)]
        for cache in caches:
            cache.batch_repeat_interleave(beams)
        with torch.no_grad(), capture(llama, **asked, live=True, query_mask=prompt_alone) as run:
            llama.generate(ids, attention_mask=ids > 0, past_key_values=caches[0], num_beams=beams, **options)
        assert run.tokens.shape == (2 * beams, LENGTH + 5)
        response = (torch.arange(LENGTH + 5) >= LENGTH).expand(2 * beams, -1)
        with torch.no_grad(), capture(llama, **asked, query_mask=response) as forced:
            llama(run.tokens, past_key_values=caches[1])
        for s in STATISTICS:
            torch.testing.assert_close(run[s], forced[s], rtol=0, atol=TOLERANCE)
            assert torch.equal(run.valid[s], forced.valid[s])
    cache = prefix(llama)
    with torch.no_grad(), capture(llama, **asked, live=True) as run:
        for begin in (0, 2):
            llama(tokens()[:, begin : begin + 2], past_key_values=cache)
        cache.crop(-4)
        llama(tokens()[:, :20], past_key_values=cache)
        cache.crop(-3)
        llama(tokens()[:, 17:], past_key_values=cache)
        assert torch.equal(run.tokens, tokens())
    check_prefix(llama, run, padding(None), {})


def test_a_prefix_does_not_go_on_with_another_sequence(llama):
    for first in (PREFIX, LENGTH):
        with torch.no_grad(), capture(llama, statistics=["waad"], live=True) as run:
            llama(tokens()[:, :first], use_cache=False)
            with pytest.raises(ValueError, match="with another cache"):
                llama(tokens(), past_key_values=prefix(llama))
            assert run.length == first


# Offsets by row, packed rows, positions that the cache contradicts


def test_a_sequence_may_begin_at_any_position(llama):
    """By one offset per batch row, which the steps behind it keep."""
    ids, asked = tokens(), {"statistics": STATISTICS, "layers": "all"}
    positions = torch.arange(LENGTH) + torch.tensor([[40], [7]])
    with torch.no_grad(), capture(llama, **asked) as forced:
        llama(ids)
    for live in (False, True):
        cache = transformers.DynamicCache(config=llama.config)
        with torch.no_grad(), capture(llama, **asked, live=live) as run:
            for begin, end in ((0, 11), (11, 12), (12, LENGTH)):
                llama(ids[:, begin:end], position_ids=positions[:, begin:end], past_key_values=cache)
            for s in STATISTICS:
                if live or s.axis == "row":
                    part = forced[s] if live else forced[s][..., 12:]
                    torch.testing.assert_close(run[s], part, rtol=0, atol=TOLERANCE)
            cache.crop(-3)
            llama(ids[:, -3:], position_ids=positions[:, -3:], past_key_values=cache)
            if live:
                torch.testing.assert_close(run["waad"], forced["waad"], rtol=0, atol=TOLERANCE)
                cache.batch_select_indices(torch.tensor([1, 1]))
                llama(ids[:, :1], position_ids=positions[1:, -1:] + 1, past_key_values=cache)
            with pytest.raises(ValueError, match="position_ids begin at 99, 99"):
                llama(ids[:, :1], position_ids=torch.full((2, 1), 99), past_key_values=cache)


@pytest.mark.parametrize("counted", [True, False], ids=["padding counts", "padding does not count"])
def test_a_cache_that_was_filled_outside(llama, counted):
    """It has no offsets to compare with: ids count its tokens, or those that are not padding on the left."""
    ids, mask = tokens(), padding("left")
    positions = torch.arange(LENGTH).expand(2, -1) if counted else (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    asked: dict[str, Any] = {"statistics": [MeanDistance()], "layers": "all"}
    caches = [transformers.DynamicCache(config=llama.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama(ids[:, :-1], past_key_values=cache, **{name: x[:, :-1] for name, x in inputs.items()})
        with capture(llama, **asked) as run:
            llama(ids, **inputs)
            forced = run[MeanDistance()]
            step = inputs | {"position_ids": positions[:, -1:]}
            llama(ids, position_ids=torch.arange(40, 40 + LENGTH)[None])  # another cache's offset is forgotten
            llama(ids[:, -1:], past_key_values=caches[0], **step)
            torch.testing.assert_close(run[MeanDistance()], forced[..., -1:], rtol=0, atol=TOLERANCE)
            for wrong in (torch.tensor([[40], [40]]), torch.tensor([[LENGTH - 1], [LENGTH - 4]])):
                with pytest.raises(ValueError, match="position_ids begin at"):
                    llama(ids[:, -1:], past_key_values=copy.deepcopy(caches[1]), **step | {"position_ids": wrong})


def test_where_keys_end_says_whether_all_are_there():
    for right, keys, whole in (
        (0, 9, True),
        (0, 40, True),
        (0, 8, False),
        (None, 9, True),
        (None, 12, False),
        (2, 8, False),
    ):
        assert holds_every_key(MaskDescription(6, 0, 3, keys, right=right)) is whole
        assert holds_every_key(MaskDescription(11, 5, 3, keys, right=right)) is whole


def test_packed_rows_and_only_they_may_restart(llama):
    ids = tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad(), capture(llama, statistics=STATISTICS, layers="all") as run:
        llama(ids, position_ids=positions, use_cache=False)
        packed = {s: run[s] for s in STATISTICS}
        for s in STATISTICS:
            for begin, end in ((0, 8), (8, 20)):
                llama(ids[:, begin:end])
                torch.testing.assert_close(packed[s][..., begin:end], run[s], rtol=0, atol=TOLERANCE)
        for inputs in ({}, {"use_cache": False, "attention_mask": torch.ones(1, 20, dtype=torch.long)}):
            with pytest.raises(ValueError, match="batch row 0 restart or have gaps, and queries see keys across"):
                llama(ids, position_ids=positions, **inputs)


def test_padding_between_tokens_is_no_distance(llama):
    """A prompt padded on the right: the model is given positions that do not count the padding before the answer."""
    mask = torch.cat([padding("right"), torch.ones(2, 1, dtype=torch.long)], 1)
    positions = mask.cumsum(-1) - 1
    asked: dict[str, Any] = {"statistics": [MeanDistance()], "layers": "all"}
    with torch.no_grad(), capture(llama, **asked) as run:
        for keys in (None, positions[:, :-1]):
            cache = transformers.DynamicCache(config=llama.config)
            llama(tokens(), attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
            step = {"attention_mask": mask, "position_ids": positions[:, -1:], "past_key_values": cache}
            run.key_positions = keys
            if keys is None:
                with pytest.raises(ValueError, match="position_ids begin at 23, 17, but the cache holds 23 tokens"):
                    llama(torch.full((2, 1), 9), **step)
        llama(torch.full((2, 1), 9), **step)
        actual = run[MeanDistance()]
        llama(torch.cat([tokens()[1:, :17], torch.full((1, 1), 9)], 1))
        torch.testing.assert_close(actual[:, 1], run[MeanDistance()][:, 0, :, -1:], rtol=0, atol=TOLERANCE)


def test_a_cache_that_counts_keys_it_has_no_more(llama):
    """Its layers evict while they say how many tokens they have seen: the keys no longer reach the queries."""

    class Evicting(transformers.cache_utils.DynamicLayer):
        seen = 0

        def update(self, keys, values, *args, **kwargs):
            self.seen += keys.shape[2]
            whole = super().update(keys, values)
            self.keys, self.values = self.keys[:, :, -8:], self.values[:, :, -8:]
            return whole

        def get_seq_length(self):
            return self.seen

        def get_mask_sizes(self, query_length):
            return (self.keys.shape[2] if self.seen else 0) + query_length, 0

    cache = transformers.Cache(layers=[Evicting() for _ in range(2)])
    with torch.no_grad(), capture(llama, statistics=["waad"]):
        llama(tokens(), past_key_values=cache)
        with pytest.raises(ValueError, match=r"queries at 23 \.\. 23, but 9 keys from 0 on.*set run.key_positions"):
            llama(tokens(length=1), past_key_values=cache)


def test_positions_given_by_place_and_vision_models(llama):
    """The third argument of a forward is position_ids; of the coordinates of a vision model the text's are compared."""
    cache = transformers.DynamicCache(config=llama.config)
    with torch.no_grad(), capture(llama, statistics=["waad"]):
        llama(tokens(), past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids begin at 30"):
            llama(tokens(length=1), None, torch.tensor([[30]]), cache)
        with pytest.raises(ValueError, match=r"position_ids \(1, 2\) are not those of its 1 queries"):
            llama(tokens(length=1), position_ids=torch.tensor([[23, 24]]))
    ids = torch.arange(5)[None, None]
    assert text_positions(ids.expand(3, 1, 5)) is None
    assert torch.equal(text_positions(torch.cat([ids, ids + 9, ids, ids])), ids[0])
