"""Runs of whole frameworks, which `make engines` installs in an environment of their own."""

from importlib.util import find_spec

HELPERS = ["verl/cpu.py", "verl/recorded.py", "verl/tiny.py"]  # have no doctests, and register themselves once
collect_ignore_glob = ["verl/*"] if find_spec("verl") is None else HELPERS
