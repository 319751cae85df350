"""Classes of a data set's images, and the templates of their texts.

The class of a sample is a field of its metadata. Data with `label` are labelled data sets; the emoji sets have `base`,
the concept, and `group`.
"""

from pathlib import Path

from mvlm.errors import ConfigError
from mvlm_dataloading import DataError, Dataset

CONCEPT = "base"
"""Field of the metadata that holds the concept of an emoji."""


def field_of(dataset: Dataset, by: str | None) -> str:
    """Field of the metadata with the classes: `by`, or `label` if there is one, or the concept."""
    if by is None:
        return "label" if "label" in dataset.metadata(0) else CONCEPT
    return CONCEPT if by == "concept" else by


def labels_of(dataset: Dataset, by: str | None) -> list[str]:
    """Class of each sample. DataError for a sample without one."""
    field, found = field_of(dataset, by), []
    for i in range(len(dataset)):
        record = dataset.metadata(i)
        value = record.get(field)
        if not isinstance(value, str | int) or not str(value).strip():
            raise DataError(
                f"{dataset.where(i)}: wanted a class in the field {field!r} of the metadata, found {value!r}; name "
                f"another with --by, of {', '.join(sorted(record)) or 'none'}"
            )
        found.append(str(value))
    return found


def class_names(labels: list[str], file: Path | None) -> list[str]:
    """Different labels in alphabetical order, or the lines of a file. DataError for a label that is not in the file."""
    names = sorted(set(labels)) if file is None else _lines(file)
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise DataError(
            f"{file}: wanted a line for each class of the split, found none for {unknown[0]!r} "
            f"({len(unknown)} missing); complete the file"
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"classes: wanted two or more different ones, found {len(set(names))} in {len(names)} names")
    return names


def read_templates(file: Path | None) -> list[str]:
    """Templates with {} for the class, from a file with one a line, {} or {c} for the class; without a file, {} alone.

    ConfigError for a line without a place for the class.
    """
    if file is None:
        return ["{}"]
    templates = [line.replace("{c}", "{}") for line in _lines(file)]
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise ConfigError(f"{file}, line {number}: wanted {{}} or {{c}} for the class, found {template!r}")
    return templates


def _lines(file: Path) -> list[str]:
    """Lines of a file that are not blank. ConfigError if it cannot be read or has none."""
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: wanted a text file, could not read it: {error}") from None
    if not found:
        raise ConfigError(f"{file}: wanted at least one line, found none")
    return found
