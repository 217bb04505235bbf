"""Budgets of the kernels' cost as data, each with its measure and, where it is missed, the reason.

A budget with a `bound` may be missed, but must not get worse; one without may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]
HOPPER = "sm_90 D128 bfloat16 causal: "
BARE, PAPER = HOPPER + "attention", HOPPER + "attention + WAAD + FAI"
BARE_LOOP = "sm_90 D128 bfloat16 tiles of forward_loop: attention"  # the baseline of statistics in the loop
ENTROPY, MEAN_DISTANCE = HOPPER + "attention + Entropy", HOPPER + "attention + MeanDistance"
# Operations per second of the fastest attention on an H100, FlashAttention 3's: forward, D 128, causal, 16 bits (Shah
# et al., arXiv 2407.08608); at 32k that of 16k.
FASTEST = {2048: 521e12, 8192: 602e12, 32768: 616e12}
SEGMENTS, TOP = HOPPER + "attention + SegmentMass", HOPPER + "attention + TopKeys(1)"
COLUMN, BAND = HOPPER + "column Received", HOPPER + "band WAAD + FAI"


@dataclass(frozen=True)
class Budget:
    name: str
    limit: float
    source: str  # "binary": read from machine code; "modelled": computed from it by model.py
    measure: Callable[[Document], float]
    needs: tuple[str, ...] = ()  # names of cases; without one of them the budget is left out
    tried: str = ""
    bound: str = ""  # why it is missed

    def applies(self, document: Document) -> bool:
        return all(name in document["binaries"] for name in self.needs)


def _records(document: Document) -> Iterator[dict[str, Any]]:
    for launches in document["binaries"].values():
        yield from launches


def _main(document: Document, case: str) -> dict[str, Any]:
    """The main loop of a case's first launch, or the busiest where there is no main one."""
    loops = document["binaries"][case][0]["loops"]
    return min(loops, key=lambda loop: (loop["role"] != "main", -loop["macs"]))


def _threads(document: Document, case: str) -> int:
    return 32 * document["binaries"][case][0]["config"][2]


def _instructions(document: Document, case: str) -> int:
    counted = _main(document, case)["instructions"]
    return sum(n for name, n in counted.items() if name not in ("fma results", "ffma"))


def _of(document: Document, case: str, kind: str) -> float:
    """Instructions of a class per element."""
    loop = _main(document, case)
    return loop["instructions"][kind] * _threads(document, case) / loop["elements"]


def _longer(document: Document) -> float:
    bare, paper = _main(document, BARE), _main(document, PAPER)
    if bare["opcodes"] == paper["opcodes"]:
        return 0.0
    return _instructions(document, PAPER) / _instructions(document, BARE) - 1


def _other_units(document: Document) -> float:
    bare, paper = (_main(document, case)["instructions"] for case in (BARE, PAPER))
    return sum(abs(paper[kind] - bare[kind]) for kind in ("tensor", "mufu"))


def _more_ffma(case: str) -> Callable[[Document], float]:
    return lambda document: _of(document, case, "ffma") - _of(document, BARE_LOOP, "ffma")


def _time(document: Document, case: str, length: int, part: str = "total") -> float:
    kernel = document["binaries"][case][0]["kernel"]
    return document["modelled"][f"{case} / {kernel} / T {length}"][part]


def _beside(length: int) -> Callable[[Document], float]:
    """The band's modelled time over the published one of attention."""
    seconds = 4 * length**2 / 2 * 128 * 32 / FASTEST[length]
    return lambda document: _time(document, BAND, length) / (1e6 * seconds)


def _more_time(case: str, length: int) -> Callable[[Document], float]:
    return lambda document: _time(document, case, length) / _time(document, BARE, length) - 1


def _over_floor(length: int) -> Callable[[Document], float]:
    return lambda document: _time(document, BAND, length) / _time(document, BAND, length, "floor")


def _rereads(document: Document) -> float:
    """The number of reads of a group's key tile: its four query heads divided by those packed into a tile."""
    return 4 / document["binaries"][BAND][0]["shape"]["HEADS"]


