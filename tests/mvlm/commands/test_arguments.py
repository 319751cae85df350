"""Mistakes in what is typed after a command: one line, exit code 2."""

import pytest

from mvlm.cli import run_command
from mvlm.commands.arguments import bound, one_line, parse
from mvlm.errors import ConfigError

PRETRAIN = ["pretrain", "tiny", "--data", "none", "--out", "none"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrain", "tiny", "--data", "none"], "Missing from mvlm pretrain tiny: --out PATH"),
        ([*PRETRAIN, "--bacth-size", "3"], "--bacth-size"),
        (
            [*PRETRAIN, "--batch-size", "0"],
            "batch_size must be at least 1, got 0; `mvlm pretrain tiny",
        ),
        ([*PRETRAIN, "--batch-size", "abc"], "--batch-size: invalid literal for int() with base 10: 'abc'"),
        (
            [*PRETRAIN, "--model.image-size", "100"],
            "mask_block must divide image_size: wanted a divisor of 100",
        ),
        ([*PRETRAIN, "--plan", "slow"], "invalid choice 'slow' for argument '--plan'. Expected one of"),
        (["data", "emoji"], "Missing from mvlm data emoji: PATH"),
        (["bench"], "unknown command 'bench'; wanted one of: bench kernels, bench step, bench data"),
        (["pretrain", "--config"], "got --config with no file after it"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    with pytest.raises(ConfigError) as caught:
        run_command(words)
    assert message in str(caught.value)
    assert not {"\n", "│", "─"} & set(str(caught.value))
    assert capsys.readouterr() == ("", "")


def test_a_command_gets_what_was_typed():
    def command(one: int, /, *, two: str = "b") -> None:
        """Does something."""
        seen.append((one, two))

    seen = []
    ready = parse(bound(command), ["1", "--two", "c"], prog="x")
    assert seen == []
    ready()
    assert seen == [(1, "c")]


def test_help_is_still_help(capsys):
    for words, told in (
        (["pretrain", "tiny", "--help"], "--batch-size INT"),
        (["fill", "--help"], "Fill in the words"),
    ):
        with pytest.raises(SystemExit, match="0"):
            run_command(words)
        assert told in capsys.readouterr().out
    for words, told in ((["data", "--help"], "mvlm data view"), (["bench", "-h"], "mvlm bench step")):
        run_command(words)
        assert told in capsys.readouterr().out


def test_a_box_of_several_parts():
    box = """\
╭─ Required options ───╮
│ Missing from x:      │
│     --out PATH       │
│ ──────────────────── │
│ Unrecognized options:│
│     --two            │
│ ──────────────────── │
│ For full helptext, … │
╰──────────────────────╯
"""
    assert one_line(box) == "Missing from x: --out PATH; Unrecognized options: --two"
    plain = box.replace("╭─ Required", "Required").translate(str.maketrans("─│╭╮╰╯", "-     "))
    assert one_line(plain) == one_line(box)
    assert one_line("title\n\x1b[31m│ red │\x1b[0m\n") == "red"
