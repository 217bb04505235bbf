"""nn.MultiheadAttention: torch's output and gradients, and statistics of the map that torch would return."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attnstats
from attnstats import FAI, WAAD, Entropy, MeanDistance, Received, reference
from attnstats.nn import MultiheadAttention, replace_attention

CAUSAL = nn.Transformer.generate_square_subsequent_mask
ATOL = 2e-6


def pair(**arguments) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """Torch's module and ours with the same parameters, none of which is zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, **arguments).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiheadAttention(16, 4, batch_first=True, **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def padding(length: int = 9) -> torch.Tensor:
    """Torch's: True is padding, the last keys of the second row."""
    return (torch.arange(length) >= torch.tensor([[length], [length - 3]])).reshape(2, length)


CONFIGURATIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both added": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 10},
}
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "float padding": {"key_padding_mask": torch.zeros(2, 9).masked_fill(padding(), -torch.inf)},
    "causal": {"attn_mask": CAUSAL(9)},
    "causal bool": {"attn_mask": torch.ones(9, 9).triu(1).bool()},
    "causal hint": {"attn_mask": CAUSAL(9), "is_causal": True},
    "causal 3-D": {"attn_mask": CAUSAL(9).expand(8, 9, 9)},
    "causal and padding": {"attn_mask": torch.ones(9, 9).triu(1).bool(), "key_padding_mask": padding()},
    "window": {"attn_mask": ~torch.ones(9, 9).tril(2).triu(-3).bool()},
    "causal window and padding": {"attn_mask": ~torch.ones(9, 9).tril().triu(-3).bool(), "key_padding_mask": padding()},
    "all padding": {"key_padding_mask": padding() | torch.tensor([[True], [False]])},
    "nothing hidden": {"attn_mask": torch.zeros(9, 9).bool(), "key_padding_mask": torch.zeros(2, 9).bool()},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_output_and_gradients_are_torchs(configuration, masks):
    theirs, ours = pair(**CONFIGURATIONS[configuration])
    query = torch.randn(2, 9, 16)
    if configuration == "other widths":
        inputs = query, torch.randn(2, 9, 6), torch.randn(2, 9, 10)
    else:
        inputs = query, query, query
    arguments = MASKS[masks]
    if masks == "causal hint" and (ours.add_zero_attn or ours.bias_k is not None):
        with pytest.raises(ValueError, match="is_causal=True: whether torch shows the keys of add_bias_kv"):
            ours(*inputs, **arguments)
        return
    if "window" in masks and ours.bias_k is not None:
        with pytest.raises(ValueError, match=r"attn_mask: this torch\.bool mask"):
            ours(*inputs, **arguments)
        return
    expected, _ = theirs(*inputs, need_weights=False, **arguments)
    output, weights = ours(*inputs, statistics=["received", "entropy"], **arguments)
    assert weights is None
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=1e-5)
    assert ours.statistics["received"].shape == (2, 4, 9)
    assert all(x.isfinite().all() for x in ours.statistics.values())
    expected.square().sum().backward()
    output.square().sum().backward()
    for (name, ours_too), parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        atol = 16 * torch.finfo(torch.float32).eps * float(parameter.grad.abs().max())  # twice torch's own error
        torch.testing.assert_close(ours_too.grad, parameter.grad, atol=max(2e-5, atol), rtol=1e-4, msg=name)


