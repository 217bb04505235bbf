"""The public functions as operators of torch.library, for torch.compile, torch.export and whatever else traces.

A traced call is one node of the graph: `attnstats::attention` or `attnstats::statistics_from_lse`. Its body validates,
picks a backend and computes when the graph runs, on real tensors, exactly as a call outside of a graph does; what is
traced only makes shapes. So lengths are symbols, nothing is specialised to them, and a bad argument raises the same
error as ever. A schema holds no objects: statistics and heads travel as JSON. Called by attention.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from attnstats import _dispatch as backends
from attnstats.core import arguments
from attnstats.core.arguments import Heads
from attnstats.core.geometry import AttentionResult, Geometry
from attnstats.statistics import (
    CATALOGUE,
    DEFINED,
    ColumnStatistic,
    PooledMap,
    Statistic,
    Statistics,
    resolve,
)


class Call(NamedTuple):
    """A call but for query, key, value and lse, as the operators take it: the arguments of the public functions.

    `statistics` and `heads` are what `_encoded` made of them. `refusal` is the error with which the body answers,
    found by what could only be checked while the call was traced; "": none.
    """

    attn_mask: Tensor | None
    sinks: Tensor | None
    query_mask: Tensor | None
    key_padding_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    query_offset: int | None
    window_size: Sequence[int] | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    softcap: float | None
    dropout_p: float
    dropout_seed: Tensor | None
    differentiable: bool
    lse_base: str
    lse_layout: str | None
    statistics: str
    heads: str
    backend: str
    refusal: str

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def given(self) -> dict[str, Any]:
        """The keyword arguments of `arguments.resolve` or `resolve_packed`."""
        if self.refusal:
            kind, _, message = self.refusal.partition(": ")
            raise {"TypeError": TypeError}.get(kind, ValueError)(message)
        names = set(PACKED if self.packed else DENSE) - {"window_size", "heads"}
        given = {name: getattr(self, name) for name in names}
        window = None if self.window_size is None else tuple(self.window_size)
        return given | {"window_size": window, "heads": _decoded_heads(self.heads)}


SHARED = ("is_causal", "scale", "enable_gqa", "softcap", "window_size", "sinks", "query_mask", "heads")
DENSE = (*SHARED, "attn_mask", "key_padding_mask", "query_offset")
PACKED = (*SHARED, "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

_TYPES: dict[Any, str] = {
    Tensor | None: "Tensor?",
    int | None: "SymInt?",
    Sequence[int] | None: "SymInt[]?",
    float | None: "float?",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
}
_KINDS = {name: _TYPES[kind] for name, kind in get_type_hints(Call).items()}
_CALL = ", ".join(f"{kind} {name}" for name, kind in _KINDS.items())
_TENSORS = tuple(name for name, kind in _KINDS.items() if kind == "Tensor?")

NOTHING: dict[str, Any] = dict.fromkeys(Call._fields) | {
    "is_causal": True,
    "enable_gqa": False,
    "dropout_p": 0.0,
    "differentiable": False,
    "lse_base": "e",
    "statistics": "[]",
    "heads": None,
    "backend": "auto",
    "refusal": "",
}


# Every plain call asks, so these are looked up once.
_in_dynamo = torch.compiler.is_dynamo_compiling
_is_batched, _modes = torch._C._functorch.is_batchedtensor, torch._C._len_torch_dispatch_stack


def tracing(x: Any) -> bool:
    """Whether the tensors of this call are stand-ins: it is being recorded, or torch.vmap has hidden a dimension."""
    if _in_dynamo() or isinstance(x, FakeTensor) or (isinstance(x, Tensor) and _is_batched(x)):
        return True
    return _modes() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    )


# What dynamo traces: no numbers, no sizes, and errors only as text.


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    statistics: Iterable[Statistic | str],
    given: dict[str, Any],
) -> AttentionResult:
    """`attnstats.attention` or, with cu_seqlens_q given, `varlen_attention`; `given` are all other arguments."""
    call, wanted = _call(statistics, given, query=query, key=key, value=value)
    output, lse, tensors = torch.ops.attnstats.attention(query, key, value, *call)
    return AttentionResult(output, _results(wanted, tensors, lse, key, call))


def statistics_from_lse(
    query: Tensor, key: Tensor, lse: Tensor, statistics: Iterable[Statistic | str], given: dict[str, Any]
) -> Statistics:
    """`attnstats.statistics_from_lse`; `given` are all other arguments."""
    call, wanted = _call(statistics, given, query=query, key=key, lse=lse)
    query, key, lse = query.detach(), key.detach(), lse.detach()  # else the results would ask for gradients
    natural, tensors = torch.ops.attnstats.statistics_from_lse(query, key, lse, *call)
    return _results(wanted, tensors, natural, key, call)


def _results(wanted: tuple[Statistic, ...], tensors: list[Tensor], lse: Tensor, key: Tensor, call: Call) -> Statistics:
    keys = key.shape[0] if call.packed else key.shape[-2]
    call = call._replace(heads="null", scale=None, softcap=None, sinks=None, dropout_p=0.0, dropout_seed=None)
    of_wanted = dict(zip(wanted, tensors, strict=False))
    return Statistics(of_wanted, _Later(lse, keys, call, False), _Later(lse, keys, call, True), lse)


class _Later:
    """`Statistics.valid` or `.counts` of a statistic; computed when it is asked for, in a graph or after it."""

    def __init__(self, lse: Tensor, keys: int, call: Call, counts: bool):
        self.lse, self.keys, self.call, self.counts = lse, keys, call, counts

    def __call__(self, statistic: Statistic) -> Tensor:
        call = self.call._replace(statistics=_encoded((statistic,)))
        operator = torch.ops.attnstats.counts if self.counts else torch.ops.attnstats.valid
        (found,) = operator(self.lse, self.keys, *call)
        return found


def _call(
    statistics: Iterable[Statistic | str], given: dict[str, Any], **tensors: Tensor
) -> tuple[Call, tuple[Statistic, ...]]:
    """The call as its operator takes it, and the statistics that it computes."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # without them there is no operator to raise it later
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    known = NOTHING | given
    try:
        wanted = resolve(statistics)
        _check(known, wanted, "cu_seqlens_q" in given)
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_dynamo_compiling():
            raise
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        packed = known["cu_seqlens_q"] if isinstance(known["cu_seqlens_q"], Tensor) else None
        refused = {"heads": "null", "cu_seqlens_q": packed, "refusal": f"{kind}: {error.args[0]}"}
        return Call(**(NOTHING | refused)), ()
    known["statistics"] = _encoded(wanted)
    known["heads"] = _encoded_heads(known["heads"])
    if known["window_size"] is not None:
        known["window_size"] = [-1 if side is None else side for side in known["window_size"]]
    if known["dropout_p"]:
        known["dropout_seed"] = arguments.draw_seed(tensors["query"].device)
    for name in ("scale", "softcap", "dropout_p"):
        known[name] = None if known[name] is None else float(known[name])
    for name in ("is_causal", "enable_gqa"):
        known[name] = bool(known[name])
    return Call(**known), wanted


