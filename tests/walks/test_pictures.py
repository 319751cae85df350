"""A folder of pictures, odd files among them, up to answers: the page's commands, and the other guides' on the way."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mvlm
from mvlm.cli import find_command
from mvlm_dataloading import open_dataset
from support.commands import MICRO_FLAGS
from support.scenes import png, scene

PAGE = Path(__file__).parents[2] / "docs/start/first_run.md"
SHORTER = {
    "pretrain": [*MICRO_FLAGS, "--model.text-length", "32"],
    "finetune": ["--max-steps", "2", "--batch-size", "9", "--warmup-steps", "1", "--device", "cpu"],
}
"""Arguments that follow those of the page."""


def run(line: str) -> None:
    words = shlex.split(line)[1:]
    find_command([*words, *SHORTER.get(words[0], [])])()


def write_pictures(folder: Path) -> dict[str, str]:
    """Pictures in several formats with captions, files that are none, and questions. Reasons to reject, by file."""
    folder.mkdir()
    with open("questions.csv", "w", newline="", encoding="utf-8-sig") as table:
        write = csv.writer(table, delimiter=";")  # as spreadsheets of some countries write it
        write.writerow(["image", "question", "answer"])
        for number in range(40):
            pixels, caption = scene(number % 32)
            blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
            pixels = ((pixels + blocks) // 2).astype(np.uint8)  # no picture is nearly another
            kind = ("png", "jpg", "webp")[number % 3]
            file = folder / f"Straße {number:02}.{kind}"
            image = Image.fromarray(pixels)
            (image.convert("CMYK") if number == 1 else image).save(file)
            file.with_suffix(".txt").write_text(caption)
            write.writerow([file.name, "what colour is the square?", caption.split()[0]])
            write.writerow([file.name, "is it at the top?", "yes" if "top" in caption else "no"])
    good = png(scene(0)[0])
    odd = {
        "no words.png": (good, None, "no caption"),
        "empty.jpg": (b"", "a", "image file is empty"),
        "words.jpg": (b"no picture", "a", "image cannot be decoded"),
        "half.png": (good[: len(good) // 2], "a", "image cannot be decoded"),
        "latin.png": (good, "caf\xe9".encode("latin-1"), "caption is not UTF-8"),
    }
    for name, (content, words, _) in odd.items():
        (folder / name).write_bytes(content)
        if words is not None:
            (folder / name).with_suffix(".txt").write_bytes(words if isinstance(words, bytes) else words.encode())
    Image.fromarray(scene(0)[0]).save(folder / "moving.gif")
    (folder / "moving.txt").write_text("a")
    return {name: reason for name, (_, _, reason) in odd.items()} | {
        "moving.gif": "image format is GIF, not JPEG, PNG or WebP"
    }


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_an_answer(tmp_path, monkeypatch, capsys, without_tensorboard):
    pytest.importorskip("lancedb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mvlm.commands.data.processes", lambda given, pieces=None: 0
    )  # no further ones: they import torch
    wanted = write_pictures(tmp_path / "photos")
    (tmp_path / "new.png").write_bytes(png(scene(9)[0]))
    section = PAGE.read_text().split("## From 300 pictures to an answer")[1]
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["data", "pretrain", "data", "finetune", "eval", "predict"]
    pictures, pretrain, questions, finetune, evaluate, predict = lines

    run(pictures)
    rejected = [json.loads(line) for line in Path("data/photos/rejected.jsonl").read_text().splitlines()]
    assert {line["where"]: line["reason"] for line in rejected} == wanted
    run("mvlm data check data/photos")
    run(pretrain)
    run("mvlm eval retrieval --checkpoint runs/photos --data data/photos --out runs/photos/eval/test.json")
    run("mvlm report runs/photos")
    run("mvlm embed photos embedded --checkpoint runs/photos")
    run("mvlm search index embedded index")
    capsys.readouterr()
    run("mvlm search query index 'red top left' --top 3")
    assert "Straße" in capsys.readouterr().out
    run(questions)
    for split in ("train", "validation", "test"):
        assert len(open_dataset("data/asked", split)) == 2 * len(open_dataset("data/photos", split))
    run(finetune)
    run(evaluate)
    run("mvlm report runs/answers")
    capsys.readouterr()
    run(predict)
    told = capsys.readouterr().out.strip()
    found = mvlm.load_model("runs/answers", "cpu")
    answer = found.answer("new.png", "what colour is the heart?")
    assert answer in {"red", "green", "blue", "yellow", "yes", "no"}
    assert told.endswith(answer)
    for report in ("runs/photos/report.html", "runs/answers/report.html"):
        assert Path(report).stat().st_size > 10_000
