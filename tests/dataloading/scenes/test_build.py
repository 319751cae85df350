"""Built data sets of composed scenes: their images, splits, licences and bytes."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.scenes.build import TASKS, build_scenes
from mvlm_dataloading.scenes.drawing import TONES, Painter, openmoji, twemoji
from mvlm_dataloading.scenes.layout import GROUNDS, SIDE, Scene, place
from mvlm_dataloading.scenes.vocabulary import NOUNS, SPLITS, TINTS, Kind
from support.data import file_contents
from support.published import encoded

SIZES: dict[str, Any] = {"train": 8, "validation": 4, "test": 4}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scenes(tmp_path_factory.mktemp("scenes") / "out", **SIZES, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_all_splits(scenes: Path, task: str) -> None:
    description = json.loads((scenes / task / "dataset.json").read_text())
    assert set(description["splits"]) == {*SPLITS, *(["edits"] if task == "placed" else [])}
    assert description["rejected"] == {}
    assert description["licence"] == "CC BY 4.0; CC BY-SA 4.0: see each sample"
    licences = dict.fromkeys(SPLITS, "CC BY-SA 4.0") | {"artist": "CC BY 4.0"}
    for split in SPLITS:
        dataset = open_dataset(scenes / task, split)
        assert len(dataset) >= SIZES.get(split, 4)
        images = 2 if task == "pairs" else 1
        for i in range(len(dataset)):
            metadata = dataset.metadata(i)
            assert metadata["licence"] == licences[split]
            assert metadata["attribution"]
            assert Image.open(io.BytesIO(dataset.image_bytes(i))).size == (images * SIDE, SIDE)


@pytest.mark.slow
def test_edited_images_differ_in_the_cell_of_the_edit_alone(scenes: Path) -> None:
    dataset = open_dataset(scenes / "placed", "edits")
    assert len(dataset) >= SIZES["test"]
    for i in range(0, len(dataset), 2):
        one, other = (
            np.array(Image.open(io.BytesIO(dataset.image_bytes(n)))).astype(int) for n in (i, i + 1)
        )  # (128, 128, 3)
        left, top, right, low = (round(SIDE * edge) for edge in dataset.metadata(i)["edit"])
        differ = np.abs(one - other).max(-1) > 0
        assert differ[top:low, left:right].any()
        differ[top:low, left:right] = False
        assert not differ.any()
        assert dataset.metadata(i)["edit"] == dataset.metadata(i + 1)["edit"]


@pytest.mark.slow
def test_boxes_hold_what_is_drawn(scenes: Path) -> None:
    dataset = open_dataset(scenes / "caption", "test")
    for i in range(len(dataset)):
        image = np.array(Image.open(io.BytesIO(dataset.image_bytes(i)))).astype(int)  # (128, 128, 3)
        outside = np.ones((SIDE, SIDE), bool)
        for one in dataset.metadata(i)["scene"]["objects"]:
            x, y, wide, high = one["box"]
            outside[y : y + high, x : x + wide] = False
            for edge in (image[y : y + 2, x : x + wide], image[y : y + high, x : x + 2]):
                assert np.abs(edge - image[0 if y else -1, 0 if x else -1]).max() > 20  # the drawing reaches its box
        assert len(np.unique(image[outside], axis=0)) <= 2  # a ground of at most two tones


@pytest.mark.slow
def test_processes_change_no_byte_and_finished_sets_are_kept(scenes: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"train": 201, "validation": 12, "test": 12}
    one, two = (build_scenes(tmp_path / str(n), **sizes, tasks=("entailment",), workers=n) for n in (1, 2))
    assert file_contents(one / "entailment") == file_contents(two / "entailment")
    before = (one / "entailment" / "dataset.json").stat()
    build_scenes(one, **sizes, tasks=("entailment",))
    assert (one / "entailment" / "dataset.json").stat() == before
    with pytest.raises(DataError):
        build_scenes(one, **sizes, seed=1, tasks=("entailment",))


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [("tasks", {"tasks": ("vqa", "nlvr")}), ("sizes", {"train": 0})]
    for word, wish in wrong:
        with pytest.raises(DataError, match=word):
            build_scenes(tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_background_hides_a_kind_of_either_artist() -> None:
    kinds = [*(tint.text for tint in TINTS), *NOUNS]
    for art in (openmoji(), twemoji()):
        assert set(art.images) == set(kinds)
        for kind in kinds:
            cutout = Image.open(io.BytesIO(art.images[kind]))
            assert max(cutout.size) == 80
            cutout.thumbnail((36, 36))
            pixels = np.array(cutout).astype(int)  # (height, width, 4)
            pixels = pixels[pixels[..., 3] > 128][:, :3]
            for tone in TONES:
                assert (np.abs(pixels - tone).sum(-1) > 70).mean() > 0.3, (art.attribution, kind, tone)


def test_grounds_differ_and_a_card_hides_all_behind_it() -> None:
    painter = Painter({"dog": encoded(Image.new("RGBA", (30, 40), (0, 90, 255, 255)), "PNG")})
    grounds = {painter.image(Scene(number, ())).tobytes() for number in range(GROUNDS)}
    assert len(grounds) == GROUNDS
    scene = place(random.Random(0), [Kind("dog")])
    covered = Scene(scene.ground, scene.objects, card=scene.objects[0].cell)
    empty = Scene(scene.ground, (), card=covered.card)
    assert painter.image(covered).tobytes() == painter.image(empty).tobytes()
    assert painter.image(scene).tobytes() != painter.image(Scene(scene.ground, ())).tobytes()
