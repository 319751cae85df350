"""Rows of the tables of downstream tasks, from the committed results of `make tasks` in benchmarks/results/tasks."""

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "benchmarks" / "results" / "tasks"
TASK_STUDIES = (
    "easy-vqa", "scenes-vqa", "scenes-entailment", "scenes-pairs", "scenes-caption", "emoji-retrieval",
)  # fmt: skip
Rows = list[list[str]]


def task_study(name: str) -> Callable[[], Rows]:
    """The table of a study of a task: each arm's measures, as mean and range over seeds."""

    def table() -> Rows:
        study = read_study(name)
        found = read_trials(name)
        if not found:
            return [[study["task"], "no trial yet"]]
        splits = [measure.split(".") for measure in study["measures"]]
        head = [f"{study['task']}, per cent", *(" ".join(parts).replace("accuracy", "").strip() for parts in splits)]
        rows = [[*head, "seeds", "minutes a trial"]]
        for arm in study["arms"]:
            trials = [trial for trial in found if trial["arm"] == arm]
            cells = [spread([trial["figures"][split] for trial in trials], figure) for split, figure in splits]
            minutes = f"{sum(t['seconds'] for t in trials) / 60 / len(trials):.1f}" if trials else ""
            rows.append([arm, *cells, f"{len(trials)} of {len(study['seeds'])}", minutes])
        return rows

    return table


OVERVIEW = {
    "easy-vqa": ("easy-VQA", "67.0"),
    "scenes-vqa": ("questions about scenes", "32.4"),
    "scenes-entailment": ("entailment by scenes", "33.3"),
    "scenes-pairs": ("statements about pairs of scenes", "50.0"),
    "scenes-caption": ("captions of scenes, CIDEr-D", ""),
    "emoji-retrieval": ("retrieval, mean R@1", ""),
}
"""A study's label, and what the best answer to each text alone reaches on the test split."""
ARMS = {
    "pretrained": ("pretrained",),
    "random weights": ("random weights",),
    "text alone": ("text alone", "without the image"),
    "image alone": ("image alone",),
    "frozen encoders": ("frozen encoders",),
}


def tasks_overview() -> Rows:
    """The first measure of every study on the test split: mean over seeds of each arm, and what pretraining adds."""
    rows = [["per cent, test split", *ARMS, "text alone, at best", "pretraining adds", "seeds"]]
    for name, (label, constant) in OVERVIEW.items():
        study, trials = read_study(name), read_trials(name)
        split, figure = study["measures"][0].split(".")
        of_arm = {
            arm: {t["seed"]: t["figures"][split][figure] for t in trials if t["arm"] in names}
            for arm, names in ARMS.items()
        }
        cells = [f"{sum(x.values()) / len(x):.1f}" if x else "" for x in of_arm.values()]
        random = of_arm["random weights"]
        added = [value - random[seed] for seed, value in of_arm["pretrained"].items() if seed in random]
        gain = f"{sum(added) / len(added):+.1f}" if added else ""
        if len(added) > 1:
            gain += f" ({min(added):+.1f} to {max(added):+.1f})"
        wanted = [arm for arm, names in ARMS.items() if set(names) & set(study["arms"])]
        numbers = sorted({len(of_arm[arm]) for arm in wanted})
        seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
        rows.append([label, *cells, constant, gain, seeds])
    return rows


def read_study(name: str) -> dict[str, Any]:
    """The file of a study of a task."""
    return tomllib.loads((ROOT / "studies" / "tasks" / f"{name}.toml").read_text())


TEXT_ALONE = {"colour": 15.7, "compare": 50.0, "count": 16.7, "exist": 50.0, "relation": 12.5, "same colour": 50.0}
"""Accuracy of each question's most frequent answer, by type: what text alone can reach on scenes' test split."""


def scenes_starts() -> Rows:
    """Accuracy of scenes' questions by type on the test split, from several starts and after several steps."""
    named = "1,600 of MLM, ITC and ITM, 400 of them on scenes of one object; masked answers, 400"
    placed = "the same with output positions, and 2,500 of places; masked answers, 400"
    found = {
        "no other; 250": read_trials("scenes-vqa-captions")[0]["figures"]["test"],
        "300 of ITC and ITM; 200": read_evaluation("scenes-vqa-matched"),
        "800 of ITC and ITM; 400, with further scenes that ask relations": read_evaluation("scenes-vqa-400"),
        "the same; 1,100": read_evaluation("scenes-vqa-1100"),
        "the same; 1,480": read_evaluation("scenes-vqa-1480"),
        "1,300 of MLM, ITC and ITM; 400": read_evaluation("scenes-vqa-words"),
        "the same start; masked answers, 400": read_evaluation("scenes-vqa-masked"),
        named: read_evaluation("scenes-vqa-names"),
        placed: read_evaluation("scenes-vqa-places-400"),
        "the same; masked answers, 800": read_evaluation("scenes-vqa-places-800"),
        "all of this once more, in bf16; masked answers, 800": read_trials("scenes-vqa")[0]["figures"]["test"],
    }
    rows = [["per cent, test split", *TEXT_ALONE, "all"]]
    rows.append(["text alone at best", *(f"{best:.1f}" for best in TEXT_ALONE.values()), "32.4"])
    for start, one in found.items():
        by_type = (f"{one['by_question_type'][kind]:.1f}" for kind in TEXT_ALONE)
        rows.append([start, *by_type, with_interval(one, "accuracy")])
    return rows


def with_interval(found: dict[str, Any], figure: str) -> str:
    """A figure with its 95 % interval."""
    low, high = found[f"{figure}_95"]
    return f"{found[figure]:.1f} ({low:.1f} to {high:.1f})"


def read_evaluation(name: str) -> dict[str, Any]:
    """The committed figures of an evaluation; empty if it has not been made."""
    file = TASKS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def spread(found: Sequence[dict[str, Any]], figure: str) -> str:
    """Mean and range of a figure over seeds; of one seed, the figure with its interval over images if it has one."""
    values = [one[figure] for one in found]
    if len(values) > 1:
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    if values and f"{figure}_95" in found[0]:
        return with_interval(found[0], figure)
    return f"{values[0]:.1f}" if values else ""


def task_types() -> Rows:
    """Accuracy of scenes' questions by type on the test split: mean over seeds of each arm."""
    found = read_trials("scenes-vqa")
    arms = list(dict.fromkeys(trial["arm"] for trial in found))
    types = sorted({kind for trial in found for kind in trial["figures"]["test"]["by_question_type"]})
    rows = [["per cent, test split", *(arms or ["no trial yet"])]]
    for kind in types:
        values = ([t["figures"]["test"]["by_question_type"][kind] for t in found if t["arm"] == arm] for arm in arms)
        rows.append([kind, *(f"{sum(x) / len(x):.1f}" for x in values)])
    return rows


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
    **{f"tasks-{name}": task_study(name) for name in TASK_STUDIES},
    "tasks-overview": tasks_overview,
    "tasks-types": task_types,
    "tasks-scenes-starts": scenes_starts,
}
