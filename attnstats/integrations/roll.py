"""Token credit on ROLL's batches, without ROLL: call `shape_advantages` after its `compute_advantage`.

The layout is that of ROLL 0.3.0 (commit 8eb27cc, read, not run). A row of S tokens holds prompt and response, padded on
the right, and `response_mask` (B, S) marks the response. Tensors computed from logits (log-probabilities, entropy,
advantages) are (B, S - 1): entry j belongs to token j + 1, which row j predicts; ROLL cuts its mask to match,
`response_mask[:, 1:]`. WAAD and FAI of a token are those of its own row, (B, S), and are cut here.
"""

from __future__ import annotations

import torch

from attnstats.integrations.batches import Batch, scale_shifted_advantages
from attnstats.integrations.settings import RhythmCredit


def shape_advantages(
    batch: Batch, settings: RhythmCredit | None = None, *, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Scale a batch's advantages by the credit's weights, in place.

    Args:
        batch: `DataProto.batch`, or any mapping, with "advantages" (B, S - 1); "response_mask" (B, S), 0 and 1; and
            those of "waad", "fai", "fai_valid" (B, S) and "entropy" (B, S - 1) that the credit needs. Samples that
            `final_response_mask` drops have advantages of 0 already.
        settings: the credit; the paper's by default.
        generator: for kind="random".

    Returns:
        Means over the response tokens, to log, as `attnstats.integrations.verl.shape_advantages`. "gamma" in the
        batch is (B, S - 1).

    Raises:
        ValueError, TypeError: a field is missing or has a wrong shape or dtype.
    """
    return scale_shifted_advantages(batch, RhythmCredit() if settings is None else settings, generator)
