"""The rule that chooses an attention backend, and each backend against loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.model import attention_backends as backends
from mvlm.model.packing import Packing
from mvlm_kernels.cross_attention.composed import rule

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "device, dtype, text, rows, width, wanted",
    [
        (CPU, torch.bfloat16, False, (197, 197), 64, "math"),
        (CPU, torch.float32, False, (197, 197), 64, "sdpa"),
        (CPU, torch.float32, False, (37, 37), 64, "math"),
        (CPU, torch.float32, True, (197, 32), 64, "math"),
        (CPU, torch.float32, True, (32, 197), 64, "sdpa"),
        (CPU, torch.bfloat16, True, (32, 32), 64, "math"),
        (CPU, torch.float64, True, (32, 32), 64, "math"),
        (GPU, torch.bfloat16, False, (197, 197), 64, "sdpa"),
        (GPU, torch.bfloat16, True, (32, 197), 64, "triton"),
        (GPU, torch.bfloat16, True, (197, 32), 64, "triton"),
        (GPU, torch.bfloat16, True, (32, 32), 36, "sdpa"),
        (GPU, torch.bfloat16, True, (144, 197), 64, "sdpa"),
        (GPU, torch.float64, True, (32, 32), 64, "sdpa"),
    ],
)
def test_auto_chooses_by_device_dtype_and_shape(device, dtype, text, rows, width, wanted):
    assert backends.choose_backend("auto", device, dtype, width, rows, text=text).backend == wanted


@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, "math"), (torch.float32, "sdpa")])
def test_a_forward_pass_alone_on_a_cpu(dtype, wanted):
    assert rule(CPU, dtype, 37, gradients=False) == wanted


@pytest.mark.parametrize(
    "wanted, device, width, rows, text, reason",
    [
        ("flash-attn", CPU, 64, (197, 197), False, "on cpu"),
        ("xformers", GPU, 64, (197, 197), False, "not installed"),
        ("triton", GPU, 36, (32, 32), True, "36 wide"),
        ("triton", GPU, 64, (197, 197), False, "197 rows"),
        ("flash-attn", CPU, 64, (32, 32), True, "got 'flash-attn'"),
        ("cudnn", CPU, 64, (32, 32), False, "got 'cudnn'"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(wanted, device, width, rows, text, reason, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=reason):
        backends.choose_backend(wanted, device, torch.bfloat16, width, rows, text=text)


def attention_in_loops(q, k, v, q_bounds, k_bounds, key_index):
    """Attention in float64, one query row of one head at a time. Bounds are (first, end) rows of each sequence."""
    out = np.zeros(q.shape)
    for r, (first, end) in enumerate(q_bounds):
        begin, stop = k_bounds[r if key_index is None else key_index[r]]
        for i in range(first, end):
            for h in range(q.shape[1]):
                scores = np.array([q[i, h] @ k[j, h] for j in range(begin, stop)]) / np.sqrt(q.shape[2])
                p = np.exp(scores - scores.max())
                out[i, h] = (p / p.sum()) @ v[begin:stop, h]
    return out


@pytest.mark.parametrize("backend", ["sdpa", "math", "triton"])
@pytest.mark.parametrize("packed", ["queries", "keys", "both"])
@pytest.mark.parametrize("indexed", [False, True])
def test_text_attention_against_loops(backend, packed, indexed):
    """Lengths 3, 1 and 4 on a packed side, 5 rows on the other; with an index, two sequences share their keys."""
    rng = np.random.default_rng(0)
    lengths, width = [3, 1, 4], 32
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    spans = {True: list(pairwise(bounds)), False: [(5 * b, 5 * b + 5) for b in range(3)]}
    sides = {"queries": packed != "keys", "keys": packed != "queries"}
    q, k, v = (rng.normal(size=(8 if sides[side] else 15, 2, width)) for side in ("queries", "keys", "keys"))
    index = np.array([2, 2, 0]) if indexed else None
    wanted = attention_in_loops(q, k, v, spans[sides["queries"]], spans[sides["keys"]], index)

    def tensor(x, packed):
        x = torch.from_numpy(x)
        return x if packed else x.unflatten(0, (3, 5))

    packing = Packing(torch.from_numpy(bounds).int(), 4, 8)
    found = backends.text_attention(
        tensor(q, sides["queries"]),
        tensor(k, sides["keys"]),
        tensor(v, sides["keys"]),
        packing if sides["queries"] else None,
        packing if sides["keys"] else None,
        None if index is None else torch.from_numpy(index),
        backend,
    )
    np.testing.assert_allclose(found.reshape(wanted.shape).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "math", "triton"])
def test_image_attention_against_loops(backend):
    q, k, v = np.random.default_rng(1).normal(size=(3, 10, 2, 32))
    spans = [(0, 5), (5, 10)]
    x, y, z = (torch.from_numpy(rows).unflatten(0, (2, 5)) for rows in (q, k, v))
    found = backends.image_attention(x, y, z, backend)
    np.testing.assert_allclose(found.flatten(0, 1).numpy(), attention_in_loops(q, k, v, spans, spans, None), atol=1e-12)
