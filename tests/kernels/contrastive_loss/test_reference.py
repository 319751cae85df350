# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportArgumentType=false, reportCallIssue=false
"""Contrastive terms against explicit numpy in float64, in blocks of every kind; precision, memory and refusals."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm_kernels import ContrastiveTerms, contrastive_loss, contrastive_terms
from mvlm_kernels.contrastive_loss import reference
from mvlm_kernels.contrastive_loss.noise import gumbel_noise, noise_key

BLOCKS = pytest.mark.parametrize("logits, rows", [(1, 1), (15, 4), (1 << 18, 1024)])
"""Logits and most rows of a block: one logit; no divisor of any size; all at once."""
VARIANTS = pytest.mark.parametrize("sigmoid", [False, True])
SHARED = pytest.mark.parametrize("shared", [False, True])
PAIRS, WIDTH = 13, 5


@pytest.fixture
def block(monkeypatch, logits, rows):
    monkeypatch.setattr(reference, "BLOCK", {"cpu": logits})
    monkeypatch.setattr(reference, "ROWS", rows)


def inputs(sigmoid: bool, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors that learn, and ids: some images have several captions, and some captions several images."""
    draw = np.random.default_rng(5)
    arrays = [draw.normal(size=(PAIRS, WIDTH)) for _ in range(2)]
    values = dict(zip(("image", "text"), (x / np.linalg.norm(x, axis=1, keepdims=True) for x in arrays), strict=True))
    values |= {"log_scale": np.array([1.9])} | ({"bias": np.array([-1.3])} if sigmoid else {})
    ids = {"image_id": draw.integers(0, 8, PAIRS), "text_id": draw.integers(0, 10, PAIRS)}
    leaves = {name: torch.tensor(x).to(dtype).requires_grad_() for name, x in values.items()}
    return leaves, {name: torch.tensor(x) for name, x in ids.items()}


def in_numpy(leaves: dict[str, Tensor], ids: dict[str, Tensor], shared: bool) -> tuple[float, dict[str, Any]]:
    """Loss and gradients from their definitions, pair by pair."""
    image, text, log_scale, *bias = (x.detach().double().numpy() for x in leaves.values())
    image_id, text_id = (x.numpy() for x in ids.values())
    scale, number = math.exp(log_scale[0]), len(image)
    logits = np.array([[scale * sum(a * b for a, b in zip(u, v, strict=True)) for v in text] for u in image])
    right = np.eye(number)
    if shared:
        right = np.array([[float(image_id[i] == image_id[j] or text_id[i] == text_id[j]) for j in range(number)]
                          for i in range(number)])  # fmt: skip
    loss, slope = 0.0, np.zeros((number, number))
    if bias:
        for i in range(number):
            for j in range(number):
                sign = 2 * right[i, j] - 1
                loss += math.log1p(math.exp(-sign * (logits[i, j] + bias[0][0]))) / number
                slope[i, j] = -sign / (1 + math.exp(sign * (logits[i, j] + bias[0][0]))) / number
    else:
        for x, y, d in ((logits, right, slope), (logits.T, right.T, slope.T)):
            for i in range(number):
                p, target = np.exp(x[i]) / np.exp(x[i]).sum(), y[i] / y[i].sum()
                loss -= (target * np.log(p)).sum() / (2 * number)
                d[i] += (p - target) / (2 * number)
    gradients = {"image": scale * slope @ text, "text": scale * slope.T @ image, "log_scale": [(slope * logits).sum()]}
    return loss, gradients | ({"bias": [slope.sum()]} if bias else {})


def assert_gradients(leaves: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    for name, x in leaves.items():
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), wanted[name], rtol=0, atol=1e-13, err_msg=name)


@BLOCKS
@VARIANTS
@SHARED
def test_loss_and_gradients_against_numpy(block, sigmoid, shared):
    leaves, ids = inputs(sigmoid)
    loss = contrastive_loss(**leaves, **ids, shared_positives=shared)
    loss.backward()
    wanted, gradients = in_numpy(leaves, ids, shared)
    assert loss.item() == pytest.approx(wanted, abs=1e-13)
    assert_gradients(leaves, gradients)


