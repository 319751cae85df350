"""A ViT of timm and a BERT of transformers as one model, which then learns further pairs and keeps what it knows.

    python examples/own_towers.py --data data/emoji --further data/scenes/caption --out towers

Both towers are small and random, so that a CPU takes a minute. Name yours in their place: timm:NAME with
image_weights="timm", and a folder of transformers. Prints R@1 on --data before and after the further pairs.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel

import mvlm
from mvlm.model.towers.timm_tower import tower_settings
from mvlm_dataloading import open_dataset, tokenizer_for

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default="data/emoji")
parser.add_argument("--further", type=Path, default="data/scenes/caption")
parser.add_argument("--out", type=Path, default="towers")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=32)
arguments = parser.parse_args()
bert, first, second = (arguments.out / name for name in ("bert", "first", "second"))

# A text tower is a folder as save_pretrained writes it, with its tokenizer.
tokenizer = tokenizer_for(open_dataset(arguments.data, "train"), 2048)
sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(bert)
tokenizer.save(bert / "tokenizer.json")

# An image tower is a name. The first run trains both towers by ITC alone.
layers = {"cross_layers": 1, "decoder_layers": 1}
model = mvlm.MaskVLMConfig.preset("tiny", **tower_settings("timm:test_vit", 64), **layers)
steps = {"max_steps": arguments.steps, "batch_size": arguments.batch_size, "warmup_steps": 1}
itc = {"mlm_weight": 0.0, "mim_weight": 0.0, "itm_weight": 0.0}
run = mvlm.PretrainConfig.preset("tiny", data=arguments.data, out=first, model=model, text_tower=bert, **steps, **itc)
mvlm.pretrain(run)

# The second run starts from the first. Adapters and the distance to the start keep it near.
further = replace(run, data=arguments.further, out=second, text_tower=None, initial_model=first, optimizer="adamw")
mvlm.pretrain(replace(further, train_image="lora", train_text="lora", keep_start=1.0, also_evaluate=arguments.data))

rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
before, after = rows[0]["also_before_tr_r1"], rows[-1]["also_after_tr_r1"]
print(f"image to text R@1 on {arguments.data}: {before:.1f} % before the further pairs, {after:.1f} % after them")
