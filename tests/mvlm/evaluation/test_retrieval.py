"""Ranks against a brute-force count, features against each image and caption alone, intervals against drawn images."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mvlm.evaluation import retrieval
from mvlm.evaluation.retrieval import EncodedSplit, best_rank, encode_split, rank_all, recall, recall_intervals
from mvlm.evaluation.workspace import Workspace
from mvlm.inference import encode
from mvlm.model.packing import PackedText
from mvlm_dataloading import ShardWriter, open_dataset
from support.models import micro_model
from support.scenes import png, scene


class Lookup(nn.Module):
    """Stands in for a model: features carry the number of their image or caption, `judge` reads a table."""

    def __init__(self, log_odds: np.ndarray, scale: float = 1.0) -> None:
        super().__init__()
        self.log_odds = torch.from_numpy(log_odds)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        self.batches: list[tuple[list[int], list[int]]] = []

    def judge(self, v: torch.Tensor, w: PackedText, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        assert len(v.unique(dim=0)) == len(v)  # each image once
        starts = w.packing.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(starts):
            assert len(w.rows[start:stop].unique()) == 1  # all rows of a caption, and of no other
            assert stop - start == 3 + int(w.rows[start, 0]) % 4
        assert w.packing.max_length == max(b - a for a, b in itertools.pairwise(starts))
        image, text = v[images, 0, 0].long(), w.rows[w.packing.cu_seqlens[:-1], 0][texts].long()
        self.batches.append((image.tolist(), text.tolist()))
        return self.log_odds[image, text].float()


@pytest.fixture(autouse=True)
def _judged_by_table(monkeypatch):
    def judge(model, v, w, images, texts, precision, rows):
        assert precision == "fp32"
        assert rows == w.packing.lengths[texts].sum()  # known on the host, which need not wait for a device
        return model.judge(v, w, images, texts)

    monkeypatch.setattr(retrieval, "match_log_odds", judge)


def features_of(
    image: np.ndarray, text: np.ndarray, owner: list[int], captions: list[str] | None = None
) -> EncodedSplit:
    """Features that carry numbers, with these embeddings; captions are 3 to 6 tokens long."""
    lengths = 3 + torch.arange(len(text)) % 4
    return EncodedSplit(
        v=torch.arange(len(image)).float()[:, None, None].expand(-1, 2, 4),
        w=torch.arange(len(text)).float().repeat_interleave(lengths)[:, None].expand(-1, 4),
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        image_embedding=torch.from_numpy(image),
        text_embedding=torch.from_numpy(text),
        image=torch.arange(len(image)),
        owner=torch.tensor(owner),
        first=torch.tensor([owner.index(i) for i in range(len(image))]),
        captions=captions or [f"caption {t}" for t in range(len(text))],
    )


def by_hand(image, text, owner, log_odds, scale, direction, k, words):
    """For every query: its rank by similarity, its rank after re-ranking, the first answers with their score, and its
    rank if ITM alone orders the candidates."""
    found = []
    for query in range(len(image) if direction == "tr" else len(text)):
        gallery = [words.index(word) for word in dict.fromkeys(words)] if direction == "tr" else range(len(image))

        def pair(answer, query=query):
            return (query, answer) if direction == "tr" else (answer, query)

        similarity = {a: float(image[pair(a)[0]] @ text[pair(a)[1]]) for a in gallery}
        right = {a for a in gallery if (pair(a)[0], words[pair(a)[1]]) in zip(owner, words, strict=True)}
        best = max(similarity[a] for a in right)
        itc = sum(similarity[a] >= best for a in gallery if a not in right)
        candidates = sorted(gallery, key=lambda a: -similarity[a])[:k]
        score = {a: scale * similarity[a] + float(log_odds[pair(a)]) for a in candidates}
        itm = alone = itc
        if right & set(candidates):
            best = max(score[a] for a in right & set(candidates))
            itm = sum(score[a] >= best for a in candidates if a not in right)
            best = max(log_odds[pair(a)] for a in right & set(candidates))
            alone = sum(log_odds[pair(a)] >= best for a in candidates if a not in right)
        order = sorted(candidates, key=lambda a: -score[a])
        found.append((itc, itm, order[:5], score[order[0]], alone))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["tr", "ir"])
@pytest.mark.parametrize("k, different", [(0, 0), (1, 0), (4, 0), (12, 0), (1000, 0), (0, 40), (12, 40)])
def test_ranks_against_brute_force(direction, k, different):
    """70 images with one to four captions each; more queries than a block holds, more pairs than a batch.

    Captions repeat, in other blanks and case, where few are `different`."""
    rng = np.random.default_rng(0)
    owner = [i for i in range(70) for _ in range(1 + i % 4)]
    image, text = rng.normal(size=(70, 5)), rng.normal(size=(len(owner), 5))
    text += 0.8 * image[owner]
    log_odds = 3 * rng.normal(size=(70, len(owner)))
    log_odds[owner, np.arange(len(owner))] += 3
    model = Lookup(log_odds, scale=2.5)
    words = (rng.integers(different, size=len(owner)) if different else np.arange(len(owner))).tolist()
    captions = [f"Caption {word}" if t % 2 else f" caption  {word}" for t, word in enumerate(words)]
    ranked: Any = model
    features = features_of(image, text, owner, captions)
    found = rank_all(ranked, features, k, "fp32")[direction]
    brief = rank_all(ranked, features, k, "fp32", answers=False)[direction]
    wanted = by_hand(image, text, owner, log_odds if k else 0 * log_odds, 2.5, direction, k or 1000, words)
    itc, itm, top, score, alone = map(list, zip(*wanted, strict=True))
    if k == 0:  # ITM's head is not asked: a model that was trained without ITM has random weights there
        alone = itc
        assert not model.batches
    assert found.itc.tolist() == itc
    assert found.itm.tolist() == itm
    assert found.itm_alone.tolist() == alone
    assert (brief.itc.tolist(), brief.itm.tolist(), brief.itm_alone.tolist()) == (itc, itm, alone)
    assert found.top.tolist() == top
    np.testing.assert_allclose(found.score.numpy(), score, rtol=1e-6)
    assert max((len(images) for images, _ in model.batches), default=0) <= 512  # bounded memory
    if 1 < k < 1000:
        assert found.itm.tolist() != found.itc.tolist()
        assert found.itm.tolist() != found.itm_alone.tolist()


def test_a_pair_is_judged_once_and_the_pairs_of_an_image_lie_together():
    rng = np.random.default_rng(2)
    owner = [i for i in range(90) for _ in range(2)]
    image, text = rng.normal(size=(90, 5)), rng.normal(size=(180, 5))
    model, features = Lookup(3 * rng.normal(size=(90, 180)), 2.5), features_of(image, text, owner)
    rank_all(model, features, 20, "fp32")  # pyright: ignore[reportArgumentType]
    judged = [pair for images, texts in model.batches for pair in zip(images, texts, strict=True)]
    similarity = image @ text.T
    wanted = {(i, t) for i in range(90) for t in np.argsort(-similarity[i])[:20].tolist()}
    wanted |= {(i, t) for t in range(180) for i in np.argsort(-similarity[:, t])[:20].tolist()}
    assert judged == sorted(wanted)
    assert len(wanted) < 20 * (90 + 180)


def test_scores_that_differ_by_rounding_alone_are_a_tie():
    """Sums of the same numbers in another order, as a matrix product adds up its columns."""
    products = torch.rand(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    scores = torch.tensor([[sum(row), sum(reversed(row))] for row in products], dtype=torch.float64)
    assert (scores[:, 0] > scores[:, 1]).any()
    assert (scores[:, 0] < scores[:, 1]).any()
    for right in ([True, False], [False, True]):
        assert best_rank(scores, torch.tensor([right]).expand(50, 2)).tolist() == [1] * 50
    scores[:, 1] = scores[:, 0] - 1e-8  # as different as two embeddings in float32 may be
    assert best_rank(scores, torch.tensor([[True, False]]).expand(50, 2)).tolist() == [0] * 50
    infinite = torch.tensor([[torch.inf, torch.inf, 0.0], [-torch.inf, -torch.inf, 0.0]])
    assert best_rank(infinite, torch.tensor([[True, False, False]]).expand(2, 3)).tolist() == [1, 2]


def test_a_model_whose_scores_are_nan_finds_nothing():
    scores = torch.full((2, 5), torch.nan)
    right = torch.eye(5, dtype=torch.bool)[:2]
    assert retrieval.best_rank(scores, right).tolist() == [4, 4]
    scores[0] = torch.tensor([1.0, torch.nan, 0.5, 2.0, -torch.inf])
    assert retrieval.best_rank(scores, right)[0] == 2  # behind 2.0, and no NaN is below it


def test_recall_is_per_cent_of_queries():
    assert recall(torch.tensor([0, 0, 3, 4, 5, 9, 10, 99])) == {"r1": 25.0, "r5": 50.0, "r10": 75.0}
    assert recall(torch.tensor([0, 1, 1])) == {"r1": 33.33, "r5": 100.0, "r10": 100.0}


@pytest.fixture(scope="module")
def network():
    return micro_model(dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("batch", [64, 3])
def test_features_of_a_split_are_those_of_each_image_and_caption_alone(
    network, heldout_split, tokenizer, monkeypatch, tmp_path, batch, place
):
    """The plain network encodes each alone."""
    monkeypatch.setattr(encode, "BATCH", batch)
    monkeypatch.setattr(retrieval, "BATCH", batch)
    workspace = Workspace(tmp_path if place == "disk" else None)
    found = encode_split(network, heldout_split, tokenizer, "fp32", workspace)
    captions = [caption for i in range(8) for caption in heldout_split.captions(i)]
    assert found.captions == captions
    assert len(captions) == 12  # every second image has two
    assert found.owner.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert found.first.tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert found.v.shape == (8, 17, 16)
    lengths = [len(tokenizer.encode([caption], 12)[0]) for caption in captions]
    assert found.starts.tolist() == [sum(lengths[:t]) for t in range(13)]
    assert found.w.shape == (sum(lengths), 16)
    with torch.no_grad():
        for i in range(8):
            pixels = torch.from_numpy(scene(3 * i + 1)[0]).permute(2, 0, 1)[None]
            v = network.encode_image(pixels)
            torch.testing.assert_close(found.v[i], v[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.image_embedding[i], network.embed_image(v)[0], rtol=0, atol=1e-6)
        for t, caption in enumerate(captions):
            tokens = torch.from_numpy(tokenizer.encode([caption], 12)[0])
            length = len(tokens)
            w, _ = network.encode_text(tokens, torch.tensor([0, length]), length)
            rows = found.w[found.starts[t] : found.starts[t + 1]]
            torch.testing.assert_close(rows, w[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.text_embedding[t], network.embed_text(w)[0], rtol=0, atol=1e-6)
    for embedding in (found.image_embedding, found.text_embedding):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))


def test_the_first_caption_of_an_image_is_one_that_has_a_token(network, tokenizer, monkeypatch, tmp_path):
    """Captions without a token are passed over, as in the loader that draws the masks."""
    with ShardWriter(tmp_path, name="odd", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for i, captions in enumerate((["unseen", "red", "blue"], ["green", "unseen"], ["red", "blue"])):
            assert writer.add(f"{i}", png(scene(i)[0]), captions, {}, split="test") is None
    encoding = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda texts, n: encoding([t.replace("unseen", "") for t in texts], n))
    split = open_dataset(tmp_path, "test")
    found = encode_split(network, split, tokenizer, "fp32")
    assert [found.captions[n] for n in found.first.tolist()] == ["red", "green", "red"]
    (batch, _), *_ = encode.eval_loader(split, network, tokenizer)
    lengths = found.starts.diff()[found.first]
    assert torch.equal(batch.cu_seqlens.diff().long(), lengths)


@pytest.mark.slow
def test_intervals_of_captions_are_those_of_drawn_images():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(150), rng.integers(1, 5, 150))
    hard = rng.random(150)  # captions of one image are right or wrong together
    ranks = (rng.integers(0, 12, len(images)) * hard[images]).astype(int)
    found = recall_intervals(torch.from_numpy(ranks), torch.from_numpy(images))
    queries_of = [np.flatnonzero(images == image) for image in range(150)]
    drawn = [np.concatenate([queries_of[i] for i in rng.integers(150, size=150)]) for _ in range(4000)]
    for k in (1, 5, 10):
        expected = np.percentile([100 * np.mean(ranks[queries] < k) for queries in drawn], (2.5, 97.5))
        width = expected[1] - expected[0]
        assert np.abs(np.array(found[f"r{k}"]) - expected).max() < 0.08 * width
