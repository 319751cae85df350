"""Files that somebody else has made to harm: links, pipes, devices, holes, damage and odd values, by class."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ESCAPE = "\x1b]0;pwned\x07\x1b[2J\u202e"
"""Renames a terminal's window, clears it and turns the direction of what follows."""
SPARSE = 40 * 10**9
"""Bytes of a file that is one hole."""


class Attack(NamedTuple):
    """A change of one file of a good folder."""

    kind: str
    """Class of the attack."""
    name: str
    make: Callable[[Path], object]
    refused: bool
    """True if the file may not be used at all. Else a command may also do without it, or find nothing wrong."""


def link_out(file: Path) -> None:
    """The file becomes a link to an equal one outside of the folder. `outside_of` is where."""
    target = outside_of(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.rename(target)
    else:  # one that would be written
        target.write_text("secret")
    file.symlink_to(target)


def link_in(file: Path) -> None:
    """The file becomes a link to an equal one beside the folder's other files, under a name that is not used."""
    target = file.with_name(f"{file.name}.kept")
    file.rename(target)
    file.symlink_to(target.name)


def outside_of(file: Path) -> Path:
    """Place outside of the folder of an attack, to which a link leads."""
    root = next(parent for parent in file.parents if parent.name == "attacked")
    return root.parent / "outside" / file.relative_to(root)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink(missing_ok=True)
        make(file)

    return change


def hole(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(SPARSE)


def cut(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda file: file.write_bytes(data)


FORMS = [
    Attack("link out", "link out", link_out, True),
    Attack("FIFO", "FIFO", replaced(os.mkfifo), True),
    Attack("device", "/dev/zero", replaced(lambda file: file.symlink_to("/dev/zero")), True),
    Attack("folder", "folder", replaced(Path.mkdir), True),
    Attack("sparse", "sparse", replaced(hole), True),
    Attack("link in", "link in", link_in, False),
    Attack("truncated", "empty", text(b""), False),
    Attack("truncated", "half", cut(0.5), False),
    Attack("truncated", "almost all", cut(0.99), False),
    Attack("wrong type", "junk", text(os.urandom(1000)), False),
]
"""Changes of any file."""

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, "", "x", "../../../../etc/passwd", "/etc/passwd", ESCAPE, "a" * 100_000, "\ud800",
    [], [[]], {}, {"a": {"b": []}}, [None], ["x"],
]  # fmt: skip
RAW_VALUES = ("NaN", "Infinity", "-1e999", "1" + "0" * 5000)
"""Numbers that Python reads, and JSON has not."""
DOCUMENTS = ("[]", "{}", "null", "5", '"x"', "NaN", "[" * 100_000, "{" * 5000, "\ufeff{}", "\x00", '{"a": 1}{"b": 2}')


def json_attacks(good: Any) -> Iterator[Attack]:
    """Changes of a JSON file with this content: documents of another kind, and odd values of each field, two deep."""
    for document in DOCUMENTS:
        yield Attack("wrong type", f"document {document[:8]!r}", text(document), False)
    for path in fields_of(good):
        for value in ODD_VALUES:
            shown = json.dumps(value)[:24]
            kind = "escape" if value == ESCAPE else "traversal" if "passwd" in shown else "wrong type"
            yield Attack(kind, f"{'.'.join(map(str, path))} = {shown}", text(changed(good, path, value)), False)
        for raw in RAW_VALUES:
            content = changed(good, path, "@raw@").replace('"@raw@"', raw)
            yield Attack("NaN", f"{'.'.join(map(str, path))} = {raw[:12]}", text(content), False)
        yield Attack("missing", f"no {'.'.join(map(str, path))}", text(changed(good, path, None, remove=True)), False)


def fields_of(value: Any, depth: int = 2) -> Iterator[tuple[Any, ...]]:
    """Paths of the fields of a JSON value, at most `depth` names long. Of a list only the first entry is a field."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for name, one in items if depth else ():
        yield (name,)
        yield from ((name, *rest) for rest in fields_of(one, depth - 1))


def changed(good: Any, path: tuple[Any, ...], value: Any, remove: bool = False) -> str:
    """Text of the JSON value `good` with `value` at `path`, or with `remove` without the field."""
    found = json.loads(json.dumps(good))
    part = found
    for name in path[:-1]:
        part = part[name]
    if remove:
        part.pop(path[-1])
    else:
        part[path[-1]] = value
    return json.dumps(found)


def json_line_attacks(rows: list[Any]) -> Iterator[Attack]:
    """Changes of the last line of a file of JSON lines."""
    before = "".join(json.dumps(row) + "\n" for row in rows[:-1])
    for attack in json_attacks(rows[-1]):

        def change(file: Path, attack: Attack = attack) -> None:
            attack.make(file)
            file.write_bytes(before.encode() + file.read_bytes() + b"\n")

        yield attack._replace(make=change)
    yield Attack("endless", "a line of 64 MB", text(before + " " * 64_000_000), False)


def parquet_attacks(good: pa.Table) -> Iterator[Attack]:
    """Changes of a Parquet file with this content: footers, columns, widths, nulls and values."""

    def written(table: pa.Table) -> Callable[[Path], object]:
        return lambda file: pq.write_table(table, file)

    def footer(length: int) -> Callable[[Path], None]:
        def change(file: Path) -> None:
            content = file.read_bytes()
            file.write_bytes(content[:-8] + length.to_bytes(4, "little") + b"PAR1")

        return change

    for length in (0, 1, 2**31 - 1, 2**32 - 1):
        yield Attack("wrong type", f"footer of {length}", footer(length), False)
    yield Attack("wrong type", "no rows", written(good.slice(0, 0)), False)
    yield Attack("wrong type", "one row less", written(good.slice(1)), False)
    for name in good.column_names:
        number, kind = good.column_names.index(name), good.schema.field(name).type
        yield Attack("missing", f"no column {name}", written(good.drop_columns([name])), False)
        nothing = pa.nulls(len(good), kind)
        yield Attack("wrong type", f"{name} null", written(good.set_column(number, name, nothing)), False)
        numbers = pa.array(range(len(good)), pa.float32())
        yield Attack("wrong type", f"{name} a number", written(good.set_column(number, name, numbers)), False)
        if pa.types.is_string(kind):
            for value in ("", "[1]", "null", "{", '{"a": NaN}', ESCAPE, "../../secret.png", "/etc/passwd", "x" * 10**6):
                same = pa.array([value] * len(good), kind)
                change = written(good.set_column(number, name, same))
                yield Attack("escape" if value == ESCAPE else "traversal", f"{name} {value[:12]!r}", change, False)
            bytes_ = pa.array([b"caf\xe9"] * len(good), pa.binary()).view(pa.string())
            yield Attack("wrong type", f"{name} no UTF-8", written(good.set_column(number, name, bytes_)), False)
        if pa.types.is_integer(kind):
            for value in (-1, 2**62):
                same = pa.array([value] * len(good), kind)
                yield Attack("wrong type", f"{name} {value}", written(good.set_column(number, name, same)), False)
        if pa.types.is_fixed_size_list(kind):
            for width in (1, kind.list_size - 1, kind.list_size + 1):
                other = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * width * len(good), pa.float32()), width)
                yield Attack("other width", f"{name} {width}", written(good.set_column(number, name, other)), False)
            for value in (float("nan"), float("inf")):
                flat = pa.array([value] * kind.list_size * len(good), pa.float32())
                other = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
                yield Attack("NaN", f"{name} {value}", written(good.set_column(number, name, other)), False)


def has_control(output: str) -> bool:
    """True if a text could control a terminal: anything but printable letters, line ends and tabs."""
    return re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output) is not None
