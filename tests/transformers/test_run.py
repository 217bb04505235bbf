"""The run inside a `with`: which pass it holds, reductions, devices, NaN, threads, passes that end early."""

import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from attnstats import FAI, WAAD, Received
from attnstats.transformers.capture import capture
from tests.tiny import (
    HEADS,
    LENGTH,
    SIZES,
    tiny,
    tokens,
)


def test_the_run_holds_the_most_recent_pass_and_its_query_mask(llama):
    first, second = tokens(), tokens(batch=1, length=11, seed=2)
    response = torch.arange(11)[None] >= 5
    with torch.no_grad(), capture(llama, statistics=[FAI(1, 5)]) as run:
        llama(first)
        assert run["fai"].shape == (3, 2, HEADS, LENGTH)
        everything = run.valid["fai"].sum()
        run.query_mask = response
        llama(second)
        masked = run["fai"]
        with pytest.raises(ValueError, match=r"query_mask must have shape \(2, 23\).*live=True"):
            llama(first)
        run.query_mask = None
        llama(second)
    assert everything == 2 * (LENGTH - 1)
    assert run["fai"].shape == masked.shape == (3, 1, HEADS, 11)
    assert not torch.equal(masked, run["fai"])


@pytest.mark.parametrize("reduce", [None, ("layers", "heads")])
def test_results_of_an_unfinished_pass_are_not_given_away(llama, reduce):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    ids = tokens()
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 2, 4], reduce=reduce) as run:
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            run["waad"]
        llama(ids)
        complete = run["waad"]
        handle = llama.model.layers[3].register_forward_hook(stop)
        with pytest.raises(Stop):
            llama(ids)
        for read in (lambda: run["waad"], lambda: run.valid):
            with pytest.raises(RuntimeError, match=r"incomplete, it recorded layers \[1, 2\] of \[1, 2, 4\]"):
                read()
        handle.remove()
        llama(ids)
        assert torch.equal(run["waad"], complete)
        with pytest.raises(KeyError, match="not among the statistics"):
            run["fai"]


def test_layers_that_do_not_report_are_an_error(llama):
    layers = llama.model.layers
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[2, 4]) as run:
        attention = layers[4].self_attn
        layers[4].self_attn = torch.nn.Identity()
        layers[4].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        with pytest.raises(RuntimeError, match=r"layers \[4\] did not call"):
            llama(tokens(), use_cache=False)
        layers[4].self_attn = layers[2].self_attn
        with pytest.raises(ValueError, match="layer 2 attends twice"):
            llama(tokens(), use_cache=False)
        layers[4].self_attn = attention
        llama(tokens(), use_cache=False)
    assert run["waad"].shape[0] == 2


def test_one_dimension_may_be_reduced(llama):
    ids, chosen = tokens(), {2: [8, 0], 4: [3, 1]}
    with torch.no_grad():
        with capture(llama, statistics=["waad"], layers=[2, 4], heads=chosen) as full:
            llama(ids)
        for reduce, dim in (("heads", 2), ("layers", 0)):
            with capture(llama, statistics=["waad"], layers=[2, 4], heads=chosen, reduce=reduce) as run:
                llama(ids)
            torch.testing.assert_close(run["waad"], full["waad"].mean(dim), rtol=0, atol=1e-6)


def test_reduced_is_one_mean_over_all_chosen_heads(llama):
    local, distant = {1: [0, 1, 2, 3], 4: [8]}, {4: [2, 3], 5: [0]}
    statistics: list[Any] = ["waad", FAI(1, 5)]
    ids = tokens()
    with torch.no_grad():
        with capture(llama, statistics=statistics, layers="all") as full:
            llama(ids)
        heads: Any = {"waad": local, "fai": distant}
        with capture(llama, statistics=statistics, layers=[1, 3, 4, 5], heads=heads, reduce=("layers", "heads")) as run:
            llama(ids)
            llama(ids)  # the run holds one pass, not the sum of two
    for name, chosen in (("waad", local), ("fai", distant)):
        each = [full[name][layer, :, head] for layer, heads in chosen.items() for head in heads]
        torch.testing.assert_close(run[name], torch.stack(each).mean(0), rtol=0, atol=1e-6)
        assert run[name].shape == run.valid[name].shape == (2, LENGTH)
    mean_of_means = torch.stack([full["waad"][layer][:, h].mean(1) for layer, h in local.items()]).mean(0)
    assert (run["waad"] - mean_of_means).abs().max() > 1e-3


def test_results_may_be_kept_on_a_device(llama):
    for live in (False, True):
        runs = []
        for device in (None, "cpu", torch.device("cpu")):
            with torch.no_grad(), capture(llama, statistics=["waad"], device=device, live=live) as run:
                llama(tokens())
            runs.append(run["waad"])
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])


