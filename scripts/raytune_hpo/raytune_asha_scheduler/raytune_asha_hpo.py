#!/usr/bin/env python3
"""Hyperparameter search with Ray Tune's ASHA: BLOOM-560M fine-tuned on SQuAD, several trials at a time.

This file is complete in itself. Read it from top to bottom: search space, data, training, trial, main.

    cd experiments/raytune/scheduler/asha

    bash head_node_raytune_asha_hpo.slurm                        # laptop: this machine is the whole cluster
    eval "$(bash ../../../../tests/mini_slurm.sh up)"            # sandbox: a real Slurm on one machine, then as below
    sbatch head_node_raytune_asha_hpo.slurm                      # cluster
    LR_LOWER=1e-6 LR_UPPER=1e-4 BS_CHOICES="2 4" sbatch head_node_raytune_asha_hpo.slurm    # another search space

The head script calls this file three times: with --get (print resolved settings), with --check (is every input
right? nothing is started), and with --run-dir DIR (the search itself, on the Ray cluster at RAY_ADDRESS).
"""

import argparse
import difflib
import gc
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# Heavy packages (torch, transformers, ray) are imported inside the functions that use them. A mistyped variable is
# then reported within a second, each process of a trial loads only what it needs, and training also works without Ray.

DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_config.json"
MAX_LENGTH = 512  # tokens of prompt + answer + end-of-sequence; longer contexts are cut (see encode)
EVAL_BATCH_SIZE = 8  # samples per device; it does not change eval_loss (see AnswerLossTrainer)
RESTARTS = 3  # of a trial whose node was lost
MANY_TRIALS = 100  # with more, the log has one line a trial, at its end, instead of one for each start, report and end


# ======================================================================================================================
# SEARCH SPACE AND SCHEDULER: edit here
# ======================================================================================================================
def search_space(s):
    """What each trial draws. Any further key that is a field of transformers.TrainingArguments takes effect as it is,
    for example:  "warmup_ratio": tune.uniform(0.0, 0.2),
    """
    from ray import tune

    return {
        "train_loop_config": {
            "lr": tune.loguniform(s.LR_LOWER, s.LR_UPPER),  # 5e-6 .. 2e-4: too slow .. the edge of diverging
            "per_device_bs": tune.choice(s.BS_CHOICES),  # 1, 2: samples per worker and step, so x WORKERS_PER_TRIAL
            "wd": tune.choice(s.WD_CHOICES),  # 0.0, 0.01: off, or AdamW's usual value
        }
    }


def scheduler(s):
    """ASHA: at epochs 1, 2, 4 (the rungs) a trial goes on only if it is among the better half seen at that rung."""
    from ray.tune.schedulers import ASHAScheduler

    class ASHA(Remembers, ASHAScheduler):
        """ASHA that knows its rungs again when the run is continued."""

    return ASHA(
        metric="eval_loss",
        mode="min",
        time_attr="epoch",  # as reported, so a trial that starts again from a checkpoint is judged at its true epoch
        grace_period=1,  # epochs every trial may train
        max_t=s.NUM_EPOCHS,  # epochs no trial trains beyond
        reduction_factor=2,  # keep the best 1/2 at each rung
    )


def sampler(s):
    """Who draws from the search space: chance, so no trial's result has a say in the next trial's hyperparameters."""
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(random_state=s.SEED)


# ======================================================================================================================
# Settings: environment variables, parsed and checked here and nowhere else
# ======================================================================================================================
class InputError(Exception):
    """Bad input from the user; the message names what, its value, and the fix. One line for each problem."""


def number(low, high=1_000_000, kind=float, low_ok=True):
    """A parser for one number in [low, high] (in (low, high] without low_ok)."""

    def parse(text):
        word = {int: "a whole number", float: "a number"}[kind]
        try:
            if kind is int and not re.fullmatch("-?[0-9]+", text):  # int() also takes " 1_0", which shells do not
                raise ValueError
            value = kind(text)
        except ValueError:
            raise ValueError(f"is not {word}") from None
        if not low <= value <= high or (value == low and not low_ok):  # NaN is not between any two numbers
            raise ValueError(f"must be {word} {'at least' if low_ok else 'above'} {low} and at most {high}")
        return value

    return parse


def several(parse_one):
    """A parser for space-separated values, each different."""

    def parse(text):
        words = text.split()
        if not words:
            raise ValueError('holds no value; give one or more, separated by spaces, such as "1 2"')
        values = []
        for word in words:
            try:
                values.append(parse_one(word))
            except ValueError as error:
                comma = " (separate with spaces, not commas)" if "," in word else ""
                raise ValueError(f"{word!r:.80} {error}{comma}") from None
        if len(set(values)) < len(values):
            raise ValueError("names a value twice; name each once")
        return values

    return parse


def plain_text(text):
    """A parser for names and paths: one line of printable text."""
    if not text.strip():
        raise ValueError("is empty; unset it to use the default")
    return text


VARIABLES = {  # name: (default, parser, meaning)
    "LR_LOWER": ("5e-6", number(0, 10, low_ok=False), "learning rate, lower end of the log-uniform range"),
    "LR_UPPER": ("2e-4", number(0, 10, low_ok=False), "learning rate, upper end"),
    "BS_CHOICES": ("1 2", several(number(1, kind=int)), "per-device batch sizes, separated by spaces"),
    "WD_CHOICES": ("0.0 0.01", several(number(0, 10)), "weight decays, separated by spaces"),
    "WORKER_NODES": ("1", number(1, 1000, kind=int), "worker-node jobs to submit"),
    "NUM_SAMPLES": ("12", number(1, kind=int), "trials"),
    "NUM_EPOCHS": ("5", number(1, kind=int), "epochs of a trial that is never stopped (ASHA's max_t)"),
    "MODEL_NAME": ("bigscience/bloom-560m", plain_text, "model: hub id or local folder"),
    "SQUAD_DATA": ("rajpurkar/squad", plain_text, "data: hub id, or folder with train-v1.1.json and dev-v1.1.json"),
    "TRAIN_SAMPLES": ("1000", number(1, kind=int), "training questions, drawn with SEED"),
    "EVAL_SAMPLES": ("100", number(1, kind=int), "validation questions, drawn with SEED"),
    "WORKERS_PER_TRIAL": ("2", number(1, 1024, kind=int), "training processes of a trial (W)"),
    "CPUS_PER_WORKER": ("2", number(1, 1024, kind=int), "CPUs of each (Cw)"),
    "GPUS_PER_WORKER": ("1", number(0, 1, kind=int), "GPUs of each (Gw); on nodes without GPUs 0, unless set"),
    "CHECKPOINTS": ("0", number(0, 1, kind=int), "1: save each trial's last epoch (8 GB for 560M), so that a lost node costs less"),
    "WORKER_DEADLINE": ("7200", number(1, kind=int), "seconds to wait for a worker node before giving up"),
    "SEED": ("42", number(0, 2**31 - 1, kind=int), "sampling of the search space and data, shuffling, training"),
}


