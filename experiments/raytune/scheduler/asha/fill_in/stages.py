#!/usr/bin/env python3
"""Put the stages of the head job in order: move the lines below, then let the head script's main() judge.

    python3 fill_in/stages.py

Exit status: 0 if all stand where they happen, else 1.
"""

import re
import sys
from pathlib import Path

STAGES = [
    "watch_search",  # waits for the end of the search, and replaces workers that are lost
    "submit_workers",  # sbatch, once for each worker node
    "fill_tables",  # tables and pictures
    "make_run_folder",  # runs/<jobid>, with the settings and a new token
    "start_head",  # Ray's head, whose address the workers wait for
    "frame_the_log",  # START, and the traps that print FINISH
    "release_workers",  # shutdown.txt
    "check_inputs",  # variables, model, data, search space
]


def main():
    script = (Path(__file__).resolve().parents[1] / "head_node_raytune_asha_hpo.slurm").read_text()
    right = [word for word in re.findall(r"\w+", script.partition("\nmain() {")[2]) if word in STAGES]
    for number, (yours, stage) in enumerate(zip(STAGES, right, strict=True), 1):
        if yours != stage:
            print(f"{number}. {yours}: not yet; something else happens before it")
            return 1
        print(f"{number}. {yours}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
