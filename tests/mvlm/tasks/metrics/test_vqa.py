"""VQA accuracy against a table worked out by hand from the official rules, oddities included."""

import pytest

from mvlm.tasks.metrics.vqa import answer_accuracy, normalize_answer, score_answers, soft_targets

NORMALIZED = [
    # case, articles, numbers
    ("Yes", "yes"), ("  yes ", "yes"), ("the dog", "dog"), ("A Dog", "dog"), ("an apple a day", "apple day"),
    ("a", ""), ("the", ""), ("none", "0"), ("None", "0"), ("zero", "0"), ("one", "1"), ("ten", "10"),
    ("eleven", "eleven"), ("two dogs", "2 dogs"), ("twenty two", "twenty 2"), ("no one", "no 1"), ("then", "then"),
    # punctuation within a word becomes a space, next to a space it is deleted
    ("yes!", "yes"), ("yes ! no", "yes no"), ("black/white", "black white"), ("black / white", "black white"),
    ("black-and-white", "black and white"), ("t-shirt", "t shirt"), ("t- shirt", "t shirt"),
    ("a-b -c", "ab c"),  # the hyphen touches a space somewhere, so it is deleted everywhere
    ("what?", "what"), ('"stop"', "stop"), ("[red]", "red"), ("{red}", "red"), ("(red)", "red"),
    ("red;blue", "red blue"), ("x=y", "x y"), ("3+4", "3 4"), ("back\\slash", "back slash"),
    ("under_score", "under score"), ("a>b", "b"), ("<left>", "left"), ("me@home", "me home"), ("`tick`", "tick"),
    ("red,blue", "red blue"), ("red, blue", "red blue"),
    ("10:30", "10:30"),  # a colon is no punctuation mark here
    ("50%", "50%"), ("$5", "$5"), ("rock&roll", "rock&roll"),
    ("man's", "man's"),  # nor is an apostrophe
    # a comma between digits makes every mark go without a space
    ("1,000", "1000"), ("1,000-2,000", "10002000"), ("1,000 (about)", "1000 about"),
    # full stops
    ("4.5", "4.5"), (".5", ".5"), ("yes.", "yes"), ("u.s.a.", "usa"), ("5.", "5"), ("v.2", "v.2"),
    ("." * 40, "." * 8),  # at most 32 full stops go
    # contractions
    ("dont", "don't"), ("Dont know", "don't know"), ("its", "its"), ("hes", "he's"),
    ("shes", "shes"),  # not in the official list
    ("somebody'd", "somebodyd"),  # an error of the official list
    ("couldnt've", "couldn't've"),
    ("Im", "im"),  # the list has "Im", but words are in lower case by then
    ("oclock", "o'clock"), ("yall", "y'all"),
    # white space
    ("red\nblue", "red blue"), ("red\tblue", "red blue"), ("red   blue", "red blue"), ("", ""),
]  # fmt: skip


def test_answers_are_normalized_by_the_official_rules():
    assert [(answer, normalize_answer(answer)) for answer, _ in NORMALIZED] == NORMALIZED


def annotators(*answers: str) -> list[dict[str, object]]:
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]


@pytest.mark.parametrize(
    "predicted, given, wanted",
    [
        ("cat", ["cat"] * 10, 1.0),
        ("dog", ["cat"] * 10, 0.0),
        ("cat", ["cat"] * 1 + ["dog"] * 9, 0.3),
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("The Cat.", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("cat", ["the cat"] * 4 + ["Dog"] * 6, 1.0),
        ("Cat", ["cat"] * 10, 0.0),  # nothing is normalised when all agree
        ("cat ", ["cat\n"] * 10, 1.0),  # but for white space
        ("cat", ["Cat."] * 10, 0.0),
        ("Cat.", ["Cat."] * 10, 1.0),
        ("0", ["none"] * 5 + ["nothing"] * 5, 1.0),
        ("none", ["0"] * 5 + ["zero"] * 5, 1.0),
        ("a", ["the"] * 5 + ["an"] * 5, 1.0),  # all become the empty string
        ("1,000", ["1000"] * 9 + ["many"], 1.0),
    ],
)
def test_accuracy_leaves_one_annotator_out_at_a_time(predicted, given, wanted):
    assert answer_accuracy(predicted, annotators(*given)) == pytest.approx(wanted)


def test_annotators_without_an_id_of_their_own_count_as_one():
    """The official script leaves out every record that equals the left-out one."""
    assert answer_accuracy("cat", [{"answer": "cat"}] * 10) == 0
    assert answer_accuracy("cat", [{"answer": "cat"}] * 2 + annotators("dog", "dog", "dog")) == pytest.approx(0.4)


def test_accuracy_by_type_of_answer_and_question():
    def record(number: int, kind: str, question: str, *answers: str) -> dict[str, object]:
        return {
            "question_id": number, "answer_type": kind, "question_type": question, "answers": annotators(*answers),
        }  # fmt: skip

    rows = [
        record(1, "yes/no", "is the", *["yes"] * 10),
        record(2, "yes/no", "is this", *["no"] * 3 + ["yes"] * 7),
        record(3, "number", "how many", *["2"] * 9 + ["3"]),
    ]
    scored = score_answers({1: "yes", 2: "no", 3: "three"}, rows)
    found = scored.figures
    assert found["accuracy"] == pytest.approx(100 * (1 + 0.9 + 0.3) / 3)
    assert found["by_answer_type"] == pytest.approx({"yes/no": 95, "number": 30})
    assert found["by_question_type"] == pytest.approx({"is the": 100, "is this": 90, "how many": 30})
    assert scored.scores.tolist() == pytest.approx([1, 0.9, 0.3])


def test_soft_targets_count_normalized_answers():
    assert soft_targets(annotators("The cat", "cat", "cat!", "dog", "dogs")) == pytest.approx(
        {"cat": 0.9, "dog": 0.3, "dogs": 0.3}
    )


@pytest.mark.parametrize("answer", ["two", "on the table", "a dog", "t-shirt", "2,000", "yes"])
def test_a_training_target_is_right_by_the_metric(answer):
    """If all annotators agree, the metric takes the answer as they wrote it, with its article and number word."""
    agreed = [{"answer": answer, "answer_id": i} for i in range(10)]
    (target,) = soft_targets(agreed)
    assert answer_accuracy(target, agreed) == 1
    mixed = [*agreed[:9], {"answer": "no", "answer_id": 9}]
    best = max(soft_targets(mixed).items(), key=lambda pair: pair[1])[0]
    assert answer_accuracy(best, mixed) == 1
