"""What counts as a plain tensor, and the words for everything else."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attnstats
from attnstats import credit, reference
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


QUERY = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
PACKED = QUERY[0].transpose(0, 1)
BATCH = {"query": QUERY, "key": QUERY, "value": QUERY}
LSE = attnstats.attention(**BATCH).statistics.lse
TOKENS, BOUNDS = torch.ones(1, 5, dtype=torch.bool), torch.tensor([0, 2, 5], dtype=torch.int32)
MASKS = {"key_padding_mask": TOKENS, "query_mask": TOKENS, "sinks": torch.zeros(2)}
LENGTHS = {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS, "query_mask": TOKENS[0]}
BESIDE = {"query": QUERY, "key": QUERY, "lse": LSE, "statistics": ["waad"]}
MODULE = attnstats.nn.MultiheadAttention(8, 2, statistics=["waad"])
WITH_MASK = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}
TENSORS = {"query", "key", "value", "lse", "attn_mask", "waad", "mask"} | MASKS.keys() | LENGTHS.keys()
BORDERS = {
    "attention": (attnstats.attention, BATCH | MASKS | {"attn_mask": TOKENS[:, None, None]}),
    "varlen_attention": (attnstats.varlen_attention, {"query": PACKED, "key": PACKED, "value": PACKED} | LENGTHS),
    "statistics_from_lse": (attnstats.statistics_from_lse, BESIDE | MASKS | {"check": False}),
    "explain": (attnstats.explain, BATCH | MASKS),
    "reference": (reference.attention, BATCH | MASKS | WITH_MASK),
    "nn": (MODULE, dict.fromkeys(BATCH, QUERY[0, 0]) | {"key_padding_mask": ~TOKENS[0]}),
    "credit": (credit.local_chunk, {"waad": QUERY[0, :1, :, 0], "mask": TOKENS}),
}
CASES = [(name, argument) for name, (_, given) in BORDERS.items() for argument in given if argument in TENSORS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("border", "argument"), CASES)
def test_every_tensor_of_every_public_function_is_checked(border, argument):
    function, given = BORDERS[border]
    function(**given)
    for odd in (lambda x: masked_tensor(x, torch.ones_like(x).bool()), AsyncCollectiveTensor, lambda x: x.to_sparse()):
        with pytest.raises(TypeError, match=f"^{argument} must be a plain dense tensor, got "):
            function(**given | {argument: odd(given[argument])})


def test_a_causal_bias_has_positions_of_its_own():
    bias = causal_upper_left(5, 5)
    with pytest.raises(ValueError, match="attn_mask: this causal bias puts the first query at position 0, "):
        attnstats.attention(**BATCH, attn_mask=bias, query_offset=2)
    for name in ("key_padding_mask", "query_mask"):
        with pytest.raises(TypeError, match=rf"{name} must be .*CausalBias; only attn_mask takes it"):
            attnstats.attention(**BATCH, **{name: bias})
    plain = attnstats.attention(**BATCH, statistics=["waad"], window_size=(2, None))
    biased = attnstats.attention(**BATCH, statistics=["waad"], window_size=(2, None), attn_mask=bias, is_causal=False)
    assert torch.equal(plain.output, biased.output)
    assert torch.equal(plain.statistics["waad"], biased.statistics["waad"])


def test_traced_functions_check_too():
    def twice(x):
        check_plain(x=x)
        return 2 * x

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="eager")(X), 2 * X)
    assert torch.equal(torch.func.vmap(twice)(X), 2 * X)
