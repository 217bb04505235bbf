"""Head classes, receiver heads and profiles: which heads, ties, corpora that add up, and models that don't match."""

import dataclasses
import json
import math

import pytest
import scipy.stats
import torch

import attnstats
from attnstats.errors import InputError
from attnstats.heads import (
    HeadProfile,
    class_mean,
    classify,
    head_distance,
    kurtosis,
    segment_received,
)
from attnstats.identity import identity
from attnstats.statistics import FAI, MeanDistance, PooledMap
from tests.tiny import run_with, small_llama


@pytest.mark.parametrize(("shape", "share", "count"), [
    ((5, 9), 0.30, 13),
    ((5, 32), 0.30, 48),
    ((10, 10), 0.29, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
    ((10, 10), 0.07, 7),
    ((1, 3), 0.30, 1),
    ((1, 2), 0.01, 1),
    ((1, 4), 0.5, 2),
])  # fmt: skip
def test_share_of_heads(shape, share, count):
    distance = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    classes = classify(distance, share)
    assert (
        classes.local.sum() == classes.global_.sum() == count == max(1, math.floor(round(share * distance.numel(), 6)))
    )
    assert not (classes.local & classes.global_).any()
    assert distance[classes.local].max() <= distance[~classes.local].min()
    assert distance[classes.global_].min() >= distance[~classes.global_].max()


def test_ties_go_to_the_first_head_in_layer_order():
    classes = classify(torch.ones(3, 4), 0.25)
    assert classes.local.flatten().nonzero()[:, 0].tolist() == [0, 1, 2]
    assert classes.global_.flatten().nonzero()[:, 0].tolist() == [3, 4, 5]
    tied = classify(torch.tensor([[2.0, 1.0, 1.0], [3.0, 3.0, 1.0]]), 0.34)
    assert tied.local.tolist() == [[False, True, True], [False, False, False]]
    assert tied.global_.tolist() == [[False, False, False], [True, True, False]]


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 3), (3, 4), (5, 9)])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.49, 0.5])
def test_heads_that_tie_are_never_both(shape, share):
    """A model whose heads all attend alike, and one in which a single head differs."""
    one_apart = torch.ones(shape).flatten().index_fill(0, torch.tensor(1), 2.0).view(shape)
    for distance in (torch.ones(shape), one_apart, -one_apart):
        classes = classify(distance, share)
        assert not (classes.local & classes.global_).any()
        assert classes.local.sum() == classes.global_.sum() >= 1
        assert distance[classes.local].max() <= distance[~classes.local].min()
        assert distance[classes.global_].min() >= distance[~classes.global_].max()


def test_names():
    classes = classify(torch.tensor([[1.0, 2.0, 3.0]]))
    assert [classes.name(0, head) for head in range(3)] == ["local", "middle", "global"]


def test_class_mean_is_one_mean_and_not_a_mean_of_layer_means():
    statistic = torch.tensor([[[6.0], [0.0]], [[1.0], [2.0]]])
    chosen = torch.tensor([[True, False], [True, True]])
    assert class_mean(statistic, chosen).tolist() == [3.0]  # a mean of layer means would be 3.75


def test_head_distance_counts_only_the_rows_that_count():
    rows = torch.tensor([[[100.0, 1.0, 3.0], [100.0, 4.0, 6.0]]])
    assert head_distance(rows, torch.tensor([False, True, True])).tolist() == [[2.0, 5.0]]
    with pytest.raises(ValueError, match="no row counts"):
        head_distance(rows, torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize(("distance", "share", "message"), [
    (torch.rand(4), 0.3, "layers, heads"),
    (torch.rand(1, 1), 0.3, "two heads or more"),
    (torch.rand(2, 2), 0.0, r"share must be in \(0, 0.5\], got 0.0"),
    (torch.rand(2, 2), 0.51, r"got 0.51"),
    (torch.rand(2, 2), math.nan, "got nan"),
    (torch.tensor([[1.0, math.nan]]), 0.3, "NaN"),
])  # fmt: skip
def test_bad_input(distance, share, message):
    with pytest.raises(ValueError, match=message):
        classify(distance, share)


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4,), (5,), (3, 4, 50), (2, 400)])
@pytest.mark.parametrize("power", [1, 5])
def test_kurtosis_is_scipys(shape, power):
    values = drawn(*shape).double() ** power
    expected = scipy.stats.kurtosis(values.numpy(), axis=-1, fisher=True, bias=True)
    torch.testing.assert_close(kurtosis(values), torch.as_tensor(expected), rtol=1e-10, atol=1e-10)


