"""Visual Genome's region descriptions as captions."""

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.visual_genome import visual_genome
from support import published
from support.data import build_source


def test_visual_genome(tmp_path):
    published.visual_genome(tmp_path)
    found = build_source(visual_genome(tmp_path), tmp_path / "out")
    assert found == {"train": {str(2407000 + i): [f"part {k} of picture {i}" for k in range(4)] for i in range(6)}}
    assert open_dataset(tmp_path / "out", "train").metadata(1)["coco_id"] == 101
    assert "coco_id" not in open_dataset(tmp_path / "out", "train").metadata(0)
    two = build_source(visual_genome(tmp_path, test=0.5), tmp_path / "two", max_captions=2)
    assert two["train"].keys() | two["test"].keys() == found["train"].keys()
    assert {len(captions) for part in two.values() for captions in part.values()} == {2}
