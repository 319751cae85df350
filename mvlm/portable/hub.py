"""The card of a trained model for the Hugging Face hub, and the upload of its folder.

The card is made from a template. Everything that it states is read from the run, from its evaluation and from its
data's dataset.json: data, licence and attribution, figures with intervals, recipe and limits.
"""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mvlm.config.groups import of_recipe
from mvlm.config.json_files import read_config
from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.evaluate import describe_reading, describe_trivial_losses, figures_of
from mvlm.files import check_folder
from mvlm.model.adaptation import PARTS
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import HUB_ID, WEIGHTS_FILE
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import find_checkpoint, find_run
from mvlm.statistics import Interval
from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.urls import shown

CARD = "README.md"


def upload(folder: Path, hub_id: str, private: bool = False) -> str:
    """Upload a folder that `TrainedModel.export` wrote for the hub, as one commit. Returns its address.

    The token is the one that `hf auth login` stored, or the variable HF_TOKEN.

    Raises:
        ConfigError: `hub_id` is not an id, or huggingface_hub is not installed.
        RunError: the hub refuses, or is not there. The model on the hub is then unchanged.
    """
    check_hub_id(hub_id)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if CARD not in [path.name for path in files]:
        raise RunError(
            f"{folder}: wanted a folder of `mvlm export --format hub`, found no {CARD} in it; write it first"
        )
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise ConfigError("hub: wanted huggingface_hub, which is not installed; pip install 'mvlm[train]'") from None
    try:
        api = HfApi()
        api.create_repo(hub_id, private=private, exist_ok=True)
        additions = [CommitOperationAdd(path.name, str(path)) for path in files]
        done = api.create_commit(hub_id, additions, commit_message="Model, tokenizer and card, written by mvlm export")
    except Exception as error:  # the network's and the hub's, which share no type
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = "; ".join(f"{type(cause).__name__}: {shown(cause)}" for cause in causes)
        raise RunError(
            f"{hub_id}: wanted to upload {folder}, the hub did not take it ({reason}); log in with `hf auth login`, "
            f"then send the folder, which is complete, with `{shlex.join(['hf', 'upload', hub_id, str(folder)])}`"
        ) from None
    return str(done.repo_url)


def check_hub_id(hub_id: str) -> None:
    """ConfigError unless it has the form owner/name."""
    if not HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"push-to: wanted an id OWNER/NAME on the hub, got {hub_id!r}")


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ORIGINS = {
    "checkpoint": "the model",
    "initial_model": "the model",
    "image_weights": "the image weights",
    "text_weights": "the text weights",
}
"""Settings of a run that name a model or weights that it started from -> noun for it in the model card."""
ABILITIES = {
    "itc_weight": "compares images with texts",
    "itm_weight": "judges whether an image and a text belong together",
    "mlm_weight": "fills in masked words",
    "mim_weight": "rebuilds masked patches of images",
}
"""Ability that each loss teaches, by the setting of the loss's weight, which is 0 in a run without the loss."""
TASK_LOSSES = {"retrieval": ("itc_weight", "itm_weight"), "caption": ("mlm_weight",)}
"""Losses of pretraining that also train in fine-tuning, by task. Other tasks train a head; vqa also MLM if masked."""
DIRECTIONS = {"tr": "image to text", "ir": "text to image"}


class Recall(NamedTuple):
    """One figure of the card's table, in per cent."""

    queries: str
    ranked_by: str
    direction: str
    k: int
    value: float
    interval: Interval | None
    """95 % interval of the recall; None for ITC's figures beside ITM's, for which none was computed."""
    n: int
    chance: float


