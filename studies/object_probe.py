"""Linear probe for objects and places in image features: `python studies/object_probe.py SCENES RUN`.

A linear classifier reads an object's kind from the features of the patch at the object's centre, another the number of
a patch from its features. They are fitted on scenes of the train split and judged on those of the validation split. The
first row is the encoder with random weights.

Shape legend: O objects, N patches, C width.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.inference.encode import eval_loader, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.load import load_without_head
from mvlm_dataloading import Dataset, open_dataset

STEPS, OBJECTS_A_STEP = 300, 1024


@torch.no_grad()
def object_features(model: TrainedModel, scenes: Dataset) -> tuple[Tensor, list[str]]:
    """Features (O, C), float32, of the patches at the centres of all visible objects, and the objects' kinds."""
    config = model.network.config
    side = config.image_size // config.patch_size
    rows, kinds, start = [], [], 0
    for batch, _ in eval_loader(scenes, model.network, model.tokenizer):
        v = image_features(model.network, batch.images, model.precision).v.float()
        for number in range(len(v)):
            scene = scenes.metadata(start + number)["scene"]
            for item in scene["objects"]:
                if item.get("hidden"):
                    continue
                x, y, width, height = item["box"]
                column = min(side - 1, int((x + width / 2) / scene["size"][0] * side))
                row = min(side - 1, int((y + height / 2) / scene["size"][1] * side))
                rows.append(v[number, 1 + side * row + column])
                kinds.append(f"{item['colour'] or ''} {item['name']}".strip())
        start += len(v)
    return torch.stack(rows), kinds


@torch.no_grad()
def patch_features(model: TrainedModel, scenes: Dataset) -> tuple[Tensor, list[str]]:
    """Features (images x N, C), float32, of all patches, and their numbers."""
    rows, numbers = [], []
    for batch, _ in eval_loader(scenes, model.network, model.tokenizer):
        v = image_features(model.network, batch.images, model.precision).v[:, 1:].float()  # (B, N, C)
        rows.append(v.flatten(0, 1))
        numbers += list(map(str, range(v.shape[1]))) * len(v)
    return torch.cat(rows), numbers


def accuracy(train: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]]) -> float:
    """Share in per cent of the test rows, of kinds that `train` has, whose kind a linear classifier names."""
    names = sorted(set(train[1]))
    number = {name: i for i, name in enumerate(names)}
    known = [i for i, kind in enumerate(test[1]) if kind in number]
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
    x, y = (train[0] - mean) / deviation, torch.tensor([number[kind] for kind in train[1]])
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], len(names))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.05)
    for _ in range(STEPS):
        drawn = torch.randint(len(x), (OBJECTS_A_STEP,))
        F.cross_entropy(layer(x[drawn]), y[drawn]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = layer((test[0][known] - mean) / deviation).argmax(1).tolist()
    return 100 * sum(names[i] == test[1][k] for i, k in zip(found, known, strict=True)) / len(known)


def main() -> None:
    """Print the accuracy of each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenes", type=Path, help="data set of scenes with one image each, such as data/scenes/caption")
    parser.add_argument("runs", type=Path, nargs="+", help="trained models")
    options = parser.parse_args()
    train = open_dataset(options.scenes, "train").head(2000)
    test = open_dataset(options.scenes, "validation").head(500)
    first = load_without_head(options.runs[0], "cpu")
    torch.manual_seed(0)
    untrained = TrainedModel(MaskVLM(first.network.config), first.tokenizer)
    models = {"random weights": untrained} | {str(run): load_without_head(run, "cpu") for run in options.runs}
    for name, model in models.items():
        objects = accuracy(object_features(model, train), object_features(model, test))
        places = accuracy(patch_features(model, train.head(300)), patch_features(model, test.head(100)))
        print(f"{name}: {objects:.1f} % of the objects, places of {places:.1f} % of the patches")


if __name__ == "__main__":
    main()
