"""Wrapped models, and models spread over two processes: DDP, FSDP, tensor parallel, as one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, logging

import attnstats
from attnstats import FAI, WAAD
from attnstats.errors import InputError
from attnstats.transformers.capture import capture
from attnstats.transformers.exchange import HeadExchange, set_exchange
from tests.process import two_ranks
from tests.test_wrappers import WRAPPERS, PeftModel, several_devices
from tests.tiny import tiny, tokens

STATISTICS = [WAAD(4), FAI(1, 4)]
HEADS = 8
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"heads": {"waad": [5, 0], "fai": {1: [7, 6], 2: [6, 7]}}},  # one rank has no head of FAI
    {"reduce": "heads"},
    {"reduce": "layers", "heads": [6, 1, 2]},
    {"reduce": ("layers", "heads"), "heads": {"waad": [5, 0], "fai": {1: [7, 6]}}},
]


def small(**changes):
    return tiny(**({"num_attention_heads": HEADS, "num_key_value_heads": 4, "num_hidden_layers": 3} | changes))


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name.removeprefix("module."): _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=tolerance, msg=name)


def data_parallel(rank, wrap):
    """Each rank has one of two rows; gradients are means over ranks, statistics those of a rank's own row."""
    model, ids = small(), tokens()
    expected = gradients(model, ids)
    with capture(model, statistics=STATISTICS, layers=[1, 2], reduce="heads") as one:
        logits = model(input_ids=ids, use_cache=False).logits
    model = small()
    wrapped = wrap(model)
    with capture(wrapped, statistics=STATISTICS, layers=[1, 2], reduce="heads") as run:
        own = ids[rank : rank + 1]
        found = gradients(wrapped, own)
        torch.testing.assert_close(
            wrapped(input_ids=own, use_cache=False).logits, logits[rank : rank + 1], rtol=0, atol=2e-5
        )
    same(found, expected)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], one[s][:, rank : rank + 1], rtol=0, atol=2e-5)

    with capture(wrapped, statistics=STATISTICS, layers=[1], stop_after_last_layer=True, reduce="heads") as run:
        run.forward(input_ids=own, use_cache=False)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], one[s][:1, rank : rank + 1], rtol=0, atol=2e-5)


def ddp(rank):
    data_parallel(rank, torch.nn.parallel.DistributedDataParallel)


