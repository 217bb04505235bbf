"""The table of tile sizes, without a GPU: what Triton can take, for every architecture, kernel and head size."""

import pytest
import torch

from attnstats.triton import configs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", [*configs.BY_ARCHITECTURE, "sm_90"])
def test_powers_of_two_and_smaller_ones_after_them(architecture, dtype, monkeypatch):
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    with configs.targeting(architecture):
        for kernel in configs.HALF:
            for dim in (16, 32, 64, 128, 256):
                entries = list(configs.candidates(kernel, torch.device("cuda"), dtype, dim))
                for entry in entries:
                    assert all(n & (n - 1) == 0 for n in (entry.BM, entry.BN, entry.num_warps)), (kernel, dim)
                    assert 16 <= min(entry.BM, entry.BN) <= max(entry.BM, entry.BN) <= 256, (kernel, dim)
                    assert 4 <= entry.num_warps <= 8, (kernel, dim)
                    assert 1 <= entry.num_stages <= 3, (kernel, dim)
                shared = [(entry.BN, entry.num_stages) for entry in entries]
                assert shared == sorted(shared, reverse=True), (kernel, dim)
                assert len(set(entries)) == len(entries), (kernel, dim)


def test_entries_are_for_head_sizes_up_to_a_power_of_two():
    tables = [configs.HALF, configs.FLOAT32, *configs.BY_ARCHITECTURE.values()]
    configs.chunk(torch.device("cpu"))
    for table in tables:
        for kernel, rows in table.items():
            assert list(rows) == sorted(rows), kernel
            assert max(rows) == 256, kernel
            assert all(widest & (widest - 1) == 0 for widest in rows), kernel


@pytest.mark.parametrize("kernel", ["forward", "forward_loop"])
def test_statistics_in_the_loop_do_not_change_a_tile(kernel):
    """Else asking for them would change the output's last bit."""
    configs.chunk(torch.device("cpu"))
    for table in (configs.HALF, configs.FLOAT32, *configs.BY_ARCHITECTURE.values()):
        assert table[kernel] == table["forward"]
