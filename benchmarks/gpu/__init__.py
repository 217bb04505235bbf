"""Everything a machine with a GPU can tell about attnstats, in one command and under eight minutes: `make gpu`.

    python -m benchmarks.gpu [ceilings] [correctness] [timing] [end_to_end] [sweep]
                             [--minutes N] [--results FOLDER] [--smoke]

    ceilings      what the card can do: copy bandwidth, bf16 matmul, exp2; everything later is a share of these
    correctness   every kernel, dtype and feature against float64; bitwise repeats of every shipped configuration
                  beside other work; memory linear in T; compute-sanitizer where it is installed
    timing        attention with statistics against its rivals in the same run, T = 1k .. 128k and other shapes
    end_to_end    log-prob forwards of models with random weights; the paper's own workload is the headline
    sweep         tile sizes, warps and stages, for the configuration table, attnstats/configs.py

Without names all parts run, in this order; each may also run alone, and then has all the minutes. A part is a
process of its own, so that a fault in one leaves the others; what failed, ran out of memory or was left out for
lack of time is in the results by name. Results of one device are merged into one NAME.json, from which NAME.md and
NAME.png (with matplotlib: `pip install '.[bench]'`) are made. `--smoke` runs all of it with tiny shapes on a CPU,
kernels in Triton's interpreter: it proves the script, its figures mean nothing.
Exit status: 0; 1 if something is not correct; 2 if a part came to no end or nothing could run.

__main__.py starts the parts and writes; part.py is what a part is given, measure.py the clock, workers.py its helper
processes; floors.py and contenders.py know the workloads; report.py judges targets and draws.
"""
