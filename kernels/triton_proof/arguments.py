"""Arguments of a launch: encoded into the parameter memory, and their tensors made known to the machine."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from triton_proof.ptx.syntax import UnsupportedPTX

Argument = tuple[str, str, Any]  # Triton's name of the type, name, value

_FORMATS = {
    "i1": "<B", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp16": "<e", "fp32": "<f", "fp64": "<d",
}  # fmt: skip


def flat_arguments(signature: Mapping[str, Any], values: Sequence[Any]) -> list[Argument]:
    """Arguments without constants, with those of tuples one after the other."""
    out: list[Argument] = []
    for (name, kind), value in zip(signature.items(), values, strict=True):
        if isinstance(kind, tuple):
            out += flat_arguments({f"{name}[{i}]": k for i, k in enumerate(kind)}, value)
        elif kind != "constexpr":
            out.append((kind, name, value))
    return out


def parameter_memory(
    program: Any, arguments: Sequence[Argument], machine: Any, unwritten: set[tuple[int, int]]
) -> bytes:
    """The parameter memory of a launch. Tensors are added to the machine's global memory.

    unwritten: (address, bytes) of storages that nobody has written. Raises RuntimeError if arguments and parameters do
    not fit each other.
    """
    params = program.function.params
    if len(params) != len(arguments):
        raise RuntimeError(f"{program.name} takes {len(params)} parameters, got {len(arguments)}")
    out = bytearray(program.param_bytes)
    for p, (kind, name, value) in zip(params, arguments, strict=True):
        raw = _encoded(kind, name, value)
        if len(raw) != p.size:
            raise RuntimeError(f"{program.name}: {p.name} has {p.size} bytes, its argument {name} has {len(raw)}")
        out[p.offset : p.offset + p.size] = raw
        if isinstance(value, Tensor):
            _add_tensor(value, name, machine, unwritten)
    return bytes(out)


def _encoded(kind: str, name: str, value: Any) -> bytes:
    if kind.startswith("*"):
        address = 0 if value is None else value.data_ptr() if hasattr(value, "data_ptr") else int(value)
        return struct.pack("<Q", address)
    if kind == "bf16":
        return struct.pack("<f", float(value))[2:]
    if kind not in _FORMATS:
        raise UnsupportedPTX(f"argument {name} of type {kind}")
    return struct.pack(_FORMATS[kind], float(value) if kind.startswith("fp") else int(value))


def _add_tensor(x: Tensor, name: str, machine: Any, unwritten: set[tuple[int, int]]) -> None:
    """Let the emulated kernel access x's memory, from its first element to its last.

    The rest of its storage stays out of bounds. unwritten: (address, bytes) of storages that nobody has written.
    """
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be a CPU tensor, got one on {x.device}")
    storage, size = x.untyped_storage(), x.element_size()
    span = 0 if 0 in x.shape else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    fresh = (storage.data_ptr(), storage.nbytes()) in unwritten
    machine.memory.add(x.data_ptr(), x.data_ptr() + span * size, name, min(4, size), fresh)
