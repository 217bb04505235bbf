"""The public functions as operators of torch.library, for torch.compile, torch.export and whatever else traces.

A traced call is one node of the graph: `attnstats::attention` or `attnstats::statistics_from_lse`. Its body validates,
picks a backend and computes when the graph runs, on real tensors, exactly as a call outside of a graph does; tracing
only makes shapes. So lengths are symbols, nothing is specialised to them, and a bad argument raises the error of
an untraced call. core/wire.py puts the options into the operator's schema.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from attnstats import _dispatch
from attnstats.core import arguments, wire
from attnstats.core.autograd import Residuals, raise_second_derivative, refuse_transforms
from attnstats.core.geometry import Geometry, needs_pivot, pivot_of
from attnstats.core.lse import check_lse
from attnstats.core.options import Options, is_packed
from attnstats.results import AttentionResult, Statistics
from attnstats.statistics import SegmentMass, Statistic, resolve

# In a copy of the package under another name, as on the Kernels hub, the operators are that copy's.
NAMESPACE = __name__.partition(".")[0]
_ops = getattr(torch.ops, NAMESPACE)

# Every plain call asks, so these are looked up once.
_in_dynamo = torch.compiler.is_dynamo_compiling
_is_batched, _modes = torch._C._functorch.is_batchedtensor, torch._C._len_torch_dispatch_stack


def is_tracing(x: Any) -> bool:
    """True if x has no numbers to read: the call is being traced, x is on the meta device, or torch.vmap hides a
    dimension."""
    if _in_dynamo() or isinstance(x, FakeTensor) or (isinstance(x, Tensor) and (x.is_meta or _is_batched(x))):
        return True
    return _modes() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    )


NO_TORCHSCRIPT = "TorchScript cannot record statistics; use torch.compile or torch.export, or leave this part in Python"


def refuse_trace() -> None:
    """Raise RuntimeError while torch.jit.trace runs, which would keep the numbers of this call as constants."""
    if not _in_dynamo() and torch._C._is_tracing():
        raise RuntimeError(f"attnstats, traced by torch.jit.trace: {NO_TORCHSCRIPT}")


def refuse_script(function: Any) -> Any:
    """The function, which torch.jit.script will refuse with a reason instead of complaining of its syntax."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{function.__name__}, compiled by torch.jit.script: {NO_TORCHSCRIPT}")

    function.__prepare_scriptable__ = refuse
    return function


# Traced by dynamo: nothing may depend on numbers or sizes, and errors are kept as text.


def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> AttentionResult:
    """`attnstats.attention` or, with cu_seqlens_q, `varlen_attention`."""
    if not _in_dynamo():
        refuse_transforms(query, key, value, options.sinks)
    options = _checked(options, query=query, key=key, value=value)
    output, lse, _, _, tensors = _ops.attention(query, key, value, *wire.encode(options))
    return AttentionResult(output, _results(tensors, lse, key, options))


def statistics_from_lse(query: Tensor, key: Tensor, lse: Tensor, options: Options) -> Statistics:
    """`attnstats.statistics_from_lse`."""
    options = _checked(options, query=query, key=key, lse=lse)
    query, key, lse = query.detach(), key.detach(), lse.detach()  # else the results would ask for gradients
    natural, tensors = _ops.statistics_from_lse(query, key, lse, *wire.encode(options))
    return _results(tensors, natural, key, options)


def _results(tensors: list[Tensor], lse: Tensor, key: Tensor, options: Options) -> Statistics:
    values = dict(zip(_statistics(options), tensors, strict=False))
    return Statistics(values, *placeholders(lse, key, options), lse)


def placeholders(lse: Tensor, key: Tensor, options: Options) -> tuple[_Deferred, _Deferred]:
    """`Statistics.valid` and `.counts` of a call, by statistic."""
    keys = key.shape[0] if is_packed(options) else key.shape[-2]
    options = options._replace(heads=None, scale=None, softcap=None, sinks=None, dropout_p=0.0, dropout_seed=None)
    if options.attn_mask is not None and _is_float(options.attn_mask):
        options = options._replace(attn_mask=options.attn_mask.detach() > -torch.inf)
    return _Deferred("valid", lse, keys, options), _Deferred("counts", lse, keys, options)


