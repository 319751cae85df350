"""Launches of the kernels in a training step: one set of signatures for all batches, and grids that a GPU takes.

A signature is what Triton compiles a kernel for. A new one in the middle of training compiles for seconds, on the ranks
of a run at different steps. Triton specialises arguments only in a process that does not interpret.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from mvlm_kernels import dispatch

# Steps of a model with one block of each kind: pre-norm, post-norm, and with masked patches left out.
STEPS = """
import json, random, sys
from dataclasses import replace

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_kernels import launches_of, model_of, recorded_steps
from mvlm_dataloading import Batch, Masks
from mvlm_kernels.aot import signature

draw, seen, sizes = random.Random(0), [], set()
blocks = {f"{name}_layers": 1 for name in ("image", "text", "cross", "decoder")}
pre = replace(MaskVLMConfig.preset("base"), **blocks, vocab_size=64, mask_token_id=4)
post = replace(pre, cross_norm="post")
models = [model_of(config) for config in (pre, post, replace(post, drop_masked=True))]


def rows(low, high):
    # Only later batches have multiples of 16, of which Triton would make a signature of its own.
    number = draw.randint(low, high)
    return number // 16 * 16 if len(seen) > int(sys.argv[2]) and draw.random() < 0.5 else number | 1


def ids(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")


def batch(config, pairs=64):
    short = len(seen) // len(models) % 2  # tiles follow from it: each model has had both in the first batches
    longest = draw.randint(17, 32) if short else draw.randint(33, 40)
    tokens, masked = rows(6 * pairs, longest * pairs), rows(pairs, 4 * pairs)
    sizes.add((tokens, masked))
    images = ids(pairs, 3, config.image_size, config.image_size, dtype=torch.uint8)
    bounds = ids(pairs + 1, dtype=torch.int32)
    captions = Batch(images, ids(tokens), bounds, longest, ids(pairs), ids(pairs), ids(pairs))
    return captions, Masks(ids(pairs, config.masked_patches), ids(masked))


def record(kernel, grid, args, meta):
    seen[-1].add(signature(kernel, args, meta, "sm_90"))


with recorded_steps(record, 90) as step:
    for number in range(int(sys.argv[1])):
        seen.append(set())
        model = models[number % len(models)]
        step(model, *batch(model.config))
first, everything = (set().union(*seen[:n]) for n in (int(sys.argv[2]), len(seen)))
warm = {
    signature(x.kernel, x.args, x.meta, "sm_90")
    for config in (pre, post, replace(post, drop_masked=True))
    for x in launches_of(config, 64, "sm_90")
}
names = sorted({x.split()[0] for x in first})
print(json.dumps([len(sizes), names, sorted(everything - first), sorted(everything - warm)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("batches, first", [(24, 12), pytest.param(80, 30, marks=pytest.mark.extended)])
def test_no_kernel_is_compiled_in_the_middle_of_training(batches: int, first: int):
    """All ops of the step: random batches launch no kernel that the first few, of odd sizes, have not compiled."""
    words = [sys.executable, "-c", STEPS, str(batches), str(first)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-4000:]
    different, kernels, late, cold = json.loads(done.stdout)
    assert different > 0.9 * batches
    assert len(kernels) > 15
    assert not late, f"{len(late)} kernels are compiled after the first {first} batches: {late[0]}"
    assert not cold, f"{len(cold)} kernels are not compiled by mvlm doctor --warm: {cold[0]}"


@pytest.mark.slow
def test_grids_of_large_batches_fit_a_gpu():
    """Only the first dimension of a grid may exceed 65,535. It has to stay below 2^31."""
    gather = importlib.import_module("mvlm_kernels.gather_patches.triton")
    loss = importlib.import_module("mvlm_kernels.pixel_loss.triton")
    place = importlib.import_module("mvlm_kernels.place_tokens.triton")
    grids = {}

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, chosen = 100_000, 196  # 19.6 million patches
    images, ids = empty(batch, 3, 224, 224), empty(batch, chosen, dtype=torch.int32)
    with dispatch.recording(lambda kernel, grid, *_: grids.setdefault(kernel.__name__, []).append(grid), 90):
        pred = gather.gather_patches(images, ids, 16, None, None, torch.bfloat16)
        loss.masked_pixel_loss_backward(
            *loss.masked_pixel_loss(pred, images, ids, 16, None, None, "l1", True, True, True), torch.bfloat16
        )
        tokens, row, positions = empty(batch, chosen, 768), empty(768), empty(1 + 100_000, 768)
        out = place.place_tokens(tokens, row, positions, row, None, ids, False)
        place.place_tokens_backward(out, None, ids, False, chosen, (torch.bfloat16,) * 4, (True,) * 4)
    assert set(grids) == {
        "gather_kernel", "reader_lists_kernel", "loss_kernel", "sum_kernel",
        "scale_slope_kernel", "place_kernel", "place_backward_kernel", "column_sum_kernel",
    }  # fmt: skip
    for name, found in grids.items():
        for first, *others in found:
            assert 0 < first < 2**31, name
            assert all(0 < n <= 65_535 for n in others), name
    assert grids["gather_kernel"] == [(batch * chosen // 4,)]


def test_more_patches_than_row_numbers_are_refused():
    gather = importlib.import_module("mvlm_kernels.gather_patches.triton")
    images = torch.empty(2**16, 1, 1, 1, dtype=torch.uint8, device="meta")
    ids = torch.empty(2**16, 2**15, dtype=torch.int32, device="meta")
    with (
        dispatch.recording(lambda *_: None, 90),
        pytest.raises(ValueError, match=r"fewer than 2\^31 patches .*2147483648"),
    ):
        gather.gather_patches(images, ids, 1, None, None, torch.float32)