def _check(known: dict[str, Any], wanted: tuple[Statistic, ...], packed: bool) -> None:
    """What a schema would refuse in words of its own, and what isn't said in the graph any more."""
    for name in _TENSORS:
        missing = known[name] is None and not (packed and name == "cu_seqlens_q")
        if not missing and not isinstance(known[name], Tensor):
            kind = "an int32 or int64 tensor of shape (sequences + 1,)" if "cu" in name else "a tensor"
            raise TypeError(f"{name} must be {kind}, got {type(known[name]).__name__}")
    for name in ("query_offset", "max_seqlen_q", "max_seqlen_k"):
        arguments.check_integer(name, known[name])
    arguments.check_settings(known["is_causal"], known["scale"], known["softcap"], known["window_size"])
    arguments.check_lse(known["lse_base"], known["lse_layout"])
    arguments.check_dropout(known["dropout_p"])
    arguments.check_differentiable(wanted, known["differentiable"])
    backends.check(known["backend"])
    _encoded(wanted), _encoded_heads(known["heads"])


def _encoded(statistics: tuple[Statistic, ...]) -> str:
    """[["waad", 10], ...]: a name of the catalogue, or the key of a class from elsewhere, and its settings."""
    return "[" + ", ".join([_encoded_statistic(s) for s in statistics]) + "]"


