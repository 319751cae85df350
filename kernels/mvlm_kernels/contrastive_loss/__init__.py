"""Contrastive loss of images and captions without their logits in memory; see :func:`contrastive_loss`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import check_flag, check_id_values, check_tensor, compute_dtype
from mvlm_kernels.contrastive_loss import reference
from mvlm_kernels.dispatch import FLOAT64, NO_TF32, Refusal

__all__ = ["ContrastiveTerms", "contrastive_loss", "contrastive_terms"]


class ContrastiveTerms(NamedTuple):
    """Terms of the loss of n rows and G columns. Of columns it has what these rows know, which ranks merge."""

    rows: Tensor
    """(n,). InfoNCE: log-sum-exp of each row, minus what both directions give to its right pairs. Sigmoid: all of it.
    float32 or float64, as all that is floating here. Differentiable."""
    columns: Tensor
    """(G,), log-sum-exp of each column over these rows, for InfoNCE; zeros for the sigmoid loss. Differentiable."""
    row_best: Tensor
    """(2, n), largest logit of each row, and largest of its right pairs. The row is correct if they are equal."""
    column_best: Tensor
    """(2, G), the same of each column over these rows; -inf where there is no right pair."""
    drawn: Tensor
    """int64 (n,), column drawn by each row; the row's own where no pair may be drawn, and without noise."""
    column_score: Tensor
    """(G,), largest sum of logit and noise of each column over these rows; -inf where no pair may be drawn."""
    column_drawn: Tensor
    """int64 (G,), row with this sum, by its number in `rows`; the column's own where no pair may be drawn."""


def _reasons(image: Tensor, text: Tensor) -> tuple[Refusal, ...]:
    found = dispatch.reasons_for("contrastive_terms", image.device)
    if image.device.type == "cuda":
        dtype = image.dtype if image.dtype == text.dtype else compute_dtype(image.dtype, text.dtype)
        if dtype == torch.float64:
            found = (*found, FLOAT64)
        elif dtype == torch.float32 and not dispatch.tf32_allowed():
            found = (*found, NO_TF32)
    return found


def _check_call(**arguments: Any) -> None:
    given = {name: arguments.get(name) for name in ("image", "text", "log_scale", "bias")}
    ids = {name: arguments.get(name) for name in ("rows", "image_id", "text_id", "noise_keys")}
    _check(**given, ids=ids, shared_positives=arguments["shared_positives"])


@dispatch.explained_by(_reasons, _check_call)
def contrastive_terms(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    image_id: Tensor | None = None,
    text_id: Tensor | None = None,
    shared_positives: bool = False,
    noise_keys: Tensor | None = None,
) -> ContrastiveTerms:
    """Compute all that a contrastive loss needs of the logits ``exp(log_scale) * image @ text.T``, in one pass.

    For a rank that has n of G pairs: its images are the rows, and the captions of all ranks the columns. Each block of
    logits is computed once forward and once backward, for both directions. Four products in all are 8 n G E FLOPs;
    logits in both directions, each with a backward pass of its own, are 12, and 16 if they are not kept.

    Args:
        image: (n, E), text: (G, E), floating, usually of unit length.
        log_scale: (1,) or (), logarithm of 1 / temperature.
        bias: of the shape of log_scale, for the sigmoid loss (SigLIP, Zhai et al., 2023); None for InfoNCE.
        rows: int64 (n,), distinct numbers of the rows' own pairs: row i belongs to column rows[i]. None: i.
        image_id, text_id: int64 (G,), equal for pairs of one image, or text. Such pairs match, and are not drawn.
        shared_positives: all matching pairs are right, and share the target of a row equally (ALBEF). Otherwise its own
            pair alone is right.
        noise_keys: int64 (2,), :func:`.noise.noise_key` of rows and of columns, to draw hard negatives: each row draws
            a column that does not match it, and each column a row, with the probabilities of softmax (Gumbel-argmax).

    Differentiable once, in image, text, log_scale and bias. Logits are float32 (float64), under autocast too. Products
    of float32 follow torch's setting for TF32. On a GPU those of bfloat16 have float32 sums, and round the logits'
    gradients to bfloat16; on a CPU they are in float32. Sums have a fixed order. Torch runs on every device.

    Raises:
        ValueError: for an argument of another kind, and a wrong rank, shape, dtype, device or number of a row.
    """
    if rows is None and isinstance(image, Tensor):
        rows = torch.arange(image.shape[0], device=image.device)
    ids = {"rows": rows, "image_id": image_id, "text_id": text_id, "noise_keys": noise_keys}
    shared = _check(image, text, log_scale, bias, ids, shared_positives)
    learns = any(x is not None and x.requires_grad for x in (image, text, log_scale, bias))
    terms, columns, _, *others = _op.on(image, text, log_scale, learns=learns)(
        image, text, log_scale, bias, rows, image_id, text_id, shared, noise_keys
    )
    return ContrastiveTerms(terms, columns, *others)


@dispatch.explained_by(_reasons, _check_call)
def contrastive_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    *,
    bias: Tensor | None = None,
    image_id: Tensor | None = None,
    text_id: Tensor | None = None,
    shared_positives: bool = False,
) -> Tensor:
    """Contrastive loss of B images and their B captions, without a (B, B) tensor: a scalar, float32 or float64.

    InfoNCE is the mean of both directions. With a bias it is the sigmoid loss, the sum over all pairs divided by B. It
    is worth it from some thousand pairs on: at few, kept logits need no second product in the backward pass.

    Arguments, gradients and errors are those of :func:`contrastive_terms`, with all captions for all images.
    """
    ids: dict[str, Any] = {"image_id": image_id, "text_id": text_id, "shared_positives": shared_positives}
    terms = contrastive_terms(image, text, log_scale, bias=bias, **ids)
    if len(image) != len(text):
        raise ValueError(f"text must have as many rows as image, {len(image)}, got {len(text)}")
    return terms.rows.mean() if bias is not None else (terms.rows.mean() + terms.columns.mean()) / 2


