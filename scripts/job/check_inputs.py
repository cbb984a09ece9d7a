#!/usr/bin/env python3
"""Checks every input of a run before anything is started: variables, model, data, search space, scheduler.

    python check_inputs.py                            # prints the settings, or an ERROR line per problem
    exports=$(python check_inputs.py --export) && eval "$exports"     # for scripts: the settings as variables
    python check_inputs.py --get NUM_EPOCHS SEED      # these values, one per line; model and data stay closed

Model and data are loaded as the search will load them, all but the weights. With RESUME=FOLDER the settings are those
of the run in that folder. Exit status: 0 all is well, 2 problems.
"""

import argparse
import contextlib
import difflib
import errno
import gc
import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import rooms  # noqa: F401
from this_node import usable_cpus

for package in ("ray", "torch", "transformers", "datasets", "deepspeed"):
    if not importlib.util.find_spec(package):
        print(f"ERROR: {sys.executable} lacks {package}; run scripts/setup_env.sh, or activate .venv", file=sys.stderr)
        sys.exit(2)
import raytune_asha_hpo as lesson

LIMITS = {  # name: (lowest, highest); those with a point need not be whole numbers
    "LR_LOWER": (0.0, 10.0), "LR_UPPER": (0.0, 10.0), "WD_CHOICES": (0.0, 10.0),  # a rate of 0 trains nothing
    "GPUS_PER_WORKER": (0.0, 1.0),
    "BS_CHOICES": (1, 1024),  # a batch of 1024 samples has 512 k tokens: more than any GPU holds
    "WORKER_NODES": (1, 1000), "NUM_SAMPLES": (1, 100_000), "NUM_EPOCHS": (1, 10_000),
    "TRAIN_SAMPLES": (1, 1_000_000), "EVAL_SAMPLES": (1, 1_000_000), "TEST_SAMPLES": (1, 1_000_000),  # of ask.py
    "WORKERS_PER_TRIAL": (1, 1024), "CPUS_PER_WORKER": (1, 1024),
    "MEMORY_PER_WORKER": (0.0, 10_000.0), "WORKER_DEADLINE": (1, 1_000_000), "CHAT_TEMPLATE": (0, 1),
    "TIME_BUDGET": (0, 10_000_000), "SEED": (0, 2**31 - 1),
}  # fmt: skip
# Of a resumed run; its results stay.
MAY_CHANGE = ("WORKER_NODES", "CPUS_PER_WORKER", "MEMORY_PER_WORKER", "WORKER_DEADLINE", "TIME_BUDGET")
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
         "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
TRY_SECONDS = 300  # for a small model to train with all that differs in twenty draws
HUB_SECONDS = 10  # after which the hub counts as out of reach
INDEX = "model.safetensors.index.json"  # of weights in several files
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"}
REPORTED = {"metric": ["eval_loss"], "mode": ["min"],  # what fits, first what is meant
            "time_attr": ["epoch", "training_iteration", "time_total_s"]}  # fmt: skip
# Their loss is not that of the next token, or depends on the padding.
NOT_SUITED = {"xlnet", "cpmant", "rwkv", "recurrent_gemma"}
# Fields not tried here: this node may lack the GPU, or it would take long.
NOT_TRIED = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile", "num_train_epochs",
             "max_steps"}  # fmt: skip


class InputError(Exception):
    """Bad input. As check() raises it: one line per problem, NAME='value': why; fix. Inside it: why; fix."""


