#!/usr/bin/env python3
"""What an epoch costs in three searches for the same hyperparameters, all start-up and tables included.

    python tests/benchmarks/quickstart.py            # about 6 minutes on 2 cores

- the quickstart: as many trials at once as there are CPUs, each in a process of its own;
- hyperparameter_search of transformers' Trainer with Optuna, in one process, with our rows and our collate;
- the same as its documentation writes it: padded to 512, logits for all positions.

All draw from the same ranges, train up to five epochs of the demo and stop weak trials at epochs 1, 2 and 4: Optuna by
its SuccessiveHalvingPruner. They draw other trials and train other numbers of epochs, so the time of one is compared.
Nothing else should run on the machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HEAD, REPO, SCRIPT, best_of, copy_of_the_course, events_of, load_module
from training_step import padded_to_512

DEMO = {"TRAIN_SAMPLES": "160", "EVAL_SAMPLES": "50", "LR_LOWER": "1e-4", "LR_UPPER": "5e-2",
        "CPUS_PER_WORKER": "1", "WORKERS_PER_TRIAL": "1"}  # fmt: skip


def by_transformers(padded):
    """In a process of its own: prints the epochs trained and the lowest loss."""
    import optuna
    import torch
    import transformers

    hpo, losses = load_module(SCRIPT), []
    s = hpo.read_settings(os.environ)
    train_rows, eval_rows = hpo.load_squad(s)

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", s.LR_LOWER, s.LR_UPPER, log=True),
                "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", s.BS_CHOICES),
                "weight_decay": trial.suggest_categorical("weight_decay", s.WD_CHOICES)}  # fmt: skip

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    def model(trial=None):
        torch.manual_seed(s.SEED)
        return transformers.AutoModelForCausalLM.from_pretrained(s.MODEL_NAME, dtype=torch.float32)

    arguments = transformers.TrainingArguments(
        output_dir=os.environ["TMPDIR"], num_train_epochs=s.NUM_EPOCHS, eval_strategy="epoch", save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, seed=s.SEED, remove_unused_columns=False,
        prediction_loss_only=True, use_cpu=not torch.cuda.is_available())  # fmt: skip
    trainer = transformers.Trainer(
        args=arguments, model_init=model, train_dataset=train_rows, eval_dataset=eval_rows,
        data_collator=(lambda rows: padded_to_512(hpo.collate(rows, ()))) if padded else hpo.collate)  # fmt: skip
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    trainer.hyperparameter_search(
        space, compute_objective=objective, n_trials=s.NUM_SAMPLES, direction="minimize", backend="optuna",
        pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=s.SEED))  # fmt: skip
    print(json.dumps([len(losses), min(losses)]), flush=True)


def timed(command, **options):
    """(seconds, output) of a command as a whole process."""
    start = time.monotonic()
    run = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if run.returncode:
        raise SystemExit(f"ERROR: {command} ended with exit status {run.returncode}:\n{run.stdout[-3000:]}")
    return time.monotonic() - start, run.stdout


def main():
    if sys.argv[1:]:
        return by_transformers(sys.argv[1] == "padded")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        course = copy_of_the_course(Path(folder) / "repo")
        timed([sys.executable, REPO / "scripts/demo_assets.py", demo])
        environ = os.environ | DEMO | {"MODEL_NAME": str(demo / "model"), "SQUAD_DATA": str(demo / "squad")}
        seconds, log = timed(["bash", HEAD], cwd=course, env=environ)
        epochs = len(events_of(next(course.glob("runs/*")), "report"))
        rows.append(("the quickstart", seconds, epochs, best_of(log)["eval_loss"]))
        quiet = {"TMPDIR": folder, "TRANSFORMERS_VERBOSITY": "error", "TORCHDYNAMO_DISABLE": "1"}
        for name, how in (("hyperparameter_search, our collate", "ours"), ("hyperparameter_search, padded", "padded")):
            seconds, said = timed([sys.executable, __file__, how], env=environ | quiet)
            rows.append((name, seconds, *json.loads(said.splitlines()[-1])))

    print("| | s | epochs | s an epoch | ratio | best loss |\n|---|---|---|---|---|---|")
    for name, seconds, epochs, best in rows:
        ratio = seconds / epochs / (rows[0][1] / rows[0][2])
        print(f"| {name} | {seconds:.1f} | {epochs} | {seconds / epochs:.2f} | {ratio:.2f} | {best:.4f} |")
    print(f"\n{len(os.sched_getaffinity(0))} cores, seed 42, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
