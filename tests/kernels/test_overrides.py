"""Launch options for measurements: they reach the kernel and the grid, and end with their block."""

import torch

from mvlm_kernels import cross_attention, dispatch, use_backend


def first_launch(queries: int = 197) -> tuple[tuple[int, ...], dict]:
    """Grid and options of attention to 32 keys by one head of one image, whose tiles of queries are split."""
    found = []
    q, k, v = (torch.zeros(1, length, 1, 64, dtype=torch.bfloat16) for length in (queries, 32, 32))
    record = lambda kernel, grid, args, meta: found.append((grid, meta))  # noqa: E731
    with dispatch.recording(record, 90), use_backend("triton"):
        cross_attention(q, k, v)
    return found[0]


def test_options_reach_the_kernel_and_its_grid_and_end_with_the_block() -> None:
    before = first_launch()
    with dispatch.override_launch("short_kv_forward", BLOCK_M=32, num_warps=8, maxnreg=128):
        grid, options = inside = first_launch()
        assert (options["num_warps"], options["maxnreg"], options["BLOCK_M"]) == (8, 128, 32)
        assert 7 in grid
        with dispatch.override_launch("short_kv_forward", BLOCK_M=128):
            grid, options = first_launch()
            assert 2 in grid
            assert "maxnreg" not in options
        assert first_launch() == inside
    assert first_launch() == before
    assert 4 in before[0]
