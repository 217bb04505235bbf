"""Teacher forcing: statistics kept up to date while a model generates are those of one pass over the same tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnstats import WAAD, MeanDistance, Received, Statistic
from attnstats.transformers.capture import capture

# Another summation order changes hidden states in their last bits, and with them A of the layers after them.
TOLERANCE: dict[Statistic, float] = {WAAD(3): 3e-5, MeanDistance(): 5e-4, Received(): 1e-4}


def check_live(
    model: Any,
    inputs: dict[str, Any],
    new: int,
    statistics: Iterable[Statistic],
    query_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Generate so many tokens with a live capture and compare with one pass over the tokens that it names.

    Returns what was generated and the tokens that the model has seen.
    """
    statistics = tuple(statistics)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new} | options
    asked: dict[str, Any] = {"statistics": statistics, "layers": "all"}
    with torch.no_grad(), capture(model, **asked, live=True, query_mask=query_mask) as run:
        generated = model.generate(**inputs, **options)
        seen = run.tokens
    # The last token has not been through the model.
    assert run.length == seen.shape[1] == inputs["input_ids"].shape[1] + new - 1
    repeats = len(seen) // len(inputs["input_ids"])
    rest = torch.ones(len(seen), new - 1, dtype=torch.bool)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(repeats, 0).bool(), rest], 1)
    counted = None if query_mask is None else torch.cat([query_mask.repeat_interleave(repeats, 0), rest], 1)
    positions = {}
    if "position_ids" in inspect.signature(model.forward).parameters:  # generate counts real tokens alone
        positions["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), capture(model, **asked, query_mask=counted) as forced:
        model(seen, attention_mask=mask.long(), **positions)
    for s in statistics:
        torch.testing.assert_close(run[s], forced[s], rtol=0, atol=TOLERANCE.get(s, 3e-5))
        assert torch.equal(run.valid[s], forced.valid[s])
    return generated, seen
