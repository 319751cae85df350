"""Time of other libraries' models with the kernels swapped in, relative to the originals.

    python studies/swapped.py [--rounds N] [--json FILE]

On a CPU, in processor time of one thread: forward and backward, in turns. A ratio below 1 means that the swap gains.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm_benchmarks.intervals import ratio
from mvlm_benchmarks.machine import describe
from mvlm_dataloading.files import write_json
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""The original and the swapped call, which return the same numbers."""


class Block(nn.Module):
    """Image patches that attend to text, and a feed-forward layer, in torch's layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, text: Tensor, exists: Tensor) -> Tensor:
        """x (B, patches, C), text (B, tokens, C), exists bool (B, tokens) -> x's shape."""
        x = x + self.attention(x, text, text, key_padding_mask=~exists, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


def torch_block() -> Pair:
    """A block of width 192 with 3 heads, 197 patches and at most 40 tokens, batch 8."""
    block = Block(192, 3)
    attention, norm, down = CrossAttention.from_torch(block.attention), AddLayerNorm(192), GeluLinear(768, 192)
    norm.load_state_dict(block.norm.state_dict())
    down.load_state_dict(block.down.state_dict())
    x, text = torch.randn(8, 197, 192), torch.randn(8, 40, 192)
    exists = torch.arange(40) < torch.randint(5, 41, (8, 1))

    def swapped() -> Tensor:
        stream, normed = norm(x, attention(x, text, key_mask=exists))
        return stream + down(block.up(normed))

    return lambda: block(x, text, exists), swapped


def timm_vit(embedding_alone: bool) -> Pair:
    """ViT-tiny/16 on uint8 images of 224 pixels, batch 8: its patch embedding, or the whole model of 2 layers."""
    import timm

    from mvlm_kernels.integrations.timm import swap

    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    other = copy.deepcopy(vit)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    swap(other, mean=mean, std=std)
    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    models = [x.get_submodule("patch_embed") if embedding_alone else x for x in (vit, other)]
    return lambda: models[0]((images / 255 - shift) / scale), lambda: models[1](images)


def transformers_bert() -> Pair:
    """BERT of 2 layers of width 128 (BERT-tiny) on 8 padded texts of at most 40 tokens."""
    from transformers import BertConfig, BertModel

    from mvlm_kernels.integrations.transformers import swap

    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=1000, intermediate_size=512, **sizes)).eval()
    other = copy.deepcopy(bert)
    swap(other)
    ids, exists = torch.randint(1000, (8, 40)), torch.arange(40) < torch.randint(5, 41, (8, 1))
    calls = [lambda model=x: model(ids, attention_mask=exists).last_hidden_state for x in (bert, other)]
    return calls[0], calls[1]


MODELS: dict[str, Callable[[], Pair]] = {
    "torch: block": torch_block,
    "timm: patch embedding": lambda: timm_vit(True),
    "timm: ViT": lambda: timm_vit(False),
    "transformers: BERT": transformers_bert,
}


def seconds(call: Callable[[], Tensor]) -> float:
    """Processor time of one forward and backward pass."""
    started = time.process_time()
    call().square().mean().backward()
    return time.process_time() - started


def measure(rounds: int, calls: int = 5) -> list[dict[str, Any]]:
    """Rows with model, ratio swapped / original, its 95 % interval, milliseconds of the original, and largest gap."""
    rows = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        original, swapped = make()
        wanted, found = original().detach(), swapped().detach()
        gap = ((found - wanted).abs().max() / wanted.abs().max()).item()
        for call in (original, swapped):
            seconds(call)
        times = [[[seconds(call) for _ in range(calls)] for call in (original, swapped)] for _ in range(rounds)]
        theirs, ours = ([pair[side] for pair in times] for side in (0, 1))
        value, low, high, _ = ratio(ours, theirs)
        best = 1000 * min(min(row) for row in theirs)
        rows.append({"model": name, "ratio": value, "low": low, "high": high, "original_ms": best, "gap": gap})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    for row in rows:
        print(f"{row['model']:24}{row['ratio']:6.2f} ({row['low']:.2f} to {row['high']:.2f})")
    if arguments.json is not None:
        machine = describe("cpu", ["timm", "transformers"])
        write_json(arguments.json, {"machine": machine, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
