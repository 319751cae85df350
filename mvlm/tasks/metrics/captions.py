"""BLEU-4 and CIDEr-D of captions against several reference captions an image, and the facts that captions state.

Sources: Papineni et al. (ACL 2002) and Vedantam et al. (CVPR 2015), with the choices of COCO's caption evaluation: BLEU
over the whole set with the closest reference's length, and CIDEr-D with clipped counts, a Gaussian length penalty and
document frequencies from the references of the set. Captions are tokenised by `tokenize`, not by the Java program that
COCO's server runs; figures may differ from the server's in their first decimal.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from mvlm.tasks.metrics import Scored
from mvlm_dataloading.scenes.facts import is_true, scene_facts, stated_facts

KINDS = ("object", "colour", "count", "relation")
"""Kinds of facts about composed scenes."""
LONGEST = 4
JOINERS = "\u200c\u200d"
"""Signs within a word that say whether its letters join: zero-width non-joiner and joiner."""
SIGMA = 6.0
Grams = Counter[tuple[str, ...]]


def tokenize(caption: str) -> list[str]:
    """Words of a caption in lower case, without punctuation; an apostrophe or a hyphen within a word stays.

    So do the signs of scripts that write vowels as marks on a letter, such as Devanagari's. Marks without a letter, as
    those behind emoji, are no word.
    """
    caption = caption.lower()
    marks = {c for c in caption if c in JOINERS or unicodedata.category(c).startswith("M")}  # which \w leaves out
    part = rf"\w[\w{''.join(marks)}]*"
    return re.findall(rf"{part}(?:['-]{part})*", caption)


def count_grams(words: Sequence[str], length: int) -> Grams:
    """Count of each sequence of `length` words in `words`."""
    return Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))


def bleu(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the set in 0..1.

    Args:
        captions: A caption for each image id of `references`.
        references: The reference captions of each image id.
    """
    length = wanted_length = 0
    matched, counted = [0] * LONGEST, [0] * LONGEST
    for image, texts in references.items():
        words, others = tokenize(captions[image]), [tokenize(text) for text in texts]
        length += len(words)
        wanted_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(LONGEST):
            found, most = count_grams(words, n + 1), Counter[tuple[str, ...]]()
            for other in others:
                most |= count_grams(other, n + 1)
            matched[n] += (found & most).total()
            counted[n] += found.total()
    penalty = 1.0 if length > wanted_length else math.exp(1 - wanted_length / length) if length else 0.0
    scores, product = [], 1.0
    for n in range(LONGEST):
        product *= matched[n] / counted[n] if counted[n] else 0.0
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def cider(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each image, float64 (images,) in the order of `references`. The set's figure is the mean.

    Papers print the mean x 100; an exact copy of an only reference scores 10. With one image every score is 0, since a
    sequence that occurs in all of the set's images has weight 0: name the set beside the figure.
    """
    texts = {image: [tokenize(text) for text in of_image] for image, of_image in references.items()}
    scores = np.zeros(len(references))
    for n in range(1, LONGEST + 1):
        grams = {image: [count_grams(words, n) for words in of_image] for image, of_image in texts.items()}
        images_with = Counter(gram for of_image in grams.values() for gram in set().union(*of_image))

        def weigh(counts: Grams, images_with: Grams = images_with) -> dict[tuple[str, ...], float]:
            """TF-IDF, with the counts themselves as term frequencies."""
            total = math.log(len(references))
            return {gram: k * (total - math.log(max(1, images_with[gram]))) for gram, k in counts.items()}

        for row, (image, of_image) in enumerate(grams.items()):
            words = tokenize(captions[image])
            found = weigh(count_grams(words, n))
            norm = math.sqrt(sum(x * x for x in found.values()))
            for counts, other_words in zip(of_image, texts[image], strict=True):
                other = weigh(counts)
                other_norm = math.sqrt(sum(x * x for x in other.values()))
                if norm and other_norm:
                    product = sum(min(x, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, x in found.items())
                    short = _pairs(len(words)) - _pairs(len(other_words))
                    similarity = product / (norm * other_norm) * math.exp(-(short**2) / (2 * SIGMA**2))
                    scores[row] += 10 * similarity / (LONGEST * len(of_image))
    return scores


def _pairs(words: int) -> int:
    """Number of word pairs, which COCO's code takes as the length for CIDEr-D's penalty."""
    return max(0, words - 1)


def score_captions(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], scenes: Mapping[str, Mapping[str, Any]]
) -> Scored:
    """CIDEr-D x 100 and BLEU-1 to 4 of captions; with `scenes`, also how true and complete the stated facts are.

    Every image is a group of its own in the bootstrap. The dicts have the same image ids, but `scenes` may be empty.
    """
    scores = cider(captions, references)
    figures = {"cider_d": 100 * float(scores.mean())}
    figures |= {f"bleu_{n}": 100 * value for n, value in enumerate(bleu(captions, references), 1)}
    figures |= fact_figures(captions, scenes) if scenes else {}
    return Scored(figures, scores, list(references), "cider_d")


def is_scene(value: Any) -> TypeGuard[dict[str, Any]]:
    """True if a metadata field `scene` describes an image that `mvlm data scenes` composed: {size, objects}.

    Another data set may have a field of this name, such as scene: "kitchen".
    """
    return isinstance(value, dict) and isinstance(value.get("objects"), list) and isinstance(value.get("size"), list)


def fact_figures(captions: Mapping[str, str], scenes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Shares of facts over all captions, in per cent.

    Args:
        captions: a caption for each image id of `scenes`.
        scenes: {size: [width, height], objects: [{name, colour, box}]} of each image id, in pixels.

    Returns:
        fact_precision, the share of stated facts that are true; fact_recall, the share of the scenes' objects, colours
        and numbers that are stated; fact_f1, their harmonic mean; and the precision of each kind of fact that was
        stated. A repeated fact counts once. Captions that state no fact have a precision of 0.
    """
    stated, true = Counter[str](), Counter[str]()
    wanted = recalled = 0
    for image, scene in scenes.items():
        facts, complete = stated_facts(captions[image]), scene_facts(scene["objects"])
        stated.update(str(fact[0]) for fact in facts)
        true.update(str(fact[0]) for fact in facts if is_true(fact, scene))
        wanted += len(complete)
        recalled += len(complete & facts)
    precision = true.total() / stated.total() if stated else 0.0
    recall = recalled / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    figures = {"fact_precision": 100 * precision, "fact_recall": 100 * recall, "fact_f1": 100 * f1}
    return figures | {f"{kind}_precision": 100 * true[kind] / stated[kind] for kind in KINDS if stated[kind]}
