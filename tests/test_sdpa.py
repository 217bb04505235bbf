"""patch_sdpa: SDPA's own output, whatever it is called with, and the statistics of the map that it used."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.masked import masked_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import attnstats
from attnstats import FAI, LSE, WAAD, Entropy, PooledMap, Received
from tests.process import python
from tests.vision import FOLDER

ORIGINAL = F.scaled_dot_product_attention
CAUSAL = nn.Transformer.generate_square_subsequent_mask


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_map(query, key, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """A by the documentation of SDPA, in float64; rows that see nothing are 0."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).nan_to_num(0.0)


KEYS = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
SQUARE = randn(2, 4, 9, 8)
STRIPES = (torch.arange(9)[:, None] - torch.arange(9)) % 3 != 1
CALLS = {
    "plain": ((2, 4, 9, 8), (2, 4, 9, 8), {}),
    "causal": ((2, 4, 9, 8), (2, 4, 9, 8), {"is_causal": True}),
    "causal, more keys": ((2, 4, 5, 8), (2, 4, 9, 8), {"is_causal": True}),
    "causal, more queries": ((2, 4, 9, 8), (2, 4, 5, 8), {"is_causal": True}),
    "cross": ((2, 4, 5, 8), (2, 4, 9, 8), {}),
    "one query": ((2, 4, 1, 8), (2, 4, 9, 8), {}),
    "grouped": ((2, 4, 9, 8), (2, 2, 9, 8), {"enable_gqa": True, "scale": 0.5}),
    "key mask": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": KEYS[:, None, None]}),
    "key mask, 2-D": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": KEYS[1:]}),
    "float key mask": (
        (2, 4, 9, 8),
        (2, 4, 9, 8),
        {"attn_mask": torch.zeros(2, 1, 1, 9).masked_fill(~KEYS[:, None, None], -torch.inf)},
    ),
    "causal mask": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": torch.ones(9, 9).tril().bool()}),
    "causal float mask": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": CAUSAL(9)}),
    "bottom right": ((2, 4, 5, 8), (2, 4, 9, 8), {"attn_mask": torch.ones(5, 9).tril(4).bool()}),
    "window": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": torch.ones(9, 9).tril(2).triu(-3).bool()}),
    "causal window": ((2, 4, 9, 8), (2, 4, 9, 8), {"attn_mask": torch.ones(9, 9).tril().triu(-3).bool()}),
    "window and padding in one": (
        (2, 4, 9, 8),
        (2, 4, 9, 8),
        {"attn_mask": torch.ones(9, 9).tril(1).bool() & KEYS[:, None, None]},
    ),
    "causal and padding in one": (
        (2, 4, 9, 8),
        (2, 4, 9, 8),
        {"attn_mask": torch.ones(9, 9).tril().bool() & KEYS[:, None, None]},
    ),
    "nothing is seen": (
        (2, 4, 9, 8),
        (2, 4, 9, 8),
        {"attn_mask": KEYS[:, None, None] & torch.tensor([0, 1]).bool()[:, None, None, None]},
    ),
    "3-D": ((4, 9, 8), (4, 9, 8), {"is_causal": True}),
    "2-D": ((9, 8), (9, 8), {"attn_mask": KEYS[1:]}),
    "2-D query": ((9, 8), (4, 9, 8), {"is_causal": True}),
    "2-D query, 4-D keys": ((9, 8), (2, 1, 9, 8), {"attn_mask": KEYS[:, None, None]}),
    "6-D": ((2, 1, 3, 4, 9, 8), (2, 1, 3, 4, 9, 8), {"attn_mask": KEYS[:, None, None, None, None, :]}),
    "broadcast batch": ((2, 4, 9, 8), (1, 4, 9, 8), {}),
    "broadcast heads": ((2, 4, 9, 8), (2, 1, 9, 8), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_sdpas(name):
    shape, key_shape, arguments = CALLS[name]
    tensors = [randn(*s, seed=i).requires_grad_() for i, s in enumerate((shape, key_shape, key_shape))]
    expected = ORIGINAL(*tensors, **arguments)
    gradients = torch.autograd.grad(expected.sin().sum(), tensors)
    with attnstats.patch_sdpa(statistics=["received", "entropy"]) as run:
        output = F.scaled_dot_product_attention(*tensors, **arguments)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    for found, gradient in zip(torch.autograd.grad(output.sin().sum(), tensors), gradients, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)
    weights = dense_map(*tensors[:2], **arguments)
    hidden = ~weights.any(-2)
    if "attn_mask" in arguments and weights.shape[-1] == weights.shape[-2]:
        weights = weights * ~hidden.unsqueeze(-1)  # padding is no query
    close = {"atol": 1e-5, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(run[0]["received"], weights.sum(-2), **close)
    torch.testing.assert_close(run[0]["entropy"], torch.special.entr(weights).sum(-1), **close)
    assert run[0].lse.shape == output.shape[:-1]
    assert run[0].valid["received"].shape == (*output.shape[:-3], weights.shape[-1])


def test_distances_and_counts():
    x = randn(2, 4, 9, 8)
    arguments = {"attn_mask": KEYS[:, None, None] & torch.ones(9, 9).tril().bool()}
    with attnstats.patch_sdpa(statistics=[WAAD(3), FAI(1, 4), PooledMap(2, 3), LSE()]) as run:
        F.scaled_dot_product_attention(x, x, x, **arguments)
        F.scaled_dot_product_attention(x[0], x[0], x[0], is_causal=True)
    weights = dense_map(x, x, **arguments) * KEYS[:, None, :, None]
    distance = (torch.arange(9)[:, None] - torch.arange(9)).double()
    close = {"atol": 1e-5, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(run[0][WAAD(3)], (weights * distance.abs().clamp(max=3)).sum(-1), **close)
    near = ((distance >= 1) & (distance <= 4)).double()
    assert torch.equal(run[0].counts["fai"], (KEYS.double() @ near * KEYS).long())
    assert run[0]["pooled_map"].shape == (2, 4, 2, 3)
    assert run[1]["pooled_map"].shape == (4, 2, 3)
    assert run[1].counts["fai"].shape == (9,)


def test_empty_calls():
    asked = ["entropy", FAI(0, 3), LSE()]
    for query, key in (((2, 4, 9, 8), (2, 4, 0, 8)), ((2, 4, 0, 8), (2, 4, 9, 8)), ((0, 4, 9, 8), (0, 4, 9, 8))):
        q, k = torch.randn(query), torch.randn(key)
        with attnstats.patch_sdpa(statistics=asked) as run:
            output = F.scaled_dot_product_attention(q, k, k)
        assert torch.equal(output, ORIGINAL(q, k, k))
        assert run[0]["entropy"].shape == query[:3]
        assert run[0]["fai"].shape == (*query[:2], key[2])
        assert not run[0].valid["entropy"].any()
        assert run[0].counts["fai"].sum() == 0


def test_autocast_and_half_precision():
    x = randn(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ORIGINAL(x, x, x, CAUSAL(9))
        with attnstats.patch_sdpa(statistics=["waad"]) as run:
            output = F.scaled_dot_product_attention(x, x, x, CAUSAL(9))
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    assert run[0]["waad"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"attn_mask": SQUARE[:, :, :, 0, None] * torch.ones(9)},
            "attn_mask: this torch.float32 mask.*allow_dense=True",
        ),
        ({"attn_mask": STRIPES}, "attn_mask: this torch.bool mask"),
        ({"attn_mask": torch.zeros(9, 9).requires_grad_()}, "attn_mask: this torch.float32 mask"),
        ({"attn_mask": torch.ones(9, 7).bool()}, r"attn_mask must broadcast to \(2, 4, 9, 9\), got \(1, 1, 9, 7\)"),
        ({"attn_mask": torch.ones(9).bool()}, r"attn_mask must broadcast to .*got \(9,\)"),
        ({"key": SQUARE[:, :2], "value": SQUARE[:, :2]}, "expand|enable_gqa"),
        (
            {"query": torch.nested.nested_tensor([SQUARE[0]], layout=torch.jagged)},
            "query must be a plain dense tensor, got a .*NestedTensor; pad it",
        ),
        ({"value": SQUARE.to_sparse()}, "value must be a plain dense tensor, got one with layout torch.sparse_coo"),
        (
            {"attn_mask": masked_tensor(STRIPES, STRIPES)},
            "attn_mask must be a plain dense tensor, got a .*MaskedTensor",
        ),
        ({"attn_mask": causal_lower_right(4, 6)}, r"causal_lower_right\(4, 6\) is for other lengths than Tq=9, Tk=9"),
        ({"attn_mask": causal_upper_left(4, 6)}, r"causal_upper_left\(4, 6\) is for other lengths than Tq=9, Tk=9"),
        (
            {"query": randn(2, 4, 11, 8), "attn_mask": causal_lower_right(11, 9)},
            r"causal_lower_right\(11, 9\) leaves the first 2 queries without a key",
        ),
        ({"query": SQUARE[:, :, :5]}, r"WAAD\(window=10\) needs distances.*calls=lambda"),
    ],
)
def test_bad_calls_are_named(arguments, match):
    with (
        attnstats.patch_sdpa(statistics=["waad"]) as run,
        pytest.raises((TypeError, ValueError, RuntimeError), match=match),
    ):
        F.scaled_dot_product_attention(**({"query": SQUARE, "key": SQUARE, "value": SQUARE} | arguments))
    assert len(run) == 0


CAUSAL_BOOL = torch.ones(9, 9).tril().bool()
REFUSED_BY_TORCH = {
    "mask and is_causal": {"attn_mask": CAUSAL_BOOL, "is_causal": True, "error": RuntimeError},
    "key mask and is_causal": {"attn_mask": KEYS[:, None, None], "is_causal": True, "error": RuntimeError},
    "bias and is_causal": {"attn_mask": causal_upper_left(9, 9), "is_causal": True},
    "is_causal": {"is_causal": 1},
    "dtype of key": {"key": SQUARE.double()},
    "dtype of value": {"value": SQUARE.half()},
    "integers": {"query": SQUARE.int(), "key": SQUARE.int(), "value": SQUARE.int()},
    "integer mask": {"attn_mask": CAUSAL_BOOL.int()},
    "double mask": {"attn_mask": CAUSAL(9).double()},
    "half mask": {"attn_mask": CAUSAL(9).half()},
    "complex mask": {"attn_mask": CAUSAL(9).to(torch.complex64)},
    "mask as a list": {"attn_mask": [[True]]},
    "mask of another length": {"attn_mask": CAUSAL_BOOL[:7]},
    "one dimension": {"query": SQUARE[0, 0, 0], "key": SQUARE[0, 0, 0], "value": SQUARE[0, 0, 0]},
    "head dim": {"key": SQUARE[..., :4]},
    "heads": {"key": SQUARE[:, :3], "value": SQUARE[:, :3]},
    "groups": {"key": SQUARE[:, :3], "value": SQUARE[:, :3], "enable_gqa": True},
    "batch": {"key": SQUARE[:1].expand(3, 4, 9, 8), "value": SQUARE[:1].expand(3, 4, 9, 8)},
    "dropout": {"dropout_p": 1.5},
    "scale": {"scale": "1"},
    "device": {"key": SQUARE.to("meta")},
    "no tensor": {"query": None},
}


@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_what_torch_refuses_is_refused_with_the_same_type(name):
    arguments = {"query": SQUARE, "key": SQUARE, "value": SQUARE} | REFUSED_BY_TORCH[name]
    documented = arguments.pop("error", None)
    if documented is None:  # not every kernel of torch holds to its documentation
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            ORIGINAL(**arguments)
        documented = next(kind for kind in (RuntimeError, TypeError, ValueError) if theirs.errisinstance(kind))
    with attnstats.patch_sdpa(statistics=["received"]) as run, pytest.raises(documented):
        F.scaled_dot_product_attention(**arguments)
    assert len(run) == 0


def test_a_mask_goes_beside_no_is_causal():
    with attnstats.patch_sdpa(statistics=["received"]), pytest.raises(RuntimeError, match="as torch documents"):
        F.scaled_dot_product_attention(SQUARE, SQUARE, SQUARE, CAUSAL_BOOL, is_causal=True)


@pytest.mark.parametrize(("length", "key_length"), [(9, 9), (5, 9), (9, 5), (1024, 1024)])
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_causal_biases_are_read_by_what_they_say(variant, length, key_length):
    """Their storage is not initialised; at T = 1024 it made attention full."""
    if variant is causal_lower_right and length > key_length:
        return  # test_bad_calls_are_named
    query, key = randn(1, 2, length, 8), randn(1, 2, key_length, 8, seed=1)
    bias = variant(length, key_length)
    with attnstats.patch_sdpa(statistics=["waad", "entropy"]) as run:
        output = F.scaled_dot_product_attention(query, key, key, attn_mask=bias)
    torch.testing.assert_close(output, ORIGINAL(query, key, key, attn_mask=bias), atol=1e-6, rtol=1e-5)
    offset = key_length - length if variant is causal_lower_right else 0
    weights = dense_map(query, key, torch.ones(length, key_length).tril(offset).bool())
    distance = (torch.arange(length)[:, None] + offset - torch.arange(key_length)).clamp(0, 10).double()
    torch.testing.assert_close(run[0]["waad"].double(), (weights * distance).sum(-1), atol=1e-4, rtol=0)
    inputs = {"query": query, "key": key, "value": key, "attn_mask": bias}
    for backend in ("reference", "tiled"):
        found, stats = attnstats.attention(**inputs, statistics=["waad"], backend=backend)
        torch.testing.assert_close(found, output, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stats["waad"], run[0]["waad"], atol=1e-4, rtol=0)
    del inputs["value"]
    beside = attnstats.statistics_from_lse(**inputs, lse=run[0].lse, statistics=["waad"])
    torch.testing.assert_close(beside["waad"], run[0]["waad"], atol=1e-4, rtol=0)


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name():
    refused = pytest.raises(RuntimeError, match=r"torch\.jit\.(script|trace).*TorchScript cannot record statistics")
    with attnstats.patch_sdpa(statistics=["received"]) as run:
        with refused:
            torch.jit.script(Scripted())
        with refused:
            torch.jit.trace(Scripted(), (SQUARE,))
    assert len(run) == 0
    for function in (attnstats.attention, attnstats.varlen_attention, attnstats.statistics_from_lse):
        with refused:
            torch.jit.script(function)
    assert torch.equal(torch.jit.trace(Scripted(), (SQUARE,))(SQUARE), ORIGINAL(SQUARE, SQUARE, SQUARE))


def test_dense_masks_on_demand():
    bias = randn(1, 4, 9, 9, seed=5)
    with attnstats.patch_sdpa(statistics=["received"], allow_dense=True) as run:
        with pytest.warns(UserWarning, match=r"attn_mask of shape \(1, 4, 9, 9\): attention on the whole map"):
            output = F.scaled_dot_product_attention(SQUARE, SQUARE, SQUARE, bias)
        with pytest.warns(UserWarning, match="whole map"):
            wide = F.scaled_dot_product_attention(*(SQUARE[:, None],) * 3, bias[None] > 0)
    torch.testing.assert_close(output, ORIGINAL(SQUARE, SQUARE, SQUARE, bias), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wide, ORIGINAL(*(SQUARE[:, None],) * 3, bias[None] > 0), atol=1e-6, rtol=1e-5)
    expected = dense_map(SQUARE, SQUARE, bias).sum(-2).float()
    torch.testing.assert_close(run[0]["received"], expected, atol=1e-5, rtol=0.0)


def test_some_calls_some_heads():
    def model():
        for length in (9, 5, 9, 9):
            F.scaled_dot_product_attention(SQUARE[:, :, :length], SQUARE, SQUARE)

    with attnstats.patch_sdpa(statistics=["waad"], calls=[0, 3], heads=[2, 1]) as run:
        model()
    assert (len(run), run.indices, run.calls) == (2, [0, 3], 4)
    with attnstats.patch_sdpa(statistics=["waad"], calls=lambda query, key: query.shape == key.shape) as every:
        model()
        assert every.indices == [0, 2, 3]
        first = every[0]
        every.clear()
        model()
    assert every.indices == [0, 2, 3]
    assert torch.equal(run[1]["waad"], every[2]["waad"][:, [2, 1]])
    with attnstats.patch_sdpa(statistics=["waad"], calls=[0], reduce="heads", device="cpu") as mean:
        model()
    assert torch.equal(mean[0]["waad"], first["waad"].mean(1))
    assert mean[0].valid["waad"].shape == (2, 9)
    with pytest.raises(IndexError, match="7: 1 of 4 calls of scaled_dot_product_attention were recorded"):
        mean[7]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"statistics": []}, ValueError, "statistics is empty"),
        ({"statistics": ["wad"]}, ValueError, "unknown name 'wad'"),
        ({"calls": "all"}, TypeError, "calls must be None, numbers from 0 or a function"),
        ({"calls": [-1]}, TypeError, "calls must be None"),
        ({"reduce": "layers"}, ValueError, "reduce must be 'heads' or None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, match):
    with pytest.raises(error, match=match), attnstats.patch_sdpa(**({"statistics": ["waad"]} | arguments)):
        pass
    assert F.scaled_dot_product_attention is ORIGINAL


def test_one_patch_at_a_time_and_always_restored():
    def second():
        with attnstats.patch_sdpa(statistics=["waad"]):
            pass

    def stopped():
        with attnstats.patch_sdpa(statistics=["waad"]):
            assert not torch.backends.mha.get_fastpath_enabled()
            with pytest.raises(RuntimeError, match="a patch is active already"):
                second()
            thread = threading.Thread(target=F.scaled_dot_product_attention, args=(SQUARE, SQUARE, SQUARE))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled()
    with attnstats.patch_sdpa(statistics=["waad"]) as run:
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(SQUARE, SQUARE, SQUARE))
        thread.start()
        thread.join()
    assert len(run) == 1


