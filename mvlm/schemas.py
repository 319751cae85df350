"""Schemas of the JSON and Parquet files of mvlm: types, ranges and columns, checked before anything uses the content.

`mvlm_dataloading.dataset.description` has that of dataset.json. A schema names what a reader relies on; further fields
may be there.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
from msgspec import Meta

from mvlm.errors import RunError

Count = Annotated[int, Meta(ge=0, le=2**53)]
Number = Annotated[float, Meta(ge=-1e100, le=1e100)]
"""A number whose squares and sums are finite."""
Text = Annotated[str, Meta(max_length=4096)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
Width = Annotated[int, Meta(ge=1, le=2**16)]


class RunSettings(TypedDict):
    """config.json of a run. `mvlm.config.json_files` compares every setting with its own type and range."""

    format_version: int
    data: NotRequired[Text | None]
    task: NotRequired[Text]
    max_steps: NotRequired[Count]
    log_every: NotRequired[Count]
    checkpoint: NotRequired[Text | None]
    initial_model: NotRequired[Text | None]
    model: NotRequired[dict[str, Any]]


class Manifest(TypedDict):
    """manifest.json of a checkpoint: hashes of its files."""

    format_version: int
    sha256: dict[Annotated[str, Meta(min_length=1, max_length=1024)], Sha256]
    world_size: NotRequired[Annotated[int, Meta(ge=1, le=2**20)]]


class MirroredFile(TypedDict):
    """Length and hash of a file of a checkpoint that was copied to an object store."""

    bytes: Count
    sha256: Sha256


class MirrorManifest(TypedDict):
    """mirror.json of a checkpoint in an object store: its files, and those of its run."""

    format_version: int
    files: dict[Annotated[str, Meta(min_length=1, max_length=1024)], MirroredFile]


class Start(TypedDict):
    """A trained model that a run started from."""

    path: Text
    sha256: Sha256


class Adapters(TypedDict):
    """Scale `alpha` of a run's LoRA adapters, and the trained model that they are added to."""

    alpha: Annotated[float, Meta(gt=0, le=1e6)]
    start: Start


class RunState(TypedDict):
    """state.json of a checkpoint: all that a run resumes from beside tensors."""

    step: Count
    loader: NotRequired[dict[str, Any]]
    bad: NotRequired[dict[str, Count]]
    best: NotRequired[Any]
    adapters: NotRequired[Adapters | None]
    task: NotRequired[dict[str, Any] | None]


class MetricsRow(TypedDict):
    """A row of metrics.jsonl. `MetricsValues` has its further fields."""

    step: Count


MetricsValues = dict[str, Number | bool | None]


class Machine(TypedDict):
    """Machine and ranks of one of the processes that trained a run."""

    device: Text
    processor: Text
    instructions: Text
    cores: Count
    threads: Count
    ranks: Count


class StepMachine(TypedDict):
    """Machine on which a training step failed; the step is made again with its numbers of threads and ranks."""

    device: Text
    processor: Text
    instructions: Text
    threads: Annotated[int, Meta(ge=1, le=2**12)]
    ranks: Annotated[int, Meta(ge=1, le=2**20)]


class StartEvent(TypedDict):
    """Line of a run's history.jsonl: a process begins to train behind `step`, which is 0 for a new run."""

    event: Literal["start"]
    step: Count
    time: Text
    commit: Text
    precision: Text
    data: dict[str, str]
    machine: Machine
    versions: dict[str, str | None]
    log_every: NotRequired[Count]
    way: NotRequired[dict[str, bool | Count | Text]]


class FailedStepState(TypedDict):
    """state.json of a training step whose loss or gradients were not finite, kept to be made again."""

    step: Count
    values: dict[Text, Annotated[str, Meta(pattern=r"^(nan|-?inf|-?[0-9.]{1,40}(e[+-]?[0-9]{1,4})?)$")]]
    """Losses and gradient norms by name, each as the `repr` of a float."""
    samples: list[str]
    frozen: list[Text]
    left_out: dict[Text, Count]
    """Sizes in bytes of the folders of tensors that were too large to be kept, by name."""
    microbatches: Annotated[int, Meta(ge=1, le=2**20)]
    precision: Literal["bf16", "fp32"]
    machine: StepMachine
    versions: dict[str, str | None]


class SaveEvent(TypedDict):
    """Line of a run's history.jsonl: a checkpoint of `step` is saved."""

    event: Literal["save"]
    step: Count
    manifest: Sha256
    metrics_bytes: Count
    metrics: Sha256


class DataSource(TypedDict):
    """A data set or a folder of images that was embedded."""

    kind: Literal["data", "folder"]
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    splits: NotRequired[list[Annotated[str, Meta(min_length=1, max_length=100)]]]


class Embedding(TypedDict):
    """plan.json, the specification of an unfinished embedding."""

    format_version: int
    model: Sha256
    width: Width
    source: DataSource
    fingerprint: str
    items: Count
    part: Count
    device: NotRequired[Text]
    precision: NotRequired[Text]


class FinishedEmbedding(Embedding):
    """embedding.json, the description of a finished embedding."""

    checkpoint: Text
    rejected: Count
    images: Count
    texts: Count


class IndexAbout(TypedDict):
    """Description of a search index, the JSON in its table `about`."""

    format_version: int
    model: Sha256
    checkpoint: Text
    width: Width
    sources: Annotated[list[DataSource], Meta(max_length=10_000)]
    partitions: dict[Literal["images", "texts"], Annotated[int, Meta(ge=0, le=2**20)]]


class IndexRow(TypedDict):
    """Row of a search index, as an answer to a query, with its metadata parsed."""

    id: Annotated[str, Meta(max_length=65536)]
    split: Text
    source: Annotated[int, Meta(ge=0, le=2**31)]
    row: Count
    image: NotRequired[Sha256]
    vector: list[Number]
    metadata: dict[str, Any]
    text: NotRequired[str | None]


class Result(TypedDict):
    """result.json of a finished trial of a study; only the fields that readers rely on."""

    settings: dict[str, Any]
    format_version: NotRequired[int]
    seed: NotRequired[int]


class StepTimes(TypedDict):
    """step_times.json of a study: seconds of a step of each arm, as measured on a machine."""

    machine: str
    threads: Count
    seconds: dict[str, Annotated[float, Meta(gt=0)]]


def check(value: Any, schema: Any, where: Path | str, wanted: str) -> Any:
    """Return the value, if it is as the schema says. RunError names the first field that is not.

    Args:
        where: file or place, for the error.
        wanted: the noun phrase for the content, for the error.
    """
    try:
        msgspec.convert(value, schema)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for half a letter of Unicode
        what = " ".join(str(error).replace("`", "").split())
        raise RunError(f"{where}: wanted {wanted}, found {what[0].lower()}{what[1:]}; restore it") from None
    return value


def fits(value: Any, schema: Any) -> bool:
    """True if the value is as the schema says."""
    try:
        msgspec.convert(value, schema)
    except (msgspec.ValidationError, UnicodeEncodeError):
        return False
    return True
