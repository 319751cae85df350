"""Host time of each op's call: ours beyond what torch's own dispatch of an op with its gradient costs.

    python -m mvlm_benchmarks.kernels.host_time [--rounds N] [--json FILE]

Needs no GPU. A call runs all that the host does for it (checks, dispatch, autograd, choice of tiles, allocation of the
outputs) up to the launch, which is left out: Triton's own launcher needs a driver. Index values are not read, as on a
GPU. Beside it, in turns, an empty op registered in the same way, with the same tensors in and outputs of the same
shapes allocated: that is torch's part. Microseconds of processor time a call: least and median of the rounds. The
least says more: whatever else runs on the machine only ever adds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvlm_benchmarks.machine import describe
from mvlm_kernels import (
    cross_attention,
    dispatch,
    gather_patches,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    registration,
    use_backend,
)

CALLS = 400  # of one contender, one after the other, in a round


def probe(name: str, inputs: int, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> Callable[..., Any]:
    """An op of so many tensors in that allocates outputs of these shapes, registered as ours are, with a gradient."""

    def implementation(*x: Tensor) -> Any:
        made = [torch.empty(shape, dtype=dtype, device=x[0].device) for shape, dtype in shapes]
        return made[0] if len(made) == 1 else tuple(made)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, below_autograd: Any, *x: Tensor) -> Any:
            out = below_autograd(*x)
            ctx.save_for_backward(*x)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None,) * (1 + inputs)

    arguments = ", ".join(f"Tensor x{i}" for i in range(inputs))
    returns = ", ".join(["Tensor"] * len(shapes))
    return registration.define(f"probe_{name}({arguments}) -> ({returns})", implementation, implementation, Function)


def contenders() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Op -> (our call, the probe's call), at small sizes: the host's work does not depend on them."""
    bf16, f32 = torch.bfloat16, torch.float32
    q = torch.zeros(2, 197, 12, 64, dtype=bf16, requires_grad=True)
    k, v = (torch.zeros(2, 32, 12, 64, dtype=bf16, requires_grad=True) for _ in range(2))
    lengths = torch.full((2,), 20, dtype=torch.int32)
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    floats = torch.zeros(2, 3, 224, 224, dtype=bf16, requires_grad=True)
    ids = torch.arange(116, dtype=torch.int32).expand(2, 116).contiguous()
    pred = torch.zeros(2, 116, 768, dtype=bf16, requires_grad=True)
    weight = torch.zeros(768, 768, dtype=bf16, requires_grad=True)
    bias = torch.zeros(768, dtype=bf16, requires_grad=True)
    tokens = torch.zeros(2, 196, 768, dtype=bf16, requires_grad=True)
    row = torch.zeros(768, dtype=bf16, requires_grad=True)
    positions = torch.zeros(197, 768, dtype=bf16, requires_grad=True)
    masked = torch.zeros(2, 196, dtype=torch.bool)
    mean, std = [0.5] * 3, [0.25] * 3

    losses = [((), f32), ((2, 116, 768), torch.int8)]
    attention = probe("attention", 4, [((2, 197, 12, 64), bf16), ((2, 12, 197), f32)])
    gather = probe("gather", 2, [((2, 116, 768), bf16)])
    masked_loss = probe("masked_loss", 3, losses)
    linear_loss = probe("linear_loss", 5, losses)
    place = probe("place", 5, [((2, 197, 768), bf16)])
    return {
        "cross_attention": (
            lambda: cross_attention(q, k, v, key_lengths=lengths),
            lambda: attention(q, k, v, lengths),
        ),
        "gather_patches": (
            lambda: gather_patches(floats, ids, 16, mean=mean, std=std),
            lambda: gather(floats, ids),
        ),
        "masked_pixel_loss": (
            lambda: masked_pixel_loss(pred, images, ids, 16, mean=mean, std=std),
            lambda: masked_loss(pred, images, ids),
        ),
        "linear_pixel_loss": (
            lambda: linear_pixel_loss(pred, weight, bias, images, ids, 16, mean=mean, std=std),
            lambda: linear_loss(pred, weight, bias, images, ids),
        ),
        "place_tokens": (
            lambda: place_tokens(tokens, row, positions, row, masked=masked),
            lambda: place(tokens, row, positions, row, masked),
        ),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Mean of CALLS calls."""
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.process_time() - started) / CALLS


def measure(rounds: int = 15) -> list[dict[str, Any]]:
    """Rows of op, ours, torch and beyond: microseconds a forward call, the least of the rounds and their median."""
    rows = []
    with dispatch.recording(lambda *_: None, target_arch=90), use_backend("triton"):
        for name, (ours, torchs) in contenders().items():
            for call in (ours, torchs):
                call()
            pairs = [(microseconds(ours), microseconds(torchs)) for _ in range(rounds)]
            least = [min(column) for column in zip(*pairs, strict=True)]
            rows.append(
                {
                    "op": name,
                    "ours": least[0],
                    "torch": least[1],
                    "beyond": least[0] - least[1],
                    "beyond_median": statistics.median(a - b for a, b in pairs),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.kernels.host_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of both contenders in turns")
    parser.add_argument("--json", type=Path, help='write {"machine": .., "rows": [..]} here')
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(f"{'op':18} {'ours':>6} {'torch':>6} {'beyond':>7} {'median':>7}  microseconds a forward call")
    for row in rows:
        figures = f"{row['ours']:6.1f} {row['torch']:6.1f} {row['beyond']:7.1f} {row['beyond_median']:7.1f}"
        print(f"{row['op']:18} {figures}")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": describe("cpu", ["torch", "triton"]), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
