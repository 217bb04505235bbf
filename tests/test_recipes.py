"""The recipes of docs/statistics.md, as files from outside the package, on every backend; those of docs/recipes.md."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attnstats
from attnstats import WAAD
from tests.cases import Case, check
from tests.tiny import small_llama

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "statistics.md"


def recipe(name: str, folder: Path) -> Any:
    """The recipe's code as a module: a kernel's source must stand in a file."""
    (code,) = re.findall(rf"<!-- recipe: {name} -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def log_distance(tmp_path_factory):
    return recipe("log_distance", tmp_path_factory.mktemp("recipe")).LogDistance


@pytest.fixture(scope="module")
def effective_keys(tmp_path_factory):
    return recipe("effective_keys", tmp_path_factory.mktemp("recipe")).EffectiveKeys


CASES = [
    Case(),
    Case(is_causal=False, padding="left"),
    Case(window_size=(9, 0), softcap=5.0, sinks=True),
    Case(packed=((5, 9), (0, 3), (12, 12))),
    Case(query_length=3, key_length=70, dtype="float16"),
]


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_distance_weighted_statistic_from_outside(log_distance, case, backend, where):
    check(case, backend, where, statistics=[log_distance(2.0), WAAD()])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_row_statistic_from_outside(effective_keys, case):
    check(case, "tiled", statistics=[effective_keys(), WAAD()])


def test_the_kernels_refuse_a_whole_row_statistic_they_do_not_know(effective_keys, device):
    query, key, value = Case().tensors(device)
    with pytest.raises(ValueError, match=r"backend='triton': the kernels compute Entropy and MaxLogit.*EffectiveKeys"):
        attnstats.attention(query, key, value, statistics=[effective_keys()], enable_gqa=True, backend="triton")


def test_both_are_captured_live(log_distance, effective_keys):
    model = small_llama(num_hidden_layers=2)
    statistics = [log_distance(), effective_keys()]
    with attnstats.capture(model, statistics=statistics, layers="all", live=True) as run:
        ids = model.generate(torch.arange(12)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with attnstats.capture(model, statistics=statistics, layers="all") as whole:
        model(ids[:, :-1])
    for statistic in statistics:
        torch.testing.assert_close(run[statistic], whole[statistic], rtol=1e-5, atol=1e-5)


def test_a_distance_weighted_statistic_carries_gradients(log_distance):
    query, key, value = (x.double().requires_grad_() for x in Case(group=1).tensors())
    gradients = []
    for backend in ("tiled", "reference"):
        options = {"statistics": [log_distance()], "differentiable": True, "backend": backend}
        results = attnstats.attention(query, key, value, **options).statistics
        gradients.append(torch.autograd.grad(results["log_distance"].square().sum(), (query, key)))
    torch.testing.assert_close(*gradients)


def test_every_recipe_names_its_paper_and_is_compared_with_eager_maps():
    """That the comparisons hold is the page's own test."""
    table, *sections = (DOCS / "recipes.md").read_text(encoding="utf-8").split("\n### ")
    recipes = dict(section.split("\n", 1) for section in sections)
    assert len(recipes) > 10
    for name, text in recipes.items():
        papers = re.findall(r"arxiv.org/abs/(\d{4}\.\d{5})", text)
        assert papers, name
        assert set(papers) & set(re.findall(r"\[(\d{4}\.\d{5})\]", table)), name
        assert re.search(r">>> .*same\(.*\n(?:\(?True)", text), name