MAY_CHANGE = ("WORKER_NODES", "CPUS_PER_WORKER", "WORKER_DEADLINE")  # when a run is continued; the others decide its results


def read_settings(environ, look_into_folders=False):
    """The variables above as attributes, checked; with look_into_folders also what MODEL_NAME and SQUAD_DATA hold.

    With RESUME they are those of that run. Raises InputError: one line for each variable that is wrong, or whose name
    looks like a misspelt one of ours.
    """
    settings, problems = SimpleNamespace(), []
    if environ.get("RESUME"):
        environ = settings_of_the_run(environ)
    for name, (default, parse, _) in VARIABLES.items():
        text = environ.get(name, default)
        try:
            if not text.isprintable():
                raise ValueError("holds a line break, control character or broken letter (Windows line ends?); remove it")
            setattr(settings, name, parse(text))
        except ValueError as error:
            setattr(settings, name, None)
            problems.append(f"{name}={text!r:.500}: {error} (default: {default!r})")
    if None not in (settings.LR_LOWER, settings.LR_UPPER) and settings.LR_LOWER >= settings.LR_UPPER:
        lower, upper = (environ.get(name, VARIABLES[name][0]) for name in ("LR_LOWER", "LR_UPPER"))
        problems.append(f"LR_LOWER={lower!r} LR_UPPER={upper!r}: LR_LOWER must be the smaller of the two")
    for name in sorted(filter(str.isprintable, set(environ) - set(VARIABLES))):
        for meant in difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.82):
            problems.append(f"{name}={environ[name]!r:.500}: no such variable; did you mean {meant}? (else unset {name})")
    if look_into_folders:
        problems += check_paths(settings)
    if problems:
        raise InputError("\n".join(problems))
    # Whether GPUs are asked for, or only used where there are any, is decided by whether the user said so.
    settings.gpus_required = "GPUS_PER_WORKER" in environ
    return settings


