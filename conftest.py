"""Modules of the verl plug-in can't be collected for their doctests where verl is not installed."""

from importlib.util import find_spec

MODULES = ("engine", "plugin", "trainer", "ulysses", "workers")
collect_ignore = [f"attnstats/integrations/verl/{name}.py" for name in MODULES] if find_spec("verl") is None else []
