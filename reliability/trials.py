"""What the fuzzer draws: a call or a tiny model, the path that computes it, and what is looked at besides its numbers.

A `Trial` prints as the expression that makes it. `drawn` draws one through the two methods of `Draw`, which hypothesis
(tests/test_fuzz.py) and a seeded generator (reliability/fuzz.py) have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MeanDistance, Received, SegmentMass
from attnstats.tiled import native
from tests import families, verdicts
from tests.cases import Case, check, computed_by
from tests.teacher import check_live
from tests.test_defaults import defaults
from tests.test_differentiable import agree
from tests.tiny import WEIGHT_TOLERANCE, by_definition

T = TypeVar("T")
WIDE = (255, 1000, 1023, 1024, 10**6, 2**31 - 2)
# Of the 157 families on which `capture` works, those whose sizes can be chosen freely.
FAMILIES = (
    "afmoe",
    "arcee",
    "cohere",
    "cohere2",
    "exaone4",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "persimmon",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
)
ENCODERS = ("bert (encoder)", "roberta (encoder)", "modernbert")


class Draw(Protocol):
    def integer(self, low: int, high: int) -> int:
        """Both ends included."""

    def pick(self, options: Sequence[T]) -> T: ...


@dataclass(frozen=True)
class Masked:
    """A call of scaled_dot_product_attention under `patch_sdpa`, with a mask."""

    mask: str = "upper left"  # upper left, lower right: torch's CausalBias; causal, padding; "float" before: additive
    heads: int = 2
    query_length: int = 9
    key_length: int = 9
    head_dim: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Model:
    """A tiny random model of a family, captured while it reads or, with `new` tokens, while it generates."""

    family: str = "llama"
    key_heads: int = 2
    group: int = 2
    head_dim: int = 16
    window: int = 8
    length: int = 9
    padding: str = "none"  # none, left, right
    new: int = 0
    beams: int = 1
    cache: str | None = None
    chunk: int | None = None
    seed: int = 0

    def build(self) -> Any:
        heads = self.key_heads * self.group
        width = heads * self.head_dim
        sizes: dict[str, Any] = {
            **dict.fromkeys(["hidden_size", "n_embd", "word_embed_proj_dim"], width),
            **dict.fromkeys(["num_attention_heads", "n_head"], heads),
            "num_key_value_heads": self.key_heads,
            **dict.fromkeys(["head_dim", "query_pre_attn_scalar"], self.head_dim),
            "sliding_window": self.window,
            **dict.fromkeys(["local_attention"], 2 * self.window),
        }
        return families.build(self.family, self.seed, **sizes)

    def inputs(self) -> dict[str, Tensor]:
        mask = torch.ones(2, self.length, dtype=torch.long)
        missing = self.seed % self.length
        if self.padding == "left":
            mask[1, :missing] = 0
        elif self.padding == "right" and missing:
            mask[1, -missing:] = 0
        return {"input_ids": families.tokens(length=self.length, seed=self.seed), "attention_mask": mask}


@dataclass(frozen=True)
class Trial:
    path: str  # a key of PATHS
    of: Case | Masked | Model
    also: str = ""  # a key of ALSO

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self.of, f.name)!r}"
            for f in dataclasses.fields(self.of)
            if getattr(self.of, f.name) != f.default
        ]
        also = f", also={self.also!r}" if self.also else ""
        return f"Trial({self.path!r}, {type(self.of).__name__}({', '.join(changed)}){also})"

    def run(self, device: torch.device | str = "cpu") -> None:
        """Raises AssertionError, or whatever a call raised, where something is wrong."""
        of = self.of
        if isinstance(of, Masked):
            return check_masked(of)
        if isinstance(of, Model):
            return check_model(of)
        backend, _, how = self.path.partition(" ")
        device = device if backend in KERNELS else "cpu"
        before = native.enabled
        native.enabled = before and backend != "plain"
        try:
            backend = "tiled" if backend == "plain" else backend
            ALSO[self.also](of, backend, device, how == "from_lse")
        finally:
            native.enabled = before


# Drawing


def drawn(draw: Draw) -> Trial:
    path = draw.pick(SHARES)
    if path == "patch_sdpa":
        return Trial(path, drawn_mask(draw))
    if path in ("capture", "live"):
        return Trial(path, drawn_model(draw, path == "live"))
    backend, _, how = path.partition(" ")
    case = drawn_case(draw, backend in KERNELS, how == "varlen")
    if backend == "flash":
        case = _taken_by_torch(case)
    also = ""
    if how != "from_lse":
        also = draw.pick(EXTRAS[backend if backend in KERNELS else "tiled"])
        if also == "gradients":  # of numbers that float32 can say something about
            case = dataclasses.replace(case, spoiled="", spread=min(case.spread, 1.0), bias=0.0, dtype="float32")
    elif case.spoiled:
        case = dataclasses.replace(case, spoiled="")  # statistics_from_lse has no lse of such rows to be given
    return Trial(path, case, also)


def _taken_by_torch(case: Case) -> Case:
    """What torch's flash kernel for the CPU takes."""
    case = dataclasses.replace(case, softcap=None, window_size=None, value_dim=case.head_dim)
    if case.is_causal and case.query_length > 1:
        case = dataclasses.replace(case, key_length=case.query_length, query_offset=None)
    return case