def settings_of_the_run(environ):
    """environ with the variables of the run in the folder RESUME. Raises InputError: no such run, or others are asked for."""
    folder = environ["RESUME"]
    try:
        saved = dict(json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise InputError(
            f"RESUME={folder!r:.500}: no settings.json of a search in this folder; give a folder such as runs/12345, or, if that "
            "run ended before its search began, submit a new one without RESUME"
        ) from None
    others = [
        f"{name}={environ[name]!r:.500}: the run in {folder} has {saved.get(name, 'the default')!r}; unset {name}, or start a new run without RESUME"
        for name in VARIABLES
        if name in environ and name not in MAY_CHANGE and saved.get(name) not in (environ[name], os.path.realpath(os.path.expanduser(environ[name])))
    ]
    if others:
        raise InputError("\n".join(others))
    return environ | saved | {name: environ[name] for name in MAY_CHANGE if name in environ}


# Names of our own in the search space -> fields of transformers.TrainingArguments. All other keys are such fields.
TRAINING_ARGUMENT = {
    "lr": "learning_rate",
    "per_device_bs": "per_device_train_batch_size",
    "wd": "weight_decay",
    "warmup_ratio": "warmup_steps",  # transformers 5 has one field: below 1 it is the share of all steps
}


def check_search_space(space):
    """Raises InputError for a key of the search space that the training would not understand."""
    unknown = set(space["train_loop_config"]) - set(TRAINING_ARGUMENT)
    if not unknown:
        return
    from transformers import TrainingArguments  # takes seconds, so only when there are such keys

    unknown -= set(TrainingArguments.__dataclass_fields__)
    if unknown:
        fields = list(TrainingArguments.__dataclass_fields__)
        hints = {k: difflib.get_close_matches(k, fields + list(TRAINING_ARGUMENT), n=1) for k in sorted(unknown)}
        raise InputError(
            "\n".join(
                f"search space: {key!r} is no hyperparameter: neither one of {', '.join(TRAINING_ARGUMENT)} nor a "
                f"field of transformers.TrainingArguments{f'; did you mean {hint[0]!r}?' if hint else ''}"
                for key, hint in hints.items()
            )
        )


def check_scheduler(chosen, s):
    """Raises InputError if the scheduler, such as PBT or HyperBand, needs what the settings do not give."""
    from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining

    problems, name = [], type(chosen).__name__
    if isinstance(chosen, (PopulationBasedTraining, HyperBandScheduler)) and not s.CHECKPOINTS:
        problems.append(f"CHECKPOINTS='0': {name} interrupts trials and lets them go on from checkpoints; set CHECKPOINTS=1")
    if isinstance(chosen, PopulationBasedTraining):
        mutated = chosen._hyperparam_mutations.get("train_loop_config")
        if not isinstance(mutated, dict) or not mutated:
            problems.append('scheduler: hyperparam_mutations names nothing that is drawn; write {"train_loop_config": {"lr": ...}}')
        for key in STEPS_PER_EPOCH & set(mutated or ()):
            problems.append(f"scheduler: {key!r} cannot change within a training, it sets the steps of an epoch; take it out of hyperparam_mutations")
    if problems:
        raise InputError("\n".join(problems))


STEPS_PER_EPOCH = {"per_device_bs", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"}


# ======================================================================================================================
# Data: SQuAD questions -> token ids, once per run
# ======================================================================================================================
def load_squad(s):
    """SQuAD as token ids: (train, validation), lists of TRAIN_SAMPLES and EVAL_SAMPLES rows as encode() makes them.

    SQUAD_DATA is a folder with train-v1.1.json and dev-v1.1.json, or the name of a data set on the Hugging Face hub.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a broken tokenizer.json raises Exception itself
        raise InputError(not_loaded("MODEL_NAME", s.MODEL_NAME, error)) from None
    splits = []
    for split, file, variable in (("train", "train-v1.1.json", "TRAIN_SAMPLES"), ("validation", "dev-v1.1.json", "EVAL_SAMPLES")):
        if Path(s.SQUAD_DATA).is_dir():
            questions = read_squad_json(Path(s.SQUAD_DATA) / file)
        else:
            from datasets import load_dataset

            try:
                questions = load_dataset(s.SQUAD_DATA, split=split)
            except Exception as error:  # noqa: BLE001  so many libraries, so many kinds
                raise InputError(not_loaded("SQUAD_DATA", s.SQUAD_DATA, error)) from None
        count = getattr(s, variable)
        if count > len(questions):
            raise InputError(f"{variable}='{count}': {s.SQUAD_DATA} ({split}) has {len(questions)} questions; ask for at most these")
        chosen = random.Random(s.SEED).sample(range(len(questions)), count)
        rows = [questions[i] for i in chosen]
        try:
            splits.append([encode(r["context"], r["question"], r["answers"]["text"][0], tokenizer) for r in rows])
        except (LookupError, TypeError, AttributeError):
            raise InputError(
                f"SQUAD_DATA={s.SQUAD_DATA!r} ({split}): a row has no context, question or answer, so this is not SQuAD v1.1; "
                f"give {VARIABLES['SQUAD_DATA'][0]}, or another of that form"
            ) from None
    return tuple(splits)


def not_loaded(variable, value, error):
    """What to tell the user when the hub does not deliver."""
    return (
        f"{variable}={value!r} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}; compute nodes "
        f"often cannot reach the hub: fetch it on a login node (bash scripts/prefetch.sh) and give the local folder"
    )


def read_squad_json(path):
    """A SQuAD v1.1 file as rows of the hub's form: context, question, answers {text: [...]}.

    Raises InputError if the file is missing or not of that form.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
        rows = [
            {"context": p["context"], "question": q["question"], "answers": {"text": [a["text"] for a in q["answers"]]}}
            for article in articles
            for p in article["paragraphs"]
            for q in p["qas"]
        ]
        texts = [text for row in rows for text in (row["context"], row["question"], *row["answers"]["text"])]
        if not rows or not all(row["answers"]["text"] for row in rows) or not all(isinstance(t, str) for t in texts):
            raise ValueError("no questions, a question without an answer, or a text that is none")
        "".join(texts).encode()  # JSON can hold halves of letters, which the tokenizer refuses
    except FileNotFoundError:
        raise InputError(f"SQUAD_DATA={str(path.parent)!r}: no file {path.name} in this folder; give one that holds it") from None
    except OSError as error:
        raise InputError(f"SQUAD_DATA={str(path.parent)!r}: {path.name} cannot be read ({error.strerror}); mend that") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"SQUAD_DATA={str(path.parent)!r}: {path.name} is not SQuAD v1.1 JSON ({reason}); fetch it again") from None
    return rows


def encode(context, question, answer, tokenizer, max_length=MAX_LENGTH):
    """One question as a causal language model learns it: {"input_ids": [n], "labels": [n]}, n <= max_length.

    input_ids = prompt + answer + end-of-sequence. labels, in the same positions: -100 (ignored) on the prompt, the
    token itself on the answer and the end-of-sequence. The model shifts them by one.

    If that is longer than max_length the prompt gives way, never the answer: first the end of the context is cut, then
    the start of the question. Only an answer that alone fills max_length - 1 tokens loses its own end.
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

    Two things save most of the work. Rows are padded on the left and only to the longest of the batch (n), not to
    MAX_LENGTH. And since labels stand only at the right end, the model computes logits for the last k positions alone
    (logits_to_keep): BLOOM's output layer has 250,880 words, nearly half of its parameters.

    Shapes: input_ids, attention_mask [b, n]; labels [b, k] with k = longest answer + 1 (without trim_logits [b, n]).
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


# ======================================================================================================================
# Training: one configuration, with or without Ray
# ======================================================================================================================
def deepspeed_config(gpu):
    """ds_config.json as a dict, or None without DeepSpeed."""
    if not DS_CONFIG:
        return None
    config = json.loads(Path(DS_CONFIG).read_text(encoding="utf-8"))
    if not gpu:  # these two copy gradients so that a GPU can send them while it computes; a CPU only has the copies
        config["zero_optimization"] |= {"overlap_comm": False, "contiguous_gradients": False}
    return config


def keep_freed_memory():
    """Tells the C library to reuse freed memory instead of giving it back to the system.

    A step on a CPU allocates gradients as large as the model again and again; to get fresh pages for them took a third
    of its time. Costs memory: about 1 GB for 69 million parameters. Nothing happens where the C library is not glibc.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def fine_tune(hyperparameters, s, train_rows, eval_rows, callbacks=(), checkpoints=None, start_from=None):
    """Train one configuration for NUM_EPOCHS epochs, with an evaluation after each; returns the Trainer.

    checkpoints: a folder for the state after each epoch. start_from: such a state, from which training goes on, with this
    call's hyperparameters: what they were when it was saved does not matter.

    Runs in every process of a data-parallel group, or in a single process. hyperparameters: the drawn
    train_loop_config. The loss to compare is `eval_loss`: mean negative log-likelihood (nats) per answer token.
    """
    import functools
    import inspect
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    gpu = torch.cuda.is_available() and s.GPUS_PER_WORKER > 0
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns on every start that it has found no GPU
    import deepspeed

    if not gpu:
        # Else DeepSpeed compiles a C++ kernel for its own communication between CPUs: a minute, and a compiler on every
        # node. torch's gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        keep_freed_memory()

    class AnswerLossTrainer(Trainer):
        """Evaluates the exact loss over the validation set.

        The stock Trainer averages the means of batches, skips batches that are NaN, and counts the samples twice that
        fill up the last batch. Here each answer token counts once, whatever the batch size and number of workers.
        """

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            labels = inputs.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**inputs).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            tokens = (labels != -100).sum(1)
            return None, torch.stack([losses.sum(1), tokens], dim=1), tokens

        def create_optimizer(self, *arguments):
            optimizer = super().create_optimizer(*arguments)
            self.drawn = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            return optimizer

        def _load_optimizer_and_scheduler(self, checkpoint):
            """Of a checkpoint count the weights, Adam's averages and the place in the schedule. Its hyperparameters do not:
            they may be another trial's (PBT)."""
            super()._load_optimizer_and_scheduler(checkpoint)
            for group, drawn, its_lr in zip(self.optimizer.param_groups, self.drawn, self.lr_scheduler.base_lrs, strict=True):
                group.update(drawn, lr=group["lr"] / its_lr * drawn["lr"], initial_lr=drawn["lr"])
            self.lr_scheduler.base_lrs = [drawn["lr"] for drawn in self.drawn]

    def mean_loss(prediction):
        loss_sum, tokens = prediction.predictions.astype("float64").sum(axis=0)
        return {"loss": loss_sum / tokens}  # the Trainer names it eval_loss

    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "num_train_epochs": s.NUM_EPOCHS,
            "per_device_eval_batch_size": EVAL_BATCH_SIZE,
            "eval_strategy": "epoch",
            "fp16": gpu,  # V100: fp16 in hardware, bf16 only emulated
            "use_cpu": not gpu,
            "deepspeed": deepspeed_config(gpu),
            "seed": s.SEED,
            "output_dir": checkpoints or scratch,
            "save_strategy": "epoch" if checkpoints else "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": gpu,
        }
        for name, value in hyperparameters.items():
            arguments[TRAINING_ARGUMENT.get(name, name)] = value
        # ZeRO-3 splits the model while it is loaded, so TrainingArguments and the process group come before the model.
        training_arguments = TrainingArguments(**arguments)
        if DS_CONFIG and not gpu:
            deepspeed.init_distributed(dist_backend="gloo")
        torch.manual_seed(s.SEED)
        model = AutoModelForCausalLM.from_pretrained(s.MODEL_NAME, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(s.MODEL_NAME, trust_remote_code=False)
        trainer = AnswerLossTrainer(
            model=model,
            args=training_arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=functools.partial(
                collate,
                pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                trim_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
            ),
            compute_metrics=mean_loss,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # it prints a line for each evaluation, in every process
        trainer.train(resume_from_checkpoint=start_from)
    return trainer


# ======================================================================================================================
# Trial: fine_tune in W Ray Train workers, each evaluation reported to Tune
# ======================================================================================================================
def train_loop_per_worker(config):
    """What each of the W workers of a trial runs."""
    import ray
    import torch
    from ray.train.torch import get_device
    from transformers import TrainerCallback

    # torch has asked the machine at its import. A sandbox's node can have fewer CPUs than Slurm has been told.
    torch.set_num_threads(min(config["settings"].CPUS_PER_WORKER, len(os.sched_getaffinity(0))))
    if ray.get_gpu_ids():
        if not torch.cuda.is_available():
            raise RuntimeError("this worker was given a GPU, but PyTorch cannot use it; check with: python -c 'import torch; torch.zeros(1).cuda()'")
        torch.cuda.set_device(get_device())  # its own; it sees those of all workers of the trial (share_cuda_visible_devices)

    class TuneReportCallback(TrainerCallback):
        """After each evaluation one report, so Tune's training_iteration is the epoch and ASHA's rungs are epochs."""

        def on_step_end(self, args, state, control, **kwargs):
            if config["successors"] and ray.train.get_context().get_world_rank() == 0:
                own_kind = ray.get_runtime_context().get_runtime_env_string()
                start_successors({config["successors"]: 1, own_kind: config["settings"].WORKERS_PER_TRIAL})
                config["successors"] = None  # once

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            loss = (metrics or {}).get("eval_loss", math.nan)
            # A loss that is missing or infinite is reported as NaN: Tune ends the trial and no rung counts it.
            self.report = {"eval_loss": loss if math.isfinite(loss) else math.nan, "epoch": round(state.epoch, 2)}
            if not control.should_save:
                ray.train.report(self.report)

        def on_save(self, args, state, control, **kwargs):
            """With checkpoints the report comes after the epoch's has been written, and names it."""
            ray.train.report(self.report | {"checkpoint": f"{args.output_dir}/checkpoint-{state.global_step}"})

    train_rows, eval_rows = ray.get(config["data"])
    fine_tune(config["hyperparameters"], config["settings"], train_rows, eval_rows, [TuneReportCallback()], config["checkpoints"], config["start_from"])


def resources_per_worker(s, use_gpu):
    return {"CPU": s.CPUS_PER_WORKER, **({"GPU": s.GPUS_PER_WORKER} if use_gpu else {})}


def import_ahead():
    """Runs at the start of each process that Ray makes for trials, before it is given its part: imports, which take seconds."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA must not wake up before Ray has said which GPU is this process's
    gc.disable()  # Python looks for garbage again and again while imports make objects, none of which is: a fifth of the time
    if os.environ.get("HPO_TRAINS"):
        import deepspeed  # noqa: F401
        import ray.train.torch
        from transformers import Trainer  # noqa: F401
    else:  # a trial's own process, which trains nothing
        import ray.tune  # noqa: F401

        trainer_of_the_trial()  # for its imports
    gc.freeze()  # nor later: to look there took half of the time in which the demo's model trains
    gc.enable()


def start_successors(wanted):
    """Has Ray start idle processes on this node, for the next trial: they import while this one trains.

    wanted: {runtime environment, as Ray writes it: number of processes}. Called after a trial's first step, so the start of
    one trial does not compete with the preparation of the next. (Ray has no public call for this; see requirements.txt.)
    """
    import contextlib

    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

    context = ray.get_runtime_context()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    # Should Ray refuse, the next trial starts without them, some seconds later.
    with contextlib.suppress(grpc.RpcError), init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        for environment, number in wanted.items():
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(
                node_manager_pb2.PrestartWorkersRequest(
                    job_id=ray.JobID.from_hex(context.get_job_id()).binary(),
                    runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=environment),
                    num_workers=number,
                    keep_alive_duration_secs=24 * 3600,  # they end with the run
                ),
                timeout=10,
            )


def run_trial(config, settings, data, use_gpu, run_dir, slots):
    """One trial: a trainer of Ray Train with W workers on one node. Tune may end it at any report."""
    import ray
    from ray import train, tune

    class ForwardReportsToTune(train.UserCallback):
        def after_report(self, run_context, metrics, checkpoint):
            report_to_tune(metrics[0])  # the first worker's; all report the same

    number = int(tune.get_context().get_trial_id().rsplit("_")[-1])  # 0, 1, ... in the order drawn, which is that of the starts
    trainer_of_the_trial()(
        train_loop_per_worker,
        train_loop_config={
            "hyperparameters": config["train_loop_config"],
            "settings": settings,
            "data": data[0],
            # Of this process; of the last trials, as many as run at once, there are none.
            "successors": number + slots < settings.NUM_SAMPLES and ray.get_runtime_context().get_runtime_env_string(),
            **checkpoints_of_this_start(settings, run_dir),
        },
        scaling_config=train.ScalingConfig(
            num_workers=settings.WORKERS_PER_TRIAL,
            use_gpu=use_gpu,
            resources_per_worker=resources_per_worker(settings, use_gpu),
        ),
        run_config=train.RunConfig(
            name=tune.get_context().get_trial_id(),
            storage_path=str(run_dir / "train"),
            callbacks=[ForwardReportsToTune()],
            # HPO_TRAINS: see import_ahead. DeepSpeed would look for a GPU itself, and wake up CUDA.
            worker_runtime_env={"env_vars": {"HPO_TRAINS": "1", "DS_ACCELERATOR": "cuda" if use_gpu else "cpu"}},
        ),
    ).fit()


# Checkpoints. The Trainer writes them, some GB each, into CHECKPOINTS_FOLDER/<trial>/<start>/checkpoint-<step>. Tune decides
# from which one a trial goes on: its own last one or, with PBT, another trial's. So that Tune need not copy them, what it
# keeps as the checkpoint of a report is a small file with the name of that folder.
NAME_FILE = "trainer_checkpoint.txt"


def report_to_tune(report):
    """One report, and the checkpoint that it names, if any."""
    import tempfile

    from ray import tune

    folder = report.pop("checkpoint", None)
    if not folder:
        return tune.report(report)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / NAME_FILE).write_text(folder)
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(scratch))


def folder_named_in(checkpoint):
    """The Trainer's folder of one of Tune's checkpoints; None if there is none."""
    return (Path(checkpoint.path) / NAME_FILE).read_text() if checkpoint else None


def checkpoints_of_this_start(s, run_dir):
    """Where fine_tune saves, and from where it starts. Each start of a trial has a new folder, so none is overwritten."""
    from ray import tune

    if not s.CHECKPOINTS:
        return {"checkpoints": None, "start_from": None}
    of_trial = run_dir / "checkpoints" / tune.get_context().get_trial_id()
    known = {file.read_text() for file in run_dir.glob(f"tune/*_{of_trial.name}/checkpoint_*/{NAME_FILE}")}
    for folder in of_trial.glob("*/checkpoint-*"):  # saved, but the trial was interrupted before the report
        if str(folder) not in known:
            shutil.rmtree(folder, ignore_errors=True)
    new = of_trial / str(len(list(of_trial.glob("*"))))
    new.mkdir(parents=True)
    return {"checkpoints": str(new), "start_from": folder_named_in(tune.get_checkpoint())}


def place_of_a_trial(s, use_gpu):
    """What Tune reserves before a trial starts, all on one node: a bundle for each worker, none for the trial's own process."""
    from ray import tune

    return tune.PlacementGroupFactory([{}, *[resources_per_worker(s, use_gpu)] * s.WORKERS_PER_TRIAL], strategy="STRICT_PACK")


def join_workers(address, port, rank, number):
    """Makes a worker one of a PyTorch process group, as Ray's TorchTrainer does. address, port: where rank 0 is found."""
    import ray
    from ray.train.torch import config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group("nccl" if ray.get_gpu_ids() else "gloo", rank, number, "env://")


def trainer_of_the_trial():
    """A TorchTrainer that leads its workers from the trial's own process, in the place that Tune has reserved for it.

    Ray's own reserves a second place, and starts five more processes for each trial: to lead, to pass on reports, to hand
    out Ray Data, to free the place of a stopped trial, to agree on the name of a checkpoint. Each loads Ray Train anew, one
    waits for the other, and what they reserve outlives a process that is killed. Here all goes with the trial, whose own
    process does without PyTorch: a second and 200 MB less. (It reaches into Ray 2.60: see requirements.txt.)
    """
    import asyncio

    import ray
    from ray.train import backend
    from ray.train._internal.utils import get_address_and_port
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import poll, state, worker_group
    from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    poll.ERR_CHAR_LIMIT = 100_000  # of a trace, in error.txt; Ray cuts the middle out of one that is longer than 1,000

    # At a report Ray's workers wait for each other in one more process, and agree there on the name of a checkpoint's folder.
    # Ours hand no checkpoint to Ray (see NAME_FILE), and wait for each other in each step: each may have its own name.
    own_name = SimpleNamespace(broadcast_from_rank_zero=SimpleNamespace(remote=lambda data, **_: ray.put(data)))
    worker_group.SynchronizationActor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda **_: own_name))
    state._shutdown_sync_actor = lambda _: None

    class PlaceOfTheTrial(DefaultPlacementGroupHandle):
        def shutdown(self):
            """Tune has made it and removes it."""

    class WorkersInThatPlace(worker_group.WorkerGroup):
        def _create_placement_group(self, *_):
            return PlaceOfTheTrial(ray.util.get_current_placement_group())

    class Controller(TrainController):
        worker_group_cls = WorkersInThatPlace

    class ProcessGroup(backend.Backend):
        share_cuda_visible_devices = True  # the GPUs of all workers, so that they can send to each other directly

        def on_start(self, workers, _):
            address, port = workers.execute_single(0, get_address_and_port)
            ray.get([workers.execute_single_async(rank, join_workers, address, port, rank, len(workers)) for rank in range(len(workers))])

    class JoinedByPyTorch(backend.BackendConfig):
        backend_cls = ProcessGroup

    class TrainerOfTheTrial(DataParallelTrainer):
        def __init__(self, *arguments, **parts):
            super().__init__(*arguments, backend_config=JoinedByPyTorch(), **parts)

        def _create_default_callbacks(self):
            not_needed = (datasets.DatasetsCallback, placement_group_callback.PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, not_needed)]

        def _initialize_and_run_controller(self, **parts):
            policy = parts["scaling_policy"]  # asks an autoscaler for nodes, through one more process; here Slurm gives them
            policy._send_resource_request = policy._maybe_send_resource_request = policy._cancel_resource_request = lambda: None
            controller = Controller(**parts)
            asyncio.run(controller.run())
            return controller.get_result()

    return TrainerOfTheTrial


