"""Statistics that carry gradients: by finite differences, and against autograd through the reference in float64."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

import attnstats
from attnstats import (
    FAI,
    LSE,
    WAAD,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PooledMap,
    Received,
    SegmentMass,
    SinkMass,
    TopKeys,
    reference,
)
from attnstats.statistics import ColumnStatistic, RowStatistic
from attnstats.tiled import band, sweep
from tests.cases import Case
from tests.guards import Guarded


@triton.jit
def decaying(distance, scale: tl.constexpr, _: tl.constexpr):
    return tl.exp(-tl.abs(distance) / scale)


@dataclass(frozen=True)
class Decay(RowStatistic):
    """A user's own: it has a weight everywhere, and a parameter."""

    kernel_weight = decaying
    scale: int = 3

    def weight(self, distance):
        return torch.exp(-distance.abs().double() / self.scale)


@dataclass(frozen=True)
class Ahead(ColumnStatistic):
    """A user's own sum of a column, with a band."""

    kernel_weight = decaying
    scale: int = 3

    @property
    def band(self):
        return -4096, 4096  # the weight is 0 beyond, to all digits

    def weight(self, distance):
        return torch.exp(-distance.abs().double() / self.scale)


EVERY = (
    WAAD(1),
    WAAD(4),
    LocalMass(3),
    MeanDistance(),
    Entropy(),
    LSE(),
    FAI(0, 0),
    FAI(2, 9),
    FAI(3, None),
    Received(),
    SegmentMass((0, 2, None)),
)
OWN = (Decay(), Ahead())
NO_DISTANCE = (Entropy(), LSE(), Received())

FEATURES = {
    "causal": {"group": 1},
    "full": {"is_causal": False},
    "window": {"window_size": (3, 0)},
    "window-both": {"window_size": (3, 2), "is_causal": False},
    "softcap-sinks": {"softcap": 1.5, "spread": 3.0, "sinks": True},
    "padding": {"padding": "left", "counted": "some", "sinks": True},
    "holes": {"padding": "holes", "is_causal": False},
    "heads-some": {"heads": "some", "group": 3, "key_heads": 1},
    "heads-split": {"heads": "split"},
    "packed": {"counted": "some", "sinks": True},
}
SMALL = {"batch": 1, "key_heads": 1, "head_dim": 3, "value_dim": 2}


def heads_of(case, asked):
    """The case's choice of heads for these statistics."""
    every = range(case.key_heads * case.group)
    if case.heads == "some":
        return list(every)[::2][::-1]
    if case.heads == "split":
        return {s: list(every)[isinstance(s, ColumnStatistic) :: 2] or [0] for s in asked}
    return None


def call(module, case, asked, inputs, **options):
    """Output and statistics, without what is -inf."""
    options |= {"heads": heads_of(case, asked), "sinks": inputs[3] if len(inputs) > 3 else None}
    output, stats = case.call(module, inputs[:3], statistics=asked, differentiable=True, **options)
    return output, *(stats[s].masked_fill(stats[s] == -torch.inf, 0.0) for s in asked)


def inputs_of(case, dtype, device="cpu"):
    tensors = case.tensors(device)
    if (sinks := case.arguments(device)["sinks"]) is not None:
        tensors = (*tensors, sinks)
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("name", FEATURES)
def test_finite_differences(name, backend):
    """In float64, for every statistic and the output at once."""
    sizes = {"packed": ((2, 3), (0, 1), (4, 4))} if name == "packed" else {"query_length": 6, "key_length": 6}
    case = Case(**SMALL | sizes | FEATURES[name])
    inputs = inputs_of(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: call(attnstats, case, (*EVERY, *OWN), inputs, backend=backend), inputs
    )


