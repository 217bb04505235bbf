"""The wire format of a traced call: `Options` as the values of an operator's schema, and back.

A schema holds no objects, so statistics and heads travel as JSON: `[["waad", 10], ["fai", 10, 100]]`. A class from
outside the catalogue is named by its key in `statistics.DEFINED`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from torch import Tensor

from attnstats.core.options import Heads, Options, Window
from attnstats.statistics import CATALOGUE, DEFINED, Statistic, resolve

_TYPES: dict[Any, str] = {
    Tensor | None: "Tensor?",
    int | None: "SymInt?",
    Window | None: "SymInt[]?",
    float | None: "float?",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
    Iterable[Statistic | str]: "str",
    Heads | None: "str",
}
_KINDS = {name: _TYPES[kind] for name, kind in get_type_hints(Options).items()}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _KINDS.items())
TENSORS = tuple(name for name, kind in _KINDS.items() if kind == "Tensor?")


def encode(options: Any) -> tuple[Any, ...]:
    """The values of SCHEMA. Statistics must be resolved; raises TypeError for settings that JSON can't hold."""
    window_size = options.window_size
    return tuple(
        options._replace(
            statistics=encode_statistics(options.statistics),
            heads=_encode_heads(options.heads),
            window_size=None if window_size is None else [-1 if side is None else side for side in window_size],
            is_causal=bool(options.is_causal),
            enable_gqa=bool(options.enable_gqa),
            check=bool(options.check),
            scale=None if options.scale is None else float(options.scale),
            softcap=None if options.softcap is None else float(options.softcap),
            dropout_p=float(options.dropout_p),
        )
    )


def decode(values: Sequence[Any]) -> Options:
    """The options, from the values of SCHEMA."""
    options: Any = Options(*values)
    return options._replace(
        statistics=decode_statistics(options.statistics),
        heads=_decode_heads(options.heads),
        window_size=None if options.window_size is None else tuple(options.window_size),
    )


def raise_refusal(options: Options) -> None:
    """Raise the error of the call that was traced, if it has one."""
    if options.refusal:
        kind, _, message = options.refusal.partition(": ")
        raise {"TypeError": TypeError}.get(kind, ValueError)(message)


def encode_statistics(statistics: Iterable[Any]) -> str:
    """[["waad", 10], ...]: a name of the catalogue, or the key of a class from elsewhere, and its settings."""
    return "[" + ", ".join([_encode_statistic(s) for s in statistics]) + "]"


def _encode_statistic(s: Statistic) -> str:
    kind = type(s)
    name = s.name if CATALOGUE.get(s.name) is kind else kind.key
    settings = [_text(getattr(s, field.name), kind) for field in dataclasses.fields(s) if field.init]
    return "[" + ", ".join([f'"{name}"', *settings]) + "]"


def _encode_heads(heads: Heads | None) -> str:
    """A list of heads, or [[name or statistic, list of heads], ...]."""
    if not isinstance(heads, Mapping):
        return _text(heads, None)
    pairs = [
        f"[{_encode_statistic(s) if isinstance(s, Statistic) else _text(s, None)}, {_text(of_s, None)}]"
        for s, of_s in heads.items()
    ]
    return "{" + f'"by": [{", ".join(pairs)}]' + "}"


def _text(value: Any, owner: type | None) -> str:
    """JSON, written by hand because json can't be traced."""
    if value is None:
        return "null"
    if isinstance(value, Statistic):
        return _encode_statistic(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"{value}"
    if isinstance(value, str) and '"' not in value and "\\" not in value and value.isprintable():
        return f'"{value}"'
    if isinstance(value, (list, tuple, range)):
        return "[" + ", ".join([_text(item, owner) for item in value]) + "]"
    what = "heads" if owner is None else f"statistics: {owner.__name__}"
    raise TypeError(f"{what} in a compiled graph must consist of numbers, strings and tuples of them, got {value!r}")


@functools.lru_cache(maxsize=256)
def decode_statistics(text: Any) -> tuple[Statistic, ...]:
    """The statistics that `encode_statistics` wrote."""
    return resolve(tuple(_decode_statistic(item) for item in json.loads(text)))


def _decode_statistic(item: list[Any]) -> Statistic:
    name, *settings = item
    kind = CATALOGUE.get(name) or DEFINED.get(name)
    if kind is None:
        raise ValueError(f"statistics: the graph asks for {name}, which nothing in this process defines; import it")
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return kind(**dict(zip(names, map(_tuples, settings), strict=True)))


@functools.lru_cache(maxsize=256)
def _decode_heads(text: str) -> Any:
    heads = json.loads(text)
    if not isinstance(heads, dict):
        return _tuples(heads)
    return {(_decode_statistic(s) if isinstance(s, list) else s): _tuples(of_s) for s, of_s in heads["by"]}


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return _decode_statistic(value) if value and isinstance(value[0], str) else tuple(map(_tuples, value))
