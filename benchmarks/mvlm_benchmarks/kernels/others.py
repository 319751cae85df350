"""Instructions and bytes of Liger's and flash-attn's Triton kernels, beside ours of the same shapes. No GPU is needed.

    python -m mvlm_benchmarks.kernels.others [--liger FOLDER] [--flash-attn FOLDER] [--json FILE] [--arch sm_90]

A library without a folder is left out. The folders have the packages `liger_kernel` and `flash_attn`: that of
`pip install --no-deps --target FOLDER liger-kernel`, and an unpacked source distribution or checkout of flash-attn.
Both are counted as :mod:`mvlm_benchmarks.kernels.bounds` and :mod:`mvlm_benchmarks.kernels.traffic` count ours. Of
flash-attn's numbers of warps, among which its tuner chooses by time, the one with fewest instructions counts.

A *value* is one of a row that is normed, or of a query or key that is rotated. Sums of partial gradients, which the
others leave to torch, count by their bytes alone. Bytes of atomics do not count.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

# A kernel decorated in an interpreting process cannot be compiled: bytes are counted in a process of their own.
if __name__ == "__main__" and "--bytes" not in sys.argv and os.environ.pop("TRITON_INTERPRET", None):
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_benchmarks.kernels.others", *sys.argv[1:]])

import torch
from torch import Tensor

from mvlm_benchmarks.kernels import bounds, traffic
from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.add_layer_norm import cases as norms
from mvlm_kernels.case import PAPER, Case
from mvlm_kernels.hardware import GPUS
from mvlm_kernels.qk_norm_rope import cases as rotations

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, WIDTH, HEADS = 197, PAPER.width, 12
BLOCK = 1024
"""The power of two that holds a row of WIDTH values."""
MULTIPROCESSORS = 132
"""Number that an H100 has. The others choose their programs by it, here for every architecture."""
SAMPLES = (12, 16)
"""Batches at which bytes are counted; they grow linearly. Our programs take several tiles of so many rows."""
OF_LIGER = [f"liger_kernel.ops.{name}" for name in ("fused_add_rms_norm", "layer_norm", "modulated_rms_norm", "rope")]
OF_FLASH_ATTN = [f"flash_attn.ops.triton.{name}" for name in ("layer_norm", "rotary")]
KERNELS: dict[str, Any] = {}
"""Modules by name, once :func:`load` has imported them."""
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
Passes = dict[str, list[Launch]]


@dataclass(frozen=True)
class Peer:
    """Kernels of another library: their launches (kernel, grid, args, meta) for a batch on a device, by pass.

    ours: our case of the same sums, for a batch. warps: numbers of warps among which its tuner chooses.
    """

    name: str
    what: str
    launches: Callable[[int, str], Passes]
    ours: Callable[[int], Case]
    warps: tuple[int, ...] = ()
    of_a_token: int = WIDTH


def launch(kernel: Any, grid: tuple[int, ...], warps: int, **named: Any) -> Launch:
    """A launch with arguments by name. Those that are not named are None, which a branch that is off never reads.

    Raises TypeError for a name that the kernel has not.
    """
    kernel = getattr(kernel, "fn", kernel) if type(kernel).__name__ == "Autotuner" else kernel
    unknown = set(named) - set(kernel.arg_names)
    if unknown:
        raise TypeError(f"{kernel.__name__} has no arguments {', '.join(sorted(unknown))}: it is of another version")
    return kernel, grid, tuple(named.get(name) for name in kernel.arg_names), {"num_warps": warps}


def _empty(device: str) -> Callable[..., Tensor]:
    return functools.partial(torch.zeros, device=device)


def flash_norm(batch: int, device: str, *, rms: bool) -> Passes:
    """Float32 stream plus a bfloat16 branch, and the norm in bfloat16."""
    module = KERNELS["flash_attn.ops.triton.layer_norm"]
    new, rows, programs = _empty(device), ROWS * batch, 8 * MULTIPROCESSORS
    x, y, dy, dx = (new(rows, WIDTH, dtype=BF16) for _ in range(4))
    stream, total, grad, d_stream = (new(rows, WIDTH) for _ in range(4))
    mean, rstd, weight = None if rms else new(rows), new(rows), new(WIDTH)
    bias = None if rms else new(WIDTH)
    dw, db = new(programs, WIDTH), None if rms else new(programs, WIDTH)
    sizes = {"M": rows, "N": WIDTH, "eps": 1e-6, "dropout_p": 0.0, "zero_centered_weight": 0, "BLOCK_N": BLOCK}
    shared = {"IS_RMS_NORM": rms, "HAS_BIAS": not rms, "W": weight, "B": bias, "Mean": mean, "Rstd": rstd, **sizes}
    forward = launch(
        module._layer_norm_fwd_1pass_kernel, (rows,), 4, X=x, Y=y, RESIDUAL=stream, RESIDUAL_OUT=total,
        stride_x_row=WIDTH, stride_y_row=WIDTH, stride_res_row=WIDTH, stride_res_out_row=WIDTH, HAS_RESIDUAL=True,
        STORE_RESIDUAL_OUT=True, HAS_DROPOUT=False, STORE_DROPOUT_MASK=False, HAS_ROWSCALE=False, HAS_X1=False,
        HAS_W1=False, HAS_B1=False, **shared,
    )  # fmt: skip
    backward = launch(
        module._layer_norm_bwd_kernel, (programs,), 4, X=total, DY=dy, DX=dx, DW=dw, DB=db, DRESIDUAL=grad,
        DRESIDUAL_IN=d_stream, stride_x_row=WIDTH, stride_dy_row=WIDTH, stride_dx_row=WIDTH, stride_dres_row=WIDTH,
        stride_dres_in_row=WIDTH, rows_per_program=ceil(rows / programs), HAS_DRESIDUAL=True, STORE_DRESIDUAL=True,
        HAS_DROPOUT=False, HAS_ROWSCALE=False, HAS_DY1=False, HAS_DX1=False, HAS_B1=False, RECOMPUTE_OUTPUT=False,
        **shared,
    )  # fmt: skip
    return {"forward": [forward], "backward": [backward]}


def flash_rotary(batch: int, device: str, *, interleaved: bool) -> Passes:
    """Queries and keys of a packed projection, rotated in place by one launch."""
    module, new = KERNELS["flash_attn.ops.triton.rotary"], _empty(device)
    heads, width = 2 * HEADS, 64
    x = new(batch, ROWS, heads // 2 * 3, width, dtype=BF16)
    cos, sin = new(ROWS, width // 2), new(ROWS, width // 2)
    strides = dict(zip(("batch", "seqlen", "nheads", "headdim"), x.stride(), strict=True))
    named = {f"stride_{of}_{name}": stride for of in ("x", "out") for name, stride in strides.items()}
    found = {}
    for name in ("forward", "backward"):
        found[name] = [launch(
            module.rotary_kernel, (heads // 2, ceil(ROWS / 8), batch), 4, OUT=x, X=x, COS=cos, SIN=sin,
            SEQLEN_OFFSETS=0, seqlen=ROWS, nheads=heads, seqlen_ro=ROWS, ROTARY_DIM=width,
            IS_SEQLEN_OFFSETS_TENSOR=False, IS_VARLEN=False, INTERLEAVED=interleaved, CONJUGATE=name == "backward",
            BLOCK_H=2, BLOCK_M=8, **named,
        )]  # fmt: skip
    return found


def _triton_bf16() -> Any:
    import triton.language as tl

    return tl.bfloat16


def _row_strides(*names: str) -> dict[str, int]:
    return {f"{name}_row_stride": WIDTH for name in names}


def liger_add_rms(batch: int, device: str) -> Passes:
    """Stream and branch in bfloat16, and the RMSNorm."""
    module, new, rows = KERNELS["liger_kernel.ops.fused_add_rms_norm"], _empty(device), ROWS * batch
    x, r, s, y, dy, grad, dx = (new(rows, WIDTH, dtype=BF16) for _ in range(7))
    weight, rstd, dw = new(WIDTH, dtype=BF16), new(rows), new(MULTIPROCESSORS, WIDTH)
    shared = {
        "n_cols": WIDTH,
        "offset": 0.0,
        "casting_mode": 0,
        "BLOCK_SIZE": BLOCK,
        "W_ptr": weight,
        "W_row_stride": 1,
    }
    shared |= {"RSTD_ptr": rstd, "RSTD_row_stride": 1}
    forward = launch(
        module._fused_add_rms_norm_forward_kernel, (rows,), 4, Y_ptr=y, S_ptr=s, X_ptr=x, R_ptr=r, eps=1e-6,
        **_row_strides("Y", "S", "X", "R"), **shared,
    )  # fmt: skip
    backward = launch(
        module._fused_add_rms_norm_backward_kernel, (MULTIPROCESSORS,), 4, dY_ptr=dy, dS_out_ptr=grad, dX_ptr=dx,
        X_ptr=s, X_dtype=_triton_bf16(), dW_ptr=dw, n_rows=rows, rows_per_program=ceil(rows / MULTIPROCESSORS),
        has_dS_out=True, **_row_strides("dY", "dS_out", "dX", "X", "dW"), **shared,
    )  # fmt: skip
    return {"forward": [forward], "backward": [backward]}


def liger_layer_norm(batch: int, device: str) -> Passes:
    """LayerNorm alone, all in bfloat16, its moments too."""
    module, new, rows = KERNELS["liger_kernel.ops.layer_norm"], _empty(device), ROWS * batch
    x, y, dy, dx = (new(rows, WIDTH, dtype=BF16) for _ in range(4))
    weight, bias, mean, rstd = (new(n, dtype=BF16) for n in (WIDTH, WIDTH, rows, rows))
    dw, db = (new(MULTIPROCESSORS, WIDTH) for _ in range(2))
    shared = {"X_ptr": x, "W_ptr": weight, "Mean_ptr": mean, "RSTD_ptr": rstd, "n_cols": WIDTH, "BLOCK_SIZE": BLOCK}
    forward = launch(
        module._layer_norm_forward_kernel, (rows,), 4, Y_ptr=y, B_ptr=bias, eps=1e-6, W_row_stride=1, B_row_stride=1,
        Mean_row_stride=1, RSTD_row_stride=1, **_row_strides("X", "Y"), **shared,
    )  # fmt: skip
    strides = {f"stride_{name}": WIDTH for name in ("x", "dx", "dw", "db", "dy")} | {"stride_mean": 1, "stride_rstd": 1}
    backward = launch(
        module._layer_norm_backward_kernel, (MULTIPROCESSORS,), 4, DX_ptr=dx, DW_ptr=dw, DB_ptr=db, DY_ptr=dy,
        n_rows=rows, rows_per_program=ceil(rows / MULTIPROCESSORS), **strides, **shared,
    )  # fmt: skip
    return {"forward": [forward], "backward": [backward]}


def liger_modulated(batch: int, device: str) -> Passes:
    """RMSNorm with scale and shift of each sample, all in bfloat16, without a residual sum."""
    module, new, rows = KERNELS["liger_kernel.ops.modulated_rms_norm"], _empty(device), ROWS * batch
    x, y, dy, dx = (new(rows, WIDTH, dtype=BF16) for _ in range(4))
    weight, scale, shift = (new(*size, WIDTH, dtype=BF16) for size in ((), (batch,), (batch,)))
    rstd, dw, d_scale, d_shift = new(rows), new(MULTIPROCESSORS, WIDTH), new(batch, WIDTH), new(batch, WIDTH)
    shared = {
        "X_ptr": x, "W_ptr": weight, "W_row_stride": 1, "Scale_ptr": scale, "RSTD_ptr": rstd, "RSTD_row_stride": 1,
        "n_cols": WIDTH, "offset": 0.0, "casting_mode": 0, "elementwise_affine": True, "has_shift": True,
        "rows_per_modulation": ROWS, "BLOCK_SIZE": BLOCK, **_row_strides("X", "Scale"),
    }  # fmt: skip
    forward = launch(
        module._modulated_rms_norm_forward_kernel, (rows,), 4, Y_ptr=y, Shift_ptr=shift, eps=1e-6,
        **_row_strides("Y", "Shift"), **shared,
    )  # fmt: skip
    backward = launch(
        module._modulated_rms_norm_backward_kernel, (MULTIPROCESSORS,), 4, dY_ptr=dy, dX_ptr=dx,
        X_dtype=_triton_bf16(), dW_ptr=dw, dScale_ptr=d_scale, dShift_ptr=d_shift, n_rows=rows,
        rows_per_program=ceil(rows / MULTIPROCESSORS), **_row_strides("dY", "dX", "dW", "dScale", "dShift"), **shared,
    )  # fmt: skip
    return {"forward": [forward], "backward": [backward]}


def liger_rope(batch: int, device: str) -> Passes:
    """Contiguous queries and keys, rotated in place."""
    module, new, width = KERNELS["liger_kernel.ops.rope"], _empty(device), 64
    q, k = (new(batch, ROWS, HEADS, width, dtype=BF16) for _ in range(2))
    cos, sin = new(1, ROWS, width), new(1, ROWS, width)
    sizes = {"sl": ROWS, "bs": batch, "cos_bs": 1, "n_qh": HEADS, "n_kh": HEADS, "hd": width, "pad_n_qh": 16}
    sizes |= {"pad_n_kh": 16, "pad_hd": width, "pad_rd": width, "rd": width, "BLOCK_SIZE": 16}
    return {
        name: [launch(
            module._triton_rope, (batch * ROWS,), 4, q_ptr=q, q_row_stride=HEADS * width, k_ptr=k,
            k_row_stride=HEADS * width, cos=cos, cos_row_stride=width, sin=sin, sin_row_stride=width,
            BACKWARD_PASS=name == "backward", **sizes,
        )]
        for name in ("forward", "backward")
    }  # fmt: skip


def _norm_case(label: str, vectors: norms.Vectors, stream: torch.dtype = BF16, alone: bool = False) -> Any:
    """Function of a batch: our case of rows of WIDTH, in float32 beside bfloat16 or all in bfloat16.

    alone: without a branch to add, and with a gradient of the norm alone.
    """

    def ours(batch: int) -> Case:
        samples = (batch, ROWS) if vectors.samples else (batch * ROWS,)
        case = norms.case(
            f"{' x '.join(map(str, samples))} rows of {WIDTH}, {label}", (*samples, WIDTH), stream,
            None if alone else BF16, BF16, stream, vectors, eps=1e-6,
        )  # fmt: skip
        return replace(case, ours=_norm_alone) if alone else case

    return ours


def _norm_alone(**arguments: Any) -> Tensor:
    return add_layer_norm(**arguments)[1]


def _rotation(label: str, **form: Any) -> Any:
    return lambda batch: rotations.of_images(batch, BF16, rotations.Form(**form), label, ROWS)


LAYER = norms.AFTER_BIAS
RMS = traffic.RMS
MODULATED = norms.Vectors("weight", samples="scale shift", y_bias=False, kind="rms")
WARPS = (1, 2, 4, 8, 16, 32)
OF_PAIR = 2 * WIDTH
"""Values of a token's queries and keys."""
PEERS = (
    Peer("flash-attn", "sum and LayerNorm, float32 stream", functools.partial(flash_norm, rms=False),
         _norm_case("LayerNorm", LAYER, FP32), WARPS),
    Peer("flash-attn", "sum and RMSNorm, float32 stream", functools.partial(flash_norm, rms=True),
         _norm_case("RMSNorm", RMS, FP32), WARPS),
    Peer("Liger", "sum and RMSNorm, bfloat16 stream", liger_add_rms, _norm_case("RMSNorm in bfloat16", RMS)),
    Peer("Liger", "LayerNorm alone, bfloat16", liger_layer_norm, _norm_case("LayerNorm alone", LAYER, alone=True)),
    Peer("Liger", "RMSNorm with scale and shift, bfloat16", liger_modulated,
         _norm_case("RMSNorm alone, scale and shift of each sample", MODULATED, alone=True)),
    Peer("flash-attn", "RoPE, rotated halves", functools.partial(flash_rotary, interleaved=False),
         _rotation("rotated halves"), of_a_token=OF_PAIR),
    Peer("flash-attn", "RoPE, rotated pairs", functools.partial(flash_rotary, interleaved=True),
         _rotation("rotated pairs", interleaved=True), of_a_token=OF_PAIR),
    Peer("Liger", "RoPE, rotated halves", liger_rope, _rotation("rotated halves"), of_a_token=OF_PAIR),
)  # fmt: skip


