#!/usr/bin/env python3
"""Checks every input of a run before anything is started: variables, model, data, search space, scheduler.

    python check_inputs.py                            # prints the settings, or an ERROR line per problem
    exports=$(python check_inputs.py --export) && eval "$exports"     # for scripts: the settings as variables
    python check_inputs.py --get NUM_EPOCHS SEED      # these values, one per line; model and data stay closed

With RESUME=FOLDER the settings are those of the run in that folder. Exit status: 0 all is well, 2 problems.
"""

import argparse
import difflib
import fnmatch
import importlib.util
import json
import os
import queue
import re
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import rooms  # noqa: F401
from this_node import usable_cpus


def missing_package(error):
    fix = "run scripts/setup_env.sh, or activate the course's environment"
    print(f"ERROR: {sys.executable} has no package {error.name}; {fix}", file=sys.stderr)
    sys.exit(2)


try:
    import raytune_asha_hpo as lesson
except ModuleNotFoundError as error:
    missing_package(error)

LIMITS = {  # name: (lowest, highest)
    "LR_LOWER": (0, 10),  # 0 itself trains nothing, see read_number
    "LR_UPPER": (0, 10),
    "BS_CHOICES": (1, 1024),  # a batch of 1024 samples has 512 k tokens: more than any GPU holds
    "WD_CHOICES": (0, 10),
    "WORKER_NODES": (1, 1000),
    "NUM_SAMPLES": (1, 100_000),
    "NUM_EPOCHS": (1, 10_000),
    "TRAIN_SAMPLES": (1, 1_000_000),
    "EVAL_SAMPLES": (1, 1_000_000),
    "TEST_SAMPLES": (1, 1_000_000),  # of ask.py
    "CHAT_TEMPLATE": (0, 1),
    "WORKERS_PER_TRIAL": (1, 1024),
    "CPUS_PER_WORKER": (1, 1024),
    "GPUS_PER_WORKER": (0, 1),
    "WORKER_DEADLINE": (1, 1_000_000),
    "SEED": (0, 2**31 - 1),
}
WORDS = {"PRECISION": ("auto", "bf16", "fp16", "fp32")}
DECIMAL = ("LR_LOWER", "LR_UPPER", "WD_CHOICES")  # the others are whole numbers
MAY_CHANGE = ("WORKER_NODES", "CPUS_PER_WORKER", "WORKER_DEADLINE")  # of a resumed run; its results stay
HUB_SECONDS = 10  # after which the hub counts as out of reach
PROCESSES_PER_CPU = 4  # training processes of a trial on a machine without Slurm, at most


class InputError(Exception):
    """Bad input. As check() raises it: one line per problem, NAME='value': why; fix. Inside it: why; fix."""


def check(environ, look_inside=True):
    """The settings of a run, all checked. look_inside: model and data, too. Raises InputError.

    Folders become absolute paths, because worker nodes start elsewhere. gpus_required says whether the user
    has set GPUS_PER_WORKER; if not, nodes without GPUs may train as well.
    """
    environ = environ_of_run(environ)
    s, problems = SimpleNamespace(gpus_required="GPUS_PER_WORKER" in environ), []
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
    for name in sorted(filter(str.isprintable, set(environ) - set(lesson.VARIABLES) - {"RESUME"})):
        if meant := misspelt(name):
            why = f"no such variable; did you mean {meant}? (otherwise unset {name})"
            problems.append(f"{name}={environ[name]!r:.500}: {why}")
    if look_inside:
        problems += model_and_data_problems(s) + machine_problems(s, environ)
        for package in ("torch", "transformers", "deepspeed"):
            if not importlib.util.find_spec(package):
                raise ModuleNotFoundError(name=package)
        if not problems:
            problems = search_space_problems(lesson.search_space(s)) + scheduler_problems(lesson.scheduler(s))
    if problems:
        raise InputError("\n".join(problems))
    return s


