"""Token credit: weights that scale the advantage of single response tokens (Sec. 5.2, Eq. 13-19).

Pure functions on (B, T) tensors and a bool response mask, independent of any model or framework; curves are averaged
over heads first (heads.class_mean). A row's response is its masked tokens in order, whatever lies between them, such as
padding or a tool's output; "the next token" is the next response token. Values outside the mask are never used. Weights
are constants and carry no gradient.

Source: Li et al., arXiv 2510.13554v2. docs/credit.md has the formulas, and golden files for other implementations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnstats.curves import (
    Responses,
    check_mask,
    check_signal,
    delta,
    delta_unchecked,
    lower_median,
    top_share,
    top_share_unchecked,
    working_dtype,
)

__all__ = [
    "CoupledSets",
    "Sign",
    "coupled_rhythm",
    "coupled_sets",
    "delta",
    "global_anchor",
    "high_entropy",
    "high_entropy_selection",
    "local_chunk",
    "random_tokens",
    "shape_advantages",
    "top_share",
]

Sign = Literal["both", "positive", "negative"]


@torch.no_grad()
def local_chunk(
    waad: Tensor, mask: Tensor, *, q: float = 0.4, amp: float = 1.5, bottom: bool = False, keep_mean: bool = False
) -> Tensor:
    """Local-chunk credit: `amp` on the top share of delta, where WAAD changes most to the next token (Eq. 14-15).

    Args:
        waad: (B, T) floating, WAAD averaged over the local heads; finite within the mask.
        mask: (B, T) bool, the response tokens.
        q: share of a row's response tokens that is amplified, in [0, 1]: `ceil(q * n)` of n.
        amp: weight of an amplified token, at least 1.
        bottom: amplify the lowest share instead (Table 5).
        keep_mean: divide each row by its mean weight, so that the credit only shifts weight between tokens.

    Returns:
        gamma (B, T) of waad's dtype, 1 outside the mask.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype, shape or range; NaN or infinity in waad within the mask.

    Example:
        >>> import torch
        >>> waad = torch.tensor([[2.0, 2.0, 7.0, 6.0, 6.0]])
        >>> local_chunk(waad, torch.ones(1, 5, dtype=torch.bool))
        tensor([[1.0000, 1.5000, 1.5000, 1.0000, 1.0000]])
    """
    check_signal("waad", waad, mask)
    chosen = top_share_unchecked(delta_unchecked(waad, mask), mask, q, bottom=bottom)
    return _amplified(chosen, mask, amp, waad.dtype, keep_mean)


@torch.no_grad()
def global_anchor(
    fai: Tensor,
    mask: Tensor,
    *,
    valid: Tensor | None = None,
    q: float = 0.4,
    amp: float = 1.5,
    bottom: bool = False,
    keep_mean: bool = False,
) -> Tensor:
    """Global-anchor credit: `amp` on the top share of FAI (Eq. 16-17).

    Args:
        fai: (B, T) floating, FAI averaged over the global heads; finite where it is within the mask and valid.
        mask, q, amp, bottom, keep_mean: as in `local_chunk`.
        valid: (B, T) bool, where FAI has a value (`Statistics.valid`); None: everywhere. The share is of all response
            tokens, and only valid ones are chosen: fewer than `ceil(q * n)` where fewer are valid.

    Returns:
        gamma (B, T) of fai's dtype, 1 outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.

    Example:
        >>> import torch
        >>> fai = torch.tensor([[0.1, 0.4, 0.2, 0.0, 0.0]])
        >>> valid = torch.tensor([[True, True, True, False, False]])
        >>> global_anchor(fai, torch.ones_like(valid), valid=valid, q=0.8)
        tensor([[1.5000, 1.5000, 1.5000, 1.0000, 1.0000]])
    """
    check_signal("fai", fai, mask, valid)
    return _amplified(top_share_unchecked(fai, mask, q, valid, bottom), mask, amp, fai.dtype, keep_mean)


@torch.no_grad()
def coupled_rhythm(
    waad: Tensor,
    fai: Tensor,
    mask: Tensor,
    *,
    valid: Tensor | None = None,
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    keep_mean: bool = False,
) -> Tensor:
    """Coupled-rhythm credit: `amp` on anchors, shared with the intro token of a locally dominated one (Eq. 18-19).

    `gamma = 1 + (amp - 1) * ([t anchor, not dominated] + (1 - alpha) * [t dominated] + alpha * [t intro token])`:
    the terms add where the sets overlap, and the intro token of several anchors counts once.

    Args:
        waad, fai, mask, valid: as in `local_chunk` and `global_anchor`.
        q, amp, keep_mean: as in `local_chunk`.
        alpha: share of a dominated anchor's bonus that its intro token gets, in [0, 1].
        k, tau_waad, tau_delta: as in `coupled_sets`.

    Returns:
        gamma (B, T) of waad's dtype, 1 outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.

    Example:
        >>> import torch
        >>> waad = torch.tensor([[8.0, 3.0, 2.0, 2.0, 9.0]])
        >>> fai = torch.tensor([[0.1, 0.0, 0.9, 0.0, 0.3]])
        >>> coupled_rhythm(waad, fai, torch.ones(1, 5, dtype=torch.bool))
        tensor([[1.2500, 1.0000, 1.2500, 1.0000, 1.5000]])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    responses, sets = _coupled_sets(waad, fai, mask, valid, q, k, tau_waad, tau_delta)
    dtype = working_dtype(waad.dtype)
    anchor, dominated, intro = (tokens.to(dtype) for tokens in (sets.anchor, sets.dominated, sets.intro))
    gamma = 1 + _bonus(amp) * (anchor - alpha * dominated + alpha * intro)
    return _finished(responses.spread(gamma), mask, waad.dtype, keep_mean)


