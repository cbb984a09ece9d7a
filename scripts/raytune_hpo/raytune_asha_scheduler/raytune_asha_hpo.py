#!/usr/bin/env python3
"""Hyperparameter search with Ray Tune's ASHA: BLOOM-560M fine-tuned on SQuAD, several trials at once.

    cd experiments/raytune/scheduler/asha
    bash head_node_raytune_asha_hpo.slurm                     # laptop: this machine is the whole cluster
    sbatch head_node_raytune_asha_hpo.slurm                   # cluster, or the sandbox of mini_slurm.sh
    LR_UPPER=1e-3 BS_CHOICES="2 4" sbatch head_node_raytune_asha_hpo.slurm          # another search space

The head script starts Ray, then runs this file. By hand, with ds_config.json in its folder or in one above:
    ray start --head --num-cpus=4 --resources='{"trial_slot": 1}'           # room for one trial at a time
    WORKERS_PER_TRIAL=1 python raytune_asha_hpo.py --run-dir results      # two workers need two GPUs, or none
"""

import argparse
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import ray  # torch, deepspeed and transformers are imported where they are used: in the training processes
from ray import train, tune
from ray.tune.integration.ray_train import TuneReportCallback as ForwardReportsToTune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

# ---- Settings: environment variables; the head script first has check_inputs.py check them -----------------
VARIABLES = {  # name: (default, kind; in brackets: several, separated by spaces; meaning)
    "LR_LOWER": ("5e-6", float, "learning rate, lower end of the log-uniform range"),
    "LR_UPPER": ("2e-4", float, "learning rate, upper end"),
    "BS_CHOICES": ("1 2", [int], "per-device batch sizes"),
    "WD_CHOICES": ("0.0 0.01", [float], "weight decays"),
    "WORKER_NODES": ("1", int, "worker-node jobs to submit"),
    "NUM_SAMPLES": ("12", int, "trials"),
    "NUM_EPOCHS": ("5", int, "epochs of a trial that is never stopped (ASHA's max_t)"),
    "MODEL_NAME": ("bigscience/bloom-560m", str, "model: hub id or local folder"),
    "SQUAD_DATA": ("rajpurkar/squad", str, "data: hub id, or folder of SQuAD's JSON or {train,dev}.jsonl"),
    "TRAIN_SAMPLES": ("1000", int, "training questions, drawn with SEED"),
    "EVAL_SAMPLES": ("100", int, "validation questions, drawn with SEED"),
    "CHAT_TEMPLATE": ("0", int, "1: prompts in the chat template of the model's tokenizer"),
    "WORKERS_PER_TRIAL": ("2", int, "training processes of a trial (W)"),
    "CPUS_PER_WORKER": ("2", int, "CPUs of each (Cw)"),
    "GPUS_PER_WORKER": ("1", float, "GPUs of each (Gw), 0.5: two share one; without GPUs 0, unless set"),
    "PRECISION": ("auto", str, "bf16, fp16, fp32; auto: bf16 if the GPU computes it, else fp16; CPUs fp32"),
    "MEMORY_PER_WORKER": ("auto", str, "GiB of memory of each (Mw); auto: estimated from the model's size"),
    "TIME_BUDGET": ("0", int, "seconds, then no trial starts and each ends at its next report; 0: none"),
    "WORKER_DEADLINE": ("7200", int, "seconds to wait for a worker node before giving up"),
    "SEED": ("42", int, "seed of the draws, of shuffling and of training"),
}

def read_settings(environ):
    """The variables as attributes. Raises ValueError for a text that is not a number."""
    read = lambda text, kind: [kind[0](x) for x in text.split()] if isinstance(kind, list) else kind(text)
    return argparse.Namespace(**{n: read(environ.get(n, d), kind) for n, (d, kind, _) in VARIABLES.items()})

# ---- SEARCH SPACE AND SCHEDULER: edit here -----------------------------------------------------------------
def search_space(s):
    """What each trial draws. Fields of TrainingArguments fit, too: "warmup_ratio": tune.uniform(0, 0.2)"""
    return {
        "train_loop_config": {
            "lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER),  # 5e-6 .. 2e-4: small changes matter at low rates
            "per_device_bs": tune.choice(s.BS_CHOICES),  # 1, 2: samples per worker and step
            "wd": tune.choice(s.WD_CHOICES),  # 0.0, 0.01: off, or AdamW's usual value
        }
    }

def scheduler(s):
    """ASHA: at epochs 1, 2, 4 (the rungs) a trial goes on only if it is in the better half seen there."""
    return ASHAScheduler(
        metric="eval_loss",
        mode="min",
        grace_period=1,  # epochs every trial may train
        max_t=s.NUM_EPOCHS,  # epochs no trial trains beyond
        reduction_factor=2,  # keep the best 1/2 so far at each rung
    )

