#!/usr/bin/env python3
"""Hyperparameter search with Ray Tune's ASHA: BLOOM-560M fine-tuned on SQuAD, several trials at once.

Read it from top to bottom: settings, search space, data, training, trial, search.

    cd experiments/raytune/scheduler/asha
    bash head_node_raytune_asha_hpo.slurm                         # laptop: this machine is the whole cluster
    sbatch head_node_raytune_asha_hpo.slurm                       # cluster, or the sandbox of tests/mini_slurm.sh
    LR_UPPER=1e-3 BS_CHOICES="2 4" sbatch head_node_raytune_asha_hpo.slurm        # another search space

The head script starts Ray, then runs this file. Without the head script, in any folder that has ds_config.json:

    ray start --head --num-cpus=4 --resources='{"trial_slot": 1}'             # room for one trial at a time
    python raytune_asha_hpo.py --run-dir results
"""

import argparse
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import ray
from ray import train, tune
from ray.tune.integration.ray_train import TuneReportCallback as ForwardReportsToTune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

# torch, deepspeed and transformers are imported where training happens; the search itself does without them.

# ---- Settings: environment variables. The head script has them checked beforehand (check_inputs.py). --------
VARIABLES = {  # name: (default, how its text is read, meaning)
    "LR_LOWER": ("5e-6", float, "learning rate, lower end of the log-uniform range"),
    "LR_UPPER": ("2e-4", float, "learning rate, upper end"),
    "BS_CHOICES": ("1 2", lambda text: [int(word) for word in text.split()], "per-device batch sizes"),
    "WD_CHOICES": ("0.0 0.01", lambda text: [float(word) for word in text.split()], "weight decays"),
    "WORKER_NODES": ("1", int, "worker-node jobs to submit"),
    "NUM_SAMPLES": ("12", int, "trials"),
    "NUM_EPOCHS": ("5", int, "epochs of a trial that is never stopped (ASHA's max_t)"),
    "MODEL_NAME": ("bigscience/bloom-560m", str, "model: hub id or local folder"),
    "SQUAD_DATA": ("rajpurkar/squad", str, "data: hub id, or folder with train-v1.1.json and dev-v1.1.json"),
    "TRAIN_SAMPLES": ("1000", int, "training questions, drawn with SEED"),
    "EVAL_SAMPLES": ("100", int, "validation questions, drawn with SEED"),
    "WORKERS_PER_TRIAL": ("2", int, "training processes of a trial (W)"),
    "CPUS_PER_WORKER": ("2", int, "CPUs of each (Cw)"),
    "GPUS_PER_WORKER": ("1", int, "GPUs of each (Gw); 0 on nodes without GPUs, unless you set it"),
    "WORKER_DEADLINE": ("7200", int, "seconds to wait for a worker node before giving up"),
    "SEED": ("42", int, "drawing hyperparameters and data, shuffling, training"),
}


def read_settings(environ):
    """The variables above as attributes. Raises ValueError for a text that is not a number."""
    return SimpleNamespace(**{name: read(environ.get(name, text)) for name, (text, read, _) in VARIABLES.items()})


# ---- SEARCH SPACE AND SCHEDULER: edit here ------------------------------------------------------------------
def search_space(s):
    """What each trial draws. Any further key that is a field of transformers.TrainingArguments takes effect
    as it is, for example:  "warmup_ratio": tune.uniform(0.0, 0.2),
    """
    return {
        "train_loop_config": {
            "lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER),  # 5e-6 .. 2e-4: too slow .. the edge of diverging
            "per_device_bs": tune.choice(s.BS_CHOICES),  # 1, 2: samples per worker and step
            "wd": tune.choice(s.WD_CHOICES),  # 0.0, 0.01: off, or AdamW's usual value
        }
    }


def scheduler(s):
    """ASHA: at epochs 1, 2, 4 (the rungs) a trial goes on only if it is in the better half seen at that rung."""
    return ASHAScheduler(
        metric="eval_loss",
        mode="min",
        grace_period=1,  # epochs every trial may train
        max_t=s.NUM_EPOCHS,  # epochs no trial trains beyond
        reduction_factor=2,  # keep the best 1/2 at each rung
    )


def sampler(s):
    """Who draws from the search space: chance. No result changes what a later trial draws."""
    return BasicVariantGenerator(random_state=s.SEED)


# Names of our own in the search space -> fields of transformers.TrainingArguments. All other keys are such fields.
TRAINING_ARGUMENT = {
    "lr": "learning_rate",
    "per_device_bs": "per_device_train_batch_size",
    "wd": "weight_decay",
    "warmup_ratio": "warmup_steps",  # transformers 5 has one field: below 1 it is a share of all steps
}


