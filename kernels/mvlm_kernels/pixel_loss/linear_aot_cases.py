"""Cases of ``linear_pixel_loss`` for :mod:`mvlm_kernels.aot`: calls of the launchers on meta tensors."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from mvlm_kernels.pixel_loss.linear import linear_pixel_loss
from mvlm_kernels.pixel_loss.linear_backward import linear_pixel_loss_backward


def aot_cases() -> Iterable[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case at the paper's shapes; labels are dtype/kind/variants.

    Variants: ``rows`` is reduction="none". ``normalized`` is normalize_target=True. ``fp32-weight`` has float32 weights
    with 16-bit hidden states, as under autocast. ``no-bias`` has no bias. ``no-patches`` has K = 0: its loops never run
    but must compile.
    """
    values = torch.empty(3, device="meta")

    def both(
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        kind: str,
        reduce: bool,
        normalize_target: bool,
        with_bias: bool = True,
        chosen: int = 116,
    ) -> None:
        images = torch.empty(64, 3, 224, 224, dtype=torch.uint8, device="meta")
        ids = torch.empty(64, chosen, dtype=torch.int32, device="meta")
        hidden = torch.empty(64, chosen, 768, dtype=dtype, device="meta")
        weight = torch.empty(768, 768, dtype=weight_dtype, device="meta")
        bias = torch.empty(768, dtype=weight_dtype, device="meta") if with_bias else None
        loss, slope = linear_pixel_loss(
            hidden, weight, bias, images, ids, 16, values, values, kind, normalize_target, reduce, True
        )
        linear_pixel_loss_backward(loss, slope, hidden, weight, (True, True, with_bias))

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        for kind in ("l1", "mse"):
            yield f"{name}/{kind}", partial(both, dtype, dtype, kind, True, False)
        yield f"{name}/smooth_l1/rows/normalized", partial(both, dtype, dtype, "smooth_l1", False, True)
    yield "bf16/l1/fp32-weight", partial(both, torch.bfloat16, torch.float32, "l1", True, False)
    for kind in ("l1", "mse"):
        yield f"bf16/{kind}/no-bias", partial(both, torch.bfloat16, torch.bfloat16, kind, True, False, with_bias=False)
    yield "bf16/mse/rows/no-patches", partial(both, torch.bfloat16, torch.bfloat16, "mse", False, False, chosen=0)
