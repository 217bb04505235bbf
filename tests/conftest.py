"""Where kernels run in the tests, and how hypothesis draws."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch import distributed
from torch._C._distributed_c10d import HashStore

# Before anything imports Triton: without a GPU the kernels are run by its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("attnstats", deadline=None, print_blob=True)
settings.load_profile("attnstats")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # parallel workers share the cores
        torch.set_num_threads(1)


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return f"kernels run on: {where}; torch {torch.__version__}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton backend gets its tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def where(backend: str, device: torch.device) -> torch.device:
    """Where a test of several backends puts its tensors: only Triton's go to the GPU."""
    return device if backend == "triton" else torch.device("cpu")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