@torch.no_grad()
def random_tokens(
    mask: Tensor,
    *,
    q: float = 0.4,
    amp: float = 1.5,
    generator: torch.Generator | None = None,
    keep_mean: bool = False,
) -> Tensor:
    """Random credit, the paper's control: `amp` on `ceil(q * n)` randomly drawn response tokens (Table 3).

    Args:
        mask, q, amp, keep_mean: as in `local_chunk`.
        generator: on mask's device; None: torch's default generator.

    Returns:
        gamma (B, T) float32, 1 outside the mask.

    Example:
        >>> import torch
        >>> gamma = random_tokens(torch.ones(1, 10, dtype=torch.bool), generator=torch.Generator().manual_seed(0))
        >>> (gamma == 1.5).sum().item()
        4
    """
    check_mask("mask", mask)
    drawn = torch.rand(mask.shape, generator=generator, device=mask.device, dtype=torch.float32)
    return _amplified(top_share_unchecked(drawn, mask, q), mask, amp, drawn.dtype, keep_mean)


@torch.no_grad()
def high_entropy(
    entropy: Tensor, mask: Tensor, *, q: float = 0.4, amp: float = 1.5, bottom: bool = False, keep_mean: bool = False
) -> Tensor:
    """High-entropy credit, the paper's baseline: `amp` on the top share of token entropy (Table 3).

    Args:
        entropy: (B, T) floating, entropy of the distribution that each token was drawn from; finite within the mask.
        mask, q, amp, bottom, keep_mean: as in `local_chunk`.

    Returns:
        gamma (B, T) of entropy's dtype, 1 outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.
    """
    check_signal("entropy", entropy, mask)
    return _amplified(top_share_unchecked(entropy, mask, q, bottom=bottom), mask, amp, entropy.dtype, keep_mean)


@torch.no_grad()
def high_entropy_selection(entropy: Tensor, mask: Tensor, *, q: float = 0.2) -> Tensor:
    """Weight 1 on the top share of token entropy and 0 on the rest (Wang et al. 2025, arXiv 2506.01939).

    Args:
        entropy: (B, T) floating, as in `high_entropy`.
        mask: (B, T) bool, the response tokens.
        q: share of a row's response tokens that keep their gradient, in [0, 1].

    Returns:
        gamma (B, T) of entropy's dtype, 0 or 1, 1 outside the mask.

    Raises:
        TypeError, ValueError: as `local_chunk`.

    Example:
        >>> import torch
        >>> high_entropy_selection(torch.tensor([[0.1, 2.0, 0.3, 0.4, 0.0]]), torch.ones(1, 5, dtype=torch.bool))
        tensor([[0., 1., 0., 0., 0.]])
    """
    check_signal("entropy", entropy, mask)
    return (top_share_unchecked(entropy, mask, q) | ~mask).to(entropy.dtype)


def shape_advantages(advantages: Tensor, gamma: Tensor, sign: Sign = "both") -> Tensor:
    """Advantages per token, `A[t] * gamma[t]` (Eq. 13).

    Args:
        advantages: (B,), (B, 1) or (B, T) floating.
        gamma: (B, T) floating, the weights of one of the credits.
        sign: the advantages that are scaled: "both" (v2), "positive" (v1) or "negative"; others stay unchanged.

    Returns:
        (B, T), in the wider dtype of the two.

    Raises:
        ValueError: an unknown sign, or shapes that don't match.

    Example:
        >>> import torch
        >>> shape_advantages(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 1.5], [1.5, 1.0]]), sign="positive")
        tensor([[ 1.0000,  1.5000],
                [-1.0000, -1.0000]])
    """
    if sign not in ("both", "positive", "negative"):
        raise ValueError(f'sign must be "both", "positive" or "negative", got {sign!r}')
    rows = advantages[:, None] if advantages.dim() == 1 else advantages
    if gamma.dim() != 2 or rows.shape not in (gamma.shape, (len(gamma), 1)):
        raise ValueError(
            f"advantages must be (B,), (B, 1) or (B, T) beside gamma (B, T), "
            f"got {tuple(advantages.shape)} beside {tuple(gamma.shape)}"
        )
    shaped = rows * gamma
    if sign == "both":
        return shaped
    return torch.where(rows > 0 if sign == "positive" else rows < 0, shaped, rows)


