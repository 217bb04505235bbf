"""What OpenRLHF imports or asks of CUDA, on a CPU, and its policy without DeepSpeed.

flash_attn is packed rows' indexing here, vllm a name. `PolicyModelActor.forward` asks for the current CUDA device,
which is the CPU.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


def _rearrange(x: Tensor, pattern: str) -> Tensor:
    assert pattern == "b s ... -> (b s) ..."
    return x.flatten(0, 1)


def _unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero()[:, 0]
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, boundaries, int(lengths.max()), lengths


def _pad_input(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    rows = x.new_zeros(batch * length, *x.shape[1:])
    rows[indices] = x
    return rows.unflatten(0, (batch, length))


def _stand_in(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(members, __spec__=ModuleSpec(name, None))
    sys.modules[name] = module


if find_spec("flash_attn") is None:
    _stand_in("flash_attn")
    _stand_in(
        "flash_attn.bert_padding",
        index_first_axis=_index_first_axis,
        pad_input=_pad_input,
        rearrange=_rearrange,
        unpad_input=_unpad_input,
    )
    _stand_in("flash_attn.utils")
    _stand_in("flash_attn.utils.distributed", all_gather=None)
if find_spec("vllm") is None:
    _stand_in("vllm", SamplingParams=None)
    _stand_in("vllm.inputs", TokensPrompt=None)
    _stand_in("vllm.utils", random_uuid=None)
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
torch.cuda.synchronize = lambda *_: None

from openrlhf.models import Actor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from attnstats.integrations.openrlhf import RhythmPolicy  # noqa: E402
from attnstats.integrations.settings import RhythmCredit  # noqa: E402


class Policy(RhythmPolicy):
    credit = RhythmCredit(hi=25, layers=[1, 2, 4])

    def init_model_from_pretrained(self, strategy: Any, folder: str) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=self._rank, world_size=self._world_size)
        self.strategy = strategy
        self.actor = Actor(folder, "sdpa").float()  # loads 16 bits
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.actor.model.load_state_dict(exact.state_dict())
        self.prepare_reading()

    def pack(self, packing_samples: bool) -> None:
        self.actor.packing_samples = packing_samples

    def written_classes(self) -> Any:
        return self._reader.classes
