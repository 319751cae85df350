"""Parts of a model that are frozen, or learn by adapters: against the whole model, and against peft's LoRA."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvlm.config.groups import PartSettings
from mvlm.config.model import MaskVLMConfig
from mvlm.model.adaptation import PARTS, Adapter, adapt, learned, merge_adapters
from mvlm.model.attention import FeedForward
from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import TaskOptions
from mvlm.training.optimizer import make_optimizer
from mvlm.training.run import freeze_rest
from support.models import micro_batch, micro_model, normal, pretrain_config
from support.towers import tower_config


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_has_no_gradients_and_no_state_of_the_optimizer(part):
    gradients = []
    for how in ("full", "frozen"):
        model = micro_model(dtype=torch.float32)
        parts: dict[str, Any] = {f"train_{part}": how}
        config = pretrain_config(Path(), Path(), **parts)
        adapt(model, config)
        model(*micro_batch(), plan="fast").total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        optimizer = make_optimizer(model, config, torch.device("cpu"))
        optimizer.step()
        moments = {id(p) for p in optimizer.state}
    for name, parameter in model.named_parameters():
        frozen = name.split(".")[0] in PARTS[part]
        assert (gradients[1][name] is None) == frozen == (id(parameter) not in moments), name
        assert frozen or torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6), name


EVERYWHERE = PartSettings(train_image="lora", train_text="lora", train_cross="lora", lora_rank=3, lora_alpha=5.0)


def test_adapters_are_pefts_in_both_implementations_and_are_merged(monkeypatch):
    """Each linear layer of a block has an adapter. peft wraps modules, so its feed-forward layer has to call them."""
    ours, theirs = micro_model(), micro_model()
    linear = [n for n, m in ours.named_modules() if isinstance(m, nn.Linear) and ".blocks." in n]
    adapt(ours, EVERYWHERE)
    adapters = {
        n.removesuffix(".parametrizations.weight.0"): m for n, m in ours.named_modules() if isinstance(m, Adapter)
    }
    assert sorted(adapters) == sorted(linear)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=linear), theirs)
    pairs = {}
    for seed, (name, adapter) in enumerate(adapters.items()):
        layer: Any = theirs.get_submodule(name)
        assert not adapter.b.any()
        assert adapter.a.std().item() == pytest.approx(layer.lora_A["default"].weight.std().item(), rel=0.5)
        adapter.b.data += normal(*adapter.b.shape, seed=seed)
        pairs |= {f"{name}.a": (adapter.a, layer.lora_A["default"].weight)}
        pairs |= {f"{name}.b": (adapter.b, layer.lora_B["default"].weight)}
    for own, other in pairs.values():
        other.data = own.data.clone()
    ours(*micro_batch(), plan="plain").total.backward()
    plain = {name: own.grad for name, (own, _) in pairs.items()}
    ours.zero_grad()
    total = ours(*micro_batch(), plan="fast").total
    total.backward()
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: self.down(F.gelu(self.up(x))))
    wanted = theirs(*micro_batch(), plan="plain").total
    wanted.backward()
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
    for name, (own, other) in pairs.items():
        for found in (own.grad, plain[name]):
            torch.testing.assert_close(found, other.grad, rtol=1e-8, atol=1e-10, msg=name)
    monkeypatch.undo()
    merge_adapters(ours)
    assert ours.state_dict().keys() == micro_model().state_dict().keys()
    torch.testing.assert_close(ours(*micro_batch(), plan="fast").total, wanted, rtol=1e-12, atol=0)


def test_what_a_tiny_model_learns_for_retrieval_takes_less_than_a_megabyte():
    parts = PartSettings(train_image="lora", train_text="lora", train_cross="lora", lora_rank=2)
    with torch.device("meta"):
        task = Retrieval(MaskVLM(MaskVLMConfig.preset("tiny")), TaskOptions(), {})
        adapt(task.model, parts)
    assert sum(tensor.nbytes for tensor in learned(task, task.state_dict()).values()) < 1e6


def test_what_a_tiny_model_pretrains_takes_less_than_a_megabyte():
    """With all losses and their heads trained before. A head that nobody has trained learns, one without a loss not."""
    parts = {f"train_{part}": "lora" for part in PARTS} | {"lora_rank": 2, "initial_model": Path("old")}

    def learns(head_bias: float, **changes: Any) -> dict[str, int]:
        with torch.device("meta"):
            model = MaskVLM(MaskVLMConfig.preset("tiny"))
        model.to_empty(device="cpu")
        for head in (model.language_head.vocabulary, model.pixel_head):
            nn.init.constant_(head.bias, head_bias)
        config = pretrain_config(Path(), Path(), model=model.config, **parts | changes)
        adapt(model, config)
        freeze_rest(model, config)
        return {name: tensor.nbytes for name, tensor in learned(model, model.state_dict()).items()}

    heads, kept, new = {"language_head", "pixel_head"}, learns(0.1), learns(0.0)
    assert sum(kept.values()) < 1e6
    assert {name.split(".")[0] for name in new.keys() - kept.keys()} == heads
    assert heads < {name.split(".")[0] for name in learns(0.1, train_cross="full")}
    alone = learns(0.0, mlm_weight=0.0, mim_weight=0.0, itm_weight=0.0)
    towers = {"image_encoder", "text_encoder", "image_projection", "text_projection", "log_scale"}
    assert {name.split(".")[0] for name in alone} == towers


def test_adapters_of_a_tower_are_those_of_the_blocks_of_timm():
    """Attention and feed-forward have adapters. Patch embedding and the bridge to a wider model have none."""
    model = MaskVLM(tower_config("test_vit4", width=384))
    tower: Any = model.image_encoder
    wanted = [n for n, m in tower.module.blocks.named_modules() if isinstance(m, nn.Linear)]
    adapt(model, EVERYWHERE)
    found = [n for n, m in tower.named_modules() if isinstance(m, Adapter)]
    assert found == [f"module.blocks.{name}.parametrizations.weight.0" for name in wanted]
    assert {n.rpartition(".")[2] for n, p in tower.named_parameters() if p.requires_grad} == {"a", "b"}
    tower(torch.zeros(1, 3, model.config.image_size, model.config.image_size)).sum().backward()
    assert all(module.b.grad is not None for module in tower.modules() if isinstance(module, Adapter))
