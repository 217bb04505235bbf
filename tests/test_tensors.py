"""What counts as a plain tensor, and the words for everything else."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right

from attnstats.tensors import check_plain

X = torch.arange(6.0).view(2, 3)


class Named(Tensor):
    """A subclass that changes nothing."""


class Labelled(Tensor):
    """A subclass with its own behaviour."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


def fake():
    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize(
    "x",
    [X, torch.nn.Parameter(X), torch.nn.Buffer(X), X.as_subclass(Named), X.expand(4, 2, 3), fake(), None, 3],
    ids=["tensor", "parameter", "buffer", "renamed", "view", "fake", "none", "number"],
)
def test_plain(x):
    check_plain(query=x)


def distributed_tensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(X, init_device_mesh("cpu", (1,)))


ODD = {
    "jagged": (lambda: torch.nested.as_nested_tensor([X, X], layout=torch.jagged), "NestedTensor; pad it"),
    "nested": (lambda: torch.nested.as_nested_tensor([X, X]), "nested tensor; pad it .* attnstats.varlen_attention"),
    "masked": (lambda: masked_tensor(X, X > 0), r"MaskedTensor; pass its get_data\(\)"),
    "bias": (lambda: causal_lower_right(4, 6), r"torch.nn.attention.bias.CausalBias; .*is_causal=True"),
    "sparse": (X.to_sparse, r"layout torch.sparse_coo; pass x.to_dense\(\)"),
    "mkldnn": (X.to_mkldnn, r"layout torch._mkldnn; pass x.to_dense\(\)"),
    "dtensor": (distributed_tensor, r"DTensor; each rank passes its own part, x.to_local\(\)"),
    "collective": (lambda: AsyncCollectiveTensor(X), r"AsyncCollectiveTensor; pass x.wait\(\)"),
    "own": (lambda: X.as_subclass(Labelled), r"Labelled; pass x.as_subclass\(torch.Tensor\) if its numbers are"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_not_plain(kind, one_rank):
    make, message = ODD[kind]
    with pytest.raises(TypeError, match=f"^key must be a plain dense tensor, got .*{message}"):
        check_plain(query=X, key=make())


def test_traced_functions_check_too():
    def twice(x):
        check_plain(x=x)
        return 2 * x

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="eager")(X), 2 * X)
    assert torch.equal(torch.func.vmap(twice)(X), 2 * X)
