"""All measurements of attnstats on a machine with a GPU, in two commands: docs/gpu.md.

    python -m benchmarks.gpu first --results FOLDER --minutes 2
    python -m benchmarks.gpu [ceilings] [correctness] [timing] [end_to_end] [sweep]
                             [--minutes N] [--results FOLDER] [--smoke]

    first         what a new card needs to show first, in two minutes: a few cases of each of the others and the
                  kernels' hardware counters, written down step by step
    ceilings      measured rates of the card: copy bandwidth, bf16 matmul, exp2; later results are shares of these
    correctness   every kernel, dtype and feature against float64; bitwise repeats of every shipped configuration
                  beside other work; memory linear in T; compute-sanitizer where it is installed
    timing        attention with statistics against its rivals in the same run, T = 1k .. 128k and other shapes
    end_to_end    log-prob forwards of models with random weights; the paper's own workload is the headline
    sweep         tile sizes, warps and stages, for the configuration table, attnstats/triton/configs.py

Without names all parts but the first run, in this order and within six minutes; a part may also run alone, and then
has all the minutes. Each part is a process of its own, so that a fault in one doesn't reach the others; whatever
failed, ran out of memory or was left out for lack of time is named in the results. Results of one device are merged
into one NAME.json, from which NAME.md and NAME.png (with matplotlib: `pip install '.[bench]'`) are made. `--smoke`
runs all parts with tiny shapes on a CPU and the kernels in Triton's interpreter: this tests the script, its figures
mean nothing.
Exit status: 0; 1 if something is not correct; 2 if a part didn't finish or nothing could run.

__main__.py starts the parts and writes the results; part.py holds a part's device, time and section, measure.py the
clock, workers.py helper processes, floors.py and contenders.py the workloads, counters.py Nsight Compute; report.py
judges targets and draws.
"""
