"""Options as the values of an operator's schema, and back."""

import json
from dataclasses import dataclass

import pytest

from attnstats import FAI, LSE, WAAD, Entropy, MaxLogit, PooledMap, Received, RowStatistic, SinkMass
from attnstats.core import wire
from attnstats.core.options import Options

CATALOGUE = [
    WAAD(5), FAI(2, 20), FAI(3, None), Entropy(), LSE(), Received(4), PooledMap((0, 3, 37), 5), SinkMass(), MaxLogit(),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Squared(RowStatistic):
    cap: int = 5

    def weight(self, distance):
        return distance.abs().clamp(max=self.cap) ** 2


Module = Squared


@pytest.mark.parametrize("statistic", CATALOGUE, ids=str)
def test_the_catalogue_as_text(statistic):
    text = wire.encode_statistics((statistic,))
    assert json.loads(text)[0][0] == statistic.name
    assert wire.decode_statistics(text) == (statistic,)


def test_classes_from_outside_the_catalogue():
    @dataclass(frozen=True, slots=True)
    class Squared(RowStatistic):  # a namesake, of another weight
        cap: int = 5

        def weight(self, distance):
            return distance.abs() * 3

    for statistic in (Module(4), Squared(4)):
        assert wire.decode_statistics(wire.encode_statistics((statistic,))) == (statistic,)
    with pytest.raises(ValueError, match="elsewhere:Gone, which nothing in this process defines"):
        wire.decode_statistics('[["elsewhere:Gone", 3]]')


@pytest.mark.parametrize("heads", [None, [2, 0], {"waad": [1], FAI(2, 20): (0, 3)}])
def test_options_come_back(heads):
    options = Options(statistics=(WAAD(5), FAI(2, 20)), window_size=(None, 3), scale=2, heads=heads)
    back = wire.decode(wire.encode(options))
    assert back._replace(heads=None) == options._replace(heads=None, window_size=(-1, 3))
    if isinstance(heads, dict):
        assert back.heads == {"waad": (1,), FAI(2, 20): (0, 3)}
    else:
        assert back.heads == (None if heads is None else tuple(heads))
