"""Swapped blocks of timm and transformers: results, gradients, what is honoured after a swap, and refusals."""

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations.blocks import swap_blocks  # noqa: E402
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, OTHER_FORWARD  # noqa: E402
from support.kernels.rooms import every_room, room_for  # noqa: E402


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**(sizes | options))


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(intermediate_size=96, **sizes, **options), False)


def normed_mlp(*sizes: Any, **options: Any) -> Any:
    """A feed-forward layer with a norm in its middle, which only newer versions of timm's Block have an option for."""
    return timm.layers.Mlp(*sizes, **(options | {"norm_layer": nn.LayerNorm}))


def timm_gelu() -> Any:
    """The activation of Swin V2, MaxViT and GC ViT."""
    return timm.layers.activations.GELU(inplace=True)


def inputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.BertModel):
        return torch.randint(50, (2, 7), generator=generator)
    return torch.rand(2, 3, 32, 32, generator=generator)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of every parameter for a fixed loss."""
    model.zero_grad()
    found = model(x)
    output = found if isinstance(found, Tensor) else found.last_hidden_state
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (output.float() * weights).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dino(**options: Any) -> Any:
    """An EvaBlock vision transformer, as DINOv3 and EVA-02 are: rotary positions, LayerScale."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.eva.Eva(**(sizes | {"use_rot_pos_emb": True, "mlp_ratio": 2.0} | options))


