"""Coverage of a kernel's arguments and masks by its launches: what no launch has told apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from triton_proof.report import Launch, place_name


def whole_numbers(source: Any, values: Sequence[Any]) -> dict[str, int]:
    """The integers among the arguments of a launch, by name, without those of type ``tl.constexpr``.

    Triton makes constants of those that are 1; they are kept. source: what Triton compiled.
    """
    constants = {p.name for p in source.fn.params if p.is_constexpr}
    return {
        name: value
        for name, value in zip(source.signature, values, strict=True)
        if name not in constants and type(value) is int
    }


def hints(launches: Sequence[Launch]) -> Iterator[str]:
    """Yield properties that all launches of one kernel share, and that hide faults, each with a remedy."""
    names = [name for name in launches[0].numbers if all(name in x.numbers for x in launches)]
    values = {name: [x.numbers[name] for x in launches] for name in names}
    if ones := [name for name, of in values.items() if set(of) == {1}]:
        yield f"{_listed(ones)} 1 in every launch: if it is a stride, add a transposed tensor"
    others = {name: of for name, of in values.items() if name not in ones}
    for same in _equal(others):
        yield f"{_listed(same)} equal in every launch: add rows that lie apart (`wide[:, :n]`), or `--vary strides`"
    if even := [name for name, of in others.items() if not any(x % 2 for x in of)]:
        yield f"{_listed(even)} even in every launch: add an odd size, or `--vary sizes`"
    # The compiler may give an access another line in one of its variants.
    known = [place for place in launches[0].masks if all(place in x.masks for x in launches)]
    if whole := [place for place in known if not any(x.masks[place] for x in launches)]:
        lines = ", ".join(dict.fromkeys(place_name(place[:1]) for place in whole))
        yield f"no lane was masked at {lines}: add a size that is no multiple of the block, or `--vary sizes`"


def _equal(values: Mapping[str, list[int]]) -> list[list[str]]:
    """Groups of two or more names whose values are equal in every launch. values: name -> value by launch."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, of in values.items():
        groups.setdefault(tuple(of), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(f'`{name}`' for name in names)} {'was' if len(names) == 1 else 'were'}"