@pytest.mark.parametrize("masks", MASKS)
def test_statistics_are_those_of_torchs_weights(masks):
    theirs, ours = pair()
    x = torch.randn(2, 9, 16)
    arguments = MASKS[masks] | {"is_causal": False}
    _, weights = theirs(x, x, x, average_attn_weights=False, **arguments)
    weights = weights.double().nan_to_num()  # torch's weights of rows that see nothing
    real = torch.ones(2, 9).bool()
    if "key_padding_mask" in arguments:
        real = arguments["key_padding_mask"] == 0
    weights = weights * real[:, None, :, None]  # padding is no query
    ours(x, x, x, statistics=[WAAD(3), FAI(1, 4), Received(), Entropy()], **MASKS[masks])
    found = ours.statistics
    distance = (torch.arange(9)[:, None] - torch.arange(9)).double()
    close = {"atol": 1e-5, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(found[WAAD(3)], (weights * distance.abs().clamp(max=3)).sum(-1), **close)
    torch.testing.assert_close(found[Received()], weights.sum(-2), **close)
    torch.testing.assert_close(found[Entropy()], torch.special.entr(weights).sum(-1), **close)
    near = ((distance >= 1) & (distance <= 4)).double()
    count = real.double() @ near * real
    assert torch.equal(found.counts[FAI(1, 4)], count.long())
    torch.testing.assert_close(found[FAI(1, 4)], (weights * near).sum(-2) / count.clamp(min=1)[:, None], **close)


@pytest.mark.parametrize("masks", ["none", "padding", "causal", "causal and padding"])
def test_added_keys_belong_to_no_column(masks):
    """Of all weights torch has, the added keys' come last; zero attention takes mass, and is no key to us."""
    theirs, ours = pair(add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(2, 9, 16)
    arguments = MASKS[masks]
    _, weights = theirs(x, x, x, average_attn_weights=False, **arguments)
    real = ~arguments.get("key_padding_mask", torch.zeros(2, 9).bool())
    weights = weights * real[:, None, :, None]
    ours(x, x, x, statistics=[Received(), FAI(0, 0), Entropy()], **arguments)
    close = {"atol": 1e-5, "rtol": 0.0}
    torch.testing.assert_close(ours.statistics[Received()], weights[..., :9].sum(-2), **close)
    torch.testing.assert_close(ours.statistics[FAI(0, 0)], weights[..., :9].diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(ours.statistics[Entropy()], torch.special.entr(weights[..., :10]).sum(-1), **close)
    with pytest.raises(ValueError, match=r"WAAD.*key of add_bias_kv has none"):
        ours(x, x, x, statistics=["waad"])
    _, only_zero = pair(add_zero_attn=True)
    only_zero(x, x, x, statistics=["waad"])  # the mass on real keys


def test_cross_attention():
    theirs, ours = pair()
    query, key = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    hidden = padding()
    expected, weights = theirs(query, key, key, key_padding_mask=hidden, average_attn_weights=False)
    output, _ = ours(query, key, key, key_padding_mask=hidden, statistics=["received"])
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=1e-5)
    torch.testing.assert_close(ours.statistics["received"], weights.sum(-2), atol=1e-5, rtol=0.0)
    with pytest.raises(ValueError, match=r"MeanDistance.*needs distances.*cross-attention"):
        ours(query, key, key, statistics=[MeanDistance()])
    # Of equal length, the hidden keys are no padding of the queries, whose statistics all count.
    query = torch.randn(2, 9, 16)
    _, weights = theirs(query, key, key, key_padding_mask=hidden, average_attn_weights=False)
    ours(query, key, key, key_padding_mask=hidden, statistics=["received", "waad"])
    torch.testing.assert_close(ours.statistics["received"], weights.sum(-2), atol=1e-5, rtol=0.0)
    assert ours.statistics.valid["waad"].all()


@pytest.mark.parametrize(("length", "key_length", "offset"), [(5, 9, 4), (5, 9, 0), (9, 5, 0), (1, 7, 3)])
def test_causal_masks_of_other_lengths(length, key_length, offset):
    theirs, ours = pair()
    query, key = torch.randn(2, length, 16), torch.randn(2, key_length, 16)
    mask = torch.ones(length, key_length).tril(offset) == 0
    expected, weights = theirs(query, key, key, attn_mask=mask, average_attn_weights=False)
    output, _ = ours(query, key, key, attn_mask=mask, statistics=["received"])
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=1e-5)
    torch.testing.assert_close(ours.statistics["received"], weights.sum(-2), atol=1e-5, rtol=0.0)


def test_layouts():
    theirs, _ = pair()
    ours = MultiheadAttention(16, 4, statistics=["waad"]).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 16)
    expected, _ = theirs(x, x, x, need_weights=False)
    time_first = x.transpose(0, 1)
    output, _ = ours(time_first, time_first, time_first)
    torch.testing.assert_close(output.transpose(0, 1), expected, atol=ATOL, rtol=1e-5)
    batched = ours.statistics
    output, _ = ours(x[1], x[1], x[1], is_causal=True)
    causal, _ = theirs(x[1], x[1], x[1], need_weights=False, attn_mask=CAUSAL(9))
    torch.testing.assert_close(output, causal, atol=ATOL, rtol=1e-5)
    output, _ = ours(x[1], x[1], x[1], key_padding_mask=torch.zeros(9).bool())
    torch.testing.assert_close(output, expected[1], atol=ATOL, rtol=1e-5)
    torch.testing.assert_close(ours.statistics["waad"], batched["waad"][1])
    assert ours.statistics.valid["waad"].shape == (9,)
    assert ours.statistics.lse.shape == (4, 9)


