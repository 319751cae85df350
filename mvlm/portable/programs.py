"""Programs of a trained model's three parts: torch.export's .pt2 files, and ONNX files.

A program holds only torch's own operators, so it runs where mvlm is not installed. After it is written it is read back
and compared with the network, on batches and lengths that it was not traced with.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mvlm.errors import ConfigError, RunError
from mvlm.model.network import MaskVLMNetwork
from mvlm.portable.modules import Part, example_inputs, parts
from mvlm_dataloading.errors import need
from mvlm_kernels.add_layer_norm import reference

Format = Literal["pt2", "onnx"]
TOLERANCE = 1e-4
"""Largest difference between a program and the network, absolute for values below 1, else relative."""
OPSET = 20
"""Version of ONNX's operators: the first with GELU."""
MOST_ONNX_BYTES = 1 << 31
"""Largest size of an ONNX file, which is one message of protobuf, with its weights."""
Program = Callable[[dict[str, Tensor]], list[Tensor]]
"""A loaded program: inputs by name -> outputs."""


def write_programs(network: MaskVLMNetwork, folder: Path, format: Format) -> dict[str, float]:
    """Write the three programs of a network in fp32 on the CPU. Returns the largest difference of each, by file name.

    Raises:
        ConfigError: a package of the extra `export` is not installed, or an ONNX file would be too large.
        RunError: a program differs from the network by more than `TOLERANCE`.
    """
    if format == "onnx":
        check_onnx_packages()
        _check_onnx_sizes(network)
    length, found = network.config.text_length, {}
    traced = example_inputs(network, 3, length)  # a batch of 1 would be taken for a constant
    shapes = [(1, min(4, length)), (5, length), (2, 3)]
    others = [example_inputs(network, *shape, seed) for seed, shape in enumerate(shapes)]
    for part in parts(network):
        file = folder / f"{part.name}.{format}"
        program = exported_program(part, traced[part.name], length)
        with _quiet():
            if format == "onnx":
                _write_onnx(program, part, traced[part.name], file)
            else:
                torch.export.save(program, file)
        run = load_program(file)
        differences = [difference(part, run, inputs[part.name]) for inputs in others]
        found[file.name] = max(differences)
        if not found[file.name] <= TOLERANCE:
            raise RunError(
                f"{file.name}: wanted outputs within {TOLERANCE} of the network's, found a difference of "
                f"{found[file.name]:.2g}; report this model and these versions: torch {torch.__version__}"
            )
    return found


def exported_program(part: Part, example: dict[str, Tensor], text_length: int) -> ExportedProgram:
    """The program of a part, for any batch and texts of 2 to `text_length` tokens, in torch's own operators."""
    axes = {"batch": Dim("batch", min=1), "length": Dim("length", min=2, max=text_length)}
    shapes = {name: {i: axes[axis] for i, axis in enumerate(of) if axis} for name, of in part.inputs.items()}
    with _quiet(), torch.no_grad():
        program = torch.export.export(part.module.eval(), (), example, dynamic_shapes=shapes)
        return program.run_decompositions(_OURS)


def _gelu(h: Tensor, h_bias: Tensor | None) -> Tensor:
    return F.gelu(h if h_bias is None else h + h_bias)


_OURS: Any = {
    torch.ops.mvlm_kernels.add_layer_norm.default: reference.add_layer_norm,
    torch.ops.mvlm_kernels.gelu.default: _gelu,
}
"""Our ops in the network, in torch's operators."""


def load_program(file: Path, threads: int = 0) -> Program:
    """Load a program from a .pt2 or an .onnx file; it runs on the CPU.

    Args:
        threads: of onnxruntime; 0 for one per core. torch's own setting holds for .pt2.
    """
    if file.suffix == ".onnx":
        runtime = need("onnxruntime", "export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def run_onnx(inputs: dict[str, Tensor]) -> list[Tensor]:
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            return [torch.from_numpy(output) for output in outputs]

        return run_onnx
    with _quiet():
        module = torch.export.load(file).module()

    @torch.no_grad()
    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        return _as_list(module(**inputs))

    return run


@torch.no_grad()
def difference(part: Part, run: Program, inputs: dict[str, Tensor]) -> float:
    """Largest difference of a program's outputs from the part's, absolute for values below 1, else relative."""
    found = 0.0
    for wanted, got in zip(_as_list(part.module(**inputs)), run(inputs), strict=True):
        if wanted.shape != got.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        found = max(found, float(((wanted - got).abs() / wanted.abs().clamp(min=1)).max()))
    return found


def check_onnx_packages() -> None:
    """ConfigError if a package that ONNX needs is not installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package, "export")
    except ImportError as error:
        raise ConfigError(f"onnx: wanted its packages, found one missing: {error}") from None


def _check_onnx_sizes(network: MaskVLMNetwork) -> None:
    """ConfigError for a part that fits in no ONNX file: protobuf itself would refuse it only after the trace."""
    for part in parts(network):
        size = sum(x.numel() * x.element_size() for x in (*part.module.parameters(), *part.module.buffers()))
        if size >= MOST_ONNX_BYTES:
            raise ConfigError(
                f"onnx: wanted programs below {MOST_ONNX_BYTES / 2**30:g} GiB each, {part.name} has "
                f"{size / 2**30:.2f} GiB; use --format pt2"
            )


def _write_onnx(program: ExportedProgram, part: Part, example: dict[str, Tensor], file: Path) -> None:
    made: Any = torch.onnx.export(
        program,
        (),
        kwargs=example,
        input_names=list(part.inputs),
        output_names=list(part.outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    proto = made.model_proto
    values = [*proto.graph.input, *proto.graph.output]
    wanted = {**part.inputs, **part.outputs}
    renamed = {}
    for value in values:
        for axis, dimension in zip(wanted[value.name], value.type.tensor_type.shape.dim, strict=True):
            if axis:
                renamed[dimension.dim_param] = axis
    for value in [*values, *proto.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:
                dimension.dim_param = renamed[dimension.dim_param]
    file.write_bytes(proto.SerializeToString())


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch.export and of the ONNX exporter about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