def loops(numbers: dict[str, Any], grid: tuple[int, ...], meta: dict[str, Any]) -> tuple[float, ...]:
    """Trips of the loop over rows of a backward pass of a norm; the others have none."""
    rows = numbers.get("M", numbers.get("n_rows"))
    return (rows / grid[0],) if rows and "rows_per_program" in numbers else ()


def load(liger: Path | None, flash_attn: Path | None) -> list[Peer]:
    """Import the kernels of these packages into KERNELS, and return the peers that they have."""
    if liger is not None:
        sys.path.append(str(liger))
        KERNELS.update((name, importlib.import_module(name)) for name in OF_LIGER)
    if flash_attn is not None:
        load_flash_attn(flash_attn)
    loaded = {"Liger": liger, "flash-attn": flash_attn}
    return [peer for peer in PEERS if loaded[peer.name] is not None]


def load_flash_attn(folder: Path) -> None:
    """Import flash-attn's Triton kernels into KERNELS, as on a GPU of MULTIPROCESSORS."""
    package = types.ModuleType("flash_attn")
    package.__path__ = [str(folder / "flash_attn")]  # its __init__ would import the compiled part
    properties = types.SimpleNamespace(warp_size=32, multi_processor_count=MULTIPROCESSORS)
    sys.modules["flash_attn"] = package
    with (
        unittest.mock.patch.object(torch.cuda, "current_device", return_value=0),
        unittest.mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        KERNELS.update((name, importlib.import_module(name)) for name in OF_FLASH_ATTN)
    del sys.modules["flash_attn"]  # other libraries would take it for the whole


def cache() -> traffic.Cache:
    """Second-level cache of an H100, in which vectors and tables stay that programs of the others read for each row."""
    return traffic.Cache(traffic.L2)


class Scalar(float):
    """A number that a kernel may convert. The interpreter passes plain ones, a GPU tensors."""

    def to(self, dtype: Any) -> "Scalar":
        return self


def moved(peer: Peer, batch: int) -> dict[str, int]:
    """Bytes of each pass, counted in the interpreter, and those of the sums of partial gradients by torch."""
    import triton.language as tl

    found = {}
    for name, launched in peer.launches(batch, "cpu").items():
        with traffic.counting(cache()) as counter:
            for kernel, grid, args, meta in launched:
                module = sys.modules[kernel.fn.__module__]
                # The interpreter has no libdevice. It patches `tl`, so the function is looked up in each call.
                with unittest.mock.patch.object(module, "rsqrt", lambda x: tl.rsqrt(x), create=True):
                    kernel[grid](*(Scalar(x) if isinstance(x, float) else x for x in args), **meta)
        partial = [x for kernel, _, args, _ in launched for x, of in zip(args, kernel.arg_names, strict=True)
                   if of in ("DW", "DB", "dW_ptr", "DW_ptr", "DB_ptr") and x is not None]  # fmt: skip
        found[name] = counter.bytes + sum(4 * (x.numel() + x.shape[-1]) for x in partial)
    return found


def bytes_of_a_value(peers: list[Peer]) -> list[dict[str, dict[str, float]]]:
    """Bytes of theirs and of ours by pass, of each peer at the table's batch."""
    found = []
    for peer in peers:
        values = traffic.BATCH * ROWS * peer.of_a_token
        few, more = (moved(peer, batch) for batch in SAMPLES)
        theirs = traffic.extrapolated(tuple(few.values()), tuple(more.values()), SAMPLES)
        of_case = traffic.samples_of(peer.ours(1))
        samples = SAMPLES if of_case == traffic.ROW_SAMPLES else of_case
        fewer, larger = (traffic.measure(peer.ours(batch), cache) for batch in samples)
        ours = traffic.extrapolated(fewer, larger, samples)
        row = {}
        for whose, counts in (("theirs", theirs), ("ours", ours)):
            row[whose] = {name: count / values for name, count in zip(few, counts, strict=True)}
        found.append(row)
    return found


def fewest(launched: list[Launch], warps: tuple[int, ...], arch: str, compiler: Any) -> dict[str, Any]:
    """Count of the number of warps with fewest instructions, among those that do not spill if there are such."""
    counts = []
    for number in warps or (launched[0][3]["num_warps"],):
        chosen = [(kernel, grid, args, meta | {"num_warps": number}) for kernel, grid, args, meta in launched]
        counts.append(bounds.machine(chosen, arch, compiler, loops) | {"warps": number})
    return min(counts, key=lambda count: (count["spilled"] > 0, count["instructions"]))


def rows(peers: list[Peer], archs: list[int], moved: list[dict[str, dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """One row for each pass of each peer."""
    from mvlm_kernels.aot import compile_launch  # it takes TRITON_INTERPRET out of the environment

    for peer, of_bytes in zip(peers, moved, strict=True):
        values = traffic.BATCH * ROWS * peer.of_a_token
        theirs, case = peer.launches(traffic.BATCH, "meta"), peer.ours(traffic.BATCH)
        for name in theirs:
            row: dict[str, Any] = {"what": peer.what, "pass": name, "whose": peer.name, "machine": {}}
            for arch in (f"sm_{number}" for number in archs):
                ours = bounds.machine(bounds.launches(case, int(arch[3:]))[name], arch, compile_launch)
                other = fewest(theirs[name], peer.warps, arch, compile_launch)
                for count in (ours, other):
                    count["of_a_value"] = round(32 * count["instructions"] / values, 2)
                row["machine"][arch] = {"ours": ours, "theirs": other}
            yield row | {f"bytes_{whose}": round(of_bytes[whose][name], 2) for whose in ("ours", "theirs")}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.kernels.others", description=(__doc__ or "").split("\n")[0]
    )
    archs = list(dict.fromkeys(gpu.arch for gpu in GPUS.values()))
    parser.add_argument("--liger", type=Path, help="folder with the package liger_kernel")
    parser.add_argument("--flash-attn", type=Path, help="folder with the package flash_attn")
    parser.add_argument("--arch", action="append", choices=[f"sm_{arch}" for arch in archs], help="may be repeated")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--bytes", action="store_true", help="only count bytes, and print them as JSON")
    options = parser.parse_args()
    if options.liger is None and options.flash_attn is None:
        parser.error("no folder of a library is given: --liger or --flash-attn")
    peers = load(options.liger, options.flash_attn)
    if options.bytes:
        print(json.dumps(bytes_of_a_value(peers)))
        return
    command = [sys.executable, "-m", "mvlm_benchmarks.kernels.others", *sys.argv[1:], "--bytes"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    counted = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout)
    chosen = [arch for arch in archs if not options.arch or f"sm_{arch}" in options.arch]
    found = []
    print(f"{'what':40} {'pass':9} {'whose':11} {'bytes':>6}  instructions a value by architecture; ours, theirs")
    for row in rows(peers, chosen, counted):
        found.append(row)
        counts = ", ".join(
            f"{arch}: {count['ours']['of_a_value']} {count['theirs']['of_a_value']}"
            for arch, count in row["machine"].items()
        )
        print(f"{row['what']:40} {row['pass']:9} {row['whose']:11} {row['bytes_ours']:6.2f} "
              f"{row['bytes_theirs']:6.2f}  {counts}", flush=True)  # fmt: skip
    if options.json:
        import triton

        versions = {"triton": triton.__version__}
        if options.liger is not None:
            versions |= {of.metadata["Name"]: of.version for of in metadata.distributions(path=[str(options.liger)])}
        options.json.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
