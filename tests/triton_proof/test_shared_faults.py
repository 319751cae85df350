"""Faults inside a block, planted into the compiled text: each is found by its kind."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from triton_proof.driver import FENCES_COPIES, recorded
from triton_proof.ptx.syntax import UnsupportedPTX

Edit = Callable[[str], str]


@triton.jit
def total(x, out, N: tl.constexpr):
    """Sum over all warps, through shared memory."""
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def transposed(x, out, M: tl.constexpr, N: tl.constexpr):
    """Change of layout through shared memory."""
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + i * N + j)
    tl.store(out + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(a))


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        acc = tl.dot(tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n), acc)
    tl.store(c + m * N + n, acc)


@triton.jit
def norm(x, out, N: tl.constexpr):
    """Sum of squares, whose products are fused into the sum over a warp: its lanes end with different bits."""
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, a * tl.rsqrt(tl.sum(a * a, 0)))


def run(kernel, *args, edit: Edit | None = None, **meta: int) -> set[str]:
    """Kinds of findings of a launch whose compiled text is edited."""
    kernel.device_caches.clear()  # Triton keeps compiled kernels, and an edit is made when one is loaded
    with recorded(on_fault="collect", edit=edit) as launches:
        kernel[(1,)](*args, num_warps=4, **meta)
    kernel.device_caches.clear()
    return {f.kind for f in launches[-1].findings}


def run_total(edit: Edit | None = None) -> set[str]:
    x, out = torch.arange(1024).float(), torch.zeros(1)
    found = run(total, x, out, edit=edit, N=1024)
    return found or (set() if out.item() == x.sum().item() else {"value"})


def run_norm(edit: Edit | None = None, **options: bool) -> set[str]:
    x, out = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.zeros(128)
    found = run(norm, x, out, edit=edit, N=128, **options)
    return found or (set() if torch.allclose(out, x / x.norm()) else {"value"})


def run_transposed(edit: Edit | None = None) -> set[str]:
    x, out = torch.randn(64, 64), torch.zeros(64, 64)
    found = run(transposed, x, out, edit=edit, M=64, N=64)
    return found or (set() if torch.equal(out, x.T) else {"value"})


def run_product(edit: Edit | None = None, stages: int = 3) -> set[str]:
    a, b, c = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.zeros(64, 64)
    found = run(product, a, b, c, 256, edit=edit, M=64, N=64, BK=32, num_stages=stages)
    wrong = (c.double() - a.double() @ b.double()).abs().max() > 1e-3
    return found or ({"value"} if wrong else set())


def without(name: str) -> Edit:
    """The text without the lines that contain ``name``."""

    def edit(text: str) -> str:
        lines = [line for line in text.splitlines() if name not in line]
        assert len(lines) < len(text.splitlines()), f"no {name} to take out"
        return "\n".join(lines)

    return edit


def replaced(pattern: str, new: str | Callable[[re.Match[str]], str]) -> Edit:
    """The text with every place that the pattern matches replaced."""

    def edit(text: str) -> str:
        out = re.sub(pattern, new, text)
        assert out != text, f"no {pattern} to replace"
        return out

    return edit


def without_the_last_wait(text: str) -> str:
    head, _, tail = text.rpartition("wgmma.wait_group.sync.aligned")
    return head + tail.partition(";")[2]


RUNS = [run_total, run_transposed, run_product]


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("run_kernel", [*RUNS, partial(run_product, stages=1)])
def test_kernels_with_barriers_are_clean(run_kernel: Callable[..., set[str]]) -> None:
    assert not run_kernel()


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("run_kernel", RUNS)
def test_missing_barrier_is_a_race(run_kernel: Callable[..., set[str]]) -> None:
    assert "race" in run_kernel(without("bar.sync"))


def storing_the_thread(text: str) -> str:
    """The text in which lanes store their own numbers in place of the sum over their warp."""
    thread = re.search(r"mov\.u32\s+(%r\d+), %tid\.x", text)
    assert thread is not None
    return replaced(r"(st\.shared\S*\s+\[[^\]]*\],\s*)%r\d+", rf"\g<1>{thread[1]}")(text)


@pytest.mark.usefixtures("arch")
def test_bits_that_a_reduction_leaves_open_are_no_race() -> None:
    assert run_norm() == {"reduction-bits"}
    assert not run_norm(enable_fp_fusion=False)
    assert "race" in run_norm(without("bar.sync"))
    assert run_norm(storing_the_thread) == {"race"}


FURTHER = replaced(r"(st\.shared\S*\s+\[\s*)(%r\d+)(?:\s*\+\s*\d+)?\s*\]", r"\1\2 + 1048576 ]")
LATER = replaced(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group \t{int(m[1]) + 2}")
ON_BOTH = [
    (run_product, without("cp.async.wait_group"), "async"),
    (partial(run_product, stages=5), LATER, "async"),
    (run_total, without("st.shared"), "uninitialised"),
    (run_total, FURTHER, "out-of-bounds"),
]
ON_SM_90 = [  # sm_80 has neither an asynchronous proxy nor wgmma
    (run_product, without("wgmma.wait_group"), "async"),
    (run_product, without_the_last_wait, "async"),
    (partial(run_product, stages=1), without("fence.proxy.async"), "proxy"),
    *([(run_product, without("fence.proxy.async"), "copy-proxy")] if FENCES_COPIES else []),
]


@pytest.mark.parametrize(
    "arch, run_kernel, edit, kind",
    [(arch, *case) for arch in ("sm_80", "sm_90") for case in ON_BOTH + (ON_SM_90 if arch == "sm_90" else [])],
    indirect=["arch"],
)
def test_a_planted_fault_is_found(arch: str, run_kernel: Callable[..., set[str]], edit: Edit, kind: str) -> None:
    assert kind in run_kernel(edit)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize(
    "old, new", [("add.f32", "add.rz.f32"), ("add.f32", "addc.f32"), ("st.shared", "st.async.shared")]
)
def test_unknown_instructions_are_refused(old: str, new: str) -> None:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    with pytest.raises(UnsupportedPTX):
        run_total(edit)