STRIPES = (torch.arange(9)[:, None] - torch.arange(9)) % 3 == 1
ALIBI = -(torch.arange(9)[:, None] - torch.arange(9)).abs().float()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"attn_mask": ALIBI}, r"attn_mask: this torch.float32 mask of shape \(1, 1, 9, 9\) is neither causal"),
        ({"attn_mask": STRIPES}, "attn_mask: this torch.bool mask"),
        ({"attn_mask": ALIBI, "is_causal": True}, "is_causal=True says that attn_mask is the causal mask"),
        ({"attn_mask": torch.zeros(9, 9), "is_causal": True}, "is_causal=True says that attn_mask"),
        ({"attn_mask": torch.zeros(9, 8)}, r"attn_mask must have the shape \(9, 9\) or \(8, 9, 9\), got \(9, 8\)"),
        ({"key_padding_mask": ALIBI[:2]}, "key_padding_mask: this torch.float32"),
        ({"key_padding_mask": torch.ones(9, 2).bool()}, r"key_padding_mask must have the shape \(2, 9\), got \(9, 2\)"),
        ({"need_weights": True}, "need_weights=True asks for the T x T map.*allow_dense"),
        ({"statistics": ["wad"]}, "unknown name 'wad'"),
        ({"query": torch.zeros(2, 9, 15)}, r"query must have the shape \(N, T, 16\).*got \(2, 9, 15\)"),
    ],
)
def test_bad_arguments_are_named(arguments, match):
    _, ours = pair()
    x = torch.randn(2, 9, 16)
    ours(x, x, x)
    with pytest.raises(ValueError, match=match):
        ours(**({"query": x, "key": x, "value": x} | arguments))
    assert ours.statistics is None  # not those of the call before
    with pytest.raises(TypeError, match="attn_mask must be a bool or float tensor, got torch"):
        ours(x, x, x, attn_mask=torch.zeros(9, 9).long())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    """torch's module takes strided ones, for all three arguments, in inference."""
    theirs, ours = pair()
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=layout)
    if layout is torch.strided:
        with torch.no_grad():
            theirs.eval()(x, x, x, need_weights=False)
    for arguments in ((x, x, x), (torch.randn(2, 5, 16), x, x)):
        with pytest.raises(TypeError, match=r"is a nested tensor.*pass key_padding_mask.*enable_nested_tensor=False"):
            ours(*arguments)


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("length", [9, 6])
def test_causal_biases(variant, length):
    theirs, ours = pair()
    ours.allow_dense = True
    x = torch.randn(2, 9, 16)
    query, bias = x[:, :length], variant(length, 9)
    offset = 9 - length if variant is causal_lower_right else 0
    mask = torch.ones(length, 9).triu(1 + offset).bool()
    expected, weights = theirs(query, x, x, attn_mask=mask, average_attn_weights=False)
    output, _ = ours(query, x, x, attn_mask=bias, statistics=["waad"])
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=1e-5)
    distance = (torch.arange(length)[:, None] + offset - torch.arange(9)).clamp(0, 10)
    torch.testing.assert_close(ours.statistics["waad"], (weights * distance).sum(-1), atol=1e-5, rtol=0.0)
    with pytest.warns(UserWarning, match="need_weights=True"):
        found = ours(query, x, x, attn_mask=bias, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(found, (expected, weights), atol=ATOL, rtol=1e-5)
    if offset:
        with pytest.raises(ValueError, match="is_causal=True says that attn_mask is the causal mask"):
            ours(query, x, x, attn_mask=bias, is_causal=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name():
    ours = MultiheadAttention(16, 4, batch_first=True, statistics=["waad"])
    with pytest.raises(RuntimeError, match=r"MultiheadAttention.*torch\.jit\.script: TorchScript cannot record"):
        torch.jit.script(nn.Sequential(ours))
    x = torch.randn(2, 9, 16)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace: TorchScript cannot record"):
        torch.jit.trace(ours, (x, x, x))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": ALIBI},
        {"attn_mask": STRIPES, "key_padding_mask": padding()},
        {"attn_mask": ALIBI, "key_padding_mask": ALIBI[:2]},
        {"attn_mask": CAUSAL(9), "key_padding_mask": ALIBI[:2]},
        {"attn_mask": torch.stack([ALIBI * i for i in range(8)])},
    ],
)
@pytest.mark.parametrize("configuration", ["plain", "both added"])
def test_dense_masks_on_demand(configuration, arguments):
    theirs, ours = pair(**CONFIGURATIONS[configuration])
    ours.allow_dense = True
    x = torch.randn(2, 9, 16)
    expected, _ = theirs(x, x, x, need_weights=False, **arguments)
    weights = theirs(x, x, x, average_attn_weights=False, **arguments)[1].nan_to_num()
    with pytest.warns(UserWarning, match="_mask of shape .*: attention on the whole map"):
        output, _ = ours(x, x, x, statistics=["received"], **arguments)
    torch.testing.assert_close(output, expected, atol=ATOL, rtol=1e-5)
    hidden = arguments.get("key_padding_mask")
    if hidden is not None and hidden.dtype == torch.bool:
        weights = weights * ~hidden[:, None, :, None]
    torch.testing.assert_close(ours.statistics["received"], weights[..., :9].sum(-2), atol=1e-5, rtol=0.0)


