"""What a plug-in overrides or reads in a framework, looked up when it is loaded: a version that moved it is refused."""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple


class Hook(NamedTuple):
    """A method that a plug-in overrides or calls, and the parameters that it must have."""

    module: str
    cls: str
    method: str
    parameters: tuple[str, ...] = ()

    def fault(self) -> str | None:
        """What is not as the plug-in needs it; None: nothing."""
        where = f"{self.module}.{self.cls}"
        try:
            cls = getattr(importlib.import_module(self.module), self.cls)
        except (ImportError, AttributeError) as error:
            return f"{where} can't be imported ({error})"
        if not hasattr(cls, self.method):
            return f"{where} has no {self.method}"
        if self.parameters:
            method = getattr(cls, self.method)
            actual = tuple(inspect.signature(method).parameters)[0 if inspect.ismethod(method) else 1 :]
            if actual[: len(self.parameters)] != self.parameters:
                return f"{where}.{self.method} takes ({', '.join(actual)}), not ({', '.join(self.parameters)})"
        return None


def faults_of(hooks: tuple[Hook, ...]) -> list[str]:
    """What a framework has moved of the hooks."""
    return [fault for hook in hooks if (fault := hook.fault())]
