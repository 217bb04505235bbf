"""The one check of what kind of tensor came in, for every function that users pass tensors to.

A subclass of Tensor can mean something else than the numbers in its storage: a part of a sequence, several sequences,
values with a mask, or nothing at all. It is refused by name, with what would work.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import Buffer, Parameter

ORDINARY = frozenset((Tensor, Parameter, Buffer))
# By the name of the class, as most of their modules are slow to import.
REMEDIES = {
    "NestedTensor": "pad it (torch.nested.to_padded_tensor), or pack the sequences for attnstats.varlen_attention",
    "DTensor": "each rank passes its own part, x.to_local(), and attnstats.distributed joins the statistics; or pass "
    "x.full_tensor()",
    "MaskedTensor": "pass its get_data(), and its mask as attn_mask or key_padding_mask",
    "CausalBias": "only attn_mask takes it, of attention, patch_sdpa and nn; elsewhere pass is_causal=True",
    "AsyncCollectiveTensor": "pass x.wait()",
}


def check_plain(**tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor, by argument name, whose numbers are not those of a plain dense tensor.

    A subclass that changes nothing is plain, and so are the stand-ins for tensors while a graph is traced. What is no
    tensor at all passes: it is refused where its type is known.

    Example:
        >>> import torch
        >>> check_plain(query=torch.eye(2).to_sparse())
        Traceback (most recent call last):
        TypeError: query must be a plain dense tensor, got one with layout torch.sparse_coo; pass x.to_dense()
    """
    for name, x in tensors.items():
        if x is None or not isinstance(x, Tensor):
            continue
        kind = type(x)
        if kind not in ORDINARY and _has_own_meaning(kind):
            remedy = REMEDIES.get(kind.__name__, "pass x.as_subclass(torch.Tensor) if its numbers are what is meant")
            raise TypeError(f"{name} must be a plain dense tensor, got a {kind.__module__}.{kind.__name__}; {remedy}")
        if x.is_nested:
            raise TypeError(f"{name} must be a plain dense tensor, got a nested tensor; {REMEDIES['NestedTensor']}")
        if x.layout is not torch.strided:
            raise TypeError(f"{name} must be a plain dense tensor, got one with layout {x.layout}; pass x.to_dense()")


def _has_own_meaning(kind: type[Tensor]) -> bool:
    if kind.__module__.startswith("torch._subclasses."):  # fake and functional tensors, in tracing
        return False
    function, inherited = (getattr(c.__torch_function__, "__func__", c.__torch_function__) for c in (kind, Tensor))
    disabled = torch._C._disabled_torch_function_impl
    return function not in (inherited, disabled) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
