"""TRL needs Python 3.11; where it is not installed its tests can't be imported."""

from importlib.util import find_spec

collect_ignore = ["test_trl.py"] if find_spec("trl") is None else []