# ======================================================================================================================
# Main
# ======================================================================================================================
QUIETER_AND_FASTER = {  # for every process of the run
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report reaches Tune within half a second instead of two
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy node may need longer than the default 60 s
    "RAY_AIR_NEW_OUTPUT": "0",  # the boxed table of trials
    "TUNE_WARN_THRESHOLD_S": "60",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask whether there are GPUs must not wake up CUDA (see import_ahead)
    "TORCHDYNAMO_DISABLE": "1",  # else DeepSpeed loads torch's compiler for an optimizer not used here: 1.3 s a trial
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def say(text):
    """One line of the log, with time and role."""
    print(f"{time.strftime('%H:%M:%S')} search | {text}", file=sys.__stdout__, flush=True)


def check_paths(s):
    """MODEL_NAME and SQUAD_DATA that are folders become absolute (workers run elsewhere) and must hold what is needed.

    A name like org/name that is no folder is left to the hub. Returns the problems, one line each.
    """
    problems = []
    for variable, look_into in (("MODEL_NAME", model_problems), ("SQUAD_DATA", squad_problems)):
        value = getattr(s, variable)
        if value is None:  # wrong in itself, which read_settings has found
            continue
        path = os.path.realpath(os.path.expanduser(value))
        if not path.isprintable():
            problems.append(f"{variable}={value!r}: its full path {path!r} holds a line break or the like; use another folder")
        elif os.path.isdir(path):
            setattr(s, variable, path)
            problems += look_into(s)
        elif os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value, re.ASCII):
            problems.append(f"{variable}={value!r}: no such folder; give an existing folder or a hub id such as {VARIABLES[variable][0]}")
    return problems


