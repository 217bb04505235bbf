"""The tiny model that most tests of a study share (a file with another one defines its own), and what is in memory."""

import weakref

import numpy as np
import pytest
import torch

from attnstats.study import models
from attnstats.study.store import Store
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder):
    return models.load(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def alive(monkeypatch):
    """A list with the largest number of tensors of items that were in memory at once."""
    living, most = weakref.WeakSet(), [0]

    class Array(np.ndarray):
        """numpy's own arrays can't be in a set."""

        __hash__ = object.__hash__

        def __eq__(self, other):
            return self is other

    read = Store.read

    def counted(self, index, names=None):
        tensors, texts = read(self, index, names)
        arrays = {name: tensor.numpy().copy().view(Array) for name, tensor in tensors.items()}
        living.update(arrays.values())
        most[0] = max(most[0], len(living))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, texts

    monkeypatch.setattr(Store, "read", counted)
    return most
