#!/usr/bin/env python3
"""Checks every input of a run before anything is started: variables, model, data, search space, scheduler.

    python check_inputs.py                            # prints the settings, or an ERROR line per problem
    exports=$(python check_inputs.py --export) && eval "$exports"     # for scripts: the settings as variables
    python check_inputs.py --get NUM_EPOCHS SEED      # these values, one per line; model and data stay closed

Numbers come first, within a second; then model and data are loaded as the search will load them, all but the weights.
With RESUME=FOLDER the settings are those of the run in that folder. Exit status: 0 all is well, 2 problems.
"""

import argparse
import contextlib
import difflib
import errno
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import rooms  # noqa: F401
from this_node import usable_cpus

for package in ("ray", "torch", "transformers", "datasets", "deepspeed"):
    if not importlib.util.find_spec(package):
        fix = "run scripts/setup_env.sh, or activate the course's environment"
        print(f"ERROR: {sys.executable} has no package {package}; {fix}", file=sys.stderr)
        sys.exit(2)
import raytune_asha_hpo as lesson

LIMITS = {  # name: (lowest, highest)
    "LR_LOWER": (0, 10), "LR_UPPER": (0, 10), "WD_CHOICES": (0, 10),  # a rate of 0 trains nothing, see read_number
    "BS_CHOICES": (1, 1024),  # a batch of 1024 samples has 512 k tokens: more than any GPU holds
    "WORKER_NODES": (1, 1000), "NUM_SAMPLES": (1, 100_000), "NUM_EPOCHS": (1, 10_000),
    "TRAIN_SAMPLES": (1, 1_000_000), "EVAL_SAMPLES": (1, 1_000_000), "TEST_SAMPLES": (1, 1_000_000),  # of ask.py
    "WORKERS_PER_TRIAL": (1, 1024), "CPUS_PER_WORKER": (1, 1024), "GPUS_PER_WORKER": (0, 1),
    "WORKER_DEADLINE": (1, 1_000_000), "CHAT_TEMPLATE": (0, 1), "SEED": (0, 2**31 - 1),
}  # fmt: skip
DECIMAL = ("LR_LOWER", "LR_UPPER", "WD_CHOICES")  # the others are whole numbers
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
MAY_CHANGE = ("WORKER_NODES", "CPUS_PER_WORKER", "WORKER_DEADLINE")  # of a resumed run; its results stay
PROCESSES_PER_CPU = 4  # training processes of a trial on a machine without Slurm, at most
HUB_SECONDS = 10  # after which the hub counts as out of reach
ENCODED = 100  # questions of a split that are encoded here; of a file all are read
INDEX = "model.safetensors.index.json"  # of weights in several files
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"}
NEEDS_GPU = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile"}  # fields not tried here
WRONG_DATA = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what unexpected JSON leads to


class InputError(Exception):
    """Bad input. As check() raises it: one line per problem, NAME='value': why; fix. Inside it: why; fix."""


def check(environ, look_inside=True):
    """The settings of a run, all checked. look_inside: model and data, too. Raises InputError.

    Folders become absolute paths, because worker nodes start elsewhere. gpus_required says whether the user
    has set GPUS_PER_WORKER; if not, nodes without GPUs may train as well.
    """
    environ, script = environ_of_run(environ)
    s, problems = SimpleNamespace(gpus_required="GPUS_PER_WORKER" in environ, search_script=script), []
    for name, (default, *_) in lesson.VARIABLES.items():
        text = environ.get(name, default)
        try:
            setattr(s, name, read_value(name, text))
        except InputError as error:
            setattr(s, name, None)
            problems.append(f"{name}={text!r:.500}: {error} (default: {default!r})")
    if None not in (s.LR_LOWER, s.LR_UPPER) and s.LR_LOWER >= s.LR_UPPER:
        lower, upper = (environ.get(name, lesson.VARIABLES[name][0]) for name in ("LR_LOWER", "LR_UPPER"))
        problems.append(f"LR_LOWER={lower!r} LR_UPPER={upper!r}: LR_LOWER must be the smaller of the two")
    for name in sorted(environ):
        if meant := misspelt(name):
            why = f"no such variable; did you mean {meant}? (otherwise unset {name})"
            problems.append(f"{name}={environ[name]!r:.500}: {why}")
    cpus, asked = usable_cpus(), s.WORKERS_PER_TRIAL
    if look_inside and asked and asked > PROCESSES_PER_CPU * cpus and not environ.get("ON_SLURM"):
        fix = f"set at most {PROCESSES_PER_CPU * cpus}, or use sbatch"  # there, worker_capacity.py says what fits
        why = f"too many training processes for this machine with {cpus} CPUs"
        problems.append(f"WORKERS_PER_TRIAL='{asked}': {why}; {fix}")
    if look_inside and not problems:
        problems = search_problems(s) + model_and_data_problems(s)
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
    if name in LIMITS:
        return read_list(name, text) if name.endswith("_CHOICES") else read_number(name, text)
    if not text.strip():
        raise InputError("is empty; unset it to use the default")
    if name == "PRECISION":
        if text not in PRECISIONS:
            raise InputError(f"must be one of {', '.join(PRECISIONS)}")
        return text
    path = os.path.realpath(os.path.expanduser(text))
    if not path.isprintable():
        raise InputError(f"its full path {path!r} contains a line break or the like; use another folder")
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII):
        raise InputError("no such folder; give an existing folder or the name of one on the Hugging Face hub")
    return text


