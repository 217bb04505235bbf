"""Results as text, as frames and in the cells of a notebook: what they name is what they hold."""

import html.parser
import pickle
import re

import pandas
import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, PooledMap, SegmentMass, TopKeys, heads, segments
from attnstats.errors import InputError
from attnstats.heads import HeadClasses, HeadProfile
from attnstats.study import models
from tests.tiny import padding, save_tiny_model, small_llama, tokens

HEADS = {2: [1, 2], 3: [0, 1]}


@pytest.fixture(scope="module")
def model():
    return small_llama(vocab_size=97, initializer_range=0.5)


@pytest.fixture(scope="module")
def run(model):
    statistics = [WAAD(4), FAI(2, 7), PooledMap(3, 3)]
    chosen = {"heads": {"fai": HEADS}, "layers": [2, 3]}
    with torch.no_grad(), attnstats.capture(model, statistics=statistics, **chosen) as run:
        model(tokens(), attention_mask=padding("right"))
    return run


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)


def test_a_capture_names_layers_shapes_and_the_highest_entry(run):
    lines = repr(run).splitlines()
    assert lines[0] == "Capture of layers 2, 3"
    waad, fai = run["waad"], run["fai"]
    layer, row, head, query = torch.unravel_index(waad.argmax(), waad.shape)
    assert lines[1] == (
        f"  WAAD(window=4): (2, 2, 3, 23), highest {waad.max():.4g}: layer {2 + layer}, row {row}, head {head}, "
        f"query {query}"
    )
    layer, row, place, key = (int(i) for i in torch.unravel_index(fai.argmax(), fai.shape))
    assert lines[2].endswith(f"layer {2 + layer}, row {row}, head {HEADS[2 + layer][place]}, key {key}")
    assert re.search(r"query segment \d, segment \d$", lines[3])
    again = pickle.loads(pickle.dumps(run))
    assert repr(again) == repr(run)


def test_a_frame_of_a_capture_has_every_number_at_its_place(run):
    frame = run.to_frame()
    assert frame.columns.tolist() == ["waad", "fai"]
    assert frame.index.names == ["layer", "row", "head", "position"]
    valid = run.valid
    for (layer, row, head, position), values in frame.iterrows():
        if valid["waad"][row, position]:
            assert values.waad == pytest.approx(float(run["waad"][layer - 2, row, head, position]))
        else:
            assert pandas.isna(values.waad)
        if head in HEADS[layer] and valid["fai"][row, position]:
            place = HEADS[layer].index(head)
            assert values.fai == pytest.approx(float(run["fai"][layer - 2, row, place, position]))
        else:
            assert pandas.isna(values.fai)
    assert len(frame) == 2 * 2 * 3 * 23


@pytest.mark.parametrize(
    ("reduce", "levels"),
    [
        ("heads", ["layer", "row", "position"]),
        ("layers", ["row", "head", "position"]),
        (("layers", "heads"), ["row", "position"]),
    ],
)
def test_a_frame_has_no_level_that_is_reduced(model, reduce, levels):
    with torch.no_grad(), attnstats.capture(model, statistics=["waad"], reduce=reduce) as run:
        model(tokens())
    frame = run.to_frame()
    assert frame.index.names == levels
    assert frame.waad.to_numpy() == pytest.approx(run["waad"].flatten().numpy())
    assert "means over" in repr(run)


def test_queries_after_cached_keys_stand_at_their_positions(model):
    with torch.no_grad():
        before = model(tokens()[:, :10], use_cache=True).past_key_values
        with attnstats.capture(model, statistics=["waad", "received"], layers=[1]) as run:
            model(tokens()[:, 10:15], past_key_values=before)
    frame = run.to_frame()
    assert frame.waad.dropna().index.unique("position").tolist() == [10, 11, 12, 13, 14]
    assert frame.received.dropna().index.unique("position").tolist() == list(range(15))


def test_before_a_pass_there_is_nothing_to_read(model):
    with attnstats.capture(model, statistics=["waad"], layers=[1]) as run:
        assert repr(run) == "Capture of layers 1\n  WAAD(window=10): nothing to read"
        assert "nothing to read" in run._repr_html_()


def test_what_has_several_numbers_per_query_has_several_columns(model):
    statistics = [SegmentMass((0, 5, None)), TopKeys(2), "entropy"]
    with torch.no_grad(), attnstats.capture(model, statistics=statistics, layers=[1]) as run:
        model(tokens())
    _, mass, top, _ = repr(run).splitlines()
    assert re.search(r"\(1, 2, 3, 23, 2\), highest 1.*query \d+, segment 0$", mass)
    assert top.endswith("values (1, 2, 3, 23, 2), indices (1, 2, 3, 23, 2)")
    frame = run.to_frame()
    parts = [f"top_keys_{kind}_{i}" for i in range(2) for kind in ("value", "index")]
    assert frame.columns.tolist() == ["segment_mass_0", "segment_mass_1", *parts, "entropy"]
    one = frame.loc[1, 0, 2, 20]
    assert one.segment_mass_1 == pytest.approx(float(run["segment_mass"][0, 0, 2, 20, 1]))
    assert one.top_keys_index_1 == int(run["top_keys"].indices[0, 0, 2, 20, 1])
    assert Tags(run._repr_html_()).seen.count("path") == 1


