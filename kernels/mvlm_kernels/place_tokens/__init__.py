"""Placement of mask tokens, position embeddings and [CLS] in one pass; see :func:`place_tokens`."""

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import check_flag, check_id_values, check_ids, check_tensor
from mvlm_kernels.dispatch import Refusal
from mvlm_kernels.place_tokens import reference

__all__ = ["place_tokens"]


def _reasons(tokens: Tensor) -> tuple[Refusal, ...]:
    return dispatch.reasons_for("place_tokens", tokens.device)


def _checked(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor, masked: Tensor | None,
    visible_ids: Tensor | None, with_unmasked: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:  # fmt: skip
    """Check the arguments.

    Returns tokens (B, N or K, C), mask_token (C,), pos_embed (1+N, C) and cls_token (C,), and with_unmasked as a bool.
    """
    check_tensor("tokens", tokens)
    device = tokens.device
    if cls_token is None:
        way_out = "a model without [CLS] can pass zeros and drop row 0 of the result"
        raise ValueError(f"cls_token must be a tensor, got None; {way_out}")
    check_tensor("pos_embed", pos_embed, device=device)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must have shape (B, N, C), got {tuple(tokens.shape)}")
    batch, given, width = tokens.shape
    mask_token = _row("mask_token", mask_token, width, device)
    cls_token = _row("cls_token", cls_token, width, device)
    if pos_embed.ndim == 3 and pos_embed.shape[0] == 1:
        pos_embed = pos_embed[0]
    if pos_embed.ndim != 2 or pos_embed.shape[0] < 1 or pos_embed.shape[1] != width:
        raise ValueError(f"pos_embed must have shape (1+N, {width}) or (1, 1+N, {width}), got {tuple(pos_embed.shape)}")
    num_patches = pos_embed.shape[0] - 1
    if check_flag("with_unmasked", with_unmasked) and masked is None:
        raise ValueError("masked must be given where with_unmasked is True, got None")
    if visible_ids is None:
        if given != num_patches:
            raise ValueError(
                f"tokens must have N = {num_patches} rows, as pos_embed has 1+N, got {tuple(tokens.shape)}"
            )
        if masked is not None:
            check_tensor("masked", masked, (torch.bool,), device)
            if masked.shape != (batch, num_patches):
                raise ValueError(f"masked must have shape {batch, num_patches}, got {tuple(masked.shape)}")
    else:
        if masked is not None:
            raise ValueError("masked must be None where visible_ids is given, got both")
        check_ids("visible_ids", visible_ids, batch, "tokens", device)
        if visible_ids.shape[1] != given or given > num_patches:
            raise ValueError(
                f"visible_ids must have one id for each of the {given} tokens and at most N = {num_patches}, "
                f"got {tuple(visible_ids.shape)}"
            )
    return tokens, mask_token, pos_embed, cls_token, bool(with_unmasked)


def _row(name: str, x: Tensor, width: int, device: torch.device) -> Tensor:
    """x of shape (C,) or (1, 1, C) as (C,). Raises ValueError for another one, or another shape."""
    check_tensor(name, x, device=device)
    if x.shape not in ((width,), (1, 1, width)):
        raise ValueError(f"{name} must have shape ({width},) or (1, 1, {width}), got {tuple(x.shape)}")
    return x[0, 0] if x.ndim == 3 else x


@dispatch.explained_by(_reasons, _checked)
def place_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    *,
    masked: Tensor | None = None,
    visible_ids: Tensor | None = None,
    with_unmasked: bool = False,
) -> Tensor:
    """Input sequence of a masked vision transformer: [CLS], tokens or mask tokens, plus position embeddings.

    ``out[:, 0] = cls_token + pos_embed[0]``; ``out[:, 1+n] = (tokens[:, n] or mask_token) + pos_embed[1+n]``. Tokens
    are read once, in place.

    Args:
        tokens: floating, of any strides: (B, N, C), one token per patch, or with visible_ids (B, K, C).
        mask_token, cls_token: (C,) or (1, 1, C), floating.
        pos_embed: (1+N, C) or (1, 1+N, C), floating; the row of [CLS] is first.
        masked: bool (B, N), True = the patch is replaced by the mask token; None replaces no patch. The kernels read a
            column at a time: a mask with strides (1, B), such as the transpose of an (N, B) mask, saves them a copy.
        visible_ids: int32 or int64 (B, K), the patches of the given tokens, distinct within a row. All other patches
            become mask tokens (MAE's decoder input). Not together with masked.
        with_unmasked: also return the sequences in which no patch is masked, in front of the masked ones and in one
            pass over the tokens. Needs masked.

    Returns:
        (B, 1+N, C), or (2B, 1+N, C) with_unmasked; contiguous, in the dtype that torch promotes the four tensors to:
        float32 for bfloat16 tokens with float32 parameters, as under autocast. Sums are in float32 (float64 for
        float64) and round once.

    Differentiable in the four tensors, once. Gradients of the three parameters are summed over the batch in a fixed
    order, without atomics. On the CPU the op is composed of torch ops. Ids are checked on the CPU, and on a GPU with
    MVLM_KERNELS_DEBUG=1. Without the check a bad or repeated id leaves its row of the gradient undefined; nothing is
    read or written out of bounds.

    Raises:
        ValueError: for an argument of another kind, a wrong rank, shape, dtype, device or id, masked together with
            visible_ids, and with_unmasked without masked.
    """
    *rows, both = _checked(tokens, mask_token, pos_embed, cls_token, masked, visible_ids, with_unmasked)
    return _op.on(*rows)(*rows, masked, visible_ids, both)


