"""Every peer that this machine can run computes the op; the others are fed by stand-ins that do the same in torch."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from mvlm_benchmarks.kernels import attention_peers
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import prepare
from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.kernels.measure import expect
from mvlm_benchmarks.kernels.peers import PEERS
from mvlm_benchmarks.reasons import Missing

CASES = cases(2, torch.float32)
ATTENTION = [case for case in CASES if case.op == "cross_attention" and "577" not in case.shape]
IDS = [case.shape for case in ATTENTION]
BY_NAME = {peer.name: peer for peer in PEERS}


def outcomes(peer, case, clock):
    inputs = case.make("cpu")
    found = prepare(peer, case, inputs, expect(case, inputs), clock, "cpu").outcomes
    return {name: (outcome.status, outcome.note) for name, outcome in found.items()}


def all_ok(found) -> bool:
    return {status for status, _ in found.values()} == {"ok"}


@pytest.mark.parametrize("name", ["eager", "gather-first", "sdpa-math", "sdpa-flash"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.op} {case.shape}" for case in CASES])
def test_torch_peers_are_right(name, case, clock) -> None:
    peer = BY_NAME[name]
    if case.op in peer.builders:
        found = outcomes(peer, case, clock)
        assert all_ok(found), found


def test_every_op_has_the_usual_composition_and_its_compiled_form() -> None:
    assert set(BY_NAME["eager"].builders) == set(BY_NAME["compile"].builders) == {case.op for case in CASES}


@pytest.mark.parametrize(
    "name, package", [("xformers", "xformers"), ("flash-attn-2", "flash_attn"), ("flash-attn-4", "flash_attn")]
)
def test_a_library_that_is_not_installed_is_missing(name, package, clock, monkeypatch) -> None:
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    found = outcomes(BY_NAME[name], ATTENTION[0], clock)
    assert {status for status, _ in found.values()} == {"missing"}
    assert package in found["forward"][1]


@pytest.mark.parametrize("name", ["sdpa-efficient", "sdpa-cudnn"])
def test_what_needs_cuda_says_so_on_a_cpu(name, clock) -> None:
    assert set(outcomes(BY_NAME[name], ATTENTION[0], clock).values()) == {("missing", "needs a CUDA device")}


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "cross_attention"], ids=lambda case: case.shape)
def test_liger_says_why_it_does_not_apply(case, clock) -> None:
    found = set(outcomes(BY_NAME["liger"], case, clock).values())
    assert len(found) == 1
    status, note = found.pop()
    assert status == "not applicable"
    assert note.startswith("liger-kernel ")


def attend(q, k, v):
    """(B, L, H, D) each."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_packed(q, k, v, ends_q, ends_k):
    spans = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return torch.cat([attend(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in spans])


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules with the libraries' names and signatures, so that what is handed to them is tested without a GPU."""

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
            "attn_bias": types.SimpleNamespace(BlockDiagonalMask=Blocks, BlockDiagonalPaddedKeysMask=Blocks)
        },
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerSoftmaxFunction": Softmax},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return monkeypatch


@pytest.mark.parametrize("name", ["xformers", "flash-attn-2", "flash-attn-4", "liger"])
@pytest.mark.parametrize("case", ATTENTION, ids=IDS)
def test_libraries_are_fed_right(name, case, clock, stand_ins) -> None:
    assert set(outcomes(BY_NAME[name], case, clock).values()) == {("missing", "needs a CUDA device")}
    stand_ins.setattr(attention_peers, "_need_cuda", lambda inputs: None)
    found = outcomes(BY_NAME[name], case, clock)
    assert all_ok(found), found


@pytest.mark.parametrize("case", ATTENTION, ids=IDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_fed_right(case, monkeypatch) -> None:
    """Uncompiled and without gradients, which is what FlexAttention does on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = case.make("cpu")
    wanted = expect(case, inputs).out
    plain = Inputs({name: x.detach() for name, x in inputs.leaves.items()}, inputs.fixed)
    found = attention_peers.flex(plain)(*plain.leaves.values())
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_missing_is_not_an_error_of_the_peer() -> None:
    assert not issubclass(Missing, RuntimeError)
