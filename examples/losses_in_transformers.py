"""The four losses of mvlm on models of others: a ViT and a BERT of transformers, with random weights.

    python examples/losses_in_transformers.py --steps 100

An image has four squares, and its caption names their colours. `mvlm.objectives` takes tensors, so the
models can be any that give features of patches and of tokens.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mvlm.objectives import (
    NegativeSampling,
    contrastive_logits,
    contrastive_loss,
    linear_cross_entropy,
    masked_image_loss,
    matching_loss,
    matching_pairs,
)

COLOURS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1.0]])
CLS, SEP, MASK = 5, 6, 7  # the tokens below are the colours
SIDE, PATCH, WIDTH = 32, 8, 64


def draw_batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, S, S), captions int64 (B, 6), and a number for each combination of colours, int64 (B,)."""
    colours = torch.randint(len(COLOURS), (number, 4))
    squares = COLOURS[colours].view(number, 2, 2, 3).permute(0, 3, 1, 2)
    images = F.interpolate(squares, SIDE)
    captions = torch.cat([torch.full((number, 1), CLS), colours, torch.full((number, 1), SEP)], 1)
    identity = (colours * len(COLOURS) ** torch.arange(4)).sum(1)  # the colours are its digits
    return images, captions, identity


class Model(nn.Module):
    """Two encoders, and a layer in which each attends to the other."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
        }
        vit = ViTConfig(image_size=SIDE, patch_size=PATCH, **sizes)
        bert = BertConfig(vocab_size=8, **sizes)
        self.images = ViTModel(vit, add_pooling_layer=False, use_mask_token=True)
        self.texts = BertModel(bert, add_pooling_layer=False)
        self.text_to_image = nn.TransformerDecoderLayer(WIDTH, 2, 128, dropout=0.0, batch_first=True)
        self.image_to_text = nn.TransformerDecoderLayer(WIDTH, 2, 128, dropout=0.0, batch_first=True)
        self.words = nn.Linear(WIDTH, 8)
        self.pixels = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.image_embedding = nn.Linear(WIDTH, 32)
        self.text_embedding = nn.Linear(WIDTH, 32)
        self.matching = nn.Linear(WIDTH, 2)
        self.log_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, images: Tensor, tokens: Tensor, identity: Tensor, step: int) -> dict[str, Tensor]:
        """The four losses, scalars."""
        number = len(images)
        hidden = torch.rand(number, 16).argsort(1) < 8  # (B, N), True = masked: half of the patches
        masked = F.pad(torch.rand(number, 4).argsort(1) < 2, (1, 1))  # (B, L), True = masked: two of four words
        v = self.images(images).last_hidden_state
        w = self.texts(tokens).last_hidden_state
        vm = self.images(images, bool_masked_pos=hidden).last_hidden_state
        wm = self.texts(tokens.masked_fill(masked, MASK)).last_hidden_state

        words = self.text_to_image(wm, v)[masked]  # (M, C)
        mlm, _ = linear_cross_entropy(words, self.words.weight, self.words.bias, tokens[masked])

        rows = self.image_to_text(vm, w)[:, 1:][hidden].view(number, 8, WIDTH)
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3*P*P)
        mim = masked_image_loss(self.pixels(rows), patches[hidden].view(number, 8, -1))

        image = F.normalize(self.image_embedding(v[:, 0]), dim=-1)
        text = F.normalize(self.text_embedding(w[:, 0]), dim=-1)
        logits = contrastive_logits(image, text, self.log_scale)  # (B, B)
        itc, _ = contrastive_loss(logits)

        # An image of the same colours is no negative of a caption: it would be right.
        pairs = matching_pairs(NegativeSampling(identity, identity, seed=0, step=step).draw_both(logits))
        fused = self.text_to_image(w[pairs.texts], v[pairs.images])[:, 0]
        itm, _ = matching_loss(self.matching(fused), pairs.labels, pairs.weights)
        return {"mlm": mlm, "mim": mim, "itc": itc, "itm": itm}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=64)
arguments = parser.parse_args()

torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
history = []
for step in range(arguments.steps):
    losses = model(*draw_batch(arguments.batch_size), step)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    values = {name: loss.item() for name, loss in losses.items()}
    history.append(values)
    if step % 10 == 0 or step == arguments.steps - 1:
        print(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
