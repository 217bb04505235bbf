"""The golden files of token credit: remade byte for byte, and recomputed from A by the reference and credit.py."""

import json

import pytest
import torch

from attnstats import FAI, WAAD, credit, heads, reference
from tests import make_golden
from tests import plain_credit as plain

FILES = sorted(make_golden.FOLDER.glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf-8"))


def tensor(golden: dict, name: str) -> torch.Tensor:
    """One curve as a batch of one, in float64 or bool."""
    dtype = torch.bool if name in ("mask", "valid") else torch.float64
    return torch.tensor([golden[name]], dtype=dtype)


def indices(chosen: torch.Tensor) -> list[int]:
    return chosen[0].nonzero().flatten().tolist()


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def from_maps(golden: dict) -> dict[str, torch.Tensor]:
    """WAAD, FAI and where it is valid, from A: scores of ln A make the reference's softmax give A back."""
    maps = torch.tensor(golden["A"], dtype=torch.float64)[None]
    empty = torch.zeros(1, maps.shape[1], maps.shape[2], 1, dtype=torch.float64)
    statistics = [WAAD(golden["window"]), FAI(*golden["horizon"])]
    _, found = reference.attention(
        empty,
        empty,
        empty,
        statistics=statistics,
        attn_mask=maps.log(),
        is_causal=True,
        query_mask=tensor(golden, "mask"),
    )
    chosen = {name: torch.zeros(1, maps.shape[1], dtype=torch.bool) for name in ("local", "global")}
    for name, mask in chosen.items():
        mask[0, golden["heads"][name]] = True
    waad, fai = found[statistics[0]], found[statistics[1]]  # (1, H, T): one layer
    return {
        "waad": heads.class_mean(waad, chosen["local"])[None],
        "fai": heads.class_mean(fai, chosen["global"])[None],
        "valid": found.valid[statistics[1]],
    }


def test_files_are_remade_byte_for_byte():
    remade = {f"{golden.name}.json": make_golden.written(golden) for golden in make_golden.all_golden()}
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == remade


def test_rows_of_the_maps_are_attention(golden):
    maps = torch.tensor(golden["A"], dtype=torch.float64)
    assert torch.equal(maps, maps.tril())
    assert set(maps.sum(-1).flatten().tolist()) <= {0.0, 1.0}
    assert (maps.sum(-1)[:, tensor(golden, "mask")[0]] == 1).all()


def test_curves_from_the_maps(golden):
    curves = from_maps(golden)
    close(curves["waad"], golden["waad"])
    close(curves["fai"], golden["fai"])
    counted = tensor(golden, "mask")
    assert torch.equal(curves["valid"][counted], tensor(golden, "valid")[counted])


@pytest.mark.parametrize("origin", ["file", "maps"])
def test_credit(golden, origin):
    curves = {name: tensor(golden, name) for name in ("waad", "fai", "valid", "entropy")}
    if origin == "maps":
        curves |= from_maps(golden)
    mask, settings = tensor(golden, "mask"), golden["settings"]

    close(credit.delta(curves["waad"], mask), golden["delta"])
    chunk = credit.top_share(credit.delta(curves["waad"], mask), mask, settings["q"])
    sets = credit.coupled_sets(curves["waad"], curves["fai"], mask, valid=curves["valid"], **settings)
    assert indices(chunk) == golden["sets"]["chunk"]
    assert indices(sets.anchor) == golden["sets"]["anchor"]
    assert indices(sets.dominated) == golden["sets"]["dominated"]
    assert indices(sets.intro) == golden["sets"]["intro"]
    order = indices(mask)
    leads = [[t, order[order.index(t) - sets.lead[0, t]]] for t in indices(sets.dominated)]
    assert leads == golden["sets"]["intro_of"]

    for record in golden["gamma"]:
        signals = {name: curves[name] for name in plain.SIGNALS[record["credit"]]}
        close(getattr(credit, record["credit"])(**signals, mask=mask, **record["settings"]), record["weights"])
    coupled = torch.tensor([golden["gamma"][4]["weights"]], dtype=torch.float64)
    for record in golden["advantages"]:
        advantage = torch.tensor([record["advantage"]], dtype=torch.float64)
        close(credit.shape_advantages(advantage, coupled, record["sign"]), record["shaped"])
