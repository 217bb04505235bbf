"""Tiny models that the tests of captured models share."""

import pytest

from tests.tiny import tiny


@pytest.fixture(params=["llama", "qwen3", "mistral", "granite"])
def model(request):
    return tiny(request.param, **({"attention_multiplier": 0.1} if request.param == "granite" else {}))


@pytest.fixture
def llama():
    return tiny()