def check(environ, look_inside=True, search=True):
    """The settings of a run, all checked; folders as absolute paths. look_inside: model, data and search space, too."""
    environ, script = environ_of_run(environ)
    texts = {name: environ.get(name, default) for name, (default, *_) in lesson.VARIABLES.items()}
    s, problems = SimpleNamespace(**dict.fromkeys(texts, float("nan"))), []  # NaN is neither above nor below a limit
    s.gpus_required, s.search_script, s.parameters = "GPUS_PER_WORKER" in environ, script, None
    for name, text in texts.items():
        with told(problems, name, text):
            setattr(s, name, read_value(name, text))
    if 0 < s.GPUS_PER_WORKER < 1 < s.WORKERS_PER_TRIAL:
        problems.append("GPUS_PER_WORKER={GPUS_PER_WORKER!r} WORKERS_PER_TRIAL={WORKERS_PER_TRIAL!r}: NCCL refuses two "
                        "workers of a trial on one GPU; set WORKERS_PER_TRIAL=1".format(**texts))
    if s.LR_LOWER >= s.LR_UPPER:
        problems.append("LR_LOWER={LR_LOWER!r} LR_UPPER={LR_UPPER!r}: LR_LOWER must be the smaller".format(**texts))
    problems += [f"{name}={environ[name]!r:.500}: no such variable; did you mean {meant}? (otherwise unset {name})"
                 for name in sorted(environ) if (meant := misspelt(name))]  # fmt: skip
    most = 4 * usable_cpus()
    if look_inside and s.WORKERS_PER_TRIAL > most and not environ.get("ON_SLURM"):  # there, worker_capacity.py tells
        asked = f"WORKERS_PER_TRIAL='{s.WORKERS_PER_TRIAL}'"
        problems.append(f"{asked}: too many processes for this machine; set at most {most}, or use sbatch")
    if look_inside and not problems:
        os.environ.update(QUIET | os.environ)  # the libraries read them when they are imported
        problems = (search_problems(s) if search else []) + model_and_data_problems(s)
    if problems:
        raise InputError("\n".join(problems))
    return s


# ---- Variables -------------------------------------------------------------------------------------------
def misspelt(name):
    """The variable that was meant, or None: NUM_SAMPLE and MODELNAME, but not NODE_NAME, SEEDS or seed."""
    ours = [*lesson.VARIABLES, "RESUME"]
    if name in ours or not re.fullmatch("[A-Z0-9_]+", name):
        return None
    alike = 0.75 if name.startswith(("LR_", "BS_", "WD_")) else 0.9  # hardly any other program has these
    return next(iter(difflib.get_close_matches(name, ours, 1, alike)), None)


def read_value(name, text):
    """The value of a variable; of a folder its absolute path."""
    if not text.isprintable():
        raise InputError("contains a line break, control character or invalid UTF-8 (Windows line endings?); remove it")
    if name == "MEMORY_PER_WORKER" and text == "auto":
        return text
    if name in LIMITS:
        return read_list(name, text) if name.endswith("_CHOICES") else read_number(name, text)
    if not text.strip():
        raise InputError("is empty; unset it to use the default")
    if name == "PRECISION":
        if text not in ("auto", "bf16", "fp16", "fp32"):
            raise InputError("must be one of auto, bf16, fp16, fp32")
        return text
    path = absolute(text)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII):
        raise InputError("no such folder; give an existing folder or the name of one on the Hugging Face hub")
    return text


def absolute(text):
    """The path by the folder names that the user sees: other nodes may not have those behind an automounter's links."""
    path = os.path.expanduser(text)
    named = os.path.normpath(os.path.join(os.environ.get("PWD", "/"), path))
    return named if os.path.realpath(named) == os.path.realpath(path) else os.path.realpath(path)


def read_number(name, text):
    low, high = LIMITS[name]
    kind, word = (float, "a number") if isinstance(low, float) else (int, "a whole number")
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"is not {word}") from None
    above = name.startswith("LR_")
    if not low <= value <= high or (above and value == low):  # NaN is not between any two numbers
        raise InputError(f"must be {word} {'above' if above else 'at least'} {low} and at most {high}")
    if name == "GPUS_PER_WORKER" and 0 < value < 0.01:
        raise InputError("is too small a share of a GPU; set 0, 1, or at least 0.01, such as 0.5")
    return int(value) if name == "GPUS_PER_WORKER" and value in (0, 1) else value


def read_list(name, text):
    if not text.strip() or "," in text:
        raise InputError('must be one or more values separated by spaces, not commas, such as "1 2"')
    values = [read_number(name, word) for word in text.split()]
    if len(set(values)) < len(values):
        raise InputError("lists a value twice; list each once")
    return values


