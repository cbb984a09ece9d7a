#!/usr/bin/env python3
"""Trains one configuration by hand: what a search does twelve times, without the search.

    torchrun --standalone --nproc_per_node=2 bloom_hpo_manual.py --lr 1e-5 --bs 1 --wd 0.0
    torchrun --standalone --nproc_per_node=2 bloom_hpo_manual.py --best RUN_FOLDER --epochs 30

Data, objective and training are those of raytune_asha_hpo.py, imported from there: one definition, two users. Its
environment variables (MODEL_NAME, SQUAD_DATA, TRAIN_SAMPLES, ..., SEED) hold here too. Rank 0 prints one line for each
epoch and one RESULT line: the lowest eval_loss and its epoch. With --csv it adds that as a row to a file.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

SEARCH_SCRIPT = Path(__file__).resolve().parents[1] / "raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py"
COLUMNS = ("lr", "per_device_bs", "wd", "eval_loss", "epoch", "runtime_s")


def load_search_script():
    """raytune_asha_hpo.py as a module."""
    spec = importlib.util.spec_from_file_location("raytune_asha_hpo", SEARCH_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def best_configuration(hpo, run_folder):
    """The train_loop_config of the lowest finite eval_loss that a search has reported in this run folder.

    Raises InputError if there is none.
    """
    best = None
    for path in sorted(Path(run_folder).glob("tune/*/result.json")):
        for line in path.read_text().splitlines():
            report = json.loads(line)
            if math.isfinite(report["eval_loss"]) and (best is None or report["eval_loss"] < best["eval_loss"]):
                best = report
    if best is None:
        raise hpo.InputError(f"--best {run_folder}: no results of a search in this folder; give one such as runs/<jobid>")
    return best["config"]["train_loop_config"]


def train(hpo, hyperparameters, settings, csv_file):
    """Trains in this process group; rank 0 prints and, if csv_file is given, writes the result."""
    from transformers import TrainerCallback

    first = os.environ.get("RANK", "0") == "0"
    start = time.monotonic()
    drawn = " ".join(f"{key}={value}" for key, value in hyperparameters.items())
    reports = []

    class PrintReport(TrainerCallback):
        """One line for each evaluation."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            reports.append((metrics["eval_loss"], round(state.epoch)))
            if first:
                print(f"{time.strftime('%H:%M:%S')} manual | {drawn}  epoch {round(state.epoch)}/{settings.NUM_EPOCHS}  "
                      f"eval_loss {metrics['eval_loss']:.5f}", flush=True)

    hpo.fine_tune(hyperparameters, settings, *hpo.load_squad(settings), callbacks=[PrintReport()])
    if not first:
        return
    finite = [report for report in reports if math.isfinite(report[0])]
    if not finite:
        raise hpo.InputError(f"{drawn}: diverged, no epoch has a finite eval_loss; use a lower learning rate")
    loss, epoch = min(finite)
    runtime = time.monotonic() - start
    print(f"RESULT {drawn} eval_loss={loss:.6f} epoch={epoch} runtime_s={runtime:.1f}", flush=True)
    if csv_file:
        with csv_file.open("a", newline="") as file:
            row = {**hyperparameters, "eval_loss": f"{loss:.6f}", "epoch": epoch, "runtime_s": f"{runtime:.1f}"}
            csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)


def main():
    """Returns the exit status: 0 success, 2 bad input or a training that diverged (one line each)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--bs", type=int, help="per-device batch size")
    parser.add_argument("--wd", type=float, help="weight decay")
    parser.add_argument("--best", metavar="RUN_FOLDER", help="instead: the best configuration that a search found")
    parser.add_argument("--epochs", type=int, help="epochs (default: NUM_EPOCHS)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"add the result to this file ({', '.join(COLUMNS)})")
    a = parser.parse_args()
    by_hand = (a.lr, a.bs, a.wd)
    if (None in by_hand) if a.best is None else (by_hand != (None, None, None)):
        parser.error("give --lr, --bs and --wd, or --best RUN_FOLDER")
    hpo = load_search_script()
    os.environ.update(hpo.QUIETER_AND_FASTER)
    try:
        settings = hpo.read_settings(os.environ | ({} if a.epochs is None else {"NUM_EPOCHS": str(a.epochs)}))
        hpo.check_paths(settings)
        for name, value, parse in (("--lr", a.lr, hpo.number(0, 10, low_ok=False)), ("--bs", a.bs, hpo.number(1, kind=int)), ("--wd", a.wd, hpo.number(0, 10))):
            try:
                if value is not None:
                    parse(str(value))
            except ValueError as error:
                raise hpo.InputError(f"{name} {value}: {error}") from None
        drawn = best_configuration(hpo, a.best) if a.best else {"lr": a.lr, "per_device_bs": a.bs, "wd": a.wd}
        train(hpo, drawn, settings, a.csv)
    except hpo.InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
