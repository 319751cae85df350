"""Bytes that ``linear_pixel_loss`` moves, computed from its chunks.

Its matrix products are cuBLAS's, which the interpreter cannot count. A product counts as reading its operands and
writing its result once, like every torch op; what of it stays in the L2 cache is not taken off.
"""


def linear_bytes(batch: int, chosen: int, features: int, width: int, kind: str) -> tuple[int, int]:
    """Bytes of (forward, backward) of ``linear_pixel_loss``, to the last thousandth.

    batch: B. chosen: K. features: C*P*P. width: D. For bfloat16 operands, uint8 images, int32 ids, a mean loss and all
    three gradients.
    """
    from mvlm_kernels.pixel_loss.linear import chunks
    from mvlm_kernels.pixel_loss.triton import losses_of

    rows, count = batch * chosen, len(list(chunks(batch, 4 * chosen * features)))
    pixels, weight = rows * features, features * width
    slope = pixels if kind == "l1" else 2 * pixels
    product = 2 * rows * width + 2 * count * weight + 4 * pixels
    programs = losses_of(rows, features, True)  # each reads the bias and writes a sum, which is read again
    forward = product + 4 * pixels + pixels + 4 * rows + slope + programs * (2 * features + 2 * 4) + 4
    # L1 decodes its bytes; the other kinds saved their slopes in hidden's type.
    backward = slope + 2 * pixels if kind == "l1" else 0
    backward += 4 * weight + 2 * pixels + 2 * count * weight + 2 * rows * width  # weight scaled, hidden's gradient
    # The weight's gradient: zeros, a product and a sum for each chunk, the factor, the cast.
    backward += 4 * weight + 2 * pixels + 2 * rows * width + count * 16 * weight + 8 * weight + 6 * weight
    backward += 2 * pixels + 4 * features + count * 16 * features + 14 * features  # the bias's, in the same way
    return forward, backward
