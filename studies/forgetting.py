"""What encoders forget when they learn further pairs: `python studies/forgetting.py OLD NEW OUT [--json FILE]`.

Encoders learn the data set OLD by ITC alone. Each arm then trains them further on NEW, for the same steps. R@1 by ITC
is that of the test splits of both, the mean of both directions. The same command continues where it was stopped.

    mvlm data emoji data/emoji
    mvlm data scenes data/scenes --train 1600 --validation 64 --test 400 --tasks caption
    python studies/forgetting.py data/emoji data/scenes/caption runs/forgetting --json \\
        benchmarks/results/studies/forgetting.json
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.evaluation.evaluate import evaluate_briefly
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.load import load_without_head, mix_with_start
from mvlm.studies.study import slug
from mvlm.studies.trial import made_by
from mvlm.training.run import pretrain
from mvlm_dataloading import open_dataset
from mvlm_dataloading.files import write_json

SIZES = {"image_size": 64, "width": 96, "heads": 2, "image_layers": 3, "text_layers": 3, "text_length": 40}
BOTH = {"mlm_weight": 0.0, "mim_weight": 0.0, "itm_weight": 0.0, "batch_size": 64, "resume": True}
START = {"max_steps": 500}
FULL = {"lr_encoder": 3e-4, "lr_cross": 3e-4}
ADAPTERS = {"lr_encoder": 1e-3, "lr_cross": 1e-3}
FURTHER = {"max_steps": 150, "warmup_steps": 15, "optimizer": "adamw"}
ARMS: dict[str, dict[str, Any]] = {
    "image encoder frozen": FULL | {"train_image": "frozen"},
    "adapters": ADAPTERS | {"train_image": "lora", "train_text": "lora"},
    "full": FULL,
    "full, `--keep-start 1`": FULL | {"keep_start": 1.0},
    "full, `--keep-start 10`": FULL | {"keep_start": 10.0},
}
MIXED = "full, `--mix 0.5`"


def config(data: Path, out: Path, seed: int, **changes: Any) -> PretrainConfig:
    """One training: of the start, or of an arm."""
    model = MaskVLMConfig.preset("tiny", **SIZES)
    return PretrainConfig.preset("tiny", data=data, out=out, seed=seed, model=model, **(BOTH | changes))


def recalls(model: TrainedModel, sets: dict[str, Path]) -> dict[str, float]:
    """R@1 of each data set's test split in per cent."""
    found = {}
    for name, data in sets.items():
        figures = evaluate_briefly(model.network, open_dataset(data, "test"), model.tokenizer, gains=False)
        found[name] = (figures["tr_r1"] + figures["ir_r1"]) / 2
    return found


def trials(old: Path, new: Path, out: Path, seed: int) -> dict[str, dict[str, float]] | None:
    """R@1 of old and new data for the start and each arm with a seed; None if training was asked to stop."""
    sets = {"old": old, "new": new}
    start = out / f"start_{seed}"
    if pretrain(config(old, start, seed, **START), say_next=False):
        return None
    found = {"before": recalls(load_without_head(start, "cpu"), sets)}
    for arm, settings in ARMS.items():
        run = out / f"{slug(arm)}_{seed}"
        if pretrain(config(new, run, seed, initial_model=start, **FURTHER, **settings), say_next=False):
            return None
        trained = load_without_head(run, "cpu")
        found[arm] = recalls(trained, sets)
        if arm == "full":
            mix_with_start(trained.network, run, 0.5)
            found[MIXED] = recalls(trained, sets)
        print(seed, arm, found[arm], flush=True)
    return found


def main() -> None:
    """Train all arms with all seeds, and print the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="data set of the start")
    parser.add_argument("new", type=Path, help="data set of the arms")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = {}
    for seed in options.seeds:
        file = options.out / f"seed_{seed}.json"
        if not file.exists():
            found = trials(options.old, options.new, options.out, seed)
            if found is None:
                raise SystemExit("stopped; the same command continues")
            write_json(file, found)
        seeds[seed] = json.loads(file.read_text())
    for arm in seeds[options.seeds[0]]:
        means = {name: fmean(found[arm][name] for found in seeds.values()) for name in ("old", "new")}
        print(f"{arm}: R@1 {means['old']:.1f} % on the old data, {means['new']:.1f} % on the new")
    if options.json:
        sets = {name: open_dataset(data, "train") for name, data in (("old", options.old), ("new", options.new))}
        about = {name: {"name": x.description.get("name"), "train": len(x)} for name, x in sets.items()}
        settings = {"model": SIZES, "start": START, "further": FURTHER, "arms": ARMS}
        write_json(options.json, {"data": about, "settings": settings, "made_by": made_by(), "seeds": seeds})


if __name__ == "__main__":
    main()
