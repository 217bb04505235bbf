"""attnstats/paged.py: steps of an engine, added up, are one pass over each whole sequence.

The cache is filled with NaN wherever no request has a key, and each request's pages lie in a drawn order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnstats
from attnstats import (
    FAI,
    LSE,
    WAAD,
    Entropy,
    LocalMass,
    MaxLogit,
    MeanDistance,
    PagedStatistics,
    PooledMap,
    Received,
    SegmentMass,
    SinkMass,
    Statistic,
    TopKeys,
    paged_statistics,
    reference,
)
from attnstats.core import packing, paging
from attnstats.triton.launch import launching_with

BANDS = (WAAD(10), LocalMass(4), FAI(0, 0), FAI(3, 20))
WHOLE = (Entropy(), MeanDistance(), SinkMass(2), SegmentMass((0, 4, 60, None)), TopKeys(2), Received(), FAI(5, None))
# What each step has of the requests: (request, new tokens). Whole prompts, chunks, decoding, alone and mixed.
PROMPTS = [[(0, 37), (1, 1), (2, 5)], [(0, 1), (1, 1), (2, 1)], [(2, 1), (0, 1)], [(1, 1)]]
CHUNKS = [[(0, 33)], [(0, 16), (1, 20)], [(1, 9), (0, 8), (2, 1)], [(2, 1), (0, 1), (1, 40)], [(1, 1), (0, 1), (2, 1)]]
OUTSIDE = 2**24  # an entry of the block table past a request's pages: a kernel that followed it would crash


class Engine:
    """Requests whose keys lie in pages; `steps` are the new tokens of (request, count) pairs.

    Attributes:
        queries, keys: of each request (T, H, D), of all its steps.
    """

    def __init__(
        self,
        steps: Sequence[Sequence[tuple[int, int]]],
        size: int = 16,
        layout: str = "NHD",
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        integers: torch.dtype = torch.int32,
    ):
        draw = torch.Generator().manual_seed(0)
        self.steps, self.size, self.device, self.integers = steps, size, device, integers
        count = 1 + max(request for step in steps for request, _ in step)
        lengths = [sum(new for step in steps for request, new in step if request == i) for i in range(count)]

        def drawn(of: int, length: int) -> Tensor:
            return (torch.randn(length, of, dim, generator=draw, dtype=torch.float64) * 1.5).to(dtype).to(device)

        self.queries = [drawn(heads[0], n) for n in lengths]
        self.keys = [drawn(heads[1], n) for n in lengths]
        pages = [-(-n // size) for n in lengths]
        order = torch.randperm(sum(pages) + 3, generator=draw).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in pages]
        shape = {
            "NHD": (sum(pages) + 3, size, heads[1], dim),
            "HND": (sum(pages) + 3, heads[1], size, dim),
            "interleaved": (sum(pages) + 3, 2, size, heads[1], dim),
            "halves": (sum(pages) + 3, size, heads[1], 2 * dim),
        }[layout]
        cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.cache = {
            "NHD": lambda: cache,
            "HND": lambda: cache.transpose(1, 2),
            "interleaved": lambda: cache[:, 0],
            "halves": lambda: cache[..., :dim],
        }[layout]()
        self.seen = [0] * count

    def step(self, i: int, lse: Sequence[Tensor] | None, **arguments: Any) -> tuple[PagedStatistics, list[slice]]:
        """The statistics of a step, and which tokens of its requests it has."""
        slices = [slice(self.seen[request], self.seen[request] + new) for request, new in self.steps[i]]
        return paged_statistics(**self.arguments_of(i, lse), **arguments), slices

    def arguments_of(self, i: int, lse: Sequence[Tensor] | None) -> dict[str, Any]:
        """The tensors of a step, whose keys are written."""
        step = self.steps[i]
        slices = [slice(self.seen[request], self.seen[request] + new) for request, new in step]
        for (request, _), tokens in zip(step, slices, strict=True):
            for t in range(tokens.start, tokens.stop):
                self.cache[self.pages[request][t // self.size], t % self.size] = self.keys[request][t]
            self.seen[request] = tokens.stop
        widest = max(len(self.pages[request]) for request, _ in step) + 1
        table = torch.full((len(step), widest), OUTSIDE, dtype=self.integers)
        for row, (request, _) in enumerate(step):
            used = -(-self.seen[request] // self.size)
            table[row, :used] = torch.tensor(self.pages[request][:used])
        boundaries = [0, *torch.tensor([new for _, new in step]).cumsum(0).tolist()]
        parts = [] if lse is None else [lse[r][:, tokens] for (r, _), tokens in zip(step, slices, strict=True)]
        return {
            "query": torch.cat([self.queries[request][t] for (request, _), t in zip(step, slices, strict=True)]),
            "key_cache": self.cache,
            "block_table": table.to(self.device),
            "cu_seqlens_q": torch.tensor(boundaries, dtype=self.integers, device=self.device),
            "seqused_k": torch.tensor([s.stop for s in slices], dtype=self.integers, device=self.device),
            "lse": torch.cat(parts, dim=1) if parts else None,
        }

    def truth(self, statistics: Sequence[Statistic], **arguments: Any) -> list[attnstats.Statistics]:
        """One pass over each request's sequence by definition, in float64."""
        results = []
        for query, key in zip(self.queries, self.keys, strict=True):
            tensors = [x.double().cpu().transpose(0, 1)[None] for x in (query, key, key)]
            settings: dict[str, Any] = {"enable_gqa": True, "query_offset": 0}  # so that boundaries may lie ahead
            settings |= {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}
            results.append(reference.attention(*tensors, statistics=statistics, **settings)[1])
        return results

    def check(
        self,
        statistics: Sequence[Statistic],
        from_lse: bool,
        atol: float = 1e-12,
        reaches: int | None = None,
        backend: str = "auto",
        **arguments: Any,
    ) -> None:
        """All steps added up against the whole pass; reaches: how far before new tokens columns go; None: any."""
        passes = self.truth(statistics, **arguments)
        lse = [x.lse[0].to(self.queries[0].dtype).to(self.device) for x in passes] if from_lse else None
        heads = self.queries[0].shape[1]
        sums = [{s: torch.zeros(heads, len(q), dtype=torch.float64) for s in statistics} for q in self.queries]
        counts = [{s: torch.zeros(len(q), dtype=torch.int64) for s in statistics} for q in self.queries]
        for i, step in enumerate(self.steps):
            result, slices = self.step(i, lse, statistics=statistics, backend=backend, **arguments)
            begin = 0
            for row, ((request, _), tokens) in enumerate(zip(step, slices, strict=True)):
                new = slice(begin, begin + tokens.stop - tokens.start)
                begin = new.stop
                columns = slice(*result.cu_seqlens_k[row : row + 2].tolist())
                first = int(result.first_key[row])
                assert first + columns.stop - columns.start == tokens.stop
                assert reaches is None or first == max(0, tokens.start - reaches)
                for s in statistics:
                    if s.axis == "column":
                        sums[request][s][:, first : tokens.stop] += result.columns[s][:, columns].double().cpu()
                        if s.is_mean:
                            counts[request][s][first : tokens.stop] += result.counts[s][columns].cpu()
                        continue
                    found = result.rows.tensors[s][:, new].double().cpu()
                    expected = passes[request].tensors[s][0][:, tokens]
                    torch.testing.assert_close(found, expected, rtol=atol, atol=atol, msg=lambda m: f"{s}: {m}")  # noqa: B023
                torch.testing.assert_close(
                    result.rows.lse[:, new].double().cpu(), passes[request].lse[0][:, tokens], rtol=atol, atol=atol
                )
        for request, whole in enumerate(passes):
            for s in (s for s in statistics if s.axis == "column"):
                found = sums[request][s]
                if s.is_mean:
                    assert torch.equal(counts[request][s], whole.counts[s][0])
                    found = found / counts[request][s].clamp(min=1)
                torch.testing.assert_close(found, whole[s][0], rtol=atol, atol=atol, msg=lambda m: f"{s}: {m}")  # noqa: B023


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("steps", [PROMPTS, CHUNKS], ids=["prompts", "chunks"])
def test_steps_add_up_to_one_pass(steps, size, backend):
    Engine(steps, size).check((*BANDS, *WHOLE, MaxLogit(), LSE()), from_lse=False, backend=backend)
    Engine(steps, size).check((*BANDS, *WHOLE, LSE()), from_lse=True, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("from_lse", [True, False])
def test_columns_have_the_keys_within_the_horizon(from_lse, backend):
    Engine(CHUNKS).check(BANDS, from_lse, reaches=20, backend=backend)
    Engine(CHUNKS).check((WAAD(10), FAI(0, 3), Entropy()), from_lse, reaches=3, backend=backend)
    Engine(CHUNKS).check((WAAD(10),), from_lse, reaches=0, backend=backend)
    Engine(CHUNKS).check((FAI(2, 5000), FAI(0, 1)), from_lse, reaches=5000, backend=backend)


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "halves"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_layouts_of_a_cache_and_heads_of_a_group(layout, heads):
    Engine(PROMPTS, layout=layout, heads=heads).check((*BANDS, Received()), from_lse=True)


@pytest.mark.parametrize("from_lse", [True, False])
@pytest.mark.parametrize("left", [0, 2, 9, 25])
def test_a_sliding_window_bounds_what_is_read(left, from_lse):
    settings = {"window_size": (left, 0), "softcap": 2.0, "sinks": torch.linspace(-1, 1, 4)}
    Engine(CHUNKS).check((WAAD(10), Entropy(), Received()), from_lse, reaches=left, **settings)
    Engine(CHUNKS).check((*BANDS, WAAD(4), Received()), from_lse, reaches=max(left, 20), **settings)
    Engine(CHUNKS).check((*BANDS, *WHOLE), from_lse, **settings)


def test_pages_that_a_window_has_left_may_be_gone():
    engine = Engine([[(0, 70)], [(0, 1)]])
    engine.step(0, None, statistics=[])
    lse = [x.lse[0] for x in engine.truth((), window_size=(20, 0))]
    for gather in (lse, None):
        engine.seen = [70]
        for page in engine.pages[0][:3]:
            engine.cache[page] = torch.nan
        result, _ = engine.step(1, gather, statistics=[WAAD(10), Received(), Entropy()], window_size=(20, 0))
        assert result.columns["received"].shape == (4, 21)
        engine.seen = [70]
        numbered, _ = engine.step(1, gather, statistics=[TopKeys(2), FAI(5, None), WAAD(10)], window_size=(20, 0))
        for x in (result.rows["entropy"], result.columns["received"], numbered.columns["fai"], numbered.rows["waad"]):
            assert x.isfinite().all()
        assert numbered.rows["top_keys"].indices.min() >= 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_sums(dtype):
    engine = Engine(CHUNKS, dtype=dtype)
    engine.check((*BANDS, *WHOLE[:-3], Received()), from_lse=True, atol=2e-5) if dtype == torch.float32 else None
    Engine(CHUNKS, dtype=dtype).check(BANDS, from_lse=False, atol=2e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(
    ("size", "layout", "heads", "integers"),
    [
        (16, "NHD", (4, 2), torch.int32),
        (32, "HND", (3, 3), torch.int32),
        (128, "interleaved", (8, 1), torch.int32),
        (48, "halves", (6, 2), torch.int64),
    ],
)
def test_the_band_kernel_reads_pages(size, layout, heads, integers, device, monkeypatch):
    monkeypatch.setattr(paging.Pages, "gather", None)
    engine = Engine(CHUNKS, size, layout, heads, 24, torch.float32, device, integers)
    engine.check(BANDS, from_lse=True, atol=2e-5, reaches=20, backend="triton")


@pytest.mark.parametrize("left", [2, 25])
def test_the_band_kernel_under_a_window(left, device, monkeypatch):
    monkeypatch.setattr(paging.Pages, "gather", None)
    settings = {"window_size": (left, 0), "softcap": 2.0, "sinks": torch.linspace(-1, 1, 4, device=device)}
    Engine(CHUNKS, dtype=torch.float32, device=device).check(BANDS, True, atol=2e-5, backend="triton", **settings)


def test_other_passes_of_the_kernels_get_copies(device):
    for statistics, from_lse in ((BANDS, False), ((WAAD(10), FAI(5, None), Entropy()), True)):
        engine = Engine(PROMPTS, dtype=torch.float32, device=device)
        engine.check(statistics, from_lse, atol=2e-5, backend="triton")


def test_heads_and_counted_queries_of_the_band_kernel(device):
    engine = Engine([[(0, 40), (1, 7)], [(0, 1), (1, 3)]], dtype=torch.float32, device=device)
    engine.step(0, None, statistics=[])
    lse = [x.lse[0].float().to(device) for x in engine.truth(())]
    settings = {"statistics": BANDS, "query_mask": torch.tensor([True, False, True, True], device=device)}
    results = []
    for backend in ("triton", "tiled"):
        engine.seen = [40, 7]
        results.append(engine.step(1, lse, backend=backend, heads=[2, 0], max_seqlen_q=40, **settings)[0])
    for found, expected in zip(*((*x.rows.tensors.values(), *x.columns.values()) for x in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_request_with_more_tokens_than_believed(device, monkeypatch):
    """On a GPU nobody looks at the boundaries; here that is said."""
    for module in (packing, paging):
        monkeypatch.setattr(module, "believes", lambda _: True)
    engine = Engine([[(0, 20), (1, 9)]], dtype=torch.float32, device=device)
    lse = [x.lse[0].float().to(device) for x in engine.truth(())]
    result, _ = engine.step(0, lse, statistics=[WAAD(10), FAI(0, 5)], max_seqlen_q=16, backend="triton")
    # Room for the horizon of each request, as nobody counted.
    for x, (first, second, rest) in ((result.rows["waad"], (20, 9, 0)), (result.columns["fai"], (20, 9, 2 * 5))):
        parts = x.split([first, second, rest], dim=1)
        assert parts[0].isnan().all()
        assert parts[1].isfinite().all()
        assert not parts[2].any()


def test_nothing_waits_for_the_device(device, monkeypatch):
    """With max_seqlen_q no number is read, where reading one would wait. Launches are left out."""
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                read.append(function)
            return function(*args, **(kwargs or {}))

    engine = Engine([[(0, 20), (1, 9)]], dtype=torch.float32, device=device)
    lse = [torch.zeros(4, 20, device=device)] * 2
    for believed in (True, False):
        with monkeypatch.context() as patch, launching_with(lambda *_: None):
            for module in (packing, paging) if believed else ():
                patch.setattr(module, "believes", lambda _: True)
            engine.seen = [0, 0]
            arguments = engine.arguments_of(0, lse)
            with Reads():
                paged_statistics(**arguments, statistics=BANDS, max_seqlen_q=20, backend="triton")
        assert bool(read) != believed


def test_queries_that_count_and_heads_of_a_statistic():
    engine, statistics = Engine([[(0, 30), (1, 4)]]), (WAAD(10), FAI(0, 5), Received())
    mask, weight = torch.arange(34) % 3 > 0, torch.linspace(0, 2, 34).double()
    heads = {"fai": [2, 0], WAAD(10): [3]}
    result, slices = engine.step(0, None, statistics=statistics, query_mask=mask, query_weight=weight, heads=heads)
    begin = 0
    for row, tokens in enumerate(slices):
        own = slice(begin, begin + tokens.stop)
        begin = own.stop
        query, key = (x[row].transpose(0, 1)[None] for x in (engine.queries, engine.keys))
        settings = {"query_mask": mask[None, own], "query_weight": weight[None, own], "heads": heads}
        _, expected = reference.attention(query, key, key, statistics=statistics, enable_gqa=True, **settings)
        columns = slice(*result.cu_seqlens_k[row : row + 2].tolist())
        torch.testing.assert_close(result.rows["waad"][:, own], expected["waad"][0])
        assert torch.equal(result.rows.valid["waad"][own], expected.valid["waad"][0])
        torch.testing.assert_close(result.columns["received"][:, columns], expected["received"][0])
        torch.testing.assert_close(result.counts["fai"][columns], expected.counts["fai"][0])
        mean = result.columns["fai"][:, columns] / result.counts["fai"][columns].clamp(min=1e-9)
        torch.testing.assert_close(mean, expected["fai"][0])


def test_boundaries_of_segments_lie_ahead_of_a_growing_request():
    engine = Engine([[(0, 5), (1, 3)], [(0, 4), (1, 9)]])
    for i in range(2):
        bounds = torch.tensor([[0, 7, -1], [2, 5, 10]])
        result, slices = engine.step(i, None, statistics=[SegmentMass()], segment_boundaries=bounds)
        begin = 0
        for row, tokens in enumerate(slices):
            query, key = (x[row][: tokens.stop].transpose(0, 1)[None] for x in (engine.queries, engine.keys))
            own = SegmentMass((0, 7, None) if row == 0 else (2, 5, 10))
            longer = torch.nn.functional.pad(key, (0, 0, 0, 10))  # a boundary past the end is an error elsewhere
            _, expected = reference.attention(query, longer, longer, statistics=[own], enable_gqa=True, query_offset=0)
            new = slice(begin, begin + tokens.stop - tokens.start)
            begin = new.stop
            torch.testing.assert_close(result.rows["segment_mass"][:, new], expected[own][0][:, tokens])


def test_requests_without_new_tokens_and_tokens_of_no_request():
    """An engine pads a step: rows of the table that no request has, and tokens past the last boundary."""
    engine = Engine([[(0, 20), (1, 9)]])
    engine.step(0, None, statistics=[])
    lse = [x.lse[0] for x in engine.truth(())]
    for given in (None, torch.cat([lse[1][:, -2:], lse[0][:, -1:], torch.zeros(4, 2)], dim=1)):
        result = paged_statistics(
            torch.cat([engine.queries[1][-2:], engine.queries[0][-1:], torch.full((2, 4, 16), torch.nan)]),
            engine.cache,
            block_table=torch.tensor([engine.pages[1] * 2, [-1, -1], engine.pages[0], [-1, -1]]),
            cu_seqlens_q=torch.tensor([0, 2, 2, 3, 3]),
            seqused_k=torch.tensor([9, 0, 20, 50]),
            statistics=[WAAD(10), FAI(0, 5)],
            lse=given,
        )
        assert result.cu_seqlens_k.tolist() == [0, 7, 7, 13, 13]
        assert result.first_key.tolist() == [2, 0, 14, 50]
        assert result.rows["waad"][:, :3].isfinite().all()
        assert not result.rows["waad"][:, 3:].any()
        assert result.rows.valid["waad"].tolist() == [True] * 3 + [False] * 2
        (first, second) = engine.truth([WAAD(10)])
        torch.testing.assert_close(result.rows["waad"][:, 2], first["waad"][0, :, -1])
        torch.testing.assert_close(result.rows["waad"][:, :2], second["waad"][0, :, -2:])


def test_a_step_without_tokens():
    result = paged_statistics(
        torch.zeros(0, 4, 16),
        torch.zeros(3, 16, 2, 16),
        block_table=torch.zeros(1, 2, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 0]),
        seqused_k=torch.tensor([5]),
        statistics=["waad", "fai"],
    )
    assert result.rows["waad"].shape == result.columns["fai"].shape == (4, 0)


def test_logs_to_base_2_by_token_and_the_check():
    engine = Engine(PROMPTS, dtype=torch.float32)
    engine.step(0, None, statistics=[])
    of_step = {
        "query": torch.cat(engine.queries)[[3, 40]],
        "key_cache": engine.cache,
        "block_table": torch.tensor([engine.pages[0]] * 2),
        "cu_seqlens_q": torch.tensor([0, 1, 2]),
        "seqused_k": torch.tensor([4, 30]),
        "statistics": [WAAD(3), FAI(0, 2)],
    }
    expected = paged_statistics(**of_step)
    by_token = expected.rows.lse.T / torch.log(torch.tensor(2.0))
    result = paged_statistics(**of_step, lse=by_token, lse_base="2", lse_layout="TH", check=True)
    torch.testing.assert_close(result.rows["waad"], expected.rows["waad"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.columns["fai"], expected.columns["fai"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"lse: .* lse_base='2'"):
        paged_statistics(**of_step, lse=by_token, lse_layout="TH", check=True)
    with pytest.raises(ValueError, match=r"lse must have the shape \(4, 2\)"):
        paged_statistics(**of_step, lse=by_token)


def test_an_lse_is_checked_beside_statistics_that_make_a_pass_of_their_own():
    generator = torch.Generator().manual_seed(0)
    query, cache = (torch.randn(shape, generator=generator) for shape in ((3, 4, 16), (5, 16, 2, 16)))
    both = GOOD | {"query": query, "key_cache": cache, "statistics": [WAAD(4), MaxLogit()]}
    right = paged_statistics(**both).rows.lse
    torch.testing.assert_close(paged_statistics(**both, lse=right, check=True).rows.lse, right)
    with pytest.raises(ValueError, match="lse"):
        paged_statistics(**both, lse=right + 5, check=True)
    with pytest.raises(ValueError, match="lse must have the shape"):
        paged_statistics(**both, lse=right[:, :1])
    with pytest.raises(ValueError, match="lse_base must be"):
        paged_statistics(**both, lse=right, lse_base="7")


GOOD = {
    "query": torch.zeros(3, 4, 16),
    "key_cache": torch.zeros(5, 16, 2, 16),
    "block_table": torch.zeros(2, 2, dtype=torch.int32),
    "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32),
    "seqused_k": torch.tensor([17, 32], dtype=torch.int32),
    "statistics": ["waad"],
}
WRONG = [
    ({"key_cache": torch.zeros(5, 16, 32)}, r"key_cache must have the dimensions \(blocks, .*\(5, 16, 32\)"),
    ({"key_cache": torch.zeros(5, 16, 2, 8)}, "key_cache must have query's head_dim 16"),
    ({"key_cache": torch.zeros(5, 2, 16, 16)}, r"HND.*key_cache.transpose\(1, 2\)"),
    ({"key_cache": torch.zeros(5, 16, 2, 16).to(torch.float8_e4m3fn)}, "float8_e4m3fn; quantized caches .*'auto'"),
    ({"key_cache": torch.zeros(5, 16, 2, 16, dtype=torch.uint8)}, "uint8; quantized caches"),
    ({"key_cache": torch.zeros(5, 16, 2, 16).half()}, "key_cache must have query's dtype .*float32, got .*float16$"),
    ({"key_cache": torch.zeros(0, 16, 2, 16)}, "key_cache is empty"),
    ({"key_cache": [torch.zeros(16, 2, 16)]}, "key_cache must be a tensor, got list"),
    ({"query": torch.zeros(1, 4, 3, 16)}, r"query must have the dimensions \(total_q, heads, head_dim\)"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table .* request 0 has 17 keys, which take 2 pages"),
    ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, "block_table must have a row for each of .* 2 requests"),
    ({"block_table": torch.zeros(2, 2)}, "block_table must be an int32 or int64 tensor .* got torch.float32"),
    ({"block_table": torch.full((2, 2), 5, dtype=torch.int32)}, "block_table must name pages .* 0 .. 4, .* got 5"),
    ({"block_table": torch.full((2, 2), -1, dtype=torch.int32)}, "block_table must name pages .* got -1"),
    ({"seqused_k": torch.tensor([17, 1])}, "seqused_k counts all keys .* request 1 has 2 new tokens, got 1"),
    ({"seqused_k": [17, 32]}, "seqused_k must be an int32 or int64 tensor .* got list"),
    ({"seqused_k": torch.tensor([17])}, "seqused_k must have a row for each of .* 2 requests"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 4])}, "cu_seqlens_q must end at most at 3"),
    (
        {"cu_seqlens_q": torch.tensor([0])},
        r"cu_seqlens_q must be an int32 or int64 tensor of shape \(sequences \+ 1,\), got .*\(1,\)",
    ),
    ({"max_seqlen_q": 1}, "max_seqlen_q must be at least the longest sequence, 2"),
    ({"statistics": [Received(last=4)]}, r"statistics: Received\(last=4\) depends on the end"),
    ({"statistics": [PooledMap(2, 2)]}, "statistics: PooledMap.* depends on the end"),
    ({"statistics": [WAAD(2)], "heads": {"fai": [0]}}, "heads: 'fai' is not among the statistics"),
    ({"sinks": torch.zeros(3)}, r"sinks must have the shape \(4,\)"),
    ({"backend": "pages"}, "backend must be one of"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_errors_name_the_argument(changed, message):
    paged_statistics(**GOOD)
    with pytest.raises((TypeError, ValueError), match=message):
        paged_statistics(**(GOOD | changed))
