"""Token credit on verl's batches, without verl: call `shape_advantages` after its own advantages are computed.

The layout is that of verl 0.10.0.dev (commit 1dda039, read, not run). A padded batch has `prompts` (B, P), padded on
the left, and `responses` (B, R), padded on the right; tensors of response tokens are (B, R), and `response_mask` is 0
where the policy didn't write the token. In the V1 trainer the same are jagged nested tensors, (B, j).

`register_adv_est` can't be used: an estimator gets rewards and masks, not the batch. docs/trainers.md says where the
calls go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstats.integrations.batches import Batch, scale_advantages, signals_of
from attnstats.integrations.settings import RhythmCredit


def response_part(curve: Tensor, response_mask: Tensor) -> Tensor:
    """The part of a curve over prompt and response that belongs to the response, without a shift.

    verl's own helpers take the row before each token, from whose logits it was drawn. WAAD and FAI of a token are those
    of its own row.

    Args:
        curve: (B, P + R) with the responses at the right end, or nested (B, j).
        response_mask: (B, R), or nested (B, r).

    Returns:
        (B, R), or nested (B, r).

    Example:
        >>> import torch
        >>> response_part(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[1, 1]]))
        tensor([[2., 3.]])
    """
    if curve.is_nested != response_mask.is_nested:
        raise ValueError("curve and response_mask must both be nested, or neither")
    if not curve.is_nested:
        if curve.dim() != 2 or len(curve) != len(response_mask) or curve.shape[1] < response_mask.shape[1]:
            raise ValueError(
                f"curve must be (B, P + R) beside response_mask (B, R) {tuple(response_mask.shape)}, "
                f"got {tuple(curve.shape)}"
            )
        return curve[:, curve.shape[1] - response_mask.shape[1] :]
    rows = zip(curve.unbind(), response_mask.unbind(), strict=True)
    return torch.nested.as_nested_tensor([row[len(row) - len(mask) :] for row, mask in rows], layout=torch.jagged)


def shape_advantages(
    batch: Batch, settings: RhythmCredit | None = None, *, generator: torch.Generator | None = None
) -> dict[str, float]:
    """Scale a padded batch's advantages by the credit's weights, in place.

    Args:
        batch: `DataProto.batch`, or any mapping, with (B, R) each: "advantages"; "response_mask", 0 and 1; and those
            of "waad", "fai", "fai_valid" and "entropy" that the credit needs.
        settings: the credit; the paper's by default.
        generator: for kind="random".

    Returns:
        Means over the response tokens, to log: "rhythm/amplified", the share of tokens with a weight above 1,
        "rhythm/gamma", and "rhythm/waad" and "rhythm/fai" where the credit needs them. NaN without response tokens.

    Raises:
        ValueError, TypeError: a field is missing or has a wrong shape or dtype.
    """
    settings = RhythmCredit() if settings is None else settings
    return scale_advantages(batch, settings, signals_of(batch, settings), batch["response_mask"].bool(), generator)