def environ_of_run(environ):
    """(variables, search script): with RESUME those of the run in that folder; others are refused."""
    if not (folder := environ.get("RESUME")):
        return environ, None
    import read_run

    found, script = read_run.settings_of(folder), read_run.started_of(folder).get("script")
    if not found:
        raise InputError(f"RESUME={folder!r:.500}: no record of a search (events.jsonl); give one such as runs/12345")
    saved = {"SEARCH_SCRIPT": script} | {name: text for name, text in found.items() if name in lesson.VARIABLES}
    given = {name: environ[name] for name in ("SEARCH_SCRIPT", *lesson.VARIABLES) if name in environ}
    problems = [f"{name}={text!r:.500}: the run in {folder} has {saved.get(name, 'the default')!r}; unset {name}, or "
                "start a new run without RESUME"
                for name, text in given.items() if name not in MAY_CHANGE and not same(name, text, saved.get(name))]
    if problems:
        raise InputError("\n".join(problems))
    return environ | saved | {name: given[name] for name in MAY_CHANGE if name in given}, script


def same(name, text, saved):
    read = os.path.realpath if name == "SEARCH_SCRIPT" else lambda text: read_value(name, text)
    with contextlib.suppress(InputError):
        return text == saved or (saved is not None and read(text) == read(saved))


# ---- What libraries raise --------------------------------------------------------------------------------
REASONS = {  # of the classes of an exception, its causes and their bases the first that stands here: why; fix
    "GatedRepoError": "the hub asks you to accept its terms; do so on its page there, then: hf auth login",
    "RepositoryNotFoundError": "the hub has nothing public of this name; check its spelling, or: hf auth login",
    "TransportError": "the hub cannot be reached from this machine; fetch it on a login node that can, if need be "
                      "through HTTPS_PROXY (bash scripts/prefetch.sh), and give the local folder",
}  # fmt: skip


@contextlib.contextmanager
def told(problems, name, value, otherwise="cannot be loaded; fetch it again, or use another one"):
    """Whatever goes wrong inside becomes a line of `problems`."""
    try:
        yield
    except InputError as error:
        problems.append(f"{name}={value!r:.500}: {error}")
    except Exception as error:  # noqa: BLE001  each library raises its own kinds
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
        why, fix = next((REASONS[kind] for kind in REASONS if kind in kinds), otherwise).split("; ", 1)
        if {getattr(each, "errno", None) for each in chain} & {errno.ENOSPC, errno.EDQUOT}:
            why, fix = "the disk is full, or your quota is reached", "make room, or use a folder on another disk"
        if "trust_remote_code" in str(error):
            why, fix = "needs Python code of its own, which is never run", "use another model"
        problems.append(f"{name}={value!r:.500}: {why} ({one_line(error)}); {fix}")


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:250]