def search_algorithm(s):
    return BasicVariantGenerator(random_state=s.SEED)  # draws at random

TRAINING_ARGUMENT = {  # our names of hyperparameters: the Trainer's
    "lr": "learning_rate", "per_device_bs": "per_device_train_batch_size", "wd": "weight_decay",
    "warmup_ratio": "warmup_steps"}  # below 1 the Trainer reads it as a share of all steps

# ---- Data: SQuAD questions -> token ids, once per run ------------------------------------------------------
def load_squad(s):
    """(train, validation): lists of TRAIN_SAMPLES and EVAL_SAMPLES rows as encode() makes them."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
    def encoded(rows, count):
        return [encode(row["context"], row["question"], answers(row)[0], tokenizer, chat=s.CHAT_TEMPLATE)
                for row in draw(rows, count, s.SEED)]
    train_rows, eval_rows = read_splits(s.SQUAD_DATA)
    return encoded(train_rows, s.TRAIN_SAMPLES), encoded(eval_rows, s.EVAL_SAMPLES)

draw = lambda rows, count, seed: [rows[i] for i in random.Random(seed).sample(range(len(rows)), count)]

def answers(row):  # all that are right; a text alone is one
    return [texts] if isinstance(texts := row["answers"]["text"], str) else texts

def read_splits(data):
    """(training, validation): all rows, in the hub's form: context, question, answers {text: [...]}."""
    folder = Path(data)
    if (folder / "train.jsonl").exists():
        return neighbour("own_data").read_splits(folder)
    if folder.is_dir():
        return read_file(folder / "train-v1.1.json"), read_file(folder / "dev-v1.1.json")
    from datasets import load_dataset
    return load_dataset(data, split=["train", "validation"])

def read_file(path):
    return [{"context": p["context"], "question": q["question"],
             "answers": {"text": [answer["text"] for answer in q["answers"]]}}
            for article in json.loads(path.read_text("utf-8-sig"))["data"]
            for p in article["paragraphs"] for q in p["qas"]]

def encode(context, question, answer, tokenizer, max_length=512, chat=False):
    """One question as a causal language model learns it: {"input_ids": [n], "labels": [n]}, n <= max_length.

    input_ids = prompt + answer + end-of-sequence. labels: -100 (ignored) on the prompt, else the same; the
    model shifts them. Of too long a text the context loses its end, then the question its start, then the
    answer its end. It begins with what the tokenizer puts before any text: Llama's <s>, of BLOOM nothing."""
    ask = f"\nQuestion: {question}\nAnswer:"
    body, ask = ("", question) if context is None else (f"Context: {context}", ask)
    if chat:
        body, ask = neighbour("own_data").in_chat_template(body, ask, tokenizer)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    start = (whole := tokenizer("a")["input_ids"])[: whole.index(ids("a")[0])]
    go_on = lambda text: ids("a" + text)[len(ids("a")) :] if text[:1].isspace() else ids(text)
    body, ask, target = map(go_on, (body, ask, " " + answer.strip()))
    body = body[len(start) :] if body[: len(start)] == start else body  # a chat template may have it, too
    target = [*target[: max_length - len(start) - 2], tokenizer.eos_token_id]
    room = max_length - len(start) - len(target)  # >= 1, so at least one prompt token precedes the answer
    ask = ask[-room:]
    prompt = start + body[: room - len(ask)] + ask
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}

def collate(rows, accepted=("logits_to_keep",)):
    """Rows -> one batch: input_ids, attention_mask [b, n]; labels [b, k]; what else the model accepts.
    Rows are padded on the left, only to the longest of the batch (n). Logits are computed for the last k
    positions alone, where the labels are: BLOOM's output layer has nearly half of its parameters."""
    import torch
    def padded(values, fill):
        return torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, values)], True, fill, padding_side="left")
    labels = padded([row["labels"] for row in rows], -100)
    mask = padded([[1] * len(row["input_ids"]) for row in rows], 0)  # 0: padding
    batch = {"input_ids": padded([r["input_ids"] for r in rows], 0), "attention_mask": mask, "labels": labels}
    if "position_ids" in accepted:  # such as GPT-2: its positions count from the first token
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        keep = 1 + int((labels != -100).sum(1).max())
        batch |= {"labels": labels[:, -keep:], "logits_to_keep": keep}
    return batch

# ---- Training: one configuration, with or without Ray ------------------------------------------------------
DS_CONFIG = next((p for d in Path(__file__).absolute().parents for p in d.glob("ds_config.json")), None)

