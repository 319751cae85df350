"""Contrastive losses of one rank's pairs with all pairs: products, bytes, memory and time, forward and backward.

    python -m mvlm_benchmarks.kernels.contrastive [--rows N] [--columns G] [--width E] [--repeats K]

The rank has N image-text pairs, and the embeddings of all G. On a CPU and one thread; no GPU is needed. A row of the
table is one implementation:

    products     products of N x G x E, forward and backward: each is 2 N G E FLOPs
    bytes        read and written by torch's operations, for each logit
    peak, MB     most memory at a time beyond the inputs, gradients included
    s            processor seconds, median of turns

open_clip is measured if it is installed. Its SigLipLoss takes chunks from the version after 3.3.0 on.

A second table counts what `contrastive_terms` does on a GPU with float32, by torch and by the kernels, without one: a
launch reads or writes each of its tensors once, and the columns "forward" and "backward" are the most MB of a pass.
"""

import argparse
import importlib
import inspect
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mvlm.objectives.losses import contrastive_logits, contrastive_sums
from mvlm.objectives.negatives import NegativeSampling
from mvlm_benchmarks.step.activations import peak_mb
from mvlm_kernels import contrastive_terms, dispatch
from mvlm_kernels.contrastive_loss import reference
from mvlm_kernels.contrastive_loss.noise import noise_key

Loss = Callable[[], Tensor]
PRODUCTS = ("mm", "addmm", "addmm_")
OPS: dict[Any, Callable[..., Any]] = {
    torch.ops.mvlm_kernels.contrastive_terms.default: reference.forward,
    torch.ops.mvlm_kernels.contrastive_terms_backward.default: reference.backward,
}
"""Functions in torch of our ops, into which a dispatch mode does not see."""