# ---- Variables -------------------------------------------------------------------------------------------
def misspelt(name):
    """The variable that was meant, or None: NUM_SAMPLE, MODELNAME, seed, but not SPEED, NODE_NAME or CHECKPOINT.

    Other programs have variables, too. So a name counts as misspelt if only case or underscores differ; in long
    names also one letter, or two neighbours that are swapped; and with LR_, BS_ or WD_, which nobody else uses,
    whatever is most like it.
    """
    plain = lambda text: text.upper().replace("_", "")
    for meant in (*lesson.VARIABLES, "RESUME"):
        if plain(name) == plain(meant) or (len(plain(meant)) > 6 and one_edit(plain(name), plain(meant))):
            return meant
    ours = [meant for meant in lesson.VARIABLES if meant[:3] in ("LR_", "BS_", "WD_") and meant[:3] == name[:3].upper()]
    return next(iter(difflib.get_close_matches(name.upper(), ours, n=1, cutoff=0.6)), None)


def one_edit(a, b):
    """Whether one letter was left out, added or replaced, or two neighbours were swapped."""
    start = len(os.path.commonprefix([a, b]))
    a, b = a[start:], b[start:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def read_value(name, text):
    """The value of a variable; of a folder its absolute path."""
    if not text.isprintable():
        what = "a line break, control character or invalid UTF-8 (Windows line endings?)"
        raise InputError(f"contains {what}; remove it")
    if name in LIMITS:
        return read_list(name, text) if name.endswith("_CHOICES") else read_number(name, text)
    if not text.strip():
        raise InputError("is empty; unset it to use the default")
    if name in WORDS:
        if text not in WORDS[name]:
            raise InputError(f"must be one of {', '.join(WORDS[name])}")
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
    """environ, with RESUME the variables of the run in that folder; others than these are refused."""
    folder = environ.get("RESUME")
    if not folder:
        return environ
    try:
        saved = dict(json.loads(Path(folder, "settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        why = f"RESUME={folder!r:.500}: no settings.json of a search in this folder"
        fix = "or, if that run ended before its search began, submit a new one without RESUME"
        raise InputError(f"{why}; give a folder such as runs/12345, {fix}") from None
    saved = {name: text for name, text in saved.items() if name in lesson.VARIABLES and isinstance(text, str)}
    changed = [
        f"{name}={environ[name]!r:.500}: the run in {folder} has {saved.get(name, 'the default')!r}; "
        f"unset {name}, or start a new run without RESUME"
        for name in lesson.VARIABLES
        if name in environ and name not in MAY_CHANGE and not same(name, environ[name], saved.get(name))
    ]
    if changed:
        raise InputError("\n".join(changed))
    return environ | saved | {name: environ[name] for name in MAY_CHANGE if name in environ}


def same(name, text, saved):
    try:
        return text == saved or (saved is not None and read_value(name, text) == read_value(name, saved))
    except InputError:
        return False


def machine_problems(s, environ):
    """A trial far too large for this machine. For Slurm's nodes, worker_capacity.py says what fits."""
    cpus, asked = usable_cpus(), s.WORKERS_PER_TRIAL or 0
    most = PROCESSES_PER_CPU * cpus
    if environ.get("ON_SLURM") or asked <= most:
        return []
    why = f"too many training processes for this machine with {cpus} CPUs"
    return [f"WORKERS_PER_TRIAL='{asked}': {why}; set at most {most}, or use sbatch"]


# ---- Model and data --------------------------------------------------------------------------------------
def model_and_data_problems(s):
    """Could MODEL_NAME and SQUAD_DATA be loaded? The weights are not loaded here: that takes too long."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
    os.environ.update(quiet | os.environ)  # the libraries read them when they are imported
    problems, questions = [], {}
    for name, look, look_on_hub in (
        ("MODEL_NAME", look_into_model, look_for_model),
        ("SQUAD_DATA", count_questions, count_questions_on_hub),
    ):
        value = getattr(s, name)
        try:
            if value is not None:
                questions = (look if os.path.isdir(value) else look_on_hub)(value) or {}
        except InputError as error:
            problems.append(f"{name}={value!r}: {error}")
        except Exception as error:  # noqa: BLE001  each library raises its own kinds
            why = f"cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            problems.append(f"{name}={value!r}: {why}; {FETCH_AGAIN if os.path.isdir(value) else FETCH}")
    if not problems and s.CHAT_TEMPLATE:
        problems = chat_template_problems(s.MODEL_NAME)
    for name, (source, found) in questions.items():
        asked = getattr(s, name)
        if asked is not None and asked > found:
            problems.append(f"{name}='{asked}': {source} has only {found} questions; ask for at most {found}")
    return problems


FETCH_AGAIN = "fetch it again, or fix its permissions"
FETCH = "compute nodes often cannot reach the hub: fetch it on a login node (bash scripts/prefetch.sh) and "
FETCH += "give the local folder"


def look_into_model(folder):
    size = {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.exists()}
    if "config.json" not in size:
        raise InputError("no config.json in this folder; give one that save_pretrained wrote")
    # A file of less than 1 kB is the pointer that git leaves where it could not download the weights.
    weights = [name for name in fnmatch.filter(size, "model*.safetensors") if size[name] > 1000]
    tokenizers = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"} & set(size)
    complain_about_model(Path(folder, "config.json"), weights, tokenizers)
    if "tokenizer.json" in tokenizers:
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(f"{folder}/tokenizer.json")
        except Exception as error:  # noqa: BLE001  the library raises nothing more specific
            reason = str(error).splitlines()[0]
            raise InputError(f"tokenizer.json cannot be read ({reason}); {FETCH_AGAIN}") from None


def chat_template_problems(name):
    """A tokenizer without one, or whose template changes the prompt."""
    from transformers import AutoTokenizer

    why, user = "has no chat template", [{"role": "user", "content": "@@"}]
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            why = None if text.count("@@") == 1 else "has a chat template that does not show the prompt as it is"
        except Exception as error:  # noqa: BLE001  a template is a program and can raise anything
            why = f"has a chat template that takes no single prompt ({error})"
    return [f"CHAT_TEMPLATE='1': the tokenizer of {name} {why}; set CHAT_TEMPLATE=0"] if why else []


def look_for_model(name):
    """On the Hugging Face hub, or in its cache on this machine."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def there(file):
        if isinstance(hub.try_to_load_from_cache(name, file), str):
            return True
        try:
            return hub.get_hf_file_metadata(hub.hf_hub_url(name, file))
        except RemoteEntryNotFoundError:
            return False

    def look():
        weights = there("model.safetensors") or there("model.safetensors.index.json")
        return Path(hub.hf_hub_download(name, "config.json")), weights

    complain_about_model(*within(HUB_SECONDS, look), tokenizers=True)


def within(seconds, function):
    """What function() returns or raises; TimeoutError if that takes longer, as on a node without a route."""
    answers = queue.SimpleQueue()

    def work():
        try:
            answers.put((function(), None))
        except Exception as error:  # noqa: BLE001  raised again below
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer from the hub within {seconds} s") from None
    if error:
        raise error
    return found


def complain_about_model(config, weights, tokenizers):
    try:
        text = json.loads(config.read_text(encoding="utf-8"))
        text = text if isinstance(text, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise InputError(f"config.json cannot be read ({reason}); fetch the model again") from None
    if "auto_map" in text:  # only then, since the import takes a second
        from transformers import CONFIG_MAPPING

        if text.get("model_type") not in CONFIG_MAPPING:
            what = "Python code of its own (auto_map in config.json)"
            raise InputError(f"this model needs {what}, which is never run; use another model")
    parts = {
        "model_type in config.json": "model_type" in text,
        "weights in model*.safetensors (other formats, such as pytorch_model.bin, are not loaded)": weights,
        "tokenizer files such as tokenizer.json": tokenizers,
    }
    lacks = [part for part, there in parts.items() if not there]
    if lacks:
        raise InputError(f"has no {' and no '.join(lacks)}; fetch the whole model, or use another one")


def count_questions(folder):
    """{variable: (file, number of questions in it)}"""
    folder, found = Path(folder), {}
    form = ".jsonl" if (folder / "train.jsonl").exists() else "-v1.1.json"
    for name, file in (("TRAIN_SAMPLES", f"train{form}"), ("EVAL_SAMPLES", f"dev{form}")):
        try:
            found[name] = file, len((read_jsonl if form == ".jsonl" else read_squad)(folder / file))
        except FileNotFoundError:
            also = " (or train.jsonl and dev.jsonl)" if form != ".jsonl" else ""
            raise InputError(f"no file {file} in this folder; give a folder that has it{also}") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}); {FETCH_AGAIN}") from None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{file} is not SQuAD v1.1 JSON ({reason}); fetch it again") from None
    return found


def read_squad(path):
    """The questions as the lesson reads them. ValueError, LookupError, TypeError: it is not SQuAD."""
    rows = lesson.read_file(path)
    texts = [text for row in rows for text in (row["context"], row["question"], *row["answers"]["text"])]
    answered = rows and all(row["answers"]["text"] for row in rows)
    if not answered or not all(isinstance(text, str) for text in texts):
        raise ValueError("no questions, a question without an answer, or a non-string text")
    "".join(texts).encode()  # JSON can contain halves of surrogate pairs, which the tokenizer refuses
    return rows


def read_jsonl(path):
    """The examples of a file of JSON lines. Raises InputError with the number of the first wrong line."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path.name}, line {line}: is not UTF-8; save the file as UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                texts = [row["prompt"], row["answer"]]
                if not all(isinstance(text, str) and text.strip() for text in texts):
                    raise ValueError("an empty text, or no text")
                "".join(texts).encode()
                found.append(row)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                form, why = '{"prompt": "...", "answer": "..."}', f"{type(error).__name__}: {error}"
                raise InputError(f"{path.name}, line {number}: is not {form} ({why:.200}); mend it") from None
    if not found:
        raise InputError(f"{path.name} is empty; write a line for each example")
    return found


def count_questions_on_hub(name):
    """As count_questions, as far as the hub, or its cache on this machine, says how many there are."""
    from datasets import load_dataset_builder

    info = within(HUB_SECONDS, lambda: load_dataset_builder(name).info)
    if info.features and not {"context", "question", "answers"} <= set(info.features):
        raise InputError("no columns context, question and answers: not SQuAD v1.1; give another data set")
    found = {}
    for variable, split in (("TRAIN_SAMPLES", "train"), ("EVAL_SAMPLES", "validation")):
        if split in (info.splits or ()) and info.splits[split].num_examples:
            found[variable] = f"{name} ({split})", info.splits[split].num_examples
    return found


# ---- Search space and scheduler --------------------------------------------------------------------------
def search_space_problems(space):
    """Keys of the search space that the training would not understand."""
    ours = list(lesson.TRAINING_ARGUMENT)
    unknown = set(space["train_loop_config"]) - set(ours)
    if not unknown:
        return []  # without the import below, which takes seconds
    from transformers import TrainingArguments

    fields, problems = list(TrainingArguments.__dataclass_fields__), []
    for key in sorted(unknown - set(fields)):
        why = f"neither one of {', '.join(ours)} nor a field of transformers.TrainingArguments"
        meant = difflib.get_close_matches(key, fields + ours, n=1)
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        problems.append(f"search space: {key!r} is no hyperparameter: {why}{hint}")
    return problems


def scheduler_problems(chosen):
    """A scheduler that needs checkpoints."""
    from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining

    if not isinstance(chosen, (PopulationBasedTraining, HyperBandScheduler)):
        return []
    why = "interrupts trials and continues them from checkpoints, which raytune_asha_hpo.py does not save"
    fix = "use raytune_pbt_hpo.py, or a scheduler that only stops trials"
    return [f"scheduler: {type(chosen).__name__} {why}; {fix}"]


# ---- Command line ----------------------------------------------------------------------------------------
def as_text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def export_lines(s):
    """For a shell. GPUS_PER_WORKER that is not set means 1, and 0 on nodes without GPUs."""
    names = [name for name in lesson.VARIABLES if name != "GPUS_PER_WORKER" or s.gpus_required]
    return [f"export {name}={shlex.quote(as_text(getattr(s, name)))}" for name in names]


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--export", action="store_true", help="export lines for a shell; table on stderr")
    what.add_argument("--get", nargs="+", metavar="NAME", choices=lesson.VARIABLES, help="one per line")
    a = parser.parse_args()
    try:
        s = check(os.environ, look_inside=not a.get)
    except InputError as error:
        print(*(f"ERROR: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing_package(error)
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
