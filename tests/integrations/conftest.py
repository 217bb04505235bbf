"""TRL needs Python 3.11, and verl an environment of its own; without one its tests can't be imported."""

from importlib.util import find_spec

NEEDS = {"test_trl.py": "trl", "test_verl_engine.py": "verl"}
collect_ignore = [test for test, framework in NEEDS.items() if find_spec(framework) is None]