def recalls(figures: dict[str, Any]) -> list[Recall]:
    """All recalls that `mvlm eval retrieval` wrote, with the intervals that it gave them."""
    rows = []
    for queries, part in (("all", figures), ("unseen concepts", figures["unseen"])):
        if part is None:
            continue
        reranked = figures.get("reranked") != 0
        ways = ([("ITC, re-ranked by ITM", part)] if reranked else []) + [("ITC", part["itc"])]
        for ranked_by, of in ways:
            for direction, name in DIRECTIONS.items():
                n = part["n_images"] if direction == "tr" else part["n_texts"]
                chance = 100 / figures["n_images"]  # for image to text too: of n captions an image, n are right
                for k in (1, 5, 10):
                    value, interval = of[direction][f"r{k}"], None
                    if of is part or not reranked:
                        interval = Interval(*map(float, part[f"{direction}_95"][f"r{k}"]))
                    rows.append(Recall(queries, ranked_by, name, k, value, interval, n, min(100, k * chance)))
    return rows


def model_card(
    source: Path, network: MaskVLM, model: str, data: Path | str | None = None, hub_id: str | None = None
) -> str:
    """The card of a run's model, Markdown with a YAML head, as the hub reads it.

    Args:
        source: a run, or one of its checkpoints.
        model: hash of the model, `TrainedModel.sha256`. Figures of another one are not stated.
        data: folder of the data that the run was trained on. Default: the one that its config.json names.
        hub_id: id owner/name for the examples. Default: owner/ and the run's name.

    Raises:
        RunError: there is no such run, or its data's licence cannot be read, or its evaluation is damaged.
        ConfigError: `hub_id` is not an id.
    """
    if hub_id is not None:
        check_hub_id(hub_id)
    check_folder(source, "a run or one of its checkpoints")
    if (run := find_run(source)) is None:
        raise RunError(
            f"{source}: wanted a run or one of its checkpoints, found another folder; a model card is made from a run"
        )
    hub_id = hub_id or "owner/" + re.sub(r"[^\w.-]", "-", run.path.resolve().name, flags=re.ASCII)
    config = read_config(run.config)
    data = data or str(config["data"])
    description = data_description(data)
    figures, why_none = _evaluation(run.evaluation), None
    if figures is None and run.evaluation.is_file():
        why_none = "a task, so there are no figures of retrieval"
    elif figures is not None and figures.get("model") != model:
        why_none = "another checkpoint, or of another image size or text length, so its figures are not here"
    elif figures is not None and not _is_on(figures, data):
        why_none = "other data than the model was trained on, so its figures are not here"
    if why_none is not None:
        figures = None
    rows, blind = [], []
    if figures is not None:
        rows, blind = recalls(figures), [figures["masked_l1_white"], figures["masked_l1_train_median"]]
    name, task = hub_id.split("/")[1], config.get("task")
    unread = {"format_version", "model", *(() if config.get("optimizer") == "muon" else ("lr_muon",))}
    recipe = {key: value for key, value in config.items() if key not in unread and of_recipe(key)}
    able = abilities(config, network)
    return TEMPLATES.get_template("card.md").render(
        head=card_head(name, description, figures, [] if task else rows),  # of a fine-tuned model none is zero-shot
        name=line(name),
        hub_id=hub_id,
        task=line(Path(task).stem) if task else None,
        origin=origin(config),
        random=bool(config.get("random_weights")),
        abilities=able,
        compares=ABILITIES["itc_weight"] in able,
        matches=network.matching_is_trained,
        parameters=sum(p.numel() for p in network.parameters()),
        model=network.config,
        data={key: line(description.get(key) or "not stated") for key in ("name", "source", "licence", "attribution")},
        splits={line(key): split for key, split in description["splits"].items()},
        pairs=description["splits"].get("train", {}).get("samples"),
        figures=figures and figures | {"split": line(figures["split"])},
        why_none=why_none,
        rebuilds=figures is not None and figures["masked_l1"] < min(value for value in blind if value is not None),
        recalls=rows,
        reading=[] if figures is None else describe_reading(figures),
        trivial=None if figures is None else line(describe_trivial_losses(figures)),
        step=read_state(find_checkpoint(source))["step"],
        batch_size=config["batch_size"],
        # Of a path only the last part, since the rest says nothing elsewhere.
        settings=[(k, line(json.dumps(Path(v).name if isinstance(v, str) else v))) for k, v in recipe.items()],
        versions={package: version(package) for package in ("torch", "numpy")},
    )