def test_what_is_kept_is_said_before_it_is(llama):
    ids = tokens()
    for reduce in (None, "heads", "layers", ("layers", "heads")):
        with torch.no_grad(), capture(llama, statistics=["waad", "fai"], layers="all", reduce=reduce) as run:
            said = run.kept(batch=2, length=LENGTH)
            llama(ids)
        assert said.total == 4 * sum(run[name].numel() for name in ("waad", "fai"))
    large = transformers.LlamaConfig(num_hidden_layers=36, num_attention_heads=32, hidden_size=32, vocab_size=9)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(large)
    with capture(model, statistics=["waad", "fai"], layers="all", reduce=("layers", "heads")) as run:
        assert run.kept(batch=1, length=32768).total < 1e6
    with capture(model, statistics=["waad", "fai"], layers="all", reduce="heads") as run:
        assert run.kept(batch=1, length=32768).total < 10e6


def test_the_pass_may_end_with_the_last_captured_layer(llama):
    ids, reached = tokens(), []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(llama.model.layers)
    ]
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 3]) as whole:
        assert whole.forward(input_ids=ids).logits.shape[-1] == SIZES["vocab_size"]
    reached.clear()
    with capture(llama, statistics=["waad"], layers=[1, 3], stop_after_last_layer=True) as run:
        assert run.forward(input_ids=ids) is None
        first = run["waad"]
        assert reached == [0, 1, 2, 3]
        run.forward(input_ids=ids)
        with pytest.raises(RuntimeError, match=r"call run\.forward"):
            llama(ids)
    assert torch.equal(first, whole["waad"])
    assert not first.requires_grad
    for handle in handles:
        handle.remove()


def test_nan_is_named_by_layer_and_head_and_not_averaged(llama):
    with torch.no_grad():
        llama.model.layers[3].self_attn.q_proj.weight[16 * 4 : 16 * 5] = torch.nan
    ids = tokens()
    statistics = [WAAD(4), Received()]
    with torch.no_grad(), capture(llama, statistics=statistics, layers=[2, 3]) as run:
        llama(ids)
    for s in statistics:
        with pytest.warns(RuntimeWarning, match=r"NaN in layer 3 heads \[4\]:"):
            broken = run[s]
        assert broken.isnan().flatten(2).any(-1).sum() == 2  # one head of each batch row
        assert broken[1, :, 4].isnan().any()
    with torch.no_grad(), capture(llama, statistics=statistics, layers=[2, 3], reduce="heads") as run:
        llama(ids)
    with pytest.raises(ValueError, match=r"NaN in layer 3 heads \[4\].*leave them out"):
        run[WAAD(4)]


def test_nan_of_chosen_heads_has_their_number(llama):
    with torch.no_grad():
        llama.model.layers[3].self_attn.q_proj.weight[16 * 4 : 16 * 5] = torch.nan
    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[3], heads=[8, 4]) as run:
        llama(tokens())
    with pytest.warns(RuntimeWarning, match=r"NaN in layer 3 heads \[4\]:"):
        _ = run["waad"]


def test_an_interrupt_leaves_nothing_behind(llama):
    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[1, 4]) as run:
        handle = llama.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(tokens())
        handle.remove()
        with pytest.raises(RuntimeError, match="incomplete"):
            _ = run["waad"]
        llama(tokens())
        assert run["waad"].shape[0] == 2
    assert llama.config._attn_implementation == "sdpa"


def test_checkpointing_outside_says_where_backward_belongs(llama):
    llama.train()
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with capture(llama, statistics=["waad"]):
        loss = llama(tokens(), labels=tokens()).loss
    with pytest.raises(ValueError, match="call backward inside the `with`"):
        loss.backward()


def test_layers_that_keep_other_keys_are_named():
    model = tiny("gemma2", sliding_window=8)
    for reduce in (None, "layers"):
        with (
            capture(model, statistics=["fai"], layers="all", reduce=reduce) as run,
            pytest.raises(ValueError, match=r"different numbers of keys.*live=True"),
        ):
            print(model.generate(tokens(), max_new_tokens=3).shape, run["fai"].shape)


def test_one_thread_at_a_time(llama):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(30)

    def other():
        with torch.no_grad():
            llama(tokens())

    with torch.no_grad(), capture(llama, statistics=["waad"], layers=[4]) as run:
        handle = llama.model.layers[2].register_forward_hook(wait)
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
        with pytest.raises(RuntimeError, match="two threads"):
            llama(tokens())
        go_on.set()
        thread.join()
        assert run["waad"].shape == (1, 2, HEADS, LENGTH)
        handle.remove()
        llama(tokens()[:1])
        assert run["waad"].shape == (1, 1, HEADS, LENGTH)


def test_a_capture_is_entered_once(llama):
    once = capture(llama, statistics=["waad"])
    with once:
        pass
    with pytest.raises(RuntimeError, match=r"used already; call attnstats\.capture"), once:
        pass
