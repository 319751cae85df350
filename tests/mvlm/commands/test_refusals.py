"""Commands that are refused: in one line with exit code 2, before anything is written or printed."""

import json
import shlex

import pytest

from support.commands import MICRO_FLAGS, assert_refused
from support.folders import folder_hash
from support.forgery import sign
from support.scenes import png, scene

PRETRAIN = f"pretrain tiny {' '.join(MICRO_FLAGS)} --data"
TINY = "pretrain tiny --data none --out none"
RETRIEVAL = "eval retrieval --checkpoint {run} --data {data}"
IMAGE = "--checkpoint {run} --image a.png --caption"
REFUSED = [
    # commands and flags
    ("pretrian tiny", "did you mean `mvlm pretrain`?"),
    ("eval retreival", "did you mean `mvlm eval retrieval`?"),
    ("data emjoi out", "did you mean `mvlm data emoji`?"),
    ("bench setp", "did you mean `mvlm bench step`?"),
    ("data csv out", "wanted one of: data emoji"),
    (f"{TINY} --lr 3", "Perhaps you meant: --lr-cross, --lr-encoder, --lr-end"),
    (f"{TINY} --finl-image 3 --lr-ed 3", "Arguments similar to --lr-ed: --lr-end"),
    ("eval", "eval retrieval"),
    ("bench", "bench step"),
    ("zzz", "wanted one of: data emoji, data cc3m"),
    ("pretrain", "preset"),
    ("pretrain --data d", "preset"),
    ("pretrain hgue --data d --out o", "preset"),
    ("pretrain --config", "--config"),
    ("pretrain tiny --data none", "--out PATH"),
    ("pretrain tiny --dat x", "--dat x"),
    (f"{TINY} --bacth-size 3", "--bacth-size"),
    (f"{TINY} --batch-size 0", "batch_size"),
    (f"{TINY} --batch-size abc", "--batch-size"),
    (f"{TINY} --lr-end x", "--lr-end"),
    (f"{TINY} --model.image-size 100", "image_size"),
    (f"{TINY} --plan slow", "--plan"),
    ("embed --data", "data"),
    ("data emoji", "OUT"),
    ("report", "RUN"),
    ("eval retrieval --chekpoint c --data d", "--checkpoint"),
    ("bench step --batches 3", "--batches"),
    ("pretrain tiny --eval-pictures 64", "--eval-images"),
    ("pretrain base --eval_pictures=64", "--eval-images"),
    ("pretrain tiny --self-attention products", "--self-attention math"),
    ("pretrain tiny --cross-attention=products", "--cross-attention math"),
    ("bench data --pictures 30", "--images"),
    ("doctor --image-size 64", "--image-size"),
    ("doctor --checkpoint runs/x", "--checkpoint"),
    ("doctor --batch-size 8", "--batch-size"),
    ("doctor --data d --batch-size 0", "batch_size"),
    ("doctor --device gpu", "device"),
    ("doctor --config c.json --task vqa --checkpoint runs/x --data d", "config"),
    ("doctor --preset huge", "preset"),
    ("eval caption --checkpoint c --data d --lengths 0", "lengths"),
    ("eval caption --checkpoint c --data d --iterations 0", "iterations"),
    ("eval vqa --checkpoint c --data d --lengths 3", "--lengths"),
    ("finetune vqa huge --out run", "huge"),
    # paths
    (f"{PRETRAIN} none --out run", "none: wanted a data folder"),
    (f"{PRETRAIN} {{data}} --out run --tokenizer none.json", "none.json"),
    (f"{PRETRAIN} {{data}} --out file/x/y", "file/x/y"),
    (f"{PRETRAIN} {{data}} --out run --accumulate 3", "batch_size"),
    (f"{PRETRAIN} {{data}} --out full", "found other files"),
    (f"{PRETRAIN} {{data}} --out {{run}}", "warmup_steps"),
    ("pretrain --config none --out run", "none"),
    ("pretrain --config empty --out run", "empty"),
    ("pretrain --config tuned.json --out run", "fine-tuning"),
    (f"{RETRIEVAL} --data none", "none: wanted a data folder"),
    (f"{RETRIEVAL} --device gpu", "device"),
    (f"{RETRIEVAL} --split tset", "tset"),
    (f"{RETRIEVAL} --rerank -1", "rerank"),
    (f"{RETRIEVAL} --out file/x", "file"),
    ("eval retrieval --checkpoint none --data {data}", "none: wanted a run"),
    ("fill --checkpoint none --image a.png --caption [MASK]", "none: wanted a run"),
    ("reconstruct --checkpoint none --image a.png --caption red --out b.png", "none: wanted a run"),
    (f"fill {IMAGE} [MASK] --image bad.png", "bad.png"),
    (f"fill {IMAGE} red", "caption"),
    (f"fill {IMAGE} [MASK] --top 0", "top"),
    (f"reconstruct {IMAGE} red --image bad.png --out b.png", "bad.png"),
    *((f"reconstruct {IMAGE} red --out {out}", "out") for out in ("x/b.png", "a.png", "a.foo")),
    (f"reconstruct {IMAGE} '{'red ' * 40}' --out b.png", "text 0"),
    ("embed none out --checkpoint {run}", "none: wanted a data set"),
    ("embed {data} out --checkpoint none", "none: wanted a run"),
    ("embed {data} out --checkpoint {run} --precision fp8", "precision"),
    *((f"export {path} out", f"{path}: wanted a run") for path in ("none", "file", "empty")),
    ("export {run} file/x/y", "file"),
    ("export {run} out --format tflite", "--format"),
    ("export {run} out --push-to a/b", "--push-to"),
    ("export {run} out --format onnx --dry-run", "--dry-run"),
    ("export {run} out --format hub --push-to demo", "push-to"),
    ("export {run} out --format hub --data nowhere", "nowhere"),
    *((f"export {{run}} full --format {format}", "full") for format in ("safetensors", "pt2", "onnx", "hub")),
    *((f"report {paths}", "none: wanted a run") for paths in ("none", "none {run}")),
    ("report file", "file: wanted a run"),
    ("report empty", "empty/config.json"),
    ("report empty {run}", "empty/metrics.jsonl"),
    # data
    ("data folder no out", "no: wanted a folder"),
    ("data folder {images}/0.png out", "0.png"),
    ("data folder {images} out --quality 0", "quality"),
    ("data folder {images} out --max-pixels 1000000000", "max-pixels"),
    ("data folder {images} {images}", "wanted a new or an empty folder"),
    ("data folder {images} out --tokenizer no.json", "no.json"),
    ("data folder {images} out --against no", "no/dataset.json"),
    ("data folder {images} out --part 3/2", "part"),
    ("data check no", "no: wanted a data folder"),
    ("data index {images}", "wanted a folder of tars"),
    ("data index {images} --without-tars", "dataset.json"),
    ("data view out --sources no", "no: wanted a data folder"),
    ("data merge out", "parts"),
    ("data huggingface no out", "no: wanted parquet files"),
    ("data coco {images} out", "annotations"),
    ("data nlvr2 empty out", "train.json"),
    ("data vqa-v2 empty out", "empty/v2_OpenEnded"),
]
PRINTS = ("data check", "doctor --preset")
"""Commands that print what they found before the error."""


