"""Parts of blocks of timm and transformers by ``add_layer_norm``, ``gelu_linear`` and ``qk_norm_rope``.

from mvlm_kernels.integrations.blocks import swap_blocks
print(swap_blocks(model))               # what was swapped, and what not and why; `undo()` puts everything back

Six forms are known, by the code of their ``forward``, so copies in other classes are known too:

- timm's ``Block`` and ``EvaBlock``: LayerScale and the residual sum after attention, and the LayerNorm or RMSNorm after
  them, are one call.
- timm's ``Mlp``: GELU and the second linear layer are one call, whose backward pass has one kernel for the GELU.
- timm's ``EvaAttention`` and ``AttentionRope``: norm and rotation of queries and keys are one call (:mod:`.rotary`).
- transformers' ``BertSelfOutput``: the residual sum and the norm are one call. Some 40 architectures copy it.

A swapped module runs its own forward where no kernel runs the call, or if a module that the op replaces was wrapped
(LoRA) or has hooks. On a CPU that is always so, except under :func:`mvlm_kernels.use_backend`.
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mvlm_kernels import add_layer_norm, dispatch, gelu_linear
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal
from mvlm_kernels.integrations import rotary
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, OTHER_FORWARD, Part, SwapReport, listening, note
from mvlm_kernels.integrations.classes import in_torchscript, node_of_call, put_back, scripted_as, traced
from mvlm_kernels.integrations.norms import eps_of, of_timm, why_not_norm, why_not_replaced

__all__ = ["swap_blocks"]


@dataclass(frozen=True)
class Form:
    """Kind of module that an op can compute, known by the code of its forward.

    forward: the fused forward. why_not: reason why it cannot replace this module's own; None if it can. explain: gives
    `calls.note` the op's arguments for a call of the module, and that reason. fused: layers of this module that one
    call of an op computes, in words. node: torch.fx does not look into the module, whose calls are one node each.
    """

    forward: Callable[..., Tensor]
    why_not: Callable[[Any], Refusal | None]
    explain: Callable[..., None]
    fused: Callable[[Any], str]
    node: bool = True


def swap_blocks(model: nn.Module) -> SwapReport:
    """Let the ops compute residual norms and feed-forward layers of a model of timm or transformers, in place.

    Modules, parameters, hooks and the state dict stay as they are; a module becomes one of a subclass of its class. The
    report has every module of a known form.
    """
    parts: list[Part] = []
    swapped: list[nn.Module] = []
    for path, module in model.named_modules():
        form = form_of(type(module))
        if form is None:
            continue
        if isinstance(module, Swapped):
            reason = ALREADY_SWAPPED
        else:
            reason = OTHER_FORWARD if "forward" in vars(module) else form.why_not(module)
        parts.append(Part(path, type(module).__name__, reason, "" if reason else form.fused(module)))
        if reason is None:
            module.__class__ = swapped_class(type(module))
            swapped.append(module)

    return SwapReport(parts, lambda: put_back(swapped), model)


class Swapped(nn.Module):
    """Base of the classes that swapped modules have; each is a subclass of the module's own class, `swapped_from`."""

    swapped_from: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made again where a copy is read, from the original, which has a name to import."""
        return _empty, (self.swapped_from,), super().__reduce_ex__(2)[2]


def _empty(original: type[nn.Module]) -> nn.Module:
    kind = swapped_class(original)
    return kind.__new__(kind)


@functools.cache
def swapped_class(original: Any) -> Any:
    """Subclass with the fused forward of a module class of a known form. It has that class's name and docstring."""
    form = form_of(original)
    assert form is not None

    @scripted_as(original.forward)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(module, original, form, args, kwargs)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Swapped, original), {"forward": forward, "swapped_from": original, **names})


def _forward(module: nn.Module, original: Any, form: Form, args: Any, kwargs: dict[str, Any]) -> Any:
    """The fused forward of a swapped module, or its own where an op cannot compute it now."""
    x = args[0] if args else kwargs["x" if "x" in kwargs else "hidden_states"]  # as timm, as transformers
    tracer = traced(x)
    if tracer is not None and form.node:
        node = node_of_call(tracer, module, args, kwargs)
        return original.forward(module, *args, **kwargs) if node is None else node
    if listening():
        form.explain(module, form.why_not(module), *args, **kwargs)
    if form.why_not(module) is not None or (tracer is None and (in_torchscript() or kernel_reasons(x))):
        return original.forward(module, *args, **kwargs)
    return form.forward(module, *args, **kwargs)


