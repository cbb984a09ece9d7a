"""Lets a script in one room import those of the others: `import rooms` before them.

Each room that needs it has a link to this file, since Python looks for modules beside the script that it runs.
"""

import sys
from pathlib import Path

ROOMS = ("job", "report", "model", "manual_hpo", "raytune_hpo/raytune_asha_scheduler")
SCRIPTS = next(folder for folder in Path(__file__).resolve().parents if (folder / ROOMS[-1]).is_dir())
sys.path += [str(SCRIPTS / room) for room in ROOMS]
