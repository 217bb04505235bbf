"""The backend "flash" from end to end, with torch's kernel for the CPU in the place of a GPU's, and what it says."""

import pytest
import torch

import attnstats
from attnstats import FAI, LSE, WAAD, Entropy, LocalMass, MaxLogit, Received, SinkMass, _dispatch, reference
from attnstats.core import arguments
from attnstats.flash import backend, providers
from attnstats.triton import configs
from tests.cases import Case, check
from tests.test_differentiable import agree, inputs_of


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    """Of a call whose providers a test replaces."""
    arguments._CACHE.clear()
    yield
    arguments._CACHE.clear()


CASES = {
    "causal": Case(),
    "full": Case(is_causal=False),
    "one query": Case(query_length=1),
    "cross": Case(is_causal=False, query_length=20, key_length=33),
    "sinks": Case(sinks=True, counted="some"),
    "rows that see no key": Case(is_causal=False, query_length=37, key_length=37, padding="all", sinks=True),
    "padding": Case(padding="left"),
    "heads": Case(heads="some", group=3),
    "bfloat16": Case(dtype="bfloat16"),
    "float16": Case(dtype="float16", sinks=True),
    "strided": Case(layout="strided"),
    "nan": Case(spoiled="nan query"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_statistic(name):
    check(CASES[name], "flash")


def test_from_an_lse():
    check(Case(sinks=True), "flash", from_lse=True)


@pytest.mark.parametrize("changed", [{}, {"sinks": True}, {"dtype": "bfloat16"}], ids=str)
def test_gradients_of_the_output_are_the_providers(changed):
    case = Case(batch=1, key_heads=1, query_length=40, key_length=40, **changed)
    found = []
    for asked in ([], [WAAD(), FAI(2, 9), Received()]):
        inputs = inputs_of(case, getattr(torch, case.dtype))
        options = {"sinks": inputs[3] if len(inputs) > 3 else None, "backend": "flash"}
        output, _ = case.call(attnstats, inputs[:3], statistics=asked, **options)
        found.append((output, *torch.autograd.grad(output.float().square().sum(), inputs)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    expected, _ = case.call(reference, inputs[:3], sinks=options["sinks"], statistics=[])
    grads = torch.autograd.grad(expected.float().square().sum(), inputs)
    for x, y in zip(found[0][1:], grads, strict=True):
        eps = torch.finfo(x.dtype).eps
        assert float((x - y).abs().max()) <= 16 * eps * max(1.0, float(y.abs().max()))


def test_statistics_that_carry_gradients():
    case = Case(batch=1, key_heads=1, dtype="bfloat16")
    agree(case, (WAAD(4), LocalMass(3), FAI(2, 9), Received(), LSE()), "flash", "cpu", torch.bfloat16)
    query, key, value = Case(group=1).tensors()
    query.requires_grad_()
    with pytest.raises(ValueError, match=r"backend='flash': gradients of statistics of torch.float32.*'triton'"):
        attnstats.attention(query, key, value, statistics=["waad"], differentiable=True, backend="flash")


def test_the_plan_is_shown():
    query, key, value = Case(group=1).tensors()
    asked = [WAAD(), FAI(2, 9), Entropy(), Received(), SinkMass(2)]
    plan = attnstats.explain(query, key, value, statistics=asked, backend="flash")
    assert plan.backend == "flash"
    assert plan.reason == "as asked; torch's flash attention for CPU"
    runs = ["provider", "band", "rows", "column", "first_keys"]
    assert [each.run for each in plan.passes] == runs
    assert [each.attends for each in plan.passes] == [True, *[False] * 4]
    assert [each.run for each in attnstats.explain(query, key, statistics=asked, backend="flash").passes] == runs[1:]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"statistics": [MaxLogit()]}, r"MaxLogit is not a function of the lse; backend='triton' would work"),
        (
            {"softcap": 2.0},
            r"torch's flash attention for CPU: a call that .* doesn't take; backend='triton' would work",
        ),
        ({"dropout_p": 0.5}, r"doesn't take; backend='triton' would work"),
        ({"scale": -1.0}, r"scale > 0.*backend='tiled' would work"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(changed, match):
    query, key, value = Case(group=1).tensors()
    with pytest.raises(ValueError, match=f"backend='flash': .*{match}"):
        attnstats.attention(query, key, value, **{"statistics": ["waad"], "backend": "flash", **changed})


def test_double_precision_and_no_interpreter(monkeypatch):
    query, key, value = (x.double() for x in Case(group=1).tensors())
    with pytest.raises(ValueError, match=r"backend='flash': .*float64; backend='tiled' would work"):
        attnstats.attention(query, key, value, backend="flash")
    monkeypatch.setattr("attnstats.triton.backend.interpreted", lambda: False)
    with pytest.raises(ValueError, match="backend='flash': CPU tensors need Triton's interpreter"):
        attnstats.attention(query.float(), key.float(), value.float(), backend="flash")


def replaced(monkeypatch, forward):
    monkeypatch.setattr(providers, "CPU", providers.CPU._replace(name="a broken build", forward=forward))
    return Case(group=1).tensors()


def test_a_provider_that_fails_is_named(monkeypatch):
    def forward(*_):
        raise RuntimeError("no kernel image")

    tensors = replaced(monkeypatch, forward)
    match = r"a broken build failed: no kernel image; choose backend='triton', or set ATTNSTATS_WITHOUT"
    with pytest.raises(RuntimeError, match=match):
        attnstats.attention(*tensors, statistics=["waad"], backend="flash")
    monkeypatch.setenv("ATTNSTATS_WITHOUT", "cuDNN, A broken build")
    with pytest.raises(
        ValueError, match="backend='flash': no attention kernel is left by ATTNSTATS_WITHOUT; backend='tri"
    ):
        attnstats.attention(*tensors, statistics=["waad"], backend="flash")


def test_the_backward_pass_is_that_of_the_kernel_which_ran(monkeypatch):
    query, key, value = (x.requires_grad_() for x in Case(group=1).tensors())
    output, _ = attnstats.attention(query, key, value, statistics=["waad"], backend="flash")
    monkeypatch.setenv("ATTNSTATS_WITHOUT", providers.CPU.name)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (query, key, value)))


@pytest.mark.parametrize("error", [AssertionError("sm_70"), TypeError("return_lse"), NotImplementedError("D")])
def test_whatever_a_provider_raises_comes_with_its_name(error, monkeypatch):
    def forward(*_):
        raise error

    with pytest.raises(RuntimeError, match=f"a broken build failed: {error}; choose backend='triton'"):
        attnstats.attention(*replaced(monkeypatch, forward), backend="flash")


@pytest.mark.parametrize("asked", [[], [Entropy()], [WAAD(), Entropy()]], ids=str)
def test_a_traced_call_takes_the_same_backends(asked, monkeypatch):
    """On a GPU, where the choice depends on what is asked for; here with the tensors of a CPU."""
    chosen, choose = [], _dispatch.choose

    def noted(name, geometry, attends=True):
        chosen.append(geometry.statistics)
        return choose(name, geometry, attends)

    monkeypatch.setattr(_dispatch, "choose", noted)
    query, key, value = (x.requires_grad_() for x in Case(group=1).tensors())

    def call():
        output, _ = attnstats.attention(query, key, value, statistics=asked, backend="triton")
        return torch.autograd.grad(output.square().sum(), (query, key, value))

    plain = call()
    traced = torch.compile(
        lambda: attnstats.attention(query, key, value, statistics=asked, backend="triton")[0], backend="aot_eager"
    )
    grads = torch.autograd.grad(traced().square().sum(), (query, key, value))
    assert set(chosen) == {tuple(asked)}
    assert all(torch.equal(x, y) for x, y in zip(plain, grads, strict=True))


def test_out_of_memory_stays_what_it_is(monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("16 EiB")

    with pytest.raises(torch.OutOfMemoryError, match=r"^16 EiB"):
        attnstats.attention(*replaced(monkeypatch, forward), backend="flash")


def test_a_result_of_another_shape_is_named(monkeypatch):
    def forward(query, key, value, geometry):
        output, lse = providers.cpu_flash.attention(query, key, value, geometry)
        return output, lse.mT

    with pytest.raises(
        RuntimeError, match=r"a broken build returned output .* and lse \(2, 37, 2\), not .*\(2, 2, 37\)"
    ):
        attnstats.attention(*replaced(monkeypatch, forward), backend="flash")


@pytest.mark.parametrize("factor", [1.4426950408889634, 0.0])
def test_an_lse_in_another_base_is_named_when_asked(factor, monkeypatch):
    def forward(query, key, value, geometry):
        output, lse = providers.cpu_flash.attention(query, key, value, geometry)
        return output, lse * factor

    tensors = replaced(monkeypatch, forward)
    monkeypatch.setenv("ATTNSTATS_CHECK_LSE", "1")
    with pytest.raises(ValueError, match=r"lse"):
        attnstats.attention(*tensors, statistics=["waad"], backend="flash")


def test_tokens_of_packed_sequences_that_no_program_reaches(monkeypatch):
    """Those past the last sequence, and those of a sequence that is longer than the call said."""
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32)
    query, key, value = (x[0].transpose(0, 1).requires_grad_() for x in Case(1, 2, 1, 14, 14).tensors())

    def forward(query, key, value, geometry):
        return torch.ones_like(query), torch.ones(query.shape[:3])

    def backward(residuals, grad_output, geometry):
        return tuple(map(torch.ones_like, residuals[:3]))

    written = providers.Provider("written", lambda *_: iter(()), forward, backward)
    monkeypatch.setattr(providers, "CPU", written)
    monkeypatch.setattr("attnstats.core.packing.believes", lambda device: True)
    for longest, longer in ((7, slice(0, 0)), (5, slice(5, 12))):
        output, stats = attnstats.varlen_attention(
            query, key, value, statistics=["waad"], cu_seqlens_q=boundaries, max_seqlen_q=longest, backend="flash"
        )
        for x in (output, *torch.autograd.grad(output.sum(), (query, key, value)), stats["waad"].mT, stats.lse.mT):
            is_nan = torch.zeros(14, dtype=torch.bool)
            is_nan[longer] = True
            assert torch.equal(x.flatten(1).isnan().all(1), is_nan)
            assert torch.equal(x.flatten(1).isnan().any(1), is_nan)
        assert not output[12:].any()
        assert (stats.lse[:, 12:] == -torch.inf).all()


def test_the_table_names_each_provider_once():
    for names in (
        [each.name for each in order] for order in (*providers.BY_ARCHITECTURE.values(), providers.ELSEWHERE)
    ):
        assert len(set(names)) == len(names)
    assert set(providers.BY_ARCHITECTURE) <= {f"sm_{n}" for n in (80, 86, 89, 90, 100, 103, 120)}
    assert backend.COMPUTES
    assert configs.architecture(torch.device("cpu")) == "sm_90"
