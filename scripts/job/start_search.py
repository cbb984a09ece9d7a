#!/usr/bin/env python3
"""Runs a search script once Ray's head is there, and imports meanwhile what it will import.

    python start_search.py FILE SCRIPT --run-dir DIR      # FILE: Ray writes its address there, as the last thing
"""

import os
import runpy
import sys
import time
from pathlib import Path

import raytune_asha_hpo  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

if __name__ == "__main__":
    address, *sys.argv = sys.argv[1:]
    while not (found := os.path.exists(address) and Path(address).read_text().strip()):
        time.sleep(0.1)  # the head script has a deadline for it, and ends this
    os.environ["RAY_ADDRESS"], sys.path[0] = found, os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
