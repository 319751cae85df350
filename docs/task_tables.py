"""Rows of the tables of downstream tasks, from the committed results of `make tasks` in benchmarks/results/tasks."""

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "benchmarks" / "results" / "tasks"
Rows = list[list[str]]


def scenes_questions() -> Rows:
    """Questions about scenes: each arm's measures, as mean and range over seeds."""
    study, found = read_study("scenes-vqa"), read_trials("scenes-vqa")
    splits = [measure.split(".") for measure in study["measures"]]
    rows = [["per cent", *(split for split, _ in splits)]]
    for arm in study["arms"]:
        trials = [trial["figures"] for trial in found if trial["arm"] == arm]
        rows.append([arm, *(spread([figures[split] for figures in trials], figure) for split, figure in splits)])
    return rows


OVERVIEW = {
    "easy-vqa": "easy-VQA",
    "scenes-vqa": "questions about scenes",
    "scenes-entailment": "entailment by scenes",
    "scenes-pairs": "statements about pairs of scenes",
    "scenes-caption": "captions of scenes, CIDEr-D",
    "emoji-retrieval": "retrieval, mean R@1",
}
ARMS = {
    "pretrained": ("pretrained",),
    "random weights": ("random weights",),
    "text alone": ("text alone", "without the image"),
    "image alone": ("image alone",),
    "frozen encoders": ("frozen encoders",),
}


def tasks_overview() -> Rows:
    """The first measure of every study on the test split: each arm as mean and range, and what pretraining adds."""
    rows = [["per cent, test split", *ARMS, "pretraining adds"]]
    for name, label in OVERVIEW.items():
        study, trials = read_study(name), read_trials(name)
        split, figure = study["measures"][0].split(".")
        of_arm = {
            arm: {t["seed"]: t["figures"][split] for t in trials if t["arm"] in names} for arm, names in ARMS.items()
        }
        cells = [spread([*seeds.values()], figure) for seeds in of_arm.values()]
        random = of_arm["random weights"]
        added = [one[figure] - random[seed][figure] for seed, one in of_arm["pretrained"].items() if seed in random]
        gain = f"{sum(added) / len(added):+.1f}" if added else ""
        if len(added) > 1:
            gain += f" ({min(added):+.1f} to {max(added):+.1f})"
        rows.append([label, *cells, gain])
    return rows


def read_study(name: str) -> dict[str, Any]:
    """The file of a study of a task."""
    return tomllib.loads((ROOT / "studies" / "tasks" / f"{name}.toml").read_text())


TEXT_ALONE = {"colour": 15.7, "compare": 50.0, "count": 16.7, "exist": 50.0, "relation": 12.5, "same colour": 50.0}
"""Accuracy of each question's most frequent answer, by type: what text alone can reach on scenes' test split."""


def scenes_starts() -> Rows:
    """Accuracy of scenes' questions by type on the test split, from several starts and after several steps."""
    found = {
        "captions; 250": read_trials("scenes-vqa-captions")[0]["figures"]["test"],
        "captions, matching; 1,480": read_evaluation("scenes-vqa-1480"),
        "captions, matching and MLM; 400": read_evaluation("scenes-vqa-words"),
        "the same; 400 with masked answers": read_evaluation("scenes-vqa-masked"),
        "the same and names of objects; 400": read_evaluation("scenes-vqa-names"),
        "the same and places; 400": read_evaluation("scenes-vqa-places-400"),
        "the same and places; 800": read_evaluation("scenes-vqa-places-800"),
    }
    rows = [["per cent, test split", *TEXT_ALONE, "all"]]
    rows.append(["text alone at best", *(f"{best:.0f}" for best in TEXT_ALONE.values()), "32"])
    for start, one in found.items():
        low, high = one["accuracy_95"]
        by_type = (f"{one['by_question_type'][kind]:.0f}" for kind in TEXT_ALONE)
        rows.append([start, *by_type, f"{one['accuracy']:.0f} ({low:.0f} to {high:.0f})"])
    return rows


def read_evaluation(name: str) -> dict[str, Any]:
    """The committed figures of an evaluation; empty if it has not been made."""
    file = TASKS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def spread(found: Sequence[dict[str, Any]], figure: str) -> str:
    """Mean and range of a figure over seeds; of one seed, the figure with its interval over images if it has one."""
    values = [one[figure] for one in found]
    if not values:
        return ""
    low, high = (min(values), max(values)) if len(values) > 1 else found[0].get(f"{figure}_95", (None, None))
    interval = f" ({low:.1f} to {high:.1f})" if low is not None else ""
    return f"{sum(values) / len(values):.1f}{interval}"


def read_trials(name: str) -> list[dict[str, Any]]:
    """The committed results of a study of a task; none if no trial has ended."""
    file = TASKS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def write_tasks(folder: Path) -> None:
    """Take over what `make tasks` wrote to `folder`: results of trials, and figures of evaluations."""
    TASKS.mkdir(parents=True, exist_ok=True)
    for study in sorted((ROOT / "studies" / "tasks").glob("*.toml")):
        file = folder / study.stem / "trials.jsonl"
        if file.is_file():
            (TASKS / f"{study.stem}.jsonl").write_text(file.read_text())
    for file in sorted(folder.glob("*.json")):
        figures = json.loads(file.read_text())
        left_out = ("records", "per_class_recall", "confusion")
        kept = {name: value for name, value in figures.items() if name not in left_out}
        (TASKS / file.name).write_text(json.dumps(kept, indent=1) + "\n")


TASK_TABLES: dict[str, Callable[[], Rows]] = {
    "tasks-overview": tasks_overview,
    "tasks-scenes-vqa": scenes_questions,
    "tasks-scenes-starts": scenes_starts,
}
