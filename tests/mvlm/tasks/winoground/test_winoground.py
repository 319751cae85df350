"""Winoground's files as published, and its scores against loops over single pairs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mvlm.errors import RunError
from mvlm.runs.load import load_model
from mvlm.tasks.winoground.evaluate import CHANCE, evaluate_winoground
from mvlm.tasks.winoground.read import read_examples
from support.commands import assert_refused
from support.scenes import png, scene


def write(folder: Path, count: int = 40) -> tuple[Path, Path]:
    """Examples and images named as in the release: stems in the file, PNG in the folder."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        record = {"id": i, "tag": "Adjective-Color", "secondary_tag": "", "num_main_preds": 1}
        record["collapsed_tag"] = "Relation" if i % 4 else "Object"
        for k in (0, 1):
            pixels, caption = scene(2 * i + k)
            (folder / "images" / f"ex_{i}_img_{k}.png").write_bytes(png(pixels))
            record |= {f"image_{k}": f"ex_{i}_img_{k}", f"caption_{k}": caption}
        lines.append(json.dumps(record) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines))
    return folder / "examples.jsonl", folder / "images"


@pytest.mark.slow
def test_scores_are_those_of_single_pairs(trained, tmp_path, run_mvlm):
    file, images = write(tmp_path)
    examples = read_examples(file, images)
    assert [example.id for example in examples[:3]] == ["0", "1", "2"]
    assert examples[5].images[1] == images / "ex_5_img_1.png"
    model = load_model(trained, "cpu", "fp32")
    figures, records = evaluate_winoground(model, examples)
    right = {judge: np.zeros(3) for judge in ("both", "itc", "itm")}
    for example, record in zip(examples, records, strict=True):
        both, itc, itm = (np.zeros((2, 2)) for _ in range(3))
        for c, i in itertools.product((0, 1), (0, 1)):
            image, caption = example.images[i], example.captions[c]
            itm[c, i] = float(model.match(image, caption).log_odds)
            itc[c, i] = float(model.similarity(image, caption)) * model.network.log_scale.exp().item()
            both[c, i] = float(model.rerank(image, [caption]).score)
        for judge, s in (("both", both), ("itc", itc), ("itm", itm)):
            assert record[judge] == pytest.approx(s, abs=1e-4)
            s = np.array(record[judge])
            text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
            image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
            right[judge] += [text, image, text and image]
    names = ("text_score", "image_score", "group_score")
    assert [figures[name] for name in names] == pytest.approx(100 * right["both"] / 40)
    for judge in ("itc", "itm"):
        assert [figures[judge][name] for name in names] == pytest.approx(100 * right[judge] / 40)
    for name in names:
        low, high = figures[f"{name}_95"]
        assert low <= figures[name] <= high
    assert {tag: found["examples"] for tag, found in figures["by_tag"].items()} == {"Object": 10, "Relation": 30}
    out = tmp_path / "out.json"
    words = ("--checkpoint", trained, "--examples", file, "--images", images, "--out", out, "--device", "cpu")
    assert run_mvlm("eval", "winoground", *words).code == 0
    found = json.loads(out.read_text())
    assert found["examples"] == len(found["records"]) == 40
    assert found["model"] == model.sha256
    assert found["precision"] in ("bf16", "fp32")


@pytest.mark.slow
def test_a_model_without_itm_is_scored_by_itc(trained, without_itm, tmp_path, run_mvlm):
    file, images = write(tmp_path, 6)
    examples = read_examples(file, images)
    figures, records = evaluate_winoground(load_model(without_itm, "cpu", "fp32"), examples)
    _, with_itm = evaluate_winoground(load_model(trained, "cpu", "fp32"), examples)
    assert figures["itm"] is None
    for name in CHANCE:
        assert figures[name] == figures["itc"][name]
    for record, other in zip(records, with_itm, strict=True):
        assert record["itm"] is None
        assert record["both"] == record["itc"]
        assert other["both"] != other["itc"]
    out = tmp_path / "out.json"
    words = ("--checkpoint", without_itm, "--examples", file, "--images", images, "--out", out, "--device", "cpu")
    assert run_mvlm("eval", "winoground", *words).code == 0
    assert json.loads(out.read_text())["itm"] is None


def test_chance_is_the_share_of_orders(tmp_path):
    right = np.zeros(3)
    for a, b, c, d in itertools.permutations(range(4)):  # caption 0 with images 0 and 1, then caption 1
        text, image = a > c and d > b, a > b and d > c
        right += [text, image, text and image]
    assert list(CHANCE.values()) == pytest.approx(100 * right / 24)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_1": "ex_9_img_9"}, "wanted the image ex_9_img_9, found none of that name"),
        ({"image_1": "../../secret"}, "wanted the image secret, found none"),
        ({"caption_0": " "}, "example 1: wanted id, image_0, image_1, caption_0, caption_1, found no caption_0"),
        ({"id": 1}, "wanted each id once, found 1 twice"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    file, images = write(tmp_path / "data", 2)
    (tmp_path / "secret").write_bytes(b"")
    first, second = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(first) | change), second]))
    with pytest.raises(RunError, match=message):
        read_examples(file, images)


def test_the_command_refuses_an_empty_file_on_one_line(trained, tmp_path, run_mvlm):
    (tmp_path / "none.jsonl").write_text("")
    words = ("--checkpoint", trained, "--examples", tmp_path / "none.jsonl", "--images", tmp_path)
    assert_refused(run_mvlm("eval", "winoground", *words), "wanted Winoground's JSON lines, found none")
