"""Peers compute the op. Libraries that need a GPU are replaced by stand-ins that compute the same in torch."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mvlm_benchmarks.kernels import attention_peers, packed_attention_peers
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import prepare
from mvlm_benchmarks.kernels.inputs import Case, Inputs
from mvlm_benchmarks.kernels.measure import Outcome
from mvlm_benchmarks.kernels.peers import PEERS, Peer
from mvlm_benchmarks.kernels.reference import CaseData, run_reference
from support.benchmarks import FakeClock

CASES = cases(2, torch.float32)
ATTENTION = [case for case in CASES if case.op == "cross_attention" and "577" not in case.shape]
BY_NAME = {peer.name: peer for peer in PEERS}
NEEDS_CUDA = Outcome("missing", "needs a CUDA device")


def outcomes_of(peer: Peer, case: Case) -> set[Outcome]:
    """Outcomes of a peer's passes at a case on the CPU."""
    return set(prepare(peer, CaseData.make(case, "cpu"), FakeClock()).outcomes.values())


def of_attention(test):
    return pytest.mark.parametrize("case", ATTENTION, ids=[case.shape for case in ATTENTION])(test)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "gather-first", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.op} {case.shape}" for case in CASES])
def test_torch_peer_computes_the_op(name, case) -> None:
    if case.op in BY_NAME[name].builders:
        assert outcomes_of(BY_NAME[name], case) == {Outcome("ok")}


@pytest.mark.parametrize(
    "name, package", [("xformers", "xformers"), ("flash-attn-2", "flash_attn"), ("flash-attn-4", "flash_attn")]
)
def test_library_that_is_not_installed_is_missing(name, package, monkeypatch) -> None:
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    (outcome,) = outcomes_of(BY_NAME[name], ATTENTION[0])
    assert (outcome.status, package in outcome.note) == ("missing", True)


def attend(q, k, v):
    """(B, L, H, D) each."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_packed(q, k, v, ends_q, ends_k):
    spans = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return torch.cat([attend(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in spans])


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
            torch.cat([x[:, i * attn_bias.padding :][:, :n] for i, n in enumerate(attn_bias.rows_k)], 1) for x in (k, v)
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


@pytest.fixture
def stand_ins(monkeypatch) -> pytest.MonkeyPatch:
    """Modules with the names and signatures of the libraries, which run without a GPU."""
    blocks = types.SimpleNamespace(BlockDiagonalMask=Blocks, BlockDiagonalPaddedKeysMask=Blocks)
    modules = {
        "flash_attn": {"flash_attn_func": attend, "flash_attn_varlen_func": varlen},
        "flash_attn.cute": {
            "flash_attn_func": lambda q, k, v: (attend(q, k, v), None),
            "flash_attn_varlen_func": lambda *args, **options: (varlen(*args, **options), None),
        },
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {"attn_bias": blocks},
        "torch.nn.attention.varlen": {
            "varlen_attn": lambda q, k, v, ends_q, ends_k, longest_q, longest_k: varlen(
                q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k
            )
        },
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerSoftmaxFunction": Softmax},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["varlen", "xformers", "flash-attn-2", "flash-attn-4", "liger"])
@of_attention
def test_library_gets_arguments_that_compute_the_op(name, case, stand_ins) -> None:
    assert outcomes_of(BY_NAME[name], case) == {NEEDS_CUDA}
    for module in (attention_peers, packed_attention_peers):
        stand_ins.setattr(module, "require_cuda", lambda inputs: None)
    assert outcomes_of(BY_NAME[name], case) == {Outcome("ok")}


@pytest.mark.slow
@of_attention
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
