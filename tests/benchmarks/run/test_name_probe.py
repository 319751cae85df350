"""The cloze test on scenes whose objects and captions are written here."""

from pathlib import Path

import pytest
import torch

from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.run.name_probe import NOUN, SHAPE, Answer, answers, clozes
from mvlm_dataloading import Dataset, ShardWriter, Tokenizer, open_dataset, train_tokenizer
from support.models import micro_config
from support.scenes import png, scene

OBJECTS = [
    {"name": "light bulb", "colour": None},
    {"name": "cat", "colour": None},
    {"name": "cat", "colour": None},
    {"name": "squid", "colour": None},
    {"name": "squid", "colour": None},
    {"name": "circle", "colour": "red"},
    {"name": "dog", "colour": None, "hidden": True},
]
CAPTION = "a light bulb, two cats, two squid, a red circle and a dog"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a light and a red square"] * 9, 290)


def test_a_name_is_masked_whole_and_without_its_comma(tokenizer):
    """Two cats and two squid are not asked for, nor what is hidden."""
    bulb, circle = clozes({"objects": OBJECTS}, CAPTION, tokenizer, 100)
    assert (bulb.kind, circle.kind) == (NOUN, SHAPE)
    for cloze, text in ((bulb, "light bulb"), (circle, "red circle")):
        assert tokenizer.decode(cloze.tokens[i] for i in cloze.name) == text
        assert tokenizer.decode(cloze.tokens) == CAPTION
    assert clozes({"objects": OBJECTS}, CAPTION, tokenizer, bulb.name.stop + 1) == [
        bulb._replace(tokens=[*bulb.tokens[: bulb.name.stop], tokenizer.sep_id])
    ]


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Dataset:
    """Images with one square each, red or blue by turns, and captions that say so."""
    folder = tmp_path_factory.mktemp("squares") / "data"
    with ShardWriter(folder, name="squares", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(40):
            colour = ("red", "blue")[i % 2]
            metadata = {"scene": {"size": [32, 32], "objects": [{"name": "square", "colour": colour}]}}
            assert writer.add(f"{i:03d}", png(scene(i)[0]), [f"a {colour} square"], metadata, split="test") is None
    return open_dataset(Path(folder), "test")


def test_each_object_is_judged_by_all_of_its_tokens(squares, monkeypatch):
    """A model that always predicts the tokens of "red square" names the red squares, and no blue one."""
    tokenizer = train_tokenizer(["a red square", "a blue square"] * 9, 290)
    ids = {text: tokenizer.encode([text], 100)[0][1:-1].tolist() for text in ("a", "a red square", "a blue square")}
    red, blue = (ids[f"a {colour} square"][len(ids["a"]) :] for colour in ("red", "blue"))
    assert len(red) == 2
    assert red[1] == blue[-1]
    network = MaskVLM(micro_config())
    model = TrainedModel(network, tokenizer, "fp32")

    def says_red(v, w, key_mask, cu_seqlens, token_ids):
        logits = torch.zeros(len(token_ids), network.config.vocab_size)
        after = torch.searchsorted(cu_seqlens, token_ids.int(), right=True) - 1
        place = token_ids - cu_seqlens[after] - 1 - len(ids["a"])  # of a masked token in its name
        logits[torch.arange(len(place)), torch.tensor(red)[place.clamp(max=1)]] = 1
        return logits

    monkeypatch.setattr(network, "fill_mask", says_red)
    assert answers(model, squares) == {SHAPE: [Answer(len(red), True), Answer(len(blue), False)] * 20}