MODELS = {
    "vit": (vit, {}, ["add_layer_norm", "gelu_linear"] * 2),
    "vit, layer scale and dropped paths": (
        vit, {"init_values": 0.3, "drop_path_rate": 0.2}, ["add_layer_norm", "gelu_linear"] * 2
    ),
    "vit, layer scale and RMS norms": (
        vit, {"init_values": 0.3, "norm_layer": timm.layers.RmsNorm}, ["add_layer_norm", "gelu_linear"] * 2
    ),
    "vit, RMS norms of torch": (vit, {"norm_layer": nn.RMSNorm}, ["add_layer_norm", "gelu_linear"] * 2),
    "vit, norms without weights": (
        vit, {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, ["add_layer_norm", "gelu_linear"] * 2
    ),
    "dino, layer scale and dropped paths": (
        dino, {"init_values": 0.3, "drop_path_rate": 0.2}, ["qk_norm_rope", "add_layer_norm", "gelu_linear"] * 2
    ),
    "dino, gated feed-forward": (dino, {"swiglu_mlp": True, "scale_mlp": True}, ["qk_norm_rope", "add_layer_norm"] * 2),
    "vit, GELU of timm": (vit, {"act_layer": timm_gelu}, ["add_layer_norm", "gelu_linear"] * 2),
    "bert, dropout": (bert, {"hidden_dropout_prob": 0.3}, ["add_layer_norm"] * 4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_swapped_model_has_the_same_outputs_and_gradients(name, backend, fused_calls):
    make, options, expected = MODELS[name]
    model = make(**options).train()
    x = inputs(model)
    torch.manual_seed(3)
    wanted, gradients = run(model, x)
    names, plain, changed = list(model.state_dict()), copy.deepcopy(model), []
    report = swap_blocks(model)
    assert report.swapped
    assert not report.kept
    assert list(model.state_dict()) == names
    with use_backend(backend):
        torch.manual_seed(3)  # dropout draws the same
        output, found = run(model, x)
        assert fused_calls == expected
    with torch.no_grad():  # as training does: a swap keeps nothing of the weights that it has read
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.add_(0.01)
    with use_backend(backend):
        for one in (model, plain):
            torch.manual_seed(3)
            changed.append(run(one, x)[0])
    torch.testing.assert_close(*changed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    assert found.keys() == gradients.keys()
    for parameter in gradients:
        torch.testing.assert_close(found[parameter], gradients[parameter], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "model", [vit(), bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)], ids=["vit", "bert"]
)
def test_gradient_checkpointing_works_in_every_room_for_gelus(model, reentrant, monkeypatch):
    """As on a GPU, where a step saves as many GELUs as fit."""
    model = copy.deepcopy(model).train()
    x = inputs(model)
    swap_blocks(model)
    with use_backend("torch"):
        _, wanted = run(model, x)
        rooms = every_room(lambda: run(model, x))
        if isinstance(model, transformers.BertModel):
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        else:
            monkeypatch.setattr(timm.models._manipulate, "use_reentrant_ckpt", lambda: reentrant)
            model.set_grad_checkpointing()
        for size in rooms:
            with room_for(size):
                torch.testing.assert_close(run(model, x)[1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [vit, bert, partial(vit, init_values=0.3), partial(dino, init_values=0.3)])
def test_autocast_gives_the_same_dtypes_and_values(make, fused_calls):
    model = make().eval()
    x = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = run(model, x)
        swap_blocks(model)
        with use_backend("torch"):
            output, _ = run(model, x)
    assert fused_calls
    assert output.dtype == wanted.dtype
    exact, _ = run(make().eval(), x)
    error, theirs = ((found.float() - exact).abs().mean() for found in (output, wanted))
    assert error < 1.3 * theirs, (error, theirs)


def test_on_a_cpu_a_swapped_model_runs_its_own_code(fused_calls):
    model = vit().eval()
    x = inputs(model)
    wanted = model(x)
    swap_blocks(model)
    assert torch.equal(model(x), wanted)
    assert not fused_calls


def test_the_input_may_be_any_of_the_keywords(fused_calls):
    model = vit()
    x = torch.rand(2, 17, 48)
    wanted = model.blocks[0](x)
    # Blocks of older versions of timm take no mask.
    others = inspect.signature(model.blocks[0].forward).parameters.keys() & {"attn_mask"}
    swap_blocks(model)
    with use_backend("torch"):
        found = model.blocks[0](**dict.fromkeys(others), x=x)
    torch.testing.assert_close(found, wanted)
    assert fused_calls == ["add_layer_norm", "gelu_linear"]


def test_undo_puts_the_forwards_back(fused_calls):
    model = bert()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    report = swap_blocks(model)
    assert [part.reason for part in swap_blocks(model).parts] == [ALREADY_SWAPPED] * 4
    report.undo()
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


def test_dropout_between_the_layers_keeps_the_modules_own_forward(fused_calls):
    model = vit(proj_drop_rate=0.5).train()
    swap_blocks(model)
    with use_backend("torch"):
        model(inputs(model))
        assert fused_calls == ["add_layer_norm"] * 2
        model.eval()(inputs(model))
    assert fused_calls[2:] == ["add_layer_norm", "gelu_linear"] * 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_uses_its_own_parameters(clone, fused_calls):
    model = vit().eval()
    swap_blocks(model)
    other = clone(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with use_backend("torch"):
        assert other(inputs(other)).isfinite().all()
    assert fused_calls


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"act_layer": nn.SiLU}, "wanted GELU, got SiLU"),
        ({"act_layer": lambda: nn.GELU("tanh")}, "the op has the exact GELU"),
        ({"norm_layer": timm.layers.SimpleNorm}, "got SimpleNorm"),
        ({"act_layer": timm.layers.activations.GELUTanh}, "wanted GELU, got GELUTanh"),
        ({"mlp_layer": normed_mlp}, "wanted Identity, got LayerNorm"),
        ({"norm_layer": timm.layers.LayerNorm}, "timm's fast norm is on"),
    ],
)
def test_parts_that_an_op_cannot_compute_are_kept_with_a_reason(options, reason):
    timm.layers.set_fast_norm("fast norm" in reason)
    try:
        report = swap_blocks(vit(**options))
    finally:
        timm.layers.set_fast_norm(False)
    assert report.kept
    assert all(reason in (part.reason or "") for part in report.kept)


@pytest.mark.parametrize(
    "make, options, fused",
    [
        (vit, {}, "residual sum, LayerNorm"),
        (vit, {"init_values": 0.1}, "residual sum, LayerScale, LayerNorm"),
        (vit, {"norm_layer": timm.layers.RmsNorm}, "residual sum, RmsNorm"),
        (dino, {"init_values": 0.1, "norm_layer": timm.layers.RmsNorm}, "residual sum, LayerScale, RmsNorm"),
    ],
)
def test_the_report_names_what_is_fused(make, options, fused):
    report = swap_blocks(make(**options))
    found = [part.fused for part in report.parts if part.kind != "EvaAttention"]
    assert found == [fused, "GELU and second linear layer"] * 2
    assert f"): {fused}\n" in str(report)


@pytest.mark.parametrize("hooked", ["ls1", "drop_path1"])
def test_a_hook_on_a_layer_scale_or_behind_it_sees_what_it_saw(hooked, fused_calls):
    seen = []
    model = vit(init_values=0.3).eval()
    model.blocks[0].get_submodule(hooked).register_forward_hook(lambda *call: seen.append(call[2].detach()))
    x = inputs(model)
    wanted = model(x)
    swap_blocks(model)
    with use_backend("torch"):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*seen)
    assert fused_calls == ["add_layer_norm", "gelu_linear"] * 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_scaled_sum_in_16_bits_has_the_dtypes_of_the_original(weights):
    """The first block of a model under autocast, whose patch embedding gives 16 bits, and LayerScale in float32."""
    block = vit(init_values=0.3).blocks[0].to(weights).eval()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        wanted = block(x)
        swap_blocks(block)
        with use_backend("torch"):
            found = block(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compiled_blocks_have_no_graph_break():
    model = vit(depth=1, init_values=0.1, norm_layer=timm.layers.RmsNorm).eval()
    swap_blocks(model)
    with use_backend("torch"):
        wanted = model(inputs(model))
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(inputs(model))
    torch.testing.assert_close(found, wanted)


def test_dropout_layers_that_train_alone_have_their_effect():
    """Monte Carlo dropout: a model in eval mode whose dropout layers draw."""
    mlp = timm.layers.Mlp(8, 16, drop=0.5).eval()
    mlp.drop1.train()
    swap_blocks(mlp)
    x = torch.randn(4, 8)
    with use_backend("torch"):
        assert not torch.equal(mlp(x), mlp(x))


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(module).forward(module, x)


def test_a_forward_of_others_is_kept_and_called():
    """accelerate's hooks are such: partials on the instance."""
    mlp, x = timm.layers.Mlp(8, 16).eval(), torch.randn(4, 8)
    mlp.forward = partial(doubled, mlp)
    wanted = mlp(x)
    report = swap_blocks(mlp)
    assert [part.reason for part in report.parts] == [OTHER_FORWARD]
    report.undo()
    assert torch.equal(mlp(x), wanted)
    del mlp.forward
    report = swap_blocks(mlp)
    mlp.forward = partial(doubled, mlp)
    report.undo()
    assert torch.equal(mlp(x), wanted)
