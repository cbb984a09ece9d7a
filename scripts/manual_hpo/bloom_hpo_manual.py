#!/usr/bin/env python3
"""Trains one configuration by hand: what a search does twelve times, without the search.

    torchrun --standalone --nproc_per_node=2 bloom_hpo_manual.py --lr 1e-5 --bs 1 --wd 0.0
    torchrun --standalone --nproc_per_node=2 bloom_hpo_manual.py --best RUN_FOLDER --save MODEL_FOLDER

Data, objective and training are imported from raytune_asha_hpo.py, and so are its environment variables
(MODEL_NAME, SQUAD_DATA, TRAIN_SAMPLES, ..., SEED); with --best, those not set are as they were in that run.
Rank 0 prints one line per epoch and one RESULT line: the lowest eval_loss and its epoch. With --csv it also
appends that as a row to a file. With --save it keeps the model of that epoch, for ask.py and from_pretrained.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import sys
import time
from pathlib import Path

import check_inputs
import raytune_asha_hpo as hpo
import read_run
import rooms  # noqa: F401
import saved_model
from check_inputs import InputError

COLUMNS = ("lr", "per_device_bs", "wd", "eval_loss", "epoch", "runtime_s")


def best_configuration(run_folder):
    """The train_loop_config of the lowest finite eval_loss that a search has reported in this run folder.

    Raises InputError if there is none.
    """
    if found := read_run.lowest_losses(run_folder):
        return found[0][1]
    why = "no results of a search in this folder"
    raise InputError(f"--best={str(run_folder)!r}: {why}; give one such as runs/<jobid>")


def settings_of(run_folder):
    """The variables of the run as they were set; none if it has no settings.json."""
    try:
        return dict(json.loads(Path(run_folder, "settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def train(hyperparameters, settings, csv_file, new_model=None):
    """Trains in this process group; rank 0 prints and, if csv_file is given, writes the result.

    new_model: a saved_model.NewModel, which keeps the weights of the epoch with the lowest loss.
    """
    from transformers import TrainerCallback

    first = os.environ.get("RANK", "0") == "0"
    start = time.monotonic()
    drawn = " ".join(f"{key}={value}" for key, value in hyperparameters.items())
    reports = []

    class PrintReport(TrainerCallback):
        """One line for each evaluation."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            loss = metrics["eval_answer_loss"]
            lowest = math.isfinite(loss) and loss < min((seen for seen, _ in reports), default=math.inf)
            if lowest and new_model:
                new_model.keep(kwargs["model"])
            reports.append((loss if math.isfinite(loss) else math.inf, round(state.epoch)))
            if first:
                epoch = f"epoch {round(state.epoch)}/{settings.NUM_EPOCHS}"
                text = f"{drawn}  {epoch}  eval_loss {loss:.5f}"
                print(f"{time.strftime('%H:%M:%S')} manual | {text}", flush=True)

    hpo.fine_tune(hyperparameters, settings, *hpo.load_squad(settings), callbacks=[PrintReport()])
    if not first:
        return
    finite = [report for report in reports if math.isfinite(report[0])]
    if not finite:
        raise InputError(f"{drawn}: diverged, no epoch has a finite eval_loss; use a lower learning rate")
    loss, epoch = min(finite)
    runtime = time.monotonic() - start
    if new_model:
        new_model.finish(settings, {"hyperparameters": hyperparameters, "eval_loss": loss, "epoch": epoch})
    print(f"RESULT {drawn} eval_loss={loss:.6f} epoch={epoch} runtime_s={runtime:.1f}", flush=True)
    if csv_file:
        with csv_file.open("a", newline="") as file:
            found = {"eval_loss": f"{loss:.6f}", "epoch": epoch, "runtime_s": f"{runtime:.1f}"}
            row = hyperparameters | found
            csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n").writerow(row)


def main():
    """Returns the exit status: 0 success, 2 bad input or a training that diverged (one line each)."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--lr", help="learning rate")
    parser.add_argument("--bs", help="per-device batch size")
    parser.add_argument("--wd", help="weight decay")
    parser.add_argument("--best", metavar="RUN_FOLDER", help="instead: the best that a search has found")
    parser.add_argument("--epochs", help="epochs (default: NUM_EPOCHS)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the model of the best epoch here")
    columns = ", ".join(COLUMNS)
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"append the result here ({columns})")
    a = parser.parse_args()
    by_hand = (a.lr, a.bs, a.wd)
    if (None in by_hand) if a.best is None else (by_hand != (None, None, None)):
        parser.error("give --lr, --bs and --wd, or --best RUN_FOLDER")
    value, problems = {}, []
    limits_of = {"lr": "LR_LOWER", "bs": "BS_CHOICES", "wd": "WD_CHOICES", "epochs": "NUM_EPOCHS"}
    for option, name in limits_of.items():
        text = getattr(a, option)
        try:
            value[option] = None if text is None else check_inputs.read_number(name, text)
        except InputError as error:
            problems.append(f"--{option}={text!r:.500}: {error}")
    if a.csv and (a.csv.is_dir() or not a.csv.absolute().parent.is_dir()):
        problems.append(f"--csv={str(a.csv)!r}: not a file in an existing folder; give one")
    try:
        if problems:
            raise InputError("\n".join(problems))
        drawn, environ = {"lr": value["lr"], "per_device_bs": value["bs"], "wd": value["wd"]}, os.environ
        if a.best is not None:
            drawn, environ = best_configuration(a.best), settings_of(a.best) | os.environ
        settings = check_inputs.check(environ)
        settings.NUM_EPOCHS = value["epochs"] or settings.NUM_EPOCHS
        settings.WORKERS_PER_TRIAL = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
        with saved_model.NewModel(a.save, a.best) if a.save else contextlib.nullcontext() as new_model:
            train(drawn, settings, a.csv, new_model)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
