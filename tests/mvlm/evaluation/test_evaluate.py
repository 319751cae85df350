"""Figures of an evaluation, against ranks computed separately; their table; and their file."""

import copy
import json
import math
from typing import Any

import pytest
import torch

from mvlm.evaluation.evaluate import evaluate_briefly, format_table, unseen_images
from mvlm.evaluation.retrieval import encode_split, rank_all, recall
from mvlm.inference.trained_model import TrainedModel
from mvlm.report.examples import retrievals
from mvlm_dataloading import ShardWriter, open_dataset
from mvlm_dataloading.files import write_json
from support.models import micro_model
from support.scenes import png, scene


@pytest.fixture
def model():
    return micro_model(dtype=torch.float32)


@pytest.fixture
def trained(model, tokenizer):
    return TrainedModel(model, tokenizer, "fp32")


def write(folder, bases: dict[str, list[str | None]]):
    with ShardWriter(folder, name="x", source="", licence="", attribution="", recipe={}) as writer:
        for split, found in bases.items():
            for i, base in enumerate(found):
                pixels, caption = scene(i)
                metadata = {} if base is None else {"base": base}
                writer.add(f"{split}{i}", png(pixels), [caption, f"one {caption}"], metadata, split=split)
    return folder


def test_unseen_images_show_concepts_that_training_lacks(tmp_path):
    folder = write(
        tmp_path / "data",
        {"train": ["cat", "dog", "cat", None], "test": ["cat", "owl", None, "dog", "hen"]},
    )
    unseen = unseen_images(open_dataset(folder, "test"), open_dataset(folder, "train"))
    assert unseen is not None
    assert unseen.dtype == torch.bool
    assert unseen.tolist() == [False, True, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "train, test",
    [([None, None], [None, None, None]), ([None, None], ["cat", "owl"]), (["cat", "owl"], [None, None])],
    ids=["neither", "test alone", "train alone"],
)
def test_no_image_is_unseen_where_a_split_names_no_concepts(model, tmp_path, tokenizer, train, test, trained):
    folder = write(tmp_path / "data", {"train": train, "test": test})
    split, known = (open_dataset(folder, name) for name in ("test", "train"))
    assert unseen_images(split, known) is None
    figures = trained.evaluate(split, known, 2).figures
    assert figures["unseen"] is None
    assert "unseen" not in format_table(figures)
    features = encode_split(model, split, tokenizer, "fp32")
    assert not any("unseen" in group.title for group in retrievals(model, split, known, features))


@pytest.mark.slow
def test_samples_of_one_image_id_are_one_image(model, tmp_path, tokenizer, trained):
    """Data with a row for each caption have the figures of data with all captions of an image in one row."""
    splits = {}
    for name in ("merged", "flat", "unnamed"):
        with ShardWriter(tmp_path / name, name="x", source="", licence="", attribution="", recipe={}) as writer:
            for i in range(12):
                pixels, caption = scene(i)
                captions = [caption, f"one {caption}", f"{caption} again"]
                for row, texts in enumerate([captions] if name == "merged" else [[c] for c in captions]):
                    metadata = {"base": str(i % 4)} | ({} if name == "unnamed" else {"image_id": i})
                    writer.add(f"{i}-{row}", png(pixels), texts, metadata, split="test")
            writer.add("train", png(scene(20)[0]), ["a square"], {"base": "1"}, split="train")
        splits[name] = open_dataset(tmp_path / name, "test"), open_dataset(tmp_path / name, "train")
    found = {name: trained.evaluate(test, train, 4) for name, (test, train) in splits.items()}
    (merged, ranks), (flat, ranks_of_flat) = found["merged"], found["flat"]
    assert (flat["n_images"], flat["n_texts"], flat["unseen"]["n_images"]) == (12, 36, 9)
    assert found["unnamed"][0]["n_images"] == 36  # equal pictures alone say nothing: ranks of earlier versions stay
    assert ranks == ranks_of_flat
    for name in ("tr", "ir", "tr_95", "ir_95", "itc", "itm", "unseen", "n_images", "n_texts", "reranked"):
        assert merged[name] == flat[name], name
    brief = [evaluate_briefly(model, splits[name][0], tokenizer, "fp32") for name in ("merged", "flat")]
    assert {k: v for k, v in brief[0].items() if "_r" in k} == {k: v for k, v in brief[1].items() if "_r" in k}
    test, train = splits["flat"]
    for group in retrievals(model, test, train, encode_split(model, test, tokenizer, "fp32"), 4):
        for each in group.retrievals:
            assert len({answer.image or answer.text for answer in each.answers}) == len(each.answers)  # none twice


