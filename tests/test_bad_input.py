"""Bad input is refused before anything is started: one line for each variable, with its value and what to do.

The cases of the tables call check_inputs.py in this process; a few at the end go through the real head script.
"""

import json
import os
import re
import shutil
import subprocess
from unittest import mock

import conftest
import pytest
from conftest import EXERCISE, HEAD, copy_of_the_course

OURS = ("SLURM_", "SBATCH_", "RAY_", "LR_", "BS_", "WD_")
SLURM = {"SLURM_JOB_ID": "4711"}
STUB = '#!/bin/bash\necho "${0##*/} $*" >>"$(dirname "$0")/called"\n'


def squad(**row):
    row = {"context": "It is red.", "question": "What is it?", "answers": [{"text": "red"}]} | row
    paragraph = {"context": row.pop("context"), "qas": [row]}
    return json.dumps({"data": [{"paragraphs": [paragraph]}]}).encode()


# In values, ROOT stands for a folder with these:
SQUADS = {  # folder: its train-v1.1.json; None: no such file
    "no files": None,
    "no JSON": b"<!DOCTYPE html><title>404</title>",
    "not UTF-8": b'{"data": "\xff\xfe"}',
    "empty data": b'{"data": []}',
    "no answers": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?"}]}]}]}',
    "answers empty": squad(answers=[], is_impossible=True),
    "answer null": squad(answers=[{"text": None}]),
    "answer blank": squad(answers=[{"text": " \n"}]),
    "answer is text": squad(answers={"text": "red", "answer_start": 6}),
    "half a letter": squad(question="\ud83d"),
    "too deep": b"[" * 100_000,
}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
WORDS = b'{"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 2}, "unk_token": "<unk>"}, "added_tokens": []}'
MODELS = {  # folder: what is changed in the model's files (None: taken out; a dict: merged into it), the line's part
    "no config": ({"config.json": None}, "`model_type` key in its config.json"),
    "wrong size": ({"config.json": {"vocab_size": "many"}}, "vocab_size"),
    "t5": ({"config.json": {"model_type": "t5"}}, "t5 is not a causal language model that can be trained"),
    "bert": ({"config.json": {"model_type": "bert"}}, "bert is not a causal language model"),
    "unknown": ({"config.json": {"model_type": "xyz"}}, "model type `xyz` but Transformers does not recognize"),
    "its own code": ({"config.json": {"model_type": "xyz", "auto_map": {"AutoConfig": "own.C"}}}, "code of its own"),
    "gptq": ({"config.json": {"quantization_config": {"quant_method": "gptq"}}}, "are quantized .*gptq"),
    "only fp16": ({"model.safetensors": None, "model.fp16.safetensors": b"x", "pytorch_model.bin": b"x"},
                  "has no model.safetensors .other formats, such as .bin, are not loaded"),
    "cut weights": ({"model.safetensors": 500_000}, "model.safetensors is missing or incomplete"),
    "missing shard": ({"model.safetensors": None, "model.safetensors.index.json": INDEX},
                      "model-00001-of-00002.safetensors is missing"),
    "no tokenizer": ({"tokenizer.json": None}, "no tokenizer files such as tokenizer.json"),
    "tokenizer broken": ({"tokenizer.json": b"{"}, "its tokenizer cannot be loaded .JSONDecodeError"),
    "package": ({"tokenizer.json": None, "tokenizer.model": b"x", "config.json": {"model_type": "llama"}},
                "its tokenizer cannot be loaded .*; .* pip install sentencepiece"),
    "other shape": ({"config.json": {"vocab_size": 2000}},
                    "1 of its weights, such as transformer.word_embeddings.weight, are missing or have another shape"),
    "adapter": ({"adapter_config.json": {}}, "is an adapter .adapter_config.json.; merge it into its base model"),
    "marian": ({"config.json": {"model_type": "marian"}}, "marian is not a causal language model"),
    "letters": ({"tokenizer.json": WORDS}, "its tokenizer does not know the letters of SQUAD_DATA"),
    "recurrent": ({"config.json": {"model_type": "rwkv"}}, "rwkv is not a causal language model that can be trained"),
    "short": ({"config.json": {"max_position_embeddings": 64}}, "reads at most 64 tokens, and rows have up to"),
    "no eos": ({"tokenizer_config.json": {"eos_token": None}}, "no end-of-sequence token; set eos_token"),
    "added token": ({"tokenizer_config.json": {"eos_token": "<|end|>"}}, "makes token 1946, but the model knows only"),
}  # fmt: skip

