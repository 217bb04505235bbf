"""Attention with WAAD(10) and FAI(10, 100) against its rivals on the CPU: the cases of `make bench`.

Every round is a benchmark of its own, so that contenders take turns: a case's rounds run through all contenders, each
time starting with another one, and report.py compares times of the same round. Before its first round a contender's
answer is compared with attnstats.reference in float64.
"""

from __future__ import annotations

import functools

import pytest
import torch
from _pytest.mark import ParameterSet
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from attnstats import reference
from benchmarks.contenders import CASES, CONTENDERS, STATISTICS, Answer, Case, contenders
from benchmarks.memory import peaks
from benchmarks.summary import in_turn

ROUNDS = {1024: 15, 2048: 9, 4096: 7}
# Absolute, by dtype: output, WAAD, FAI. About three times the worst error of eager; in bfloat16 of ours, whose
# statistics inherit the 1e-4 by which torch's kernel rounds the lse.
TOLERANCES = {torch.float32: (5e-6, 3e-5, 1e-7), torch.bfloat16: (2e-2, 2e-3, 2e-6)}


def turns() -> list[ParameterSet]:
    """(case, round, contender) in the order they run."""
    order = []
    for case in CASES:
        names = contenders(case)
        for turn in range(ROUNDS[case.length]):
            for name in in_turn(names, turn):
                order.append(pytest.param(case, turn, name, id=f"{case}-{turn}-{name}"))
    return order


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.inputs()


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> Answer:
    """By the reference in float64, a head at a time for the sake of memory."""
    query, key, value = (x.double() for x in inputs_of(case))
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        q, kv = slice(head, head + 1), slice(head // group, head // group + 1)
        output, stats = reference.attention(query[:, q], key[:, kv], value[:, kv], statistics=STATISTICS)
        heads.append((output, stats["waad"], stats["fai"]))
    return Answer(*(torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)))


def verify(answer: Answer, case: Case) -> None:
    for name, tolerance in zip(("output", "waad", "fai"), TOLERANCES[case.dtype], strict=True):
        found = getattr(answer, name)
        if found is not None:
            error = (found.double() - getattr(truth(case), name)).abs().max().item()
            assert error <= tolerance, f"{name} is wrong by {error:.2g}, more than {tolerance:.2g}"


@pytest.mark.parametrize(("case", "turn", "name"), turns())
def test_attention(benchmark: BenchmarkFixture, case: Case, turn: int, name: str) -> None:
    contender = CONTENDERS[name]
    inputs = inputs_of(case)
    peak = peaks(name)[str(case)]
    with torch.no_grad():
        if turn == 0:
            verify(contender(*inputs), case)
        benchmark.pedantic(contender, args=inputs, rounds=1, iterations=1)
    benchmark.extra_info.update(
        contender=name, length=case.length, layout=case.layout, dtype=case.dtype_name, turn=turn, peak_mib=peak
    )