def kernel_reasons(x: Tensor) -> tuple[Refusal, ...]:
    """Reasons why no kernel computes a call on this tensor. Empty under :func:`mvlm_kernels.use_backend`."""
    return _kernel_reasons(x.device, x.dtype, dispatch.forced())


@dispatch.constant_when_compiled
def _kernel_reasons(device: torch.device, dtype: torch.dtype, forced: str | None) -> tuple[Refusal, ...]:
    if forced is not None:
        return ()
    found = dispatch.device_reasons(device)
    return (*found, FLOAT64) if dtype == torch.float64 else found


def _why_not_block(block: Any) -> Refusal | None:
    return why_not_norm(block.norm2, nn.RMSNorm, *of_timm("norm", "RmsNorm"))


def _why_not_eva_block(block: Any) -> Refusal | None:
    return _why_not_block(block) or _why_not_behind_gate(block.drop_path1)


def _why_not_behind_gate(drop_path: Any) -> Refusal | None:
    """Reason why LayerScale's vector cannot be multiplied after `drop_path` in place of before it; None if it can.

    The op multiplies after it. Identity and DropPath give the same either way.
    """
    return why_not_replaced(drop_path, nn.Identity, *of_timm("drop", "DropPath"))


def _why_not_residual_norm(module: Any) -> Refusal | None:
    return why_not_norm(module.LayerNorm)


def _why_not_mlp(mlp: Any) -> Refusal | None:
    for part, kinds in (
        (mlp.fc2, (nn.Linear,)),
        (mlp.norm, (nn.Identity,)),
        (mlp.drop1, (nn.Dropout,)),
        (mlp.act, (nn.GELU, *of_timm("activations", "GELU"))),  # the exact one; its `inplace` has no effect
    ):
        reason = why_not_replaced(part, *kinds)
        if reason is not None:
            return reason
    if getattr(mlp.act, "approximate", "none") != "none":  # timm's class has no such choice
        reason = "the op has the exact GELU, the module its tanh approximation"
        return refusal(reason, "the original forward runs; use nn.GELU()")
    return None


