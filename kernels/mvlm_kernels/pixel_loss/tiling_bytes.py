"""Bytes that ``linear_pixel_loss`` moves, computed from its tiles.

The kernels read their operands again for every tile, mostly from L2, so the count depends on the tile sizes.
"""

from mvlm_kernels import configs
from mvlm_kernels.dispatch import ceil_div


def linear_tiling_bytes(rows: int, features: int, width: int, kind: str, arch: int = 80) -> tuple[int, int]:
    """Bytes of (forward, backward) that follow from the tiling of ``linear_pixel_loss``.

    rows: B*K. features: C*P*P. width: D. arch: compute capability of the tile table. For bfloat16 operands, uint8
    images, a mean loss and all three gradients.
    """
    from mvlm_kernels.pixel_loss.linear_backward import parts_of

    def tile(kernel: str) -> tuple[int, int, int]:
        found = configs.lookup("linear_pixel_loss", arch, f"{kernel}/16")
        return found["BLOCK_M"], found["BLOCK_F"], found["BLOCK_D"]

    slope = rows * features * (1 if kind == "l1" else 2)
    hidden, weight = 2 * rows * width, 2 * features * width
    block_m, block_f, _ = tile("forward")
    across, down = ceil_div(features, block_f), ceil_div(rows, block_m)
    forward = across * (hidden + 4 * rows) + down * (weight + 2 * features)
    # Pixels, slopes, partial losses written and read, the loss.
    forward += rows * features + slope + 2 * (4 * across * rows) + 4
    block_m, _, block_d = tile("backward_hidden")
    across, down = ceil_div(width, block_d), ceil_div(rows, block_m)
    backward = across * (slope + 4 * down) + down * weight + hidden
    _, block_f, block_d = tile("backward_weight")
    across, down = ceil_div(width, block_d), ceil_div(features, block_f)
    parts = parts_of(rows, across * down)
    backward += across * slope + down * hidden
    # Bias: slopes once more, partial sums written and read, gradient.
    backward += slope + 2 * 4 * parts * across * features + 2 * features
    # Weight: partial sums written and read, gradient.
    backward += 2 * 4 * parts * features * width + weight
    return forward, backward
