"""Countdown: reach a target with three numbers, each used once, and + - *. Puzzles, the verifier, a small model.

A puzzle reads `2 5 9>63:`. An answer tries one way after another and then names the one that worked:
`2*5=10,10+9=19;2+5=7,7*9=63!(2+5)*9`. Only the text after the `!` is judged, by a parser of its own that evaluates only
numbers, brackets and the three signs.
"""

from __future__ import annotations

import ast
import itertools
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIGNS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NODES: dict[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
CHARACTERS = "0123456789+-*=,;!()> :"
LARGEST = 99  # of targets and of every number on the way


class Puzzle(NamedTuple):
    """Three numbers and the target; `before` is text before them in the prompt."""

    numbers: tuple[int, ...]
    target: int
    before: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.before}{' '.join(map(str, self.numbers))}>{self.target}:"


# Text before a puzzle for a language model that was not trained on the task.
EXAMPLES = "2 5 4>28:2*5=10,10+4=14;2+5=7,7*4=28!(2+5)*4\n6 1 3>9:6*1=6,6+3=9!6*1+3\n5 2 2>8:5*2=10,10-2=8!5*2-2\n"


class Way(NamedTuple):
    """A value, the steps that lead to it, and one expression for it."""

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


def puzzles(count: int, seed: int, largest: int = 6) -> list[Puzzle]:
    """`count` different puzzles with a solution, of numbers up to `largest`. Raises ValueError if there are fewer."""
    draw = random.Random(seed)
    found = []
    for numbers in itertools.combinations_with_replacement(range(1, largest + 1), 3):
        for target in sorted({way.value for way in ways(numbers)}):
            found.append(Puzzle(tuple(draw.sample(numbers, 3)), target))
    if count > len(found):
        raise ValueError(f"count: there are {len(found)} puzzles of numbers up to {largest}, got {count}")
    return draw.sample(found, count)


def worked_answer(puzzle: Puzzle, draw: random.Random, spoilt: float = 0.5) -> str:
    """A right answer, in half of the cases after a failed try, and in a share `spoilt` of them with a bad habit.

    The habit is to write the value after the expression, which makes it invalid and earns no reward: rewards can teach
    the model to drop it, and to work with more care.
    """
    all_ways = list(ways(puzzle.numbers))
    tried = [draw.choice([way for way in all_ways if way.value == puzzle.target])]
    if draw.random() < 0.5:
        tried.insert(0, draw.choice(all_ways))
    habit = f"={tried[-1].value}" if draw.random() < spoilt else ""
    return ";".join(way.steps for way in tried) + f"!{tried[-1].expression}{habit}"


def solves(puzzle: Puzzle, answer: str) -> bool:
    """True if the text after the first `!` of the first line uses the three numbers once each and gives the target."""
    _, mark, expression = answer.partition("\n")[0].partition("!")
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


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def warm_up(tokenizer: PreTrainedTokenizerFast, training: list[Puzzle], steps: int) -> LlamaForCausalLM:
    """Supervised training on worked answers."""
    torch.manual_seed(0)
    draw = random.Random(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **sizes)
    for name, value in special.items():
        setattr(config, name, value)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        chosen = draw.choices(training, k=32)
        texts = [puzzle.prompt + worked_answer(puzzle, draw) + "<end>" for puzzle in chosen]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, puzzle in zip(labels, chosen, strict=True):
            row[: len(puzzle.prompt)] = -100
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"warm-up {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    return model