def test_maps_alone_are_no_frame(model):
    with torch.no_grad(), attnstats.capture(model, statistics=[PooledMap(2, 2)]) as run:
        model(tokens())
    with pytest.raises(InputError, match=r"no number per token in PooledMap.*run\[statistic\]"):
        run.to_frame()


def test_a_repr_warns_and_changes_nothing(model, recwarn):
    """A NaN that reading warns of is in the text, without a warning."""
    with torch.no_grad(), attnstats.capture(model, statistics=["entropy"]) as run:
        model(tokens())
    before = run._was_read
    assert "Entropy" in repr(run)
    assert run._was_read is before
    assert not recwarn.list


def test_statistics_of_a_call():
    query = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    _, stats = attnstats.attention(query, query, query, statistics=[WAAD(4), Entropy()])
    lines = repr(stats).splitlines()
    assert lines[0] == "Statistics of one call, lse (2, 3, 9)"
    place = tuple(int(i) for i in torch.unravel_index(stats["waad"].argmax(), (2, 3, 9)))
    assert lines[1] == f"  WAAD(window=4): (2, 3, 9), highest {stats['waad'].max():.4g} at {place}"
    told = []

    def call(x):
        output, stats = attnstats.attention(x, x, x, statistics=["waad"])
        told.append(repr(stats))
        return output

    torch.vmap(call)(query[:, None])
    assert "WAAD(window=10): (1, 3, 9)" in told[0]
    meta = query.to("meta")
    assert "(2, 3, 9)" in repr(attnstats.attention(meta, meta, meta, statistics=[WAAD(4)])[1])


def test_classes_speak_of_layers_of_the_model():
    classes = heads.classify(torch.tensor([[1.0, 5.0, 3.0], [9.0, 5.0, 2.0]]), 0.34, layers=(11, 14))
    assert classes.heads("local") == [(11, 0), (14, 2)]
    assert classes.heads("global") == [(11, 1), (14, 0)]
    assert classes.name(14, 2) == "local"
    assert classes.letters(14) == "gml"
    assert repr(classes).splitlines() == [
        "HeadClasses of 2 x 3 heads", "  2 local, by layer.head: 11.0, 14.2", "  2 global, by layer.head: 11.1, 14.0",
    ]  # fmt: skip
    assert classes.to_frame().loc[14, 0]["class"] == "global"
    assert classes.of([14]).heads("local") == [(14, 2)]
    for call in (lambda: classes.name(0, 0), lambda: classes.of([3])):
        with pytest.raises(ValueError, match="not among 11, 14"):
            call()
    with pytest.raises(ValueError, match="one for each of the 2 rows"):
        HeadClasses(classes.local, classes.global_, (1, 2, 3))
    profile = HeadProfile.empty((11, 14), 3).add(torch.rand(2, 3, 5))
    assert profile.classes().layers == (11, 14)


def test_segments_as_text_and_as_a_frame(model):
    found = segments.attention(model, tokens()[:1], (0, 4, 8, 12, 15, 18, 23), layers=[1, 4])
    lines = repr(found).splitlines()
    assert lines[0] == "SegmentAttention of 6 segments, 23 tokens; layers 1, 4, 3 heads each"
    assert "tokens 0 to 3" in lines[1]
    frame = found.to_frame()
    assert frame.loc[4, 2, 1].received == pytest.approx(float(found.received()[1, 2, 1]))
    assert frame.loc[4, 2].first_token.tolist() == [0, 4, 8, 12, 15, 18]
    assert frame.loc[4, 2].tokens.sum() == 23


def test_models_say_what_they_are_in_two_lines(tmp_path):
    described = models.describe(str(save_tiny_model(tmp_path / "small")))
    assert repr(described).splitlines() == [
        "Description small: 6 layers, 4 heads each (2 of keys), 40 tokens known",
        f"  weights not read yet, in {tmp_path / 'small'}",
    ]
    loaded = models.load(described, dtype="float32", device="cpu")
    first, second = repr(loaded).splitlines()
    assert first.startswith("LoadedModel small: 6 layers")
    assert second == f"  LlamaForCausalLM, {loaded.model.num_parameters():,} parameters, float32 on cpu"


def test_cells_of_a_notebook_hold_text_tables_and_curves(run, model):
    assert Tags(run._repr_html_()).seen.count("path") == 2  # a curve for WAAD and one for FAI, none for the map
    profile = HeadProfile.empty((1, 4), 3)
    assert Tags(profile._repr_html_()).seen == ["pre"]
    for table in (
        profile.add(torch.rand(2, 3, 5)),
        heads.classify(torch.rand(2, 3)),
        segments.attention(model, tokens()[:1], (0, 9, 23)),
    ):
        assert {"pre", "table"} <= set(Tags(table._repr_html_()).seen)
    assert not {"script", "iframe"} & set(Tags(run._repr_html_()).seen)