def drawn_case(draw: Draw, few_tiles: bool, is_packed: bool) -> Case:
    """`few_tiles`: for Triton's interpreter, whose time goes with their number."""

    def length() -> int:
        if few_tiles:
            return draw.pick((1, draw.integer(1, 20), draw.integer(1, 20), 33))
        return draw.pick((1, draw.integer(1, 40), draw.integer(1, 40), draw.pick((16, 31, 32, 33, 64, 65))))

    query_length = length()
    is_causal = draw.pick((False, True))
    relation = draw.pick(("self", "self", "cached", "offset") if is_causal else ("self", "cross", "offset"))
    key_length, query_offset = query_length, None
    if relation in ("cached", "cross"):
        key_length += draw.integer(1, 40)
    elif relation == "offset":
        key_length = length()
        query_offset = draw.integer(0, 45)
    head_dim = draw.integer(1, 48)
    packed: tuple[tuple[int, int], ...] = ()
    if is_packed:
        relation, query_offset = "packed", None
        longest = 20 if few_tiles else 33
        pairs = [(draw.integer(0, longest), draw.integer(0, longest)) for _ in range(draw.integer(1, 4))]
        pairs[0] = (max(1, pairs[0][0]), max(1, pairs[0][1]))
        packed = tuple(pairs) if is_causal else tuple((n, n) for n, _ in pairs)
    window_size = None
    if relation != "cross" and draw.pick((False, True)):
        window_size = (draw.integer(-1, 40), draw.integer(-1, 20))
    padding = draw.pick(("none", "none", "left", "right", "holes", "all"))
    spread, bias, scale, spoiled = draw.pick((0.1, 1.0, 1.0, 10.0, 100.0)), 0.0, None, ""
    dtype = draw.pick(("float32", "float16", "bfloat16", "float32" if few_tiles else "float64"))
    kind = draw.pick(("", "", "", "", "", "bias", "spoiled", "scale"))
    if kind == "bias":
        spread, dtype, bias, scale = 1.0, "float32", draw.pick((330.0, 520.0, -520.0)), 0.11
    elif kind == "spoiled":  # a padded key is never looked at, or spoils every row, as in torch
        places = ("nan query", "inf query", "nan key", "inf key") if padding == "none" else ("nan query",)
        spread, spoiled = 1.0, draw.pick(places)
    elif kind == "scale":
        scale = draw.pick((0.01, 1.0))
    return Case(
        batch=1 if few_tiles else draw.integer(1, 2),
        key_heads=draw.integer(1, 2),
        group=draw.integer(1, 2 if few_tiles else 3),
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=draw.pick((head_dim, head_dim, 24)),
        dtype=dtype,
        is_causal=is_causal,
        padding=padding,
        counted=draw.pick(("all", "all", "some", "none")),
        weighted=draw.pick((False, False, True)),
        query_offset=query_offset,
        softcap=draw.pick((None, None, 0.5, 5.0)) if not bias and "inf" not in spoiled else None,
        window_size=window_size,
        sinks=draw.pick((False, True)),
        packed=packed,
        heads=draw.pick(("all", "all", "some", "split")),
        layout=draw.pick(("plain", "bthd", "guarded", "strided")),
        spread=spread,
        bias=bias,
        scale=scale,
        waad=draw.pick((10, 10, *WIDE)),
        spoiled=spoiled,
        seed=draw.integer(0, 2**16),
        asked=tuple(sorted({draw.integer(0, 18) for _ in range(draw.integer(1, 3 if few_tiles else 5))})),
    )


def drawn_mask(draw: Draw) -> Masked:
    query_length, key_length = draw.integer(1, 40), draw.integer(1, 40)
    mask = draw.pick(("upper left", "lower right", "causal", "padding", "float causal", "float padding"))
    if mask == "lower right":  # no query without a key
        query_length, key_length = sorted((query_length, key_length))
    return Masked(
        mask=mask,
        heads=draw.integer(1, 3),
        query_length=query_length,
        key_length=key_length,
        head_dim=draw.integer(1, 32),
        seed=draw.integer(0, 2**16),
    )


