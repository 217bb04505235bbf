"""What recording costs a vLLM engine on a CPU: CPU time of prefill and of decoding with it and without, interleaved.

    OMP_NUM_THREADS=1 python -m benchmarks.vllm_engine MODEL [--rounds 5] [--prompt 512] [--tokens 64]

Both engines live in this process, whose CPU time is taken, so that other work on the machine does not count. As that
still varies more than recording costs, the time inside of the recorder is measured, too.
"""

from __future__ import annotations

import argparse
import os
import statistics as stats
import time
from typing import Any

import torch

BATCH = 8


class Clock:
    """The CPU time inside of some methods."""

    def __init__(self, cls: Any, names: tuple[str, ...]):
        self.seconds = 0.0
        for name in names:
            setattr(cls, name, self._timed(getattr(cls, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        return timed


def cpu_seconds(llm: Any, prompts: list[list[int]], tokens: int, clock: Clock) -> torch.Tensor:
    """In all, and in the recorder."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    started, clock.seconds = time.process_time(), 0.0
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return torch.tensor([time.process_time() - started, clock.seconds], dtype=torch.float64, device="cpu")


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
    from attnstats.integrations.vllm.recorder import Recorder

    clock = Clock(Recorder, ("begin", "_observe", "end"))
    common: dict[str, Any] = {
        "dtype": arguments.dtype,
        "enforce_eager": True,
        "max_model_len": length + tokens,
        "max_num_seqs": BATCH,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    kinds: dict[str, dict[str, Any]] = {
        "without": {},
        "WAAD and FAI, middle third, reduced": engine_arguments([WAAD(10), FAI(10, 100)]),
    }
    engines = {name: LLM(arguments.model, **common, **settings) for name, settings in kinds.items()}
    generator = torch.Generator("cpu").manual_seed(0)
    size = (BATCH, length)
    prompts = torch.randint(100, 1000, size, generator=generator, dtype=torch.int64, device="cpu").tolist()
    times: dict[str, list[torch.Tensor]] = {name: [] for name in engines}
    for _ in range(arguments.rounds + 1):  # the first one warms up
        for name, llm in engines.items():
            prefill = cpu_seconds(llm, prompts, 1, clock)
            times[name].append(torch.stack([prefill, cpu_seconds(llm, prompts, tokens, clock) - prefill]))
    print(f"{BATCH} requests of {length} tokens, {tokens} more each; {arguments.dtype}; medians of {arguments.rounds}")
    base = torch.stack(times["without"][1:]).median(0).values[:, 0]
    for name, measured in times.items():
        middle = torch.stack(measured[1:]).median(0).values
        for part, (whole, inside), of_base in zip(("prefill", "decode"), middle.tolist(), base.tolist(), strict=True):
            print(
                f"{name:40}{part:8} {whole:7.3f} s ({whole / of_base - 1:+.1%}), in the recorder {inside:6.4f} s "
                f"({inside / max(whole - inside, 1e-9):.2%})"
            )
    print(f"a step of decoding: {1e3 * base[1].item() / (tokens - 1):.1f} ms; spread of rounds", end=" ")
    print(f"{stats.pstdev(x[1, 0].item() for x in times['without'][1:]) / base[1].item():.1%}")


if __name__ == "__main__":
    main()
