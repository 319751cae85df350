"""Pages of docs/reference/ that are made from the code. `python docs/tables.py` rewrites them, `make docs` compares.

What is made stands between the lines `<!-- generated: NAME -->` and `<!-- end of generated -->`: `commands` from the
parsers of all commands, `configuration` from the dataclasses of settings.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mvlm.cli import COMMANDS, PARSE_THEMSELVES
from mvlm.commands.arguments import deferred
from mvlm.config.finetune import FinetuneConfig
from mvlm.config.groups import groups_of
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import RECIPES, PretrainConfig
from mvlm.config.ranges import NO_FLAG, Range
from mvlm.tasks.recipes import finetune_defaults
from mvlm_benchmarks.cli import COMMANDS as BENCHMARKS

SETTINGS = "[Configuration](configuration.md) lists their settings."
MARKER = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def cell(text: str) -> str:
    """One line of text as a cell of a Markdown table. Capitals in brackets, as [MASK], are no links."""
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;").replace("*", "\\*")


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def commands() -> str:
    """Every command with its description and arguments, in the order of `mvlm --help`, and every benchmark."""
    found = COMMANDS | {f"bench {name}": function for name, function in BENCHMARKS.items()}
    return "\n".join(_command(name, function) for name, function in found.items())


def _command(name: str, function: Callable[..., None]) -> str:
    lines = [f"## mvlm {name}", ""]
    if name in PARSE_THEMSELVES:
        text = [inspect.cleandoc(function.__doc__ or ""), ""]
        return "\n".join([*lines, *text, *([] if name == "bench" else [SETTINGS, ""])])
    import tyro

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other way to a parser's arguments
        parser = tyro.extras.get_parser(deferred(function), config=(tyro.conf.OmitArgPrefixes,))
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = ((_argument(action), cell(_help(action))) for action in actions)
    return "\n".join([*lines, (parser.description or "").strip(), "", table(("argument", "meaning"), rows)])


def _argument(action: argparse.Action) -> str:
    value = re.sub(r"\{None\}\|", "", str(action.metavar or "")).replace("|", "\\|")
    if not action.option_strings:
        return f"`{action.dest.split('.')[-1].upper()}`"
    return f"`{action.option_strings[0]}{f' {value}' if value else ''}`"


def _help(action: argparse.Action) -> str:
    return re.sub(r"\(default: (None)?\)", "", str(action.help or ""))


def configuration() -> str:
    """Every setting of a model, a pretraining run and a fine-tuning run, by group."""
    recipes = {preset: PretrainConfig.preset(preset, data=Path(), out=Path()) for preset in RECIPES}
    lines = [
        "## Model",
        "",
        inspect.cleandoc(MaskVLMConfig.__doc__ or ""),
        "",
        "A resumed run may never change these.",
        "",
    ]
    lines += [_settings(MaskVLMConfig, {preset: recipe.model for preset, recipe in recipes.items()}, "--model.", True)]
    of_pretraining = groups_of(PretrainConfig)
    for group in of_pretraining:
        lines += [f"## {_title(group)}", "", inspect.cleandoc(group.__doc__ or ""), "", _settings(group, recipes, "--")]
    task = finetune_defaults("vqa", checkpoint=Path(), data=Path(), out=Path())
    for group in (group for group in groups_of(FinetuneConfig) if group not in of_pretraining):
        table_of = _settings(group, {"default": task}, "--")
        lines += [f"## {_title(group)}", "", inspect.cleandoc(group.__doc__ or ""), "", table_of]
    return "\n".join(lines)


def _title(group: type) -> str:
    return group.__name__.removesuffix("Settings").removesuffix("Options")


@cache
def _attribute_docs(kind: type) -> dict[str, str]:
    """Docstrings of a class's attributes, the strings below them, by attribute."""
    (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for attribute, below in pairwise(tree.body):
        match attribute, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def _settings(group: type, values: dict[str, Any], prefix: str, inherited: bool = False) -> str:
    """Table of a group's settings, and of inherited ones if asked. A default says of which recipes, if these differ."""
    types = typing.get_type_hints(group, include_extras=True)
    fields = [field for field in dataclasses.fields(group) if inherited or field.name in group.__annotations__]

    def text(name: str) -> str:
        return next(docs[name] for kind in group.__mro__ if name in (docs := _attribute_docs(kind)))

    def default(field: dataclasses.Field[Any]) -> str:
        found = {name: getattr(config, field.name) for name, config in values.items()}
        if any(value == Path() for value in found.values()) or field.name == "task":
            return "required"
        recipes: dict[str, list[str]] = {}
        for name, value in found.items():
            recipes.setdefault(_value(value), []).append(name)
        if len(recipes) == 1:
            return next(iter(recipes))
        return ", ".join(f"{value} ({', '.join(names)})" for value, names in recipes.items())

    def name_of(field: dataclasses.Field[Any]) -> str:
        """The flag of a setting; of one without a flag its name."""
        if NO_FLAG in getattr(types[field.name], "__metadata__", ()):
            return f"{prefix.strip('-')}{field.name}"
        return f"{prefix}{field.name.replace('_', '-')}"

    rows = (
        (
            f"`{name_of(field)}`, {cell(_kind(types[field.name]))}",
            default(field),
            cell(text(field.name)),
        )
        for field in fields
    )
    return table(("setting", "default", "meaning"), rows)


def _kind(kind: Any) -> str:
    """The type of a setting in words, with its range."""
    if typing.get_origin(kind) is typing.Annotated:
        inner, *notes = typing.get_args(kind)
        return " ".join([_kind(inner), *(str(note) for note in notes if isinstance(note, Range))])
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        *items, last = typing.get_args(kind)
        return f"any of {_kind(items[0])}" if last is ... else " ".join(_kind(item) for item in (*items, last))
    options = typing.get_args(kind)
    if options:
        return " or ".join(_kind(option) for option in options)
    names: dict[Any, str] = {type(None): "nothing", bool: "yes or no", str: "text", Path: "path"}
    return names.get(kind) or str(kind.__name__)


def _value(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


GENERATED = {"commands": commands, "configuration": configuration}


def with_generated(text: str) -> str:
    """A page with what is made from the code as the code is now."""
    return MARKER.sub(lambda match: f"{match[1]}\n{GENERATED[match[2]]().strip()}\n\n{match[3]}", text)