def test_kurtosis_is_of_the_valid_entries():
    values, valid = drawn(3, 20), drawn(20, seed=1) > 0.4
    expected = scipy.stats.kurtosis(values[:, valid].double().numpy(), axis=-1)
    torch.testing.assert_close(kurtosis(values, valid), torch.as_tensor(expected))


@pytest.mark.parametrize("values", [torch.ones(2, 5) / 3, torch.zeros(2, 5), torch.rand(2, 3), torch.rand(2, 0)])
def test_what_has_no_shape_has_no_kurtosis(values):
    assert kurtosis(values).isnan().all()


@pytest.mark.parametrize(("count", "ranked"), [(2, 0), (3, 0), (4, 6), (5, 6)])
def test_heads_are_ranked_by_four_values_or_more(count, ranked):
    """The kurtosis of two values is -2 and of three -1.5, whatever they are: their order would be rounding noise."""
    profile = HeadProfile.empty((0, 1), 3).add(drawn(2, 3, 20), None, drawn(2, 3, count, seed=2))
    assert int(profile.kurtosis.isfinite().sum()) == int(profile.receivers().sum()) == ranked
    # A long response beside it ranks them by itself.
    long = drawn(2, 3, 20, seed=3)
    both = profile.add(drawn(2, 3, 20), None, long)
    if not ranked:
        torch.testing.assert_close(both.kurtosis, kurtosis(long))


@pytest.mark.parametrize("ignore", [1, 2, 4])
def test_segments_receive_the_mean_over_pairs_of_later_segments(ignore):
    sizes = [3, 1, 4, 2, 5, 1, 2]
    length, bounds = sum(sizes), [0, 3, 4, 8, 10, 15, 16, 18]
    attention = drawn(2, length, length).double().tril()
    pooled = torch.zeros(2, len(sizes), len(sizes), dtype=torch.float64)
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            pooled[:, i, j] = attention[:, bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]].sum((-2, -1))
    found = segment_received(pooled, sizes, ignore)
    for j in range(len(sizes)):
        blocks = [
            attention[:, bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]].mean((-2, -1))
            for i in range(j + ignore, len(sizes))
        ]
        if blocks:
            torch.testing.assert_close(found[:, j], torch.stack(blocks).mean(0))
        else:
            assert found[:, j].isnan().all()


def test_segments_of_a_pooled_map():
    query, key, value = drawn(3, 1, 2, 12, 8)
    bounds = (0, 3, 7, 8, 12)
    _, found = attnstats.attention(query, key, value, statistics=[PooledMap(bounds, bounds)], is_causal=True)
    maps = (query @ key.mT / 8**0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    expected = (maps[..., 7:8, 0:3].mean((-2, -1)) + maps[..., 8:12, 0:3].mean((-2, -1))) / 2
    scores = segment_received(found["pooled_map"], [3, 4, 1, 4], ignore=2)
    torch.testing.assert_close(scores[..., 0], expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pooled", "sizes", "ignore", "message"), [
    (torch.rand(2, 3), [1, 1, 1], 1, r"\(\.\.\., S, S\) with S = 3"),
    (torch.rand(3, 3), [1, 0, 1], 1, "at least 1"),
    (torch.rand(3, 3), [1, 1, 1], 0, "ignore must be at least 1, got 0"),
])  # fmt: skip
def test_bad_segments(pooled, sizes, ignore, message):
    with pytest.raises(ValueError, match=message):
        segment_received(pooled, sizes, ignore)


def profile_of(sequences, layers=(1, 4), heads=3, model=None):
    profile = HeadProfile.empty(layers, heads, model)
    for seed in sequences:
        length = 30 + seed
        profile = profile.add(
            drawn(2, 3, length, seed=seed) * 9,
            torch.arange(length) >= 7,
            drawn(2, 3, length, seed=seed + 100) ** 3,
            (torch.arange(length) >= 7) & (torch.arange(length) < length - 4),
        )
    return profile