@BLOCKS
@VARIANTS
@SHARED
def test_terms_of_two_ranks_give_the_loss_of_all_pairs(block, sigmoid, shared):
    """Each has some rows, in no order of numbers, and all columns. The columns' exponentials add up."""
    leaves, ids = inputs(sigmoid)
    mixed = torch.tensor([4, 1, 12, 0, 7, 9, 3, 2, 11, 5, 10, 8, 6])
    of_ranks = []
    for rows in mixed.split(5):
        given = leaves | ids | {"image": leaves["image"][rows], "rows": rows}
        of_ranks.append(contrastive_terms(**given, shared_positives=shared))
    rows = torch.cat([terms.rows for terms in of_ranks]).sum()
    columns = torch.stack([terms.columns for terms in of_ranks]).logsumexp(0).sum()
    loss = rows / PAIRS if sigmoid else (rows + columns) / (2 * PAIRS)
    loss.backward()
    wanted, gradients = in_numpy(leaves, ids, shared)
    assert loss.item() == pytest.approx(wanted, abs=1e-13)
    assert_gradients(leaves, gradients)


@BLOCKS
@SHARED
def test_draws_and_largest_logits_are_those_of_whole_rows_and_columns(block, shared):
    leaves, ids = inputs(False)
    rows, width = torch.tensor([3, 12, 0, 8]), torch.arange(PAIRS)
    keys = torch.stack([noise_key(7, 3, direction, rows.device) for direction in (0, 1)])
    given = leaves | {"image": leaves["image"][rows]}
    found = contrastive_terms(**given, **ids, rows=rows, noise_keys=keys, shared_positives=shared)
    logits = given["image"] @ leaves["text"].T * leaves["log_scale"].exp()
    matches = (ids["image_id"][rows, None] == ids["image_id"]) | (ids["text_id"][rows, None] == ids["text_id"])
    noisy = [logits + gumbel_noise(keys[0], rows[:, None], width), logits + gumbel_noise(keys[1], width, rows[:, None])]
    of_rows, of_columns = (x.detach().masked_fill(matches, -math.inf) for x in noisy)
    assert torch.equal(found.drawn, of_rows.argmax(1))
    torch.testing.assert_close(found.column_score, of_columns.amax(0), rtol=0, atol=1e-14)
    assert torch.equal(found.column_drawn, torch.where(of_columns.amax(0).isinf(), width, rows[of_columns.argmax(0)]))
    right = logits.detach().masked_fill(~(matches if shared else rows[:, None] == width), -math.inf)
    for best, dim in ((found.row_best, 1), (found.column_best, 0)):
        torch.testing.assert_close(best[0], logits.detach().amax(dim), rtol=0, atol=1e-14)
        torch.testing.assert_close(best[1], right.amax(dim), rtol=0, atol=1e-14)
    assert torch.equal(found.row_best[0] == found.row_best[1], right.argmax(1) == logits.argmax(1))


def test_a_column_without_a_pair_to_draw_has_its_own_number():
    leaves, _ = inputs(False)
    same = {"image_id": torch.zeros(PAIRS, dtype=torch.int64), "noise_keys": torch.arange(2)}
    found = contrastive_terms(**leaves, **same)
    assert found.drawn.tolist() == found.column_drawn.tolist() == list(range(PAIRS))
    assert found.column_score.tolist() == [-math.inf] * PAIRS


@pytest.mark.parametrize("scale", [10.0, 100.0, 1000.0])
def test_float32_is_as_exact_as_whole_logits_at_every_temperature(scale):
    """At 1 / 1000 some rows and columns lie so far below others that their exponentials vanish beside them."""
    draw = torch.Generator().manual_seed(2)
    wide = [torch.nn.functional.normalize(torch.randn(40, 8, generator=draw), dim=1) for _ in range(2)]
    wide[1][:9] = -wide[0].mean(0)
    errors, wanted = [], None
    for dtype, whole in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        image, text = (x.to(dtype).requires_grad_() for x in wide)
        log_scale = torch.tensor([math.log(scale)]).to(dtype).requires_grad_()
        if whole:
            logits, own = image @ text.T * log_scale.exp(), torch.arange(40)
            loss = sum(torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)) / 2
        else:
            loss = contrastive_loss(image, text, log_scale)
        found = [loss, *torch.autograd.grad(loss, (image, text, log_scale))]
        wanted = found if wanted is None else wanted
        errors.append(
            [(x.double() - y).abs().max().item() / (y.abs().max().item()) for x, y in zip(found, wanted, strict=True)]
        )
    for by_torch, ours in zip(*errors[1:], strict=True):
        assert ours <= 2 * by_torch + 1e-6


