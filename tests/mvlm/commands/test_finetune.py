"""`mvlm finetune`: a run that is repeated from its configuration."""

import json

import pytest

from mvlm.commands.finetune import parse_config
from mvlm.errors import ConfigError
from mvlm.runs.folder import read_metrics, write_config
from support.commands import assert_refused
from support.questions import finetune_config


@pytest.mark.slow
def test_a_run_is_repeated_from_its_configuration(run_mvlm, trained, questions, tmp_path):
    words = ("--checkpoint", trained, "--data", questions, "--max-steps", 2, "--batch-size", 8, "--device", "cpu")
    assert run_mvlm("finetune", "vqa", *words, "--warmup-steps", 1, "--out", tmp_path / "one").code == 0
    outcome = run_mvlm("finetune", f"--config={tmp_path / 'one/config.json'}", "--out", tmp_path / "two")
    assert outcome.code == 0, outcome.err
    one, two = ([row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("one", "two"))
    assert one == two != []
    given = ("finetune", "--config", tmp_path / "one/config.json", "--out", tmp_path / "three")
    assert_refused(run_mvlm(*given, "--lr-head", -1), "lr_head")


def test_flags_override_a_configuration_and_it_names_no_code_to_run(trained, questions, tmp_path):
    config = finetune_config(trained, questions, tmp_path / "run")
    write_config(config)
    file = str(tmp_path / "run/config.json")
    assert parse_config(["--config", file, "--lr-head", "0.5"]).lr_head == 0.5
    assert parse_config(["vqa", "--config", file]) == parse_config(["--config", file]) == config
    with pytest.raises(ConfigError, match="pairs"):
        parse_config(["pairs", "--config", file])
    with pytest.raises(ConfigError, match="behind --config"):
        parse_config(["--config"])

    values = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(values | {"task": "/tmp/theirs.py"}))
    with pytest.raises(ConfigError, match="name it"):
        parse_config(["--config", file])
    assert parse_config(["mine.py", "--config", file]).task == "mine.py"

    values.pop("task")
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="mvlm pretrain --config"):
        parse_config(["--config", file])
