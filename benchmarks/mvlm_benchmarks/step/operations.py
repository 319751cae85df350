"""Operations that the host queues for a step of the fast implementation on a GPU, counted without one.

    python -m mvlm_benchmarks.step.operations [--preset base] [--pairs 64] [--json FILE]

Forward and backward run on meta tensors, which have shapes and no values, up to the launches. An operation is a launch
of a kernel of ours, or an op of torch that computes or copies. Views and allocations queue nothing and are counted
apart: they take the host's time alone. The update runs on fake tensors. The number of pairs does not matter.

Meta tensors know no autocast, so linear layers are cast as it would: each weight once in a forward pass. SDPA is one
operation in either pass, as its fused kernels are. What ops compute once for all readers of an index is counted for
each reader, because the counter sees all tensors as special: some 40 operations too many for `base`.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.costs.step_cost import fake_microbatch, give_fake_tensors
from mvlm.costs.step_kernels import model_of
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.shadow_weights import shadow_weights
from mvlm.training.metrics import finite_update, gradient_norms
from mvlm.training.optimizer import make_optimizer
from mvlm_dataloading.files import write_json
from mvlm_kernels import dispatch, use_backend

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "short_", "long_", "sum_splits"),
    "norms and GELU": ("add_norm", "native_layer_norm", "gelu"),
    "sums of parts for small gradients": ("column_sum",),
    "casts and copies": ("_to_copy", "copy", "clone", "cat", "stack", "_foreach_copy"),
    "gradients added": ("add ",),
    "other launches of ours": ("gather", "place", "pixel"),
}  # fmt: skip
REST = "all else"
FREE = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "prim",
    "mvlm_kernels::",
    "aten::promote_types",
    "profiler",
)
"""Allocations, views that a schema does not call so, properties, and ops of ours, whose launches are counted."""


class Operations(TorchDispatchMode):
    """Counts operations and views by name, those of backward under a name that ends in " backward"."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self._add(self.views if aliases or name.startswith(FREE) else self.queued, name.split("::")[1])
        return func(*args, **(kwargs or {}))

    def record(self, kernel: Any, grid: tuple[int, ...], args: Any, meta: Any) -> None:
        """Count a launch; called by `dispatch.recording`."""
        if 0 not in grid:
            self._add(self.queued, kernel.__name__)

    def _add(self, counter: Counter[str], name: str) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        counter[f"{name} backward" if in_backward else name] += 1

    def by_kind(self) -> dict[str, int]:
        """Number of queued operations of each kind."""
        found = dict.fromkeys((*KINDS, REST), 0)
        for name, number in self.queued.items():
            found[next((kind for kind, starts in KINDS.items() if name.startswith(starts)), REST)] += number
        return found


class Autocast(TorchFunctionMode):
    """Casts of CUDA's autocast on the meta device, and its fused SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [self._in_bf16(x) if isinstance(x, Tensor) else x for x in args]
        if func is F.layer_norm and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))

    def _in_bf16(self, x: Tensor) -> Tensor:
        if dispatch.autocast_dtype(x.device) is None or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if id(x) not in self._cast:
            self._cast[id(x)] = x.bfloat16()
        return self._cast[id(x)]


def count(preset: str, pairs: int = 64) -> Operations:
    """Operations of a whole step of a preset: forward, backward and update."""
    config = MaskVLMConfig.preset(preset, cross_norm="post")
    model, found = model_of(config), Operations()
    with torch.device("meta"):
        batch, masks = fake_microbatch(config, pairs, 12, 30)
    shadows = shadow_weights(model)
    assert shadows is not None
    with (
        dispatch.recording(found.record, 90, torch.bfloat16),
        use_backend("triton"),
        Autocast(),
        found,
        shadows.in_use(),
    ):
        model(batch, masks, plan="fast").total.backward()
    _count_update(preset, config, found)
    return found


def _count_update(preset: str, config: MaskVLMConfig, found: Operations) -> None:
    """Count what follows backward: norms, clipping and the optimizer."""
    with torch.device("meta"):
        model = MaskVLM(config)
    gpu = torch.device("cuda")
    with FakeTensorMode(), gpu:
        give_fake_tensors(model)
        settings = PretrainConfig.preset(preset, data=Path(), out=Path(), precision="bf16")
        optimizer = make_optimizer(model, settings, gpu)
        for counting in (Operations(), found):  # the first step makes the optimizer's state
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            with counting:
                norm, _ = gradient_norms(model)
                optimizer.clip(norm, 1.0)
                optimizer.found_inf = torch.zeros(())
                optimizer.step()
                model.clamp_temperature()
    scalar = torch.zeros((), device="meta")
    with found:
        (~finite_update(scalar, scalar)).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.step.operations", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", default="base", choices=["tiny", "small", "base"])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--names", action="store_true", help="also print the numbers by name")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    found = count(options.preset, options.pairs)
    kinds = found.by_kind() | {"sum": sum(found.queued.values()), "views and allocations": sum(found.views.values())}
    for kind, number in kinds.items():
        print(f"{number:6} {kind}")
    for counter in (found.queued, found.views) if options.names else ():
        print()
        for name, number in counter.most_common():
            print(f"{number:6} {name}")
    if options.json:
        write_json(options.json, {"preset": options.preset, **kinds})


if __name__ == "__main__":
    main()