CASES = {  # variable: values, each with a part of the line that says why
    "LR_LOWER": [("", "is not a number"), ("-1e-5", "must be a number above 0.0 and at most 10.0"), ("0", "above 0"),
        ("nan", "above 0"), ("1e-3", "LR_UPPER='2e-4': LR_LOWER must be the smaller"),
        ("$(touch here)", "is not a number"), ("1e-5\r", "Windows line endings"), ("1e-5\udcff", "invalid UTF-8")],
    "BS_CHOICES": [("", "must be one or more values"), ("1, 2", "separated by spaces, not commas"),
        ("1 -2", "must be a whole number at least 1 and at most 1024"), ("2 2", "lists a value twice")],
    "WD_CHOICES": [("-0.1", "at least 0"), ("0.0 0.00", "lists a value twice")],
    "WORKER_NODES": [("0", "at least 1 and at most 1000")],
    "NUM_SAMPLES": [("9" * 5000, "is not a whole number"), ("100001", "at most 100000")],
    "EVAL_SAMPLES": [("1e2", "is not a whole number"), ("101", "only 100 questions; ask for at most 100")],
    "TRAIN_SAMPLES": [("1001", "only 1000 questions; ask for at most 1000")],
    "GPUS_PER_WORKER": [("a[$(touch here)]", "is not a number"), ("1.5", "at most 1"), ("0.001", "too small a share"),
                        ("0.5", "WORKERS_PER_TRIAL='2': NCCL refuses two workers of a trial on one GPU; set WORK")],
    "PRECISION": [("half", "must be one of auto, bf16, fp16, fp32")],
    "MODEL_NAME": [("", "is empty"), ("ROOT/none", "no such folder"), ("./none", "no such folder"),
        ("~nobody-of-this-name/model", "no such folder"), ("my model", "no such folder"),
        ("ROOT/" + "n" * 300, "no such folder"), ("ROOT/model/config.json", "no such folder")],
    "SQUAD_DATA": [("ROOT/squad/train-v1.1.json", "no such folder")],
}  # fmt: skip
CASES["MODEL_NAME"] += [(f"ROOT/{name}", why) for name, (_, why) in MODELS.items()]
CASES["SQUAD_DATA"] += [(f"ROOT/{name}", "train-v1.1.json") for name in SQUADS]
MISSPELT = {"LR_LOW": "LR_LOWER", "LR_UP": "LR_UPPER", "BS_CHOICE": "BS_CHOICES", "NUM_SAMPELS": "NUM_SAMPLES",
            "MODELNAME": "MODEL_NAME", "CPU_PER_WORKER": "CPUS_PER_WORKER"}  # fmt: skip
OTHERS = ("NODE_NAME", "MODULE_NAME", "MODEL", "EPOCHS", "SEEDS", "RESUME_AT", "seed", "lr_upper", "LR_HOME", "WD_HOME")


@pytest.fixture(scope="module")
def root(demo, tmp_path_factory):
    """The folder that ROOT stands for."""
    root = tmp_path_factory.mktemp("inputs").resolve()
    shutil.copytree(demo / "model", root / "model")
    shutil.copytree(demo / "squad", root / "squad")
    for name, data in SQUADS.items():
        (root / name).mkdir()
        shutil.copy(demo / "squad/dev-v1.1.json", root / name)
        if data is not None:
            (root / name / "train-v1.1.json").write_bytes(data)
    for name, (changes, _) in MODELS.items():
        change(shutil.copytree(demo / "model", root / name), changes)
    return root


def change(model, changes):
    for file, new in changes.items():
        old = (model / file).read_bytes() if (model / file).exists() else b"{}"
        (model / file).unlink(missing_ok=True)
        if isinstance(new, dict):
            new = json.dumps(json.loads(old) | new).encode()
        if new is not None:
            (model / file).write_bytes(old[:new] if isinstance(new, int) else new)


