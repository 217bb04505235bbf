"""Token credit on verl's batches, without verl: call `shape_advantages` after its own advantages are computed.

The layout is that of verl 0.9.1 and 0.10.0.dev. A padded batch has `prompts` (B, P), padded on the left, and
`responses` (B, R), padded on the right; tensors of response tokens are (B, R), and `response_mask` is 0 where the
policy didn't write the token. In the V1 trainer the same are jagged nested tensors, (B, j).

Where the model gets packed rows, masks can be padded all the same, and then end with columns that belong to no token:
`query_mask` puts a micro-batch's mask into the layout of its `input_ids`.

`register_adv_est` can't be used: an estimator gets rewards and masks, not the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnstats.integrations.batches import Batch, scale_advantages, signals_of
from attnstats.integrations.settings import RhythmCredit


def query_mask(batch: Batch) -> Tensor:
    """The response tokens of a micro-batch in the layout in which the model gets them, for `Capture.query_mask`.

    Args:
        batch: "input_ids" and "response_mask". With nested input_ids, which the model gets as one packed row, either
            a nested response_mask (B, r), or a padded one (B, R) beside the padded "attention_mask" (B, P + R) that
            says which of its columns are tokens.

    Returns:
        bool, (1, N) for nested input_ids of N tokens in all, else (B, P + R).

    Raises:
        ValueError: a field is missing, or two have lengths that can't be of the same rows.

    Example:
        >>> import torch
        >>> ids = torch.nested.as_nested_tensor([torch.arange(3), torch.arange(4)], layout=torch.jagged)
        >>> attended = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
        >>> padded = {"input_ids": ids, "attention_mask": attended, "response_mask": attended[:, 2:]}
        >>> query_mask(padded).int()
        tensor([[0, 1, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    ids, mask = batch["input_ids"], batch["response_mask"]
    if not ids.is_nested:
        if mask.is_nested or mask.dim() != 2 or len(mask) != len(ids) or mask.shape[1] > ids.shape[1]:
            raise ValueError(
                f"response_mask must be padded (B, R) beside input_ids {tuple(ids.shape)}, got {_described(mask)}"
            )
        return pad(mask.bool(), (ids.shape[1] - mask.shape[1], 0))
    lengths = torch.tensor([len(row) for row in ids.unbind()], dtype=torch.int64, device="cpu")
    if mask.is_nested:
        rows = zip(mask.unbind(), lengths.tolist(), strict=True)
        return torch.cat([pad(row.bool(), (_prompt_length(length, row), 0)) for row, length in rows])[None]
    if "attention_mask" not in set(batch.keys()):
        raise ValueError(
            "batch has no attention_mask; beside nested input_ids it says how many columns of a padded response_mask "
            "are tokens. Keep it in the batch, or pass a nested response_mask"
        )
    attended = batch["attention_mask"]
    if attended.is_nested or attended.dim() != 2 or len(attended) != len(mask) or attended.shape[1] < mask.shape[1]:
        raise ValueError(
            f"attention_mask must be padded (B, P + R) beside response_mask {_described(mask)}, got "
            f"{_described(attended)}"
        )
    attended = attended.bool()
    mask = pad(mask.bool(), (attended.shape[1] - mask.shape[1], 0))
    if not torch.equal(attended.sum(1), lengths.to(attended.device)):
        raise ValueError(
            f"attention_mask has {attended.sum(1).tolist()} tokens and input_ids {lengths.tolist()}; both must be of "
            "the same rows"
        )
    if bool((mask & ~attended).any()):
        raise ValueError("response_mask counts tokens that attention_mask says are padding")
    return mask[attended][None]


def _prompt_length(length: int, mask: Tensor) -> int:
    """The number of tokens before a response in a row of `length` tokens."""
    if len(mask) > length:
        raise ValueError(
            f"response_mask has {len(mask)} entries for a sequence of {length} tokens: it is padded; cut each row to "
            "its response"
        )
    return length - len(mask)


def _described(x: Tensor) -> str:
    return "a nested tensor" if x.is_nested else str(tuple(x.shape))


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
        raise ValueError(
            f"curve and response_mask must both be nested, or neither; got {_described(curve)} and "
            f"{_described(response_mask)}: a padded mask does not say how long its responses are"
        )
    if not curve.is_nested:
        if curve.dim() != 2 or len(curve) != len(response_mask) or curve.shape[1] < response_mask.shape[1]:
            raise ValueError(
                f"curve must be (B, P + R) beside response_mask (B, R) {tuple(response_mask.shape)}, "
                f"got {tuple(curve.shape)}"
            )
        return curve[:, curve.shape[1] - response_mask.shape[1] :]
    rows = zip(curve.unbind(), response_mask.unbind(), strict=True)
    parts = [row[_prompt_length(len(row), mask) :] for row, mask in rows]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


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