def drawn_model(draw: Draw, live: bool) -> Model:
    family = draw.pick(FAMILIES if live else (*FAMILIES, *ENCODERS))
    group = draw.integer(1, 3)
    shared: dict[str, Any] = {
        "family": family,
        "key_heads": draw.integer(1, 2),
        "group": group,
        "head_dim": 8 * draw.integer(1, 3),  # of which a quarter may be rotated, by pairs
        "window": draw.integer(1, 12),
        "length": draw.integer(1, families.LENGTH),
        "seed": draw.integer(0, 2**16),
    }
    if not live:
        padding = draw.pick(("none", "right") if family in ENCODERS else ("none", "left", "right"))
        return Model(**shared, padding=padding)
    model = Model(
        **shared,
        padding=draw.pick(("none", "left")),
        new=draw.integer(1, 6),
        beams=draw.pick((1, 1, 2)),
        cache=draw.pick((None, None, "static")),
        chunk=draw.pick((None, None, draw.integer(1, 8))),
    )
    # A dynamic cache keeps every key of a window of 1, which is refused.
    return dataclasses.replace(model, cache="static") if model.window == 1 else model


# Comparing


def _call(case: Case, backend: str, device: Any, leaves: Sequence[Tensor], given: dict[str, Any]) -> Any:
    """Output and statistics, which are differentiable where all of them can be."""
    statistics = computed_by(backend, case.statistics())
    if isinstance(given["heads"], dict):
        given = given | {"heads": {s: given["heads"][s] for s in statistics}}
    differentiable = all(s.differentiable for s in statistics)
    function = attnstats.varlen_attention if case.packed else attnstats.attention
    options = {"statistics": statistics, "differentiable": differentiable, "backend": backend}
    return function(*case.views(leaves), **given | options)


def _given(case: Case, device: Any) -> dict[str, Any]:
    """The arguments of the case's call of its own statistics."""
    bounds = {"segment_boundaries": case.boundaries().to(device)} if SegmentMass() in case.statistics() else {}
    return case.arguments(device) | bounds