def gradients(module, case, asked, dtype, device="cpu", with_output=True, **options):
    inputs = inputs_of(case, dtype, device)
    generator = torch.Generator().manual_seed(5)
    found = call(module, case, asked, inputs, **options)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in (found if with_output else found[1:])
    )
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def agree(case, asked, backend, device, dtype=torch.float32, **options):
    found = gradients(attnstats, case, asked, dtype, device, backend=backend, **options)
    expected = gradients(reference, case, asked, torch.float64, device, **options)
    eager = gradients(reference, case, asked, dtype, device, **options)
    # Gradients of query and key are sums, of terms that may cancel, times the scale.
    steepness = max(1.0, (case.scale or 0.0) * case.head_dim**0.5)
    for name, x, y, by_eager in zip(("query", "key", "value", "sinks"), found, expected, eager, strict=False):
        floor = 64 * torch.finfo(torch.float32).eps * steepness + torch.finfo(dtype).eps
        limit = 3 * float((by_eager.double() - y).abs().max()) + floor * max(1.0, float(y.abs().max()))
        error = float((x.double() - y).abs().max())
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("name", FEATURES)
def test_kernels_match_the_reference(name, monkeypatch, device):
    monkeypatch.setattr(sweep, "gradients", None)
    sizes = {"packed": ((5, 9), (0, 3), (33, 33))} if name == "packed" else {"query_length": 37, "key_length": 37}
    agree(Case(**{"batch": 1, "key_heads": 1} | sizes | FEATURES[name]), (*EVERY, *OWN), "triton", device)


BESIDE_THE_DIAGONAL = (WAAD(1), WAAD(4), LocalMass(3), FAI(0, 0), FAI(2, 9), LSE())
FLASH = {
    "causal": {},
    "full": {"is_causal": False},
    "padding": {"padding": "left", "counted": "some"},
    "holes": {"padding": "holes", "is_causal": False},
    "heads-some": FEATURES["heads-some"],
    "heads-split": FEATURES["heads-split"],
    "strided": {"layout": "bthd"},
    "rows beyond the keys": {"key_length": 100, "is_causal": False, "query_offset": 0},
    "more keys than rows": {"query_length": 100, "is_causal": False, "query_offset": 30},
}


@pytest.mark.parametrize("name", FLASH)
def test_a_narrow_band_beside_torchs_kernel(name, monkeypatch):
    """On tiled, whose sweep over all pairs isn't needed."""
    monkeypatch.setattr(sweep, "gradients", None)
    monkeypatch.setattr(band, "BLOCK_ELEMENTS", 2**13)  # so that a head spans several
    case = Case(**{"key_heads": 1, "query_length": 150, "key_length": 150} | FLASH[name])
    agree(case, BESIDE_THE_DIAGONAL, "tiled", "cpu")
    agree(case, (LSE(),), "tiled", "cpu", with_output=False)


def test_a_narrow_band_by_finite_differences(monkeypatch):
    monkeypatch.setattr(sweep, "gradients", None)
    monkeypatch.setattr(band, "BAND_ROWS", 4)
    case = Case(**SMALL | {"value_dim": 3, "query_length": 41, "key_length": 41, "padding": "right"})
    inputs = inputs_of(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: call(attnstats, case, BESIDE_THE_DIAGONAL, inputs, backend="tiled"), inputs
    )


@pytest.mark.parametrize(
    "changed",
    [{"bias": 300.0}, {"sinks": True}, {"window_size": (30, 0)}, {"softcap": 3.0}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_what_torchs_kernel_would_get_wrong_is_swept(changed, monkeypatch):
    calls = []
    swept = sweep.gradients
    monkeypatch.setattr(sweep, "gradients", lambda *given: calls.append(given) or swept(*given))
    case = Case(**{"batch": 1, "key_heads": 1, "query_length": 80, "key_length": 80} | changed)
    agree(case, (WAAD(4), FAI(2, 9)), "tiled", "cpu", getattr(torch, case.dtype))
    assert calls


@pytest.mark.parametrize("asked", [(WAAD(4),), (FAI(2, 9),), (Received(),), (Entropy(),), (LSE(),)], ids=str)
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_a_statistic_alone(backend, asked, where):
    """A loss of nothing but the statistic, so that the value gets none."""
    case = Case(batch=1, key_heads=1, query_length=20, key_length=40, softcap=3.0)
    agree(case, asked, backend, where, with_output=False)
    found = gradients(attnstats, case, asked, torch.float32, where, with_output=False, backend=backend)
    assert not found[2].any()
    assert found[0].any()
    assert found[1].any()


def test_queries_far_behind_keys_that_score_very_low(device):
    """A key that doesn't exist has the score 0, whose A would be inf."""

    def gradients_of(module, dtype, **options):
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 1, n, 16, generator=generator) * 0.1 for n in (5, 20, 20))
        query[..., 0], key[..., 0] = 300, -300
        inputs = [x.to(device, dtype).requires_grad_() for x in (query, key, value)]
        options |= {"statistics": [WAAD(4)], "differentiable": True, "query_offset": 60}
        output, stats = module.attention(*inputs, **options)
        return torch.autograd.grad(output.sum() + stats["waad"].square().sum(), inputs)

    truth, eager = (gradients_of(reference, dtype) for dtype in (torch.float64, torch.float32))
    for x, y, by_eager in zip(gradients_of(attnstats, torch.float32, backend="triton"), truth, eager, strict=True):
        assert float((x - y).abs().max()) <= 3 * float((by_eager - y).abs().max())


