"""Every kernel as it would be launched, compiled for GPUs that aren't here: it builds, and spills nothing."""

import subprocess
import sys

import pytest

SCRIPT = """
import re
import torch
from attnstats import *
from attnstats import ops
from attnstats.arguments import resolve
from benchmarks.aot import compiled, recorded, resources

ASKED = {
    "bare": (),
    "paper": (WAAD(10), FAI(10, 100)),
    "rows": (MeanDistance(), Entropy(), MaxLogit()),
    "columns": (Received(),),
    "all": (WAAD(10), FAI(10, 100), MeanDistance(), Entropy(), MaxLogit(), Received(), FAI(0, None), PooledMap(8, 8)),
}

def launches(dim, dtype, asked, causal=True, padded=False):
    query, key = torch.empty(2, 8, 512, dim, dtype=dtype), torch.empty(2, 2, 512, dim, dtype=dtype)
    mask = torch.ones(2, 512, dtype=torch.bool) if padded else None
    geometry = resolve(query, key, key, asked, is_causal=causal, enable_gqa=True, key_padding_mask=mask)
    with recorded() as found:
        ops.attend(query, key, key, geometry, asked)
        ops.from_lse(query, key, torch.zeros(2, 8, 512), geometry, tuple(s for s in asked if s.name != "max_logit"))
    return found

for name, asked in ASKED.items():
    for launch in launches(DIM, torch.DTYPE, asked, **OPTIONS):
        kernel = compiled(launch, "TARGET")
        text = kernel.asm.get("ptx", "")
        assert not re.search(r"tf32|\\batom\\.|\\bred\\.", text), (name, launch.kernel)
        if "TARGET".startswith("sm_"):
            used = resources(kernel)
            print("TARGET", DIM, "DTYPE", name, launch.kernel.__name__, *used)
            assert used.spilled_bytes == 0, (name, launch.kernel, used)
"""

BUILDS = [
    ("sm_90", 128, "bfloat16", {}),
    ("sm_90", 64, "bfloat16", {"padded": True}),
    ("sm_90", 256, "float16", {"causal": False}),
    ("sm_90", 64, "float32", {}),
    ("sm_80", 128, "bfloat16", {}),
    ("sm_100", 128, "bfloat16", {}),
    ("gfx942", 128, "float16", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dim", "dtype", "options"), BUILDS, ids=str)
def test_compiles_without_spills_atomics_or_tf32(target, dim, dtype, options, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # Triton reads it when imported: in a process of its own
    script = SCRIPT.replace("TARGET", target).replace("DTYPE", dtype).replace("DIM", str(dim))
    script = script.replace("OPTIONS", repr(options))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Sm90:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Sm90())
from attnstats import *
from attnstats import ops
from attnstats.arguments import resolve

def warm_up(kernel, grid, tensors, sizes, strides, constants, config):
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel.run(*tensors, *sizes, *strides, grid=grid, warmup=True, **constants, **options)
    print(kernel.__name__)

ops._launch = warm_up
asked = (WAAD(10), FAI(10, 100), Received(), Entropy())
query = torch.empty(1, 8, 512, 128, dtype=torch.bfloat16)
geometry = resolve(query, query, query, asked)
ops.attend(query, query, query, geometry, asked)
ops.from_lse(query, query, torch.zeros(1, 8, 512), geometry, asked)
"""


def test_tritons_launcher_takes_the_arguments(monkeypatch):
    """Up to the launch itself: binding, specialisation and cache key of tuples of strides and of functions."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["forward", "column", "band", "forward", "column"], run.stderr[-1500:]