@dataclass(frozen=True, eq=False)
class CoupledSets:
    """The sets of Eq. 16 and 18, (B, T) each.

    Attributes:
        anchor: bool, Tglob.
        dominated: bool, D: the locally dominated anchors.
        intro: bool, I(D): their intro tokens.
        lead: int32, the number of response tokens from the intro token of a dominated anchor to it; 0 elsewhere.
    """

    anchor: Tensor
    dominated: Tensor
    intro: Tensor
    lead: Tensor


@torch.no_grad()
def coupled_sets(
    waad: Tensor,
    fai: Tensor,
    mask: Tensor,
    *,
    valid: Tensor | None = None,
    q: float = 0.4,
    k: int = 3,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> CoupledSets:
    """The anchors, the locally dominated ones among them, and the intro tokens that dominate those (Eq. 16, 18).

    An anchor t is dominated when `WAAD[t] <= tau_waad` and delta reaches `tau_delta` at one of the k response tokens
    before it; an anchor with no token before it is not. Its intro token is the one of the k with the greatest delta,
    the nearest to t among equals.

    Args:
        waad, fai, mask, valid, q: as in `local_chunk` and `global_anchor`.
        k: the number of response tokens before an anchor that can dominate it, at least 1.
        tau_waad, tau_delta: thresholds; None: the lower median over each response, for delta without its last token.

    Raises:
        TypeError, ValueError: as `local_chunk`.
    """
    responses, sets = _coupled_sets(waad, fai, mask, valid, q, k, tau_waad, tau_delta)
    return CoupledSets(*map(responses.spread, (sets.anchor, sets.dominated, sets.intro, sets.lead)))


def _coupled_sets(
    waad: Tensor,
    fai: Tensor,
    mask: Tensor,
    valid: Tensor | None,
    q: float,
    k: int,
    tau_waad: float | None,
    tau_delta: float | None,
) -> tuple[Responses, CoupledSets]:
    """`coupled_sets` on gathered responses, [B, T + 1] each."""
    check_signal("waad", waad, mask)
    check_signal("fai", fai, mask, valid)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    for name, tau in (("tau_waad", tau_waad), ("tau_delta", tau_delta)):
        if tau is not None and math.isnan(tau):
            raise ValueError(f"{name} must be a number, or None for each response's median; got {tau}")
    responses = Responses.of(mask)
    anchor = responses.gather(top_share_unchecked(fai, mask, q, valid))
    curve = responses.gather(waad.to(working_dtype(waad.dtype)))
    change = responses.delta(curve)
    low = curve <= (lower_median(curve, responses.length) if tau_waad is None else tau_waad)
    least = lower_median(change, responses.length - 1) if tau_delta is None else tau_delta

    reach = min(k, mask.shape[1])
    padded = torch.nn.functional.pad(change, (reach, 0), value=-torch.inf)
    before = [padded[:, reach - offset : -offset] for offset in range(1, reach + 1)]  # delta at t - offset
    greatest = functools.reduce(torch.maximum, before)
    dominated = anchor & low & (greatest >= least) & (greatest > -torch.inf)
    intro, lead, undecided = torch.zeros_like(anchor), torch.zeros_like(anchor, dtype=torch.int32), dominated
    for offset, earlier in enumerate(before, 1):  # the nearest first
        led = undecided & (earlier == greatest)
        intro[:, :-offset] |= led[:, offset:]
        lead += offset * led
        undecided = undecided & ~led
    return responses, CoupledSets(anchor, dominated, intro, lead)


def _amplified(chosen: Tensor, mask: Tensor, amp: float, dtype: torch.dtype, keep_mean: bool) -> Tensor:
    """gamma with `amp` on the chosen tokens."""
    return _finished(1 + _bonus(amp) * chosen.to(working_dtype(dtype)), mask, dtype, keep_mean)


def _finished(gamma: Tensor, mask: Tensor, dtype: torch.dtype, keep_mean: bool) -> Tensor:
    """gamma, 1 outside the mask, in the dtype to return and with mean 1 where the mean is kept."""
    if keep_mean:
        total = gamma.masked_fill(~mask, 0).sum(1, keepdim=True)
        gamma = torch.where(mask, gamma * (mask.sum(1, keepdim=True) / total), 1)
    return gamma.to(dtype)


def _bonus(amp: float) -> float:
    """`amp - 1`, the weight that an amplified token gains. Raises ValueError."""
    if not 1 <= amp < math.inf:
        raise ValueError(f"amp must be at least 1 and finite, got {amp}; below it a sum of terms could turn a sign")
    return amp - 1
