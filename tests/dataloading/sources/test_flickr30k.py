"""Flickr30k in each of its published forms."""

import pytest

from mvlm_dataloading.sources.flickr30k import flickr30k
from support import published
from support.data import build_source


def expected(numbers) -> dict[str, list[str]]:
    return {str(1000 + i): published.captions(i) for i in numbers}


@pytest.mark.parametrize("file", ["dataset_flickr30k.json", "flickr_annotations_30k.csv"])
def test_flickr30k_with_splits(tmp_path, file):
    published.flickr30k(tmp_path)
    assert build_source(flickr30k(tmp_path, tmp_path / file), tmp_path / "out") == {
        "train": expected(range(4)),
        "validation": expected([4]),
        "test": expected([5]),
    }


@pytest.mark.parametrize("file", ["results_20130124.token", "results.csv"])
def test_flickr30k_without_splits(tmp_path, file):
    published.flickr30k(tmp_path)
    found = build_source(flickr30k(tmp_path, tmp_path / file), tmp_path / "out")
    assert found == {"train": expected(range(6))}


def test_a_table_with_commas_is_a_csv_file(tmp_path):
    published.flickr30k(tmp_path)
    lines = ["image,caption", "1000.jpg,2 dogs play in 3 fields", '1001.jpg,"Two dogs, one ""cat"""']
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    assert build_source(flickr30k(tmp_path, tmp_path / "captions.csv"), tmp_path / "out") == {
        "train": {"1000": ["2 dogs play in 3 fields"], "1001": ['Two dogs, one "cat"']}
    }
    (tmp_path / "numbered.csv").write_text("image_name,comment_number,comment\n1000.jpg,0,A dog\n1000.jpg,1,It runs\n")
    assert build_source(flickr30k(tmp_path, tmp_path / "numbered.csv"), tmp_path / "numbered") == {
        "train": {"1000": ["A dog", "It runs"]}
    }


def test_flickr30k_finds_its_caption_file(tmp_path):
    published.flickr30k(tmp_path)
    assert {piece.split for piece in flickr30k(tmp_path).pieces} == {"train", "validation", "test"}
    (tmp_path / "dataset_flickr30k.json").unlink()
    (tmp_path / "flickr_annotations_30k.csv").unlink()
    assert {piece.split for piece in flickr30k(tmp_path).pieces} == {"train"}
