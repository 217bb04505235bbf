"""Modules of a plug-in can't be collected for their doctests where its framework is not installed."""

from importlib.util import find_spec

MODULES = {
    "areal": ("areal",),
    "openrlhf": ("openrlhf",),
    "roll": ("roll_worker",),
    "verl": tuple(f"verl/{name}" for name in ("engine", "legacy", "plugin", "trainer", "ulysses", "workers")),
    "vllm": ("vllm/cpu", "vllm/cuda", "vllm/endpoint", "vllm/worker"),
}
collect_ignore = [
    f"attnstats/integrations/{name}.py"
    for framework, names in MODULES.items()
    if find_spec(framework) is None
    for name in names
]
