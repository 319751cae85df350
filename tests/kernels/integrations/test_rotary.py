"""Swapped self-attention of timm with rotary positions: outputs, gradients, the report, and what is kept by name."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from mvlm_kernels import explain_model, use_backend  # noqa: E402
from mvlm_kernels.integrations.blocks import swap_blocks  # noqa: E402

SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2.0,
    "use_rot_pos_emb": True,
}  # fmt: skip
DINOV3: dict[str, Any] = {
    "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "qkv_bias": False, "init_values": 0.3,
    "use_abs_pos_emb": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dinov3": DINOV3,
    "dinov3, LayerNorm of queries and keys": DINOV3 | {"qk_norm": True},
    "eva-02": {"scale_attn_inner": True},
    "eva-02, RMSNorm, no positions": {"qk_norm": True, "norm_layer": timm.layers.RmsNorm, "use_rot_pos_emb": False},
    # Older versions of timm, which lack the first option, have other tables of dropped patches.
    "eva-02, dropped patches and attention": {"qk_norm": False, "patch_drop_rate": 0.4, "attn_drop_rate": 0.2},
    "perception encoder": {"attn_type": "rope", "rope_grid_indexing": "xy"},
}
LEARNED = {"rope_type": "mixed", "attn_type": "rope"}
"""Angles of each head and layer, that are parameters."""
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def skip_without(kind: Any, options: Any) -> None:
    """Skip the test in versions of timm whose class lacks an option, or that lack the class."""
    if kind is None or not {*options} <= inspect.signature(kind).parameters.keys():
        pytest.skip("this version of timm has no such model")


def eva(**options: Any) -> Any:
    """A small EVA with random parameters, also where timm starts with 0 or 1, in float64."""
    skip_without(timm.models.eva.Eva, options)
    torch.manual_seed(0)
    model = timm.models.eva.Eva(**(SIZES | options)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def attentions(report: Any) -> list[Any]:
    return [part for part in report.parts if part.kind in ("EvaAttention", "AttentionRope")]


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of every parameter that has one, for fixed images and a fixed loss."""
    torch.manual_seed(3)  # dropout draws the same
    model.zero_grad()
    output = model(IMAGES.double())
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_a_swapped_model_has_the_same_outputs_and_gradients(name: str, backend: Any, fused_calls: list[str]):
    model = eva(**MODELS[name]).train()
    wanted = run(model)
    report = swap_blocks(model)
    assert [part.reason for part in attentions(report)] == [None] * 2
    with use_backend(backend):
        found = run(model)
    assert fused_calls.count("qk_norm_rope") == 2
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    report.undo()
    torch.testing.assert_close(run(model), wanted, rtol=0, atol=0)
    assert fused_calls.count("qk_norm_rope") == 2


def test_the_report_names_what_is_fused():
    rotated = "rotation of queries and keys"
    for options, wanted in (({}, rotated), ({"qk_norm": True}, f"LayerNorm, {rotated}")):
        report = swap_blocks(eva(**options))
        assert [part.fused for part in attentions(report)] == [wanted] * 2
        assert f"(EvaAttention): {wanted}\n" in str(report)


