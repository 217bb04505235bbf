"""Models inside wrappers: what each wrapper holds, and which would lose or misplace results."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from attnstats import nn
from attnstats.errors import InputError
from attnstats.identity import identity
from attnstats.study.models import LoadedModel
from attnstats.wrappers import refuse_replica, refuse_replicas, unwrap
from tests.tiny import tiny


class PeftModel(torch.nn.Module):
    """The parts of PEFT's that are used: a tuner holds the model whose layers it has changed."""

    def __init__(self, model, is_prompt_learning=False):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=is_prompt_learning)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


class TwiceWrapped(DataParallel):
    """A subclass of a wrapper is one."""


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": DataParallel,
    "a subclass": TwiceWrapped,
    "ddp": DistributedDataParallel,
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "peft": PeftModel,
    "ddp of peft, compiled": lambda model: torch.compile(DistributedDataParallel(PeftModel(model)), backend="eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_unwrap(one_rank, wrapper):
    model = torch.nn.Linear(2, 2)
    assert unwrap(WRAPPERS[wrapper](model)) is model


@pytest.mark.filterwarnings("ignore")
def test_the_identity_is_of_whole_parameters(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    before = identity(tiny())
    assert identity(fully_shard(tiny(), mesh=init_device_mesh("cpu", (1,)))) == before
    assert identity(WRAPPERS["fsdp"](tiny())) == before


def test_what_is_no_wrapper():
    holder = torch.nn.Module()
    holder.model = holder.module = torch.nn.Linear(2, 2)
    for x in (holder, torch.nn.Linear(2, 2), tiny(), "model", None):
        assert unwrap(x) is x
        refuse_replicas(x)


def test_virtual_tokens_are_refused():
    with pytest.raises(InputError, match="adapter of this PeftModel puts virtual tokens before the prompt"):
        unwrap(PeftModel(torch.nn.Linear(2, 2), is_prompt_learning=True))


def several_devices(model):
    """DataParallel as it is on a machine with two GPUs."""
    wrapped = DataParallel(model)
    wrapped.device_ids = [0, 1]
    return wrapped


def test_copies_on_several_devices_are_refused():
    model = torch.nn.TransformerEncoderLayer(8, 2, 8)
    refuse_replicas(DataParallel(model))
    for wrapped in (several_devices(model), torch.compile(several_devices(model), backend="eager")):
        with pytest.raises(InputError, match=r"DataParallel runs a copy of it on each of the devices \[0, 1\]"):
            refuse_replicas(wrapped)
        with (
            pytest.raises(InputError, match="what the copies record is lost"),
            nn.replace_attention(wrapped, statistics=["entropy"]),
        ):
            pass
    refuse_replica(model)
    with pytest.raises(InputError, match="TransformerEncoderLayer is a copy that DataParallel made"):
        refuse_replica(model._replicate_for_data_parallel())


@pytest.mark.parametrize("wrapper", ["compiled", "data parallel", "ddp", "peft"])
def test_the_identity_and_a_study_are_of_the_model_inside(one_rank, wrapper):
    model = tiny()
    wrapped = WRAPPERS[wrapper](model)
    assert identity(wrapped) == identity(model)
    loaded = LoadedModel("tiny", wrapped, None)
    assert loaded.model is model
    assert loaded.dtype == "float32"