def test_weights_on_demand():
    theirs, ours = pair()
    ours.allow_dense = True
    x = torch.randn(2, 9, 16)
    for average in (True, False):
        expected = theirs(x, x, x, attn_mask=CAUSAL(9), average_attn_weights=average)
        with pytest.warns(UserWarning, match="need_weights=True"):
            found = ours(x, x, x, is_causal=True, need_weights=True, average_attn_weights=average, statistics=["waad"])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert ours.statistics["waad"].shape == (2, 4, 9)


def encoder(ours: bool, layers: int = 2, **arguments) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **arguments)
    if ours:
        attention = MultiheadAttention(16, 4, dropout=0.1, batch_first=True, statistics=["waad", "received"])
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not ours).eval()


ENCODER_INPUTS = {
    "plain": {},
    "padding": {"src_key_padding_mask": padding()},
    "causal": {"mask": CAUSAL(9)},
    "causal hint": {"mask": CAUSAL(9), "is_causal": True},
    "causal and padding": {"mask": CAUSAL(9).isinf(), "src_key_padding_mask": padding()},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inputs", ENCODER_INPUTS)
def test_in_a_transformer_encoder(inputs, grad):
    """Without gradients torch takes its fast path, which ours must not: no statistics would be there."""
    x, arguments = torch.randn(2, 9, 16), ENCODER_INPUTS[inputs]
    real = ~arguments.get("src_key_padding_mask", torch.zeros(2, 9).bool())
    model, theirs = encoder(ours=True), encoder(ours=False)
    model.load_state_dict(theirs.state_dict())
    with torch.set_grad_enabled(grad):
        expected = theirs(x, **arguments)
        output = model(x, **arguments)
        torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-4)
        with replace_attention(theirs, statistics=["waad", "received"]) as run:
            replaced = theirs(x, **arguments)
        torch.testing.assert_close(replaced, output)
        again = theirs(x, **arguments)
    assert torch.equal(again, expected)
    for i, layer in enumerate(model.layers):
        assert layer.self_attn.statistics is not None
        for statistic in ("waad", "received"):
            own = layer.self_attn.statistics[statistic]
            assert own.shape == (2, 4, 9)
            assert torch.equal(run[f"layers.{i}.self_attn"][statistic], own)
        total = layer.self_attn.statistics["received"].sum(-1)
        torch.testing.assert_close(total, real.sum(-1, keepdim=True).expand(2, 4).float(), atol=1e-4, rtol=0.0)


def test_training_step_under_autocast():
    model = encoder(ours=True, dropout=0.0).train()
    for layer in model.layers:
        layer.self_attn.dropout = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 9, 16), mask=CAUSAL(9))
    output.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.layers[0].self_attn.statistics["waad"].dtype == torch.float32


def test_dropout_acts_on_the_output_alone():
    _, ours = pair(dropout=0.5)
    x = torch.randn(2, 9, 16)
    expected, _ = ours(x, x, x, statistics=["waad"])
    undropped = ours.statistics["waad"]
    ours.train()
    torch.manual_seed(3)
    outputs = torch.stack([ours(x, x, x, statistics=["waad"])[0] for _ in range(400)])
    torch.testing.assert_close(ours.statistics["waad"], undropped, atol=1e-5, rtol=0.0)
    assert not torch.equal(outputs[0], outputs[1])
    deviation = outputs.std(0) / 400**0.5
    assert ((outputs.mean(0) - expected).abs() < 6 * deviation).all()
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x)[0], outputs[0])


