"""`mvlm report`: runs that cannot be reported."""

import pytest

from support.commands import assert_refused
from support.scenes import made_up_run


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], ["other"]])
def test_a_report_of_an_evaluation_that_is_not_one_is_refused(run_mvlm, run_copy, tmp_path, others):
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text('{"split": "test"}')
    outcome = run_mvlm("report", run_copy, *(made_up_run(tmp_path / name) for name in others))
    assert_refused(outcome, f"{run_copy}/eval/test.json: wanted the figures that `mvlm eval retrieval")


def test_a_comparison_takes_no_data(run_mvlm, tmp_path):
    runs = [made_up_run(tmp_path / name) for name in ("one", "other")]
    assert_refused(run_mvlm("report", *runs, "--data", tmp_path), "data: a comparison of runs shows no examples")
    assert not (runs[0] / "compare.html").exists()


def test_a_report_overwrites_pages_alone(run_mvlm, run_copy, tmp_path):
    config = (run_copy / "config.json").read_bytes()
    for words in ((run_copy,), (run_copy, made_up_run(tmp_path / "other"))):
        outcome = run_mvlm("report", *words, "--out", run_copy / "config.json")
        assert_refused(outcome, "out: wanted a new file or an earlier page, got another file")
    assert (run_copy / "config.json").read_bytes() == config
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>\n<p>of yesterday")
    runs = [made_up_run(tmp_path / name) for name in ("one", "two")]
    assert run_mvlm("report", *runs, "--out", page).code == 0
    assert "of yesterday" not in page.read_text()