# ---- Model and data --------------------------------------------------------------------------------------
def model_and_data_problems(s):
    """Loads MODEL_NAME and SQUAD_DATA as the search will, all but the weights: that takes too long."""
    problems, few = [], {}
    with told(problems, "MODEL_NAME", s.MODEL_NAME):
        place, config = check_model(s.MODEL_NAME)
        from transformers import AutoTokenizer

        no_tokenizer = "its tokenizer cannot be loaded; give it a tokenizer.json, or run: pip install sentencepiece"
        with told(problems, "MODEL_NAME", s.MODEL_NAME, no_tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            if tokenizer.eos_token_id is None:
                raise InputError("its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
        s.parameters = None if problems else parameters_of(place, config)
    with told(problems, "SQUAD_DATA", s.SQUAD_DATA, "cannot be read; give SQuAD's JSON, {train,dev}.jsonl or a hub id"):
        for name, rows in zip(("TRAIN_SAMPLES", "EVAL_SAMPLES"), read_splits(s.SQUAD_DATA), strict=True):
            asked, found = getattr(s, name), len(rows)
            few[name] = min(asked, 100)  # are encoded here
            if asked > found:
                problems.append(f"{name}='{asked}': there are only {found} questions; ask for at most {found}")
    if not problems and s.CHAT_TEMPLATE:
        no_template = "the model has no chat template, or one that takes no single prompt or does not show the prompt"
        with told(problems, "CHAT_TEMPLATE", "1", f"{no_template}; set CHAT_TEMPLATE=0"):
            lesson.neighbour("own_data").in_chat_template("", "", tokenizer)
    if not problems:
        with told(problems, "MODEL_NAME", s.MODEL_NAME):
            config = config.get_text_config()
            words, most = config.vocab_size, getattr(config, "max_position_embeddings", 512)
            few = few if most >= 512 else {}  # the lesson's rows are no longer than that
            encoded = lesson.load_squad(SimpleNamespace(**vars(s) | few | {"MODEL_NAME": place}))
            rows = [row["input_ids"] for each in encoded for row in each]
            tokens, longest = list(itertools.chain(*rows)), max(map(len, rows))
            if max(tokens) >= words:
                why = f"its tokenizer makes token {max(tokens)}, but the model knows only {words}"
                raise InputError(f"{why}; use its own one")
            if tokens.count(tokenizer.unk_token_id) > len(tokens) / 4:
                raise InputError("its tokenizer does not know the letters of SQUAD_DATA; use a model of that language")
            if longest > most:
                raise InputError(f"reads at most {most} tokens, and rows have up to {longest}; use another model")
    return problems


def check_model(name):
    """(place, configuration) of a model that can be trained. Raises InputError."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    place = find_model(name)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    encoder = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    other = encoder or getattr(config, "is_encoder_decoder", False) or config.model_type in NOT_SUITED
    if other or type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{config.model_type} is not a causal language model that can be trained; use another one")
    if quantized := getattr(config, "quantization_config", None):
        raise InputError(f"its weights are quantized ({quantized!r:.80}); use the model from which it was made")
    return place, config


def parameters_of(place, config):
    """Their number. Raises InputError if not all of them are in the model's files. What is on "meta" has no values."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if os.path.isdir(place):
        model, found = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, device_map="meta",
            ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
        wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
        if wrong:
            why = f"{len(wrong)} of its weights, such as {wrong[0]}, are missing or have another shape in config.json"
            raise InputError(f"{why}, and would be drawn at random; use the model as it was published")
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.num_parameters()


def find_model(name):
    """Its folder, or one in the hub's cache that is whole, or its name on the hub."""
    if os.path.isdir(name):
        open_weights(name)
        return name
    import huggingface_hub as hub

    with contextlib.suppress(hub.errors.LocalEntryNotFoundError, InputError):
        folder = hub.snapshot_download(name, local_files_only=True)
        open_weights(folder)
        return folder
    weights_of([file.rfilename for file in hub.HfApi().model_info(name, timeout=HUB_SECONDS).siblings])
    return name


def weights_of(names):
    """Those of a model's files that hold its weights. Raises InputError if there are none, or no tokenizer."""
    if "adapter_config.json" in names:
        raise InputError("is an adapter (adapter_config.json); merge it into its base model, and remove this file")
    if not TOKENIZERS & set(names):
        raise InputError("has no tokenizer files such as tokenizer.json; fetch the whole model, or use another one")
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if INDEX in names:
        return [INDEX, *(name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))]
    raise InputError("has no model.safetensors (other formats, such as .bin, are not loaded); use another model")


def open_weights(folder):
    """Raises InputError if a file of weights is missing or cut short, as its header tells."""
    from safetensors import safe_open

    (name, *_), folder = weights_of(os.listdir(folder)), Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text("utf-8")) if name == INDEX else {"weight_map": {"all": name}}
        for name in sorted(set(index["weight_map"].values())):
            safe_open(folder / name, framework="numpy")
    except Exception as error:  # noqa: BLE001  the library has an exception of its own, derived from none
        fix = "remove this folder and fetch the model again (git alone fetches no weights)"
        raise InputError(f"{name} is missing or incomplete ({one_line(error)}); {fix}") from None


