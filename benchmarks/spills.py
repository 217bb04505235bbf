"""Which candidates of the GPU sweep compile without spills: `python -m benchmarks.spills`, without a GPU.

Writes results/candidates.json: by target and job of benchmarks/gpu/sweep.py the spilled bytes and the shared memory of
each candidate. The sweep then has minutes for those alone that can win. Candidates that are in the file already are
not compiled again; `--anew` forgets them, which is due when kernels change.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
from typing import Any

from attnstats.triton.configs import Config, configured
from benchmarks.compile_report import Case, compiled_case
from benchmarks.gpu import sweep

# The request of benchmarks/compile_report.py that launches a job's kernel, by kernel and statistics.
REQUESTS = {
    ("forward", "waad+fai"): "attention + WAAD + FAI",
    ("forward", "no statistics"): "attention",
    ("forward_loop", "mean_distance+entropy+max_logit"): "attention + Entropy + MeanDistance + MaxLogit",
    ("column", "received"): "column Received",
    ("band", "waad+fai"): "band WAAD + FAI",
}


def compiled(target: str, request: str, job: sweep.Job, config: Config) -> dict[str, int]:
    """Spilled bytes and shared memory of the job's kernel."""
    case = Case(target, job.head_dim, "float16" if target.startswith("gfx") else "bfloat16", request)
    with configured(job.kernel, config):
        launches = compiled_case(case)
    launch = next(launch for launch in launches if launch["kernel"] == job.kernel.removesuffix("_loop"))
    return {"spilled": launch["spilled_bytes"], "shared": launch["shared_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--anew", action="store_true", help="compile what is in the file already, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    arguments = parser.parse_args()
    document = sweep.record()
    by_job: dict[str, dict[str, Any]] = document.setdefault(arguments.target, {})
    waiting = {}
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        for job in sweep.jobs(smoke=False):
            request = REQUESTS.get((job.kernel, job.asked))
            if request is None or arguments.only not in job.name:
                continue
            known = by_job.setdefault(job.name, {})
            if arguments.anew:
                known.clear()
            for config in sweep.candidates(job, smoke=False):
                if sweep.text_of(config) not in known:
                    waiting[pool.submit(compiled, arguments.target, request, job, config)] = known, config
        for done in concurrent.futures.as_completed(waiting):
            known, config = waiting[done]
            known[sweep.text_of(config)] = done.result()
            sweep.CANDIDATES.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
