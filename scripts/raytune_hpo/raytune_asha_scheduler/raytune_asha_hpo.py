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
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ray  # torch, deepspeed and transformers are imported where they are used: in the training processes
from ray import train, tune
from ray.tune.integration.ray_train import TuneReportCallback as ForwardReportsToTune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

# ---- Settings: environment variables; the head script first has check_inputs.py check them -----------------
VARIABLES = {  # name: (default, how its text is read, meaning)
    "LR_LOWER": ("5e-6", float, "learning rate, lower end of the log-uniform range"),
    "LR_UPPER": ("2e-4", float, "learning rate, upper end"),
    "BS_CHOICES": ("1 2", lambda text: [int(word) for word in text.split()], "per-device batch sizes"),
    "WD_CHOICES": ("0.0 0.01", lambda text: [float(word) for word in text.split()], "weight decays"),
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
    "GPUS_PER_WORKER": ("1", int, "GPUs of each (Gw); on nodes without GPUs 0, unless set"),
    "PRECISION": ("auto", str, "bf16, fp16, fp32; auto: bf16 if the GPU computes it, else fp16; CPUs fp32"),
    "WORKER_DEADLINE": ("7200", int, "seconds to wait for a worker node before giving up"),
    "SEED": ("42", int, "seed of the draws, of shuffling and of training"),
}


def read_settings(environ):
    """The variables as attributes. Raises ValueError for a text that is not a number."""
    return SimpleNamespace(**{k: read(environ.get(k, text)) for k, (text, read, _) in VARIABLES.items()})


