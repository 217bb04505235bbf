"""attnstats against the other ways to get the same numbers: `make bench`. Not part of the package.

contenders.py holds the rivals and the cases, test_attention.py times them in turns, memory.py weighs them,
report.py makes the table; whole_model.py does the same for a model that reads and generates. The smoke test is
tests/test_benchmarks.py. For a machine with a GPU: gpu/, docs/gpu.md.
"""