def fine_tune(drawn, s, train_rows, eval_rows, callbacks=()):
    """Trains one configuration (numbers may be numpy's), in each process of a data-parallel group or in one.
    After each epoch callbacks get the metric eval_answer_loss: the mean over all answer tokens, in nats."""
    import torch
    import transformers
    gpu = torch.cuda.is_available() and s.GPUS_PER_WORKER > 0
    half = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = s.PRECISION if s.PRECISION != "auto" else half if gpu else "fp32"
    ds_config = json.loads(DS_CONFIG.read_text()) if DS_CONFIG else None  # without the file no DeepSpeed
    if library_fixes := neighbour("library_fixes"):
        library_fixes.before_training(gpu, ds_config)
    fields = {
        "num_train_epochs": s.NUM_EPOCHS, "seed": s.SEED, "deepspeed": ds_config, "use_cpu": not gpu,
        "bf16": precision == "bf16", "fp16": precision == "fp16", "dataloader_pin_memory": gpu,
        "eval_strategy": "epoch", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "output_dir": "/tmp", "remove_unused_columns": False, "logging_nan_inf_filter": False,
    }
    named = {TRAINING_ARGUMENT.get(n, n): x.tolist() if hasattr(x, "tolist") else x for n, x in drawn.items()}
    args = transformers.TrainingArguments(**(fields | named))  # before the model: ZeRO-3 splits it
    torch.manual_seed(s.SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        s.MODEL_NAME, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    accepted = tuple(inspect.signature(model.forward).parameters)
    trainer = transformers.Trainer(
        model, args, train_dataset=train_rows, eval_dataset=eval_rows, callbacks=list(callbacks),
        data_collator=lambda rows: collate(rows, accepted),
        preprocess_logits_for_metrics=answer_losses,
        compute_metrics=lambda p: {"answer_loss": p.predictions[:, 0].sum() / p.predictions[:, 1].sum()},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    (library_fixes or transformers.Trainer).train(trainer, resume_from_checkpoint=args.resume_from_checkpoint)

def answer_losses(logits, labels):
    """[b, k, vocabulary], [b, k] -> [b, 2]: each row's loss, summed over its answer tokens; their number."""
    import torch
    logits = next(x for x in logits if getattr(x, "ndim", 0) == 3) if isinstance(logits, tuple) else logits
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, labels, reduction="none")
    return torch.stack([losses.sum(1), (labels != -100).sum(1)], dim=1).double()

# ---- Trial: fine_tune in W Ray Train workers; each evaluation is reported to Tune --------------------------
def train_loop_per_worker(config):
    """What each of the W workers of a trial runs. config: the drawn train_loop_config, settings and data."""
    import torch
    from transformers import TrainerCallback
    s, data = config.pop("settings"), config.pop("data")
    torch.set_num_threads(min(s.CPUS_PER_WORKER, len(os.sched_getaffinity(0))))
    if ray.get_gpu_ids() and s.GPUS_PER_WORKER < 1:  # others share it; CUDA itself takes some 600 MB
        torch.cuda.set_per_process_memory_fraction(s.GPUS_PER_WORKER - 6e8 / torch.cuda.mem_get_info()[1])
    class TuneReportCallback(TrainerCallback):  # a report after each evaluation, so ASHA's rungs are epochs
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            loss = metrics["eval_answer_loss"]  # the Trainer's own eval_loss is a mean over batches
            loss = loss if math.isfinite(loss) else math.nan  # no rung counts a NaN; the trial ends
            train.report({"eval_loss": loss, "epoch": float(round(state.epoch))})
    fine_tune(config, s, *ray.get(data), [TuneReportCallback(), *config.pop("callbacks", [])])

def run_trial(config, s, data, scaling, run_dir):
    """One trial: Ray Train starts the workers of `scaling` and passes on their reports."""
    from ray.train.torch import TorchTrainer
    TorchTrainer(
        train_loop_per_worker,
        train_loop_config=config["train_loop_config"] | {"settings": s, "data": data[0]},
        scaling_config=scaling,
        run_config=train.RunConfig(name=tune.get_context().get_trial_id(), storage_path=f"{run_dir}/train",
                                   callbacks=[ForwardReportsToTune()]),
    ).fit()

# ---- Search ------------------------------------------------------------------------------------------------
def neighbour(name):
    """A file beside this one as a module, or None. Its first lines say what is lost without it."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None

def say(text, log=sys.stdout):  # one line of the log, also where trial_log.py has sent sys.stdout elsewhere
    print(f"{time.strftime('%H:%M:%S')} search | {text}", file=log, flush=True)

def search(s, run_dir):
    """Runs all trials -> Tune's results, one for each trial."""
    rows, resources = load_squad(s), join_cluster(s)  # workers may still be on their way
    gpus = s.GPUS_PER_WORKER if "GPU" in resources else 0
    slots, where = int(resources["trial_slot"]), "GPUs" if gpus else "CPUs"
    say(f"cluster: {slots} trial(s) at once, {s.WORKERS_PER_TRIAL} workers each, on {where}")
    data = [ray.put(rows)]  # once, for all trials; in a list, or Tune would hand on the rows
    scaling = train.ScalingConfig(  # of each trial; worker_capacity.py tells how many such fit on a node
        num_workers=s.WORKERS_PER_TRIAL,  # W
        resources_per_worker={"CPU": s.CPUS_PER_WORKER, "GPU": gpus},  # Cw, Gw
        use_gpu=gpus > 0, placement_strategy="STRICT_PACK",  # all on one node
    )
    trial = tune.with_parameters(run_trial, s=s, data=data, scaling=scaling, run_dir=run_dir)
    trial = tune.with_resources(trial, {"trial_slot": 1})  # Ray Train itself asks for its CPUs and GPUs
    tune_config = tune.TuneConfig(
        num_samples=s.NUM_SAMPLES, scheduler=scheduler(s), search_alg=search_algorithm(s),
        time_budget_s=s.TIME_BUDGET or None,
        trial_name_creator=lambda trial: f"TorchTrainer_{trial.trial_id}", trial_dirname_creator=str)
    run_config = tune.RunConfig(
        name="tune", storage_path=str(run_dir), verbose=1, callbacks=[],
        stop=lambda _, report: math.isnan(report["eval_loss"]) or report["epoch"] >= s.NUM_EPOCHS,
        progress_reporter=tune.CLIReporter(max_report_frequency=30, print_intermediate_tables=True))
    space, make_tuner = search_space(s), tune.Tuner
    if fast_trials := neighbour("fast_trials"):  # takes the place of run_trial
        trial = fast_trials.warm(train_loop_per_worker, s, data[0], scaling, run_dir, tune_config, run_config)
    if trial_log := neighbour("trial_log"):
        trial_log.attach(s, run_dir, space, tune_config, run_config)
    if run_state := neighbour("run_state"):
        make_tuner = run_state.attach(s, run_dir, tune_config, run_config)
    return make_tuner(trial, param_space=space, tune_config=tune_config, run_config=run_config).fit()

def join_cluster(s):
    """The resources of the Ray cluster, once a worker node is there. Each node offers a `trial_slot` for each
    trial that fits on it (ray start --resources): as many trials as there are slots run at once."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the boxed table of trials
    address = os.environ.get("RAY_ADDRESS", "auto")  # Ray Train's helpers ask for it, too
    ray.init(address, log_to_driver=False, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
    deadline = time.monotonic() + s.WORKER_DEADLINE
    while "trial_slot" not in (resources := ray.cluster_resources()):
        if "CPU" in resources or time.monotonic() > deadline:  # a node without slots is there, or none came
            sys.exit("ERROR: no node offers a trial_slot; start Ray as the top of raytune_asha_hpo.py says")
        time.sleep(0.1)
    return resources

def best_report(results, s):
    """The lowest eval_loss of all reports of trials without error. Ends the program if there is none."""
    reports = [report for result in results if not result.error and "eval_loss" in result.metrics_dataframe
               for report in result.metrics_dataframe.dropna(subset="eval_loss").to_dict("records")]
    if not reports or len(results) < s.NUM_SAMPLES and not s.TIME_BUDGET:
        sys.exit(f"ERROR: {len(results)} of {s.NUM_SAMPLES} trials ran, {results.num_errors} failed, "
                 f"{len(reports)} finite losses were reported")
    best = min(reports, key=lambda report: report["eval_loss"])
    drawn = {"train_loop_config": {n.split("/", 2)[2]: best[n] for n in best if "/train_loop_config/" in n}}
    return {n: best[n] for n in ("eval_loss", "epoch", "time_total_s")} | {"config": drawn}

def main():
    parser = argparse.ArgumentParser(usage=f"{sys.argv[0]} --run-dir DIR\n\n{__doc__}")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", required=True, help="folder for the results")
    run_dir, s, log = parser.parse_args().run_dir.absolute(), read_settings(os.environ), sys.stdout
    print(f"Best Trial Result:\n{best_report(search(s, run_dir), s)}", file=log, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # all is written; Ray's own shutdown takes 1.6 s, and nodes would wait
