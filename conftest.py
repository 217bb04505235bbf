"""Modules of a plug-in can't be collected for their doctests where its framework is not installed."""

from importlib.util import find_spec

MODULES = {"verl": ("engine", "legacy", "plugin", "trainer", "ulysses", "workers"), "vllm": ("cpu", "worker")}
collect_ignore = [
    f"attnstats/integrations/{framework}/{name}.py"
    for framework, names in MODULES.items()
    if find_spec(framework) is None
    for name in names
]
