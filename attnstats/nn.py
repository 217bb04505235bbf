"""`nn.MultiheadAttention` with statistics of its attention.

`MultiheadAttention` is torch's module with torch's parameters, so checkpoints load and isinstance holds; only its
attention is ours. `replace_attention` puts it into a model that was built with torch's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attnstats._operators import refuse_script, refuse_trace
from attnstats.core.arguments import refuse_distances
from attnstats.core.finite_masks import recognise_finite
from attnstats.core.options import Heads, Options
from attnstats.core.patterns import (
    CAUSAL,
    MaskPattern,
    allow_whole_map,
    is_causal_bias,
    read_causal_bias,
    recognise,
    visible_elements,
)
from attnstats.functional import Backend, attend
from attnstats.results import Statistics
from attnstats.statistics import Statistic, refuse_boundaries_of_the_call, resolve
from attnstats.tensors import check_plain
from attnstats.wrappers import refuse_replica, refuse_replicas, unwrap


@refuse_script
class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that leaves statistics of its attention in `module.statistics`, in O(T) memory.

    Parameters, constructor and forward are torch's, with two differences: `need_weights` is False by default, as this
    module never makes the T x T map, and is_causal=True needs no attn_mask. After each call `module.statistics` is a
    `Statistics` of each head's own map, rows (N, H, L) and columns (N, H, S), without N for unbatched input; before the
    first call and after one that raised it is None.

    Masks that are causal, or the same for every query, take no extra memory. They are compared element by element,
    whatever is_causal says; a causal bias of torch.nn.attention.bias is taken as what it says. Self-attention is
    `query is key`, or a causal mask: padding then is no query either. Otherwise queries and keys share positions, and
    have distances, where L = S. Dropout acts on the output alone: statistics are of the undropped map.

    `add_zero_attn` is a sink of logit 0: it belongs to no key, so statistics are of the mass on real keys. The key of
    `add_bias_kv` has no position, so with it there are only FAI, Received, Entropy (which counts it), MaxLogit and
    LSE, and columns are those of real keys.

    Under torch.compile an attn_mask breaks the graph, as it has to be looked at; is_causal=True and a bool
    key_padding_mask don't.

    In a TransformerEncoderLayer the fast path, which computes attention without this module, is off.
    nn.TransformerEncoder must be built with enable_nested_tensor=False, or it passes nested tensors in eval mode,
    which are an error. `replace_attention` sees to that.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.nn.MultiheadAttention takes them.
        statistics: what to compute, as for `attnstats.attention`; kept as `module.requested`.
        heads: as for `attnstats.attention`.
        backend: as for `attnstats.attention`.
        allow_dense: let need_weights=True and other masks through, in O(L * S) memory and with a warning.
        differentiable: as for `attnstats.attention`: `module.statistics` carries gradients.

    Example:
        >>> import torch, attnstats
        >>> attention = attnstats.nn.MultiheadAttention(32, 4, batch_first=True, statistics=["waad", "fai"])
        >>> x = torch.randn(2, 12, 32)
        >>> output, _ = attention(x, x, x, is_causal=True)
        >>> attention.statistics["waad"].shape
        torch.Size([2, 4, 12])
    """

    requested: tuple[Statistic, ...]
    statistics: Statistics | None
    heads: Heads | None
    backend: Backend
    allow_dense: bool
    differentiable: bool

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        statistics: Iterable[Statistic | str] = (),
        heads: Heads | None = None,
        backend: Backend = "auto",
        allow_dense: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.__dict__.update(
            _settings(statistics, heads=heads, backend=backend, allow_dense=allow_dense, differentiable=differentiable)
        )
        self.register_forward_hook(_no_fast_path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"statistics": None}  # results are not part of a module that is copied or saved

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        statistics: Iterable[Statistic | str] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention; `statistics` replaces the module's for this call.

        Returns:
            The output and None, or with need_weights=True (and allow_dense) the weights.

        Raises:
            TypeError, ValueError: naming the argument, what came and what would work.
        """
        self.statistics = None
        requested = self.requested if statistics is None else _resolved(statistics)
        if requested:
            refuse_replica(self)
            refuse_trace()
        if need_weights and not self.allow_dense:
            raise ValueError(
                "need_weights=True asks for the T x T map, which is never made here; pass need_weights=False and ask "
                "for statistics=[...] of it (PooledMap is its picture), or construct the module with allow_dense=True"
            )
        if any(x.is_nested for x in (query, key, value)):
            raise TypeError(
                "query, key or value is a nested tensor, which torch's module takes in inference, and this one does "
                "not: pad it and pass key_padding_mask. nn.TransformerEncoder makes them in eval mode: pass it "
                "enable_nested_tensor=False, or use attnstats.nn.replace_attention"
            )
        bias = is_causal_bias(attn_mask)
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": None if bias else attn_mask}
        check_plain(query=query, key=key, value=value, **masks)
        output, results = self._attend(query, key, value, key_padding_mask, attn_mask, is_causal, requested)
        weights = None
        if need_weights:
            warnings.warn("need_weights=True: attention weights in O(L * S) memory", stacklevel=5)
            if bias or (is_causal and attn_mask is None):
                attn_mask = self._causal_mask(query, key, attn_mask)
            output, weights = super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=False,
            )
        self.statistics = results
        return output, weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        statistics: tuple[Statistic, ...],
    ) -> tuple[Tensor, Statistics]:
        q, k, v = (self._by_head(x) for x in self._project(query, key, value))
        pattern, bias = self._read_masks(key_padding_mask, attn_mask, is_causal, q, k)
        key_mask, query_offset, attn_mask = pattern.key_mask, pattern.query_offset, bias
        if query_offset is None and q.shape[2] == k.shape[2]:
            query_offset = 0
        self._check_statistics(statistics, query_offset)
        if self.bias_k is not None:  # in front, where causal queries see it too
            assert self.bias_v is not None
            k, v = (torch.cat([self._added(b, x), x], 2) for b, x in ((self.bias_k, k), (self.bias_v, v)))
            query_offset = None if query_offset is None else query_offset + 1
            key_mask = None if key_mask is None else functional.pad(key_mask, (1, 0), value=True)
            attn_mask = None if attn_mask is None else functional.pad(attn_mask, (1, 0))
        if key_mask is not None and query is not key and pattern.query_offset is None:
            # Keys hidden in another sequence say nothing about the queries, so they are no padding.
            visible, key_mask = key_mask[:, None, None], None
            attn_mask = visible if attn_mask is None else attn_mask.masked_fill(~visible, -torch.inf)
        options = Options(
            statistics=statistics,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=pattern.right == 0,
            window_size=(pattern.left, pattern.right),
            key_padding_mask=key_mask,
            query_offset=query_offset,
            sinks=q.new_zeros(self.num_heads) if self.add_zero_attn else None,
            heads=self.heads,
            differentiable=self.differentiable,
            backend=self.backend if bias is None else "reference",
        )
        output, results = attend(q, k, v, options)
        if self.bias_k is not None:
            results = results.changed(lambda s, x: x[..., 1:] if s.axis == "column" else x)
        output = functional.linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if query.dim() == 2:
            return output[0], results.changed(lambda s, x: x[0])
        return (output if self.batch_first else output.transpose(0, 1)), results

    def _check_statistics(self, statistics: tuple[Statistic, ...], query_offset: int | None) -> None:
        if query_offset is None:
            refuse_distances(
                statistics,
                "in cross-attention of different lengths queries and keys share no positions; ask for others, such as "
                "'entropy' or 'received'",
            )
        for statistic in statistics if self.bias_k is not None else ():
            if statistic.axis != "column" and statistic.method not in ("row", "lse"):
                raise ValueError(
                    f"statistics: {statistic} needs positions of all keys, and the key of add_bias_kv has none; beside "
                    "it there are FAI, Received, Entropy, MaxLogit and LSE"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[N, T, embed_dim] each."""
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                shape = f"(N, T, {width})" if self.batch_first else f"(T, N, {width})"
                raise ValueError(
                    f"{name} must have the shape {shape}, or (T, {width}) like query, got {tuple(x.shape)}"
                )
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key is value and self.in_proj_weight is not None:
            projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            projected = tuple(map(functional.linear, (query, key, value), weights, biases))
        if query.dim() == 2:
            return [x[None] for x in projected]
        return [x if self.batch_first else x.transpose(0, 1) for x in projected]

    def _by_head(self, x: Tensor) -> Tensor:
        """[N, T, embed_dim] as [N, H, T, head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _added(self, parameter: Tensor, like: Tensor) -> Tensor:
        """bias_k or bias_v (1, 1, embed_dim) as [N, H, 1, head_dim]."""
        return self._by_head(parameter).to(like.dtype).expand(like.shape[0], -1, -1, -1)

    def _read_masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        query: Tensor,
        key: Tensor,
    ) -> tuple[MaskPattern, Tensor | None]:
        """The pattern of both masks with a key mask (N, S), and as a float bias (N, H | 1, L | 1, S) what has none."""
        batch, heads, length, key_length = shape = (*query.shape[:3], key.shape[2])
        self._check_masks(key_padding_mask, attn_mask, is_causal, shape)
        pattern = CAUSAL if is_causal else MaskPattern()
        key_mask = bias = None
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.expand(batch, key_length)
            key_mask = visible_elements(key_padding_mask, true_hides=True)
            if key_mask is None:
                bias = self._as_bias("key_padding_mask", key_padding_mask[:, None, None], query.dtype)
        if attn_mask is not None:
            recognised = read_causal_bias(attn_mask, length, key_length)
            if recognised is None:
                attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
                recognised = recognise(attn_mask, length, true_hides=True)
                if recognised is None and key_padding_mask is None and self.bias_k is None:
                    recognised = recognise_finite(attn_mask, query, key, None)
            same = recognised is not None and recognised.key_mask is None and recognised[1:] == CAUSAL[1:]
            if is_causal and length > 1 and not same:
                raise ValueError(
                    "is_causal=True says that attn_mask is the causal mask, and it is another one; pass is_causal=False"
                )
            if recognised is not None and self.bias_k is not None and (recognised.left is not None or recognised.right):
                recognised = None  # a window, but every query sees the added key, however far
            if recognised is None:
                of_mask = self._as_bias("attn_mask", attn_mask, query.dtype)
                bias = of_mask if bias is None else bias + of_mask
            else:
                pattern = recognised  # the mask decides, not the hint
                if pattern.key_mask is not None:
                    visible = pattern.key_mask.expand(batch, key_length)
                    key_mask = visible if key_mask is None else key_mask & visible
        if key_mask is not None and not torch.compiler.is_compiling() and bool(key_mask.all()):
            key_mask = None
        return pattern._replace(key_mask=key_mask), None if bias is None else bias.expand(batch, -1, -1, -1)

    def _check_masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        shape: tuple[int, int, int, int],
    ) -> None:
        batch, heads, length, key_length = shape
        shapes = {
            "key_padding_mask": (key_padding_mask, ((batch, key_length), *([(key_length,)] if batch == 1 else []))),
            "attn_mask": (attn_mask, ((length, key_length), (batch * heads, length, key_length))),
        }
        for name, (x, allowed) in shapes.items():
            if is_causal_bias(x):
                continue
            if x is not None and not (isinstance(x, Tensor) and (x.dtype == torch.bool or x.is_floating_point())):
                raise TypeError(f"{name} must be a bool or float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
            if x is not None and tuple(x.shape) not in allowed:
                raise ValueError(f"{name} must have the shape {' or '.join(map(str, allowed))}, got {tuple(x.shape)}")
        if is_causal and key_padding_mask is None and (self.bias_k is not None or self.add_zero_attn):
            raise ValueError(
                "is_causal=True: whether torch shows the keys of add_bias_kv and add_zero_attn then depends on "
                "need_weights and key_padding_mask; pass the causal attn_mask with is_causal=False, which shows them"
            )

    def _as_bias(self, name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
        allow_whole_map(name, mask, self.allow_dense, where=" to the module", stacklevel=8)
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)

    def _causal_mask(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """The mask that torch's own attention needs for is_causal=True, or for a causal bias."""
        axis = 1 if self.batch_first and query.dim() == 3 else 0
        lengths = query.shape[axis], key.shape[axis]
        pattern = read_causal_bias(bias, *lengths) or CAUSAL
        assert pattern.query_offset is not None
        return torch.ones(lengths, dtype=torch.bool, device=query.device).triu(1 + pattern.query_offset)