def test_a_profile_is_that_of_the_rows_in_one_go():
    rows = torch.cat([drawn(2, 3, 30 + seed, seed=seed)[..., 7:] * 9 for seed in range(4)], -1)
    profile = profile_of(range(4))
    torch.testing.assert_close(profile.distance, rows.double().mean(-1))
    shapes = [
        scipy.stats.kurtosis((drawn(2, 3, 30 + seed, seed=seed + 100) ** 3)[..., 7:-4].double().numpy(), axis=-1)
        for seed in range(4)
    ]
    torch.testing.assert_close(profile.kurtosis, torch.as_tensor(sum(shapes) / 4))
    assert (profile.rows, profile.sequences) == (rows.shape[-1], 4)


def test_profiles_of_parts_add_up_to_that_of_the_whole():
    whole, merged = profile_of(range(5)), profile_of([0, 1]) + profile_of([2, 3, 4])
    torch.testing.assert_close(merged.distance, whole.distance, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.kurtosis, whole.kurtosis, rtol=1e-14, atol=0)
    assert (merged.rows, merged.sequences) == (whole.rows, whole.sequences)
    nothing = profile_of([])
    assert torch.equal((whole + nothing).distance, whole.distance)


def test_only_profiles_of_the_same_heads_add_up():
    with pytest.raises(ValueError, match="other heads"):
        profile_of([0]) + profile_of([0], layers=(1, 5))
    with pytest.raises(ValueError, match="different models"):
        profile_of([0]) + dataclasses.replace(profile_of([0]), model=identity(small_llama()))


def test_classes_among_chosen_layers():
    profile = profile_of(range(3))
    everywhere, among = profile.classes(0.34), profile.classes(0.34, layers=[4])
    assert everywhere.local.sum() == everywhere.global_.sum() == 2
    assert among.local.sum() == among.global_.sum() == 1
    assert not among.local[0].any()
    assert profile.distance[1][among.local[1]] == profile.distance[1].min()
    with pytest.raises(ValueError, match=r"no layers \[2\], only \[1, 4\]"):
        profile.classes(layers=[2, 4])


def test_receivers_are_the_most_kurtotic_heads():
    profile = profile_of(range(3))
    order = profile.kurtosis.flatten().argsort(descending=True)
    for count in (1, 2, 5):
        assert set(profile.receivers(count).flatten().nonzero()[:, 0].tolist()) == set(order[:count].tolist())
    assert profile.receivers(20).sum() == 6
    among = profile.receivers(2, layers=[1])
    assert among.sum() == 2
    assert not among[1].any()


def test_heads_without_kurtosis_are_no_receivers():
    received = drawn(2, 3, 20)
    received[0, 1] = 0.25  # all the same
    profile = HeadProfile.empty((0, 1), 3).add(drawn(2, 3, 20), None, received)
    assert profile.kurtosis[0, 1].isnan()
    chosen = profile.receivers(6)
    assert chosen.sum() == 5
    assert not chosen[0, 1]
    without = HeadProfile.empty((0, 1), 3).add(drawn(2, 3, 20))
    assert without.receivers().sum() == 0
    # Another sequence in which it has one: its mean is over that one.
    more = profile.add(drawn(2, 3, 20), None, drawn(2, 3, 20, seed=5))
    torch.testing.assert_close(more.kurtosis[0, 1], kurtosis(drawn(2, 3, 20, seed=5))[0, 1])


@pytest.mark.parametrize(("call", "message"), [
    (lambda p: p.add(drawn(2, 4, 9)), r"mean_distance must be .*, \(2, 3\) first; got \(2, 4, 9\)"),
    (lambda p: p.add(drawn(2, 3, 9), None, drawn(3, 3, 9)), "received must be"),
    (lambda p: p.add(drawn(2, 3, 9), torch.zeros(9, dtype=torch.bool)), "no row counts"),
    (lambda p: p.add(torch.full((2, 3, 9), torch.nan)), "NaN"),
    (lambda p: p.distance, "the profile is empty"),
    (lambda p: p.receivers(0), "count must be at least 1, got 0"),
])  # fmt: skip
def test_bad_sequences(call, message):
    with pytest.raises(ValueError, match=message):
        call(HeadProfile.empty((0, 1), 3))


