"""requirements.txt can be installed with each Python that is promised."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution

import pytest
from conftest import REPO
from packaging.specifiers import SpecifierSet

REQUIREMENTS = (REPO / "requirements.txt").read_text()
PINS = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+?)(?:;.*)?$", REQUIREMENTS, re.MULTILINE))


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=300)


def test_the_pinned_versions_fit_together_for_each_python(tmp_path):
    """uv reads the index's metadata alone; pip would fetch several GB of wheels to find out the same."""
    install = pip("install", "--quiet", "--target", tmp_path, "uv")
    if install.returncode:
        pytest.skip(f"pip cannot reach a package index: {install.stderr.strip().splitlines()[-1]}")
    index = re.search(r"^(?:global|install|:env:)\.index-url='(.+)'$", pip("config", "list").stdout, re.MULTILINE)
    environ = os.environ | {"UV_CACHE_DIR": str(tmp_path / "cache")}
    environ |= {"UV_DEFAULT_INDEX": index[1]} if index else {}
    command = [tmp_path / "bin/uv", "pip", "compile", "--no-header", "--no-annotate", "--universal"]
    command += ["--python-version", "3.10", REPO / "requirements.txt"]  # and later ones
    run = subprocess.run(command, env=environ, text=True, check=False, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr
    chosen = {re.sub(r"\[.*\]", "", line.split("==")[0]) for line in run.stdout.splitlines() if "==" in line}
    assert chosen >= set(PINS) and len(chosen) > 80
    for name in PINS:  # uv does not look at upper bounds
        assert SpecifierSet(distribution(name).metadata["Requires-Python"] or "").contains("3.12"), name


def test_conda_takes_the_same_versions():
    conda = (REPO / "environment.yml").read_text()
    assert re.findall(r"^ +- (\S+)==(\S+)\+cu126", conda, re.MULTILINE) == [("torch", PINS["torch"])]
    assert "- -r requirements.txt\n" in conda and conda.count("==") == 1