def _block(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of timm's Block: x (B, N, C), and the arguments of its attention."""
    kwargs |= dict(zip(("attn_mask", "is_causal"), args, strict=False))
    y, gate = block.attn(block.norm1(x), **kwargs), _gate(block)
    x, n = _after_attention(block, x, block.ls1(y) if gate is None else y, gate)
    return x + block.drop_path2(block.ls2(block.mlp(n)))


def _explain_block(block: Any, reason: Refusal | None, x: Tensor, *_: Any, **__: Any) -> None:
    norm, gate = block.norm2, _gate(block)
    rms = not isinstance(norm, nn.LayerNorm)
    bias, kind = None if rms else norm.bias, "rms" if rms else "layer"
    note(block, add_layer_norm, [reason], x, x, norm.weight, bias, eps_of(norm), gate=gate, kind=kind)


def _eva_block(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of timm's EvaBlock: x (B, N, C), and the arguments of its attention."""
    kwargs |= dict(zip(("rope", "attn_mask", "is_causal"), args, strict=False))
    x, n = _after_attention(block, x, block.attn(block.norm1(x), **kwargs), block.gamma_1)
    y = block.mlp(n)
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def _gate(block: Any) -> Tensor | None:
    """Vector (C,) of the LayerScale behind a block's attention; None without one, or if the module must be called."""
    if hasattr(block, "gamma_1"):
        return block.gamma_1
    known = type(block.ls1) in of_timm("layer_scale", "LayerScale")
    plain = known and why_not_replaced(block.ls1, type(block.ls1)) is None
    return block.ls1.gamma if plain and _why_not_behind_gate(block.drop_path1) is None else None


def _fused_in_block(block: Any) -> str:
    return f"residual sum, {'' if _gate(block) is None else 'LayerScale, '}{type(block.norm2).__name__}"


def _after_attention(block: Any, x: Tensor, y: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The stream after attention, and its norm, both (B, N, C)."""
    norm, linear_follows = block.norm2, isinstance(getattr(block.mlp, "fc1", None), nn.Linear)
    rms = not isinstance(norm, nn.LayerNorm)
    bias = None if rms else norm.bias
    return residual_norm(x, block.drop_path1(y), norm.weight, bias, eps_of(norm), linear_follows, gate, rms)


@fx.wrap  # one node of a traced model
def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, linear_follows: bool,
    gate: Tensor | None, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + gate * y and its norm, both (.., C): by the op, or as timm computes them where no kernel runs the call."""
    # By itself, so that TorchScript compiles nothing below it.
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return _plain_residual_norm(x, y, weight, bias, eps, gate, rms)
    if kernel_reasons(x):
        return _plain_residual_norm(x, y, weight, bias, eps, gate, rms)
    if gate is not None:
        x = x.to(torch.promote_types(x.dtype, gate.dtype))  # that of a sum with the product
    # Under autocast the linear layer after the norm would round it to 16 bits in any case.
    dtype = dispatch.autocast_dtype(x.device) if linear_follows else None
    dtype = dtype or torch.promote_types(x.dtype, y.dtype)
    return add_layer_norm(x, y, weight, bias, eps, out_dtype=dtype, gate=gate, kind="rms" if rms else "layer")


def _plain_residual_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, gate: Tensor | None, rms: bool
) -> tuple[Tensor, Tensor]:
    x = x + (y if gate is None else y * gate)
    if rms:
        return x, F.rms_norm(x, x.shape[-1:], weight, eps)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _explain_mlp(mlp: Any, reason: Refusal | None, x: Tensor) -> None:
    dropout = None
    if mlp.drop1.training and mlp.drop1.p > 0:
        dropout = refusal("there is dropout between the layers", "the original forward runs")
    h = x.new_empty(*x.shape[:-1], mlp.fc1.out_features)
    note(mlp, gelu_linear, [reason, dropout], h, mlp.fc2.weight, mlp.fc2.bias)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Forward of timm's Mlp: x (.., C). The op has no dropout between the layers."""
    if mlp.drop1.training and mlp.drop1.p > 0:
        return mlp.swapped_from.forward(mlp, x)
    return mlp.drop2(gelu_linear(mlp.fc1(x), mlp.fc2.weight, mlp.fc2.bias))


def _explain_residual_norm(module: Any, reason: Refusal | None, hidden_states: Tensor, input_tensor: Tensor) -> None:
    norm = module.LayerNorm
    note(module, add_layer_norm, [reason], input_tensor, input_tensor, norm.weight, norm.bias, norm.eps, post_norm=True)


def _residual_norm(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """Forward of transformers' BertSelfOutput: hidden_states (.., D), input_tensor and result (.., C)."""
    y, norm = module.dropout(module.dense(hidden_states)), module.LayerNorm
    dtype = torch.promote_types(y.dtype, input_tensor.dtype)
    if dispatch.autocast_dtype(y.device) is not None:
        dtype = torch.promote_types(dtype, torch.float32)  # autocast computes the norm in float32 and returns it so
    return add_layer_norm(input_tensor, y, norm.weight, norm.bias, norm.eps, out_dtype=dtype, post_norm=True)[1]


@functools.cache
def form_of(kind: type[nn.Module]) -> Form | None:
    """The known form that a class of modules has; None for any other class."""
    code = code_of(kind)
    return next((form for known, form in _forms() if code is not None and code == code_of(known)), None)


def _forms() -> list[tuple[type[nn.Module], Form]]:
    """(class, form) of each module class of timm and transformers that an op can compute, if they are imported."""
    found: list[tuple[type[nn.Module], Form]] = []
    if "timm" in sys.modules:
        from timm.layers.mlp import Mlp
        from timm.models.eva import EvaAttention, EvaBlock
        from timm.models.vision_transformer import Block

        block = functools.partial(Form, explain=_explain_block, fused=_fused_in_block, node=False)
        mlp = Form(_mlp, _why_not_mlp, _explain_mlp, lambda _: "GELU and second linear layer")
        found += [
            (Block, block(_block, _why_not_block)),
            (EvaBlock, block(_eva_block, _why_not_eva_block)),
            (Mlp, mlp),
        ]
        form = Form(rotary.forward, rotary.why_not, rotary.explain, rotary.fused)
        found += [(kind, form) for kind in (EvaAttention, *of_timm("attention", "AttentionRope"))]
    if "transformers" in sys.modules:
        from transformers.models.bert.modeling_bert import BertSelfOutput

        fused = "residual sum, LayerNorm"
        form = Form(_residual_norm, _why_not_residual_norm, _explain_residual_norm, lambda _: fused)
        found.append((BertSelfOutput, form))
    return found


@functools.cache
def code_of(kind: type[nn.Module]) -> str | None:
    """Statements and argument names of a class's forward, without comments and types; None without source."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    names = [argument.arg for argument in function.args.args]
    return ast.dump(ast.Module([*body], [])) + repr(names)
