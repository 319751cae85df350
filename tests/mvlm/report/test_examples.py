import re

import pytest
import torch

from mvlm.evaluation import unseen_images
from mvlm.inference.encode import encode_split
from mvlm.report import examples
from mvlm_dataloading import open_dataset
from support.models import micro_model
from support.scenes import scene, write_scenes


@pytest.fixture(scope="module")
def model():
    return micro_model(dtype=torch.float32).eval()


def test_chosen_samples_are_a_fixed_choice():
    chosen = examples.chosen_samples(5, 100, 1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 5
    assert set(chosen) < set(range(100))
    assert chosen == examples.chosen_samples(5, 100, 1)
    assert chosen != examples.chosen_samples(5, 100, 2)
    assert chosen != [0, 1, 2, 3, 4]
    assert examples.chosen_samples(5, 3, 1) == [0, 1, 2]


def test_one_pass_returns_the_wanted_samples_in_order(model, tokenizer, heldout_split):
    images, patches, tokens, hidden = examples.one_pass(model, tokenizer, heldout_split, [6, 1, 3])
    assert patches.shape == (3, 8)
    for row, i in enumerate((1, 3, 6)):
        pixels, caption = scene(3 * i + 1)
        assert (images[row].permute(1, 2, 0).numpy() == pixels).all()
        assert tokens[row].tolist() == tokenizer.encode([caption], 12)[0].tolist()
        assert hidden[row].min() > 0
        assert hidden[row].max() < len(tokens[row]) - 1
        assert len(hidden[row]) == max(1, round(0.3 * (len(tokens[row]) - 2)))


def test_a_caption_with_its_gaps_and_its_guesses(tokenizer):
    tokens = torch.from_numpy(tokenizer.encode(["red top left on white"], 12)[0])
    number = len(tokens) - 2
    plain = examples.marked_caption(tokenizer, tokens, torch.tensor([], dtype=torch.int64), None)
    assert plain.strip() == "red top left on white"
    hidden = torch.tensor([1, number])
    assert examples.marked_caption(tokenizer, tokens, hidden, None).count("▢") == 2
    guesses = torch.tensor([tokens[1].item(), tokens[1].item()])
    marked = examples.marked_caption(tokenizer, tokens, hidden, guesses)
    found = re.findall('<span class="(right|wrong)">(.*?)</span>', marked)
    assert [kind for kind, _ in found] == ["right", "wrong"]
    assert found[0][1] == found[1][1] == examples.piece_text(tokenizer, int(tokens[1]))


def test_guesses_are_escaped(tokenizer):
    token = tokenizer.encode(["<"], 12)[0][1:-1].tolist()[-1]
    tokens = torch.tensor([tokenizer.cls_id, token, token, tokenizer.sep_id])
    marked = examples.marked_caption(tokenizer, tokens, torch.tensor([1]), torch.tensor([token]))
    assert marked.count("&lt;") == 2


def answers(html: str) -> list[tuple[str, str]]:
    """(heading, row) of every row of the retrieval section."""
    found, heading = [], ""
    for piece in re.split(r'(?=<h3>)|(?=<div class="row">)', html):
        if piece.startswith("<h3>"):
            heading = re.sub("<.*?>", "", piece.split("</h3>")[0])
        elif piece.startswith('<div class="row">'):
            found.append((heading, piece))
    return found


def test_retrievals_show_the_best_and_the_worst(model, tokenizer, heldout_split, train_split, monkeypatch):
    """With given ranks: the best are right and sure, the worst are those with most before them."""
    features = encode_split(model, heldout_split, tokenizer, "fp32")

    def ranks(model, features, direction):
        number = 8 if direction == "tr" else 12
        found = torch.arange(number) % 3 * 2  # rank 0, 2, 4, 0, 2, 4, ...
        return examples_ranks(found, found, torch.zeros(number, 3, dtype=torch.int64), torch.arange(number).float())

    from mvlm.evaluation import Ranks as examples_ranks

    monkeypatch.setattr(examples, "rank", ranks)
    unseen = unseen_images(heldout_split, train_split)
    assert unseen is not None
    assert not unseen.any()  # so the best may be any that are right
    rows = answers(examples.retrievals(model, heldout_split, train_split, features))
    shown = {}
    for heading, row in rows:
        place = int(re.findall(r"right answer at rank (\d+)", row)[0])
        shown.setdefault(heading.split(":")[0], []).append(place)
    assert shown["Image to text, best"] == [1, 1, 1]  # pictures 6, 3, 0
    assert shown["Text to image, best"] == [1, 1, 1, 1]
    assert shown["Image to text, worst"][:2] == [5, 5]
    assert shown["Text to image, worst"] == [5, 5, 5, 5]
    best = [row for heading, row in rows if heading.startswith("Text to image, best")]
    for row, caption in zip(best, (9, 6, 3, 0), strict=True):  # the surest first
        assert features.captions[caption] in row


def test_a_right_answer_is_marked(heldout_split, model, tokenizer):
    features = encode_split(model, heldout_split, tokenizer, "fp32")
    row = examples.retrieval_row(heldout_split, features, "tr", 1, [2, 0, 1], 1)
    marks = re.findall(r"<div><span( class=\"right\")?>(.*?)</span></div>", row)
    assert [bool(mark) for mark, _ in marks] == [True, False, True]  # captions 1 and 2 are picture 1's
    assert [caption for _, caption in marks] == [features.captions[t] for t in (2, 0, 1)]
    assert "right answer at rank 2" in row
    row = examples.retrieval_row(heldout_split, features, "ir", 4, [0, 3], 1)
    assert [bool(mark) for mark in re.findall(r"<figcaption><span( class=\"right\")?>", row)] == [False, True]


def test_unseen_concepts_come_first_among_the_best(model, tokenizer, heldout_split, tmp_path, monkeypatch):
    from mvlm.evaluation import Ranks

    train = open_dataset(write_scenes(tmp_path / "reds", {"train": 1}), "train")  # only scene 0, which is red
    unseen = unseen_images(heldout_split, train)
    assert unseen is not None
    colours = [heldout_split.captions(i)[0].split()[0] for i in range(8)]
    assert unseen.tolist() == [colour != "red" for colour in colours]
    features = encode_split(model, heldout_split, tokenizer, "fp32")

    def all_right(model, features, direction):
        number = 8 if direction == "tr" else 12
        zeros = torch.zeros(number, dtype=torch.int64)
        red = ~unseen if direction == "tr" else ~unseen[features.owner]
        return Ranks(zeros, zeros, zeros[:, None], red.float())  # surest of all where the picture is red

    monkeypatch.setattr(examples, "rank", all_right)
    rows = answers(examples.retrievals(model, heldout_split, train, features))
    best = [row for heading, row in rows if "Text to image, best" in heading]
    assert len(best) == 4
    assert not any(re.search('class="query"><p>(a square, )?red', row) for row in best)