@contextmanager
def replace_attention(
    model: torch.nn.Module,
    *,
    statistics: Iterable[Statistic | str],
    heads: Heads | None = None,
    backend: Backend = "auto",
    allow_dense: bool = False,
    differentiable: bool = False,
) -> Iterator[dict[str, Statistics]]:
    """Make every torch.nn.MultiheadAttention in a model a `MultiheadAttention` inside the `with`.

    The modules, their parameters and hooks stay the same objects. Subclasses of torch's module with attention of their
    own are left alone. Unlike `attnstats.patch_sdpa` it touches nothing but this model, and knows names.

    Args:
        model: the model, wrapped or not (torch.compile, DDP, FSDP), or a torch.nn.MultiheadAttention itself.
        statistics, heads, backend, allow_dense, differentiable: as for `MultiheadAttention`.

    Yields:
        The `Statistics` of each module's most recent call by the module's name; of a module that wasn't called, none.

    Raises:
        ValueError: the model has no torch.nn.MultiheadAttention.

    Example:
        >>> import torch, attnstats
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 2).eval()
        >>> with attnstats.nn.replace_attention(encoder, statistics=["entropy"]) as run:
        ...     output = encoder(torch.randn(1, 12, 32))
        >>> list(run), run["layers.0.self_attn"]["entropy"].shape
        (['layers.0.self_attn', 'layers.1.self_attn'], torch.Size([1, 4, 12]))
    """
    settings = _settings(
        statistics, heads=heads, backend=backend, allow_dense=allow_dense, differentiable=differentiable
    )
    refuse_replicas(model)
    model = unwrap(model)
    theirs = {name: m for name, m in model.named_modules() if type(m) is torch.nn.MultiheadAttention}
    if not theirs:
        raise ValueError(
            f"model: {type(model).__name__} has no torch.nn.MultiheadAttention; attnstats.patch_sdpa records calls of "
            "scaled_dot_product_attention, attnstats.capture transformers models"
        )
    results: dict[str, Statistics] = {}
    encoders = [m for m in model.modules() if isinstance(m, torch.nn.TransformerEncoder) and m.use_nested_tensor]
    hooks = []
    try:
        for name, module in theirs.items():
            module.__class__ = MultiheadAttention
            module.__dict__.update(settings)
            hooks.append(module.register_forward_hook(partial(_keep, results, name)))
        for encoder in encoders:
            encoder.use_nested_tensor = False
        yield results
    finally:
        for encoder in encoders:
            encoder.use_nested_tensor = True
        for hook in hooks:
            hook.remove()
        for module in theirs.values():
            module.__class__ = torch.nn.MultiheadAttention
            for attribute in settings:
                module.__dict__.pop(attribute, None)


def _settings(statistics: Iterable[Statistic | str], **settings: Any) -> dict[str, Any]:
    """The attributes of a `MultiheadAttention` that torch's module does not have."""
    return {"requested": _resolved(statistics), "statistics": None, **settings}


def _resolved(statistics: Iterable[Statistic | str]) -> tuple[Statistic, ...]:
    resolved = resolve(statistics)
    refuse_boundaries_of_the_call(resolved, "MultiheadAttention")
    return resolved


def _no_fast_path(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A hook without effect: with one TransformerEncoderLayer calls its attention module, not one fused function."""


def _keep(results: dict[str, Statistics], name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
    assert isinstance(module, MultiheadAttention)
    assert module.statistics is not None
    results[name] = module.statistics
