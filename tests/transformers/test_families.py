"""Every family of transformers gets the verdict that the table says, and docs/families.md has that table."""

import warnings

import pytest
import torch
import transformers

from tests import families, verdicts
from tests.tiny import by_definition

VERSION, TABLE = verdicts.read_table()
SAME_VERSION = transformers.__version__.split(".")[:2] == VERSION.split(".")[:2]


def offered():
    return {**families.causal_families(), **families.OTHERS}


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore", "default::tests.verdicts.Changed")
@pytest.mark.parametrize("family", sorted(TABLE))
def test_the_verdict_is_that_of_the_table(family):
    if family not in offered():
        pytest.skip(f"transformers {transformers.__version__} has no family {family}; the table is of {VERSION}")
    try:
        verdict = verdicts.judged(family)
    except families.NotBuilt as error:
        if SAME_VERSION:
            raise
        pytest.skip(f"transformers {transformers.__version__} builds no tiny {family}: {error.__cause__}")
    if verdict == TABLE[family]:
        return
    message = f"{family}: {': '.join(verdict)}; the table says {': '.join(TABLE[family])}"
    if SAME_VERSION:
        pytest.fail(f"{message}; if that is right, run python -m tests.verdicts --write")
    warnings.warn(f"{message}, of transformers {VERSION}", verdicts.Changed, stacklevel=1)


def test_families_that_are_not_in_the_table_are_named():
    unlisted = sorted(set(offered()) - set(TABLE))
    if SAME_VERSION:
        assert not unlisted, "run python -m tests.verdicts --write"
    elif unlisted:
        warnings.warn(f"transformers {transformers.__version__} has families not judged: {unlisted}", stacklevel=1)


def test_the_document_has_the_table():
    assert verdicts.summary(VERSION, TABLE) in verdicts.DOCUMENT.read_text()
    if SAME_VERSION:  # it names classes, which another version may have renamed
        assert verdicts.DOCUMENT.read_text() == verdicts.document(VERSION, TABLE)


# The judge itself


def spoil(monkeypatch, logits=0.0, weights=0.0):
    """Let the judge compare with eager logits and maps that are off by these shares and amounts."""
    eager_pass = verdicts.eager_pass

    def spoiled(model, inputs):
        expected, maps = eager_pass(model, inputs)
        return expected * (1 + logits), [m._replace(weights=m.weights + weights) for m in maps]

    monkeypatch.setattr(verdicts, "eager_pass", spoiled)


def test_wrong_numbers_are_no_verdict(monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, logits=1e-3)
        with pytest.raises(verdicts.Wrong, match="logits are off by"):
            verdicts.judge("llama")
    with monkeypatch.context() as patch:
        spoil(patch, weights=1e-3)
        with pytest.raises(verdicts.Wrong, match="WAAD"):
            verdicts.judge("llama")
    with monkeypatch.context() as patch:
        captured = verdicts._capture
        patch.setattr(verdicts, "_capture", lambda model, kind, layers, dense: captured(model, kind, [0, 2, 3], dense))
        with pytest.raises(verdicts.Wrong, match=r"layers \[1\], which did not report"):
            verdicts.judge("llama")


def test_a_fault_inside_transformers_is_no_verdict(monkeypatch):
    def broken(*_, **__):
        raise TypeError("inside the model")

    monkeypatch.setattr(transformers.LlamaModel, "forward", broken)
    with pytest.raises(TypeError, match="inside the model"):
        verdicts.judge("llama")


def test_definitions_by_hand():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])[None, None]
    real = torch.ones(1, 2, dtype=torch.bool)
    expected = {"WAAD": [[0.0, 0.25]], "MeanDistance": [[0.0, 0.25]], "Received": [[1.25, 0.75]]}
    for statistic in verdicts.LARGEST_FACTOR:
        if type(statistic).__name__ in expected:
            found = by_definition(statistic, weights, real, real)[0]
            assert found.tolist() == expected[type(statistic).__name__]


def test_tiny_models_attend_far_from_uniformly_and_beyond_their_windows():
    for family in ("llama", "gemma2", "llama4"):
        model = families.build(family)
        _, maps = verdicts.eager_pass(model, families.inputs(family, model, padded=False))
        assert all(m.weights[0, :, -1].max() > 3 / families.LENGTH for m in maps)
        seen = [int((m.weights[0, 0, -1] > 0).sum()) for m in maps]
        assert min(seen) <= families.WINDOW or family == "llama"
        assert max(seen) == families.LENGTH
