"""Models spread over two processes, DDP, FSDP2 and tensor parallel, capture and train as one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, logging

from attnstats import FAI, WAAD
from attnstats.transformers.capture import capture
from tests.process import two_ranks
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
    with capture(model, statistics=STATISTICS, layers=[1, 2], reduce="heads") as run:
        own = ids[rank : rank + 1]
        found = gradients(wrapped, own)
        torch.testing.assert_close(
            wrapped(input_ids=own, use_cache=False).logits, logits[rank : rank + 1], rtol=0, atol=2e-5
        )
    same(found, expected)
    for s in STATISTICS:
        torch.testing.assert_close(run[s], one[s][:, rank : rank + 1], rtol=0, atol=2e-5)


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
    for check, arguments in ((ddp, (rank,)), (fsdp2, (rank,)), (tensor_parallel, (folder,))):
        try:
            check(*arguments)
        except Exception as error:
            raise AssertionError(f"rank {rank}, {check.__name__}: {error}") from error


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path):
    small().save_pretrained(tmp_path)
    two_ranks(on_rank, str(tmp_path))