# ---- Data: SQuAD questions -> token ids, once per run -------------------------------------------------------
MAX_LENGTH = 512  # tokens of prompt + answer + end-of-sequence; longer contexts are cut (see encode)


def load_squad(s):
    """(train, validation): lists of TRAIN_SAMPLES and EVAL_SAMPLES rows as encode() makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
    if Path(s.SQUAD_DATA).is_dir():
        splits = [read_squad_json(Path(s.SQUAD_DATA, file)) for file in ("train-v1.1.json", "dev-v1.1.json")]
    else:
        from datasets import load_dataset

        splits = load_dataset(s.SQUAD_DATA, split=["train", "validation"])
    drawn = []
    for rows, count in zip(splits, (s.TRAIN_SAMPLES, s.EVAL_SAMPLES), strict=True):
        rows = [rows[i] for i in random.Random(s.SEED).sample(range(len(rows)), count)]
        drawn.append([encode(r["context"], r["question"], r["answers"]["text"][0], tokenizer) for r in rows])
    return tuple(drawn)


def read_squad_json(path):
    """A SQuAD v1.1 file as rows of the hub's form: context, question, answers {text: [...]}."""
    return [
        {"context": p["context"], "question": q["question"], "answers": {"text": [a["text"] for a in q["answers"]]}}
        for article in json.loads(path.read_text(encoding="utf-8-sig"))["data"]
        for p in article["paragraphs"]
        for q in p["qas"]
    ]


def encode(context, question, answer, tokenizer, max_length=MAX_LENGTH):
    """One question as a causal language model learns it: {"input_ids": [n], "labels": [n]}, n <= max_length.

    input_ids = prompt + answer + end-of-sequence. labels, in the same positions: -100 (ignored) on the
    prompt, the token itself on the answer and the end-of-sequence. The model shifts them by one.

    If that is longer than max_length the prompt gives way, never the answer: first the end of the context is
    cut, then the start of the question. Only an answer that alone fills max_length - 1 tokens loses its end.
    """

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    target = [*ids(" " + answer.strip())[: max_length - 2], tokenizer.eos_token_id]
    body, ask = ids(f"Context: {context}"), ids(f"\nQuestion: {question}\nAnswer:")
    room = max_length - len(target)  # >= 1, so at least one prompt token precedes the answer
    ask = ask[-room:]
    prompt = body[: room - len(ask)] + ask
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def collate(rows, pad_id, trim_logits=True):
    """Rows -> one batch: input_ids, attention_mask, labels, and logits_to_keep.

    Two things save most of the work. Rows are padded on the left and only to the longest of the batch (n),
    not to MAX_LENGTH. And since labels stand only at the right end, the model computes logits for the last k
    positions alone: BLOOM's output layer has 250,880 words, nearly half of its parameters.

    Shapes: input_ids, attention_mask [b, n]; labels [b, k], k = longest answer + 1 (without trim_logits [b, n]).
    """
    import torch

    n = max(len(row["input_ids"]) for row in rows)
    ids, mask, labels = (torch.full((len(rows), n), fill) for fill in (pad_id, 0, -100))
    for i, row in enumerate(rows):
        start = n - len(row["input_ids"])
        ids[i, start:] = torch.tensor(row["input_ids"])
        labels[i, start:] = torch.tensor(row["labels"])
        mask[i, start:] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if trim_logits:
        keep = min(n, 1 + max(sum(label != -100 for label in row["labels"]) for row in rows))
        batch |= {"labels": labels[:, -keep:], "logits_to_keep": keep}
    return batch


# ---- Training: one configuration, with or without Ray -------------------------------------------------------
DS_CONFIG = next((d / "ds_config.json" for d in Path(__file__).resolve().parents if (d / "ds_config.json").is_file()), None)


def answer_losses(logits, labels):
    """[b, k, vocabulary], [b, k] -> [b, 2]: the loss of each row, summed over its answer tokens (nats); how many."""
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(1), (labels[:, 1:] != -100).sum(1)], dim=1)


def answer_loss(prediction):
    """The exact mean over all answer tokens. The Trainer's own eval_loss averages the means of batches."""
    loss_sum, tokens = prediction.predictions.astype("float64").sum(axis=0)
    return {"answer_loss": loss_sum / tokens}


