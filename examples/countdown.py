"""Countdown: reach a target with three numbers, each used once, and + - *. Puzzles, worked solutions, the verifier.

A puzzle reads `2 5 9>63:`. An answer tries one way after another and then names the one that worked:
`2*5=10,10+9=19;2+5=7,7*9=63!(2+5)*9`. Only what follows the `!` is judged, by a parser of its own: nothing is evaluated
that is not a number, a bracket or one of the three signs. Used by countdown_grpo.py.
"""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

SIGNS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NODES: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
CHARACTERS = "0123456789+-*=,;!()> :"
LARGEST = 99  # of targets and of every number on the way


class Puzzle(NamedTuple):
    """Three numbers and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}>{self.target}:"


class Way(NamedTuple):
    """A value, how it is reached step by step, and as one expression."""

    value: int
    steps: str
    expression: str


def ways(numbers: tuple[int, ...]) -> Iterator[Way]:
    """Every way to join three numbers in two steps without leaving 0..LARGEST."""
    for i, j in ((i, j) for i in range(3) for j in range(3) if i != j):
        a, b, c = numbers[i], numbers[j], numbers[3 - i - j]
        for sign in SIGNS:
            first = SIGNS[sign](a, b)
            if (sign != "-" and i > j) or not 0 <= first <= LARGEST:
                continue
            inner = f"{a}{sign}{b}" if sign == "*" else f"({a}{sign}{b})"
            for other in SIGNS:
                for left, right, text in ((first, c, f"{inner}{other}{c}"), (c, first, f"{c}{other}{inner}")):
                    value = SIGNS[other](left, right)
                    if (other == "-" or left == first) and 0 <= value <= LARGEST:
                        yield Way(value, f"{a}{sign}{b}={first},{left}{other}{right}={value}", text)


def puzzles(count: int, seed: int, largest_number: int = 9) -> list[Puzzle]:
    """`count` different solvable puzzles."""
    draw = random.Random(seed)
    found: dict[tuple[tuple[int, ...], int], Puzzle] = {}
    while len(found) < count:
        numbers = tuple(draw.randint(1, largest_number) for _ in range(3))
        target = draw.choice(list(ways(numbers))).value
        found.setdefault((tuple(sorted(numbers)), target), Puzzle(numbers, target))
    return list(found.values())


def worked_solution(puzzle: Puzzle, draw: random.Random, most_failures: int = 2) -> str:
    """An answer as a person would write it: some ways that fail, then one that does not."""
    all_ways = list(ways(puzzle.numbers))
    good = draw.choice([way for way in all_ways if way.value == puzzle.target])
    bad = [way for way in all_ways if way.value != puzzle.target]
    tried = draw.sample(bad, min(len(bad), draw.randint(0, most_failures)))
    return ";".join(way.steps for way in (*tried, good)) + f"!{good.expression}"


def solves(puzzle: Puzzle, answer: str) -> bool:
    """Whether what follows the first `!` uses the three numbers once each and gives the target."""
    _, mark, expression = answer.partition("!")
    if not mark or not expression or len(expression) > 24 or not set(expression) <= set("0123456789+-*()"):
        return False
    try:
        tree = ast.parse(expression, mode="eval").body
        used: list[int] = []
        return _value(tree, used) == puzzle.target and Counter(used) == Counter(puzzle.numbers)
    except (SyntaxError, ValueError):
        return False


def _value(node: ast.expr, used: list[int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in NODES:
        return SIGNS[NODES[type(node.op)]](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"not a sum, difference or product of numbers: {ast.unparse(node)}")
