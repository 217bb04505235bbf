"""Attached and captured transformers models under torch.compile(fullgraph=True) and torch.export: outputs, records, how
many graphs. `python -m tests.compile_families` does it for every family.
"""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import attnstats
from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from tests.tiny import LENGTH, gradients, padding, run_with, tiny, tokens

STATISTICS = [WAAD(4), FAI(1, 4)]
KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "deepseek_v3": {  # values are smaller than queries and keys
        "num_key_value_heads": 9,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "intermediate_size_mlp": 96,
    },
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("forgotten_graphs"),
]


def two_layers(family="llama", **changes):
    sizes = {"num_hidden_layers": 2, "hidden_size": 72, "head_dim": 8}
    return tiny(family, **(sizes | KINDS.get(family, {}) | changes))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def records(run: Any) -> list[Any]:
    return [] if run is None else [(run[s], run.valid[s]) for s in STATISTICS]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("captured", [False, True], ids=["attached", "captured"])
def test_inductor_compiles_a_model_with_and_without_padding(captured, dynamic):
    model = two_layers()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    batches: list[dict[str, Any]] = [{"input_ids": tokens(), "attention_mask": padding("left"), "use_cache": False}]
    batches += [{"input_ids": tokens(length=17), "use_cache": False}]
    expected = [run_with(model, "sdpa", **batch).logits for batch in batches]
    attnstats.attach(model)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all") if captured else nullcontext() as run:
        for batch, logits in zip(batches, expected, strict=True):
            close(compiled(**batch).logits, logits)
            actual = records(run)
            model(**batch)
            close(actual, records(run))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("family", KINDS)
def test_inductor_compiles_every_kind_of_attention(family):
    model = two_layers(family)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    layers = [1] if family == "lfm2" else "all"
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers=layers) as run:
        for mask in (padding("left"), padding("right"), torch.ones(2, 17, dtype=torch.long)):
            batch = {"input_ids": tokens(length=mask.shape[1]), "attention_mask": mask, "use_cache": False}
            logits, of_eager = model(**batch).logits, records(run)
            close(compiled(**batch).logits, logits)
            close(records(run), of_eager)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_config_that_is_copied_in_the_graph():
    """As bart's decoder does for its cache."""
    config = attnstats.attach(two_layers()).config
    assert torch.compile(copy.deepcopy, fullgraph=True, backend="eager")(config)._attn_implementation == "sdpa"


@pytest.mark.parametrize("captured", [False, True], ids=["attached", "captured"])
def test_lengths_do_not_compile_anew(captured):
    model = two_layers("gemma2")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    attnstats.attach(model)
    settings: dict[str, Any] = {"statistics": STATISTICS, "layers": "all", "reduce": ("layers", "heads")}
    with torch.no_grad(), capture(model, **settings) if captured else nullcontext() as run:
        for length in range(1, 41):
            ids = tokens(length=length)
            logits = compiled(ids, use_cache=False).logits
            actual = run[WAAD(4)] if captured else None
            close(logits, model(ids, use_cache=False).logits)
            if captured:
                close(actual, run[WAAD(4)])
    assert counter.frame_count == 2  # one token, and more


def test_dimensions_may_be_marked_dynamic():
    model = two_layers("gemma2")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all"):
        for rows, length in ((2, 9), (3, 12), (4, 5)):
            ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
            for x in (ids, mask):
                torch._dynamo.mark_dynamic(x, (0, 1))
            compiled(ids, attention_mask=mask, use_cache=False)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [False, True])
def test_an_attached_model_is_exported_with_dynamic_lengths(strict):
    model = two_layers("gemma2")
    attnstats.attach(model)
    anything = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    batch = {"input_ids": tokens(), "attention_mask": padding("left")}
    with torch.no_grad():
        model.config.use_cache = False
        shapes = dict.fromkeys(batch, anything)
        program = torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=strict).module()
        for ids, mask in ((tokens(), padding("right")), (tokens(3, 11), torch.ones(3, 11, dtype=torch.long))):
            close(program(input_ids=ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step_has_the_gradients_of_sdpa(backend):
    model = two_layers(num_hidden_layers=1 if backend == "inductor" else 2).train()  # inductor compiles for long
    ids = tokens()
    expected = gradients(model, ids, use_cache=False)
    attnstats.attach(model)
    actual = gradients(model, ids, torch.compile(model, backend=backend, fullgraph=True), use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_a_graph_cannot_describe_is_an_error_when_it_runs():
    model = two_layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    position = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    with torch.no_grad(), capture(model, statistics=STATISTICS, layers="all"):
        compiled(tokens(), position_ids=torch.arange(LENGTH)[None].expand(2, -1), use_cache=False)
        with pytest.raises(RuntimeError, match="packed position_ids"):
            compiled(tokens(), position_ids=position, use_cache=False)
