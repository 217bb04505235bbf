"""The time of token credit: `python -m benchmarks.credit` prints milliseconds per call, of every credit and shape.

Batches are left-padded and as large as a training step's; the target is 50 ms for 64 x 8192 on the CPU. Runs on a GPU
too where there is one. Printed are the least and the median time of the calls, and the processor time of all threads,
to which other programs on the machine don't add.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attnstats import credit
from benchmarks.summary import table

SHAPES = ((64, 1024), (64, 8192), (512, 2048))


def credits(rows: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every credit on a batch of random curves, by name."""
    generator = torch.Generator(device).manual_seed(0)
    waad, fai, entropy = torch.rand(3, rows, tokens, generator=generator, device=device).to(dtype)
    padding = torch.randint(0, tokens // 2, (rows, 1), generator=generator, device=device)
    place = torch.arange(tokens, device=device)
    mask = place >= padding
    valid = mask & (place < tokens - 10)
    return {
        "local_chunk": lambda: credit.local_chunk(waad, mask),
        "global_anchor": lambda: credit.global_anchor(fai, mask, valid=valid),
        "coupled_rhythm": lambda: credit.coupled_rhythm(waad, fai, mask, valid=valid),
        "coupled_rhythm, mean kept": lambda: credit.coupled_rhythm(waad, fai, mask, valid=valid, keep_mean=True),
        "random_tokens": lambda: credit.random_tokens(mask),
        "high_entropy": lambda: credit.high_entropy(entropy, mask),
        "high_entropy_selection": lambda: credit.high_entropy_selection(entropy, mask),
    }


def cell(call: Callable[[], Tensor], device: str, repeats: int) -> str:
    """`least (median) / processor`, in milliseconds."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    walls, processors = [], []
    for _ in range(repeats):
        wait()
        wall, processor = time.perf_counter(), time.process_time()
        call()
        wait()
        walls.append(1e3 * (time.perf_counter() - wall))
        processors.append(1e3 * (time.process_time() - processor))
    return f"{min(walls):.1f} ({statistics.median(walls):.1f}) / {statistics.median(processors):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What token credit costs.")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: 2)")
    parser.add_argument("--repeats", type=int, default=20, help="calls that are timed (default: 20)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(
        f"torch {torch.__version__}, {options.threads} CPU threads, {options.dtype}; ms: least (median) / processor\n"
    )
    for device in devices:
        names = list(credits(1, 2, device, torch.float32))
        columns = []
        for rows, tokens in SHAPES:
            calls = credits(rows, tokens, device, getattr(torch, options.dtype))
            columns.append([cell(calls[name], device, options.repeats) for name in names])
        header = [device, *(f"{rows} x {tokens}" for rows, tokens in SHAPES)]
        print(*table(header, zip(names, *columns, strict=True)), "", sep="\n")


if __name__ == "__main__":
    main()