def test_statistics_that_carry_gradients():
    theirs, ours = pair()
    ours.differentiable = True
    x = torch.randn(2, 9, 16)
    ours(x, x, x, statistics=["entropy"])
    ours.statistics["entropy"].mean().backward()
    _, weights = theirs(x, x, x, average_attn_weights=False)
    torch.special.entr(weights).sum(-1).mean().backward()
    torch.testing.assert_close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad, atol=1e-6, rtol=1e-4)


def test_on_the_triton_backend(device):
    theirs, ours = (module.to(device) for module in pair(add_zero_attn=True))
    ours.backend = "triton"
    x = torch.randn(2, 9, 16, device=device)
    arguments = {"attn_mask": CAUSAL(9).isinf().to(device), "key_padding_mask": padding().to(device)}
    expected, weights = theirs(x, x, x, average_attn_weights=False, **arguments)
    output, _ = ours(x, x, x, statistics=["received"], **arguments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    weights = weights[..., :9] * ~arguments["key_padding_mask"][:, None, :, None]
    torch.testing.assert_close(ours.statistics["received"], weights.sum(-2), atol=1e-5, rtol=0.0)


def test_compiled():
    _, ours = pair()
    ours.requested = (WAAD(3), FAI(1, 4))
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        expected, _ = ours(x, x, x, is_causal=True, key_padding_mask=padding())
        statistics = ours.statistics
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        output, _ = compiled(x, x, x, is_causal=True, key_padding_mask=padding())
        torch.testing.assert_close(output, expected)
        for s in ours.requested:
            torch.testing.assert_close(ours.statistics[s], statistics[s])
        assert torch.equal(ours.statistics.counts["fai"], statistics.counts["fai"])
        compiled = torch.compile(ours, backend="eager")
        output, _ = compiled(x, x, x, attn_mask=CAUSAL(9).isinf(), key_padding_mask=padding())
        torch.testing.assert_close(output, expected)
        with pytest.raises(ValueError, match=r"attn_mask: this torch.float32 mask"):
            compiled(x, x, x, attn_mask=ALIBI)


def test_replacement_restores_the_model():
    model = encoder(ours=False)
    attention = model.layers[0].self_attn
    before, parameters = dict(attention.__dict__), list(model.parameters())

    class Stop(Exception):
        pass

    def stopped():
        with replace_attention(model, statistics=["waad"]) as run:
            assert model.layers[0].self_attn is attention
            assert type(attention) is MultiheadAttention
            assert not model.use_nested_tensor
            model(torch.randn(1, 9, 16))
            assert list(run) == ["layers.0.self_attn", "layers.1.self_attn"]
            raise Stop

    with pytest.raises(Stop):
        stopped()
    assert type(attention) is nn.MultiheadAttention
    assert attention.__dict__ == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.use_nested_tensor
    with (
        pytest.raises(ValueError, match=r"model: Linear has no torch.nn.MultiheadAttention"),
        replace_attention(nn.Linear(2, 2), statistics=["waad"]),
    ):
        pass


def test_decoder_layer_self_and_cross_attention():
    torch.manual_seed(2)
    model = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    arguments = {"tgt_mask": CAUSAL(9), "memory_key_padding_mask": padding(5)}
    expected = model(x, memory, **arguments)
    with replace_attention(model, statistics=["entropy"]) as run:
        output = model(x, memory, **arguments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    assert {name: tuple(stats["entropy"].shape) for name, stats in run.items()} == {
        "self_attn": (2, 4, 9),
        "multihead_attn": (2, 4, 9),
    }


def test_copies_and_checkpoints():
    _, ours = pair()
    ours.requested = (WAAD(5),)
    x = torch.randn(2, 9, 16)
    ours(x, x, x)
    copied = copy.deepcopy(ours)
    assert copied.statistics is None
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded(x, x, x)
    assert torch.equal(loaded.statistics[WAAD(5)], ours.statistics[WAAD(5)])


def test_against_the_reference_in_float64():
    theirs, ours = pair()
    x = torch.randn(2, 33, 16)
    asked = [WAAD(4), FAI(2, 9), MeanDistance(), Entropy()]
    ours(x, x, x, is_causal=True, statistics=asked)
    wide = theirs.double()
    q, k, v = nn.functional.linear(x.double(), wide.in_proj_weight, wide.in_proj_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (q, k, v))
    _, truth = reference.attention(q, k, v, statistics=asked)
    for statistic in asked:
        bound = {WAAD(4): 4.0, MeanDistance(): 33.0}.get(statistic, 4.0)
        torch.testing.assert_close(ours.statistics[statistic].double(), truth[statistic], atol=bound * 1e-6, rtol=0.0)
    assert attnstats.nn is not torch.nn
