"""BLEU and CIDEr-D against torchmetrics and dense vectors; facts by hand."""

import itertools

import numpy as np
import pytest

from mvlm.tasks.metrics.captions import bleu, cider, fact_figures, is_scene, tokenize

WORDS = ["a", "red", "heart", "left", "of", "the", "blue", "circle", "dog", "sits"]


def make_set(images: int, seed: int, references: int = 3) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(2, 12)))

    wanted = {str(i): [sentence() for _ in range(references)] for i in range(images)}
    # Half of a caption comes from a reference, so that long sequences match too.
    found = {i: f"{texts[0]} {sentence()}" if int(i) % 2 else sentence() for i, texts in wanted.items()}
    return found, wanted


def dense_cider(captions: dict[str, str], references: dict[str, list[str]]) -> list[float]:
    """CIDEr-D by vectors over all possible sequences of words."""
    scores = np.zeros(len(references))
    for n in (1, 2, 3, 4):
        every = [text.split() for text in [*captions.values(), *itertools.chain(*references.values())]]
        grams = sorted({tuple(words[i : i + n]) for words in every for i in range(len(words) - n + 1)})
        place = {gram: i for i, gram in enumerate(grams)}

        def counts(text: str, n: int = n, place: dict = place) -> np.ndarray:
            vector, words = np.zeros(len(place)), text.split()
            for i in range(len(words) - n + 1):
                vector[place[tuple(words[i : i + n])]] += 1
            return vector

        images_with = sum(np.max([counts(t) > 0 for t in texts], axis=0).astype(float) for texts in references.values())
        idf = np.log(len(references)) - np.log(np.maximum(images_with, 1))
        for row, (image, texts) in enumerate(references.items()):
            a = counts(captions[image]) * idf
            for text in texts:
                b = counts(text) * idf
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                if lengths:
                    gap = len(captions[image].split()) - len(text.split())
                    scores[row] += 10 / 4 / len(texts) * (np.minimum(a, b) @ b) / lengths * np.exp(-(gap**2) / 72)
    return scores.tolist()


def test_captions_are_tokenized_with_vowel_signs_and_no_punctuation():
    assert tokenize("A dog's black-and-white tail, (left)!") == ["a", "dog's", "black-and-white", "tail", "left"]
    assert tokenize("एक लड़की दौड़ रही है।") == ["एक", "लड़की", "दौड़", "रही", "है"]
    assert tokenize("می\u200cدود، Cafe\u0301!") == ["می\u200cدود", "cafe\u0301"]


@pytest.mark.parametrize("emoji", ["\u2764\ufe0f", "\U0001f469\u200d\U0001f467", "\u2600\ufe0f\u200d"])
def test_emoji_with_variation_selectors_and_joiners_are_no_words(emoji):
    assert tokenize(f"a {emoji} heart{emoji}, {emoji}") == ["a", "heart"]
    assert tokenize("a \u2764 heart") == ["a", "heart"]
    wanted = {"1": [f"a {emoji} red heart on white"], "2": ["a dog"]}
    assert bleu({"1": "a red heart on white", "2": "a dog"}, wanted)[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_torchmetrics(seed):
    from torchmetrics.functional.text import bleu_score

    found, wanted = make_set(8, seed)
    oracle = [float(bleu_score(list(found.values()), list(wanted.values()), n_gram=n)) for n in (1, 2, 3, 4)]
    assert bleu(found, wanted) == pytest.approx(oracle, abs=1e-6)


@pytest.mark.parametrize("references", [1, 4])
def test_cider_equals_dense_vectors(references):
    found, wanted = make_set(12, 5, references)
    assert cider(found, wanted).tolist() == pytest.approx(dense_cider(found, wanted), abs=1e-12)


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