def read_number(name, text):
    low, high = LIMITS[name]
    kind, word = (float, "a number") if name in DECIMAL else (int, "a whole number")
    try:
        if kind is int and not re.fullmatch("-?[0-9]+", text):  # int() also reads " 1_0", a shell does not
            raise ValueError
        value = kind(text)
    except ValueError:
        raise InputError(f"is not {word}") from None
    above = name.startswith("LR_")
    if not low <= value <= high or (above and value == low):  # NaN is not between any two numbers
        raise InputError(f"must be {word} {'above' if above else 'at least'} {low} and at most {high}")
    return value


def read_list(name, text):
    values = []
    for word in text.split():
        try:
            values.append(read_number(name, word))
        except InputError as error:
            comma = " (separate with spaces, not commas)" if "," in word else ""
            raise InputError(f"{word!r:.80} {error}{comma}") from None
    if not values:
        raise InputError('is empty; give one or more values separated by spaces, such as "1 2"')
    if len(set(values)) < len(values):
        raise InputError("lists a value twice; list each once")
    return values


def environ_of_run(environ):
    """(variables, search script): with RESUME those of the run in that folder; others are refused."""
    folder = environ.get("RESUME")
    if not folder:
        return environ, None
    import read_run

    saved, script = read_run.settings_of(folder), read_run.started_of(folder).get("script")
    if not saved:
        why = f"RESUME={folder!r:.500}: no record of a search (events.jsonl) in this folder"
        fix = "or, if that run ended before its search began, submit a new one without RESUME"
        raise InputError(f"{why}; give a folder such as runs/12345, {fix}")
    if script and not os.path.isfile(script):
        fix = "put it back, or start a new run without RESUME"
        raise InputError(f"RESUME={folder!r:.500}: its search script {script} does not exist any more; {fix}")
    saved = {name: text for name, text in saved.items() if name in lesson.VARIABLES}
    fixed = [name for name in lesson.VARIABLES if name in environ and name not in MAY_CHANGE]
    changed = {name: saved.get(name, "the default") for name in fixed if not same(name, environ[name], saved.get(name))}
    if script and os.path.realpath(environ.get("SEARCH_SCRIPT") or script) != os.path.realpath(script):
        changed["SEARCH_SCRIPT"] = script
    if changed:
        raise InputError("\n".join(f"{name}={environ[name]!r:.500}: the run in {folder} has {its!r}; unset {name}, or "
                                   "start a new run without RESUME" for name, its in changed.items()))  # fmt: skip
    return environ | saved | {name: environ[name] for name in MAY_CHANGE if name in environ}, script


def same(name, text, saved):
    with contextlib.suppress(InputError):
        return text == saved or (saved is not None and read_value(name, text) == read_value(name, saved))


# ---- What libraries raise --------------------------------------------------------------------------------
REASONS = {  # of the classes of an exception, its causes and their bases the first that stands here: why; fix
    "OfflineModeIsEnabled": "the hub is switched off; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
    "GatedRepoError": "the hub asks you to accept its terms; do so on its page there, then: hf auth login",
    "RepositoryNotFoundError": "the hub has nothing public of this name; check its spelling, or: hf auth login",
    "HfHubHTTPError": "the hub answers with an error; try again later",
    "TransportError": "the hub cannot be reached from this machine; fetch it on a login node that can, if need be "
                      "through HTTPS_PROXY (bash scripts/prefetch.sh), and give the local folder",
}  # fmt: skip


@contextlib.contextmanager
def told(problems, name, value, otherwise="cannot be loaded; fetch it again, or use another one"):
    """Whatever goes wrong inside becomes a line of `problems`."""
    try:
        yield
    except InputError as error:
        problems.append(f"{name}={value!r}: {error}")
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
        problems.append(f"{name}={value!r}: {why} ({one_line(error)}); {fix}")


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:250]


