"""Adapters, hooks and weight norm on layers of swapped models: outputs and gradients of the model without a swap.

Each is put on before the swap and after it. A layer whose parameters an op would read without calling it keeps its own
forward, by a reason that names the wrapper or the hooks.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations import timm as for_timm  # noqa: E402
from mvlm_kernels.integrations import transformers as for_transformers  # noqa: E402
from mvlm_kernels.integrations.blocks import swap_blocks  # noqa: E402

pytestmark = [
    pytest.mark.plain_empty,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft calls it
]
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-10}
VIT: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
BERT: Any = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


class Lora(nn.Module):
    """A linear layer or a conv with a low-rank addition. It shows nothing of the layer but calls it."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        else:
            self.down = nn.Conv2d(base.in_channels, 4, 8, 8, bias=False)
            self.up = nn.Conv2d(4, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


Change = Callable[[nn.Module, tuple[str, ...]], nn.Module]
"""Function of a model and of names of layers that returns the model changed."""


def layers(model: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, Any]]:
    """(parent, attribute, layer) of every layer whose path ends with one of the names."""
    found = [path for path, _ in model.named_modules() if path.endswith(names)]
    assert found
    return [(model.get_submodule(p.rpartition(".")[0]), p.rpartition(".")[2], model.get_submodule(p)) for p in found]


def lora_by_hand(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for parent, name, layer in layers(model, names):
        setattr(parent, name, Lora(layer))
    return model


def by_peft(model: nn.Module, names: tuple[str, ...], **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(names), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def dora_by_peft(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    return by_peft(model, names, use_dora=True)


def merged_by_peft(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    changed: Any = by_peft(model, names)
    return changed.merge_and_unload().requires_grad_()


def hooks(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for _, _, layer in layers(model, names):
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))
        layer.register_forward_hook(lambda _, __, out: out * 0.5 + 0.1)
        layer.register_full_backward_hook(lambda _, inputs, __: (inputs[0] * 1.2,) if inputs[0] is not None else None)
    return model


def weight_norm(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for _, _, layer in layers(model, names):
        changed: Any = nn.utils.parametrizations.weight_norm(layer)
        changed.parametrizations.weight.original0.data.mul_(1.5)
    return model


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**VIT)


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False).eval()


class Kind(NamedTuple):
    """A model: how it is built, swapped by its library's integration, and called on (images or states, tokens)."""

    build: Callable[[], nn.Module]
    swap: Callable[[nn.Module], Any]
    call: Callable[[nn.Module, Tensor], Tensor]


def draw(low: int, *shape: int) -> Tensor:
    return torch.randint(low, shape, generator=torch.Generator().manual_seed(1))


EXISTS = (torch.arange(7) < torch.tensor([[7], [4]])).long()
VISION = Kind(vit, for_timm.swap, lambda model, x: model(x))
TEXT = Kind(bert, for_transformers.swap, lambda model, _: model(draw(50, 2, 7), EXISTS)[0])


def swap(kind: Kind, model: nn.Module) -> list[str]:
    """Swap all that can be, and return the reasons of what was kept."""
    return [str(part.reason) for report in (swap_blocks(model), kind.swap(model)) for part in report.kept]


def run(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """Output, and the gradients of the input, if it is floating, and of every parameter that has one."""
    x = (draw(256, 2, 3, 32, 32) / 255).requires_grad_()
    output = kind.call(model, x)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **found} | ({} if x.grad is None else {"input": x.grad})


@pytest.fixture(autouse=True)
def ops_run_in_float64() -> Iterator[None]:
    """In float32 a gradient differs by more than an op's fault would on some processors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with use_backend("torch"):
        yield
    torch.set_default_dtype(before)


LAYERS = {
    "vit, patches": (VISION, ("patch_embed.proj",), "proj"),
    "vit, attention": (VISION, ("qkv", "attn.proj"), None),
    "vit, MLP": (VISION, ("fc1", "fc2"), "Linear"),
    "bert, attention": (TEXT, ("query", "value"), None),
    "bert, outputs": (TEXT, ("output.dense",), None),
}
"""Kind of model, layers, and a word of the reason why a part is kept if they are changed first: None if all swap."""
CHANGES: dict[str, Change] = {
    "LoRA": lora_by_hand,
    "LoRA of peft": by_peft,
    "DoRA of peft": dora_by_peft,
    "merged by peft": merged_by_peft,
    "hooks": hooks,
    "weight norm": weight_norm,
}
READABLE = {("vit, patches", "weight norm"), *((name, "merged by peft") for name in LAYERS)}
"""Layers that are swapped though they are changed: a weight that is computed can be read."""


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("first", ["change", "swap"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_has_its_effect(change: str, name: str, first: str):
    kind, names, reason = LAYERS[name]
    model = kind.build()
    torch.manual_seed(2)
    model = CHANGES[change](model, names)
    wanted = run(kind, model)
    assert len(wanted) > 1
    if first == "swap":
        model = kind.build()
        assert swap(kind, model) == []
        torch.manual_seed(2)
        model = CHANGES[change](model, names)
    else:
        model.zero_grad()
        kept = swap(kind, model)
        assert len(kept) == 0 if reason is None or (name, change) in READABLE else reason in kept[0]
    found = run(kind, model)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("first", ["change", "swap"])
@pytest.mark.parametrize("kind, norm", [(VISION, "norm2"), (TEXT, "LayerNorm")], ids=["vit", "bert"])
def test_hooks_on_a_norm_have_their_effect(kind: Kind, norm: str, first: str):
    wanted = run(kind, hooks(kind.build(), (norm,)))
    model = kind.build()
    if first == "change":
        hooks(model, (norm,))
        assert all("LayerNorm has hooks" in reason for reason in swap(kind, model))
    else:
        assert swap(kind, model) == []
        hooks(model, (norm,))
    torch.testing.assert_close(run(kind, model), wanted, **CLOSE)
