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
import math
import os
import sys
import time
from pathlib import Path

import rooms  # noqa: F401  # isort: skip

import check_inputs
import raytune_asha_hpo as hpo
import read_run
import run_state
import saved_model
from check_inputs import InputError

COLUMNS = ("lr", "per_device_bs", "wd", "eval_loss", "epoch", "runtime_s")
FIRST = os.environ.get("RANK", "0") == "0"


def train(hyperparameters, settings, csv_file=None, record_file=None, new_model=None):
    """Trains in this process group; rank 0 prints the result, and writes it to the files that are given.

    new_model: a saved_model.NewModel, which keeps the weights of the epoch with the lowest loss.
    """
    from transformers import TrainerCallback

    start, runtime, reports = time.monotonic(), 0.0, []
    drawn = " ".join(f"{key}={value}" for key, value in hyperparameters.items())

    def record(event, **fields):
        if FIRST and record_file:
            run_state.record(record_file.parent, event, trial=drawn, **fields)

    class PrintReport(TrainerCallback):
        """One line for each evaluation."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            nonlocal runtime
            runtime = time.monotonic() - start  # until the last report, as Ray counts it
            loss, epoch = metrics["eval_answer_loss"], round(state.epoch)
            finite = math.isfinite(loss)
            if new_model and finite and loss < min(reports, default=(math.inf,))[0]:
                new_model.keep(kwargs["model"])
            reports.extend([(loss, epoch)] if finite else [])
            if FIRST:
                text = f"{drawn}  epoch {epoch}/{settings.NUM_EPOCHS}  eval_loss {loss:.5f}"
                print(f"{time.strftime('%H:%M:%S')} manual | {text}", flush=True)
            record("report", epoch=epoch, eval_loss=loss if finite else None, seconds=round(runtime, 1),
                   training_iteration=epoch, decision="CONTINUE")

    record("trial_started", config=hyperparameters)
    try:
        hpo.fine_tune(hyperparameters, settings, *hpo.load_squad(settings), callbacks=[PrintReport()])
    except Exception as error:
        record("trial_ended", error=f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    record("trial_ended", error=None)
    if not FIRST:
        return
    if not reports:
        raise InputError(f"{drawn}: diverged, no epoch has a finite eval_loss; use a lower learning rate")
    loss, epoch = min(reports)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", help="learning rate")
    parser.add_argument("--bs", help="per-device batch size")
    parser.add_argument("--wd", help="weight decay")
    parser.add_argument("--best", metavar="RUN_FOLDER", help="instead: the best that a search has found")
    parser.add_argument("--epochs", help="epochs (default: NUM_EPOCHS)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the model of the best epoch here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"append the result here ({', '.join(COLUMNS)})")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record the training in this events.jsonl")
    a = parser.parse_args()
    by_hand = (a.lr, a.bs, a.wd)
    if (None in by_hand) if a.best is None else (by_hand != (None, None, None)):
        parser.error("give --lr, --bs and --wd, or --best RUN_FOLDER")
    value, problems = {}, []
    limits_of = {"lr": "LR_LOWER", "bs": "BS_CHOICES", "wd": "WD_CHOICES", "epochs": "NUM_EPOCHS"}
    for option, name in limits_of.items():
        text = getattr(a, option)
        with check_inputs.told(problems, f"--{option}", text):
            value[option] = None if text is None else check_inputs.read_number(name, text)
    for option, path in (("csv", a.csv), ("record", a.record)):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            problems.append(f"--{option}={str(path)!r}: not a file in an existing folder; give one")
    try:
        if problems:
            raise InputError("\n".join(problems))
        drawn, environ = {"lr": value["lr"], "per_device_bs": value["bs"], "wd": value["wd"]}, os.environ
        if a.best is not None:
            found, environ = read_run.lowest_losses(a.best), read_run.settings_of(a.best) | os.environ
            if not found:
                why = "no results of a search in this folder; give one such as runs/<jobid>"
                raise InputError(f"--best={a.best!r}: {why}")
            drawn = found[0][1]
        settings = check_inputs.check(environ, search=False)
        settings.NUM_EPOCHS = value["epochs"] or settings.NUM_EPOCHS
        settings.WORKERS_PER_TRIAL = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
        with saved_model.NewModel(a.save, a.best) if a.save else contextlib.nullcontext() as new_model:
            train(drawn, settings, a.csv, a.record, new_model)
    except InputError as error:
        if FIRST:
            print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