@VARIANTS
def test_embeddings_in_bf16_are_multiplied_exactly(sigmoid):
    """On a CPU the loss is that of the rounded embeddings, and each gradient is rounded once."""
    leaves, ids = inputs(sigmoid)
    given = {name: x.detach().to(torch.bfloat16 if x.dim() == 2 else torch.float32).requires_grad_()
             for name, x in leaves.items()}  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(**given, **ids)
    loss.backward()
    wanted, gradients = in_numpy(given, ids, False)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    for name, x in given.items():
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        torch.testing.assert_close(x.grad.double(), torch.tensor(gradients[name]), rtol=2**-8, atol=1e-6)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive at a time, of those that operations make."""

    held = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage() for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)} - given:
            self.held += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, size: int) -> None:
        self.held -= size


@VARIANTS
def test_memory_is_that_of_one_block_of_logits(sigmoid):
    """512 rows and 32,768 columns of a GPU, with draws: at most the 64 MiB that these logits would take."""
    rows, columns, meta = 512, 32768, {"device": "meta"}
    image, text, log_scale = (torch.empty(*shape, **meta) for shape in ((rows, 256), (columns, 256), (1,)))
    bias = torch.empty(1, **meta) if sigmoid else None
    numbers, keys = torch.arange(rows, **meta), torch.zeros(2, dtype=torch.int64, **meta)
    pairs = numbers, torch.arange(columns, **meta), torch.arange(columns, **meta), False
    with Live() as forward:
        terms, sums, lse, *_ = reference.forward(image, text, log_scale, bias, *pairs, keys)
    with Live() as backward:
        found = reference.backward(terms, sums, image, text, log_scale, bias, *pairs, lse, sums)
    gradients = sum(x.nbytes for x in found)
    assert 4 * reference.BLOCK_ELSEWHERE < forward.peak <= 4 * rows * columns
    assert gradients < backward.peak <= gradients + 4 * rows * columns


def test_a_second_derivative_is_refused_by_name():
    leaves, _ = inputs(False)
    (grad,) = torch.autograd.grad(contrastive_loss(**leaves), leaves["image"], create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_loss has no second derivative"):
        grad.sum().backward()


WRONG: dict[str, dict[str, Any]] = {
    "image": {"image": torch.ones(3, 5, dtype=torch.int64)},
    "text": {"text": torch.ones(3, 4)},
    "text ": {"text": torch.ones(2, 5)},
    "log_scale": {"log_scale": torch.ones(3)},
    "bias": {"bias": torch.ones(2)},
    "rows": {"rows": torch.tensor([0, 1, 3])},
    "rows must be distinct": {"rows": torch.tensor([0, 1, 1])},
    "rows must be int64": {"rows": torch.arange(3, dtype=torch.int32)},
    "image_id": {"image_id": torch.arange(4)},
    "text_id": {"text_id": torch.ones(3)},
    "noise_keys": {"noise_keys": torch.arange(3)},
    "shared_positives": {"shared_positives": True},
}


@pytest.mark.parametrize("begins", WRONG)
def test_a_wrong_argument_is_refused(begins):
    right = {"image": torch.ones(3, 5), "text": torch.ones(3, 5), "log_scale": torch.ones(1)}
    assert isinstance(contrastive_terms(**right), ContrastiveTerms)
    with pytest.raises(ValueError, match=rf"^{begins}[^\n]*$"):
        contrastive_terms(**right | WRONG[begins])


def test_a_loss_of_fewer_images_than_captions_is_refused():
    with pytest.raises(ValueError, match="text must have as many rows"):
        contrastive_loss(torch.ones(3, 5), torch.ones(4, 5), torch.ones(1))


class Products(TorchDispatchMode):
    """Dtypes of the operands and of the result of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.dtype, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in ("mm", "addmm_"):
            self.found.add(tuple(x.dtype for x in (*args[-3:], out) if isinstance(x, Tensor)))
        return out


def test_on_a_gpu_products_of_bf16_have_float32_sums(monkeypatch):
    """On the meta device, which has torch's product of this kind, taken for a GPU."""
    monkeypatch.setattr(reference, "_in_16_bits", lambda a, b: a.dtype == b.dtype == torch.bfloat16)
    meta = {"device": "meta"}
    image, text = (torch.empty(shape, dtype=torch.bfloat16, **meta) for shape in ((4, 8), (6, 8)))
    log_scale, pairs = torch.empty(1, **meta), (torch.arange(4, **meta), None, None, False)
    with Products() as products:
        terms, columns, lse, *_ = reference.forward(image, text, log_scale, None, *pairs, None)
        found = reference.backward(terms, columns, image, text, log_scale, None, *pairs, lse, columns)
    assert products.found == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert [x.dtype for x in found[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
