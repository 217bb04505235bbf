"""Statistics that users define: what breaks the contract of their base is refused by name, on every backend."""

from dataclasses import dataclass

import pytest
import torch

import attnstats
from attnstats import ColumnStatistic, RowStatistic, Statistic, WholeRowStatistic

BACKENDS = ["auto", "reference", "tiled", "triton"]


@dataclass(frozen=True)
class Bare(Statistic):
    pass


@dataclass(frozen=True)
class Unweighted(RowStatistic):
    pass


@dataclass(frozen=True)
class Rowless(WholeRowStatistic):
    pass


@dataclass(frozen=True)
class Shortened(RowStatistic):
    def weight(self, distance):
        return distance[..., :1]


@dataclass(frozen=True)
class Scalar(RowStatistic):
    def weight(self, distance):
        return 1.0


@dataclass(frozen=True)
class Wider(RowStatistic):
    """Its weight goes on beyond the band."""

    @property
    def band(self):
        return 0, 3

    def weight(self, distance):
        return (distance >= 0) & (distance <= 4)


@dataclass(frozen=True)
class Earlier(Wider):
    """Its weight begins before the band."""

    def weight(self, distance):
        return (distance >= -1) & (distance <= 3)


@dataclass(frozen=True)
class Reversed(RowStatistic):
    @property
    def band(self):
        return 3, 0

    def weight(self, distance):
        return distance == 0


@dataclass(frozen=True)
class Tailed(ColumnStatistic):
    @property
    def band(self):
        return 0, 3

    @property
    def tail(self):
        return 1.0

    def weight(self, distance):
        return torch.ones_like(distance)


@dataclass(frozen=True)
class Uneven(ColumnStatistic):
    """A mean whose weight is not 1 within its horizon."""

    @property
    def band(self):
        return 0, 3

    @property
    def horizon(self):
        return 0, 3

    def weight(self, distance):
        return ((distance >= 0) & (distance <= 3)) * 0.5


@dataclass(frozen=True)
class Infinite(RowStatistic):
    def weight(self, distance):
        return distance.float().log()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("statistic", "error", "message"),
    [
        (Bare(), TypeError, r"no backend computes Bare\(\); derive Bare from attnstats.RowStatistic"),
        (Rowless(), TypeError, r"no backend computes Rowless\(\).*define row\(weights, scores\)"),
        (Unweighted(), TypeError, r"Unweighted defines no weight\(distance\)"),
        (Shortened(), ValueError, r"Shortened\(\): weight\(distance\) must be real and of .* got torch.float64 \(1,\)"),
        (Scalar(), ValueError, r"Scalar\(\): weight\(distance\) must be real .* got float"),
        (Wider(), ValueError, r"Wider\(\): weight must be the tail 0.0 outside the band \(0, 3\).* at distance 4"),
        (Earlier(), ValueError, r"Earlier\(\): weight must be the tail 0.0 outside the band \(0, 3\).* at distance -1"),
        (Reversed(), ValueError, r"Reversed\(\): band must be \(lo, hi\) with lo <= hi, got \(3, 0\)"),
        (Tailed(), ValueError, r"Tailed\(\): the tail of a column statistic must be 0, got 1.0"),
        (Uneven(), ValueError, r"Uneven\(\): weight must be 1 within the horizon \(0, 3\)"),
        (Infinite(), ValueError, r"Infinite\(\): weight must be finite at every distance"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Statistic) else None,
)
def test_a_broken_contract_is_named(statistic, error, message, backend):
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(error, match=message):
        attnstats.attention(query, query, query, statistics=[statistic], backend=backend)
    with pytest.raises(error, match=message):
        attnstats.statistics_from_lse(query, query, query[..., 0], statistics=[statistic], backend=backend)


def test_a_broken_contract_is_named_in_a_graph():
    query = torch.zeros(1, 1, 4, 16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(query):
        return attnstats.attention(query, query, query, statistics=[Wider()]).statistics.lse

    with pytest.raises(ValueError, match=r"Wider\(\): weight must be the tail"):
        call(query)
