"""Cases of ``place_tokens``, and its oracle.

Legend: B sequences, N patches, K visible patches, C width.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mvlm_kernels.case import PAPER, SMALL, Case, Draw, Inputs, Sizes, name_of
from mvlm_kernels.place_tokens import place_tokens

FAST = {"visible/bf16/2x5x130", "masked/bf16-fp32-parameters/2x5x130"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
TYPES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "bf16-fp32-parameters": (torch.bfloat16, torch.float32),
}
Mode = Literal["all", "masked", "both", "visible"]
"""Kind of call. all: a token for every patch, and no mask. masked: some of these tokens are masked. both: the sequences
without and with masks. visible: tokens of the visible patches alone."""


def oracle(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor, masked: Tensor | None = None,
    visible_ids: Tensor | None = None, with_unmasked: bool = False,
) -> Tensor:  # fmt: skip
    """Output of `place_tokens` by another formula.

    For each position, a row is chosen by number out of [CLS], mask token and tokens, and its position embedding added.
    """
    if with_unmasked:
        plain = oracle(tokens, mask_token, pos_embed, cls_token)
        return torch.cat([plain, oracle(tokens, mask_token, pos_embed, cls_token, masked)])
    batch, given, width = tokens.shape
    positions = len(pos_embed)
    row = torch.ones(batch, positions, dtype=torch.int64)  # the mask token
    row[:, 0] = 0
    if visible_ids is None:
        row[:, 1:] = torch.arange(2, 2 + given)
        if masked is not None:
            row[:, 1:][masked.cpu()] = 1
    else:
        for numbers, ids in zip(row, visible_ids.tolist(), strict=True):
            for k, n in enumerate(ids):
                numbers[1 + n] = 2 + k
    both = torch.stack([cls_token, mask_token]).expand(batch, 2, width)
    table = torch.cat([both, tokens], dim=1)  # (B, 2 + K, C)
    return table.gather(1, row.to(tokens.device)[:, :, None].expand(-1, -1, width)) + pos_embed


def rounded_once(**arguments: Any) -> Tensor:
    """The oracle in float32, or wider, with a result in the dtype to which torch promotes the four tensors."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors.values()))
    wide = torch.promote_types(dtype, torch.float32)
    return oracle(**{**arguments, **{name: x.to(wide) for name, x in tensors.items()}}).to(dtype)


