"""Residual norms and feed-forward layers of timm and transformers blocks by ``add_layer_norm`` and ``gelu_linear``.

from mvlm_kernels.integrations.blocks import swap_blocks
print(swap_blocks(model))               # what was swapped, and what not and why; `undo()` puts everything back

Three forms are known, by the code of their ``forward``, so copies in other classes are known too:

- timm's ``Block``: the residual sum after attention and the norm after it are one call.
- timm's ``Mlp``: GELU and the second linear layer are one call, whose backward pass has one kernel for the GELU.
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
from mvlm_kernels.add_layer_norm import WIDEST
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, OTHER_FORWARD, Part, SwapReport, listening, note
from mvlm_kernels.integrations.classes import in_torchscript, node_of_call, put_back, scripted_as, traced

__all__ = ["swap_blocks"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Form:
    """A form of module that an op can compute.

    forward: the fused forward. why_not: reason why it cannot replace this module's own; None if it can. explain: gives
    `calls.note` the op's arguments for a call of the module, and that reason. node: torch.fx does not look into the
    module, whose calls are one node each.
    """

    forward: Callable[..., Tensor]
    why_not: Callable[[Any], Refusal | None]
    explain: Callable[..., None]
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
        parts.append(Part(path, type(module).__name__, reason))
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
    """Subclass with the fused forward, of a class of a known form; by the names of that class."""
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


def why_not_replaced(module: nn.Module, *kinds: type[nn.Module]) -> Refusal | None:
    """Reason why a module's parameters cannot be used without calling it: wrapped, another class, or hooks."""
    if type(module) not in kinds:
        return refusal(
            f"wanted {' or '.join(dict.fromkeys(kind.__name__ for kind in kinds))}, got {type(module).__name__}",
            f"the original forward runs; unwrap it if it is a wrapped {kinds[0].__name__}",
        )
    if any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module):
        return refusal(f"its {type(module).__name__} has hooks", "the original forward calls them; remove them")
    return None


def _why_not_block(block: Any) -> Refusal | None:
    return _why_not_norm(block.norm2)


def _why_not_residual_norm(module: Any) -> Refusal | None:
    return _why_not_norm(module.LayerNorm)


def _why_not_norm(norm: Any) -> Refusal | None:
    reason = why_not_replaced(norm, nn.LayerNorm, *_timm_norms())
    if reason is not None:
        return reason
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        reason = f"the norm must have weight and bias over the last axis, got {norm}"
        return refusal(reason, "the original forward runs; give the norm both")
    if norm.normalized_shape[0] > WIDEST:
        reason = f"a row of the norm has {norm.normalized_shape[0]} values, the kernel holds at most {WIDEST}"
        return refusal(reason, "the original forward runs; use rows of at most that width")
    if getattr(norm, "_fast_norm", False):
        return refusal("timm's fast norm is on", "call timm.layers.set_fast_norm(False) before building the model")
    return None


def _timm_norms() -> tuple[type[nn.Module], ...]:
    return (sys.modules["timm.layers.norm"].LayerNorm,) if "timm.layers.norm" in sys.modules else ()


def _timm_gelus() -> tuple[type[nn.Module], ...]:
    """Class of timm that computes the exact GELU, as ``nn.GELU()`` does; it takes an ``inplace`` that it ignores."""
    return (sys.modules["timm.layers.activations"].GELU,) if "timm.layers.activations" in sys.modules else ()


def _why_not_mlp(mlp: Any) -> Refusal | None:
    for part, kinds in (
        (mlp.fc2, (nn.Linear,)),
        (mlp.norm, (nn.Identity,)),
        (mlp.drop1, (nn.Dropout,)),
        (mlp.act, (nn.GELU, *_timm_gelus())),
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
    y = block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))
    norm, linear_follows = block.norm2, isinstance(getattr(block.mlp, "fc1", None), nn.Linear)
    x, n = residual_norm(x, y, norm.weight, norm.bias, norm.eps, linear_follows)
    return x + block.drop_path2(block.ls2(block.mlp(n)))


def _explain_block(block: Any, reason: Refusal | None, x: Tensor, *_: Any, **__: Any) -> None:
    norm = block.norm2
    note(block, add_layer_norm, [reason], x, x, norm.weight, norm.bias, norm.eps)


@fx.wrap  # one node of a traced model
def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, linear_follows: bool
) -> tuple[Tensor, Tensor]:
    """x + y and its layer norm, both (.., C): by the op, or as timm computes them where no kernel runs the call."""
    # By itself, so that TorchScript compiles nothing below it.
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return _plain_residual_norm(x, y, weight, bias, eps)
    if kernel_reasons(x):
        return _plain_residual_norm(x, y, weight, bias, eps)
    # Under autocast the linear layer after the norm would round it to 16 bits in any case.
    dtype = dispatch.autocast_dtype(x.device) if linear_follows else None
    return add_layer_norm(x, y, weight, bias, eps, out_dtype=dtype or torch.promote_types(x.dtype, y.dtype))


def _plain_residual_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


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
    """Known classes of the libraries that are imported."""
    found: list[tuple[type[nn.Module], Form]] = []
    if "timm" in sys.modules:
        from timm.layers.mlp import Mlp
        from timm.models.vision_transformer import Block

        block = Form(_block, _why_not_block, _explain_block, node=False)
        found += [(Block, block), (Mlp, Form(_mlp, _why_not_mlp, _explain_mlp))]
    if "transformers" in sys.modules:
        from transformers.models.bert.modeling_bert import BertSelfOutput

        form = Form(_residual_norm, _why_not_residual_norm, _explain_residual_norm)
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
