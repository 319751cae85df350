"""A working folder as `make demo` leaves it, with a micro model and small scenes in place of the emoji."""

from pathlib import Path

import torch

from mvlm.model.pretrained import write_model
from mvlm_dataloading import open_dataset, tokenizer_for
from support.models import micro_model
from support.scenes import png, scene, write_scenes


def write_demo_folder(folder: Path) -> Path:
    """Write runs/demo, data/emoji, cat.png and dog.png to a folder. Returns it."""
    data = write_scenes(folder / "data/emoji")
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)
    run = folder / "runs/demo"
    run.mkdir(parents=True)
    write_model(micro_model(dtype=torch.float32, text_length=40), run)
    tokenizer.save(run / "tokenizer.json")
    for number, name in enumerate(("cat.png", "dog.png")):
        (folder / name).write_bytes(png(scene(number)[0]))
    return folder
