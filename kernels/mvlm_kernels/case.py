"""A case: a call of an op with seeded inputs, an oracle of its results, and its cost.

Tests, the emulator, the ahead-of-time compiler and benchmarks read the same cases. Those of an op are in ``cases.py``
of its folder, and :mod:`mvlm_kernels.cases` has those of all ops.

Shape legend: B images, C channels, H and W image, P patch side, N patches, K chosen patches, F = C*P*P.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mvlm_kernels import dispatch

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Layout = Literal["contiguous", "channels_last", "expanded", "strided", "transposed"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last", "expanded", "strided", "transposed")


@dataclass(frozen=True)
class Sizes:
    """Sizes of images, patches and tokens."""

    side: int
    patch: int
    masked: int
    """Masked patches of an image."""
    width: int
    channels: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        return self.side // self.patch, self.side // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def features(self) -> int:
        return self.channels * self.patch**2


PAPER = Sizes(side=224, patch=16, masked=116, width=768)
SMALL = Sizes(side=24, patch=8, masked=5, width=40)
"""For rehearsals, and for tools that slow a GPU down. Odd on purpose: no length is a multiple of a tile."""


class Inputs:
    """Arguments of an op by name. Only `leaves` get gradients."""

    def __init__(self, leaves: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> None:
        self.leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        self.fixed = dict(fixed)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, the leaves first."""
        return [*self.leaves.values(), *(x for x in self.fixed.values() if isinstance(x, Tensor))]

    def values(self) -> list[Tensor]:
        """Floating tensors and uint8 images among the arguments.

        The others are lengths, indices and masks, which an implementation under comparison may convert before it is
        timed.
        """
        return [x for x in self.tensors() if x.is_floating_point() or x.dtype == torch.uint8]


class Maker(Protocol):
    """Makes inputs on a device. The seed changes values only: shapes, lengths, indices and masks are the case's."""

    def __call__(self, device: str, seed: int = 0) -> Inputs: ...


class Launch(NamedTuple):
    """One recorded launch of a Triton kernel.

    case: label of the case. meta: constexprs and compile options. pass_name: "forward" or "backward".
    """

    case: str
    kernel: Any
    args: tuple
    meta: dict[str, Any]
    pass_name: str


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype: how its inputs are made, an oracle of its results, and its cost."""

    op: str
    label: str
    """Name of the case in results: its shape, or what is special about it."""
    dtype: torch.dtype
    make: Maker
    ours: Callable[..., Any]
    """The op. Takes all arguments by name; returns a tensor or several."""
    oracle: Callable[..., Any]
    """The op in plain torch by other formulas than its reference. Takes all arguments by name, the leaves in float64,
    and is differentiated by autograd."""
    minimum: tuple[int, int] = (0, 0)
    """Bytes of (forward, backward) if each input is read once and each output written once. A tensor that forward saves
    for backward counts as an output of forward and an input of backward."""
    flops: tuple[int, int] = (0, 0)
    """Number of floating-point operations of (forward, backward)."""
    core: bool = False
    """True if `--quick` includes the case."""
    product: tuple[int, int, int] | None = None
    """Sizes (M, N, K) of the matrix product that forward contains, whose time by torch alone is reported."""
    has_kernels: bool = True
    """True if `ours` is an op of `mvlm_kernels`, so that `explain` knows it and its launches have names."""
    left_to_torch: bool = False
    """True if the op runs torch for this case on every GPU, by its own rule: both sides of an attention are long."""
    runs_on: Callable[[int], bool] = field(default=lambda arch: True, repr=False)
    """Function of a compute capability, such as 90: False if the op has no kernel there for the case."""
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, repr=False)
    """Makes the context manager in which the op is called, where the kernels take the case only under a setting."""
    multiplies: bool = False
    """True if the kernels contain matrix products, which are in TF32 for float32 inputs."""
    multiprocessors: int = 0
    """Number of multiprocessors of the GPU that is emulated, among which work is split; 0: no work is split."""
    incoming: Callable[[Tensor], Tensor] = field(default=lambda grad: grad, repr=False)
    """Gives an output's gradient, the input of the backward pass, the layout in memory that the case tests."""
    yardstick: Callable[..., Any] | None = None
    """Plain torch whose error is the measure of the kernels' error. Takes all arguments by name in their own dtypes.
    None: the op without its kernels."""
    rms: float | None = None
    """Bound of the relative error (root mean square); None for that of the dtype."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Size of the terms of a float32 sum that cancel, by result: `out`, `out 1`, or the leaf of a gradient."""
    rounded: Mapping[str, float] = field(default_factory=dict)
    """Size of the terms of a sum that are rounded to its dtype, by result."""

    @property
    def gradients_in_forward(self) -> bool:
        """True if our forward pass computes the gradients, so that backward has no operations left."""
        return self.flops[0] > 0 == self.flops[1]

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Outputs of the op."""
        with self.context():
            return as_results(self.ours(**inputs.leaves, **inputs.fixed))

    def backward(self, inputs: Inputs, outs: tuple[Tensor, ...]) -> None:
        """Run the backward pass of the op on uninitialised gradients of the outputs. The results are dropped."""
        if inputs.leaves:
            grads = [torch.empty_like(out) for out in outs]
            with self.context():
                torch.autograd.grad(outs, list(inputs.leaves.values()), grads, allow_unused=True)

    def launches(self, arch: int, inputs: Inputs | None = None) -> list[Launch]:
        """Launches of kernels that both passes make on a GPU of this compute capability, such as 90. Nothing runs.

        inputs: by default tensors on the device meta. Raises RuntimeError if the op has no kernel for the case.
        """
        found: list[tuple[Any, ...]] = []
        inputs = self.make("meta") if inputs is None else inputs
        with dispatch.recording(lambda *launch: found.append(launch), arch), dispatch.use_backend("triton"):
            outs = self.forward(inputs)
            in_forward = len(found)
            self.backward(inputs, outs)
        return [
            Launch(self.label, kernel, args, meta, "forward" if number < in_forward else "backward")
            for number, (kernel, _, args, meta) in enumerate(found)
        ]


def as_results(out: Any) -> tuple[Tensor, ...]:
    """The output of an op, one tensor or several, as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


