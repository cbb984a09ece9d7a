"""Many trials through the real driver, each of which costs nothing (benchmarks/scale.py puts it into a copy of the script)."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import REPO, nothing_left, reports_of, table_of

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import scale


def test_a_hundred_and_twenty_trials_have_a_line_and_a_row_each_and_leave_no_processes(tmp_path):
    course = scale.course_of_cheap_trials(tmp_path, at_once=2, one_process=True)
    run = scale.ARun(course, scale.settings(course, trials=120), every=0.5)
    assert run.process.wait(120) == 0, run.log()
    run.reader.join(10)
    log, reports = run.log(), reports_of(run.folder())
    assert len(reports) == 120
    rows = {row["Trial name"]: row for row in table_of(log)}
    lines = dict(re.findall(r"search \| (TorchTrainer_\S+)  (?:stopped|finished) .*?  eval_loss (\S+)  seconds ", log))
    assert set(rows) == set(lines) == set(reports)
    for name, reported in reports.items():
        assert int(rows[name]["iter"]) == len(reported)
        assert float(lines[name]) == float(f"{reported[-1]['eval_loss']:.5f}")
    assert len(log.splitlines()) < 2 * 120 + 60
    assert "120 of 120 trials have ended, the lowest eval_loss is" in log

    # The tables say the same without the boxed table: the log of a run that was cancelled has none.
    cut = tmp_path / "cut.out"
    cut.write_text(log.split("Number of trials:")[0])
    subprocess.run([sys.executable, REPO / "scripts/raytune_hpo/fill_tables.py", cut, "--json", tmp_path / "run.json"], check=True, capture_output=True)
    (told,) = json.loads((tmp_path / "run.json").read_text())
    assert {t["trial"]: t["epochs"] for t in told["trials"]} == {name: len(reported) for name, reported in reports.items()}

    early, late = (seen["processes"] for _, seen in (next(look for look in run.looks if look[0] > 0), run.looks[-1]))
    assert late <= early + 2  # a process that Ray keeps idle may come and go
    assert not list(run.folder().glob("tune/.*.new"))
    assert nothing_left(run.job)
