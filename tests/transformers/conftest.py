"""What the tests of captured models share: tiny models, and a compiler without graphs of other tests."""

import pytest

from tests.tiny import tiny


@pytest.fixture(params=["llama", "qwen3", "mistral", "granite"])
def model(request):
    return tiny(request.param, **({"attention_multiplier": 0.1} if request.param == "granite" else {}))


@pytest.fixture
def llama():
    return tiny()


@pytest.fixture
def forgotten_graphs():
    from torch import _dynamo

    _dynamo.reset()
    _dynamo.utils.counters.clear()
    yield
    _dynamo.reset()
