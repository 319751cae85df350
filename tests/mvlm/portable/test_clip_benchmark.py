"""CLIP_benchmark itself, by its command line, on local data: its figures are ours to the last digit."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mvlm.errors import ConfigError
from mvlm.evaluation.retrieval import encode_split, rank_all, recall
from mvlm.portable.clip_benchmark import main, register
from mvlm.tasks.load import load_model
from mvlm_dataloading import open_dataset
from support.scenes import COLOURS, GROUNDS, png, scene, write_scenes

LABELS = [f"{colour} on {ground}" for colour in COLOURS for ground in GROUNDS]
TEMPLATES = ["a {}", "{}"]


def write_tar(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """One shard of the test split, as CLIP_benchmark reads data sets."""
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("1")
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def run_benchmark(trained, tmp_path, monkeypatch):
    """Runs CLIP_benchmark's command on a data set and returns the metrics that it writes."""
    pytest.importorskip("clip_benchmark")

    def run(data: Path, task: str, *words: str) -> dict[str, float]:
        out = tmp_path / "figures.json"
        given = {"dataset": "wds/local", "dataset_root": data, "task": task, "output": out, "model_type": "mvlm"}
        given |= {"model": "mvlm", "pretrained": trained, "num_workers": 0, "batch_size": 5}
        flags = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", *flags, "--no_amp", "--quiet", *words])
        main()
        return json.loads(out.read_text())["metrics"]

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that CLIP_benchmark imports
def test_retrieval_figures_are_ours(run_benchmark, trained, tmp_path, capsys):
    data = write_scenes(tmp_path / "scenes", {"train": 4, "test": 10})
    split, model = open_dataset(data, "test"), load_model(trained, "cpu")
    samples = [{"png": split.image_bytes(i), "txt": "\n".join(split.captions(i)).encode()} for i in range(len(split))]
    write_tar(tmp_path / "retrieval", samples)
    (tmp_path / "retrieval/dataset_type.txt").write_text("retrieval")
    found = run_benchmark(tmp_path / "retrieval", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    features = encode_split(model.network, split, model.tokenizer)
    for direction, theirs in (("tr", "text"), ("ir", "image")):
        ours = recall(rank_all(model.network, features, 0)[direction].itc)
        assert {f"r{k}": round(100 * found[f"{theirs}_retrieval_recall@{k}"], 2) for k in (1, 5, 10)} == ours
        assert 0 < ours["r5"] < 100  # so a mistake would show


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_classification_figures_are_ours(run_benchmark, trained, tmp_path, capsys):
    scenes = [scene(number) for number in range(32)]
    truth = [LABELS.index(f"{caption.split()[0]} on {caption.split()[-1]}") for _, caption in scenes]
    samples = [{"png": png(pixels), "cls": str(y).encode()} for (pixels, _), y in zip(scenes, truth, strict=True)]
    folder = tmp_path / "classes"
    write_tar(folder, samples)
    (folder / "classnames.txt").write_text("\n".join(LABELS))
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    found = run_benchmark(folder, "zeroshot_classification")
    model = load_model(trained, "cpu")
    ours = model.classify([sample["png"] for sample in samples], LABELS, TEMPLATES).probability
    top5 = ours.topk(5).indices
    assert found["acc1"] == np.mean([best == y for best, y in zip(top5[:, 0].tolist(), truth, strict=True)])
    assert found["acc5"] == np.mean([y in row for row, y in zip(top5.tolist(), truth, strict=True)])
    shares = [np.mean([b == c for b, y in zip(top5[:, 0].tolist(), truth, strict=True) if y == c]) for c in range(8)]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(shares), abs=1e-12)
    assert 0 < found["acc5"] < 1


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", None)
    with pytest.raises(ConfigError, match="clip_benchmark: wanted the package, which is not installed; pip install"):
        register()