class _Deferred:
    """`Statistics.valid` or `.counts` of a statistic, computed when it is read, in a graph or after it."""

    def __init__(self, operator: str, lse: Tensor, keys: int, options: Options):
        self.operator, self.lse, self.keys, self.options = operator, lse, keys, options

    def __call__(self, statistic: Statistic) -> Tensor:
        options = self.options._replace(statistics=(statistic,))
        if not isinstance(statistic, SegmentMass):
            options = options._replace(segment_boundaries=None)
        values = wire.encode(options)
        operator = _ops.counts if self.operator == "counts" else _ops.valid
        (result,) = operator(self.lse, self.keys, *values)
        return result


def _checked(options: Options, **tensors: Tensor) -> Options:
    """The options with resolved statistics and a drawn dropout seed, or with the error that the graph will raise."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # without them there is no operator to raise it later
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    try:
        options = options._replace(statistics=resolve(options.statistics))
        _check(options)
    except (TypeError, ValueError) as error:
        if not torch.compiler.is_dynamo_compiling():
            raise
        kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
        packed = options.cu_seqlens_q if isinstance(options.cu_seqlens_q, Tensor) else None
        return Options(cu_seqlens_q=packed, refusal=f"{kind}: {error.args[0]}")
    if options.dropout_p:
        options = options._replace(dropout_seed=arguments.draw_seed(tensors["query"].device))
    # Backward, `valid` and `counts` read masks and boundaries later, when the caller may have written into them.
    given = {name: getattr(options, name) for name in wire.TENSORS if name != "dropout_seed"}
    return options._replace(**{name: x.clone() for name, x in given.items() if x is not None and not x.requires_grad})


def _check(options: Options) -> None:
    """Raise for arguments that a schema would refuse with an error of its own, or that the graph would convert."""
    for name in wire.TENSORS:
        x = getattr(options, name)
        if x is not None and not isinstance(x, Tensor):
            kind = "an int32 or int64 tensor of shape (sequences + 1,)" if "cu" in name else "a tensor"
            raise TypeError(f"{name} must be {kind}, got {type(x).__name__}")
    arguments.check_traced(options.statistics, options)  # type: ignore[arg-type]
    check_lse(options.lse_base, options.lse_layout)
    _dispatch.check_backend(options.backend)
    wire.encode(options)


# The operators' bodies, which run when the graph does, and their shapes for tracing.


Attended = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]  # output, lse, pivot, factor, statistics


def _attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Attended:
    options = _decode(settings)
    with torch.no_grad():  # register_autograd has the gradients
        (output, lse, tensors, pivot, factor), _ = _dispatch.attend(query, key, value, options)
    if not needs_pivot(query.dtype):
        pivot = factor = lse[..., :0].float()
    elif pivot is None or factor is None:  # the backward pass may be on another backend
        pivot = pivot_of(lse)
        factor = torch.ones_like(pivot)
    output = output.transpose(1, 2).contiguous()  # (B, T, H, D) in memory, as torch's kernels have it
    output = output[0] if is_packed(options) else output.transpose(1, 2)
    results = _unbatched(options, [lse, pivot, factor, *tensors.values()])
    lse, pivot, factor, *values = _apart(results, (query, key, value, *settings))
    return output, lse, pivot, factor, values


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Attended:
    options = wire.decode(settings)
    shapes = _shapes(query, key, options)
    if is_packed(options):
        output = query.new_empty((*query.shape[:2], value.shape[-1]))
    elif query.dim() != 4:
        output = torch.empty_like(query)
    else:
        batch, heads, length, _ = query.shape
        output = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
    lse, *tensors = [_new(query, shape) for shape in shapes]
    of_rows = lse.shape if needs_pivot(query.dtype) else (*lse.shape[:-1], 0)
    pivot, factor = (lse.new_empty(of_rows, dtype=torch.float32) for _ in range(2))
    return output, lse, pivot, factor, tensors


def _statistics_from_lse(query: Tensor, key: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, list[Tensor]]:
    options = _decode(settings)
    tensors, natural, _ = _dispatch.from_lse(query, key, lse, options)
    natural, *values = _apart(_unbatched(options, [natural, *tensors.values()]), (query, key, lse, *settings))
    return natural, values


def _fake_statistics_from_lse(query: Tensor, key: Tensor, lse: Tensor, *settings: Any) -> tuple[Tensor, list[Tensor]]:
    natural, *tensors = [_new(query, shape) for shape in _shapes(query, key, wire.decode(settings))]
    return natural, tensors


def _define_deferred(name: str, compute: Callable[[Geometry, Statistic], Tensor], dtype: torch.dtype) -> None:
    """Define the operator of `Statistics.valid` or `.counts`."""

    def body(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
        options = _decode(settings)
        if is_packed(options):  # views that have the shapes of the call's query and key
            query, key = lse.detach().T[..., None], lse.new_zeros(()).expand(keys, len(lse), 1)
        else:
            query, key = lse.detach()[..., None], lse.new_zeros(()).expand(*lse.shape[:2], keys, 1)
        geometry = _dispatch.geometry_of(query, key, options)
        results = [compute(geometry, s) for s in geometry.statistics]
        return _apart(_unbatched(options, results), (lse, *settings))

    def fake(lse: Tensor, keys: int, *settings: Any) -> list[Tensor]:
        options = wire.decode(settings)
        batch = () if is_packed(options) else lse.shape[:1]
        shapes = [(*batch, *s.shape(lse.shape[-1], keys)[: 2 if s.axis == "map" else 1]) for s in _statistics(options)]
        weighted = dtype == torch.int64 and options.query_weight is not None  # sums of these
        return [lse.new_empty(shape, dtype=lse.dtype if weighted else dtype) for shape in shapes]

    _define(name, body, fake, "Tensor lse, SymInt keys", "Tensor[]")


def _attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    pivot: Tensor,
    factor: Tensor,
    values: list[Tensor],
    grad_output: Tensor,
    grads: list[Tensor | None],
    *settings: Any,
) -> list[Tensor]:
    """For query, key, value, and for sinks and a float attn_mask where there are any."""
    options = _decode(settings)
    inputs = _differentiable(query, key, value, options)
    if is_packed(options):
        output, grad_output = arguments.batch_of_one(output=output, grad_output=grad_output)
        lse, pivot, factor, *values = (x[None] for x in (lse, pivot, factor, *values))
        grads = [None if x is None else x[None] for x in grads]
    # Statistics that carry none are named all the same: the backend depends on them.
    statistics = _statistics(options) if options.differentiable else ()
    of_statistics = {s: (x, grad) for s, x, grad in zip(statistics, values, grads, strict=True) if grad is not None}
    residuals = Residuals(query, key, value, output, lse, pivot, factor)
    gradients = _dispatch.gradients(residuals, grad_output, of_statistics, options)
    if is_packed(options):
        gradients[:3] = [x[0].transpose(0, 1) for x in gradients[:3]]
    return [_like(x, grad) for x, grad in zip(inputs, gradients, strict=True)]


def _fake_attention_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    options = wire.decode(rest[-len(Options._fields) :])
    return [torch.empty_like(x) for x in _differentiable(query, key, value, options)]


def _differentiable(query: Tensor, key: Tensor, value: Tensor, options: Options) -> list[Tensor]:
    return [query, key, value, *(x for x in (options.sinks, options.attn_mask) if _is_float(x))]  # type: ignore[list-item]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Attended) -> None:
    query, key, value, *settings = inputs
    options = Options(*settings)  # as encoded
    *results, tensors = output
    saved = tensors if options.differentiable else []
    ctx.save_for_backward(query, key, value, *results, *(getattr(options, name) for name in wire.TENSORS), *saved)
    without_tensors: dict[str, Any] = dict.fromkeys(wire.TENSORS)
    ctx.options = options._replace(**without_tensors)
    ctx.mark_non_differentiable(*results[1:], *(() if options.differentiable else tensors))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, _lse: None, _pivot: None, _factor: None, grads: list[Tensor | None]
) -> tuple[Any, ...]:
    query, key, value, out, lse, pivot, factor, *rest = ctx.saved_tensors
    tensors, values = rest[: len(wire.TENSORS)], rest[len(wire.TENSORS) :]
    options: Any = ctx.options._replace(**dict(zip(wire.TENSORS, tensors, strict=True)))
    if not options.differentiable:
        grads = []
    if grad_output is None:
        grad_output = torch.zeros_like(out)
    operator = _ops.attention_backward
    gradients = operator(query, key, value, out, lse, pivot, factor, values, grad_output, grads, *options)
    of_options = dict.fromkeys(Options._fields)
    names = [name for name in ("sinks", "attn_mask") if _is_float(getattr(options, name))]
    of_options |= zip(names, gradients[3:], strict=True)
    return *gradients[:3], *of_options.values()


def _decode(settings: Sequence[Any]) -> Options:
    """The options of a body. Raises the error of the call that was traced, if it has one."""
    options = wire.decode(settings)
    wire.raise_refusal(options)
    if options.position is not None:
        options = options._replace(query_offset=int(options.position), position=None)
    return options


def _statistics(options: Options) -> tuple[Statistic, ...]:
    return tuple(options.statistics)  # type: ignore[arg-type]


def _is_float(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _unbatched(options: Options, tensors: list[Tensor]) -> list[Tensor]:
    return [x[0] for x in tensors] if is_packed(options) else tensors


def _shapes(query: Tensor, key: Tensor, options: Options) -> list[tuple[Any, ...]]:
    """The shapes of the lse and of each statistic. Bad arguments get some shape too: the body raises their error."""
    statistics = _statistics(options)
    if query.dim() != 3 + (not is_packed(options)) or key.dim() != query.dim():
        return [query.shape for _ in ("lse", *statistics)]
    if is_packed(options):
        batch: tuple[Any, ...] = ()
        length, heads, _ = query.shape
        keys = key.shape[0]
    else:
        *batch, heads, length, _ = query.shape  # type: ignore[assignment]
        keys = key.shape[2]
    shapes = [(*batch, heads, length)]
    bounds = options.segment_boundaries
    segments = 0 if bounds is None or not bounds.dim() else bounds.shape[-1] - 1
    for s in statistics:
        of_s = options.heads
        if isinstance(of_s, dict):
            of_s = of_s.get(s, of_s.get(s.name))
        count = len(of_s) if isinstance(of_s, tuple) else heads
        shapes.append((*batch, count, *s.shape(length, keys, segments)))
    return shapes


def _new(query: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return query.new_empty(shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _apart(tensors: list[Tensor], inputs: Iterable[Any]) -> list[Tensor]:
    """The tensors, contiguous and none a view of an input or of another: a graph relies on it."""
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
    """The gradient with the shape of x, as a mask may lack dimensions, and the strides that a trace gives it."""
    grad = grad.reshape(x.shape)
    if grad.dtype == x.dtype and grad.stride() == torch.empty_like(x, device="meta").stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _define(name: str, body: Any, fake: Any, tensors: str, returns: str) -> Any:
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{name}", body, mutates_args=(), schema=f"({tensors}, {wire.SCHEMA}) -> {returns}"
    )
    operator.register_fake(fake)
    if name != "attention_backward":
        operator.register_vmap(functools.partial(_one_by_one, getattr(_ops, name)))
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
_define(
    "attention", _attention, _fake_attention, _three, "(Tensor, Tensor, Tensor, Tensor, Tensor[])"
).register_autograd(_backward, setup_context=_setup_context)
_define(
    "attention_backward",
    _attention_backward,
    _fake_attention_backward,
    f"{_three}, Tensor output, Tensor lse, Tensor pivot, Tensor factor, Tensor[] values, Tensor grad_output, "
    "Tensor?[] grads",
    "Tensor[]",
).register_autograd(raise_second_derivative)
_define(
    "statistics_from_lse",
    _statistics_from_lse,
    _fake_statistics_from_lse,
    "Tensor query, Tensor key, Tensor lse",
    "(Tensor, Tensor[])",
)
_define_deferred("valid", Geometry.validity, torch.bool)
_define_deferred("counts", Geometry.counts, torch.int64)
