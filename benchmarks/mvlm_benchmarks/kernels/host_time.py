"""Host time of one call of each op, compared with torch's own dispatch of an empty op.

    python -m mvlm_benchmarks.kernels.host_time [--rounds N] [--json FILE]

No GPU is needed. A call runs all work of the host (checks, dispatch, autograd, choice of tiles, allocation of outputs)
except the launch, because Triton's launcher needs a driver. Index values are not read, as on a GPU.

The launch of the call's first kernel is timed by itself, up to the driver: by Triton, and as ops launch a kernel that
they have launched before (``mvlm_kernels.launch_cache``).

Calls of an empty op take turns with ours. It is registered like ours, takes the same tensors and allocates outputs of
the same shapes, so its time is torch's part. The difference is our overhead. Figures are microseconds of processor time
per call, minimum and median over rounds. Prefer the minimum: other processes can only add time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_benchmarks.machine import describe
from mvlm_dataloading.files import write_json
from mvlm_kernels import (
    add_layer_norm,
    cross_attention,
    dispatch,
    gather_patches,
    gelu_linear,
    launch_cache,
    masked_pixel_loss,
    place_tokens,
    registration,
    use_backend,
)

CALLS = 400
"""Consecutive calls of one contender in a round."""


def empty_op(name: str, inputs: int, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> Callable[..., Any]:
    """Register an op like ours that has a gradient and computes nothing.

    Args:
        inputs: number of input tensors.
        shapes: shape and dtype of each output. Outputs are allocated, not written.
    """

    def implementation(*x: Tensor) -> Any:
        outputs = [torch.empty(shape, dtype=dtype, device=x[0].device) for shape, dtype in shapes]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

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
    schema = f"empty_{name}({arguments}) -> ({returns})"
    return registration.define(schema, implementation, implementation, Function).registered


def contenders() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Op -> (call of our op, call of the empty op). Sizes are small: host time does not depend on them."""
    bf16, f32 = torch.bfloat16, torch.float32
    q = torch.zeros(2, 197, 12, 64, dtype=bf16, requires_grad=True)
    k, v = (torch.zeros(2, 32, 12, 64, dtype=bf16, requires_grad=True) for _ in range(2))
    lengths = torch.full((2,), 20, dtype=torch.int32)
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    floats = torch.zeros(2, 3, 224, 224, dtype=bf16, requires_grad=True)
    ids = torch.arange(116, dtype=torch.int32).expand(2, 116).contiguous()
    pred = torch.zeros(2, 116, 768, dtype=bf16, requires_grad=True)
    tokens = torch.zeros(2, 196, 768, dtype=bf16, requires_grad=True)
    row = torch.zeros(768, dtype=bf16, requires_grad=True)
    positions = torch.zeros(197, 768, dtype=bf16, requires_grad=True)
    masked = torch.zeros(2, 196, dtype=torch.bool)
    mean, std = [0.5] * 3, [0.25] * 3

    attention = empty_op("attention", 4, [((2, 197, 12, 64), bf16), ((2, 12, 197), f32)])
    gather = empty_op("gather", 2, [((2, 116, 768), bf16)])
    masked_loss = empty_op("masked_loss", 3, [((), f32), ((2, 116, 768), torch.int8)])
    place = empty_op("place", 5, [((2, 197, 768), bf16)])
    stream = torch.zeros(2, 4, 16, requires_grad=True)
    branch = torch.zeros(2, 4, 16, dtype=bf16, requires_grad=True)
    small = torch.zeros(16, 16, dtype=bf16, requires_grad=True)
    short = torch.zeros(16, dtype=bf16, requires_grad=True)
    plain_branch, plain_small, plain_short = branch.detach(), small.detach(), short.detach()
    norm = empty_op("norm", 5, [((2, 4, 16), f32), ((2, 4, 16), bf16), ((8,), f32), ((8,), f32)])
    activation = empty_op("activation", 2, [((2, 4, 16), bf16)])
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
        "place_tokens": (
            lambda: place_tokens(tokens, row, positions, row, masked=masked),
            lambda: place(tokens, row, positions, row, masked),
        ),
        "add_layer_norm": (
            lambda: add_layer_norm(stream, branch, short, short, y_bias=short),
            lambda: norm(stream, branch, short, short, short),
        ),
        "gelu_linear": (  # the product is torch's in both
            lambda: gelu_linear(branch, small, short, h_bias=short),
            lambda: (activation(branch, short), F.linear(plain_branch, plain_small, plain_short)),
        ),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Microseconds of processor time per call: the mean of CALLS calls."""
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.process_time() - started) / CALLS


class NoDriver:
    """Driver of an H100 whose launches do nothing."""

    class Utils:
        def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
            return name, name, 32, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        def launch(self, *_: Any) -> None:
            pass

    class Launcher:
        def __init__(self, *_: Any) -> None:
            pass

        def __call__(self, *_: Any) -> None:
            pass

    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def time_launch(launch: tuple[Any, ...], rounds: int) -> tuple[float, float]:
    """Microseconds of processor time of one launch without the driver, the least of `rounds` rounds, in two ways.

    They are Triton's own launch, and `mvlm_kernels.launch_cache` for a kernel that it has launched before. launch:
    (kernel, grid, args, meta).
    """
    from triton.runtime import driver

    driver.set_active(NoDriver())  # pyright: ignore[reportArgumentType]
    kernel, grid, args, meta = launch
    ways = (lambda: kernel[grid](*args, **meta), lambda: launch_cache.launch(kernel, grid, args, meta, 0))
    for way in ways:
        way()
    triton, known = (min(microseconds(way) for _ in range(rounds)) for way in ways)
    return triton, known


def measure(rounds: int = 15) -> list[dict[str, Any]]:
    """Measure all ops, in microseconds per forward call.

    Returns:
        Rows with op, ours, torch, and the overhead (ours - torch) as `beyond` and, as a median, `beyond_median`; then
        the launch by Triton, `launch_triton`, and that of a known kernel, `launch`.
    """
    rows, launches = [], dict[str, tuple[Any, ...]]()
    with dispatch.recording(lambda *_: None, target_arch=90), use_backend("triton"):
        for name, (ours, empty) in contenders().items():
            seen: list[tuple[Any, ...]] = []
            with dispatch.recording(lambda *launch, seen=seen: seen.append(launch), target_arch=90):
                ours()
            launches[name] = seen[0]
            empty()
            pairs = [(microseconds(ours), microseconds(empty)) for _ in range(rounds)]
            minimum = [min(column) for column in zip(*pairs, strict=True)]
            rows.append(
                {
                    "op": name,
                    "ours": minimum[0],
                    "torch": minimum[1],
                    "beyond": minimum[0] - minimum[1],
                    "beyond_median": statistics.median(a - b for a, b in pairs),
                }
            )
    for row in rows:
        row["launch_triton"], row["launch"] = time_launch(launches[row["op"]], rounds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.kernels.host_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds; both contenders take a turn in each")
    parser.add_argument("--json", type=Path, help='JSON file: {"machine": .., "rows": [..]}')
    options = parser.parse_args()
    rows = measure(options.rounds)
    print("microseconds per forward call, and of the launch of its first kernel")
    print(f"{'op':18} {'ours':>6} {'torch':>6} {'overhead':>8} {'median':>7} {'triton':>7} {'launch':>7}")
    for row in rows:
        figures = f"{row['ours']:6.1f} {row['torch']:6.1f} {row['beyond']:8.1f} {row['beyond_median']:7.1f}"
        figures += f" {row['launch_triton']:7.1f} {row['launch']:7.1f}"
        print(f"{row['op']:18} {figures}")
    if options.json:
        write_json(options.json, {"machine": describe("cpu", ["torch", "triton"]), "rows": rows})


if __name__ == "__main__":
    main()
