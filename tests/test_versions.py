"""requirements.txt can be installed with each Python that is promised, and with which licences."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions

import pytest
from conftest import REPO

REQUIREMENTS = (REPO / "requirements.txt").read_text()
PINS = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+?)(?:;.*)?$", REQUIREMENTS, re.MULTILINE))
README = (REPO / "README.md").read_text()


# ---- Versions --------------------------------------------------------------------------------------------------------
def pip(*arguments):
    return subprocess.run([sys.executable, "-m", "pip", *arguments], check=False, text=True, capture_output=True, timeout=100)


def test_the_pinned_versions_fit_together_for_each_python(tmp_path):
    """uv reads the index's metadata alone; pip would fetch several GB of wheels to find out the same."""
    install = pip("install", "--quiet", "--target", tmp_path, "uv")
    if install.returncode:
        pytest.skip(f"pip cannot reach a package index: {install.stderr.strip().splitlines()[-1]}")
    index = re.search(r"^(?:global|install|:env:)\.index-url='(.+)'$", pip("config", "list").stdout, re.MULTILINE)
    environ = os.environ | {"UV_CACHE_DIR": str(tmp_path / "cache")} | ({"UV_DEFAULT_INDEX": index[1]} if index else {})
    command = [tmp_path / "bin/uv", "pip", "compile", "--no-header", "--no-annotate", "--python-platform", "x86_64-manylinux_2_28", REPO / "requirements.txt"]
    runs = {version: subprocess.Popen([*command, "--python-version", version], env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for version in ("3.10", "3.11", "3.12")}  # fmt: skip
    for version, run in runs.items():
        told, problems = run.communicate(timeout=100)
        assert run.returncode == 0, f"Python {version}: {problems}"
        chosen = {re.sub(r"\[.*\]", "", line.split("==")[0]) for line in told.splitlines() if "==" in line}
        assert chosen >= set(PINS) and len(chosen) > 80


def test_there_is_one_place_for_versions():
    conda = (REPO / "environment.yml").read_text()
    assert re.findall(r"^ +- ([\w-]+)==([\d.]+)\+cu126$", conda, re.MULTILINE) == [("torch", PINS["torch"])]
    others = re.findall(r"^ +- (?!torch==|--extra-index-url|-r requirements.txt$)(\S+)$", conda, re.MULTILINE)
    assert others == ["conda-forge", "python=3.11", "pip", "pip:"]
    assert "- -r requirements.txt\n" in conda


# ---- Licences --------------------------------------------------------------------------------------------------------
KINDS = {  # what a licence is called in the README: how package authors call it
    "Apache-2.0": r"Apache", "MIT": r"\bMIT\b", "BSD": r"BSD", "BSL-1.0": r"BSL", "PSF-2.0": r"PSF|Python Software Foundation",
    "ISC": r"\bISC\b", "MPL-2.0": r"MPL|Mozilla Public"}  # fmt: skip
SHARE_ALIKE = {"certifi", "hypothesis", "tqdm"}  # MPL-2.0: who changes their files must publish these; who uses them need not


def declared(package):
    """What a package says of its licence. A long text is not read: it also quotes the licences of what the wheel carries."""
    if expression := package.metadata.get("License-Expression"):
        return expression
    classifiers = [each.split("::")[-1] for each in package.metadata.get_all("Classifier", []) if each.startswith("License ::")]
    short = package.metadata.get("License") or ""
    return " ".join(classifiers + ([short] if len(short) < 100 else []))


def kinds(text):
    return {kind for kind, pattern in KINDS.items() if re.search(pattern, text)}


def installed():
    """Name and licence of each package of the environment but NVIDIA's, which GPU builds of PyTorch bring."""
    return {package.name: declared(package) for package in distributions() if not package.name.lower().startswith("nvidia")}


def test_no_package_has_a_licence_that_reaches_further():
    for name, licence in installed().items():
        assert not re.search(r"GPL|GNU|Affero", licence), f"{name}: {licence}"
        assert kinds(licence), f"{name}: {licence!r} is none of {[*KINDS]}"
        assert ("MPL-2.0" in kinds(licence)) == (name in SHARE_ALIKE), f"{name}: {licence}"


def test_the_table_of_licences_is_what_the_packages_declare():
    rows = re.findall(r"^\| ([\w-]+) \| (.+?) \|$", README.split("| package | licence |\n")[1].split("\n\n")[0], re.MULTILINE)
    assert [name for name, _ in rows] == [*PINS]
    packages = installed()
    for name, licence in rows:
        assert kinds(licence) == kinds(packages[name]), f"{name}: {packages[name]}"
    rest = " ".join(README.split("## Licences")[1].split())
    assert all(name in rest for name in SHARE_ALIKE)
