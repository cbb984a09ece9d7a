#!/usr/bin/env python3
"""Was it luck? Trains the best configurations of a search again, each with several seeds, and compares them.

The trials run on the slots of a cluster like those of a search, but none is stopped early. A seed changes the
order of the training questions; the questions themselves are those of the search.

    cd experiments/raytune/scheduler/asha
    export SEARCH_SCRIPT=../../../../scripts/raytune_hpo/raytune_seeds/raytune_seeds_hpo.py
    REPEAT=runs/12345 SEEDS=3 NUM_SAMPLES=9 sbatch head_node_raytune_asha_hpo.slurm   # the best three

Further variables: REPEAT, the run folder of the search; SEEDS, how many (default 3): SEED, SEED + 1, ...
NUM_SAMPLES / SEEDS is the number of configurations. All else must be as it was in that search.
"""

import math
import os
import statistics
import sys
from pathlib import Path

import rooms  # noqa: F401  # isort: skip

import raytune_asha_hpo as lesson
import run_state
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from read_run import events_of, lowest_losses, settings_of, show

SAME = ("MODEL_NAME", "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "CHAT_TEMPLATE", "NUM_EPOCHS",
        "WORKERS_PER_TRIAL", "PRECISION", "SEED")  # what a loss depends on, beside the hyperparameters


def search_again(best, seeds):
    """Changes the lesson: these configurations in place of draws, each with its seeds, and no early stopping."""
    shipped = lesson.search_space

    def search_space(s):
        space = shipped(s)
        space["train_loop_config"]["seed"] = tune.randint(0, 2**31)
        return space

    lesson.search_space = search_space
    lesson.search_algorithm = lambda s: BasicVariantGenerator(points_to_evaluate=[
        {"train_loop_config": config | {"seed": s.SEED + i}} for _, config in best for i in range(seeds)])
    lesson.scheduler = lambda s: FIFOScheduler()


# ---- What is trained again ---------------------------------------------------------------------------------
def chosen(s, run_dir):
    """What asked() gives; of a run that is continued, what it gave then."""
    for event in events_of(run_dir, "repeats"):
        return event["best"], event["seeds"]
    best, seeds = asked(s)
    run_dir.mkdir(parents=True, exist_ok=True)
    run_state.record(run_dir, "repeats", best=best, seeds=seeds)
    return best, seeds


def asked(s):
    """([(loss, configuration)] of the best trials of REPEAT, number of seeds). Ends the script on bad input."""
    text, folder = os.environ.get("SEEDS", "3"), os.environ.get("REPEAT", "")
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        sys.exit(f"ERROR: SEEDS={text!r}: set a whole number from 1 to 1000")
    seeds = int(text)
    if s.NUM_SAMPLES % seeds:
        sys.exit(f"ERROR: NUM_SAMPLES='{s.NUM_SAMPLES}': set a multiple of SEEDS={seeds}, such as {3 * seeds}")
    if not (saved := settings_of(folder)):
        sys.exit(f"ERROR: REPEAT={folder!r}: not the run folder of a search; set one such as runs/12345")
    then = vars(lesson.read_settings(saved))
    for name in SAME:
        if then[name] != getattr(s, name):
            given, searched = str(getattr(s, name)), str(then[name])
            sys.exit(f"ERROR: {name}={given!r}: the search in {folder} had {searched!r}; set that")
    found = lowest_losses(folder)
    if len(found) < s.NUM_SAMPLES // seeds:
        sys.exit(f"ERROR: NUM_SAMPLES='{s.NUM_SAMPLES}': {folder} has {len(found)} trials with a loss; set at most "
                 f"{len(found) * seeds}")  # fmt: skip
    return found[: s.NUM_SAMPLES // seeds], seeds


# ---- What it shows -----------------------------------------------------------------------------------------
def compare(best, seeds, again):
    """Lines: each configuration with its losses; does the order hold, and is the lead larger than chance?

    best: [(loss in the search, configuration)]; again: [(loss, configuration with its seed)].
    """
    losses = [[x for x, other in again if other == config | {"seed": other["seed"]}]
              or [math.inf] for _, config in best]  # if it diverged with every seed
    means = [statistics.mean(each) for each in losses]
    spreads = [statistics.stdev(each) if len(each) > 1 else math.nan for each in losses]
    yield f"{len(best)} configuration(s), {seeds} seed(s) each; lowest eval_loss:"
    yield "in the search  mean     spread   lowest   highest"
    for (loss, config), mean, spread, each in zip(best, means, spreads, losses, strict=True):
        drawn = " ".join(f"{name}={show(x)}" for name, x in config.items())
        yield f"{loss:<13.5f}  {mean:<7.5f}  {spread:<7.5f}  {min(each):<7.5f}  {max(each):<7.5f}  {drawn}"
    if len(best) > 1:
        order = sorted(range(len(best)), key=means.__getitem__)
        ranks = ", ".join(str(1 + i) for i in order)
        yield f"order by the mean: {ranks}{' as in the search' if order == sorted(order) else ', not as in the search'}"
        lead, spread = means[order[1]] - means[order[0]], max(spreads[order[0]], spreads[order[1]])
        if seeds > 1:
            than = "more" if lead > spread else "less"
            yield f"the first two means are {lead:.5f} apart, {than} than a change of the seed makes ({spread:.5f})"


def main():
    lesson.__doc__ = __doc__
    if "--run-dir" not in sys.argv[:-1]:
        return lesson.main()  # says how to call it
    run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    best, seeds = chosen(lesson.read_settings(os.environ), run_dir)
    search_again(best, seeds)
    lesson.main()
    for line in compare(best, seeds, lowest_losses(run_dir)):
        lesson.say(f"seeds: {line}")


if __name__ == "__main__":
    main()
