"""Visual Genome: region descriptions as captions, and questions."""

from mvlm_dataloading import open_dataset
from mvlm_dataloading.sources.visual_genome import visual_genome, visual_genome_qa
from support import published, published_tasks
from support.data import build_source, read_json_lines


def test_visual_genome(tmp_path):
    published.visual_genome(tmp_path)
    found = build_source(visual_genome(tmp_path), tmp_path / "out")
    assert found == {"train": {str(2407000 + i): [f"part {k} of picture {i}" for k in range(4)] for i in range(6)}}
    assert open_dataset(tmp_path / "out", "train").metadata(1)["coco_id"] == 101
    assert "coco_id" not in open_dataset(tmp_path / "out", "train").metadata(0)
    two = build_source(visual_genome(tmp_path, test=0.5), tmp_path / "two", max_captions=2)
    assert two["train"].keys() | two["test"].keys() == found["train"].keys()
    assert {len(captions) for part in two.values() for captions in part.values()} == {2}


def test_visual_genome_qa(tmp_path):
    published_tasks.visual_genome_qa(tmp_path)
    published.write_json(tmp_path / "image_data.json", [{"image_id": 2407001, "coco_id": 77, "flickr_id": None}])
    found = build_source(visual_genome_qa(tmp_path), tmp_path / "out")["train"]
    assert list(found) == [f"vg{986000 + n}" for n in range(7)]  # the eighth has no answer
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(2)
    assert (facts["question_id"], facts["image_id"], facts["coco_id"]) == ("vg 986002", "visual-genome 2407001", 77)
    assert (facts["answer"], facts["answers"][0]) == ("Dark Blue.", {"answer": "dark blue", "answer_id": 1})
    assert len({one["answer_id"] for one in facts["answers"]}) == 10
    assert dataset.image_bytes(2) == (tmp_path / "VG_100K/2407001.jpg").read_bytes()
    assert read_json_lines(tmp_path / "out/rejected.jsonl")[0]["reason"] == "question has no answers"
    pieces = visual_genome_qa(tmp_path, validation=0.5).pieces
    images = {p.split: {r.metadata["image_id"] for r in p.records(1)} for p in pieces}
    assert images["train"].isdisjoint(images["validation"])
    assert len(set().union(*images.values())) == 4
