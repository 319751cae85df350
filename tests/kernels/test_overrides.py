"""Launch options for measurements: they reach the kernel and the grid, and end with their block."""

import pytest
import torch

from mvlm_kernels import cross_attention, dispatch, overrides, place_tokens, use_backend


def launches(call) -> list[tuple[str, tuple, dict]]:
    found = []

    def record(kernel, grid, args, meta) -> None:
        found.append((kernel.__name__, grid, meta))

    with dispatch.recording(record, 90), use_backend("triton"):
        call()
    return found


def attend():
    q, k, v = (torch.zeros(2, length, 3, 64, dtype=torch.bfloat16) for length in (197, 32, 32))
    return cross_attention(q, k, v)


def place():
    tokens = torch.zeros(4, 5, 32)
    return place_tokens(tokens, torch.zeros(32), torch.zeros(6, 32), torch.zeros(32))


@pytest.mark.parametrize("call", [attend, place])
def test_options_reach_one_kernel_and_end_with_the_block(call) -> None:
    before = launches(call)
    name = before[0][0]
    with overrides.override_launch(name, num_warps=8, maxnreg=128):
        inside = launches(call)
        assert (inside[0][2]["num_warps"], inside[0][2]["maxnreg"]) == (8, 128)
        with overrides.override_launch(name, num_warps=1):
            assert launches(call)[0][2]["num_warps"] == 1
        assert launches(call)[0][2] == inside[0][2]
    assert launches(call) == before
    assert "maxnreg" not in before[0][2]


def test_tile_of_attention_changes_the_grid() -> None:
    """One image and one head, so that the tiles of queries are split over programs: 197 rows, in fours of 64."""

    def one():
        q, k, v = (torch.zeros(1, length, 1, 64, dtype=torch.bfloat16) for length in (197, 32, 32))
        return cross_attention(q, k, v)

    for rows, tiles in ((64, 4), (32, 7), (128, 2)):
        with overrides.override_launch("short_kv_forward", BLOCK_M=rows):
            _, grid, meta = launches(one)[0]
        assert meta["BLOCK_M"] == rows
        assert tiles in grid


def test_another_tile_gives_the_same_result() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 32) for length in (50, 20, 20))
    with use_backend("triton"):
        wanted = cross_attention(q, k, v)
        with overrides.override_launch("short_kv_forward", BLOCK_M=16):
            found = cross_attention(q, k, v)
    torch.testing.assert_close(found, wanted)