class Counter(TorchDispatchMode):
    """Context that counts FLOPs of products, and bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPS:
            with self:
                return OPS[func](*args)
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (args, out))
        if not func.is_view:
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *outputs) if 0 not in x.stride())
        if name in PRODUCTS:
            left, right = inputs[-2:]
            self.flops += 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
        return out


class GpuCounter(TorchDispatchMode):
    """Context that counts what operations on meta tensors and recorded launches would do on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.launches = self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Counter() as counter:
            out = func(*args, **(kwargs or {}))
        inputs, outputs = ({x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)}
                           for tree in (args, out))  # fmt: skip
        if func._overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.new_empty) and not func.is_view:
            self.launches += 1
            self.flops, self.moved = self.flops + counter.flops, self.moved + counter.moved
        for storage in outputs - inputs:
            self.held += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _free(self, size: int) -> None:
        self.held -= size

    def launch(self, kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        self.launches += 1
        self.moved += sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
        if "BLOCK_K" in meta:  # it multiplies rows of images by rows of texts
            image, text = args[:2]
            self.flops += 2 * image.shape[0] * text.shape[0] * image.shape[1]


def count_on_gpu(by: Any, rows: int, columns: int, width: int, draw: bool, sigmoid: bool) -> tuple[float, ...]:
    """Products, bytes for each logit, launches, and most MB of forward and of backward. by: the passes' module."""
    on: dict[str, Any] = {"device": "meta"}
    image, text, log_scale = (torch.empty(*shape, **on) for shape in ((rows, width), (columns, width), (1,)))
    bias = torch.empty(1, **on) if sigmoid else None
    numbers, ids = torch.arange(rows, **on), torch.arange(columns, **on)
    keys = torch.zeros(2, dtype=torch.int64, **on) if draw else None
    pairs = numbers, ids, ids, False
    with GpuCounter() as counter, dispatch.recording(counter.launch, 90):
        terms, sums, lse, *others = by.forward(image, text, log_scale, bias, *pairs, keys)
        forward = counter.peak
        del others
        counter.peak = counter.held
        by.backward(terms, sums, image, text, log_scale, bias, *pairs, lse, sums)
    logits = rows * columns
    return (counter.flops / (2 * logits * width), counter.moved / logits, counter.launches, forward / 1e6,
            counter.peak / 1e6)  # fmt: skip


class Pairs:
    """Embeddings of all G pairs, of which the first N are this rank's, with the temperature and the bias of a loss.

    leaves: the tensors that get gradients.
    """

    def __init__(self, rows: int, columns: int, width: int) -> None:
        draw = torch.Generator().manual_seed(0)
        unit = [F.normalize(torch.randn(columns, width, generator=draw), dim=1) for _ in range(2)]
        self.all_images, self.all_texts = (x.requires_grad_() for x in unit)
        self.image, self.text = (x[:rows].detach().clone().requires_grad_() for x in unit)
        self.log_scale = torch.tensor([2.659], requires_grad=True)
        self.bias = torch.tensor([-10.0], requires_grad=True)
        self.leaves = [self.all_images, self.all_texts, self.image, self.text, self.log_scale, self.bias]
        self.rows, ids = torch.arange(rows), torch.arange(columns)
        self.sampling = NegativeSampling(ids, ids, 0, 0)
        self.keys = torch.stack([noise_key(0, 0, direction, ids.device) for direction in (0, 1)])


def two_directions(pairs: Pairs, block: int, draw: bool, sigmoid: bool = False) -> Tensor:
    """Contrastive loss of this rank's pairs, a scalar, from logits of `block` rows at a time in each direction.

    Rows are images with all captions, then captions with all images. If there are several blocks, backward computes
    the logits of each again. draw: also draw ITM's negatives. sigmoid: the sigmoid loss in place of the softmax.
    """
    losses = []
    for direction, (own, others) in enumerate(((pairs.image, pairs.all_texts), (pairs.text, pairs.all_images))):

        def of_block(rows: Tensor, own: Tensor, others: Tensor = others, direction: int = direction) -> Tensor:
            logits = contrastive_logits(own, others, pairs.log_scale)
            loss = contrastive_sums(logits, rows, pairs.bias if sigmoid else None)[0]
            if draw:
                pairs.sampling.draw(logits, rows, direction)
            return loss

        blocks = list(zip(pairs.rows.split(block), own.split(block), strict=True))
        run = of_block if len(blocks) == 1 else partial(checkpoint, of_block, use_reentrant=False)
        losses += [run(*part) for part in blocks]
    return torch.stack(losses).sum() / (2 * len(pairs.rows))


def ours(pairs: Pairs, draw: bool, sigmoid: bool = False) -> Tensor:
    """Contrastive loss of this rank's pairs, a scalar, by `contrastive_terms`, whose sums ranks would add up.

    draw: also draw ITM's negatives. sigmoid: the sigmoid loss in place of the softmax.
    """
    terms = contrastive_terms(
        pairs.image, pairs.all_texts, pairs.log_scale, bias=pairs.bias if sigmoid else None, rows=pairs.rows,
        noise_keys=pairs.keys if draw else None,
    )  # fmt: skip
    return terms.rows.mean() if sigmoid else (terms.rows.sum() + terms.columns.sum()) / (2 * len(pairs.rows))


def of_open_clip(pairs: Pairs) -> dict[str, Loss]:
    """Losses of open_clip for a rank whose features are gathered; none if it is not installed."""
    try:
        from open_clip import loss as open_clip
    except ImportError:
        return {}

    class Gathered(open_clip.ClipLoss):
        """ClipLoss with local_loss, from its own formula of the logits of gathered features."""

        def get_logits(self, image_features: Any, text_features: Any, logit_scale: Any, logit_bias: Any = None) -> Any:
            logits = logit_scale * image_features @ pairs.all_texts.T, logit_scale * text_features @ pairs.all_images.T
            return logits

    def infonce() -> Tensor:
        return Gathered(local_loss=True)(pairs.image, pairs.text, pairs.log_scale.exp())

    chunks: Any = {"chunk_size": 128}
    found: dict[str, Loss] = {"open_clip ClipLoss, local_loss": infonce}
    if "chunk_size" in inspect.signature(open_clip.SigLipLoss).parameters:

        def sigmoid() -> Tensor:
            # Its ranks pass captions round, and each part is a loss of its own images with n captions.
            losses, size = open_clip.SigLipLoss(**chunks), len(pairs.rows)
            scale, parts = pairs.log_scale.exp(), pairs.all_texts.split(size)
            first = losses._loss(pairs.image, parts[0], scale, pairs.bias)
            return sum((losses._loss(pairs.image, x, scale, pairs.bias, True) for x in parts[1:]), first)

        found["open_clip SigLipLoss, chunks of 128"] = sigmoid
    return found


def contenders(pairs: Pairs) -> dict[str, Loss]:
    """Implementations of the loss that are compared, by name. Each is a function that returns the loss."""
    block = len(pairs.rows)
    return {
        "contrastive_terms": lambda: ours(pairs, draw=False),
        "two directions, logits kept": lambda: two_directions(pairs, block, draw=False),
        "two directions, blocks of 128 rows": lambda: two_directions(pairs, 128, draw=False),
        "contrastive_terms, with draws": lambda: ours(pairs, draw=True),
        "two directions, logits kept, with draws": lambda: two_directions(pairs, block, draw=True),
        "two directions, blocks of 128 rows, with draws": lambda: two_directions(pairs, 128, draw=True),
        "contrastive_terms, sigmoid": lambda: ours(pairs, draw=False, sigmoid=True),
        "two directions, logits kept, sigmoid": lambda: two_directions(pairs, block, draw=False, sigmoid=True),
        **of_open_clip(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mvlm_benchmarks.kernels.contrastive", description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="pairs of this rank")
    parser.add_argument("--columns", type=int, default=32768, help="pairs of the global batch")
    parser.add_argument("--width", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--repeats", type=int, default=5, help="turns in which every implementation runs once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, seconds = Pairs(options.rows, options.columns, options.width), {}
    losses = contenders(pairs)
    for _ in range(options.repeats):
        for name, loss in losses.items():
            for x in pairs.leaves:
                x.grad = None
            start = time.process_time()
            loss().backward()
            seconds.setdefault(name, []).append(time.process_time() - start)
    logits = options.rows * options.columns
    print(f"{'n ' + str(options.rows) + ', G ' + str(options.columns) + ', E ' + str(options.width):48}"
          f"{'products':>9}{'bytes':>7}{'peak, MB':>10}{'s':>8}")  # fmt: skip
    for name, loss in losses.items():
        with Counter() as counter:
            loss().backward()
        peak = peak_mb(lambda loss=loss: loss().backward(), pairs.leaves, "cpu")
        products = counter.flops / (2 * logits * options.width)
        print(
            f"{name:48}{products:9.2f}{counter.moved / logits:7.0f}{peak:10.0f}{statistics.median(seconds[name]):8.2f}"
        )
    print(f"\n{'on a GPU, float32':48}{'products':>9}{'bytes':>7}{'launches':>10}{'forward':>9}{'backward':>10}")
    kernels = importlib.import_module("mvlm_kernels.contrastive_loss.triton")
    for form, draw, sigmoid in (("", False, False), (", with draws", True, False), (", sigmoid", False, True)):
        for name, by in (("torch", reference), ("kernels", kernels)):
            sizes = options.rows, options.columns, options.width
            *counts, forward, backward = count_on_gpu(by, *sizes, draw, sigmoid)
            print(f"{f'contrastive_terms by {name}{form}':48}{counts[0]:9.2f}{counts[1]:7.0f}{counts[2]:10}"
                  f"{forward:9.0f}{backward:10.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
