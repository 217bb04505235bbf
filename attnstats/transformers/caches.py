"""Following a transformers cache: a follower is notified when batch rows move or the last tokens are dropped.

A followed cache changes its class for a subclass made here, whose methods notify the follower after they ran. A copy
of the cache is not followed, and `unfollow` gives the class back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor


class Follower(Protocol):
    def rows_selected(self, cache: Any, change: Callable[[Tensor], Tensor]) -> None:
        """`change` was done to the batch dimension of what is cached."""

    def truncated(self, cache: Any, removed: int) -> None:
        """The last `removed` tokens are cached no more."""


_FOLLOWERS: WeakKeyDictionary[Any, Follower] = WeakKeyDictionary()


def follow(cache: Any, follower: Follower) -> None:
    """Notify `follower` from now on; a cache has one follower."""
    if cache not in _FOLLOWERS:
        _FOLLOWERS[cache] = follower
        kind: Any = type(cache)
        cache.__class__ = _following(kind)


def unfollow(follower: Follower) -> None:
    """Give every cache that notifies `follower` its class back."""
    for cache in [cache for cache, other in _FOLLOWERS.items() if other is follower]:
        del _FOLLOWERS[cache]
        cache.__class__ = type(cache).__mro__[1]


def _rebuilt(kind: Any, state: dict[str, Any]) -> Any:
    cache = kind.__new__(kind)
    cache.__dict__.update(state)
    return cache


@functools.cache
def _following(kind: Any) -> type:
    def notifying(name: str, after: Callable[[Follower, Any, Any, int], None]) -> Callable[..., Any]:
        method = getattr(kind, name)

        @functools.wraps(method)
        def wrapper(cache: Any, argument: Any, *args: Any, **kwargs: Any) -> Any:
            before = int(cache.get_seq_length()) if name == "crop" else 0
            result = method(cache, argument, *args, **kwargs)
            follower = _FOLLOWERS.get(cache)
            if follower is not None:
                after(follower, cache, argument, before)
            return result

        return wrapper

    methods: dict[str, Callable[[Follower, Any, Any, int], None]] = {
        "reorder_cache": lambda f, c, rows, _: f.rows_selected(c, lambda x: x.index_select(0, rows.to(x.device))),
        "batch_select_indices": lambda f, c, rows, _: f.rows_selected(c, lambda x: x[rows.to(x.device)]),
        "batch_repeat_interleave": lambda f, c, n, _: f.rows_selected(c, lambda x: x.repeat_interleave(n, dim=0)),
        "crop": lambda f, c, _, before: f.truncated(c, before - int(c.get_seq_length())),
    }

    def reduce(cache: Any, protocol: Any) -> Any:
        """Copies and pickles are of the class that the cache had."""
        return _rebuilt, (kind, cache.__dict__)

    replaced: dict[str, Any] = {n: notifying(n, after) for n, after in methods.items() if hasattr(kind, n)}
    return type(kind.__name__, (kind,), replaced | {"__reduce_ex__": reduce})