def case(
    label: str, batch: int, patches: int, width: int, mode: Mode, dtype: torch.dtype,
    parameters: torch.dtype | None = None, *, visible: int = 0, count: int | None = None, share: float = 0.5,
    layout: str = "contiguous", ids: torch.dtype = torch.int32, ascending: bool = False,
) -> Case:  # fmt: skip
    """Case of `place_tokens` with `batch` sequences of (1 + patches, width).

    parameters: dtype of mask token, [CLS] and position embeddings, if it is not that of the tokens. visible: number of
    visible patches. count, share: masked patches, exactly or about. layout: of tokens and gradients, contiguous,
    transposed (as a conv patch embedding returns them), expanded (of equal rows), or strided.
    """
    given, parameters = visible if mode == "visible" else patches, parameters or dtype

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        tokens = draw.normal(batch, given, width, dtype=dtype)
        leaves = {"tokens": tokens, "mask_token": draw.normal(width, dtype=parameters)}
        leaves["pos_embed"] = draw.normal(1 + patches, width, dtype=parameters)
        leaves["cls_token"] = draw.normal(width, dtype=parameters)
        if layout == "transposed":
            leaves["tokens"] = tokens.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "expanded":
            leaves["tokens"] = tokens[:1].expand_as(tokens)
            leaves |= {name: leaves[name][:1].expand(width) for name in ("mask_token", "cls_token")}
        elif layout == "strided":
            leaves = {name: strided(x) for name, x in leaves.items()}
        if mode == "visible":
            return Inputs(leaves, {"visible_ids": draw.patch_ids(batch, visible, patches, ids, ascending)})
        if mode == "all":
            return Inputs(leaves, {})
        return Inputs(leaves, {"masked": draw.mask(batch, patches, count, share), "with_unmasked": mode == "both"})

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]

    def incoming(grad: Tensor) -> Tensor:
        if layout == "transposed":
            return grad.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "expanded":
            return grad[:, :1, :1].expand_as(grad)  # of a sum
        return strided(grad) if layout == "strided" else grad

    row = dtype.itemsize * width
    kept = patches - (patches // 2 if mode == "masked" else 0)  # of a sequence, as if half of it were masked
    read, written = (visible, visible) if mode == "visible" else (kept, patches)
    index = batch * (visible * ids.itemsize if mode == "visible" else 0 if mode == "all" else patches)
    wide = width * parameters.itemsize  # of a row of a parameter, and of the output
    vectors, whole = wide * (patches + 3), batch * (1 + patches) * wide * (2 if mode == "both" else 1)
    minimum = batch * read * row + index + vectors + whole, whole + index + batch * written * row + vectors
    return Case(
        "place_tokens", label, dtype, make, place_tokens, oracle, minimum, incoming=incoming, yardstick=rounded_once
    )


def sized(
    batch: int, dtype: torch.dtype, mode: Mode, parameters: torch.dtype | None = None, *, core: bool = False,
    sizes: Sizes = PAPER,
) -> Case:  # fmt: skip
    """Case in which half of the patches are masked, or in mode "visible" a quarter of them is visible."""
    patches, visible = sizes.patches, sizes.patches // 4
    tokens = f"{visible} of {patches} visible" if mode == "visible" else f"half of {patches} masked"
    tokens = f"unmasked and {tokens}" if mode == "both" else tokens
    of_parameters = f", parameters in {name_of(parameters)}" if parameters else ""
    made = case(
        f"B{batch} width {sizes.width}, {tokens}{of_parameters}", batch, patches, sizes.width, mode, dtype, parameters,
        visible=visible, count=patches // 2, ascending=True,
    )  # fmt: skip
    return replace(made, core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    found = [sized(batch, dtype, "masked", core=True), sized(batch, dtype, "visible")]
    if dtype.itemsize == 2:  # as in training, where autocast leaves parameters in float32
        modes: tuple[Mode, ...] = ("masked", "both")
        found += [sized(batch, dtype, mode, torch.float32) for mode in modes]
    return found


def small(dtype: torch.dtype) -> list[Case]:
    return [sized(2, dtype, "masked", sizes=SMALL)]


def compiled() -> Iterator[Case]:
    def at_paper_size(label: str, mode: Mode, dtype: torch.dtype, parameters: torch.dtype | None = None) -> Case:
        return case(label, 64, 196, 768, mode, dtype, parameters, visible=49)

    for name in ("bf16", "fp16", "fp32"):
        yield at_paper_size(f"{name}/masked", "masked", TYPES[name][0])
    modes: tuple[Mode, Mode] = ("all", "visible")
    for mode in modes:
        yield at_paper_size(f"bf16/{mode}", mode, torch.bfloat16)
    modes = ("masked", "both")
    for mode in modes:
        yield at_paper_size(f"bf16/{mode}/fp32-parameters", mode, torch.bfloat16, torch.float32)


def emulated() -> Iterator[Case]:
    modes: tuple[Mode, ...] = ("all", "masked", "visible")
    sizes = ((17, 50, 768), (3, 196, 768), (2, 5, 130), (1, 0, 65))
    for mode, (name, types), (batch, patches, width) in itertools.product(modes, TYPES.items(), sizes):
        label = f"{mode}/{name}/{batch}x{patches}x{width}"
        yield case(label, batch, patches, width, mode, *types, visible=min(13, patches))


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of few narrow tokens, whose sizes depend on `number`; see :func:`mvlm_kernels.cases.properties`."""
    patches = (2 + number % 2) ** 2
    modes: dict[str, Mode] = {"": "all", ", masked": "masked", ", both": "both", ", visible": "visible"}
    for name, mode in modes.items():
        yield case(f"tokens{name}", 2 + number, patches, 12, mode, dtype, parameters, visible=3, ids=torch.int64)