def fsdp2(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def wrap(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    data_parallel(rank, wrap)


def fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layer = type(small().model.layers[0])
    settings: dict[str, Any] = {"device_id": torch.device("cpu"), "auto_wrap_policy": ModuleWrapPolicy({layer})}
    model, ids = small(), tokens()
    with capture(model, statistics=STATISTICS, layers=[1, 2]) as one:
        expected = model(ids).logits
    for use_orig_params in (False, True):
        wrapped = FullyShardedDataParallel(small(), use_orig_params=use_orig_params, **settings)
        with capture(wrapped, statistics=STATISTICS, layers=[1, 2]) as run:
            logits = wrapped(ids[rank : rank + 1]).logits
            torch.testing.assert_close(logits, expected[rank : rank + 1], rtol=0, atol=2e-5)
            logits.sum().backward()
        with capture(wrapped, statistics=STATISTICS, layers=[1], stop_after_last_layer=True) as early:
            early.forward(input_ids=ids[rank : rank + 1])
        for s in STATISTICS:
            torch.testing.assert_close(run[s], one[s][:, rank : rank + 1], rtol=0, atol=2e-5)
            torch.testing.assert_close(early[s], one[s][:1, rank : rank + 1], rtol=0, atol=2e-5)


def tensor_parallel(folder):
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    spread = _spread(folder).eval()
    assert plain.model.layers[0].self_attn.q_proj.weight.numel() == HEADS * 16 * 144
    ids = tokens()
    for selection in SELECTIONS:
        runs = []
        for model in (plain, spread):
            with torch.no_grad(), capture(model, statistics=STATISTICS, layers=[1, 2], **selection) as run:
                logits = _whole(model(ids).logits)
            runs.append((logits, run[STATISTICS[0]], run[STATISTICS[1]]))
        for found, expected in zip(runs[1], runs[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-5, msg=str(selection))
    for reduce in (None, ("layers", "heads")):
        generated = []
        for model in (plain, spread):
            with capture(model, statistics=STATISTICS, layers=[1, 2], heads=[3, 5], live=True, reduce=reduce) as run:
                ids_out = model.generate(ids, max_new_tokens=4, do_sample=False)
            generated.append((ids_out, run[STATISTICS[0]], run[STATISTICS[1]]))
        for found, expected in zip(*generated, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def _spread(folder):
    """Loaded with transformers' own plan of what to cut where; how that is asked for has changed."""
    try:
        from transformers import DistributedConfig
    except ImportError:
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2))


def on_rank(rank: int, folder: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    for check, arguments in ((ddp, (rank,)), (fsdp1, (rank,)), (fsdp2, (rank,)), (tensor_parallel, (folder,))):
        try:
            check(*arguments)
        except Exception as error:
            raise AssertionError(f"rank {rank}, {check.__name__}: {error}") from error


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path):
    small().save_pretrained(tmp_path)
    two_ranks(on_rank, str(tmp_path))


# Wrapped in one process


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_captured_and_attached(one_rank, wrapper):
    model, ids = small(), tokens()
    with capture(model, statistics=STATISTICS, layers=[1, 2]) as one, torch.no_grad():
        expected = model(ids).logits
    model = small()
    wrapped = WRAPPERS[wrapper](model)
    wrapped(ids)  # compiled or sharded before
    with capture(wrapped, statistics=STATISTICS, layers=[1, 2], heads=None) as run, torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, expected, rtol=0, atol=2e-5)
        first = [run[s] for s in STATISTICS]
        run.forward(input_ids=ids)
    with capture(wrapped, statistics=STATISTICS, layers=[1], stop_after_last_layer=True) as early:
        assert early.forward(input_ids=ids) is None
    for s, x in zip(STATISTICS, first, strict=True):
        torch.testing.assert_close(x, one[s], rtol=0, atol=2e-5)
        torch.testing.assert_close(run[s], x, rtol=0, atol=0)
        torch.testing.assert_close(early[s], x[:1], rtol=0, atol=0)
    assert attnstats.attach(wrapped) is wrapped
    assert model.config._attn_implementation == "attnstats"
    torch.testing.assert_close(wrapped(ids).logits, expected, rtol=0, atol=2e-5)
    assert attnstats.detach(wrapped) is wrapped
    assert model.config._attn_implementation == "sdpa"


def test_a_pass_that_need_not_end_leaves_no_gathered_parameters(one_rank):
    """FSDP2 gathers the parameters of a layer for its forward pass, and shards them again when it ends."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = small(), init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with capture(model, statistics=STATISTICS, layers=[1], stop_after_last_layer=True) as run:
        assert run.forward(input_ids=tokens()) is None
    assert run["waad"].isfinite().all()
    assert all(hasattr(p, "full_tensor") for p in model.model.layers[1].parameters())


def test_data_parallel_over_several_devices_is_refused():
    model, ids = small(), tokens()
    with pytest.raises(InputError, match=r"DataParallel runs a copy of it on each of the devices \[0, 1\]"):
        capture(several_devices(model), statistics=STATISTICS)
    with capture(model, statistics=STATISTICS):  # and where the module is captured that it wraps
        model(ids)
        with pytest.raises(InputError, match="LlamaForCausalLM is a copy that DataParallel made"):
            model._replicate_for_data_parallel()(ids)
    attnstats.attach(several_devices(model))  # nothing is recorded, so nothing is lost
    model._replicate_for_data_parallel()(ids)
    attnstats.detach(model)


def test_adapters_with_virtual_tokens_are_refused():
    with pytest.raises(InputError, match="puts virtual tokens before the prompt"):
        capture(PeftModel(small(), is_prompt_learning=True), statistics=STATISTICS)


def test_a_module_that_holds_a_model_is_not_unwrapped():
    holder = torch.nn.Module()
    holder.model = small()
    with pytest.raises(TypeError, match="got Module; pass the model that it wraps"):
        capture(holder, statistics=STATISTICS)


class AllToAll(torch.autograd.Function):
    """Each rank's parts along one axis for the others' along another, as Ulysses does it; backward the other way."""

    @staticmethod
    def forward(ctx, x, cut, join):
        ctx.axes = join, cut
        parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), cut)]
        received = [torch.empty_like(part) for part in parts]
        dist.all_to_all(received, parts)
        return torch.cat(received, join)

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad.contiguous(), *ctx.axes), None, None


def heads_exchanged(rank, selection):
    """A rank has half of a packed row, and in attention half of the heads of the whole row."""
    dist.init_process_group("gloo")
    ids = tokens()[:1]
    model, ids = small(), ids[:, : ids.shape[1] // 2 * 2]
    positions = torch.cat([torch.arange(5), torch.arange(ids.shape[1] - 5)])[None]
    half = slice(rank * ids.shape[1] // 2, (rank + 1) * ids.shape[1] // 2)
    query_mask = positions > 2
    settings = {"statistics": [*STATISTICS, "mean_distance"], "layers": [1, 2], "query_mask": query_mask} | selection
    with capture(model, **settings) as one:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    set_exchange(
        HeadExchange(dist.group.WORLD, positions, lambda x: AllToAll.apply(x, 1, 2), lambda x: AllToAll.apply(x, 1, 2))
    )
    try:
        model = small()
        attnstats.attach(model)  # without one the layers that aren't captured would attend within their half
        with capture(model, **settings) as run:
            ours = model(input_ids=ids[:, half], position_ids=positions[:, half], use_cache=False).logits
    finally:
        set_exchange(None)
    torch.testing.assert_close(ours, logits[:, half], rtol=1e-4, atol=1e-5)
    for s in settings["statistics"]:
        torch.testing.assert_close(run[s], one[s], rtol=1e-4, atol=1e-5)
        assert torch.equal(run.valid[s], one.valid[s])


@pytest.mark.parametrize("selection", SELECTIONS[:2] + SELECTIONS[4:], ids=str)
def test_rows_that_ranks_exchange_for_heads(selection):
    two_ranks(heads_exchanged, selection)


def test_a_mask_of_its_own_is_not_exchanged():
    ids = tokens()[:1]
    model = small()
    set_exchange(HeadExchange(None, torch.arange(ids.shape[1])[None], lambda x: x, lambda x: x))
    try:
        with capture(model, statistics=STATISTICS, layers=[1]), pytest.raises(InputError, match="only packed rows"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        set_exchange(None)