def test_nothing_recorded_is_said():
    with (
        pytest.warns(UserWarning, match="nothing called torch.nn.functional"),
        attnstats.patch_sdpa(statistics=["waad"]),
    ):
        ORIGINAL(SQUARE, SQUARE, SQUARE)  # as a module does that imported the name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attnstats.patch_sdpa(statistics=["waad"], calls=[]) as run:
            F.scaled_dot_product_attention(SQUARE, SQUARE, SQUARE)
            run.clear()


def test_dropout():
    """With the identity for values the output is the dropped map itself."""
    x, eye = randn(4, 16, 32, 8), torch.eye(32).expand(4, 16, 32, 32)
    weights = ORIGINAL(x, x, eye)
    with attnstats.patch_sdpa(statistics=["received"]) as run:
        output = F.scaled_dot_product_attention(x, x, eye, dropout_p=0.25)
    kept = output != 0
    torch.testing.assert_close(output[kept], weights[kept] / 0.75, atol=1e-6, rtol=1e-4)
    assert abs(kept.float().mean() - 0.75) < 6 * (0.25 * 0.75 / kept.numel()) ** 0.5
    torch.testing.assert_close(run[0]["received"], weights.sum(-2), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_records_once(reentrant):
    x = SQUARE.clone().requires_grad_()

    def block(y):
        return F.scaled_dot_product_attention(y, y, y, is_causal=True).sin()

    expected = torch.autograd.grad(block(block(x)).sum(), x)[0]
    with attnstats.patch_sdpa(statistics=["waad"]) as run:
        y = checkpoint(block, checkpoint(block, x, use_reentrant=reentrant), use_reentrant=reentrant)
        y.sum().backward()
    assert (len(run), run.calls) == (2, 2)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-4)
    with (
        attnstats.patch_sdpa(statistics=["waad"], calls=[0]),
        pytest.raises(RuntimeError, match="calls: a backward pass repeats calls"),
    ):
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("inputs", ["plain", "padding", "causal", "causal and padding"])
def test_transformer_encoder(inputs, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first).eval()
    x = randn(2, 9, 16) if batch_first else randn(9, 2, 16)
    arguments = {}
    if "causal" in inputs:
        arguments["mask"] = CAUSAL(9).isinf()
    if "padding" in inputs:
        arguments["src_key_padding_mask"] = ~KEYS
    real = KEYS if "padding" in inputs else torch.ones(2, 9).bool()
    with torch.no_grad():  # so that torch would take its fast path, and nested tensors
        expected = model(x, **arguments)
        with attnstats.patch_sdpa(statistics=["waad", "received"], reduce="heads", device="cpu") as run:
            output = model(x, **arguments)
    rows = real if batch_first else real.T
    torch.testing.assert_close(output[rows], expected[rows], atol=1e-5, rtol=1e-4)
    assert len(run) == 3
    for stats in run:
        assert stats["waad"].shape == (2, 9)
        torch.testing.assert_close(stats["received"].sum(-1), real.sum(-1).float(), atol=1e-4, rtol=0.0)
        assert torch.equal(stats.valid["waad"], real)


def test_timm_vision_transformer():
    assert FOLDER.is_dir(), f"{FOLDER}: `make` installs timm there"
    assert python("-m", "tests.vision") == "passes\n"


def test_a_forced_backend_of_sdpa_changes_nothing():
    with sdpa_kernel(SDPBackend.MATH), attnstats.patch_sdpa(statistics=[Received(), Entropy()]) as run:
        F.scaled_dot_product_attention(SQUARE, SQUARE, SQUARE)
    assert len(run) == 1
