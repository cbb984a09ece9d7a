"""`import rooms` first: then a script in one room can import those of the others. Each such room has a link to this."""
import sys
from pathlib import Path

ROOMS = ("job", "report", "model", "manual_hpo", "raytune_hpo/raytune_asha_scheduler")
SCRIPTS = next(folder for folder in Path(__file__).resolve().parents if (folder / ROOMS[-1]).is_dir())
sys.path += [str(SCRIPTS / room) for room in ROOMS]