def _encoded_statistic(s: Statistic) -> str:
    kind = type(s)
    name = s.name if CATALOGUE.get(s.name) is kind else kind.key
    settings = [_text(getattr(s, field.name), kind) for field in dataclasses.fields(s) if field.init]
    return "[" + ", ".join([f'"{name}"', *settings]) + "]"


def _encoded_heads(heads: Heads | None) -> str:
    """A list of heads, or [[name or statistic, list of heads], ...]."""
    if not isinstance(heads, Mapping):
        return _text(heads, None)
    pairs = [
        f"[{_encoded_statistic(s) if isinstance(s, Statistic) else _text(s, None)}, {_text(of_s, None)}]"
        for s, of_s in heads.items()
    ]
    return "{" + f'"by": [{", ".join(pairs)}]' + "}"


def _text(value: Any, owner: type | None) -> str:
    """JSON, written by hand because json can't be traced."""
    if value is None:
        return "null"
    if isinstance(value, Statistic):
        return _encoded_statistic(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"{value}"
    if isinstance(value, str) and '"' not in value and "\\" not in value and value.isprintable():
        return f'"{value}"'
    if isinstance(value, (list, tuple, range)):
        return "[" + ", ".join([_text(item, owner) for item in value]) + "]"
    what = "heads" if owner is None else f"statistics: {owner.__name__}"
    raise TypeError(f"{what} in a compiled graph must consist of numbers, strings and tuples of them, got {value!r}")


@functools.lru_cache(maxsize=256)
def _decoded(statistics: str) -> tuple[Statistic, ...]:
    return tuple(_decoded_statistic(item) for item in json.loads(statistics))


def _decoded_statistic(item: list[Any]) -> Statistic:
    name, *settings = item
    kind = CATALOGUE.get(name) or DEFINED.get(name)
    if kind is None:
        raise ValueError(f"statistics: the graph asks for {name}, which nothing in this process defines; import it")
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return kind(**dict(zip(names, map(_tuples, settings), strict=True)))


@functools.lru_cache(maxsize=256)
def _decoded_heads(text: str) -> Any:
    heads = json.loads(text)
    if not isinstance(heads, dict):
        return _tuples(heads)
    return {(_decoded_statistic(s) if isinstance(s, list) else s): _tuples(of_s) for s, of_s in heads["by"]}


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return _decoded_statistic(value) if value and isinstance(value[0], str) else tuple(map(_tuples, value))


# What runs in a graph.


def _attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = Call(*settings)
    with torch.no_grad():  # register_autograd has the gradients
        (output, lse, tensors), _ = backends.attend(
            query,
            key,
            value,
            _decoded(call.statistics),
            call.given(),
            call.dropout_p,
            call.differentiable,
            call.backend,
            call.dropout_seed,
        )
    output = output.transpose(1, 2).contiguous()  # (B, T, H, D) in memory, as torch's kernels have it
    output = output[0] if call.packed else output.transpose(1, 2)
    lse, *found = _apart(_unbatched(call, [lse, *tensors.values()]), (query, key, value, *call))
    return output, lse, found


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = Call(*settings)
    shapes = _shapes(query, key, call)
    if call.packed:
        output = query.new_empty((*query.shape[:2], value.shape[-1]))
    elif query.dim() != 4:
        output = torch.empty_like(query)
    else:
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    lse, *tensors = [_new(query, shape) for shape in shapes]
    return output, lse, tensors


def _statistics_from_lse(query: Tensor, key: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, list[Tensor]]:
    call = Call(*settings)
    natural, tensors, _ = backends.from_lse(
        query, key, lse, _decoded(call.statistics), call.lse_base, call.lse_layout, call.given(), call.backend
    )
    natural, *found = _apart(_unbatched(call, [natural, *tensors.values()]), (query, key, lse, *call))
    return natural, found


def _fake_statistics_from_lse(query: Tensor, key: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, list[Tensor]]:
    natural, *tensors = [_new(query, shape) for shape in _shapes(query, key, Call(*settings))]
    return natural, tensors


def _valid(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
    geometry, wanted, call = _geometry(lse, keys, settings)
    return _apart(_unbatched(call, [geometry.validity(s) for s in wanted]), (lse, *call))


def _counts(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
    geometry, wanted, call = _geometry(lse, keys, settings)
    found = [geometry.counts(s) for s in wanted if isinstance(s, ColumnStatistic)]
    return _apart(_unbatched(call, found), (lse, *call))


def _geometry(lse: Tensor, keys: int, settings: tuple[Any, ...]) -> tuple[Geometry, tuple[Statistic, ...], Call]:
    call = Call(*settings)
    wanted = _decoded(call.statistics)
    # Geometry asks for tensors, of which only their shapes matter: views that have these.
    if call.packed:
        query, key = lse.detach().T[..., None], lse.new_zeros(()).expand(keys, len(lse), 1)
    else:
        query, key = lse.detach()[..., None], lse.new_zeros(()).expand(*lse.shape[:2], keys, 1)
    *_, geometry = backends.geometry_of(query, key, None, wanted, call.given())
    return geometry, wanted, call


def _fake_valid(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
    return _fake_later(lse, keys, Call(*settings), torch.bool)


def _fake_counts(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
    return _fake_later(lse, keys, Call(*settings), torch.int64)


def _fake_later(lse: Tensor, keys: int, call: Call, dtype: torch.dtype) -> list[Tensor]:
    batch = () if call.packed else lse.shape[:1]
    shapes = [(*batch, *_shape_of(s, lse.shape[-1], keys)) for s in _decoded(call.statistics)]
    return [lse.new_empty(shape, dtype=dtype) for shape in shapes]


def _attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    values: list[Tensor],
    grad_output: Tensor,
    grads: list[Tensor | None],
    *settings: Any,
) -> list[Tensor]:
    """For query, key, value, and for sinks and a float attn_mask where there are any."""
    call = Call(*settings)
    inputs = _differentiable(query, key, value, call)
    if call.packed:
        output, grad_output = arguments.batch_of_one(output=output, grad_output=grad_output)
        lse, values, grads = lse[None], [x[None] for x in values], [None if x is None else x[None] for x in grads]
    statistics = _decoded(call.statistics)
    of_statistics = {s: (x, grad) for s, x, grad in zip(statistics, values, grads, strict=True) if grad is not None}
    found = backends.gradients(
        query,
        key,
        value,
        output,
        lse,
        grad_output,
        statistics,
        of_statistics,
        call.given(),
        call.dropout_p,
        call.backend,
        call.dropout_seed,
    )
    if call.packed:
        found[:3] = [x[0].transpose(0, 1) for x in found[:3]]
    return [_like(x, grad) for x, grad in zip(inputs, found, strict=True)]


def _fake_attention_backward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in _differentiable(query, key, value, Call(*others[-len(Call._fields) :]))]


def _differentiable(query: Tensor, key: Tensor, value: Tensor, call: Call) -> list[Tensor]:
    return [query, key, value, *(x for x in (call.sinks, call.attn_mask) if x is not None and x.is_floating_point())]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    query, key, value, *settings = inputs
    call = Call(*settings)
    out, lse, tensors = output
    kept = tensors if call.differentiable else []
    ctx.save_for_backward(query, key, value, out, lse, *(getattr(call, name) for name in _TENSORS), *kept)
    without: dict[str, Any] = dict.fromkeys(_TENSORS)
    ctx.call = call._replace(**without)
    ctx.mark_non_differentiable(lse, *(() if call.differentiable else tensors))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, _: None, grads: list[Tensor | None]) -> tuple[Any, ...]:
    query, key, value, out, lse, *rest = ctx.saved_tensors
    masks, values = rest[: len(_TENSORS)], rest[len(_TENSORS) :]
    call = ctx.call._replace(**dict(zip(_TENSORS, masks, strict=True)))
    if not call.differentiable:
        call, grads = call._replace(statistics="[]", heads="null"), []
    if grad_output is None:
        grad_output = torch.zeros_like(out)
    operator = torch.ops.attnstats.attention_backward
    found = operator(query, key, value, out, lse, values, grad_output, grads, *call)
    of_call = dict.fromkeys(Call._fields)
    names = [name for name in ("sinks", "attn_mask") if _is_float(getattr(call, name))]
    of_call |= zip(names, found[3:], strict=True)
    return *found[:3], *of_call.values()


def _is_float(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _unbatched(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    return [x[0] for x in tensors] if call.packed else tensors


def _shapes(query: Tensor, key: Tensor, call: Call) -> list[tuple[Any, ...]]:
    """Of the lse and of each statistic. Bad arguments get some shape too: the body has the error."""
    if query.dim() != 3 + (not call.packed) or key.dim() != query.dim():
        return [query.shape for _ in ("lse", *_decoded(call.statistics))]
    wanted = _decoded(call.statistics)
    if call.packed:
        batch: tuple[Any, ...] = ()
        length, heads, _ = query.shape
        keys = key.shape[0]
    else:
        *batch, heads, length, _ = query.shape  # type: ignore[assignment]
        keys = key.shape[2]
    chosen = _decoded_heads(call.heads)
    shapes = [(*batch, heads, length)]
    for s in wanted:
        of_s = chosen
        if isinstance(chosen, dict):
            of_s = chosen.get(s, chosen.get(s.name))
        count = len(of_s) if isinstance(of_s, tuple) else heads
        shapes.append((*batch, count, *_shape_of(s, length, keys)))
    return shapes


def _shape_of(s: Statistic, length: Any, keys: Any) -> tuple[Any, ...]:
    if isinstance(s, ColumnStatistic):
        return (keys,)
    if isinstance(s, PooledMap):
        return tuple(x if isinstance(x, int) else len(x) - 1 for x in (s.query_segments, s.key_segments))
    return (length,)


def _new(query: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return query.new_empty(shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _apart(tensors: list[Tensor], inputs: Iterable[Any]) -> list[Tensor]:
    """Contiguous, and none a view of an input or of another: a graph relies on it."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    apart = []
    for x in tensors:
        x = x.contiguous()
        if x.untyped_storage().data_ptr() in taken or x.storage_offset():
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        apart.append(x)
    return apart


def _like(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides that `torch.empty_like` gives it in a trace."""
    if grad.dtype == x.dtype and grad.stride() == torch.empty_like(x, device="meta").stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _define(name: str, body: Any, fake: Any, tensors: str, returns: str) -> Any:
    operator = torch.library.custom_op(
        f"attnstats::{name}", body, mutates_args=(), schema=f"({tensors}, {_CALL}) -> {returns}"
    )
    operator.register_fake(fake)
    if name != "attention_backward":
        operator.register_vmap(functools.partial(_one_by_one, getattr(torch.ops.attnstats, name)))
    return operator


def _one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """Under torch.vmap each call of the batch is made on its own."""
    results = []
    for i in range(info.batch_size):
        own = [
            x.select(d, i) if isinstance(x, Tensor) and d is not None else x for x, d in zip(args, in_dims, strict=True)
        ]
        results.append(operator(*own))
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *results)
    return stacked, tree_map(lambda _: 0, stacked)


_three = "Tensor query, Tensor key, Tensor value"
_define("attention", _attention, _fake_attention, _three, "(Tensor, Tensor, Tensor[])").register_autograd(
    _backward, setup_context=_setup_context
)
_define(
    "attention_backward",
    _attention_backward,
    _fake_attention_backward,
    f"{_three}, Tensor output, Tensor lse, Tensor[] values, Tensor grad_output, Tensor?[] grads",
    "Tensor[]",
)
_define(
    "statistics_from_lse",
    _statistics_from_lse,
    _fake_statistics_from_lse,
    "Tensor query, Tensor key, Tensor lse",
    "(Tensor, Tensor[])",
)
_define("valid", _valid, _fake_valid, "Tensor lse, SymInt keys", "Tensor[]")
_define("counts", _counts, _fake_counts, "Tensor lse, SymInt keys", "Tensor[]")
