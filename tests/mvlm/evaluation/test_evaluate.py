"""Figures of an evaluation, against ranks computed separately, and their file."""

import json
import math

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
def network():
    return micro_model(dtype=torch.float32)


@pytest.fixture
def trained_model(network, tokenizer):
    return TrainedModel(network, tokenizer, "fp32")


def write(folder, bases: dict[str, list[str | None]]):
    with ShardWriter(folder, name="x", source="", licence="", attribution="", recipe={}) as writer:
        for split, found in bases.items():
            for i, base in enumerate(found):
                pixels, caption = scene(i)
                metadata = {} if base is None else {"base": base}
                writer.add(f"{split}{i}", png(pixels), [caption, f"one {caption}"], metadata, split=split)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "train, test",
    [
        ([None, None], [None, None, None]),
        ([None, None], ["cat", "owl"]),
        (["cat", "owl"], [None, None]),
        (["cat"], ["cat", "cat"]),
    ],
    ids=["neither", "test alone", "train alone", "all known"],
)
def test_no_image_is_unseen_without_new_concepts(tmp_path, train, test, trained_model):
    folder = write(tmp_path / "data", {"train": train, "test": test})
    split, known = (open_dataset(folder, name) for name in ("test", "train"))
    unseen = unseen_images(split, known)
    assert unseen is None or not unseen.any()
    figures = trained_model.evaluate(split, known, 2).figures
    assert figures["unseen"] is None


@pytest.mark.slow
def test_samples_of_one_image_id_are_one_image(network, tmp_path, tokenizer, trained_model):
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
    found = {name: trained_model.evaluate(test, train, 4) for name, (test, train) in splits.items()}
    (merged, ranks), (flat, ranks_of_flat) = found["merged"], found["flat"]
    assert (flat["n_images"], flat["n_texts"], flat["unseen"]["n_images"]) == (12, 36, 9)
    assert found["unnamed"][0]["n_images"] == 36  # equal pictures alone say nothing: ranks of earlier versions stay
    assert ranks == ranks_of_flat
    for name in ("tr", "ir", "tr_95", "ir_95", "itc", "itm", "unseen", "n_images", "n_texts", "reranked"):
        assert merged[name] == flat[name], name
    brief = [evaluate_briefly(network, splits[name][0], tokenizer, "fp32") for name in ("merged", "flat")]
    assert {k: v for k, v in brief[0].items() if "_r" in k} == {k: v for k, v in brief[1].items() if "_r" in k}
    test, train = splits["flat"]
    for _, found in retrievals(network, test, train, encode_split(network, test, tokenizer, "fp32"), 4):
        for each in found:
            assert len({answer.image or answer.text for answer in each.answers}) == len(each.answers)  # none twice


@pytest.mark.slow
def test_repeated_captions_are_said_and_are_right_answers(tmp_path, trained_model):
    with ShardWriter(tmp_path / "d", name="x", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(6):
            writer.add(f"{i}", png(scene(i)[0]), ["A red square" if i % 2 else "a  red square"], {}, split="test")
    figures = trained_model.evaluate(open_dataset(tmp_path / "d", "test"), None, 4).figures
    assert figures["tr"] == figures["ir"] == {"r1": 100, "r5": 100, "r10": 100}
    assert figures["repeats"] == {"captions": 6, "image_to_text": 0, "text_to_image": 0}
    assert "6 of 6 captions have the words of another" in format_table(figures)
    own, untrained = (f"{figures[name]:.2f} % (95 %: " for name in ("gain_mim_pct", "gain_untrained_pct"))
    (row,) = (line for line in format_table(figures).splitlines() if line.startswith("cross-modal gain, MIM"))
    assert own in row
    assert untrained in row


@pytest.mark.slow
def test_evaluation_figures_are_those_of_the_ranks(network, tmp_path, tokenizer, trained_model):
    folder = write(tmp_path / "data", {"train": ["cat", "cat", None], "test": ["cat", "owl", "cat", None, "cat"]})
    split, train = (open_dataset(folder, name) for name in ("test", "train"))
    figures = trained_model.evaluate(split, train, 3).figures
    features = encode_split(network, split, tokenizer, "fp32")
    ranks = rank_all(network, features, 3, "fp32")
    for way, chosen in (("tr", [1, 3]), ("ir", [2, 3, 6, 7])):
        assert figures[way] == recall(ranks[way].itm)
        assert figures["itc"][way] == recall(ranks[way].itc)
        assert figures["unseen"][way] == recall(ranks[way].itm[chosen])
        assert figures["unseen"]["itc"][way] == recall(ranks[way].itc[chosen])
        assert figures["itm"][way] == recall(ranks[way].itm_alone)
        assert figures["unseen"]["itm"][way] == recall(ranks[way].itm_alone[chosen])
        for found in (figures, figures["unseen"]):
            assert all(low <= found[way][k] <= high for k, (low, high) in found[f"{way}_95"].items())
    assert (figures["n_images"], figures["n_texts"]) == (5, 10)
    assert (figures["unseen"]["n_images"], figures["unseen"]["n_texts"]) == (2, 4)
    assert figures["reranked"] == 3
    for name in ("gain_text_nats", "gain_pixels_pct", "gain_mim_pct", "gain_untrained_pct", "masked_nats", "masked_l1"):
        assert math.isfinite(figures[name])
    for name in ("masked_l1_white", "masked_l1_train_median", "seconds"):
        assert figures[name] > 0


def test_a_brief_evaluation_leaves_the_model_in_training(network, heldout_split, tokenizer):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert network.training
    found = evaluate_briefly(network, heldout_split, tokenizer, "fp32")
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    features = encode_split(network, heldout_split, tokenizer, "fp32")
    for way in ("tr", "ir"):
        alone = recall(rank_all(network, features, 8, "fp32")[way].itc)
        assert {name: found[f"{way}_{name}"] for name in alone} == alone
    assert set(found) == {f"{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)} | {
        *("gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1")
    }


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_recall_is_that_of_the_plain_network_one_pair_at_a_time(network, heldout_split, tokenizer, k, trained_model):
    """12 captions of 8 images; in fp32 the two implementations agree to the digit of the figures."""
    figures = trained_model.evaluate(heldout_split, None, k).figures
    assert (figures["unseen"], figures["masked_l1_train_median"]) == (None, None)
    captions = [(i, caption) for i in range(8) for caption in heldout_split.captions(i)]
    owner = torch.tensor([i for i, _ in captions])
    scale = network.log_scale.exp().item()
    with torch.no_grad():
        v = [network.encode_image(torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)[None]) for i in range(8)]
        w = []
        for _, caption in captions:
            tokens = torch.from_numpy(tokenizer.encode([caption], 12)[0])
            w.append(network.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens)))
        image, text = (
            torch.cat([embed(x) for x in features]).double()
            for embed, features in ((network.embed_image, v), (network.embed_text, [features for features, _ in w]))
        )
        similarity = image @ text.T
        log_odds = torch.stack(
            [torch.cat([network.matching_logits(*network.fuse(x, *y)).diff(dim=1)[:, 0] for y in w]) for x in v]
        )
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


def test_figures_that_are_not_finite_are_null_in_their_file(tmp_path):
    write_json(tmp_path / "deep/test.json", {"masked_l1": float("nan"), "unseen": {"tr": 0.5}})
    assert json.loads((tmp_path / "deep/test.json").read_text()) == {"masked_l1": None, "unseen": {"tr": 0.5}}