@pytest.mark.parametrize("backend", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, backend, where):
    case = Case(batch=1, key_heads=1, dtype=str(dtype).removeprefix("torch."))
    agree(case, (WAAD(4), Entropy(), FAI(2, 9), Received()), backend, where, dtype)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_cross_attention(backend, where):
    case = Case(batch=1, key_heads=1, query_length=20, key_length=33, is_causal=False, padding="right")
    agree(case, NO_DISTANCE, backend, where)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
@pytest.mark.parametrize(
    ("refused", "match"),
    [
        (MaxLogit(), r"differentiable: MaxLogit\(\) carries no gradients; .*differentiable=False"),
        (SinkMass(2), "differentiable: SinkMass"),
        (PooledMap(2, 2), "differentiable: PooledMap"),
        (TopKeys(), "differentiable: TopKeys"),
        (Received(last=3), r"differentiable: Received\(last=3\) of the last queries"),
    ],
    ids=str,
)
def test_what_carries_none_is_refused(refused, match, backend):
    tensors = Case(group=1).tensors()
    with pytest.raises(ValueError, match=match):
        attnstats.attention(*tensors, statistics=[refused], differentiable=True, backend=backend)
    attnstats.attention(*tensors, statistics=[refused], backend=backend)


def test_other_errors():
    query, key, value = Case(group=1).tensors()
    lse = torch.zeros(query.shape[:3])
    with pytest.raises(TypeError, match="statistics_from_lse: unknown argument 'differentiable'"):
        attnstats.statistics_from_lse(query, key, lse, statistics=["waad"], differentiable=True)
    with pytest.raises(TypeError, match="differentiable must be True or False, got 1"):
        attnstats.attention(query, key, value, differentiable=1)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_only_what_was_asked_for_carries_gradients(backend, where):
    inputs = inputs_of(Case(batch=1, group=2, key_heads=1, query_length=20, key_length=20), torch.float32, where)
    asked = [WAAD(), FAI(2, 9), Entropy(), LSE()]  # not in the order of their heads
    options = {"statistics": asked, "backend": backend, "enable_gqa": True, "heads": {WAAD(): [1], Entropy(): [0]}}
    _, stats = attnstats.attention(*inputs, **options)
    assert not any(stats[s].requires_grad for s in asked)
    _, carrying = attnstats.attention(*inputs, differentiable=True, **options)
    assert all(carrying[s].requires_grad for s in asked)
    assert not carrying.lse.requires_grad
    _, stats = attnstats.attention(*(x.detach() for x in inputs), differentiable=True, **options)
    assert all(torch.equal(stats[s], carrying[s]) for s in asked)
    assert not any(stats[s].requires_grad for s in asked)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_gradients_of_attention_alone_are_the_same_bits(backend, where):
    """I3: whether statistics are asked for or not, and on tiled whatever kernel made the output."""
    for changed in ({}, {"value_dim": 24}, {"sinks": True}):
        case = Case(batch=1, key_heads=1, query_length=40, key_length=40, **changed)
        found = []
        for asked in ([], [WAAD(), FAI(2, 9), Received(), Entropy()]):
            inputs = inputs_of(case, torch.float32, where)
            options = {"sinks": inputs[3] if len(inputs) > 3 else None, "backend": backend}
            output, _ = case.call(attnstats, inputs[:3], statistics=asked, **options)
            found.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_tiled_allocates_nothing_of_the_size_of_the_map(monkeypatch):
    monkeypatch.setattr(sweep, "BLOCK_ELEMENTS", 2**12)
    largest = []
    for length in (256, 512, 1024):
        inputs = inputs_of(Case(batch=1, key_heads=1, group=1, query_length=length, key_length=length), torch.float32)
        with Guarded() as guards:
            output, stats = attnstats.attention(*inputs, statistics=EVERY, differentiable=True, backend="tiled")
            (output.sum() + sum(stats[s].sum() for s in EVERY)).backward()
        largest.append(guards.largest)
    assert largest[2] <= 2 * largest[1] <= 4 * largest[0]