def model_problems(s):
    """What the folder MODEL_NAME lacks, in one line, or nothing. The model itself is not loaded: that takes too long."""
    folder = Path(s.MODEL_NAME)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # A file of less than 1 kB is the pointer that git leaves where it could not fetch the weights.
        weights = [path for path in folder.glob("model*.safetensors") if path.is_file() and path.stat().st_size > 1000]
        tokenizers = [name for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    except FileNotFoundError:
        return [f"MODEL_NAME={s.MODEL_NAME!r}: no config.json in this folder; give one that save_pretrained wrote"]
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        return [f"MODEL_NAME={s.MODEL_NAME!r}: config.json cannot be read ({reason}); fetch the model again"]
    if isinstance(config, dict) and "auto_map" in config:
        from transformers import CONFIG_MAPPING  # takes a second, so only when the folder brings Python code of its own

        if config.get("model_type") not in CONFIG_MAPPING:
            return [f"MODEL_NAME={s.MODEL_NAME!r}: this model needs Python code of its own (auto_map in config.json), which is never run; use another model"]
    lacks = []
    if not isinstance(config, dict) or "model_type" not in config:
        lacks.append("model_type in config.json")
    if not weights:  # a pickled pytorch_model.bin could run anything when it is loaded
        lacks.append("weights in model*.safetensors (other formats, such as pytorch_model.bin, are not loaded)")
    if not tokenizers:
        lacks.append("tokenizer files such as tokenizer.json")
    return [f"MODEL_NAME={s.MODEL_NAME!r}: this folder has no {' and no '.join(lacks)}; fetch the whole model"] if lacks else []


def squad_problems(s):
    """What is wrong with the files in the folder SQUAD_DATA, one line each."""
    problems = []
    for file, variable in (("train-v1.1.json", "TRAIN_SAMPLES"), ("dev-v1.1.json", "EVAL_SAMPLES")):
        try:
            found = len(read_squad_json(Path(s.SQUAD_DATA) / file))
        except InputError as error:
            return [*problems, str(error)]  # what is wrong with one of the two files is mostly wrong with both
        count = getattr(s, variable)
        if count is not None and count > found:
            problems.append(f"{variable}='{count}': {file} has only {found} questions; ask for at most {found}")
    return problems


class Remembers:
    """In front of a Tune scheduler class: its decisions outlive the process. Ray restores trials, not their scheduler.

    Each report and the decision on it is a line of the file `journal`. When a run is continued the scheduler is told all
    of them once more, in order, so its rungs are what they were. A trial that runs again, be it after the loss of a
    node, gets the decisions that it had at the same epochs.
    """

    journal = None  # Path
    decisions = None  # {(trial id, epoch): decision}

    def on_trial_add(self, controller, trial):
        if self.decisions is None:
            self.decisions, past = {}, self.journal.read_text().splitlines() if self.journal.exists() else []
            for row in map(json.loads, past):
                told = SimpleNamespace(trial_id=row["trial_id"])
                super().on_trial_add(controller, told)
                super().on_trial_result(controller, told, row)
                self.decisions[row["trial_id"], row["epoch"]] = row["decision"]
        super().on_trial_add(controller, trial)

    def on_trial_result(self, controller, trial, result):
        row = {"trial_id": trial.trial_id, "epoch": result["epoch"], "eval_loss": result["eval_loss"]}
        key = (row["trial_id"], row["epoch"])
        if key not in self.decisions:
            self.decisions[key] = super().on_trial_result(controller, trial, result)
            with self.journal.open("a") as file:
                file.write(json.dumps(row | {"decision": self.decisions[key]}) + "\n")
        return self.decisions[key]

    def choose_trial_to_run(self, controller):
        waiting = [trial for trial in controller.get_live_trials() if trial.status == "PENDING"]  # not those that have ended
        return min(waiting, key=lambda trial: trial.trial_id, default=None)  # in the order drawn, also when continued


def write_results_in_place():
    """Tune's files of a trial go to the run folder at once, and the saved state of all trials replaces the one before.

    Ray's own writes all files to this node's disk and copies all of them, those of ended trials too, at each save: with
    1,000 trials 5,000 files each half second, to a file system that others use. A file that is just being copied when the
    run is killed is cut off; one that is replaced (os.replace) is the old or the new one. (It reaches into Ray 2.60.)
    """
    from ray.train._internal import storage

    def replace_state(self, local_dir, remote_dir, exclude=None):
        for file in filter(Path.is_file, Path(local_dir).iterdir()):
            shutil.copy(file, f"{remote_dir}/.{file.name}.new")
            os.replace(f"{remote_dir}/.{file.name}.new", f"{remote_dir}/{file.name}")
        return True

    storage.StorageContext.trial_driver_staging_path = property(lambda self: self.trial_fs_path)
    storage._FilesystemSyncer.sync_up = replace_state


def try_again(trial):
    """Does Ray start a trial again that ended with an error? Only if its processes were lost, with their node as a rule.

    An error in the training itself would only come again.
    """
    from ray import cloudpickle
    from ray.exceptions import RayActorError

    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()) if trial.pickled_error_file else None
    return trial.run_metadata.num_failures <= trial.max_failures and isinstance(error, RayActorError)


