"""Generation and static caches with compiled steps: tokens, scores, records, and how many graphs."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import attnstats
from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from tests.tiny import padding, tiny, tokens

STATISTICS = [WAAD(4), FAI(1, 4)]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 72, "head_dim": 8}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("forgotten_graphs"),
]


def compile_config(**settings):
    config = CompileConfig(**{"fullgraph": True, "mode": "default", "backend": "aot_eager"} | settings)
    config._compile_all_devices = True
    return config


def generate(model, ids, mask=None, **settings):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **settings, return_dict_in_generate=True, output_scores=True)


# transformers asks this of its models in tests/generation/test_utils.py: compiled steps of two generations in a row
# give the tokens and scores of uncompiled ones with a dynamic cache, and unless windows slide nothing compiles twice.
@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"dynamic": False, "backend": "inductor"}), ("gemma2", {"dynamic": None})],
)
def test_every_step_of_an_attached_model_runs_one_graph(family, settings):
    model = tiny(family, **SIZES | ({"sliding_window": 8} if family == "gemma2" else {}))
    prompts = [(tokens(seed=1), None), (tokens(seed=2), None), (tokens(seed=3), padding("left"))]
    expected = [generate(model, *prompt) for prompt in prompts]
    attnstats.attach(model)
    for prompt, of_eager in zip(prompts, expected, strict=True):
        config = compile_config(**settings)
        actual = generate(model, *prompt, cache_implementation="static", compile_config=config)
        assert torch.equal(actual.sequences, of_eager.sequences)
        torch.testing.assert_close(actual.scores, of_eager.scores, rtol=0, atol=1e-5)
        if family == "llama":
            assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("family", "kind"), [("llama", "attached"), ("llama", "captured"), ("mistral", "captured")])
def test_steps_with_a_static_cache_whose_mask_is_made_in_the_graph(family, kind):
    model = tiny(family, **SIZES | ({"sliding_window": 8} if family == "mistral" else {}))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, mask = tokens(length=16), padding("left")[:, :16]

    def steps(call, run):
        cache, results = StaticCache(config=model.config, max_cache_len=40), []
        with torch.no_grad():
            for begin, end in ((0, 9), (9, 10), (10, 11), (11, 16)):
                step = call if begin else model  # as in generate, the prompt isn't compiled
                logits = step(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                results.append((logits, [(run[s], run.valid[s]) for s in STATISTICS if run]))
        return results

    attnstats.attach(model)
    with capture(model, statistics=STATISTICS, layers="all") if kind == "captured" else nullcontext() as run:
        torch.testing.assert_close(steps(compiled, run), steps(model, run), rtol=0, atol=1e-5)


def test_live_statistics_are_recorded_between_the_graphs_of_a_step():
    model = tiny(**SIZES)

    def record(**settings):
        with capture(model, statistics=STATISTICS, layers="all", live=True) as run:
            generate(model, tokens(), **settings)
        return [run[s] for s in STATISTICS], run.length

    static: dict[str, Any] = {"cache_implementation": "static"}
    actual = record(**static, compile_config=compile_config(fullgraph=False))
    assert counters["stats"]["unique_graphs"]
    torch.testing.assert_close(actual, record(), rtol=0, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"capture\(live=True\) grows with every step.*fullgraph=False"):
        record(**static, compile_config=compile_config())
