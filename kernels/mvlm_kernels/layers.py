"""Ops as layers: ``nn.Module`` with the parameters and state dicts of torch's own.

A layer holds parameters and calls one op, whose documentation holds for it. :func:`mvlm_kernels.explain_model` says
which calls of a model's layers the kernels compute.

Shape legend: B batch, Lq and Lk rows, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.arguments import check_int
from mvlm_kernels.cross_attention import cross_attention
from mvlm_kernels.cross_attention.arguments import dropout_of
from mvlm_kernels.gelu_linear import gelu_linear

__all__ = ["AddLayerNorm", "CrossAttention", "GeluLinear"]


@dataclass
class OpArguments:
    """Arguments of the op that a layer calls, by position and by name."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self) -> Any:
        return self.op(*self.args, **self.kwargs)


class CrossAttention(nn.Module):
    """Multi-head attention of a stream to a context by :func:`mvlm_kernels.cross_attention`, with its projections.

    Args:
        width: C of the stream, and of the output.
        heads: query heads.
        context_width: of the context; the stream's by default.
        kv_heads: heads of keys and values, ``heads`` or a divisor of it.
        head_width: of each head, ``width // heads`` by default.
        bias: of the four projections.
        dropout: of the probabilities, in training.

    Parameters are those of four ``nn.Linear``: ``q``, ``k``, ``v`` and ``out``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        kv_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width, heads = check_int("width", width, 1), check_int("heads", heads, 1)
        if head_width is None and width % heads:
            raise ValueError(f"width must be divisible by heads, got {width} and {heads}; or give head_width")
        kv_heads = heads if kv_heads is None else check_int("kv_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
        self.heads, self.kv_heads = heads, kv_heads
        self.head_width = width // heads if head_width is None else check_int("head_width", head_width, 1)
        self.dropout, _ = dropout_of(dropout, None, torch.device("cpu"))
        context_width = width if context_width is None else check_int("context_width", context_width, 1)
        self.q = nn.Linear(width, heads * self.head_width, bias)
        self.k = nn.Linear(context_width, self.kv_heads * self.head_width, bias)
        self.v = nn.Linear(context_width, self.kv_heads * self.head_width, bias)
        self.out = nn.Linear(heads * self.head_width, width, bias)

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> "CrossAttention":
        """Layer with copies of the weights of ``nn.MultiheadAttention``, in its training mode.

        Its inputs are (B, L, C) whatever ``batch_first`` was. Raises ValueError for bias_kv, add_zero_attn, and values
        of another width than keys.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(f"attention must be an nn.MultiheadAttention, got {type(attention).__name__}")
        if attention.bias_k is not None or attention.add_zero_attn or attention.kdim != attention.vdim:
            raise ValueError(
                "attention must have no add_bias_kv, no add_zero_attn and kdim == vdim, got "
                f"{attention.bias_k is not None}, {attention.add_zero_attn}, {attention.kdim} and {attention.vdim}"
            )
        weight = attention.in_proj_weight
        if weight is None:
            weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        else:
            weights = weight.chunk(3)
        bias = attention.in_proj_bias
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            context_width=attention.kdim,
            bias=bias is not None,
            dropout=attention.dropout,
        ).to(weights[0])
        state = {f"{name}.weight": x for name, x in zip("qkv", weights, strict=True)}
        if bias is not None:
            state |= {f"{name}.bias": x for name, x in zip("qkv", bias.chunk(3), strict=True)}
        state |= {f"out.{name}": x for name, x in attention.out_proj.state_dict().items()}
        made.load_state_dict(state)
        return made.train(attention.training)

    def forward(self, x: Tensor, context: Tensor | None = None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from x (B, Lq, C) to context (B, Lk, context_width), or to x itself; returns x's shape.

        Either may be packed (rows, C) with ``cu_seqlens_q`` and ``cu_seqlens_k``. options: of
        :func:`mvlm_kernels.cross_attention`, such as key_lengths, key_mask (True = the key exists), key_index and
        seed; with return_lse also returns the log-sum-exp. Raises TypeError for an argument of torch's
        attention, with what to pass instead, and for dropout_p, which is the layer's.
        """
        found = self.op_arguments(x, context, **options).call()
        if options.get("return_lse"):
            return self.out(found[0].flatten(-2)), found[1]
        return self.out(found.flatten(-2))

    def op_arguments(self, x: Tensor, context: Tensor | None = None, **options: Any) -> OpArguments:
        """Arguments of :func:`mvlm_kernels.cross_attention` for those of :meth:`forward`."""
        if "dropout_p" in options:
            raise TypeError("dropout_p is an argument of the layer: CrossAttention(..., dropout=...)")
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (self.heads, self.head_width))
        k = self.k(context).unflatten(-1, (self.kv_heads, self.head_width))
        v = self.v(context).unflatten(-1, (self.kv_heads, self.head_width))
        dropout = self.dropout if self.training else 0.0
        return OpArguments(cross_attention, (q, k, v), {"dropout_p": dropout, **options})

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, dropout={self.dropout}"


class AddLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` or ``nn.RMSNorm`` of a residual sum by :func:`mvlm_kernels.add_layer_norm`, with its state dict.

    Args:
        width: C.
        eps: added to the variance, or to the mean square.
        kind: "layer", or "rms", which has no bias.
        elementwise_affine: whether the norm has a weight and, if it is a LayerNorm, a bias. Off for AdaLN.
        post_norm: the stream continues with the norm and not with the sum.
        out_dtype: of the norm; that of the summand by default.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        kind: Literal["layer", "rms"] = "layer",
        elementwise_affine: bool = True,
        post_norm: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        if kind not in ("layer", "rms"):
            raise ValueError(f'kind must be "layer" or "rms", got {kind!r}')
        super().__init__(width, eps, elementwise_affine, bias=kind == "layer")
        self.kind, self.post_norm, self.out_dtype = kind, post_norm, out_dtype

    def forward(  # type: ignore[override]
        self, input: Tensor, y: Tensor | None = None, y_bias: Tensor | None = None, **modulation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stream input (.., C) and what a sub-layer adds, y (.., C) or None -> the new stream and its norm.

        modulation: gate, scale and shift of :func:`mvlm_kernels.add_layer_norm`, for LayerScale and AdaLN.
        """
        return self.op_arguments(input, y, y_bias, **modulation).call()

    def op_arguments(
        self, input: Tensor, y: Tensor | None = None, y_bias: Tensor | None = None, **modulation: Tensor
    ) -> OpArguments:
        """Arguments of :func:`mvlm_kernels.add_layer_norm` for those of :meth:`forward`."""
        own = {"y_bias": y_bias, "out_dtype": self.out_dtype, "post_norm": self.post_norm, "kind": self.kind}
        return OpArguments(add_layer_norm, (input, y, self.weight, self.bias, self.eps), own | modulation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}, post_norm={self.post_norm}"


class GeluLinear(nn.Linear):
    """``nn.GELU`` and ``nn.Linear`` by :func:`mvlm_kernels.gelu_linear`, with the state dict of the linear layer."""

    def forward(self, input: Tensor, h_bias: Tensor | None = None) -> Tensor:
        """input (.., in_features), without the bias h_bias (in_features,) if that is given -> (.., out_features)."""
        return self.op_arguments(input, h_bias).call()

    def op_arguments(self, input: Tensor, h_bias: Tensor | None = None) -> OpArguments:
        """Arguments of :func:`mvlm_kernels.gelu_linear` for those of :meth:`forward`."""
        return OpArguments(gelu_linear, (input, self.weight, self.bias), {"h_bias": h_bias})