_BAND_TRIED = (
    "Modelled at 8192: tiles of 256 packed rows with 8 warps 74 to 79 us, of 128 with 4 warps 66 to 70, of 64 with 4 "
    "warps 68 to 76, with 8 warps 86 to 109; one stage is faster than two."
)
_BAND_BOUND = (
    "A program has three or four tiles of keys, in which scores, exp2 and sums wait for one another, and one or two "
    "programs fit a multiprocessor for their registers: the schedulers issue in 40 to 60 % of the clocks. Two thirds "
    "of a program's time are outside its loops: loads, the first tiles, and the sums of rows and columns at the end."
)
_SPILLS_TRIED = (
    "Tiles of every shape down to 16 x 16, 4 and 8 warps, 1 to 3 stages. Offsets within a tile in 32 bits spare 10 "
    "registers, descriptors 10 to 40, row indices that are computed anew after a loop (tiles.anew) 10 to 20."
)
_SPILLS_BOUND = (
    "a few tens of bytes: indices that are stored before a loop and read after it, or a few times per tile. The next "
    "smaller tile takes a quarter more instructions per score, or several times as many where the tensor cores don't "
    "take it whole."
)
BUDGETS: tuple[Budget, ...] = (
    Budget(
        "sm_90, D = 128, bf16: spilled bytes and instructions on local memory",
        0,
        "binary",
        lambda d: sum(
            r["spilled_bytes"] + r["local"]
            for name, launches in d["binaries"].items()
            if name.startswith(HOPPER.partition(" causal")[0])
            for r in launches
        ),
        tried=_SPILLS_TRIED,
        bound="The band of packed sequences, and with Triton 3.6 some more: " + _SPILLS_BOUND,
    ),
    *(
        Budget(
            f"all configurations: {what}",
            0,
            "binary",
            lambda d, field=field: sum(r[field] for r in _records(d)),  # type: ignore[misc]
            tried=_SPILLS_TRIED,
            bound="float32 at head size 256 above all: the IEEE matmul has no tensor core, and Triton keeps both "
            "operands of a tile in registers. In 16 bits " + _SPILLS_BOUND,
        )
        for what, field in (("spilled bytes", "spilled_bytes"), ("instructions on local memory", "local"))
    ),
    Budget("TF32 and atomic instructions", 0, "binary", lambda d: sum(len(r["forbidden"]) for r in _records(d))),
    Budget(
        "configurations that don't fit a multiprocessor",
        0,
        "binary",
        lambda d: sum(not r["resident"] for r in _records(d)),
    ),
    Budget(
        "sm_90: loops whose matmuls the assembler serialised",
        0,
        "binary",
        lambda d: sum(loop["serialised"] for r in _records(d) for loop in r["loops"]),
        tried="A loop that may run zero times joins its exit with the matmul of P V still in flight, and ptxas then "
        "waits after each one (C7515). Guarding the loop with `if first < last` removes that path. A single stage for "
        "the pass over keys before dQ's changes nothing.",
        bound="With Triton 3.6 alone, whose ptxas 12.8 says the same of `backward_queries` with gradients of "
        "statistics from head size 128 on, and serialises its three loops; that of 3.9 doesn't.",
    ),
    Budget(
        "forward, main loop with WAAD + FAI: instructions more than without",
        0.01,
        "binary",
        _longer,
        (BARE, PAPER),
        tried="The band stands in an epilogue; the loops then differ by what the register allocator moves.",
    ),
    Budget(
        "forward, main loop with WAAD + FAI: tensor and MUFU more than without",
        0,
        "binary",
        _other_units,
        (BARE, PAPER),
    ),
    *(
        Budget(
            f"forward, {name}: FFMA per element more than attention alone",
            1.0,
            "binary",
            _more_ffma(case),
            (case, BARE_LOOP),
            tried="tl.sum(a * x) takes 1.5 instructions per element (pairs: FMUL, FFMA, FADD), an integer distance 5. "
            "Chains over chunks of 8 columns take one; rescaling the chunks' sums is 4 per thread and tile: 0.06 at "
            "BN = 128.",
            bound="1 per element and the 0.06 that rescale the sums when the maximum moves, once per tile.",
        )
        for name, case in (("Entropy", ENTROPY), ("MeanDistance", MEAN_DISTANCE))
    ),
    *(
        Budget(
            f"forward, {name}: modelled time more than attention alone at {length}",
            0.10,
            "modelled",
            _more_time(case, length),
            (case, BARE),
            tried=tried,
        )
        for name, case, tried in (
            ("8 segments", SEGMENTS, "Sums by segment of a tile's columns take 2 instructions per score and segment."),
            (
                "TopKeys(1)",
                TOP,
                "tl.max(return_indices=True) takes an instruction per score less, but in one chain: 0.085 at 8192.",
            ),
        )
        for length in (2048, 8192)
    ),
    Budget(
        "column, main loop: instructions per element",
        5.2,
        "binary",
        lambda d: _main(d, COLUMN)["per_element"],
        (COLUMN,),
        tried="A = Q K^T accumulated elementwise needs two lse per thread, its transpose 32: 5.27 to 5.06. K^T made "
        "before the loop, not stored to shared memory in each iteration: 4.80. Nearer tiles accumulated as well, which "
        "frees registers: 4.48. TMA descriptors: 4.06. "
        "warp_specialize: no effect with 8 warps, a compiler crash with 4 (Triton 3.9).",
    ),
    Budget(
        "column, main loop: MUFU per element",
        1,
        "binary",
        lambda d: _of(d, COLUMN, "mufu"),
        (COLUMN,),
        tried="Every fourth exp2 as a polynomial of degree 5 in inline PTX, exact to 1.6e-7. At D = 64 MUFU falls from "
        "8.0 to 6.0 cycles per 32 elements and issue rises from 4.3 to 6.8. Not kept: neither the interpreter nor AMD "
        "runs PTX, so no test without a GPU could tell that it is right.",
    ),
    Budget("column, main loop: shuffles", 0, "binary", lambda d: _of(d, COLUMN, "shuffle"), (COLUMN,)),
    Budget("band: reads of a key tile per GQA group", 1, "binary", _rereads, (BAND,)),
    *(
        Budget(name, limit, "modelled", measure, (BAND,), tried=_BAND_TRIED, bound=_BAND_BOUND)
        for length, share in ((8192, 0.05), (32768, 0.013))
        for name, limit, measure in (
            (f"band: modelled time over the HBM floor at {length}", 1.4, _over_floor(length)),
            (
                f"band WAAD + FAI: modelled time over FlashAttention 3's published one at {length}",
                share,
                _beside(length),
            ),
        )
    ),
)