def data_description(data: Path | str) -> dict[str, Any]:
    """The contents of dataset.json. RunError if there is none: a card without the data's licence is not written."""
    try:
        return open_dataset(data, "train").description
    except (DataError, OSError) as error:
        raise RunError(
            f"{data}: wanted the data that the run was trained on, for its licence and attribution, found none "
            f"({error}); name its folder with --data"
        ) from None


def card_head(name: str, description: dict[str, Any], figures: dict[str, Any] | None, rows: list[Recall]) -> str:
    """The card's YAML: what the hub shows and searches."""
    from huggingface_hub import EvalResult, ModelCardData

    data = str(description.get("name") or "unnamed")
    results = [
        EvalResult(
            task_type="zero-shot-retrieval",
            dataset_type=data,
            dataset_name=data,
            dataset_split=str((figures or {})["split"]),
            metric_type=f"recall@{r.k}",
            metric_name=f"{r.direction}, {r.ranked_by}, recall@{r.k}",
            metric_value=r.value,
        )
        for r in rows
        if r.queries == "all"
    ]
    return ModelCardData(
        library_name="mvlm",
        tags=["masked-vision-and-language", "image-text-retrieval"],
        pipeline_tag="zero-shot-image-classification",
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def origin(config: dict[str, Any]) -> str:
    """Model or weights that a run started from, in words; empty if its weights were drawn at random."""
    random = config.get("random_weights")
    named = [] if random else [(what, Path(config[key])) for key, what in ORIGINS.items() if config.get(key)]
    return " and ".join(f"{what} {line(_name_of(path))}" for what, path in named)


def _name_of(path: Path) -> str:
    """Name of a model for the card: the run's name for a checkpoint, the folder's name for a file of weights."""
    path = path.absolute()
    if path.name == WEIGHTS_FILE:
        path = path.parent
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def abilities(config: dict[str, Any], network: MaskVLM) -> list[str]:
    """Abilities that a model was trained for, as phrases for its card.

    They follow from the losses of the run. A run that started from a trained model has all of them, except matching if
    the network's matching head was never trained.

    config: settings of the run.
    """
    if config.get("random_weights"):
        masked = config["task"] == "vqa" and config.get("answers") == "masked"
        trained = ("mlm_weight",) if masked else TASK_LOSSES.get(config["task"], ())
        frozen = all(config.get(f"train_{part}") == "frozen" for part in PARTS)
        trained_losses = [] if frozen else [name for name in ABILITIES if name in trained]
    else:
        known = "task" in config or config.get("initial_model") is not None
        trained_losses = [name for name in ABILITIES if known or config.get(name) != 0]
    return [ABILITIES[name] for name in trained_losses if name != "itm_weight" or network.matching_is_trained]


def line(text: object) -> str:
    """Escape a text that comes from others to one line of Markdown, in which nothing formats, links or opens a tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def _is_on(figures: dict[str, Any], data: Path | str) -> bool:
    """True if `figures` were measured on a split of the data set `data`."""
    try:
        return open_dataset(data, figures["split"]).fingerprint == figures.get("fingerprint")
    except (DataError, OSError):  # no such split
        return False


def _evaluation(file: Path) -> dict[str, Any] | None:
    """Read the figures of a run's retrieval evaluation; None if there are none, or only those of a downstream task."""
    if not file.is_file():
        return None
    with figures_of(file) as figures:
        if "task" in figures and "itc" not in figures:
            return None
        recalls(figures)
        describe_trivial_losses(figures)
        describe_reading(figures)
        for name in ("gain_text_nats", "gain_pixels_pct", "masked_l1"):
            float(figures[name])
        for name in ("gain_text_nats_95", "gain_pixels_pct_95"):
            _, _ = map(float, figures[name])
        str(figures["split"])
    return figures
