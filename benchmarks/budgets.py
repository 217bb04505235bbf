"""What the kernels may cost: budgets as data, each with how it is measured and, where it is missed, why.

A budget with a `bound` may be missed (it then must not get worse); one without may not. Called by compile_report.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    name: str
    limit: float
    source: str  # "binary": read from machine code; "modelled": computed from it by model.py
    measure: Callable[[Document], float]
    needs: tuple[str, ...] = ()  # names of cases
    tried: str = ""
    bound: str = ""  # why it is missed

    def applies(self, document: Document) -> bool:
        return all(name in document["binaries"] for name in self.needs)


BUDGETS: tuple[Budget, ...] = ()