# ---- SEARCH SPACE AND SCHEDULER: edit here -----------------------------------------------------------------
def search_space(s):
    """What each trial draws. Any field of transformers.TrainingArguments can be added, for example:
    "warmup_ratio": tune.uniform(0.0, 0.2),"""
    return {
        "train_loop_config": {
            "lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER),  # 5e-6 .. 2e-4: too slow .. nearly diverging
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
        reduction_factor=2,  # keep the best 1/2 at each rung
    )


TRAINING_ARGUMENT = {"lr": "learning_rate", "per_device_bs": "per_device_train_batch_size",  # name: field
                     "wd": "weight_decay", "warmup_ratio": "warmup_steps"}  # below 1: a share of all steps


# ---- Data: SQuAD questions -> token ids, once per run ------------------------------------------------------
def load_squad(s):
    """(train, validation): lists of TRAIN_SAMPLES and EVAL_SAMPLES rows as encode() makes them."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
    def encoded(r):
        return encode(r["context"], r["question"], r["answers"]["text"][0], tokenizer, chat=s.CHAT_TEMPLATE)
    train_rows, eval_rows = read_splits(s.SQUAD_DATA)
    return ([encoded(r) for r in draw(train_rows, s.TRAIN_SAMPLES, s.SEED)],
            [encoded(r) for r in draw(eval_rows, s.EVAL_SAMPLES, s.SEED)])


def draw(rows, count, seed):
    return [rows[i] for i in random.Random(seed).sample(range(len(rows)), count)]


def read_splits(data):
    """(training, validation): all rows, in the hub's form: context, question, answers {text: [...]}."""
    folder = Path(data)
    if folder.is_dir():
        form = ".jsonl" if (folder / "train.jsonl").exists() else "-v1.1.json"
        return tuple(read_file(path) for path in (folder / f"train{form}", folder / f"dev{form}"))
    from datasets import load_dataset
    return load_dataset(data, split=["train", "validation"])


def read_file(path):
    """SQuAD v1.1, or JSON lines {"prompt": ..., "answer": ...}: then the prompt is the whole question."""
    text = path.read_text("utf-8-sig")
    if path.suffix == ".jsonl":
        lines = (json.loads(line) for line in text.split("\n") if line.strip())
        return [{"context": None, "question": r["prompt"], "answers": {"text": [r["answer"]]}} for r in lines]
    return [{"context": p["context"], "question": q["question"],
             "answers": {"text": [answer["text"] for answer in q["answers"]]}}
            for article in json.loads(text)["data"] for p in article["paragraphs"] for q in p["qas"]]


def encode(context, question, answer, tokenizer, max_length=512, chat=False):
    """One question as a causal language model learns it: {"input_ids": [n], "labels": [n]}, n <= max_length.

    input_ids = prompt + answer + end-of-sequence. labels, in the same positions: -100 (ignored) on the
    prompt, the token itself on the answer and the end-of-sequence. The model shifts them by one. If that is
    too long, the context loses its end, then the question its start, and last of all the answer its end."""
    ids = functools.partial(tokenizer, add_special_tokens=False)
    target = [*ids(" " + answer.strip())["input_ids"][: max_length - 2], tokenizer.eos_token_id]
    body, ask = f"Context: {context}", f"\nQuestion: {question}\nAnswer:"
    if context is None:
        body, ask = "", question
    if chat:
        frame = [{"role": "user", "content": "@@"}]
        frame = tokenizer.apply_chat_template(frame, tokenize=False, add_generation_prompt=True).split("@@")
        body, ask = frame[0] + body, ask + frame[1]
    body, ask = ids(body)["input_ids"], ids(ask)["input_ids"]
    room = max_length - len(target)  # >= 1, so at least one prompt token precedes the answer
    ask = ask[-room:]
    prompt = body[: room - len(ask)] + ask
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def collate(rows, accepted=("logits_to_keep",)):
    """Rows -> one batch: input_ids, attention_mask [b, n]; labels [b, k]; what else the model accepts.
    Two things save most of the work. Rows are padded on the left, only to the longest of the batch (n). And
    logits are computed for the last k positions alone, where the labels are (k = longest answer + 1): BLOOM's
    output layer has 250,880 words, nearly half of its parameters."""
    import torch
    n = max(len(row["input_ids"]) for row in rows)
    ids, mask, labels = (torch.full((len(rows), n), fill) for fill in (0, 0, -100))  # padding is masked
    for i, row in enumerate(rows):
        start = n - len(row["input_ids"])
        ids[i, start:], labels[i, start:] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        mask[i, start:] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "position_ids" in accepted:  # such as GPT-2: its positions count from the first token
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        keep = min(n, 1 + int((labels != -100).sum(1).max()))
        batch |= {"labels": labels[:, -keep:], "logits_to_keep": keep}
    return batch


# ---- Training: one configuration, with or without Ray ------------------------------------------------------
FOLDERS = Path(__file__).resolve().parents  # the nearest ds_config.json counts; without one no DeepSpeed
DS_CONFIG = next((d / "ds_config.json" for d in FOLDERS if (d / "ds_config.json").exists()), None)


def fine_tune(hyperparameters, s, train_rows, eval_rows, callbacks=()):
    """Trains one configuration for NUM_EPOCHS epochs, in each process of a data-parallel group or in one.
    After each epoch callbacks get the metric eval_answer_loss: the mean over all answer tokens, in nats."""
    import torch
    import transformers
    def answer_losses(logits, labels):
        """[b, k, vocabulary], [b, k] -> [b, 2]: each row's loss, summed over its answer tokens; how many."""
        logits, labels = logits[0] if isinstance(logits, tuple) else logits, labels[:, 1:]
        scores = logits[:, :-1].float().transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        return torch.stack([losses.sum(1), (labels != -100).sum(1)], dim=1).double()

    gpu = torch.cuda.is_available() and s.GPUS_PER_WORKER > 0
    half = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = s.PRECISION if s.PRECISION != "auto" else half if gpu else "fp32"
    if not gpu:  # so that neither torch nor DeepSpeed touches a GPU
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    ds_config = json.loads(DS_CONFIG.read_text()) if DS_CONFIG else None
    if ds_config and not gpu:  # on CPUs, overlapping and contiguous gradients are slower
        ALL_OPS.pop("deepspeed_shm_comm", None)  # else DeepSpeed compiles a kernel; gloo does the same
        ds_config.setdefault("zero_optimization", {}).update(overlap_comm=False, contiguous_gradients=False)
        deepspeed.init_distributed(dist_backend="gloo")
    drawn = {TRAINING_ARGUMENT.get(name, name): value for name, value in hyperparameters.items()}
    fields = {
        "num_train_epochs": s.NUM_EPOCHS, "seed": s.SEED, "deepspeed": ds_config, "use_cpu": not gpu,
        "bf16": precision == "bf16", "fp16": precision == "fp16", "dataloader_pin_memory": gpu,
        "eval_strategy": "epoch", "per_device_eval_batch_size": 8,  # the loss does not depend on it
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "output_dir": "/tmp", "remove_unused_columns": False,
    }
    arguments = transformers.TrainingArguments(**(fields | drawn))  # before the model: ZeRO-3 splits it
    torch.manual_seed(s.SEED)
    safe = {"use_safetensors": True, "trust_remote_code": False}  # no code that comes with a model is run
    # In fp16 the usual -65,504 and a score of -16 make -inf, and a row of them NaN; -30,000 masks as well.
    mask = transformers.masking_utils.eager_mask
    transformers.AttentionMaskInterface.register("eager", lambda *a, **k: mask(*a, **k).clamp(min=-30_000))
    model = transformers.AutoModelForCausalLM.from_pretrained(s.MODEL_NAME, dtype=torch.float32, **safe)
    accepted = tuple(inspect.signature(model.forward).parameters)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=train_rows, eval_dataset=eval_rows, callbacks=list(callbacks),
        data_collator=functools.partial(collate, accepted=accepted),
        preprocess_logits_for_metrics=answer_losses,
        compute_metrics=lambda p: {"answer_loss": p.predictions[:, 0].sum() / p.predictions[:, 1].sum()},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    except Exception as error:
        if "loss scale" not in str(error):  # DeepSpeed's words for fp16 that overflows at any scale
            raise
        trainer.state.epoch, diverged = math.floor(trainer.state.epoch) + 1, {"eval_answer_loss": math.nan}
        trainer.callback_handler.on_evaluate(arguments, trainer.state, trainer.control, diverged)
    finally:  # else a DeepSpeed engine, with its model, lives as long as the process
        getattr(trainer.model_wrapped, "destroy", lambda: None)()
        trainer.accelerator.free_memory()


# ---- Trial: fine_tune in W Ray Train workers; each evaluation is reported to Tune --------------------------
def train_loop_per_worker(config):
    """What each of the W workers of a trial runs. config: the drawn train_loop_config, settings and data."""
    import torch
    from transformers import TrainerCallback
    s, data, report = (config.pop(name) for name in ("settings", "data", "report"))
    torch.set_num_threads(min(s.CPUS_PER_WORKER, len(os.sched_getaffinity(0))))

    class TuneReportCallback(TrainerCallback):  # a report after each evaluation, so ASHA's rungs are epochs
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            loss = metrics["eval_answer_loss"]  # the Trainer's own eval_loss is a mean over batches
            loss = loss if math.isfinite(loss) else math.nan  # no rung counts a NaN; the trial ends
            report({"eval_loss": loss, "epoch": float(round(state.epoch))})

    callbacks = [TuneReportCallback(), *config.pop("callbacks", [])]  # raytune_pbt_hpo.py adds one
    fine_tune(config, s, *ray.get(data), callbacks)


def run_trial(config, s, data, worker, run_dir):
    """One trial: Ray Train starts W workers and passes on their reports. fast_trials.py has a faster one."""
    from ray.train.torch import TorchTrainer
    TorchTrainer(
        train_loop_per_worker,
        train_loop_config=dict(config["train_loop_config"], settings=s, data=data[0], report=train.report),
        scaling_config=train.ScalingConfig(num_workers=s.WORKERS_PER_TRIAL, use_gpu="GPU" in worker,
                                           resources_per_worker=worker, placement_strategy="STRICT_PACK"),
        run_config=train.RunConfig(name=tune.get_context().get_trial_id(), callbacks=[ForwardReportsToTune()],
                                   storage_path=str(run_dir / "train")),
    ).fit()


# ---- Search ------------------------------------------------------------------------------------------------
NEIGHBOURS = ["fast_trials", "run_state", "trial_log"]  # optional: each says in its first line what it does


def say(text, log=sys.stdout):  # one line of the log, also where a neighbour has sent sys.stdout elsewhere
    print(f"{time.strftime('%H:%M:%S')} search | {text}", file=log, flush=True)


def search(s, run_dir):
    """Runs all trials -> Tune's results, one for each trial."""
    rows = load_squad(s)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the boxed table of trials
    address = {"RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "auto")}  # Ray Train's helpers ask for it, too
    ray.init(address["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": address})
    deadline = time.monotonic() + s.WORKER_DEADLINE
    while not (resources := ray.cluster_resources()).get("trial_slot"):
        if time.monotonic() > deadline:
            sys.exit(f"ERROR: WORKER_DEADLINE={s.WORKER_DEADLINE}: no worker node joined in these seconds")
        time.sleep(0.1)
    room, Gw = int(resources["trial_slot"]), s.GPUS_PER_WORKER if "GPU" in resources else 0
    say(f"data: {len(rows[0])} training and {len(rows[1])} validation questions, from {s.SQUAD_DATA}")
    say(f"cluster: {room} trial(s) at once, {s.WORKERS_PER_TRIAL} workers each, on {'GPU' if Gw else 'CPU'}s")
    worker = {"CPU": s.CPUS_PER_WORKER} | ({"GPU": Gw} if Gw else {})  # what each needs
    data = ray.put(rows)  # once, for all trials; in a list Tune hands the reference on, not the rows
    trial = tune.with_parameters(run_trial, s=s, data=[data], worker=worker, run_dir=run_dir)
    plan = SimpleNamespace(
        make_tuner=tune.Tuner, param_space=search_space(s),
        trainable=tune.with_resources(trial, {"trial_slot": 1}),
        tune_config=tune.TuneConfig(
            num_samples=s.NUM_SAMPLES, scheduler=scheduler(s), trial_dirname_creator=str,
            search_alg=BasicVariantGenerator(random_state=s.SEED),  # draws at random
            trial_name_creator=lambda trial: f"TorchTrainer_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(run_dir), callbacks=[], verbose=1,
            stop=lambda _, report: math.isnan(report["eval_loss"]) or report["epoch"] >= s.NUM_EPOCHS,
            progress_reporter=tune.CLIReporter(max_report_frequency=30, print_intermediate_tables=True),
        ),
        context=SimpleNamespace(s=s, run_dir=run_dir, data=data, worker=worker, loop=train_loop_per_worker),
    )
    for name in filter(importlib.util.find_spec, NEIGHBOURS):  # the one seam: they change the plan
        importlib.import_module(name).improve(plan)
    return plan.make_tuner(plan.trainable, param_space=plan.param_space,
                           tune_config=plan.tune_config, run_config=plan.run_config).fit()


def best_report(results, s):
    """The lowest eval_loss of all reports of trials without error. Ends the program if there is none."""
    failed, reports = 0, []
    for result in results:
        saved = result.metrics_dataframe
        if result.error:
            failed += 1
            say(f"FAILED {Path(result.path).name} (full trace: {result.path}/error.txt)")
        elif saved is None or saved["epoch"].iloc[-1] != result.metrics["epoch"]:  # Ray ignores a full disk
            sys.exit(f"ERROR: {result.path} lacks reports; is the disk full, or the quota reached?")
        else:
            reports += saved.dropna(subset="eval_loss").to_dict("records")
    if not reports or len(results) < s.NUM_SAMPLES:
        why = "" if reports else ", none reported a finite loss"
        sys.exit(f"ERROR: {len(results)} of {s.NUM_SAMPLES} trials ran, {failed} failed{why}")
    best = min(reports, key=lambda report: report["eval_loss"])
    drawn = {name.split("/")[-1]: best[name] for name in best if "/train_loop_config/" in name}
    best = {name: best[name] for name in ("eval_loss", "epoch", "time_total_s")}
    return best | {"config": {"train_loop_config": drawn}}


def main():
    parser = argparse.ArgumentParser(usage=f"{sys.argv[0]} --run-dir DIR\n\n{__doc__}")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", required=True, help="folder for the results")
    run_dir, s, log = parser.parse_args().run_dir.resolve(), read_settings(os.environ), sys.stdout
    print(f"Best Trial Result:\n{best_report(search(s, run_dir), s)}", file=log, flush=True)


if __name__ == "__main__":
    os._exit(main() or 0)  # all is written; Ray's own shutdown takes 1.6 s, and nodes would wait
