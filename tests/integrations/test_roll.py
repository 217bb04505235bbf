"""The ROLL adapter on batches of the shape that ROLL documents, the shifted mask included; without ROLL itself."""

import pytest
import torch

from attnstats import credit
from attnstats.integrations import roll
from attnstats.integrations.settings import RhythmCredit
from tests import plain_credit as plain
from tests.integrations.test_verl import TensorDict

LENGTH = 14
PROMPTS, RESPONSES = torch.tensor([3, 5, 1, 4]), torch.tensor([11, 6, 2, 1])


def batch_of(**changes) -> TensorDict:
    """Prompt, response, padding in one row; curves NaN outside the response; one sample dropped by the final mask."""
    torch.manual_seed(0)
    place = torch.arange(LENGTH)
    mask = ((place >= PROMPTS[:, None]) & (place < (PROMPTS + RESPONSES)[:, None])).long()
    final = mask[:, 1:] * torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None]
    waad, fai = torch.rand(2, 4, LENGTH).masked_fill(mask == 0, torch.nan)
    fields = {
        "input_ids": torch.zeros(4, LENGTH, dtype=torch.long),
        "response_mask": mask,
        "final_response_mask": final,
        "raw_advantages": torch.ones(4, LENGTH - 1),
        "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5])[:, None] * final,
        "waad": waad,
        "fai": fai,
        "fai_valid": place < (PROMPTS + RESPONSES - 2)[:, None],
        "entropy": torch.rand(4, LENGTH - 1).masked_fill(mask[:, 1:] == 0, torch.nan),
    }
    return TensorDict(fields | changes)


def test_entry_j_is_of_token_j_plus_1():
    batch = batch_of()
    before = batch["advantages"].clone()
    roll.shape_advantages(batch)
    for row in range(4):
        first, length = PROMPTS[row].item(), RESPONSES[row].item()
        tokens = slice(first, first + length)
        curves = (batch[name][row, tokens].tolist() for name in ("waad", "fai", "fai_valid"))
        gamma = torch.tensor(plain.coupled_rhythm(*curves))
        predicted = slice(first - 1, first - 1 + length)
        assert torch.equal(batch["gamma"][row, predicted], gamma)
        assert torch.equal(batch["advantages"][row, predicted], before[row, predicted] * gamma)
    outside = batch["response_mask"][:, 1:] == 0
    assert (batch["gamma"][outside] == 1).all()
    assert (batch["advantages"][outside] == 0).all()
    assert (batch["raw_advantages"] == 1).all()


def test_dropped_samples_stay_dropped():
    batch = batch_of()
    roll.shape_advantages(batch)
    assert (batch["advantages"][0] == 0).all()
    assert (batch["gamma"][0] != 1).any()


def test_entropy_comes_cut():
    batch = batch_of()
    roll.shape_advantages(batch, RhythmCredit(kind="entropy"))
    expected = credit.high_entropy(batch["entropy"], batch["response_mask"][:, 1:].bool())
    assert torch.equal(batch["gamma"], expected)


def test_metrics_are_means_over_response_tokens():
    batch = batch_of()
    metrics = roll.shape_advantages(batch, RhythmCredit(kind="local"))
    mask = batch["response_mask"] == 1
    assert metrics["rhythm/waad"] == pytest.approx(batch["waad"][mask].mean().item())
    assert metrics["rhythm/gamma"] == pytest.approx(batch["gamma"][mask[:, 1:]].mean().item())
    assert set(metrics) == {"rhythm/amplified", "rhythm/gamma", "rhythm/waad"}


@pytest.mark.parametrize("name", ["waad", "fai", "fai_valid"])
def test_a_curve_that_was_cut_already(name):
    batch = batch_of()
    batch[name] = batch[name][:, 1:]
    with pytest.raises(ValueError, match=rf"{name} must be \(B, 14\) beside response_mask \(4, 14\), got \(4, 13\)"):
        roll.shape_advantages(batch)


def test_an_entropy_that_was_not():
    batch = batch_of(entropy=torch.rand(4, LENGTH))
    with pytest.raises(ValueError, match=r"entropy must be \(B, 13\)"):
        roll.shape_advantages(batch, RhythmCredit(kind="entropy"))


def test_missing_field():
    batch = {"response_mask": torch.ones(1, 3), "advantages": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="batch has no waad, which kind='local' looks at"):
        roll.shape_advantages(batch, RhythmCredit(kind="local"))
