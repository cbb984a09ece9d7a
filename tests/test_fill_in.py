"""The files to fill in: unfilled they say so, the answers' lines pass, wrong lines are found."""

import re
import subprocess
import sys

import pytest
from conftest import EXERCISE, REPO

ANSWERS = (EXERCISE / "ANSWERS.md").read_text()
LOG = REPO / "tests/logs/complete.out"


@pytest.fixture
def fill_in(tmp_path):
    """A function: a file's name, lines for its gaps -> (exit status, output)."""
    folder = tmp_path / "experiments/raytune/scheduler/asha/fill_in"
    folder.mkdir(parents=True)
    (tmp_path / "scripts").symlink_to(REPO / "scripts")
    for name in ("pictures", "head_node_raytune_asha_hpo.slurm"):
        (folder.parent / name).symlink_to(EXERCISE / name)

    def run(name, *lines, log=None):
        text = (EXERCISE / "fill_in" / name).read_text()
        for line in lines:
            text = re.sub(r"\S.* = \.\.\..*|return \.\.\..*", lambda _, line=line: line, text, count=1)
        if name == "stages.py" and lines:
            text = re.sub(r"STAGES = \[.*?\]", f"STAGES = {lines}", text, flags=re.DOTALL)
        (folder / name).write_text(text)
        command = [sys.executable, "-S", folder / name, *([log] if log else [])]  # no package is needed
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def answer(name):
    return re.search(rf"`fill_in/{name}`.*?```python\n(.*?)\n```", ANSWERS, re.DOTALL)[1].split("\n")


@pytest.mark.parametrize("name", ["asha_rule.py", "capacity.py"])
def test_with_a_gap_left_it_says_so(fill_in, name):
    for lines in ([], answer(name)[:1]):
        assert fill_in(name, *lines) == (1, "A gap is not filled yet: replace each ... of this file.\n")


@pytest.mark.parametrize("log, decisions", [(None, 23), (LOG, 25)])
def test_the_rule_of_the_answers_decides_as_the_log_says(fill_in, log, decisions):
    status, text = fill_in("asha_rule.py", *answer("asha_rule.py"), log=log)
    assert status == 0 and text.endswith(f"\n{decisions} of {decisions} decisions are those of the log\n")
    assert text.count(": goes on\n") + text.count(": stops\n") == decisions


@pytest.mark.parametrize("gap, line, said", [
    (0, "return [1, 2, 4]", "rungs(1, 3, 10) is [1, 2, 4], but should be [1, 3, 9]"),
    (1, "return True", "trial 1 at epoch 1: 3.389 (before it: 2.450): goes on, but the log says that it stops"),
    (1, "return loss < min(recorded, default=9)", ", but the log says that it goes on\n"),
])  # fmt: skip
def test_a_wrong_rule_is_found(fill_in, gap, line, said):
    lines = answer("asha_rule.py")
    lines[gap] = line
    status, text = fill_in("asha_rule.py", *lines)
    assert status == 1 and said in text and "23 of 23" not in text


def test_the_stages_of_section_9_are_the_head_scripts_and_others_are_not(fill_in):
    listed = (EXERCISE / "README.md").read_text().partition("**The head job**")[2].partition("**A worker job**")[0]
    status, text = fill_in("stages.py", *re.findall(r"`([a-z]+(?:_[a-z]+)+)`", listed))
    assert status == 0 and text.count(": right\n") == 8
    status, text = fill_in("stages.py")
    assert (status, text) == (1, "1. watch_search: not yet; something else happens before it\n")


def test_the_formula_of_the_answers_and_a_wrong_one(fill_in):
    status, text = fill_in("capacity.py", *answer("capacity.py"))
    assert status == 0 and "Cnode 20, Gnode 8, Gw 1: 4\n" in text
    status, text = fill_in("capacity.py", "by_cpus = Cnode // (W * Cw)", answer("capacity.py")[1])
    assert status == 1 and "Cnode  8, Gnode 2, Gw 1: 1\n" in text and "Cnode 20, Gnode 0, Gw 0: 5, but it is 4" in text