def _check_visible(visible_ids: Tensor | None, num_patches: int) -> None:
    if visible_ids is None or not dispatch.checks_values(visible_ids.device):
        return
    check_id_values("visible_ids", visible_ids, num_patches)
    ordered = visible_ids.sort(dim=1).values
    repeated = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if repeated.numel():
        raise ValueError(f"visible_ids must be distinct within a row, got {int(repeated[0])} more than once")


def _forward(tokens, mask_token, pos_embed, cls_token, masked, visible_ids, both):
    _check_visible(visible_ids, pos_embed.shape[0] - 1)
    args = tokens, mask_token, pos_embed, cls_token, masked, visible_ids, both
    if dispatch.choose(_reasons(tokens)) == "torch":
        return reference.place_tokens(*args)
    from mvlm_kernels.place_tokens import triton

    return dispatch.run_kernels(("place_tokens", tokens.device), triton.place_tokens, reference.place_tokens, *args)


def _forward_fake(tokens, mask_token, pos_embed, cls_token, masked, visible_ids, both):
    dtype = reference.output_dtype(tokens, mask_token, pos_embed, cls_token)
    return tokens.new_empty(tokens.shape[0] * (2 if both else 1), pos_embed.shape[0], tokens.shape[2], dtype=dtype)


def _backward(grad, masked, visible_ids, both, num_tokens, tokens_dtype, mask_dtype, pos_dtype, cls_dtype, needs):
    dtypes = tokens_dtype, mask_dtype, pos_dtype, cls_dtype
    args = grad, masked, visible_ids, both, num_tokens, dtypes, tuple(needs)
    if dispatch.choose(_reasons(grad)) == "torch":
        return reference.place_tokens_backward(*args)
    from mvlm_kernels.place_tokens import triton

    by_triton, by_torch = triton.place_tokens_backward, reference.place_tokens_backward
    return dispatch.run_kernels(("place_tokens", grad.device), by_triton, by_torch, *args)


def _backward_fake(grad, masked, visible_ids, both, num_tokens, tokens_dtype, mask_dtype, pos_dtype, cls_dtype, needs):
    sequences, positions, width = grad.shape
    batch = sequences // 2 if both else sequences
    shapes = (batch, num_tokens, width), (width,), (positions, width), (width,)
    dtypes = tokens_dtype, mask_dtype, pos_dtype, cls_dtype
    return tuple(
        grad.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


class _PlaceTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, tokens, mask_token, pos_embed, cls_token, masked, visible_ids, both):
        # The tokens are not saved: the backward pass does not need them, and they would stay in memory until then.
        ctx.save_for_backward(masked, visible_ids)
        ctx.num_tokens, ctx.both = tokens.shape[1], both
        ctx.dtypes = tokens.dtype, mask_token.dtype, pos_embed.dtype, cls_token.dtype
        return forward(tokens, mask_token, pos_embed, cls_token, masked, visible_ids, both)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:5]
        if not any(needs):
            return (None,) * 8
        grads = _backward_op.in_function(grad)(grad, *ctx.saved_tensors, ctx.both, ctx.num_tokens, *ctx.dtypes, needs)
        return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


_backward_op = registration.define(
    "place_tokens_backward(Tensor grad, Tensor? masked, Tensor? visible_ids, bool both, SymInt num_tokens, "
    "ScalarType tokens_dtype, ScalarType mask_dtype, ScalarType pos_dtype, ScalarType cls_dtype, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    registration.no_second_derivative("place_tokens", "torch.where and torch.cat"),
)
_op = registration.define(
    "place_tokens(Tensor tokens, Tensor mask_token, Tensor pos_embed, Tensor cls_token, Tensor? masked, "
    "Tensor? visible_ids, bool both) -> Tensor",
    _forward,
    _forward_fake,
    _PlaceTokens,
)
