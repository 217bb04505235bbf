"""What recording costs a vLLM engine on a CPU: CPU time of prefill and of decoding with it and without, interleaved.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm_engine MODEL [--rounds 5] [--prompt 512] [--tokens 64]

Both engines live in this process, whose CPU time is taken, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics as stats
import time
from typing import Any

import torch

BATCH = 8


def cpu_seconds(llm: Any, prompts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    started = time.process_time()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    length, tokens = arguments.prompt, arguments.tokens
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    from attnstats import FAI, WAAD
    from attnstats.integrations.vllm import engine_arguments

    common: dict[str, Any] = {
        "dtype": arguments.dtype,
        "enforce_eager": True,
        "max_model_len": length + tokens,
        "max_num_seqs": BATCH,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    kinds = {
        "without": {},
        "WAAD and FAI, middle third, reduced": engine_arguments([WAAD(10), FAI(10, 100)]),
    }
    engines = {name: LLM(arguments.model, **common, **settings) for name, settings in kinds.items()}
    generator = torch.Generator("cpu").manual_seed(0)
    size = (BATCH, length)
    prompts = torch.randint(100, 1000, size, generator=generator, dtype=torch.int64, device="cpu").tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(arguments.rounds + 1):  # the first one warms up
        for name, llm in engines.items():
            prefill = cpu_seconds(llm, prompts, 1)
            times[name].append((prefill, cpu_seconds(llm, prompts, tokens) - prefill))
    print(f"{BATCH} requests of {length} tokens, {tokens} more each; {arguments.dtype}; medians of {arguments.rounds}")
    base = [stats.median(part) for part in zip(*times["without"][1:], strict=True)]
    for name, measured in times.items():
        prefill, decode = (stats.median(part) for part in zip(*measured[1:], strict=True))
        print(
            f"{name:40}prefill {prefill:6.2f} s ({prefill / base[0] - 1:+.1%})   decode "
            f"{1e3 * decode / (tokens - 1):6.1f} ms a step ({decode / base[1] - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
