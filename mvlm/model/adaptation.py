"""Learning of each part of a model: all weights, none, or adapters of low rank (LoRA).

An adapter adds `alpha / rank * B A` to the weight of a linear layer, which stays as it is (Hu et al., LoRA, 2022;
initialised as in peft). It is a parametrization of the weight, so whatever reads `layer.weight` gets the sum.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mvlm.config.groups import PartSettings
from mvlm.model.network import MaskVLMNetwork
from mvlm_kernels.dispatch import without_autocast

PARTS = {
    "image": ("image_encoder",),
    "text": ("text_encoder",),
    "cross": ("image_cross", "text_cross", "image_decoder"),
}
"""Parts of a model -> the names of their modules. The setting `train_image` is of the part image, and so on."""
_ADAPTER = ".parametrizations.weight.0."
"""Middle of the name of an adapter's weight, between its layer's name and `a` or `b`."""


class Adapter(nn.Module):
    """Parametrization of a weight (out, in): the weight + alpha / rank * B A, with a (rank, in) and b (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        with without_autocast(weight.device):  # the sum keeps the digits that a product rounds off
            return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def adapt(model: MaskVLMNetwork, parts: PartSettings) -> None:
    """Freeze parts of the model, in place, and add adapters to those that learn by LoRA, as the settings `train_*` say.

    Adapters are added to the linear layers of blocks, unless these are frozen already.
    """
    for part, names in PARTS.items():
        how = getattr(parts, f"train_{part}")
        for module in (getattr(model, name) for name in names if how != "full"):
            # Blocks are numbered, in foreign towers too. What stands outside them embeds or projects.
            layers = [
                layer
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear)
                and layer.weight.requires_grad
                and any(map(str.isdigit, name.split(".")))
            ]
            module.requires_grad_(False)
            for layer in layers if how == "lora" else ():
                _add(layer, parts.lora_rank, parts.lora_alpha)


def _add(layer: nn.Linear, rank: int, alpha: float) -> None:
    # The check that `unsafe` leaves out computes the weight, also where it has no memory (on `meta`).
    parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank, alpha), unsafe=True)


def add_adapters(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], alpha: float) -> None:
    """Add an adapter to each linear layer of a module for which `shapes` has an adapter's tensors.

    Other names are ignored. shapes: name of a tensor -> its shape, as in the header of a checkpoint. alpha: of the
    adapters' factor alpha / rank.
    """
    layers = dict(module.named_modules())
    for name, shape in shapes.items():
        owner, _, tensor = name.rpartition(_ADAPTER)
        layer = layers.get(owner)
        if tensor == "a" and isinstance(layer, nn.Linear):
            _add(layer, shape[0], alpha)


def merge_adapters(module: nn.Module) -> None:
    """Add all adapters to the weights that they adapt, and remove them, in place."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear) and parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")


def unmerged(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Rename tensors of a model with adapters: a weight gets the name that it has without an adapter.

    shapes: name of a tensor -> its shape. Returns the shapes by the new names.
    """
    return {name.replace(".parametrizations.weight.original", ".weight"): shape for name, shape in shapes.items()}


def learned(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are frozen weights of the network.

    module: the network, or a task around one. tensors: by the names of its state_dict.
    """
    prefix = "" if isinstance(module, MaskVLMNetwork) else "model."
    frozen = {name for name, p in module.named_parameters() if name.startswith(prefix) and not p.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}