# ---- Model and data --------------------------------------------------------------------------------------
def model_and_data_problems(s):
    """Loads MODEL_NAME and SQUAD_DATA as the search will, all but the weights: that takes too long."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
             "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
    os.environ.update(quiet | os.environ)  # the libraries read them when they are imported
    problems, few = [], {}
    with told(problems, "MODEL_NAME", s.MODEL_NAME):
        place, config = check_model(s.MODEL_NAME)
        from transformers import AutoTokenizer

        no_tokenizer = "its tokenizer cannot be loaded; give it a tokenizer.json, or run: pip install sentencepiece"
        with told(problems, "MODEL_NAME", s.MODEL_NAME, no_tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            if tokenizer.eos_token_id is None:
                raise InputError("its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    with told(problems, "SQUAD_DATA", s.SQUAD_DATA, "is not SQuAD v1.1; give rajpurkar/squad, or another of its form"):
        for name, (source, rows) in zip(("TRAIN_SAMPLES", "EVAL_SAMPLES"), read_splits(s.SQUAD_DATA), strict=True):
            asked, found = getattr(s, name), len(rows)
            few[name] = min(asked, ENCODED)
            if not os.path.isdir(s.SQUAD_DATA):  # of a large data set only what is used
                check_rows(lesson.draw(rows, min(asked, found), s.SEED))
            if asked > found:
                problems.append(f"{name}='{asked}': {source} has only {found} questions; ask for at most {found}")
    if not problems and s.CHAT_TEMPLATE:
        no_template = "the tokenizer has no chat template, or one that takes no single prompt; set CHAT_TEMPLATE=0"
        with told(problems, "CHAT_TEMPLATE", "1", no_template):
            user = [{"role": "user", "content": "@@"}]
            if tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True).count("@@") != 1:
                raise InputError("the chat template does not show the prompt as it is; set CHAT_TEMPLATE=0")
    if not problems:
        with told(problems, "MODEL_NAME", s.MODEL_NAME):
            encoded = lesson.load_squad(SimpleNamespace(**vars(s) | few | {"MODEL_NAME": place}))
            last = max(token for rows in encoded for row in rows for token in row["input_ids"])
            if last >= (words := config.get_text_config().vocab_size):
                why = f"its tokenizer makes token {last}, but the model knows only {words}"
                raise InputError(f"{why}; use a tokenizer without added tokens, or resize the embeddings")
    return problems


def check_model(name):
    """(place, configuration) of a model that can be trained. Raises InputError."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    place, names = find_model(name)
    if "config.json" not in names:
        raise InputError("has no config.json; give a folder that save_pretrained wrote")
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    encoder = type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{config.model_type} is not a causal language model that can be trained; use another one")
    if quantized := getattr(config, "quantization_config", None):
        raise InputError(f"its weights are quantized ({quantized!r:.80}); use the model from which it was made")
    if not TOKENIZERS & set(names):
        raise InputError("has no tokenizer files such as tokenizer.json; fetch the whole model, or use another one")
    return place, config


def find_model(name):
    """(place, names of its files): its folder, or one in the hub's cache that is whole, or the hub."""
    if os.path.isdir(name):
        open_weights(name)
        return name, os.listdir(name)
    import huggingface_hub as hub

    with contextlib.suppress(hub.errors.LocalEntryNotFoundError, InputError):
        folder = hub.snapshot_download(name, local_files_only=True)
        open_weights(folder)
        if TOKENIZERS & set(os.listdir(folder)):
            return folder, os.listdir(folder)
    names = [file.rfilename for file in hub.HfApi().model_info(name, timeout=HUB_SECONDS).siblings]
    weights_of(names)
    return name, names


def weights_of(names):
    """Those of a model's files that hold its weights."""
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
            with safe_open(folder / name, framework="numpy"):
                pass
    except Exception as error:  # noqa: BLE001  the library has an exception of its own, derived from none
        fix = "remove this folder and fetch the model again (git alone fetches no weights)"
        raise InputError(f"{name} is missing or incomplete ({one_line(error)}); {fix}") from None


def read_splits(data):
    """[(source, rows)] of training and validation. Raises InputError."""
    if os.path.isdir(data):
        return [(name, read_file(Path(data, name))) for name in files_of_data(data)]
    import huggingface_hub as hub

    if not hub.constants.HF_HUB_OFFLINE:  # else only the cache is asked
        hub.HfApi().dataset_info(data, timeout=HUB_SECONDS)
    return list(zip((f"{data} (train)", f"{data} (validation)"), lesson.read_splits(data), strict=True))


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
                example = json.loads(line.decode())
                row = {"context": "", "question": example["prompt"], "answers": {"text": [example["answer"]]}}
                rows += check_rows([row])
        source = path.name
        return check_rows(rows)
    except FileNotFoundError:
        form = "train-v1.1.json and dev-v1.1.json, or train.jsonl and dev.jsonl"
        raise InputError(f"no file {path.name} in this folder; give a folder that has {form}") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror}); fix its permissions") from None
    except WRONG_DATA as error:
        raise InputError(f"{source} is not {form} ({one_line(error)}); mend it, or fetch it again") from None


