"""Hundreds of drawn calls: shapes, masks, dtypes and settings that nobody thought of, against float64.

`DRAWN=1000 make test` draws so many in each of the ten shards. A failure prints hypothesis' seed and the command that
repeats the one case.
"""

import os

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from attnstats.tiled import native
from tests.cases import Case, check, one_line

SHARDS = 10  # so that parallel workers share the work
DRAWN = int(os.environ.get("DRAWN", "25"))  # cases of each

lengths = st.integers(1, 40) | st.sampled_from([16, 31, 32, 33, 64, 65])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    query_length = draw(lengths)
    is_causal = draw(st.booleans())
    relation = draw(st.sampled_from(["self", "self", "cached", "offset"] if is_causal else ["self", "cross", "offset"]))
    key_length, query_offset = query_length, None
    if relation in ("cached", "cross"):
        key_length += draw(st.integers(1, 40))
    elif relation == "offset":
        key_length = draw(lengths)
        query_offset = draw(st.integers(0, 45))
    head_dim = draw(st.integers(1, 48))
    packed: tuple[tuple[int, int], ...] = ()
    if draw(st.integers(0, 4)) == 0:
        relation, query_offset = "packed", None
        pair = (
            st.tuples(st.integers(0, 33), st.integers(0, 33)) if is_causal else st.integers(0, 40).map(lambda n: (n, n))
        )
        packed = tuple(
            draw(st.lists(pair, min_size=1, max_size=4).filter(lambda p: all(map(any, zip(*p, strict=True)))))
        )
    window_size = None
    if relation != "cross" and draw(st.booleans()):
        window_size = (draw(st.integers(-1, 40)), draw(st.integers(-1, 20)))
    return Case(
        batch=draw(st.integers(1, 2)),
        key_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim, 24])),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        is_causal=is_causal,
        padding=draw(st.sampled_from(["none", "none", "left", "right", "holes", "all"])),
        counted=draw(st.sampled_from(["all", "all", "some", "none"])),
        query_offset=query_offset,
        softcap=draw(st.sampled_from([None, None, 0.5, 5.0])),
        window_size=window_size,
        sinks=draw(st.booleans()),
        packed=packed,
        heads=draw(st.sampled_from(["all", "all", "some", "split"])),
        layout=draw(st.sampled_from(["plain", "bthd", "guarded", "strided"])),
        spread=draw(st.sampled_from([0.1, 1.0, 10.0])),
        seed=draw(st.integers(0, 2**16)),
        asked=tuple(draw(st.lists(st.integers(0, 14), min_size=1, max_size=5, unique=True))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_drawn_cases(shard, device):
    @seed(shard)
    @settings(max_examples=DRAWN, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(), st.sampled_from(["tiled", "tiled plain", "triton", "triton from_lse"]))
    def run(case: Case, path: str) -> None:
        backend, _, how = path.partition(" ")
        plain = "ATTNSTATS_NATIVE=0 " if how == "plain" else ""
        note(f"seed {shard}; reproduce: {plain}{one_line(case, backend, how == 'from_lse')}")
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(native, "enabled", False)
            check(case, backend, device if backend == "triton" else "cpu", how == "from_lse")

    run()