def read_splits(data):
    """The rows of training and validation. Raises InputError."""
    if os.path.isdir(data):
        return [read_file(Path(data, name)) for name in files_of_data(data)]
    import huggingface_hub as hub

    if not hub.constants.HF_HUB_OFFLINE:  # else only the cache is asked
        hub.HfApi().dataset_info(data, timeout=HUB_SECONDS)
    return [check_rows(rows.to_list()) for rows in lesson.read_splits(data)]


def files_of_data(folder):
    form = ".jsonl" if Path(folder, "train.jsonl").exists() else "-v1.1.json"
    return f"train{form}", f"dev{form}"


def read_file(path):
    """The rows of SQuAD v1.1 or of JSON lines. Raises InputError that names the file and the line."""
    source, form, rows = path.name, "SQuAD v1.1", []
    try:
        if path.suffix != ".jsonl":
            return check_rows(lesson.read_file(path))
        form = 'UTF-8 lines of {"prompt": "...", "answer": "..."}'
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                source = f"{path.name}, line {number}:"
                line = json.loads(line.decode())
                rows += check_rows([{"context": "", "question": line["prompt"], "answers": {"text": [line["answer"]]}}])
        return check_rows(rows)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # of unexpected JSON
        raise InputError(f"{source} is not {form} ({one_line(error)}); mend it, or fetch it again") from None


def check_rows(rows):
    """The rows. Raises an error if a row cannot be trained on, or is not what would be trained on."""
    if not rows:
        raise ValueError("no questions")
    for row in rows:
        prompt, answers = row["context"] + row["question"], lesson.answers(row)
        if not prompt.strip() or not isinstance(answers, list) or not answers or not answers[0].strip():
            why = "is an empty question, or its answers are not a list of texts or, as in SQuAD v2, empty"
            raise ValueError(f"{row['question']!r:.60} {why}")
        "".join([prompt, *answers]).encode()  # tokenizers refuse halves of surrogate pairs
    return rows


# ---- Search space and scheduler --------------------------------------------------------------------------
def search_problems(s):
    """What the Trainer refuses in the search space; a scheduler that needs checkpoints."""
    from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler, PopulationBasedTraining
    from ray.tune.search.basic_variant import BasicVariantGenerator

    try:
        space, chosen = lesson.search_space(s), lesson.scheduler(s)
        if set(space) != {"train_loop_config"}:
            return [f"search space: has {sorted(space)}; put what is drawn into train_loop_config, nothing beside it"]
        if isinstance(chosen, (PopulationBasedTraining, HyperBandScheduler)):
            why = "continues trials from checkpoints, and raytune_asha_hpo.py saves none; use raytune_pbt_hpo.py"
            return [f"scheduler: {type(chosen).__name__} {why}, or a scheduler that only stops trials"]
        algorithm = lesson.search_algorithm(s)
        algorithm.set_search_properties(None, None, space)
        for each, (name, fit) in itertools.product((chosen, algorithm), REPORTED.items()):
            plain = type(each) in (FIFOScheduler, BasicVariantGenerator)  # they look at no report
            if not plain and (value := getattr(each, f"_{name}", fit[0])) not in fit:
                return [f"{type(each).__name__}: {name}={value!r}: is not what trials report; set {name}={fit[0]!r}"]
        return names_problems(space["train_loop_config"]) or values_problems(space)
    except Exception as error:  # noqa: BLE001  it is the user's code
        return [f"search space or scheduler: {one_line(error)}; mend it in raytune_asha_hpo.py"]


def names_problems(drawn):
    """Of hyperparameters that the Trainer does not know, or gets twice."""
    from transformers import TrainingArguments

    fields, problems = [*lesson.TRAINING_ARGUMENT, *TrainingArguments.__dataclass_fields__], []
    for name in sorted(drawn):
        if name not in fields:
            (nearest,) = difflib.get_close_matches(name, fields, 1, cutoff=0)
            problems.append(f"search space: {name!r} is no hyperparameter; remove it, or did you mean {nearest!r}?")
        elif (other := lesson.TRAINING_ARGUMENT.get(name)) in {*drawn} - {name}:
            problems.append(f"search space: {name!r} and {other!r} are the same hyperparameter; remove one")
    return problems