def best_report(results):
    """The lowest finite eval_loss of all reports of all trials without error, or None.

    results: what Tuner.fit() returns. -> {"eval_loss", "epoch", "time_total_s", "config"}
    """
    best = None
    for result in results:
        if result.error or result.metrics_dataframe is None:
            continue
        for row in result.metrics_dataframe.to_dict("records"):
            if math.isfinite(row["eval_loss"]) and (best is None or row["eval_loss"] < best["eval_loss"]):
                best = {key: row[key] for key in ("eval_loss", "epoch", "time_total_s")}
                drawn = {key.split("/")[-1]: value for key, value in row.items() if key.startswith("config/train_loop_config/")}
                best["config"] = {"train_loop_config": drawn} if drawn else result.config  # at that report: PBT changes it later
    return best


def last_epoch(result):
    """The epoch of the last report in the run folder, or None. Ray goes on when it cannot write there."""
    rows = result.metrics_dataframe
    return None if rows is None or rows.empty else rows["epoch"].iloc[-1]


def cause_of(error_text):
    """The line of a trace that names the error, such as "ValueError: ...": the innermost cause, stated last."""
    if killed := re.search(r"\[Rank (\d+) Error Snippet\]:\s+A worker health check failed.*?worker process has died", error_text, re.DOTALL):
        return f"RuntimeError: training worker {killed[1]} died; out of memory?"  # the others' errors follow from it
    lines = [line.strip() for line in error_text.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Interrupt"))]
    return (named or lines or ["unknown"])[-1][:200]


def search(s, run_dir):
    """Run all trials; prints their course, the table and the best result. Returns the exit status.

    0 if every trial ran and at least one finished; trials that failed are listed with their cause. 1 otherwise.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError("RAY_ADDRESS is not set: the search needs a Ray cluster; start both with the head script (see --help)")
    os.environ.update(QUIETER_AND_FASTER)
    sys.stdout = sys.stderr  # what libraries print; the log, sys.__stdout__, is for students
    data = load_squad(s)
    if not (run_dir / "settings.json").exists():  # for RESUME
        texts = {name: os.environ.get(name, default) for name, (default, *_) in VARIABLES.items() if name != "GPUS_PER_WORKER" or s.gpus_required}
        (run_dir / "settings.json").write_text(json.dumps(texts | {"MODEL_NAME": s.MODEL_NAME, "SQUAD_DATA": s.SQUAD_DATA}, indent=1))

    import numpy
    import ray
    from ray import tune
    from ray.tune.experiment import Trial

    ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": QUIETER_AND_FASTER, "worker_process_setup_hook": import_ahead})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's cause is told below, its trace is in error.txt
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # scancel: end at once, without the trace that Ray would print
    deadline = time.monotonic() + s.WORKER_DEADLINE + 60  # the first worker is on its way; the head script waits, too, and gives up first
    while not (resources := ray.cluster_resources()).get("CPU"):
        if time.monotonic() > deadline:
            raise InputError(f"WORKER_DEADLINE={s.WORKER_DEADLINE}: no worker has joined the Ray cluster at {address} in this many seconds")
        time.sleep(0.1)
    say(f"data: {len(data[0])} training and {len(data[1])} validation questions as tokens, from {s.SQUAD_DATA}")
    use_gpu = s.GPUS_PER_WORKER > 0 and resources.get("GPU", 0) > 0
    if s.gpus_required and s.GPUS_PER_WORKER and not use_gpu:
        raise InputError(f"GPUS_PER_WORKER={s.GPUS_PER_WORKER}: the worker nodes have no GPU; set 0, or use GPU nodes")
    # Each node offers what the trials that fit on it need (worker_capacity.py), so nodes that come or go change the number.
    slots = int(resources.get("CPU", 0)) // (s.WORKERS_PER_TRIAL * s.CPUS_PER_WORKER)
    say(f"cluster: {slots} trial(s) at once, {s.WORKERS_PER_TRIAL} workers each, on {'GPUs' if use_gpu else 'CPUs'}")

    # No more trials are made ready than can start, so they start in the order drawn (see choose_trial_to_run).
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, slots))
    # How old, in s, the saved state can be from which a run is continued. A save takes longer the more trials there are.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(max(0.5, s.NUM_SAMPLES / 500))
    write_results_in_place()

    class Progress(tune.Callback):
        """One line for each start, report and end of a trial; with MANY_TRIALS one for each end, and one for each tenth."""

        def __init__(self):
            self.many = s.NUM_SAMPLES > MANY_TRIALS
            self.ended = None  # trials, also those of earlier parts of a continued run
            self.best = math.inf  # eval_loss
            self.saved = {}  # trial: folders of the checkpoints that it has reported and that are still there

        def drawn(self, trial):
            return "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.config["train_loop_config"].items())

        def on_trial_start(self, iteration, trials, trial, **info):
            if self.ended is None:
                self.ended = sum(trial.is_finished() for trial in trials)
                for earlier in trials:  # min() keeps its first if the second is NaN
                    self.best = min(self.best, earlier.metric_analysis.get("eval_loss", {}).get("min", math.inf))
                    if s.CHECKPOINTS and continued:  # what the earlier part has saved
                        folders = (run_dir / "checkpoints" / earlier.trial_id).glob("*/checkpoint-*")
                        self.saved[earlier] = sorted(map(str, folders), key=os.path.getmtime)
            origin = folder_named_in(trial.checkpoint)
            if origin and f"/{trial.trial_id}/" not in origin:
                donor = next(other for other in trials if f"/{other.trial_id}/" in origin)
                say(f"{trial}  copies     {donor} as it was after epoch {trial.run_metadata.checkpoint_manager.latest_checkpoint_result.metrics['epoch']:g}")
            if not self.many:
                say(f"{trial}  started    {self.drawn(trial)}")

        def on_trial_result(self, iteration, trials, trial, result, **info):
            self.best = min(self.best, result["eval_loss"])
            if not self.many:
                say(f"{trial}  epoch {result['epoch']:g}/{s.NUM_EPOCHS}  eval_loss {result['eval_loss']:.5f}")

        def on_trial_complete(self, iteration, trials, trial, **info):
            loss, epoch = trial.last_result.get("eval_loss", math.nan), trial.last_result.get("epoch", 0)
            if not math.isfinite(loss):
                end = f"ended      diverged at epoch {epoch:g}"
            else:
                end = "finished   all epochs" if epoch >= s.NUM_EPOCHS else f"stopped    by {type(chosen).__name__} after epoch {epoch:g}"
            seconds = trial.last_result.get("time_total_s", 0)
            say(f"{trial}  {end}" + (f"  eval_loss {loss:.5f}  seconds {seconds:.1f}  {self.drawn(trial)}" if self.many else ""))
            self.count()
            self.remove_checkpoints(trials)

        def count(self):
            self.ended += 1
            if self.many and self.ended % (s.NUM_SAMPLES // 10) == 0:
                say(f"{self.ended} of {s.NUM_SAMPLES} trials have ended, the lowest eval_loss is {self.best:.5f}")

        def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
            self.saved.setdefault(trial, []).append(folder_named_in(checkpoint))
            self.remove_checkpoints(trials)

        def remove_checkpoints(self, trials):
            """All but those from which a trial goes on, and, of each trial that is not at its end, the last: PBT may copy it."""
            if not self.saved:
                return
            last = getattr(chosen, "_perturbation_interval", 1)  # PBT copies what it saw at its last turn, so many epochs ago
            needed = {folder_named_in(trial.checkpoint) for trial in trials if not trial.is_finished()}
            for trial, folders in self.saved.items():
                for folder in folders[:] if trial.is_finished() else folders[: -int(last)]:
                    if folder not in needed:
                        folders.remove(folder)
                        shutil.rmtree(folder, ignore_errors=True)

        def on_trial_recover(self, iteration, trials, trial, **info):
            say(f"{trial}  lost       with its node ({trial.run_metadata.num_failures} of at most {RESTARTS} times); starts again")

        def on_trial_error(self, iteration, trials, trial, **info):
            say(f"{trial}  FAILED     {cause_of(Path(trial.error_file).read_text() if trial.error_file else '')}")
            self.count()

    class FinalTable(tune.CLIReporter):
        """Ray's boxed table of trials, once at the end instead of every 30 seconds, without the lines around it."""

        def should_report(self, trials, done=False):
            return done

        def report(self, trials, done, *system_info):
            text = self._progress_str(sorted(trials, key=lambda trial: trial.trial_id), done, *system_info)
            lines = text.split("Number of errored trials")[0].splitlines()  # these are named below, with their cause
            print(*(line for line in lines if line.startswith(("+", "|", "Number of trials"))), sep="\n", file=sys.__stdout__, flush=True)

    continued = any(run_dir.glob("tune/experiment_state-*.json"))  # RESUME, or Slurm has started the job once more
    Trial.should_recover = try_again
    prefix, numbers = os.urandom(3).hex()[:5], itertools.count(len(list(run_dir.glob("tune/TorchTrainer_*"))))
    Trial.generate_id = lambda: f"{prefix}_{next(numbers):05d}"  # for search algorithms: trials are numbered as without one
    random.seed(s.SEED)  # PBT draws from both
    numpy.random.seed(s.SEED)
    chosen = scheduler(s)
    remembers = isinstance(chosen, Remembers)
    if remembers:
        chosen.journal = run_dir / "reports.jsonl"
    trainable = tune.with_parameters(run_trial, settings=s, data=[ray.put(data)], use_gpu=use_gpu, run_dir=run_dir, slots=slots)
    trainable = tune.with_resources(trainable, place_of_a_trial(s, use_gpu))
    tuner = tune.Tuner(
        trainable,
        param_space=search_space(s),
        tune_config=tune.TuneConfig(
            num_samples=s.NUM_SAMPLES,
            scheduler=chosen,
            search_alg=sampler(s),
            trial_name_creator=lambda trial: f"TorchTrainer_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"TorchTrainer_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(run_dir),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            # A diverged trial ends at once. ASHA ends the others at the last epoch (max_t), other schedulers do not.
            stop=lambda trial_id, result: not math.isfinite(result["eval_loss"]) or (not remembers and result["epoch"] >= s.NUM_EPOCHS),
            callbacks=[Progress()],
            progress_reporter=FinalTable(
                metric_columns={"training_iteration": "iter", "time_total_s": "total time (s)", "eval_loss": "eval_loss"},
                max_column_length=40,
                max_progress_rows=s.NUM_SAMPLES,
                max_error_rows=0,
            ),
            verbose=1,
        ),
    )
    if continued:
        tuner = tune.Tuner.restore(str(run_dir / "tune"), trainable, resume_unfinished=True, restart_errored=True, param_space=search_space(s))
        say(f"continues the run in {run_dir}: finished and stopped trials stay as they are")
    results = tuner.fit()

    failed = [result for result in results if result.error]
    if not failed:  # else RESUME may want them
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    for result in failed:
        say(f"FAILED {Path(result.path).name}: {cause_of(str(result.error))} (full trace: {result.path}/error.txt)")
    cut = [Path(result.path).name for result in results if not result.error and last_epoch(result) != result.metrics.get("epoch")]
    if cut:
        print(f"ERROR: reports of {', '.join(cut)} are not all in {run_dir}; is the disk full, or the quota reached?", file=sys.__stdout__)
        return 1
    best = best_report(results)
    if best is None or len(results) < s.NUM_SAMPLES:
        print(f"ERROR: {len(results)} of {s.NUM_SAMPLES} trials ran, {len(failed)} failed"
              + ("; none reported a loss: read the first trace above" if best is None else ""), file=sys.__stdout__)
        return 1
    print(f"Best Trial Result:\n{best}", file=sys.__stdout__, flush=True)
    return 0


def main():
    """Returns the exit status: 0 success, 1 the search failed, 2 bad input (one line each, nothing started)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--get", nargs="+", metavar="NAME", choices=VARIABLES, help="print resolved values, one on a line")
    what.add_argument("--check", action="store_true", help="check every input and print the settings; start nothing")
    what.add_argument("--run-dir", type=Path, metavar="DIR", help="run the search; its results go here")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a path can hold letters that the terminal's encoding lacks
    try:
        settings = read_settings(os.environ, look_into_folders=True)
        if arguments.get:
            for name in arguments.get:
                value = getattr(settings, name)
                print(*value if isinstance(value, list) else [value])
            return 0
        check_search_space(search_space(settings))
        check_scheduler(scheduler(settings), settings)
        if arguments.check:
            for name in VARIABLES:
                value = getattr(settings, name)
                print(f"  {name:<18} {' '.join(map(str, value)) if isinstance(value, list) else value}")
            return 0
        return search(settings, arguments.run_dir.resolve())
    except InputError as error:
        print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"ERROR: {sys.executable} has no package {error.name}; run scripts/setup_env.sh, or activate the course's environment", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Ray would take its leave of a cluster that now ends, while the nodes are held for a second or two
