"""Launches of the kernels on patches and tokens: one set of signatures for all batches, and grids that a GPU takes.

A signature is what Triton compiles a kernel for. A new one in the middle of training compiles for seconds, on the ranks
of a run at different steps. Triton specialises arguments only in a process that does not interpret.
"""

import importlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mvlm_kernels import dispatch

LAUNCHES = """
import importlib, json, random
import torch
from mvlm_kernels import dispatch
from mvlm_kernels.aot import signature

gather, loss, place = (
    importlib.import_module(f"mvlm_kernels.{name}.triton") for name in ("gather_patches", "pixel_loss", "place_tokens")
)
signatures = {}
draw = random.Random(0)
values = torch.empty(3, device="meta")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def record(kernel, grid, args, meta):
    signatures.setdefault(f"{step} {signature(kernel, args, meta, 'sm_90')}", number)


def batch(size, chosen, patch):
    global step
    features, width, patches = 3 * patch**2, 384, (224 // patch) ** 2
    images, ids = empty(size, 3, 224, 224, dtype=torch.uint8), empty(size, chosen, dtype=torch.int64)
    step = f"patches of {patch}"
    gather.gather_patches(images, ids, patch, values, values, torch.bfloat16)
    gather.gather_patches(images, None, patch, values, values, torch.bfloat16)
    pred = empty(size, chosen, features)
    for reduce in (True, False):
        saved = loss.masked_pixel_loss(pred, images, ids, patch, values, values, "l1", False, reduce, True)
        loss.masked_pixel_loss_backward(*saved, torch.bfloat16)
    row, positions = empty(width, dtype=torch.float32), empty(1 + patches, width, dtype=torch.float32)
    masked, dtypes = empty(size, patches, dtype=torch.bool), (torch.bfloat16, *(torch.float32,) * 3)
    for mode in ("masked", "both", "visible"):
        step = f"patches of {patch}, {mode}"
        tokens = empty(size, chosen if mode == "visible" else patches, width)
        options = (None, ids, False) if mode == "visible" else (masked, None, mode == "both")
        out = place.place_tokens(tokens, row, positions, row, *options)
        place.place_tokens_backward(out, *options, tokens.shape[1], dtypes, (True,) * 4)


with dispatch.recording(record, 90):
    for number in range(1000):
        size, chosen = draw.choice([(1, 1), (16, 48), (draw.randint(1, 300), draw.randint(1, 196))])
        for patch in (14, 16):
            batch(size, chosen, patch)
print(json.dumps(signatures))
"""


# Attention of a step's text: image and text streams, pairs by an index, the last rows of a stream, each with totals
# and longest captions as they come.
RANDOM_BATCHES = """
import json, random
import torch
from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import Options, Sides
from mvlm_kernels.cross_attention.launch import backward, forward
from mvlm_kernels.aot import signature

draw, seen, sizes = random.Random(0), [], set()

def heads(*shape):
    return torch.empty((*shape, 12, 64), dtype=torch.bfloat16, device="meta")

def ints(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")

def attend(q, k, queries, keys, index, longest_q, longest_k):
    cu = [None if n is None else ints(n + 1, dtype=torch.int32) for n in (queries, keys)]
    k_seqs = keys or len(k)
    readers = (None, None, None) if index is None else (ints(index), ints(index), ints(k_seqs, 3))
    sides, options = Sides(None, None, readers[0], *cu, *readers[1:]), Options(0.125, longest_q, longest_k)
    out, lse = forward(q, k, k, sides, options)
    backward(out, q, k, k, out, lse, sides, options)

def record(kernel, grid, args, meta):
    seen[-1].add(signature(kernel, args, meta, "sm_90"))

for _ in range(1000):
    seen.append(set())
    longest, B = draw.randint(17, 40), 64
    T, M, pairs = draw.randint(6 * B, longest * B), draw.randint(B, 8 * B), draw.randint(18 * B, 3 * longest * B)
    sizes.add((T, M, pairs))
    with dispatch.recording(record, 90):
        attend(heads(T), heads(T), B, B, None, longest, longest)
        attend(heads(B, 197), heads(T), None, B, None, 197, longest)
        attend(heads(T), heads(B, 197), B, None, None, longest, 197)
        attend(heads(M), heads(B, 197), B, None, None, longest, 197)
        attend(heads(3 * B, 197), heads(T), None, B, 3 * B, 197, longest)
        attend(heads(pairs), heads(B, 197), 3 * B, None, 3 * B, longest, 197)
        attend(heads(3 * B, 1), heads(T), None, B, 3 * B, 1, longest)
        attend(heads(3 * B, 1), heads(B, 197), None, None, 3 * B, 1, 197)
print(json.dumps([len(sizes), [len(set().union(*seen[:n])) for n in (30, 1000)]]))
"""


def printed(program: str) -> Any:
    """What a program prints as JSON, in a process that compiles kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.extended
@pytest.mark.slow
def test_a_thousand_batches_launch_one_set_of_signatures():
    first_seen = printed(LAUNCHES)
    assert len(first_seen) > 30
    late = [name for name, number in first_seen.items() if number > 0]
    assert not late, f"{len(late)} of {len(first_seen)} signatures appear after the first batch: {late[0]}"


@pytest.mark.slow
def test_no_kernel_of_attention_is_compiled_in_the_middle_of_training():
    """1,000 random batches launch no kernel that the first 30 have not compiled."""
    different, (first, all_of_them) = printed(RANDOM_BATCHES)
    assert different > 900
    assert first == all_of_them


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