@pytest.mark.slow
def test_evaluation_figures_are_those_of_the_ranks(model, tmp_path, tokenizer, trained):
    folder = write(tmp_path / "data", {"train": ["cat"] * 4, "test": ["cat", "owl", "cat", "hen", "cat", "cat"]})
    split, train = (open_dataset(folder, name) for name in ("test", "train"))
    figures = trained.evaluate(split, train, 3).figures
    features = encode_split(model, split, tokenizer, "fp32")
    ranks = rank_all(model, features, 3, "fp32")
    for way, chosen in (("tr", [1, 3]), ("ir", [2, 3, 6, 7])):
        assert figures[way] == recall(ranks[way].itm)
        assert figures["itc"][way] == recall(ranks[way].itc)
        assert figures["unseen"][way] == recall(ranks[way].itm[chosen])
        assert figures["unseen"]["itc"][way] == recall(ranks[way].itc[chosen])
        assert figures["itm"][way] == recall(ranks[way].itm_alone)
        assert figures["unseen"]["itm"][way] == recall(ranks[way].itm_alone[chosen])
        for found in (figures, figures["unseen"]):
            assert all(low <= found[way][k] <= high for k, (low, high) in found[f"{way}_95"].items())
    assert (figures["n_images"], figures["n_texts"]) == (6, 12)
    assert (figures["unseen"]["n_images"], figures["unseen"]["n_texts"]) == (2, 4)
    assert figures["reranked"] == 3
    for name in ("gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1"):
        assert math.isfinite(figures[name])
    for name in ("masked_l1_white", "masked_l1_train_median", "seconds"):
        assert figures[name] > 0


@pytest.mark.slow
def test_evaluation_has_no_unseen_figures_if_all_concepts_are_known(model, tmp_path, tokenizer, trained):
    folder = write(tmp_path / "data", {"train": ["cat"], "test": ["cat", "cat"]})
    split, train = (open_dataset(folder, name) for name in ("test", "train"))
    assert trained.evaluate(split, train, 2).figures["unseen"] is None


def test_a_brief_evaluation_leaves_the_model_in_training(model, heldout_split, tokenizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.training
    found = evaluate_briefly(model, heldout_split, tokenizer, "fp32")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    features = encode_split(model, heldout_split, tokenizer, "fp32")
    for way in ("tr", "ir"):
        alone = recall(rank_all(model, features, 8, "fp32")[way].itc)
        assert {name: found[f"{way}_{name}"] for name in alone} == alone
    assert set(found) == {f"{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)} | {
        *("gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1")
    }


@pytest.mark.slow
def test_a_data_set_without_a_train_split_is_evaluated(model, tmp_path, tokenizer, trained):
    folder = write(tmp_path / "data", {"test": ["cat", "owl", "dog", "hen"]})
    split = open_dataset(folder, "test")
    assert split.splits == ["test"]
    figures = trained.evaluate(split, None, 2).figures
    assert figures["unseen"] is None
    assert figures["masked_l1_train_median"] is None
    assert figures["masked_l1_white"] > 0
    assert "training median" not in format_table(figures)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_recall_is_that_of_the_plain_network_one_pair_at_a_time(model, heldout_split, tokenizer, k, trained):
    """12 captions of 8 images; in fp32 the two implementations agree to the digit of the figures."""
    figures = trained.evaluate(heldout_split, None, k).figures
    captions = [(i, caption) for i in range(8) for caption in heldout_split.captions(i)]
    owner = torch.tensor([i for i, _ in captions])
    scale = model.log_scale.exp().item()
    with torch.no_grad():
        v = [model.encode_image(torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)[None]) for i in range(8)]
        w = []
        for _, caption in captions:
            tokens = torch.from_numpy(tokenizer.encode([caption], 12)[0])
            w.append(model.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens)))
        image, text = (
            torch.cat([embed(x) for x in features]).double()
            for embed, features in ((model.embed_image, v), (model.embed_text, [features for features, _ in w]))
        )
        similarity = image @ text.T
        log_odds = torch.stack([torch.cat([model.match(x, *y).diff(dim=1)[:, 0] for y in w]) for x in v])
    right = owner == torch.arange(8)[:, None]
    for way, s, odds, r in (("tr", similarity, log_odds, right), ("ir", similarity.T, log_odds.T, right.T)):
        itc, itm = [], []
        for query in range(len(s)):
            found, hits = s[query], r[query]
            itc.append(int(((found >= found[hits].max()) & ~hits).sum()))
            chosen = found.topk(k).indices
            score, hits = (scale * found + odds[query])[chosen], hits[chosen]
            itm.append(int(((score >= score[hits].max()) & ~hits).sum()) if hits.any() else itc[-1])
        assert figures[way] == recall(torch.tensor(itm))
        assert figures["itc"][way] == recall(torch.tensor(itc))


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