def fine_tune(hyperparameters, s, train_rows, eval_rows, callbacks=(), start_from=None, **more):
    """Trains one configuration for NUM_EPOCHS epochs; after each, callbacks get the metric "eval_answer_loss".

    Runs in every process of a data-parallel group, or in a single process. raytune_pbt_hpo.py gives start_from (a
    checkpoint's folder) and more fields of TrainingArguments.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    gpu = torch.cuda.is_available() and s.GPUS_PER_WORKER > 0
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it has found no GPU
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    ds_config = json.loads(DS_CONFIG.read_text(encoding="utf-8")) if DS_CONFIG else None
    if ds_config and not gpu:
        ALL_OPS.pop("deepspeed_shm_comm", None)  # else DeepSpeed compiles a kernel; gloo does the same work
        ds_config["zero_optimization"] |= {"overlap_comm": False, "contiguous_gradients": False}  # GPUs gain, CPUs copy
    fields = {TRAINING_ARGUMENT.get(name, name): value for name, value in hyperparameters.items()}
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {"output_dir": scratch, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        # ZeRO-3 splits the model as it is loaded: TrainingArguments and the process group come before the model.
        arguments = TrainingArguments(
            deepspeed=ds_config,
            fp16=gpu,  # V100: fp16 in hardware, bf16 only emulated
            use_cpu=not gpu,
            seed=s.SEED,
            eval_strategy="epoch",
            per_device_eval_batch_size=8,  # does not change the loss
            dataloader_pin_memory=gpu,
            disable_tqdm=True,
            remove_unused_columns=False,
            **({"num_train_epochs": s.NUM_EPOCHS} | quiet | more | fields),
        )
        if ds_config and not gpu:
            deepspeed.init_distributed(dist_backend="gloo")
        torch.manual_seed(s.SEED)
        model = AutoModelForCausalLM.from_pretrained(
            s.MODEL_NAME, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        trim_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=functools.partial(collate, pad_id=pad_id, trim_logits=trim_logits),
            preprocess_logits_for_metrics=answer_losses,
            compute_metrics=answer_loss,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=start_from)
        finally:  # else a DeepSpeed engine, with its model, lives as long as the process
            if hasattr(trainer.model_wrapped, "destroy"):
                trainer.model_wrapped.destroy()
            trainer.accelerator.free_memory()


# ---- Trial: fine_tune in W Ray Train workers; each evaluation is reported to Tune ---------------------------
def train_loop_per_worker(config):
    """What each of the W workers of a trial runs. config: the drawn train_loop_config, settings and data."""
    import torch
    from transformers import TrainerCallback

    s, data, report = (config.pop(name) for name in ("settings", "data", "report"))
    torch.set_num_threads(min(s.CPUS_PER_WORKER, len(os.sched_getaffinity(0))))
    if ray.get_gpu_ids() and not torch.cuda.is_available():
        raise RuntimeError("PyTorch cannot use this worker's GPU; check: python -c 'import torch; torch.zeros(1).cuda()'")

    class TuneReportCallback(TrainerCallback):
        """One report after each evaluation, so Tune's training_iteration is the epoch and ASHA's rungs are epochs."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            loss = metrics["eval_answer_loss"]
            # An infinite loss is reported as NaN: Tune then ends the trial, and no rung counts it.
            report({"eval_loss": loss if math.isfinite(loss) else math.nan, "epoch": float(round(state.epoch))})

    fine_tune(config, s, *ray.get(data), callbacks=[TuneReportCallback()])


def run_trial(config, s, data, worker):
    """One trial: Ray Train starts W workers, and passes on what they report. Tune may end it at any report."""
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_loop_per_worker,
        train_loop_config=config["train_loop_config"] | {"settings": s, "data": data[0], "report": train.report},
        scaling_config=train.ScalingConfig(
            num_workers=s.WORKERS_PER_TRIAL,
            use_gpu="GPU" in worker,
            resources_per_worker=worker,
            placement_strategy="STRICT_PACK",  # all on one node
        ),
        run_config=train.RunConfig(
            name=tune.get_context().get_trial_id(),
            storage_path=tempfile.mkdtemp(prefix="train_"),
            callbacks=[ForwardReportsToTune()],
        ),
    ).fit()


# ---- Search -------------------------------------------------------------------------------------------------
# The one seam: modules beside this file that change the plan of a search before it starts. Each may be deleted; its
# first line says what is lost then.
NEIGHBOURS = ["fast_trials", "run_state", "trial_log"]


METRIC_COLUMNS = {"training_iteration": "iter", "time_total_s": "total time (s)", "eval_loss": "eval_loss"}


def say(text):
    """One line of the log, with time and role."""
    print(f"{time.strftime('%H:%M:%S')} search | {text}", flush=True)