def values_problems(space):
    """Of twenty draws. If they have more than the lesson's own names, a model of two layers trains with each."""
    from ray.tune.search.variant_generator import generate_variants

    limits, problems, differ = {"lr": "LR_LOWER", "per_device_bs": "BS_CHOICES", "wd": "WD_CHOICES"}, [], {}
    for _, variant in itertools.chain.from_iterable(generate_variants(space) for _ in range(20)):
        drawn = variant["train_loop_config"]
        for name in limits.keys() & drawn:
            with told(problems, f"search space: {name}", drawn[name]):
                read_number(limits[name], str(drawn[name]))
        further = {name: value for name, value in drawn.items() if name not in {*limits, *NOT_TRIED}}
        differ[repr([value for value in further.values() if not isinstance(value, float)])] = further
    if not problems and any(differ.values()):  # in a process of its own, which it changes
        spawn, names = get_context("spawn"), sorted(space["train_loop_config"])
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=train_with, args=(list(differ.values()), theirs), daemon=True)
        failed = "a small model does not train with it to the end; draw something else, or try again later"
        with told(problems, "search space", names, failed):
            process.start()
            theirs.close()  # so that the end of the process is noticed
            if not ours.poll(TRY_SECONDS):
                raise TimeoutError(f"{TRY_SECONDS} s")
            problems += ours.recv()
        process.kill()
    return sorted(set(problems))


def train_with(draws, answer):
    """Sends the problems of a training with each of these draws."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), TORCHDYNAMO_DISABLE="1",
                          RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # fmt: skip
    from transformers import AutoModelForCausalLM, BloomConfig

    problems, rows = [], 37 * [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    with tempfile.TemporaryDirectory() as folder:
        small = BloomConfig(vocab_size=64, hidden_size=8, n_layer=2, n_head=2)
        AutoModelForCausalLM.from_config(small).save_pretrained(folder)
        s = lesson.read_settings({"MODEL_NAME": folder, "GPUS_PER_WORKER": "0", "NUM_EPOCHS": "1"})
        for drawn in draws:
            with told(problems, "search space", drawn, "training with it fails; draw something else"):
                lesson.fine_tune({"lr": 1e-4, "per_device_bs": 1} | drawn, s, rows, rows[:2])
    answer.send(problems)


# ---- Command line ----------------------------------------------------------------------------------------
def as_text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def export_lines(s):
    """For a shell. GPUS_PER_WORKER that is not set means 1, and 0 on nodes without GPUs."""
    names = [name for name in lesson.VARIABLES if name != "GPUS_PER_WORKER" or s.gpus_required]
    further = {"SEARCH_SCRIPT": s.search_script, "MODEL_PARAMETERS": s.parameters}  # the latter for worker_capacity.py
    values = {name: getattr(s, name) for name in names} | {name: x for name, x in further.items() if x}
    return [f"export {name}={shlex.quote(as_text(value))}" for name, value in values.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", action="store_true", help="export lines for a shell; table on stderr")
    parser.add_argument("--get", nargs="+", metavar="NAME", choices=lesson.VARIABLES, help="one per line")
    a = parser.parse_args()
    try:
        s = check(os.environ, look_inside=not a.get)
    except InputError as error:
        print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    if not a.get:
        shown = sys.stderr if a.export else sys.stdout
        shown.reconfigure(errors="backslashreplace")  # a path can have letters that the terminal lacks
        print(*(f"  {name:<18} {as_text(getattr(s, name))}" for name in lesson.VARIABLES), sep="\n", file=shown)
    lines = export_lines(s) if a.export else [as_text(getattr(s, name)) for name in a.get or ()]
    sys.stdout.buffer.write(b"".join(os.fsencode(f"{line}\n") for line in lines))  # the exact bytes
    return 0


if __name__ == "__main__":
    gc.disable()  # it takes a fifth of the time, and finds nothing
    logging.disable(logging.WARNING)  # of libraries; the log is for students
    sys.exit(main())
