"""A training loop of your own on `MaskVLM`: the model, its loader and torch's AdamW, without the rest of a run.

    python examples/training_loop.py --data data/emoji --steps 100

Prints four losses every ten steps; --out keeps the model. `mvlm pretrain` adds checkpoints, evaluation and many GPUs.
"""

import argparse
from pathlib import Path

import torch

from mvlm.config import MaskVLMConfig
from mvlm.device import autocast, choose_device
from mvlm.model import MaskVLM
from mvlm_dataloading import Loader, open_dataset, tokenizer_for

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data/emoji")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--out", type=Path)
arguments = parser.parse_args()

# The tokenizer is trained on the captions, unless the data set brings its own.
dataset = open_dataset(arguments.data, "train")
tokenizer = tokenizer_for(dataset, 1000)
config = MaskVLMConfig.preset(
    "tiny",
    width=arguments.width,
    heads=2,
    image_layers=2,
    text_layers=2,
    vocab_size=tokenizer.vocab_size,
    mask_token_id=tokenizer.mask_id,
)
loader = Loader(
    dataset,
    tokenizer,
    batch_size=arguments.batch_size,
    crop_scale=(0.9, 1.0),
    seed=0,
    **config.loader_options(),  # sizes and masks, as the model is configured
)

torch.manual_seed(0)
device = choose_device()
model = MaskVLM(config).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
history = []
for step, (batch, masks) in zip(range(arguments.steps), loader, strict=False):
    # `step` decides which negatives are drawn. As a tensor it is no constant of a compiled model or a CUDA graph.
    number = torch.full((), step, device=device)
    with autocast(device):  # bf16 where the hardware has it
        losses = model(batch.to(device), masks.to(device), seed=0, step=number, plan="fast")
    optimizer.zero_grad()
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.clamp_temperature()
    history.append(losses.total.item())
    if step % 10 == 0 or step == arguments.steps - 1:
        values = ", ".join(f"{name} {getattr(losses, name):.3f}" for name in ("mlm", "mim", "itc", "itm"))
        print(f"step {step}: {values}")
loader.close()

if arguments.out:
    model.save_pretrained(arguments.out)
    tokenizer.save(arguments.out / "tokenizer.json")  # `mvlm.load_model` needs it too
