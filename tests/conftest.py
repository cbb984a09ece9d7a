"""What several test files share: the demo model and data, a real Slurm, and waiting for a condition."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
EXERCISE = REPO / "experiments/raytune/scheduler/asha"
SCRIPT = REPO / "scripts/raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py"
HEAD = "head_node_raytune_asha_hpo.slurm"
sys.path.insert(0, str(REPO / "scripts/raytune_hpo"))  # the tools import one another from there


def wait_for(condition, seconds, what):
    """The first true value of condition(); fails after `seconds`, naming what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def load_module(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hpo():
    """raytune_asha_hpo.py as a module."""
    return load_module(SCRIPT)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with the demo model and data."""
    folder = tmp_path_factory.mktemp("demo") / "assets"
    subprocess.run([sys.executable, REPO / "scripts/demo_assets.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def squad(demo):
    """Folder with SQuAD v1.1 files: real ones where they lie beside the repository, else the demo's."""
    real = REPO.parent / "shared/squad"
    return real if real.is_dir() else demo / "squad"


@pytest.fixture(scope="session")
def slurm():
    """Environment that points to a real Slurm of this test run's own."""
    environ = os.environ | {"MINI_SLURM_DIR": f"/tmp/ms.{os.getpid()}"}
    script = REPO / "tests/mini_slurm.sh"
    up = subprocess.run(["bash", script, "up"], env=environ, text=True, stdout=subprocess.PIPE, check=True, timeout=600)
    yield environ | {"SLURM_CONF": up.stdout.split("=", 1)[1].strip()}
    subprocess.run(["bash", script, "down"], env=environ, check=True, timeout=120)
