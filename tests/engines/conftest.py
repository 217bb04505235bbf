"""Runs of whole frameworks, each of which `make engines` installs in an environment of its own."""

import os
from importlib.util import find_spec

# Helpers have no doctests, and some register themselves once.
HELPERS = {
    "areal": [],
    "openrlhf": ["openrlhf/cpu.py"],
    "roll": [],
    "sglang": [],
    "verl": ["verl/cpu.py", "verl/older.py", "verl/recorded.py", "verl/tiny.py"],
    "vllm": ["vllm/tiny.py"],
}
collect_ignore = ["maps.py"]
collect_ignore_glob = [
    pattern
    for framework, helpers in HELPERS.items()
    for pattern in (helpers if find_spec(framework) else [f"{framework}/*"])
]
if find_spec("vllm"):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
if find_spec("roll"):
    os.environ["ROLL_LOG_DIR"] = "out/roll"
