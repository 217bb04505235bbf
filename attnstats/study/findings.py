"""The head profile of a set of analyses, and the couplings between their curves.

Both read analyses one at a time and keep a few numbers or the mean curves of each. couplings.py is the paper's study of
the couplings, over all layers and settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from attnstats.chance import Chance, Coupling
from attnstats.heads import HeadProfile, class_mean
from attnstats.identity import ModelIdentity
from attnstats.rhythm import Curves, couplings
from attnstats.study.analysis import Analysis

RECEIVERS = 20


def profile(analyses: Iterable[Analysis], model: ModelIdentity | None = None) -> HeadProfile:
    """The profile of the captured layers' heads over all responses.

    Raises:
        ValueError: there is no analysis.
    """
    total: HeadProfile | None = None
    for analysis in analyses:
        if total is None:
            total = HeadProfile.empty(analysis.layers, analysis.distance.shape[1], model)
        valid = analysis.response & analysis.received_valid
        total = total.add(analysis.head_mean_distance, analysis.response, analysis.head_received, valid)
    if total is None:
        raise ValueError("analyses is empty: a profile is of one response or more")
    return total


def curves(analysis: Analysis, receivers: Tensor) -> Curves:
    """The curves of a response; `receivers`, (L, H) bool, are the receiver heads of the corpus."""
    response = analysis.response
    received = class_mean(analysis.head_received, receivers)
    return Curves(
        waad=analysis.waad[response],
        fai=analysis.fai[response],
        receiver_fai=received[response],
        entropy=analysis.entropy[response],
        fai_valid=analysis.fai_valid[response],
        receiver_valid=analysis.received_valid[response],
    )


def coupled(analyses: Sequence[Analysis], heads: HeadProfile, chance: Chance = Chance()) -> tuple[Coupling, ...]:
    """The paper's three couplings over the responses (Table 2); none if no head is a receiver."""
    receivers = heads.receivers(RECEIVERS)
    if not receivers.any():
        return ()
    return couplings([curves(analysis, receivers) for analysis in analyses], chance=chance)
