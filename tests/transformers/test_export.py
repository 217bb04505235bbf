"""An attached model with nothing captured where there are no numbers, on the meta device and in a FakeTensorMode, and
where torch's own operators are recorded, by torch.jit.trace and torch.onnx.export, beside the same model with SDPA.
torch.export is in test_compile.py."""

import copy

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import attnstats
from attnstats.transformers.capture import capture
from tests.tiny import padding, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=97, **sizes, initializer_range=0.3)).eval()


FAMILIES = {
    "llama": tiny,
    "mistral": lambda: tiny("mistral", sliding_window=8),
    "llama4": lambda: tiny("llama4_text", attention_chunk_size=8, num_local_experts=2, num_hidden_layers=4),
    "bert": bert,
}


class Logits(torch.nn.Module):
    def __init__(self, model, **settings):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask, **self.settings)[0]


def without_cache(family):
    return Logits(FAMILIES[family](), **({} if family == "bert" else {"use_cache": False}))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_without_numbers(family, with_mask):
    model = FAMILIES[family]()
    ids = tokens()
    mask = torch.ones_like(ids) if with_mask else None
    expected = Logits(model)(ids, mask)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    attnstats.attach(empty)
    found = Logits(empty)(ids.to("meta"), None if mask is None else mask.to("meta"))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")
    attnstats.attach(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = Logits(model)(mode.from_tensor(ids), None if mask is None else mode.from_tensor(mask))
    assert (found.shape, found.dtype, found.device, found.stride()) == (
        expected.shape,
        expected.dtype,
        expected.device,
        expected.stride(),
    )


@pytest.mark.parametrize("side", [None, "none", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_a_trace_serves_other_batches_lengths_and_padding(family, side):
    module = without_cache(family)
    attnstats.attach(module.model)
    ids = tokens()
    masks = {None: None, "none": torch.ones_like(ids), "left": padding("left")}
    with torch.no_grad():
        traced = torch.jit.trace(module, (ids,) if side is None else (ids, masks[side]), check_trace=False)
        assert "attnstats" not in str(traced.inlined_graph)
        attnstats.detach(module.model)
        for rows, length, other in ((2, 23, "none"), (1, 23, "none"), (2, 9, "none"), (3, 40, "none"), (2, 23, "left")):
            ids = tokens(rows, length)
            mask = padding("left") if other == "left" else torch.ones_like(ids)
            given = (ids,) if side is None else (ids, mask)
            if side is None and other == "left":
                continue
            real = torch.ones_like(ids).bool() if side is None else mask.bool()
            torch.testing.assert_close(traced(*given)[real], module(*given)[real], rtol=1e-4, atol=1e-4)


def test_what_a_trace_cannot_hold_is_refused():
    module = without_cache("llama")
    with capture(module.model, statistics=["waad"]), pytest.raises(RuntimeError, match=r"while it is captured.*detach"):
        torch.jit.trace(module, tokens())
    module = Logits(tiny(attn_implementation="eager"), use_cache=False)
    attnstats.attach(module.model)
    with pytest.raises(RuntimeError, match=r"whose own attention is 'eager'.*torch\.export"):
        torch.jit.trace(module, tokens())


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_onnx_gets_torchs_operators(family, monkeypatch):
    """The first half of torch.onnx.export(dynamo=True), which decides what the other, onnxscript, has to know."""
    module = without_cache(family)
    attnstats.attach(module.model)
    length = torch.export.Dim("length", min=2, max=64)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with torch.no_grad():
        given = (tokens(), padding("left"))
        program = torch.export.export(module, given, dynamic_shapes=({1: length}, {1: length}), strict=False)
        assert "attnstats" not in str(program.graph)
        attnstats.detach(module.model)
        ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.int64)
        mask[0, :4] = 0
        found, expected = program.module()(ids, mask), module(ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
