"""The verl adapter on batches of the shape that verl documents; verl itself is not needed."""

import pytest
import torch

from attnstats.integrations import verl
from attnstats.integrations.settings import RhythmCredit
from tests import plain_credit as plain
from tests.process import python

PROMPT, RESPONSE = 4, 12


class TensorDict:
    """As much of tensordict's as DataProto.batch shows: a batch size that is checked, keys, no `in`."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = dict(tensors)
        self._rows = {len(tensor) for tensor in tensors.values()}
        assert len(self._rows) == 1

    def keys(self):
        return self._tensors.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        assert len(tensor) in self._rows
        self._tensors[name] = tensor

    def __contains__(self, name: object) -> bool:
        raise NotImplementedError("TensorDict does not support membership checks with the `in` keyword")


def padded_batch(seed: int = 0) -> TensorDict:
    """Responses padded on the right, one of them with a tool's output in its middle, curves that are NaN elsewhere."""
    torch.manual_seed(seed)
    lengths = torch.tensor([12, 7, 1, 9])
    mask = (torch.arange(RESPONSE) < lengths[:, None]).long()
    mask[3, 2:5] = 0
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5])[:, None] * mask
    waad, fai, entropy = torch.rand(3, 4, RESPONSE).masked_fill(mask == 0, torch.nan)
    valid = torch.arange(RESPONSE) < lengths[:, None] - 2
    return TensorDict(
        {
            "prompts": torch.zeros(4, PROMPT, dtype=torch.long),
            "responses": torch.zeros(4, RESPONSE, dtype=torch.long),
            "response_mask": mask,
            "advantages": advantages,
            "returns": advantages.clone(),
            "waad": waad,
            "fai": fai,
            "fai_valid": valid,
            "entropy": entropy,
        }
    )


def written_out(batch, **settings) -> torch.Tensor:
    """Coupled-rhythm weights of every row, token by token."""
    signals = [batch[name].tolist() for name in ("response_mask", "waad", "fai", "fai_valid")]
    rows = zip(*signals, strict=True)
    return torch.tensor(
        [plain.respond(mask, lambda *s: plain.coupled_rhythm(*s, **settings), *row) for mask, *row in rows]
    )


def test_advantages_are_scaled_token_by_token():
    batch = padded_batch()
    before, gamma = batch["advantages"].clone(), written_out(batch)
    metrics = verl.shape_advantages(batch)
    assert torch.equal(batch["gamma"], gamma)
    assert torch.equal(batch["advantages"], before * gamma)
    assert torch.equal(batch["returns"], before)
    mask = batch["response_mask"] == 1
    assert (batch["advantages"][~mask] == 0).all()
    assert metrics["rhythm/amplified"] == pytest.approx((gamma[mask] > 1).double().mean().item())
    assert metrics["rhythm/gamma"] == pytest.approx(gamma[mask].mean().item())
    assert metrics["rhythm/waad"] == pytest.approx(batch["waad"][mask].mean().item())
    assert metrics["rhythm/fai"] == pytest.approx(batch["fai"][mask & batch["fai_valid"]].mean().item())


def test_settings_are_followed():
    batch = padded_batch(1)
    before = batch["advantages"].clone()
    settings = RhythmCredit(q=0.6, amp=2.0, alpha=0.25, k=2, sign="positive")
    verl.shape_advantages(batch, settings)
    gamma = written_out(batch, q=0.6, amp=2.0, alpha=0.25, k=2)
    assert torch.equal(batch["advantages"], torch.where(before > 0, before * gamma, before))


@pytest.mark.parametrize(
    ("kind", "fields", "absent"),
    [
        ("local", ["waad"], "fai"),
        ("global", ["fai", "fai_valid"], "waad"),
        ("random", [], "waad"),
        ("entropy", ["entropy"], "waad"),
        ("entropy-selection", ["entropy"], "waad"),
    ],
)
def test_only_what_a_credit_looks_at_is_needed(kind, fields, absent):
    full = padded_batch()
    batch = {name: full[name] for name in ("response_mask", "advantages", *fields)}
    metrics = verl.shape_advantages(batch, RhythmCredit(kind=kind), generator=torch.Generator().manual_seed(0))
    mask = batch["response_mask"] == 1
    assert not torch.equal(batch["gamma"][mask], torch.ones_like(batch["gamma"][mask]))
    assert (batch["gamma"][~mask] == 1).all()
    assert f"rhythm/{absent}" not in metrics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_advantages_keep_their_dtype(dtype):
    batch = padded_batch()
    batch["advantages"] = batch["advantages"].to(dtype)
    verl.shape_advantages(batch)
    assert batch["advantages"].dtype == dtype


def test_missing_field():
    full = padded_batch()
    batch = {name: full[name] for name in ("response_mask", "advantages", "waad")}
    with pytest.raises(ValueError, match=r"batch has no fai, fai_valid, which kind='coupled' looks at"):
        verl.shape_advantages(batch)


def test_advantages_of_another_layout():
    batch = padded_batch()
    batch["advantages"] = batch["advantages"][:, 1:]
    with pytest.raises(ValueError, match=r"advantages must have the shape \(4, 12\) of the response mask"):
        verl.shape_advantages(batch)


def test_response_part_of_a_padded_curve():
    curve = torch.arange(2.0 * (PROMPT + RESPONSE)).view(2, -1)
    assert torch.equal(verl.response_part(curve, torch.ones(2, RESPONSE)), curve[:, PROMPT:])


def test_response_part_of_a_nested_curve():
    prompts, responses = [3, 1, 4], [5, 1, 2]
    rows = [torch.arange(float(p + r)) for p, r in zip(prompts, responses, strict=True)]
    masks = [torch.ones(r, dtype=torch.long) for r in responses]
    nested = [torch.nested.as_nested_tensor(parts, layout=torch.jagged) for parts in (rows, masks)]
    part = verl.response_part(*nested)
    assert part.offsets().tolist() == nested[1].offsets().tolist()
    for found, row, prompt in zip(part.unbind(), rows, prompts, strict=True):
        assert torch.equal(found, row[prompt:])
    padded = torch.nested.to_padded_tensor(part, 0.0)
    assert padded.shape == (3, 5)


def test_nested_and_padded_are_not_mixed():
    nested = torch.nested.as_nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(ValueError, match="both be nested, or neither"):
        verl.response_part(nested, torch.ones(2, 2))


def test_no_framework_is_imported():
    program = (
        "import sys, attnstats.credit, attnstats.integrations.verl, attnstats.integrations.roll;"
        "print(*{'transformers', 'accelerate', 'trl', 'verl', 'roll', 'tensordict', 'ray'} & set(sys.modules))"
    )
    assert python("-c", program).split() == []