@pytest.mark.slow
@pytest.mark.parametrize("words, name", REFUSED)
def test_a_mistake_is_one_line(run_mvlm, run_data, scenes, trained, image_folder, tmp_path, monkeypatch, words, name):
    monkeypatch.chdir(tmp_path)
    for file, content in (("file", b"a file"), ("full/file", b""), ("bad.png", b"none"), ("a.png", png(scene(0)[0]))):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tuned.json").write_text(
        json.dumps(json.loads((trained / "config.json").read_text()) | {"task": "vqa"})
    )
    before = folder_hash(tmp_path)
    outcome = run_mvlm(*shlex.split(words.format(run=trained, data=scenes, images=image_folder)))
    assert outcome.code == 2
    assert outcome.out == [] or words.startswith(PRINTS)
    assert outcome.err[-1].startswith("mvlm: ")
    assert name in outcome.err[-1]
    assert not {"│", "─"} & set(outcome.err[-1])
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        "eval retrieval --checkpoint run --data {data} --out test.json",
        "reconstruct --checkpoint run --image a.png --caption red --out b.png",
        "fill --checkpoint run --image a.png --caption [MASK]",
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(run_mvlm, scenes, run_copy, tmp_path, monkeypatch, words):
    """Another model.json, with a manifest that fits."""
    monkeypatch.chdir(tmp_path)
    for folder in (run_copy / "checkpoints").iterdir():
        config = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(config | {"width": 24}))
        sign(folder)
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    before = folder_hash(tmp_path)
    assert_refused(run_mvlm(*words.format(data=scenes).split()), "model.json", "24")
    assert folder_hash(tmp_path) == before
