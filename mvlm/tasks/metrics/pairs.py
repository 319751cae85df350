"""Accuracy and consistency of NLVR2 (Suhr et al., ACL 2019), whose sentences are judged on several image pairs each."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any


def sentence_of(identifier: str) -> str:
    """The sentence's part of an identifier "split-set-pair-sentence": all but the number of the image pair."""
    split, images, _, sentence = identifier.rsplit("-", 3)
    return f"{split}-{images}-{sentence}"


def set_of(identifier: str) -> str:
    """The set of images of an identifier "split-set-pair-sentence". Statements about one set are not independent."""
    return "-".join(identifier.rsplit("-", 3)[:2])


def check_identifier(identifier: str) -> str:
    """Fault in the form of an identifier, or an empty string."""
    if identifier.count("-") >= 3:
        return ""
    return f'identifier {identifier!r}: wanted the form "split-set-pair-sentence", as NLVR2 has it'


def nlvr_figures(predicted: Mapping[str, bool], wanted: Mapping[str, bool]) -> dict[str, Any]:
    """Accuracy over examples, and consistency: the share of sentences that are judged right on all their image pairs.

    Args:
        predicted: Judgement of each identifier of `wanted`.
        wanted: Truth of each identifier "split-set-pair-sentence".

    Returns:
        accuracy and consistency in per cent, and the numbers of examples and sentences.
    """
    sentences: dict[str, list[bool]] = defaultdict(list)
    for identifier, truth in wanted.items():
        sentences[sentence_of(identifier)].append(predicted[identifier] == truth)
    right = [value for values in sentences.values() for value in values]
    return {
        "accuracy": 100 * sum(right) / len(right),
        "consistency": 100 * sum(map(all, sentences.values())) / len(sentences),
        "examples": len(right),
        "sentences": len(sentences),
    }