def search(s, run_dir):
    """Runs all trials and prints the best result. -> exit status"""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the boxed table of trials
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = load_squad(s)
    address = os.environ.get("RAY_ADDRESS", "auto")
    # With two Rays on a node, Ray Train's helper processes must know which of them is theirs.
    environment = {} if address == "auto" else {"RAY_ADDRESS": address}
    ray.init(address, log_to_driver=False, runtime_env={"env_vars": environment})
    data = ray.put(rows)
    deadline = time.monotonic() + s.WORKER_DEADLINE
    while not (resources := ray.cluster_resources()).get("trial_slot"):
        if time.monotonic() > deadline:
            sys.exit(f"ERROR: WORKER_DEADLINE={s.WORKER_DEADLINE}: no node that offers trial_slot joined Ray in these seconds")
        time.sleep(0.1)
    use_gpu = s.GPUS_PER_WORKER > 0 and resources.get("GPU", 0) > 0
    if s.GPUS_PER_WORKER > 0 and not use_gpu and "GPUS_PER_WORKER" in os.environ:
        sys.exit(f"ERROR: GPUS_PER_WORKER={s.GPUS_PER_WORKER}: the worker nodes have no GPU; set 0, or use GPU nodes")
    say(f"data: {len(rows[0])} training and {len(rows[1])} validation questions as tokens, from {s.SQUAD_DATA}")
    slots = int(resources["trial_slot"])
    say(f"cluster: {slots} trial(s) at once, {s.WORKERS_PER_TRIAL} workers each, on {'GPUs' if use_gpu else 'CPUs'}")

    worker = {"CPU": s.CPUS_PER_WORKER, **({"GPU": s.GPUS_PER_WORKER} if use_gpu else {})}
    trial = tune.with_parameters(run_trial, s=s, data=[data], worker=worker)
    plan = SimpleNamespace(
        make_tuner=tune.Tuner,
        trainable=tune.with_resources(trial, {"trial_slot": 1}),
        param_space=search_space(s),
        tune_config=tune.TuneConfig(
            num_samples=s.NUM_SAMPLES,
            scheduler=scheduler(s),
            search_alg=sampler(s),
            trial_name_creator=lambda trial: f"TorchTrainer_{trial.trial_id}",
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(run_dir),
            stop=lambda trial_id, result: not math.isfinite(result["eval_loss"]) or result["epoch"] >= s.NUM_EPOCHS,
            callbacks=[],
            progress_reporter=tune.CLIReporter(
                metric_columns=METRIC_COLUMNS, max_report_frequency=30, print_intermediate_tables=True
            ),
            verbose=1,
        ),
        context=SimpleNamespace(s=s, run_dir=run_dir, data=data, train_loop=train_loop_per_worker, worker=worker),
    )
    for name in NEIGHBOURS:
        if importlib.util.find_spec(name):
            importlib.import_module(name).improve(plan)
    tuner = plan.make_tuner(
        plan.trainable, param_space=plan.param_space, tune_config=plan.tune_config, run_config=plan.run_config
    )
    return summary(tuner.fit(), s)


def summary(results, s):
    """Prints the best result: the lowest eval_loss of all reports of all trials without error. -> exit status."""
    reports, failed = [], [result for result in results if result.error]
    for result in failed:
        say(f"FAILED {Path(result.path).name}: full trace in {result.path}/error.txt")
    for result in (each for each in results if not each.error and each.metrics):
        saved = result.metrics_dataframe
        if saved is None or len(saved) < result.metrics["training_iteration"]:  # Ray goes on when a disk is full
            sys.exit(f"ERROR: {result.path} lacks reports of its trial; is the disk full, or the quota reached?")
        reports += saved.to_dict("records")
    reports = [report for report in reports if math.isfinite(report["eval_loss"])]
    if not reports or len(results) < s.NUM_SAMPLES:
        sys.exit(f"ERROR: {len(results)} of {s.NUM_SAMPLES} trials ran, {len(failed)} failed, {len(reports)} reports of a loss")
    best = min(reports, key=lambda report: report["eval_loss"])
    drawn = {key.split("/")[-1]: best[key] for key in best if key.startswith("config/train_loop_config/")}
    best = {key: best[key] for key in ("eval_loss", "epoch", "time_total_s")} | {"config": {"train_loop_config": drawn}}
    print(f"Best Trial Result:\n{best}", flush=True)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", required=True, help="folder for the results")
    return search(read_settings(os.environ), parser.parse_args().run_dir.resolve())


if __name__ == "__main__":
    sys.exit(main())