def check_rows(rows):
    """The rows. Raises one of WRONG_DATA if a row cannot be trained on, or is not what would be trained on."""
    if not rows:
        raise ValueError("no questions")
    for row in rows:
        prompt, answers = row["context"] + row["question"], row["answers"]["text"]
        if not isinstance(answers, list):
            raise TypeError(f"the answers to {row['question']!r:.60} are not a list of texts")
        if not prompt.strip() or not answers or not answers[0].strip():
            raise ValueError(f"{row['question']!r:.60} is an empty question or, as in SQuAD v2, has no answer")
        "".join([prompt, *answers]).encode()  # tokenizers refuse halves of surrogate pairs
    return rows


# ---- Search space and scheduler --------------------------------------------------------------------------
def search_problems(s):
    """Values that the Trainer refuses; a scheduler that needs checkpoints."""
    from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining

    try:
        space, chosen = lesson.search_space(s), lesson.scheduler(s)
        if set(space) != {"train_loop_config"}:
            return [f"search space: has {sorted(space)}; put what is drawn into train_loop_config, nothing beside it"]
        if isinstance(chosen, (PopulationBasedTraining, HyperBandScheduler)):
            why = "interrupts trials and continues them from checkpoints, which raytune_asha_hpo.py does not save"
            fix = "use raytune_pbt_hpo.py, or a scheduler that only stops trials"
            return [f"scheduler: {type(chosen).__name__} {why}; {fix}"]
        return trainer_problems(space["train_loop_config"])
    except Exception as error:  # noqa: BLE001  it is the user's code
        return [f"search space or scheduler: {one_line(error)}; mend it in raytune_asha_hpo.py"]


def trainer_problems(drawn):
    """What TrainingArguments says of the names and of values drawn, if there are others than the lesson's own."""
    ours = lesson.TRAINING_ARGUMENT
    if set(drawn) <= set(ours):
        return []  # without an import that takes seconds
    from ray.tune.search.variant_generator import generate_variants
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):
        _setup_devices = None  # neither a GPU nor the other processes of a trial are asked

    fields, problems = [*ours, *TrainingArguments.__dataclass_fields__], []
    for name in sorted(set(drawn) - set(fields)):
        why = f"{name!r} is no hyperparameter: neither one of {', '.join(ours)} nor a field of TrainingArguments"
        meant = difflib.get_close_matches(name, fields, 1)
        problems.append(f"search space: {why}; " + (f"did you mean {meant[0]!r}?" if meant else "remove it"))
    for _ in range(0 if problems else 20):  # draws
        for _, values in generate_variants(drawn):
            values = {ours.get(name, name): value for name, value in values.items() if name not in NEEDS_GPU}
            Arguments(**{"output_dir": "/tmp", "use_cpu": True, "report_to": "none"} | values)
    return problems


# ---- Command line ----------------------------------------------------------------------------------------
def as_text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def export_lines(s):
    """For a shell. GPUS_PER_WORKER that is not set means 1, and 0 on nodes without GPUs."""
    names = [name for name in lesson.VARIABLES if name != "GPUS_PER_WORKER" or s.gpus_required]
    script = [f"export SEARCH_SCRIPT={shlex.quote(s.search_script)}"] if s.search_script else []
    return [f"export {name}={shlex.quote(as_text(getattr(s, name)))}" for name in names] + script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--export", action="store_true", help="export lines for a shell; table on stderr")
    what.add_argument("--get", nargs="+", metavar="NAME", choices=lesson.VARIABLES, help="one per line")
    a = parser.parse_args()
    try:
        s = check(os.environ, look_inside=not a.get)
    except InputError as error:
        print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    if not a.get:
        shown = sys.stderr if a.export else sys.stdout
        shown.reconfigure(errors="backslashreplace")  # a path can have letters that the terminal lacks
        table = (f"  {name:<18} {as_text(getattr(s, name))}" for name in lesson.VARIABLES)
        print(*table, sep="\n", file=shown, flush=True)
    lines = export_lines(s) if a.export else [as_text(getattr(s, name)) for name in a.get or ()]
    sys.stdout.buffer.write(b"".join(os.fsencode(f"{line}\n") for line in lines))  # the exact bytes
    return 0


if __name__ == "__main__":
    sys.exit(main())
