"""The table of an evaluation, and its figures as a file."""

import copy
import json
from typing import Any

from mvlm.evaluation.table import format_table
from mvlm_dataloading.files import write_json

RECALLS = {"r1": 11.1, "r5": 22.2, "r10": 33.3}
FIGURES: dict[str, Any] = {
    "n_images": 400,
    "n_texts": 700,
    "tr": RECALLS,
    "ir": {"r1": 44.4, "r5": 55.5, "r10": 66.6},
    "tr_95": {"r1": [10.4, 12.5]},
    "ir_95": {"r1": [40.1, 48.2]},
    "itc": {"tr": {"r1": 1.5, "r5": 2.5, "r10": 3.5}, "ir": {"r1": 4.5, "r5": 5.5, "r10": 6.5}},
    "itm": {"tr": {"r1": 1.6, "r5": 2.6, "r10": 3.6}, "ir": {"r1": 4.6, "r5": 5.6, "r10": 6.6}},
    "unseen": {
        "n_images": 120,
        "n_texts": 200,
        "tr": {"r1": 7.1, "r5": 7.2, "r10": 7.3},
        "ir": {"r1": 7.4, "r5": 7.5, "r10": 7.6},
        "tr_95": {"r1": [5.5, 9.1]},
        "ir_95": {"r1": [5.6, 9.3]},
        "itc": {"tr": {"r1": 8.1, "r5": 8.2, "r10": 8.3}, "ir": {"r1": 8.4, "r5": 8.5, "r10": 8.6}},
        "itm": {"tr": {"r1": 9.1, "r5": 9.2, "r10": 9.3}, "ir": {"r1": 9.4, "r5": 9.5, "r10": 9.6}},
    },
    "gain_text_nats": 0.512,
    "gain_text_nats_95": [0.45, 0.58],
    "gain_pixels_pct": 1.234,
    "gain_pixels_pct_95": [0.9, 1.5],
    "masked_l1": 0.3123,
    "masked_l1_white": 0.3632,
    "masked_l1_train_median": 0.3141,
    "masked_nats": 1.8765,
}


def test_table_has_every_figure_in_its_column():
    lines = format_table(FIGURES).splitlines()
    cells = [line.split()[-6:] for line in lines if line.split() and line.split()[-1].replace(".", "").isdigit()]
    assert cells[:6] == [
        ["11.1", "22.2", "33.3", "44.4", "55.5", "66.6"],
        ["1.6", "2.6", "3.6", "4.6", "5.6", "6.6"],
        ["1.5", "2.5", "3.5", "4.5", "5.5", "6.5"],
        ["7.1", "7.2", "7.3", "7.4", "7.5", "7.6"],
        ["9.1", "9.2", "9.3", "9.4", "9.5", "9.6"],
        ["8.1", "8.2", "8.3", "8.4", "8.5", "8.6"],
    ]
    text = "\n".join(lines)
    for words in (
        "all 400 images, 700 captions",
        "120 images of unseen concepts",
        "R@1 of all 400 images, 700 captions, 95 %: 10.4 to 12.5 image to text, 40.1 to 48.2 text to image",
        "R@1 of 120 images of unseen concepts, 95 %: 5.5 to 9.1 image to text, 5.6 to 9.3 text to image",
        "0.51 nats per token (95 %: 0.45 to 0.58)",
        "1.23 % (95 %: 0.90 to 1.50)",
        "0.3123; constant white 0.3632, training median 0.3141",
        "1.877 nats per token",
    ):
        assert words in text
    assert len({line.index("R@1") for line in lines if "R@1" in line and "R@5" in line}) == 1


def test_table_without_itm_has_the_recalls_of_itc_alone():
    text = format_table(FIGURES | {"itm": None, "unseen": FIGURES["unseen"] | {"itm": None}, "reranked": 0})
    assert "ITM" not in text
    assert ["1.5", "2.5", "3.5", "4.5", "5.5", "6.5"] in [line.split()[-6:] for line in text.splitlines()]


def test_table_has_no_row_of_unseen_concepts_without_them():
    text = format_table(FIGURES | {"unseen": None})
    assert "unseen" not in text
    assert "11.1" in text


def test_figures_are_written_into_a_new_folder(tmp_path):
    path = tmp_path / "eval/deep/test.json"
    write_json(path, FIGURES)
    assert json.loads(path.read_text()) == FIGURES
    assert path.read_text().endswith("}\n")


def test_figures_that_are_not_finite_are_null(tmp_path):
    broken = copy.deepcopy(FIGURES) | {"masked_l1": float("nan")}
    write_json(tmp_path / "test.json", broken)
    assert json.loads((tmp_path / "test.json").read_text()) == FIGURES | {"masked_l1": None}
