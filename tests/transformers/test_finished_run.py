"""A run after its `with`: it holds results alone, so the model can go, and it can be pickled and copied."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, Received
from attnstats.transformers.capture import capture
from tests.tiny import tiny, tiny_bart, tokens

STATISTICS = (WAAD(3), FAI(1, 4), Received(), Entropy())


def forward(model, run):
    model(tokens())


def stopped(model, run):
    run.forward(input_ids=tokens())


def raising(model, run):
    model(tokens())
    with pytest.raises(IndexError):
        model(tokens() + 10**6)
    model(tokens())


def generate(model, run):
    return model.generate(tokens(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)


def checkpointed(model, run):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(tokens()).logits.sum().backward()


def translate(model, run):
    model(input_ids=tokens(), decoder_input_ids=tokens(length=7))


RUNS = {
    "one pass": (tiny, forward, {}),
    "reduced": (tiny, forward, {"reduce": ("layers", "heads"), "heads": [0, 2], "device": "cpu"}),
    "stopped": (tiny, stopped, {"stop_after_last_layer": True}),
    "after an exception": (tiny, raising, {}),
    "generated": (tiny, generate, {}),
    "live": (tiny, generate, {"live": True, "on_token": lambda run: False}),
    "training": (tiny, checkpointed, {}),
    "cross": (tiny_bart, translate, {"attention": "cross", "statistics": [Received(), Entropy()]}),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_keeps_no_model_alive_and_pickles_none(name):
    make, use, settings = RUNS[name]
    settings = {"statistics": STATISTICS} | settings
    model = make()
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    with capture(model, **settings) as run:
        kept = use(model, run)
        inside = pickle.loads(pickle.dumps(run))
    results = [run[s].clone() for s in settings["statistics"]]
    alive = weakref.ref(model)
    written = pickle.dumps(run)
    del model
    gc.collect()
    assert alive() is None
    assert len(written) < size
    for other in (run, inside, pickle.loads(written), copy.deepcopy(run)):
        for s, x in zip(settings["statistics"], results, strict=True):
            assert torch.equal(other[s], x)
            assert torch.equal(other.valid[s], run.valid[s])
        if name == "live":
            assert torch.equal(other.tokens, kept.sequences[:, :-1])
    with pytest.raises(RuntimeError, match="the `with` of this capture is over"):
        run.forward(input_ids=tokens())


def test_the_result_of_generate_keeps_no_run_and_no_model_alive():
    model = tiny()
    with attnstats.capture(model, statistics=STATISTICS, live=True) as run:
        result = model.generate(tokens(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    alive = [weakref.ref(x) for x in (model, run)]
    del model, run
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    cache = pickle.loads(pickle.dumps(result)).past_key_values
    assert type(cache) is type(result.past_key_values)
