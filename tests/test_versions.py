"""requirements.txt can be installed with each Python that is promised, and with which licences."""

import os
import re
import subprocess
import sys
from importlib.metadata import distribution, distributions

import pytest
from conftest import REPO
from packaging.specifiers import SpecifierSet

REQUIREMENTS = (REPO / "requirements.txt").read_text()
PINS = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+?)(?:;.*)?$", REQUIREMENTS, re.MULTILINE))
LICENCES = (REPO / "experiments/raytune/scheduler/asha/THIRD_PARTY.md").read_text()


# ---- Versions ----------------------------------------------------------------------------------------------
def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=False, text=True, capture_output=True, timeout=300)


def test_the_pinned_versions_fit_together_for_each_python(tmp_path):
    """uv reads the index's metadata alone; pip would fetch several GB of wheels to find out the same."""
    install = pip("install", "--quiet", "--target", tmp_path, "uv")
    if install.returncode:
        pytest.skip(f"pip cannot reach a package index: {install.stderr.strip().splitlines()[-1]}")
    index = re.search(
        r"^(?:global|install|:env:)\.index-url='(.+)'$", pip("config", "list").stdout, re.MULTILINE
    )
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


def test_there_is_one_place_for_versions():
    conda = (REPO / "environment.yml").read_text()
    assert re.findall(r"^ +- ([\w-]+)==([\d.]+)\+cu126(?: +#.*)?$", conda, re.MULTILINE) == [("torch", PINS["torch"])]
    others = re.findall(r"^ +- (?!torch==|--extra-index-url|-r requirements.txt$)(\S+)$", conda, re.MULTILINE)
    assert others == ["conda-forge", "python=3.11", "pip", "pip:"]
    assert "- -r requirements.txt\n" in conda


# ---- Licences ----------------------------------------------------------------------------------------------
KINDS = {  # what a licence is called in THIRD_PARTY.md: how package authors call it
    "Apache-2.0": r"Apache", "MIT": r"\bMIT\b", "BSD": r"BSD", "BSL-1.0": r"BSL",
    "PSF-2.0": r"PSF|Python Software Foundation", "ISC": r"\bISC\b",
    "MPL-2.0": r"MPL|Mozilla Public"}  # fmt: skip
# MPL-2.0: who changes their files must publish these; who uses them need not.
SHARE_ALIKE = {"certifi", "hypothesis", "tqdm"}


def declared(package):
    """What a package says of its licence. A long text is not read: it quotes those of the wheel's parts."""
    if expression := package.metadata.get("License-Expression"):
        return expression
    classifiers = package.metadata.get_all("Classifier", [])
    classifiers = [each.split("::")[-1] for each in classifiers if each.startswith("License ::")]
    short = package.metadata.get("License") or ""
    return " ".join(classifiers + ([short] if len(short) < 100 else []))


def kinds(text):
    return {kind for kind, pattern in KINDS.items() if re.search(pattern, text)}


def installed():
    """Name and licence of each package of the environment but NVIDIA's, which GPU builds of PyTorch bring."""
    ours = [package for package in distributions() if not package.name.lower().startswith("nvidia")]
    return {package.name: declared(package) for package in ours}


def test_no_package_has_a_licence_that_reaches_further():
    for name, licence in installed().items():
        assert not re.search(r"GPL|GNU|Affero", licence), f"{name}: {licence}"
        assert kinds(licence), f"{name}: {licence!r} is none of {[*KINDS]}"
        assert ("MPL-2.0" in kinds(licence)) == (name in SHARE_ALIKE), f"{name}: {licence}"


def test_the_table_of_licences_is_what_the_packages_declare():
    table = LICENCES.split("| package | licence |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([\w-]+) \| (.+?) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == [*PINS]
    packages = installed()
    for name, licence in rows:
        assert kinds(licence) == kinds(packages[name]), f"{name}: {packages[name]}"
    assert all(name in LICENCES for name in SHARE_ALIKE)