def test_a_profile_of_a_running_model():
    model, ids = small_llama(), torch.arange(20)[None]
    counted = torch.arange(20) >= 6
    statistics = [MeanDistance(), FAI(4, None)]
    with (
        torch.no_grad(),
        attnstats.capture(model, statistics=statistics, layers="all", query_mask=counted[None]) as run,
    ):
        model(ids)
    profile = HeadProfile.empty(run.layers, 3, identity(model)).add(
        run["mean_distance"][:, 0], counted, run["fai"][:, 0], run.valid["fai"][0] & counted
    )
    maps = torch.cat(run_with(model, "eager", input_ids=ids).attentions).double()
    positions = torch.arange(20)
    distances = (maps * (positions[:, None] - positions)).sum(-1)[..., 6:].mean(-1)
    torch.testing.assert_close(profile.distance, distances, rtol=1e-4, atol=1e-5)
    columns = torch.stack([maps[..., s + 4 :, s].mean(-1) for s in range(6, 16)], -1)
    torch.testing.assert_close(profile.kurtosis, kurtosis(columns), rtol=1e-3, atol=1e-3)


def test_a_saved_profile_has_the_same_numbers(tmp_path):
    model = small_llama()
    profile = profile_of(range(3), model=identity(model))
    profile.save(tmp_path / "heads.json")
    loaded = HeadProfile.load(tmp_path / "heads.json", model)
    for field in ("distance_sum", "kurtosis_sum", "kurtosis_count"):
        assert torch.equal(getattr(loaded, field), getattr(profile, field))
    assert (loaded.layers, loaded.rows, loaded.sequences, loaded.model) == (
        profile.layers, profile.rows, profile.sequences, profile.model
    )  # fmt: skip
    assert HeadProfile.load(tmp_path / "heads.json").model == profile.model


@pytest.mark.parametrize(("other", "field"), [
    ({"seed": 1}, "weights is"),
    ({"num_hidden_layers": 4}, "layers is 4 and not 5"),
    ({"num_attention_heads": 2, "num_key_value_heads": 2}, "heads is 2 and not 3, head_dim is 12 and not 8"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "config is"),
])  # fmt: skip
def test_a_profile_of_another_model_is_refused(tmp_path, other, field):
    profile_of([0], model=identity(small_llama())).save(tmp_path / "heads.json")
    with pytest.raises(InputError, match=rf"heads\.json: the profile is of another model: .*{field}"):
        HeadProfile.load(tmp_path / "heads.json", small_llama(**other))


def test_a_profile_of_no_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="names no model"):
        profile_of([0]).save(tmp_path / "heads.json")


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text[: len(text) // 2], "not JSON"),
    (lambda text: "", "not JSON"),
    (lambda text: "[1]", "not a head profile"),
    (lambda text: json.dumps(json.loads(text) | {"format": "other"}), "not a head profile"),
    (lambda text: json.dumps(json.loads(text) | {"version": 99}), "of version 99, and this program reads 2"),
    (lambda text: json.dumps(json.loads(text) | {"distance_sum": [[1.0]]}), "distance_sum must be"),
    (lambda text: json.dumps(json.loads(text) | {"distance_sum": "x"}), "broken entry"),
    (lambda text: json.dumps(json.loads(text) | {"rows": -1}), "must not be negative"),
    (lambda text: json.dumps(json.loads(text) | {"model": {"name": "x"}}), "broken entry"),
    (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "layers"}), "broken entry"),
])  # fmt: skip
def test_broken_files_are_refused(tmp_path, change, message):
    file = tmp_path / "heads.json"
    profile_of([0], model=identity(small_llama())).save(file)
    file.write_text(change(file.read_text()))
    with pytest.raises(InputError, match=message):
        HeadProfile.load(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        HeadProfile.load(tmp_path / "none.json")
