"""What timm's, torchvision's and torch's own tools do with swapped models: trace, script, extract features, copy."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations import transformers as for_transformers  # noqa: E402
from mvlm_kernels.integrations.blocks import Swapped, swap_blocks  # noqa: E402
from mvlm_kernels.integrations.timm import swap  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning"),  # of timm's own code
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # as timm's own code warns of shapes
]


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    with timm.layers.set_scriptable(True):
        return timm.models.VisionTransformer(**(sizes | options)).eval()


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def swapped(model: Any) -> Any:
    assert len(swap_blocks(model).swapped) == 4
    assert swap(model).swapped
    return model


def read_again(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda model: read_again(fx.symbolic_trace(model))])
def test_a_traced_model_calls_the_ops_where_it_runs(trace: Callable[[nn.Module], nn.Module], fused_calls: list[str]):
    model = swapped(vit())
    graph = trace(model)
    fused_calls.clear()
    with torch.no_grad():
        assert torch.equal(graph(IMAGES), model(IMAGES))  # a CPU: their own code
        assert not fused_calls
        with use_backend("torch"):
            assert torch.equal(graph(IMAGES), model(IMAGES))
    assert fused_calls == ["add_layer_norm", "gelu_linear"] * 4
    torch.testing.assert_close(graph(IMAGES), vit()(IMAGES))


def test_a_traced_feed_forward_layer_drops_values_while_it_trains():
    """The graph is traced in eval mode; a traced copy of the op's call would never drop any."""
    graph = fx.symbolic_trace(swapped(vit(proj_drop_rate=0.5)).blocks).train()
    x = torch.rand(2, 5, 32)
    with use_backend("torch"):
        graph.eval()
        assert torch.equal(graph(x), graph(x))
        graph.train()
        assert not torch.equal(graph(x), graph(x))


@pytest.mark.parametrize("kind", ["Mlp", "PatchEmbed"])
def test_a_traced_part_alone_is_its_own_code(kind: str):
    part, x = {
        "Mlp": lambda: (timm.layers.Mlp(8, 16), torch.rand(3, 8)),
        "PatchEmbed": lambda: (timm.layers.PatchEmbed(16, 8), IMAGES),
    }[kind]()
    wanted = part(x)
    assert swap_blocks(part).swapped or swap(part).swapped
    assert torch.equal(fx.symbolic_trace(part)(x), wanted)


def test_a_traced_output_layer_of_bert_is_one_node(fused_calls: list[str]):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32)
            self.output = transformers.models.bert.modeling_bert.BertSelfOutput(config)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.output(x, input_tensor=y)

    holder, states = Holder().eval(), torch.rand(2, 3, 16)
    wanted = holder(states, states)
    assert swap_blocks(holder).swapped
    with use_backend("torch"):
        torch.testing.assert_close(fx.symbolic_trace(holder)(states, states), wanted)
    assert fused_calls == ["add_layer_norm"]
    assert torch.equal(torch.jit.script(holder)(states, states), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers' own code
def test_a_jit_traced_model_of_transformers_has_the_librarys_own_attention():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.arange(14).reshape(2, 7)
    wanted = model(ids).last_hidden_state
    assert for_transformers.swap(model).swapped
    with use_backend("torch"):
        graph: Any = torch.jit.trace(model, ids, strict=False)
    assert torch.equal(graph(ids)["last_hidden_state"], wanted)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_features_are_extracted_by_name(library: str):
    if library == "timm":
        extract = timm.layers.create_feature_extractor
    else:
        extract = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    names = ["patch_embed", "blocks.0.mlp", "blocks.0.attn.proj", "blocks.1", "head"]
    wanted = extract(vit(), names)(IMAGES)
    model = swapped(vit())
    with use_backend("torch"):
        found = extract(model, names)(IMAGES)
        assert torch.equal(found["head"], model(IMAGES))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torchscript_compiles_the_librarys_own_code(fused_calls: list[str]):
    wanted, model = vit()(IMAGES), vit()
    assert len(swap_blocks(model).swapped) == 4
    swap(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(IMAGES), wanted)
    torch.testing.assert_close(torch.jit.script(fx.symbolic_trace(model))(IMAGES), wanted)
    with use_backend("torch"):
        model(IMAGES)
        assert fused_calls == ["add_layer_norm", "gelu_linear"] * 2  # the swap is still there
        graph: Any = torch.jit.trace(model, IMAGES)
    assert torch.equal(graph(IMAGES), wanted)


def test_a_patch_embedding_that_normalises_is_not_scripted():
    """Its own code would read pixels that nobody normalises."""
    model = vit()
    report = swap(model, mean=(0.5,) * 3, std=(0.2,) * 3)
    wanted = model(IMAGES)
    for tool in (torch.jit.script, lambda model: fx.symbolic_trace(model.patch_embed)):
        with pytest.raises(ValueError, match="swapped without mean and std"):
            tool(model)
    assert torch.equal(model(IMAGES), wanted)
    assert torch.equal(fx.symbolic_trace(model)(IMAGES), wanted)
    report.undo()
    assert torch.jit.script(model)(IMAGES).shape == wanted.shape


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, read_again])
def test_a_copy_is_swapped_too(clone: Callable[[Any], Any], fused_calls: list[str]):
    model = swapped(vit())
    other = clone(model)
    assert [str(part.reason) for part in swap_blocks(other).parts] == [str(p.reason) for p in swap_blocks(model).parts]
    with use_backend("torch"):
        torch.testing.assert_close(other(IMAGES), model(IMAGES))
    assert fused_calls == ["add_layer_norm", "gelu_linear"] * 4


def test_undo_refuses_a_module_that_has_got_another_class():
    """As fully_shard gives one, whose class must not be lost."""
    model = vit()
    report = swap_blocks(model)
    kind = type(model.blocks[1])
    model.blocks[1].__class__ = type("Sharded", (kind,), {})
    with pytest.raises(RuntimeError, match="found Sharded"):
        report.undo()
    assert isinstance(model.blocks[0], Swapped)
    model.blocks[1].__class__ = kind
    report.undo()
    report.undo()
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block