def _gather(result: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Everything that a call returned or will compute when asked, gradients included."""
    output, stats = result
    loss = output.float().square().sum()
    for x in stats.tensors.values():
        if x.requires_grad:
            loss = loss + x.masked_fill(~x.isfinite(), 0.0).float().square().sum()
    of_stats = [x for s, own in stats.tensors.items() for x in (own, stats.valid[s])]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach().clone() for x in (output, stats.lse, *of_stats, *stats.counts.values(), *gradients)]


def _assert_same_bits(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert (x.dtype, x.device) == (y.dtype, y.device), f"{what}: result {i} is of {x.dtype} on {x.device}"
        assert torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)), f"{what}: result {i} differs"


def _leaves(case: Case, device: Any) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in case.tensors(device)]


def check_gradients(case: Case, backend: str, device: Any, from_lse: bool) -> None:
    check(case, backend, device)
    asked = [s for s in computed_by(backend, case.statistics()) if s.differentiable]
    agree(case, asked, backend, device)


def check_rewritten(case: Case, backend: str, device: Any, from_lse: bool) -> None:
    """A mask that is written into after a call changes nothing of it, and the next call reads it again."""
    leaves = _leaves(case, device)

    def rewrite(given: dict[str, Any]) -> None:
        for name in ("key_padding_mask", "query_mask", "query_weight", "segment_boundaries"):
            if given.get(name) is not None and given[name].dtype != torch.bool:
                given[name].data.zero_()
        for name in ("key_padding_mask", "query_mask", "cu_seqlens_q", "cu_seqlens_k"):
            buffer = given.get(name)
            if buffer is not None and buffer.dtype == torch.bool:
                buffer.data.logical_not_()  # unseen by autograd's versions, as numpy and kernels write
            elif buffer is not None:
                buffer.data[1:] = buffer.data[-1].clone()

    expected = _gather(_call(case, backend, device, leaves, _given(case, device)), leaves)
    given = _given(case, device)
    result = _call(case, backend, device, leaves, given)
    rewrite(given)
    _assert_same_bits("rewritten after the call", _gather(result, leaves), expected)
    fresh = _given(case, device)
    rewrite(fresh)
    found, expected = (_gather(_call(case, backend, device, leaves, x), leaves) for x in (given, fresh))
    _assert_same_bits("rewritten between calls", found, expected)


def check_defaults(case: Case, backend: str, device: Any, from_lse: bool) -> None:
    """Another default device and dtype of torch's change no bit."""
    leaves, given = _leaves(case, device), _given(case, device)

    def run() -> list[Tensor]:
        return _gather(_call(case, backend, device, leaves, given), leaves)

    for other in (("meta", torch.bfloat16), ("cpu", torch.float64)):
        with defaults(*other):
            output, stats = _call(case, backend, device, leaves, given)
            found = [
                output,
                stats.lse,
                *stats.tensors.values(),
                *(stats.valid[s] for s in stats),
                *stats.counts.values(),
            ]
            found = [x.detach() for x in found]
        output, stats = _call(case, backend, device, leaves, given)
        expected = [
            output,
            stats.lse,
            *stats.tensors.values(),
            *(stats.valid[s] for s in stats),
            *stats.counts.values(),
        ]
        _assert_same_bits(f"defaults {other}", found, [x.detach() for x in expected])


def check_second(case: Case, backend: str, device: Any, from_lse: bool) -> None:
    """A loss on gradients raises as torch's does."""
    leaves = _leaves(case, device)
    output, _ = _call(case, backend, device, leaves, _given(case, device))
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative of attention's gradients"):
        (output.sum() + grad.square().sum()).backward()


def check_masked(of: Masked) -> None:
    generator = torch.Generator().manual_seed(of.seed)
    queries, keys = of.query_length, of.key_length
    query, key, value = (torch.randn(2, of.heads, n, of.head_dim, generator=generator) for n in (queries, keys, keys))
    kind, additive = of.mask.removeprefix("float "), of.mask.startswith("float ")
    real = torch.ones(2, keys, dtype=torch.bool)
    if kind == "padding":
        real = torch.rand(2, keys, generator=generator) > 0.3
        real[:, 0] = True
        visible = real[:, None, None].expand(2, 1, queries, keys)
    else:
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if kind == "lower right" else 0)
    mask: Any = visible
    if kind == "upper left":
        mask = causal_upper_left(queries, keys)
    elif kind == "lower right":
        mask = causal_lower_right(queries, keys)
    elif additive:
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    distances = [WAAD(4), MeanDistance()] if queries == keys else []
    statistics = (Received(), Entropy(), *distances)
    with attnstats.patch_sdpa(statistics=statistics) as run:
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query.double() @ key.double().mT / of.head_dim**0.5).masked_fill(~visible, -torch.inf)
    maps = scores.softmax(-1).nan_to_num()
    off = float((output.double() - maps @ value.double()).abs().max())
    assert off <= 1e-5 * max(1.0, float(value.abs().max())), f"output: off by {off:.1e}"
    rows = real if kind == "padding" and queries == keys else torch.ones(2, queries, dtype=torch.bool)
    for s in statistics:
        expected = by_definition(s, maps, rows, torch.ones(2, keys))
        off = float((run[0][s].double() - expected).abs().max())
        factor = 10 if isinstance(s, Entropy) else 4 if isinstance(s, WAAD) else max(queries, keys)
        assert off <= WEIGHT_TOLERANCE * factor, f"{s}: off by {off:.1e}"


def check_model(of: Model) -> None:
    model, inputs = of.build(), of.inputs()
    with _quiet():
        if not of.new:
            assert not (complaint := verdicts.complaint_of(of.family, model, inputs, False)), complaint
            return
        options: dict[str, Any] = {
            "num_beams": of.beams,
            "cache_implementation": of.cache,
            "prefill_chunk_size": of.chunk,
        }
        statistics = (WAAD(3), LocalMass(4), FAI(1, 4), FAI(0, None), Received(), Entropy(), MeanDistance())
        check_live(model, inputs, of.new, statistics, **{k: v for k, v in options.items() if v is not None})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


ALSO: dict[str, Callable[[Case, str, Any, bool], None]] = {
    "": check,
    "gradients": check_gradients,
    "rewritten": check_rewritten,
    "defaults": check_defaults,
    "second": check_second,
}
KERNELS = ("triton", "flash")
EXTRAS = {  # a call has at most one
    "tiled": ("",) * 12 + ("gradients",) * 4 + ("rewritten",) * 2 + ("defaults", "second"),
    "triton": ("",) * 16 + ("gradients", "rewritten", "defaults", "second"),
    "flash": ("",),  # the others ask for gradients of statistics in float32
}
PATHS = {  # and how many of a hundred cases each has
    "tiled": 23,  # the compiled sums
    "plain": 15,  # the same in plain PyTorch
    "tiled varlen": 11,
    "plain varlen": 6,
    "tiled from_lse": 11,
    "plain from_lse": 6,
    "triton": 6,
    "flash": 2,
    "triton varlen": 3,
    "triton from_lse": 4,
    "patch_sdpa": 6,
    "capture": 5,
    "live": 2,
}
SHARES = [path for path, share in PATHS.items() for _ in range(share)]
