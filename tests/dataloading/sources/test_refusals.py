"""Refusals of sources: the message has the file or the option that is to be mended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading import DataError
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.huggingface import huggingface
from mvlm_dataloading.sources.iconify import iconify
from mvlm_dataloading.sources.nlvr import nlvr2
from mvlm_dataloading.sources.questions import questions
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.sources.snli_ve import snli_ve
from mvlm_dataloading.sources.visual_genome import visual_genome, visual_genome_qa
from mvlm_dataloading.sources.vqa_v2 import vqa_v2
from mvlm_dataloading.sources.webdataset import cc3m, webdataset
from support import published, published_tasks
from support.data import build_source

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [{"image": b"x", "caption": "a", "id": None} | row for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(shown), path)
    return path


def icons(folder: Path, content: Any, **beside: str) -> Path:
    for name, text in beside.items():
        (folder / f"{name}.json").write_text(text)
    published.write_json(folder / "icons.json", content)
    return folder / "icons.json"


def csv(p: Path, text: str | bytes, name: str = "t.csv") -> Path:
    (p / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return p / name


def without(p: Path, *names: str) -> Path:
    for name in names:
        (p / name).unlink()
    return p


def with_file(p: Path, name: str, content: Any) -> Path:
    """The folder with a file of JSON, or of text."""
    text = content if isinstance(content, str) else json.dumps(content)
    (p / name).parent.mkdir(parents=True, exist_ok=True)
    (p / name).write_text(text)
    return p


def _vqa_without_images(p: Path) -> Source:
    (p / "val2014").rename(p / "elsewhere")
    return vqa_v2(p)


ICON = {"prefix": "p", "icons": {"home": {"body": "<path/>"}}}
REFUSED: dict[str, tuple[Callable[[Path], Any] | None, Callable[[Path], Source], str]] = {
    # of COCO
    "years": (
        lambda p: [published.coco(p, train=2, val=1), published.coco(p, train=2, val=1, year=2017)],
        lambda p: coco(p), "--year",
    ),
    "no annotations": (None, lambda p: coco(p), "annotations"),
    "other annotations": (
        published.coco, lambda p: coco(with_file(p, "annotations/captions_train2014.json", {"images": 3})), "train2014"
    ),
    "other splits": (published.coco, lambda p: coco(p, with_file(p, "k.json", {"images": [{}]}) / "k.json"), "k.json"),
    "splits of another name": (
        lambda p: (p / "train2014").mkdir(),
        lambda p: coco(p, with_file(p, "k.json", {"images": [
            {"filepath": "train2014", "filename": "a.jpg", "split": "trial", "cocoid": 1, "sentences": []}
        ]}) / "k.json"), "trial",
    ),
    # of Flickr30k
    "nothing": (published.flickr30k, lambda p: flickr30k(p, p / "none.json"), "none.json"),
    "a row without a split": (
        published.flickr30k,
        lambda p: flickr30k(p, csv(p, 'raw,sentids,split,filename\n"[""a dog""]","[]"\n')), "split",
    ),
    "no tab": (published.flickr30k, lambda p: flickr30k(p, csv(p, "1000.jpg#0 dog\n", "t.token")), "line 1"),
    # of folders
    "no folder": (None, lambda p: folder(p / "none"), "none"),
    "UTF-16": (published.folder, lambda p: folder(p, csv(p, "image,caption".encode("utf-16"))), "UTF-8"),
    "no such column": (published.folder, lambda p: folder(p, p / "captions.csv", caption_column=("text",)), "text"),
    "no column of splits": (
        published.folder, lambda p: folder(p, csv(p, "image,caption,Split\na/0.jpg,x,train\n"), split_column="splt"),
        "splt",
    ),
    "two splits": (
        published.folder, lambda p: folder(p, csv(p, "image,caption,split\na/0.jpg,x,train\na/0.jpg,y,val\n")),
        "a/0.jpg",
    ),
    "a column twice": (published.folder, lambda p: folder(p, csv(p, "image,caption,caption\na/0.jpg,x,y\n")), "twice"),
    "a stray quote": (
        published.folder, lambda p: folder(p, csv(p, 'image,caption\na/0.jpg,x\nb/1.jpg,"Quoted" word\n')), "line 3"
    ),
    "more cells": (published.folder, lambda p: folder(p, csv(p, "image,caption\na/0.jpg,a dog, awake\n")), "line 2"),
    "cut off": (published.folder, lambda p: folder(p, csv(p, 'image,caption\na/0.jpg,"cut\n')), "line 1"),
    "no object": (
        published.folder, lambda p: folder(p, csv(p, '{"image": "a", "caption": "b"}\n\n[1]\n', "t.jsonl")), "line 3"
    ),
    "an unknown split": (lambda p: published.write_image(p / "eval/0.jpg", 0), lambda p: folder(p), "eval"),
    "images elsewhere": (published.folder, lambda p: folder(p, csv(p, "image,caption\nx/0.jpg,a\n")), "x/0.jpg"),
    **{
        f"shares {shares}": (None, lambda p, a=shares[0], b=shares[1]: folder(p, validation=a, test=b), "validation")
        for shares in ((0.7, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.1))
    },
    # of rows
    "no rows": (None, lambda p: huggingface(p), "parquet"),
    "no samples": (
        lambda p: parquet.write_table(pyarrow.table({"image": [], "caption": []}), p / "train.parquet"),
        lambda p: huggingface(p), "train.parquet",
    ),
    "a file twice": (lambda p: table(p / "a.parquet", {}), lambda p: huggingface(p, [p / "a.parquet"]), "a.parquet"),
    "a damaged file": (None, lambda p: huggingface(with_file(p, "a.parquet", "x") / "a.parquet"), "a.parquet"),
    "no such column of rows": (
        lambda p: table(p / "a.parquet", {}), lambda p: huggingface(p, caption_column=("text",)), "text"
    ),
    "no key": (
        lambda p: table(p / "a.parquet", {"id": "1"}, {}), lambda p: huggingface(p, key_column="id"), "--key-column"
    ),
    "a key in two splits": (
        lambda p: table(p / "a.parquet", {"id": "1", "split": "train"}, {"id": "1", "split": "val"}),
        lambda p: huggingface(p, key_column="id"), "row 1",
    ),
    "a split and a column": (
        lambda p: table(p / "a.parquet", {}), lambda p: huggingface(p, split="test", split_column="id"), "--split-col"
    ),
    "train in a test file": (
        lambda p: table(p / "test.parquet", {"split": "train"}), lambda p: huggingface(p), "--split"
    ),
    **{
        f"a cell of splits {value!r}": (
            lambda p, value=value: table(p / "a.parquet", {"split": value}), lambda p: huggingface(p), "column split"
        )
        for value in ("testA", "fold 3", 2, ["train"])
    },
    **{
        f"a file of the split {name}": (
            lambda p, name=name: table(p / f"{name}-0.parquet", {}), lambda p: huggingface(p), name.lower()
        )
        for name in ("testA", "testdev", "eval", "minival")
    },
    **{
        f"another tool's {name} {content}": (
            lambda p, file=(name, content): with_file(p, *file), lambda p: huggingface(p), "save the rows"
        )
        for name, content in (
            ("state.json", {"epoch": 3}), ("state.json", [1]), ("state.json", {"_data_files": [{"filename": 7}]}),
            ("dataset_dict.json", ["train"]), ("dataset_dict.json", {"splits": [1]}),
            ("dataset_dict.json", {"splits": ["../x"]}),
        )
    },
    # of tars
    "no tar": (None, lambda p: webdataset([p]), "tar"),
    "a table that changed": (
        lambda p: published.img2dataset(p / "t", tars=1),
        lambda p: [cc3m([p / "t"]), (p / "t/00000.parquet").write_bytes(b"x")][0], "00000.parquet",
    ),
    # of tasks
    "no column of answers": (None, lambda p: questions(p, csv(p, "image,question\na.jpg,why?\n")), "--answer-column"),
    "no questions": (None, lambda p: vqa_v2(p), QUESTIONS.format("train2014")),
    "no images": (published_tasks.vqa_v2, _vqa_without_images, "--images"),
    "held out below 0": (published_tasks.vqa_v2, lambda p: vqa_v2(p, held_out=-1), "held-out"),
    "held out twice": (published_tasks.vqa_v2, lambda p: vqa_v2(p, held_out=1, minival=p / "x"), "held-out"),
    "a question without a number": (
        published_tasks.vqa_v2,
        lambda p: vqa_v2(with_file(p, QUESTIONS.format("test-dev2015"), {"questions": [{"question_id": [1]}]})),
        "questions",
    ),
    "another minival": (
        published_tasks.vqa_v2, lambda p: vqa_v2(p, minival=with_file(p, "none.json", [7]) / "none.json"), "none.json"
    ),
    "no val to hold out": (
        published_tasks.vqa_v2, lambda p: vqa_v2(without(p, QUESTIONS.format("val2014")), held_out=2), "val2014"
    ),
    "other answers": (
        published_tasks.vqa_v2,
        lambda p: vqa_v2(with_file(p, ANNOTATIONS.format("val2014"), {"questions": []})), "annotations",
    ),
    "no answers": (
        published_tasks.vqa_v2, lambda p: vqa_v2(without(p, ANNOTATIONS.format("val2014"))),
        ANNOTATIONS.format("val2014"),
    ),
    "no folders of images": (None, lambda p: visual_genome(p), "VG_100K_2"),
    "no regions": (published.visual_genome, lambda p: visual_genome(without(p, "region_descriptions.json")), "region"),
    "other regions": (
        published.visual_genome, lambda p: visual_genome(with_file(p, "region_descriptions.json", [{"id": 1}])), "reg"
    ),
    "an image outside of VG": (
        published.visual_genome,
        lambda p: visual_genome(with_file(p, "region_descriptions.json", [{"id": "../../secret", "regions": []}])),
        "reg",
    ),
    "other answers of VG": (
        published_tasks.visual_genome_qa, lambda p: visual_genome_qa(with_file(p, "question_answers.json", [[]])), "qu"
    ),
    "no hypotheses": (None, lambda p: snli_ve(p), "snli_ve_train.jsonl"),
    "other hypotheses": (
        None,
        lambda p: snli_ve(with_file(p, "snli_ve_dev.jsonl", {"gold_label": "neutral", "pairID": "1"})),
        "Flickr30K_ID",
    ),
    "no pairs": (None, lambda p: nlvr2(p), "train.json"),
    "a small side": (None, lambda p: nlvr2(p, side=8), "side"),
    "other pairs": (None, lambda p: nlvr2(with_file(p, "dev.json", {"sentence": "a", "label": "True"})), "identifier"),
    # of icons
    "no icons": (None, lambda p: iconify(p / "none.json"), "none.json"),
    "a small size": (None, lambda p: iconify(icons(p, ICON), size=8), "size"),
    "other information": (None, lambda p: iconify(icons(p, ICON, info="{")), "info.json"),
    **{
        f"icons {content}": (None, lambda p, content=content: iconify(icons(p, content)), "icons.json")
        for content in (
            [], {"prefix": "p"}, {"prefix": "p", "icons": {"a": {"width": 2}}},
            {"prefix": "p", "icons": {"a": {"body": 3}}},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, name):
    prepare, make, word = REFUSED[name]
    folder = tmp_path / "in"
    folder.mkdir()
    if prepare is not None:
        prepare(folder)
    with pytest.raises(DataError) as caught:
        build_source(make(folder), tmp_path / "out")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)