class Draw:
    """Seeded random tensors, drawn on the device: a GPU draws gigabytes in no time, and a CPU in minutes.

    Two processes on one machine get equal values. Indices are drawn on the CPU: they belong to the case.
    """

    def __init__(self, device: str, seed: int = 0) -> None:
        # The meta device has no generator, and no values.
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
        self._indices = torch.Generator().manual_seed(0)
        self._device = device

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        drawn = torch.float64 if dtype == torch.float64 else torch.float32
        return (torch.randn(shape, generator=self._generator, device=self._device, dtype=drawn) * scale).to(dtype)

    def far_from_pixels(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Values near 6 or -6. Normalised pixels are within 2.7 of 0, so rounding flips no sign of an L1 term."""
        side = torch.randint(0, 2, shape, generator=self._generator, device=self._device) * 12.0 - 6.0
        return (side + self.normal(*shape, dtype=torch.float32, scale=0.5)).to(dtype)

    def images(
        self, batch: int, channels: int, height: int, width: int, dtype: torch.dtype, layout: Layout = "contiguous"
    ) -> Tensor:
        """Images (B, C, H, W): 0 to 255 in uint8, else values in [0, 1]."""

        def values(*shape: int) -> Tensor:
            options: Any = {"generator": self._generator, "device": self._device}
            if dtype == torch.uint8:
                return torch.randint(0, 256, shape, dtype=torch.uint8, **options)
            return torch.rand(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options).to(
                dtype
            )

        if layout == "channels_last":
            return values(batch, height, width, channels).permute(0, 3, 1, 2)
        if layout == "expanded":
            return values(1, channels, height, width).expand(batch, -1, -1, -1)
        if layout == "strided":
            return values(batch, channels + 1, height + 1, 2 * width)[:, 1:, :height, ::2]
        if layout == "transposed":
            return values(batch, channels, width, height).transpose(2, 3)
        return values(batch, channels, height, width)

    def patch_ids(
        self, batch: int, count: int, patches: int, dtype: torch.dtype = torch.int32, ascending: bool = False
    ) -> Tensor:
        """Patch numbers (B, K), distinct in each row if there are so many patches."""
        if count > patches:
            return self.integers(patches, batch, count).to(dtype)
        ids = torch.rand(batch, patches, generator=self._indices).argsort(dim=1)[:, :count]
        return (ids.sort(dim=1).values if ascending else ids).contiguous().to(self._device, dtype)

    def mask(self, batch: int, patches: int, count: int | None = None, share: float = 0.5) -> Tensor:
        """bool (B, N), True at `count` patches of each row, or without a count at this share of all."""
        if count is None:
            return (torch.rand(batch, patches, generator=self._indices) < share).to(self._device)
        ids = self.patch_ids(batch, count, patches, torch.int64)
        return torch.zeros(batch, patches, dtype=torch.bool, device=self._device).scatter(1, ids, True)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64."""
        return torch.randint(0, high, shape, generator=self._indices).to(self._device)