SECOND = {
    "tiled": {"backend": "tiled"},
    "triton": {"backend": "triton"},
    "packed": {"backend": "tiled"},
    "sinks alone": {"backend": "tiled"},
    "patched": {},
    "in a graph": {"backend": "tiled"},
    "in a graph of reference": {"backend": "reference"},
}


@pytest.mark.parametrize("of", ["output", "waad"])
@pytest.mark.parametrize("how", SECOND)
def test_a_loss_on_gradients_is_refused_as_torch_refuses_it(how, of):
    """A dropped penalty gave 1.0 for 3.71: the gradient must carry a graph that raises."""
    query, key, value = Case(1, 1, 1, 9, 9).tensors()
    options, leaf = SECOND[how], query.requires_grad_()
    if how == "sinks alone":
        leaf = query.new_tensor([0.5]).requires_grad_()
        query, options = query.detach(), options | {"sinks": leaf}

    def attend(query):
        if how == "patched":
            with attnstats.patch_sdpa(statistics=["waad"]):
                return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        given = {"statistics": [WAAD(4)], "differentiable": True, **options}
        if how == "packed":
            rows = [x[0].transpose(0, 1) for x in (query, key, value)]
            cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
            result = attnstats.varlen_attention(*rows, cu_seqlens_q=cu_seqlens, **given)
        else:
            result = attnstats.attention(query, key, value, **given)
        return result.output if of == "output" else result.statistics["waad"]

    call = torch.compile(attend, backend="eager") if "graph" in how else attend
    found = call(query)
    (grad,) = torch.autograd.grad(found.square().sum(), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(call(query).square().sum(), leaf)
    assert grad.requires_grad
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=r"derivative of attention's gradients.*backend='reference'"):
        (found.sum() + grad.square().sum()).backward()


def test_reference_has_second_derivatives():
    query, key, value = Case(1, 1, 1, 5, 5, 4, 4).tensors()
    leaves = [x.double().requires_grad_() for x in (query, key, value)]

    def attend(*leaves):
        output, stats = attnstats.attention(*leaves, statistics=[WAAD(3)], differentiable=True, backend="reference")
        return output, stats["waad"]

    assert torch.autograd.gradgradcheck(attend, leaves)


def attended(x, backend):
    result = attnstats.attention(x, x, x, is_causal=True, statistics=["waad"], differentiable=True, backend=backend)
    return result.output.sum() + result.statistics["waad"].square().sum()


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None])[0],
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.func.vmap(f)(y[None]).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_by_name(name):
    x = torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"attnstats: torch.func.*backend='reference'"):
        TRANSFORMS[name](lambda y: attended(y, "tiled"), x)
    if name == "grad of vmap":  # which is an operator
        return
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attended(y, "reference"), y)
    actual = TRANSFORMS[name](lambda y: attended(y, "reference"), x)
    torch.testing.assert_close(actual, (expected * x).sum() if name == "jvp" else expected)


def test_a_dual_tensor_is_refused_by_name():
    x = torch.randn(1, 2, 7, 4)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attended(forward_ad.make_dual(x, x), "tiled")