class Wrapped(nn.Module):
    """A norm in a wrapper."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.norm(x)


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda *call: 2 * call[2])
    return norm


def of_another_eps(norm: Any) -> nn.Module:
    norm.eps = 0.5
    return norm


@pytest.mark.parametrize(
    "change, word", [(Wrapped, "got Wrapped"), (hooked, "has hooks"), (of_another_eps, "norms differ")]
)
@pytest.mark.parametrize("first", ["change", "swap"])
def test_a_changed_norm_has_its_effect(change: Any, word: str, first: str, fused_calls: list[str]):
    model = eva(qk_norm=True).eval()
    if first == "swap":
        swap_blocks(model)
    for block in model.blocks:
        block.attn.k_norm = change(block.attn.k_norm)
    plain = copy.deepcopy(model)
    if first == "change":
        report = swap_blocks(model)
        assert [word in str(part.reason) for part in attentions(report)] == [True] * 2
    with use_backend("torch"):
        found = run(model)
    torch.testing.assert_close(found, run(plain), rtol=1e-9, atol=1e-11)
    assert "qk_norm_rope" not in fused_calls


def test_attention_that_the_op_cannot_compute_is_kept_with_a_reason():
    separate = swap_blocks(eva(qkv_fused=False))
    assert ["a projection each" in str(part.reason) for part in attentions(separate)] == [True] * 2
    timm.layers.set_fused_attn(False)
    try:
        model = eva()
    finally:
        timm.layers.set_fused_attn(True)
    assert ["fused attention is off" in str(part.reason) for part in attentions(swap_blocks(model))] == [True] * 2


@pytest.mark.parametrize(
    "options, word", [(LEARNED, "angles"), ({"use_rot_pos_emb": False}, "neither normed nor rotated")]
)
def test_calls_that_the_op_cannot_compute_run_timms_own_forward(options: Any, word: str):
    model = eva(**options)
    wanted = run(model)
    swap_blocks(model)
    with use_backend("torch"):
        torch.testing.assert_close(run(model), wanted, rtol=1e-9, atol=1e-11)
    found = explain_model(model, IMAGES.double(), as_if="sm_90")
    assert [word in str(call.reasons) for call in found.calls if call.op == "qk_norm_rope"] == [True] * 2


def gated() -> Any:
    kind = getattr(timm.layers, "AttentionRope", None)
    skip_without(kind, ["gated"])
    assert kind is not None
    return kind(48, num_heads=2, gated=True, qk_norm=True, scale_norm=True, norm_layer=timm.layers.LayerNorm).double()


@pytest.mark.parametrize("make", [lambda: eva(**DINOV3).blocks[0].attn, gated], ids=["eva", "gated"])
def test_masks_causal_attention_and_gates_are_those_of_the_original(make: Any, fused_calls: list[str]):
    torch.manual_seed(0)
    attn, x = make().eval(), torch.randn(2, 21, 48).double()
    rope = torch.randn(21 - attn.num_prefix_tokens, 48).double()
    cases = ({"attn_mask": torch.rand(2, 1, 1, 21) < 0.7}, {"is_causal": True})
    wanted = [attn(x, rope, **case) for case in cases]
    swap_blocks(attn)
    with use_backend("torch"):
        found = [attn(x, rope=rope, **case) for case in cases]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    assert fused_calls == ["qk_norm_rope"] * 2


def test_autocast_gives_the_same_dtypes_and_values(fused_calls: list[str]):
    def output(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(IMAGES)

    model = eva(**DINOV3, qk_norm=True).float().eval()
    exact, wanted = model(IMAGES), output(model)
    swap_blocks(model)
    with use_backend("torch"):
        found = output(model)
    assert "qk_norm_rope" in fused_calls
    assert found.dtype == wanted.dtype
    error, theirs = ((x.float() - exact).abs().mean() for x in (found, wanted))
    assert error < 1.3 * theirs, (error, theirs)


def test_a_model_is_explained_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mvlm_kernels.dispatch.interpreting", lambda: False)
    model = eva(**DINOV3).bfloat16()
    found = explain_model(model, IMAGES.bfloat16(), as_if="sm_90")
    calls = [call for call in found.calls if call.op == "qk_norm_rope"]
    assert [(call.path, call.shape, call.reasons) for call in calls] == [
        (f"blocks.{i}.attn", (2, 21, 3, 2, 24), ()) for i in range(2)
    ]


@pytest.mark.slow
def test_compiled_attention_has_no_graph_break():
    attn, x, rope = eva(**DINOV3, qk_norm=True).blocks[0].attn, torch.randn(2, 21, 48), torch.randn(16, 48)
    swap_blocks(attn.float())
    with use_backend("torch"):
        torch.testing.assert_close(torch.compile(attn, fullgraph=True, backend="eager")(x, rope), attn(x, rope))


@pytest.mark.slow
@pytest.mark.plain_empty  # TorchScript compiles calls of it
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_copies_graphs_and_torchscript(fused_calls: list[str]):
    with timm.layers.set_scriptable(True):
        model = eva(**DINOV3, qk_norm=True, depth=1).eval()
    x, own = IMAGES.double(), model(IMAGES.double())
    swap_blocks(model)
    assert torch.equal(torch.jit.script(model)(x), own)
    with use_backend("torch"):
        wanted = model(x)
        graph = torch.fx.symbolic_trace(model)
        fused_calls.clear()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), graph):
            torch.testing.assert_close(other(x), wanted)
    assert fused_calls.count("qk_norm_rope") == 3