def _check(
    image: Any, text: Any, log_scale: Any, bias: Any, ids: dict[str, Any], shared_positives: Any
) -> bool:  # fmt: skip
    """Check the arguments, and return shared_positives as a bool."""
    shared = check_flag("shared_positives", shared_positives)
    check_tensor("image", image)
    for name, x in {"text": text, "log_scale": log_scale, "bias": bias}.items():
        if x is not None or name != "bias":
            check_tensor(name, x, device=image.device)
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"text must be (G, E) and image (n, E), got {tuple(text.shape)} and {tuple(image.shape)}")
    for name, x in {"log_scale": log_scale, "bias": bias}.items():
        if x is not None and x.numel() != 1:
            raise ValueError(f"{name} must have one value, got shape {tuple(x.shape)}")
    if image.shape[0] > text.shape[0]:
        raise ValueError(f"text must have a row for each row of image, {image.shape[0]}, got {text.shape[0]}")
    wanted = {"rows": image.shape[0], "image_id": text.shape[0], "text_id": text.shape[0], "noise_keys": 2}
    for name, x in ids.items():
        if x is not None:
            check_tensor(name, x, (torch.int64,), image.device)
            if x.shape != (wanted[name],):
                raise ValueError(f"{name} must be ({wanted[name]},), got {tuple(x.shape)}")
    if shared and ids["image_id"] is None and ids["text_id"] is None:
        raise ValueError("shared_positives must be False without image_id and text_id, got True")
    return shared


def _forward(image, text, log_scale, bias, rows, image_id, text_id, shared, keys):
    if dispatch.checks_values(image.device):
        check_id_values("rows", rows, text.shape[0])
        if len(rows.unique()) < len(rows):
            raise ValueError("rows must be distinct, got some number twice")
    args = image, text, log_scale, bias, rows, image_id, text_id, shared, keys
    return _run("forward", image, text, args)


def _run(name: str, image: Tensor, text: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """A pass on the backend that is chosen. name: "forward" or "backward"."""
    by_torch = getattr(reference, name)
    with dispatch.without_autocast(image.device):
        if dispatch.choose(_reasons(image, text)) == "torch":
            return by_torch(*args)
        from mvlm_kernels.contrastive_loss import triton

        return dispatch.run_kernels(("contrastive_terms", image.device), getattr(triton, name), by_torch, *args)


def _forward_fake(image, text, log_scale, bias, rows, image_id, text_id, shared, keys):
    def floats(*shape):
        return image.new_empty(shape, dtype=compute_dtype(image.dtype, text.dtype))

    (n, _), (total, _) = image.shape, text.shape
    drawn, column_drawn = rows.new_empty(n), rows.new_empty(total)
    return floats(n), floats(total), floats(n), floats(2, n), floats(2, total), drawn, floats(total), column_drawn


def _backward(grad, column_grad, image, text, log_scale, bias, rows, image_id, text_id, shared, lse, column_lse):
    args = grad, column_grad, image, text, log_scale, bias, rows, image_id, text_id, shared, lse, column_lse
    return _run("backward", image, text, args)


def _backward_fake(grad, column_grad, image, text, log_scale, bias, rows, image_id, text_id, shared, lse, column_lse):
    return *(x.new_empty(x.shape) for x in (image, text, log_scale)), lse.new_empty(log_scale.shape)


class _ContrastiveTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, image, text, log_scale, bias, rows, image_id, text_id, shared, keys):
        terms, columns, lse, *others = forward(image, text, log_scale, bias, rows, image_id, text_id, shared, keys)
        # A copy of the columns, because a caller may write to an output.
        ctx.save_for_backward(image, text, log_scale, bias, rows, image_id, text_id, lse, columns.clone())
        ctx.shared = shared
        ctx.mark_non_differentiable(lse, *others)
        return terms, columns, lse, *others

    @staticmethod
    def backward(ctx, grad, column_grad, *_):
        *inputs, lse, columns = ctx.saved_tensors
        image, bias = inputs[0], inputs[3]
        op = _backward_op.in_function(grad, column_grad, image)
        *found, d_bias = op(grad, column_grad, *inputs, ctx.shared, lse, columns)
        return None, *found, None if bias is None else d_bias.to(bias.dtype).reshape(bias.shape), *(None,) * 5


_backward_op = registration.define(
    "contrastive_terms_backward(Tensor grad, Tensor column_grad, Tensor image, Tensor text, Tensor log_scale, "
    "Tensor? bias, Tensor rows, Tensor? image_id, Tensor? text_id, bool shared, Tensor lse, Tensor column_lse) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    registration.no_second_derivative("contrastive_loss", "torch.nn.functional.cross_entropy of logits"),
)
_op = registration.define(
    "contrastive_terms(Tensor image, Tensor text, Tensor log_scale, Tensor? bias, Tensor rows, Tensor? image_id, "
    "Tensor? text_id, bool shared, Tensor? keys) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _ContrastiveTerms,
)
