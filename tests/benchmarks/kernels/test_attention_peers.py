"""Peers of attention. Libraries that need a GPU are replaced by stand-ins that compute the same in torch."""

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mvlm_benchmarks.kernels import attention_peers, packed_attention_peers
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.checks import expected_kernels
from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.kernels.measure import Outcome
from mvlm_benchmarks.kernels.peers import PEERS
from mvlm_benchmarks.kernels.reference import run_reference
from support.benchmarks import check_peer

CASES = [case for case in cases(2, torch.float32) if case.op == "cross_attention" and "577" not in case.shape]
IDS = [case.shape for case in CASES]
BY_NAME = {peer.name: peer for peer in PEERS}
NEEDS_CUDA = Outcome("missing", "needs a CUDA device")


@pytest.mark.parametrize(
    "name, package",
    [("xformers", "xformers"), ("flash-attn-2", "flash_attn"), ("flash-attn-4", "flash_attn"), ("mslk", "mslk"),
     ("cudnn-frontend", "cudnn")],
)  # fmt: skip
def test_library_that_is_not_installed_is_missing(name, package, monkeypatch) -> None:
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    outcomes = check_peer(BY_NAME[name], CASES[0])
    assert {outcome.status for outcome in outcomes.values()} == {"missing"}
    assert package in outcomes["forward"].note


@pytest.mark.parametrize("name", ["sdpa-efficient", "sdpa-cudnn"])
def test_sdpa_backend_that_needs_cuda_is_missing_on_a_cpu(name) -> None:
    assert set(check_peer(BY_NAME[name], CASES[0]).values()) == {NEEDS_CUDA}


def attend(q, k, v):
    """(B, L, H, D) each."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_packed(q, k, v, ends_q, ends_k):
    spans = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return torch.cat([attend(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in spans])


def fake_module(name: str, contents: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


@pytest.fixture
def stand_ins(monkeypatch) -> pytest.MonkeyPatch:
    """Modules with the names and signatures of the libraries, which run without a GPU."""

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        return attend_packed(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist())

    class Blocks:
        def __init__(self, rows_q, rows_k, padding=None):
            self.rows_q, self.rows_k, self.padding = rows_q, rows_k, padding

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, kv_padding=None):
            return cls(q_seqlen, kv_seqlen, kv_padding)

    def memory_efficient_attention(q, k, v, attn_bias=None):
        if attn_bias is None:
            return attend(q, k, v)
        assert q.shape[0] == k.shape[0] == 1
        if attn_bias.padding is not None:
            k, v = (
                torch.cat([x[:, i * attn_bias.padding :][:, :n] for i, n in enumerate(attn_bias.rows_k)], 1)
                for x in (k, v)
            )
        ends = [[0, *torch.tensor(rows).cumsum(0).tolist()] for rows in (attn_bias.rows_q, attn_bias.rows_k)]
        return attend_packed(q[0], k[0], v[0], *ends)[None]

    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(y := x.softmax(-1))
            return y

        @staticmethod
        def backward(ctx, *grads):
            (y,) = ctx.saved_tensors
            return y * (grads[0] - (y * grads[0]).sum(-1, keepdim=True))

    modules = {
        "flash_attn": {"flash_attn_func": attend, "flash_attn_varlen_func": varlen},
        "flash_attn.cute": {
            "flash_attn_func": lambda q, k, v: (attend(q, k, v), None),
            "flash_attn_varlen_func": lambda *args, **options: (varlen(*args, **options), None),
        },
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {
            "attn_bias": fake_module("attn_bias", {"BlockDiagonalMask": Blocks, "BlockDiagonalPaddedKeysMask": Blocks})
        },
        "mslk": {},
        "mslk.attention": {},
        "mslk.attention.fmha": {
            "memory_efficient_attention": memory_efficient_attention,
            "attn_bias": fake_module("attn_bias", {"BlockDiagonalMask": Blocks, "BlockDiagonalPaddedKeysMask": Blocks}),
        },
        "torch.nn.attention.varlen": {
            "varlen_attn": lambda q, k, v, ends_q, ends_k, longest_q, longest_k: varlen(
                q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k
            )
        },
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerSoftmaxFunction": Softmax},
    }
    for name, contents in modules.items():
        monkeypatch.setitem(sys.modules, name, fake_module(name, contents))
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["varlen", "xformers", "mslk", "flash-attn-2", "flash-attn-4", "liger"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_library_gets_arguments_that_compute_the_op(name, case, stand_ins) -> None:
    assert set(check_peer(BY_NAME[name], case).values()) == {NEEDS_CUDA}
    for module in (attention_peers, packed_attention_peers):
        stand_ins.setattr(module, "require_cuda", lambda inputs: None)
    outcomes = check_peer(BY_NAME[name], case)
    assert {outcome.status for outcome in outcomes.values()} == {"ok"}, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_gets_arguments_that_compute_the_op(case, monkeypatch) -> None:
    """Uncompiled and without gradients: FlexAttention does no more on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = case.make("cpu")
    wanted = run_reference(case, inputs).out
    plain = Inputs({name: x.detach() for name, x in inputs.leaves.items()}, inputs.fixed)
    found = attention_peers.flex(plain)(*plain.leaves.values())
    assert found.is_contiguous()
    torch.testing.assert_close((found.double(),), wanted, rtol=1e-4, atol=1e-5)


def test_our_kernels_take_image_patches_on_demand(monkeypatch) -> None:
    """The contender launches our kernels at 197x197, and has nothing to add where one side is short."""
    peer = BY_NAME["ours-256"]
    assert set(check_peer(peer, CASES[0]).values()) == {NEEDS_CUDA}
    monkeypatch.setattr(attention_peers, "require_cuda", lambda inputs: None)
    assert {outcome.status for outcome in check_peer(peer, CASES[0]).values()} == {"not applicable"}
    (case,) = [case for case in CASES if "197x197" in case.shape]
    inputs = case.make("cpu")
    with peer.context():
        function = peer.builders["cross_attention"](inputs)
        assert expected_kernels(lambda: function(*inputs.leaves.values())) == ["short_kv_forward"]