def environment(root, variables, path=""):
    """The variables of a user who has set these and no other of ours; ROOT in them is the folder."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    environ |= {"MODEL_NAME": "ROOT/model", "SQUAD_DATA": "ROOT/squad"}
    environ |= {"PATH": f"{path}{os.environ['PATH']}"} | variables
    return {name: value.replace("ROOT", str(root)) for name, value in environ.items()}


@pytest.fixture
def call(checks, root, monkeypatch, tmp_path):
    """call(variables, *options): (exit status, lines of stdout, lines of stderr) of check_inputs.py."""

    def call(variables, *options):
        monkeypatch.chdir(tmp_path)
        with mock.patch.dict(os.environ, environment(root, variables), clear=True):
            done = conftest.call(checks, *options)
        assert not list(tmp_path.iterdir())  # what code in a value would make
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    return call


@pytest.mark.parametrize("name, value, why", [(name, *case) for name, cases in CASES.items() for case in cases])
def test_bad_input_is_one_line(name, value, why, call, root):
    status, out, errors = call({name: value}, "--export")
    assert status == 2 and out == [] and len(errors) == 1, errors
    assert errors[0].startswith("ERROR: ") and (why in errors[0] or re.search(why, errors[0])), errors[0]
    assert f"{name}={value.replace('ROOT', str(root))!r:.500}" in errors[0]
    assert ";" in errors[0] or " must be " in errors[0] or " is not a" in errors[0]  # what to do


def test_misspelt_variables_are_told_from_those_of_other_programs(call):
    assert call(dict.fromkeys(OTHERS, "x"))[0] == 0
    status, _, errors = call(dict.fromkeys(MISSPELT, "x"))
    told = [re.match(r"ERROR: (\w+)='x': no such variable; did you mean (\w+)\?", line).groups() for line in errors]
    assert status == 2 and dict(told) == MISSPELT and len(told) == len(MISSPELT)


def test_too_many_processes_are_refused_on_this_machine_and_left_to_worker_capacity_on_slurm(call, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert call({"WORKERS_PER_TRIAL": "16"})[0] == 0
    _, _, (error,) = call({"WORKERS_PER_TRIAL": "17"})
    assert error.endswith("too many processes for this machine; set at most 16, or use sbatch")
    assert call({"ON_SLURM": "yes", "WORKERS_PER_TRIAL": "17"})[0] == 0


def test_code_that_comes_with_a_model_is_never_run(root, tmp_path, call):
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    code = f"open({str(tmp_path / 'here')!r}, 'w')\n".encode()
    changes = {"config.json": {"auto_map": own}, "tokenizer_config.json": {"auto_map": own}, "own.py": code}
    change(root / "its own code", changes)
    change(shutil.copytree(root / "model", root / "known"), changes)
    assert call({"MODEL_NAME": "ROOT/its own code"})[0] == 2
    assert call({"MODEL_NAME": "ROOT/known"})[0] == 0  # the library has code of its own for a BLOOM


# ---- Through the head script -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Scripts and exercise copied to a folder whose name is not plain, with a Slurm that only records calls."""
    top = tmp_path_factory.mktemp("copy") / "my-course_é"
    course = copy_of_the_course(top)
    (top / "slurm").mkdir()
    shutil.copy(EXERCISE / HEAD, top / "slurm/slurm_script")  # Slurm runs a copy, of this name
    for command in ("sbatch", "srun", "squeue", "scancel"):
        (top / "slurm" / command).write_text(STUB)
    (top / "slurm/scontrol").write_text(STUB + 'echo "   StdOut=/dev/null"\n')
    for command in (top / "slurm").iterdir():
        command.chmod(0o755)
    return course


def refused(course, root, variables, cwd=None):
    """Runs the head script; asserts that it shuts down cleanly with nothing started. -> (all its lines, the errors)"""
    environ = environment(root, variables, f"{course.parents[3]}/slurm:")
    script = f"{course.parents[3]}/slurm/slurm_script" if "SLURM_JOB_ID" in variables else course / HEAD
    run = subprocess.run(["bash", script], cwd=cwd or course, env=environ, text=True, check=False,
                         capture_output=True, timeout=60)  # fmt: skip
    lines = (run.stdout + run.stderr).splitlines()
    assert run.returncode in (1, 2), lines
    assert re.fullmatch(r"===== JOB \S+ START  : .* =====", run.stdout.splitlines()[0])
    assert re.fullmatch(r"===== JOB \S+ FINISH : .* =====", run.stdout.splitlines()[-1])
    assert "Traceback" not in run.stderr and "line " not in run.stderr  # "line 7: ...: command not found"
    assert not (course / "runs").exists()
    assert not list(course.parents[3].rglob("here")) and not list(root.glob("here"))  # code in a value would make it
    called = course.parents[3] / "slurm/called"
    assert not called.exists() or set(called.read_text().split("\n")) <= {"scontrol show job 4711", ""}
    return lines, [line for line in lines if "ERROR" in line]


SEVERAL = {"LR_LOWER": "1", "SQUAD_DATA": "/none", "MODEL_NAME": "ROOT/none", "BS_CHOICES": "1,2", "NUM_SAMPLE": "3"}


@pytest.mark.parametrize("where, cwd", [({}, "/"), (SLURM, None)])
def test_several_errors_are_reported_together_and_the_log_has_them(where, cwd, course, root):
    lines, errors = refused(course, root, where | SEVERAL, cwd)
    assert sorted(re.match(r"ERROR: (\w+)=", line)[1] for line in errors) == sorted(SEVERAL)
    if not where:
        log = course / f"logs/ray_head_bloom_5epochs-{lines[0].split()[2]}.out"
        assert log.read_text().splitlines() == lines


@pytest.mark.parametrize("value", ["$(touch here); `touch here`", "a[$(touch here)]"])  # code in bash arithmetic
def test_no_variable_reaches_a_shell_as_code(value, course, root, hpo):
    variables = SLURM | {"NODE_ADDRESS": value, "SLURM_RESTART_COUNT": value}
    _, errors = refused(course, root, variables | dict.fromkeys(hpo.VARIABLES, value))
    assert {re.match(r"ERROR: (\w+)=", line)[1] for line in errors} == set(hpo.VARIABLES)


@pytest.mark.parametrize("variables", [
    {"MODEL_NAME": "ROOT/gptq", "SQUAD_DATA": "ROOT/answer blank"}, {"RESUME": "$(touch here)"}])
def test_what_would_fail_in_every_trial_never_waits_in_the_queue(course, root, variables):
    _, errors = refused(course, root, SLURM | variables)
    assert [re.match(r"ERROR: (\w+)=", line)[1] for line in errors] == list(variables)
