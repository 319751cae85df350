"""Precision and recall of the facts that captions state about scenes."""

import pytest

from mvlm.tasks.metrics.facts import fact_figures, is_scene

SCENES = {
    "1": {
        "size": [128, 128],
        "objects": [
            {"name": "dog", "colour": None, "box": [0, 0, 40, 40]},
            {"name": "heart", "colour": "red", "box": [80, 0, 40, 40]},
        ],
    },
    "2": {"size": [128, 128], "objects": [{"name": "cat", "colour": None, "box": [9, 9, 40, 40]}] * 2},
}


def test_figures_of_captions():
    # 1: true are dog, one dog, heart; false are the colour, the number of blue hearts, and the side.
    # 2: true is the cat, false the number. The scenes have 2 + 3 + 2 facts; dog, one dog, heart and cat are said.
    captions = {"1": "a dog is right of a blue heart", "2": "a cat and a cat"}
    found = fact_figures(captions, SCENES)
    precision, recall = 4 / 8, 4 / 7
    assert found == pytest.approx(
        {
            "fact_precision": 100 * precision,
            "fact_recall": 100 * recall,
            "fact_f1": 200 * precision * recall / (precision + recall),
            "object_precision": 100,
            "colour_precision": 0,
            "count_precision": 100 / 3,
            "relation_precision": 0,
        }
    )


def test_complete_captions_have_all_facts_and_empty_ones_none():
    captions = {"1": "a red heart right of a dog", "2": "two cats"}
    assert set(fact_figures(captions, SCENES).values()) == {100}
    assert fact_figures({"1": "", "2": "nothing"}, SCENES) == {"fact_precision": 0, "fact_recall": 0, "fact_f1": 0}


@pytest.mark.parametrize("other", ["kitchen", None, 3, {"objects": 3, "size": [1, 2]}, {"objects": []}])
def test_another_fields_of_this_name_are_no_scenes(other):
    assert not is_scene(other)
    assert all(map(is_scene, SCENES.values()))
