"""The tiny model that most tests of a study share; a file with another one defines its own `folder`."""

import pytest

from attnstats.study import models
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder):
    return models.load(str(folder), dtype="float32", device="cpu")
