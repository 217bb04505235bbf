"""The verl adapter on batches of the shape that verl documents; verl itself is not needed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnstats import FAI, WAAD, capture
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
    with pytest.raises(ValueError, match=r"both be nested, or neither; got a nested tensor and .* a padded mask"):
        verl.response_part(nested, torch.ones(2, 2))
    longer = torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="response_mask has 3 entries for a sequence of 2 tokens: it is padded"):
        verl.response_part(nested, longer)


def test_a_nested_batch_is_refused():
    batch = padded_batch()
    lengths = [12, 7, 1, 9]
    fields = ("advantages", "response_mask", "waad", "fai", "fai_valid")
    nested = {
        name: torch.nested.as_nested_tensor(
            [row[:length] for row, length in zip(batch[name], lengths, strict=True)], layout=torch.jagged
        )
        for name in fields
    }
    with pytest.raises(TypeError, match=r"advantages must be a plain dense tensor, got a .*NestedTensor; pad it"):
        verl.shape_advantages(nested)
    with pytest.raises(TypeError, match=r"response_mask must be a plain dense tensor, got a .*NestedTensor"):
        verl.shape_advantages(nested | {"advantages": batch["advantages"]})


# A pass of the policy


def rows_of_engine_tests() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask (B, 32), padded on both sides, as verl's tests of its engines make them."""
    torch.manual_seed(1)
    ids = torch.randint(50, (4, 32))
    place = torch.arange(32)
    left, right = torch.tensor([3, 0, 6, 1]), torch.tensor([5, 0, 9, 2])
    return ids, ((place >= left[:, None]) & (place < 32 - right[:, None])).long()


def without_padding(values: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    rows = [row[mask] for row, mask in zip(values, attended.bool(), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("masks", ["padded", "nested"])
def test_a_padded_response_mask_beside_packed_rows(masks):
    """verl removes the padding of its tokens, and leaves that of the response mask."""
    ids, attended = rows_of_engine_tests()
    response = attended[:, 16:].clone()
    response[1, 3:6] = 0  # of a tool
    packed = {"input_ids": without_padding(ids, attended), "attention_mask": attended, "response_mask": response}
    if masks == "nested":
        packed["response_mask"] = without_padding(response, attended[:, 16:])
    position_ids = without_padding(attended.cumsum(1) - 1, attended)

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    statistics = [WAAD(10), FAI(4, 20)]
    with capture(policy, statistics=statistics, layers="all", reduce=("layers", "heads")) as run, torch.no_grad():
        run.query_mask = verl.query_mask(packed)
        policy(
            input_ids=packed["input_ids"].values()[None],
            position_ids=position_ids.values()[None],
            use_cache=False,
        )
        found = {name: run[name][0].split(attended.sum(1).tolist()) for name in ("waad", "fai")}
    eager = LlamaForCausalLM(policy.config).eval()
    eager.load_state_dict(policy.state_dict())
    eager.set_attn_implementation("eager")
    for i, row in enumerate(packed["input_ids"].unbind()):
        counted = torch.nn.functional.pad(response[i], (16, 0))[attended[i].bool()].bool()
        with torch.no_grad():
            weights = eager(row[None], output_attentions=True).attentions[0][0].mean(0).double()
        distance = (torch.arange(len(row))[:, None] - torch.arange(len(row))).clamp(min=0)
        seen = (distance >= 4) & (distance <= 20) & counted[:, None]
        fai = (weights * seen).sum(0) / seen.sum(0).clamp(min=1)
        waad = (weights * distance.clamp(max=10)).sum(1)
        torch.testing.assert_close(found["fai"][i], fai.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found["waad"][i], waad.float(), rtol=0, atol=1e-5)


def test_query_mask_of_a_padded_batch():
    ids, attended = rows_of_engine_tests()
    mask = verl.query_mask({"input_ids": ids, "response_mask": attended[:, 20:]})
    assert torch.equal(mask, attended.bool() & (torch.arange(32) >= 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": None}, "batch has no attention_mask; beside nested input_ids .* padded response_mask"),
        ({"attention_mask": torch.ones(4, 32)}, r"attention_mask has \[32, 32, 32, 32\] tokens and input_ids \[24, "),
        ({"attention_mask": torch.ones(4, 8)}, r"attention_mask must be padded \(B, P \+ R\) .*got \(4, 8\)"),
        ({"response_mask": torch.ones(4, 16)}, "response_mask counts tokens that attention_mask says are padding"),
        ({"input_ids": torch.ones(4, 8)}, r"response_mask must be padded \(B, R\) beside input_ids \(4, 8\)"),
        (
            {"response_mask": torch.nested.as_nested_tensor([torch.ones(40)] * 4, layout=torch.jagged)},
            "response_mask has 40 entries for a sequence of 24 tokens: it is padded",
        ),
    ],
    ids=["no attention mask", "other rows", "too short", "padding counted", "short ids", "long mask"],
)
def test_masks_that_cannot_be_cut(changes, message):
    ids, attended = rows_of_engine_tests()
    batch = {"input_ids": without_padding(ids, attended), "attention_mask": attended, "response_mask": attended[:, 16:]}
    batch = {name: x for name, x in (batch | changes).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        verl.query_mask(batch)


def test_no_framework_is_imported():
    program = (
        "import sys, attnstats.credit, attnstats.integrations.verl, attnstats.integrations.roll;"
        "print(*{'transformers', 'accelerate', 'trl', 'verl', 'roll', 'tensordict', 'ray'} & set(sys.modules))"
    )
    assert python("-c", program).split() == []
