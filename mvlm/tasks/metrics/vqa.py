"""Accuracy of VQA v2 as its evaluation server computes it (version of 2021-03-11), with its oddities.

Source: Goyal et al., "Making the V in VQA Matter" (CVPR 2017), and the rules of the official evaluation script. The
oddities that change scores are: nothing is normalised if all annotators gave the same answer; "none" becomes "0"; the
answer "a" becomes the empty string; a full stop stays only in front of a digit.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mvlm.tasks.metrics import Scored
from mvlm_dataloading.dataset.dataset import image_name

log = logging.getLogger(__name__)
FEWEST_ANSWERS = 4
"""Fewest annotators' answers with which a prediction can reach accuracy 1: each is compared with three others."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
"""The official script passes a flag of value 32 where `re.sub` takes the largest number of replacements."""

# Words in which apostrophes are restored, each with its forms that lack one or more. The list is the official one; it
# is not regular ("she's" is in it, "shes" is not, and "somebody'd" loses its apostrophe).
_FORMS = """
ain't: aint; aren't: arent; can't: cant; could've: couldve; couldn't: couldnt; couldn't've: couldn'tve couldnt've;
didn't: didnt; doesn't: doesnt; don't: dont; hadn't: hadnt; hadn't've: hadnt've hadn'tve; hasn't: hasnt;
haven't: havent; he'd: hed; he'd've: hed've he'dve; he's: hes; how'd: howd; how'll: howll; how's: hows;
I'd've: Id've I'dve; I'm: Im; I've: Ive; isn't: isnt; it'd: itd; it'd've: itd've it'dve; it'll: itll; let's: let's;
ma'am: maam; mightn't: mightnt; mightn't've: mightnt've mightn'tve; might've: mightve; mustn't: mustnt;
must've: mustve; needn't: neednt; not've: notve; o'clock: oclock; oughtn't: oughtnt; 'ow's'at: ow's'at 'ows'at 'ow'sat;
shan't: shant; she'd've: shed've she'dve; she's: she's; should've: shouldve; shouldn't: shouldnt;
shouldn't've: shouldnt've shouldn'tve; somebodyd: somebody'd; somebody'd've: somebodyd've somebody'dve;
somebody'll: somebodyll; somebody's: somebodys; someone'd: someoned; someone'd've: someoned've someone'dve;
someone'll: someonell; someone's: someones; something'd: somethingd; something'd've: somethingd've something'dve;
something'll: somethingll; that's: thats; there'd: thered; there'd've: thered've there'dve; there're: therere;
there's: theres; they'd: theyd; they'd've: theyd've they'dve; they'll: theyll; they're: theyre; they've: theyve;
'twas: twas; wasn't: wasnt; we'd've: wed've we'dve; we've: weve; weren't: werent; what'll: whatll; what're: whatre;
what's: whats; what've: whatve; when's: whens; where'd: whered; where's: wheres; where've: whereve; who'd: whod;
who'd've: whod've who'dve; who'll: wholl; who's: whos; who've: whove; why'll: whyll; why're: whyre; why's: whys;
won't: wont; would've: wouldve; wouldn't: wouldnt; wouldn't've: wouldnt've wouldn'tve; y'all: yall;
y'all'll: yall'll y'allll; y'all'd've: yall'd've y'alld've y'all'dve; you'd: youd; you'd've: youd've you'dve;
you'll: youll; you're: youre; you've: youve
"""
CONTRACTIONS = {
    form: right
    for right, forms in (entry.split(":") for entry in _FORMS.replace("\n", " ").split(";"))
    for right in [right.strip()]
    for form in forms.split()
}
"""English contractions: from a spelling without the apostrophe ("dont") to the one with it ("don't")."""


def strip_answer(answer: str) -> str:
    """The answer on one line, without spaces around it: what every answer is compared as."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """The answer without punctuation and articles, in lower case, with digits for number words.

    Not idempotent: apply it once. It may return the empty string.
    """
    text = strip_answer(answer)
    kept = text
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        deleted = number or f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if deleted else " ")
    kept = _FULL_STOP.sub("", kept, count=_MOST_FULL_STOPS)
    words = [DIGITS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_fault(answers: Any) -> str:
    """The fault in a question's `answers`, in words; empty if they are records that the metric can compare."""
    for answer in answers if isinstance(answers, list) else [answers]:
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            return f"wanted answers as objects with the text `answer`, found {answer!r}"
        if answers.count(answer) > 1:  # the metric compares each record with those that differ from it
            return f"wanted answers with an `answer_id` of their own, found {answer!r} twice"
    return ""


def warn_of_few_answers(annotations: Sequence[Mapping[str, Any]]) -> None:
    """Log how many questions have too few answers for the metric, such as a single one, which counts as none."""
    if few := sum(0 < len(annotation.get("answers") or ()) < FEWEST_ANSWERS for annotation in annotations):
        log.warning("%d of %d questions have too few answers for one to count in full; write a question's only answer "
                    "ten times, each with an answer_id of its own", few, len(annotations))  # fmt: skip


def compared_answers(references: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """(answers of a question's annotators in the form that the official metric compares, True if it normalises them).

    It does so only if they differ: an answer on which all agree has to be given as they wrote it.
    """
    texts = [strip_answer(reference["answer"]) for reference in references]
    differ = len(set(texts)) > 1
    return [normalize_answer(text) for text in texts] if differ else texts, differ


def answer_accuracy(answer: str, references: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of an answer in 0..1: the mean, over annotators, of min(1, equal answers of the others / 3).

    Args:
        answer: The predicted answer, not normalised.
        references: An `answers` list of the annotation file: a record {answer, answer_id, ...} an annotator. As in the
            official script, the others are the records that differ, so each record needs an `answer_id` of its own.
    """
    texts, normalised = compared_answers(references)
    predicted = normalize_answer(strip_answer(answer)) if normalised else strip_answer(answer)
    records = [dict(reference) | {"answer": text} for reference, text in zip(references, texts, strict=True)]
    scores = []
    for own in records:
        equal = sum(other["answer"] == predicted for other in records if other != own)
        scores.append(min(1.0, equal / 3))
    return sum(scores) / len(scores)


def score_answers(answers: Mapping[Any, str], annotations: Sequence[Mapping[str, Any]]) -> Scored:
    """Accuracies in per cent: all questions, by type of answer, by type of question.

    Args:
        answers: Predicted answer of each question id of `annotations`.
        annotations: Records of the annotation file: {question_id, question_type, answer_type, answers, image_id}.

    Returns:
        accuracy, by_answer_type and by_question_type in per cent. A question without an image is a group of its own.
    """
    scores = np.array([answer_accuracy(answers[a["question_id"]], a["answers"]) for a in annotations])
    figures: dict[str, Any] = {"accuracy": 100 * float(scores.mean())}
    for kind in ("answer_type", "question_type"):
        rows: dict[str, list[int]] = defaultdict(list)
        for row, annotation in enumerate(annotations):
            rows[str(annotation.get(kind) or "all")].append(row)
        figures[f"by_{kind}"] = {name: 100 * float(scores[chosen].mean()) for name, chosen in sorted(rows.items())}
    return Scored(figures, scores, [image_name(a) or str(a["question_id"]) for a in annotations])


def soft_targets(references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Training target of each answer, as the metric compares it: min(1, 0.3 x annotators who gave it)."""
    counts: dict[str, int] = defaultdict(int)
    for answer in compared_answers(references)[0]:
        counts[answer] += 1
    return {answer: min(1.0, 0.3 * count) for answer, count in counts.items()}
