"""Bad input is refused before anything is started: one line for each variable, with its value and what to do.

The cases of the table call check_inputs.py in this process; a few at the end go through the real head script.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import EXERCISE, HEAD, REPO

CHECK = REPO / "scripts/job/check_inputs.py"
OURS = ("SLURM_", "SBATCH_", "RAY_", "LR_", "BS_", "WD_")
SLURM = {"SLURM_JOB_ID": "4711"}
STUB = '#!/bin/bash\necho "${0##*/} $*" >>"$(dirname "$0")/called"\n'

# In values, ROOT stands for a folder with these:
SQUADS = {  # folder: its train-v1.1.json; None: no such file
    "no files": None,
    "empty file": b"",
    "no JSON": b"<!DOCTYPE html><title>404</title>",
    "truncated": b'{"data": [{"paragraphs": [{"context": "It is red.", "qas": [{"quest',
    "not UTF-8": b'{"data": "\xff\xfe"}',
    "empty data": b'{"data": []}',
    "no data": b'{"version": "1.1"}',
    "a list": b"[1, 2]",
    "null": b"null",
    "wrong types": b'{"data": [{"paragraphs": [{"context": 5, "qas": [{"question": "?", '
                   b'"answers": [{"text": "a"}]}]}]}]}',
    "data is text": b'{"data": "squad"}',
    "no answers": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?"}]}]}]}',
    "answers empty": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?", "answers": []}]}]}]}',
    "answer null": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "?", '
                   b'"answers": [{"text": null}]}]}]}]}',
    "half a letter": b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "\\ud83d", '
                     b'"answers": [{"text": "a"}]}]}]}]}',
    "too deep": b"[" * 100_000,
    "long number": b'{"data": ' + b"9" * 5000 + b"}",
}
MODELS = {  # folder: which of the model's files are not in it
    "no config": ["config.json"],
    "no weights": ["model.safetensors"],
    "no tokenizer": ["tokenizer.json"],
    "config alone": ["model.safetensors", "tokenizer.json"],
}
NAMES = ["with space", "it's \"quoted\"", "é 模型", "$(touch here)", "a;touch here", "-n", "100%", "back\\slash"]

NOT_LOADED = "safetensors (other formats, such as pytorch_model.bin, are not loaded)"
CASES = [  # variable, value, a part of the line that says why
    ("LR_LOWER", "abc", "is not a number"),
    ("LR_LOWER", "", "is not a number"),
    ("LR_LOWER", "-1e-5", "must be a number above 0 and at most 10"),
    ("LR_LOWER", "0", "above 0"),
    ("LR_LOWER", "1e-999", "above 0"),
    ("LR_LOWER", "nan", "above 0"),
    ("LR_LOWER", "1e-3", "LR_UPPER='2e-4': LR_LOWER must be the smaller of the two"),
    ("LR_LOWER", "2e-4", "must be the smaller"),
    ("LR_LOWER", "1e-5; touch here", "is not a number"),
    ("LR_LOWER", "$(touch here)", "is not a number"),
    ("LR_LOWER", "1e-5\r", "Windows line endings"),
    ("LR_LOWER", "1e-5\udcff", "invalid UTF-8"),
    ("LR_UPPER", "inf", "at most 10"),
    ("LR_UPPER", "1,0", "is not a number"),
    ("LR_UPPER", "1e-6", "must be the smaller"),
    ("BS_CHOICES", "", "is empty; give one or more"),
    ("BS_CHOICES", "  ", "is empty; give one or more"),
    ("BS_CHOICES", "1,2", "separate with spaces, not commas"),
    ("BS_CHOICES", "1, 2", "separate with spaces, not commas"),
    ("BS_CHOICES", "0", "'0' must be a whole number at least 1"),
    ("BS_CHOICES", "1.5", "'1.5' is not a whole number"),
    ("BS_CHOICES", "1 -2", "'-2' must be"),
    ("BS_CHOICES", "2 2", "lists a value twice"),
    ("BS_CHOICES", "1 two", "'two' is not a whole number"),
    ("BS_CHOICES", "1\n2", "line break"),
    ("BS_CHOICES", "1 100000", "'100000' must be a whole number at least 1 and at most 1024"),
    ("WD_CHOICES", "", "is empty; give one or more"),
    ("WD_CHOICES", "-0.1", "at least 0"),
    ("WD_CHOICES", "0.0 0.00", "lists a value twice"),
    ("WD_CHOICES", "nan", "at least 0"),
    ("WD_CHOICES", "0.0,0.01", "not commas"),
    ("WORKER_NODES", "0", "at least 1 and at most 1000"),
    ("WORKER_NODES", "1.0", "is not a whole number"),
    ("NUM_SAMPLES", "0", "at least 1"),
    ("NUM_SAMPLES", "12\r", "Windows line endings"),
    ("NUM_SAMPLES", "9" * 400, "at most 100000"),
    ("NUM_SAMPLES", "9" * 5000, "is not a whole number"),
    ("NUM_SAMPLES", "100001", "at most 100000"),
    ("NUM_EPOCHS", "-5", "at least 1"),
    ("NUM_EPOCHS", "1000000", "at most 10000"),
    ("NUM_EPOCHS", "1_0", "is not a whole number"),
    ("EVAL_SAMPLES", "1e2", "is not a whole number"),
    ("TRAIN_SAMPLES", "0", "at least 1"),
    ("TRAIN_SAMPLES", "1001", "has only 1000 questions; ask for at most 1000"),
    ("EVAL_SAMPLES", "101", "has only 100 questions; ask for at most 100"),
    ("WORKERS_PER_TRIAL", "0", "at least 1"),
    ("WORKERS_PER_TRIAL", " 2", "is not a whole number"),
    ("WORKERS_PER_TRIAL", "1000", "too many training processes for this machine"),
    ("CPUS_PER_WORKER", "x", "is not a whole number"),
    ("GPUS_PER_WORKER", "-1", "at least 0 and at most 1"),
    ("GPUS_PER_WORKER", "a[$(touch here)]", "is not a whole number"),
    ("PRECISION", "half", "must be one of auto, bf16, fp16, fp32"),
    ("PRECISION", "", "is empty"),
    ("SEED", "-1", "at least 0"),
    ("SEED", "4294967296", "at most 2147483647"),
    ("LR_LOW", "1e-5", "did you mean LR_LOWER?"),
    ("NUM_SAMPLE", "4", "did you mean NUM_SAMPLES?"),
    ("TRAIN_SAMPLE", "4", "did you mean TRAIN_SAMPLES?"),
    ("MODELNAME", "x", "did you mean MODEL_NAME?"),
    ("BS_CHOICE", "1 2", "did you mean BS_CHOICES?"),
    ("seed", "4", "did you mean SEED?"),
    ("MODEL_NAME", "", "is empty"),
    ("MODEL_NAME", "ROOT/none", "no such folder"),
    ("MODEL_NAME", "./none", "no such folder"),
    ("MODEL_NAME", "~nobody-of-this-name/model", "no such folder"),
    ("MODEL_NAME", "my model", "no such folder"),
    ("MODEL_NAME", "ROOT/no such é 模型 'x'", "no such folder"),
    ("MODEL_NAME", "x; touch here", "no such folder"),
    ("MODEL_NAME", "`touch here`", "no such folder"),
    ("MODEL_NAME", "two\nlines", "line break"),
    ("MODEL_NAME", "ROOT/two\nlines", "line break"),
    ("MODEL_NAME", "ROOT/link to two lines", "use another folder"),
    ("MODEL_NAME", "ROOT/model\r", "Windows line endings"),
    ("MODEL_NAME", "ROOT/" + "n" * 300, "no such folder"),
    ("MODEL_NAME", "ROOT/model/config.json", "no such folder"),
    ("MODEL_NAME", "ROOT/no config", "no config.json in this folder"),
    ("MODEL_NAME", "ROOT/no weights", f"no weights in model*.{NOT_LOADED}"),
    ("MODEL_NAME", "ROOT/no tokenizer", "no tokenizer files such as tokenizer.json"),
    ("MODEL_NAME", "ROOT/config alone", f"{NOT_LOADED} and no tokenizer"),
    ("MODEL_NAME", "ROOT/git pointer", "no weights in"),
    ("MODEL_NAME", "ROOT/dangling link", "no weights in"),
    ("MODEL_NAME", "ROOT/tokenizer broken", "tokenizer.json cannot be read (EOF while parsing"),
    ("MODEL_NAME", "ROOT/tokenizer none", "tokenizer.json cannot be read (data did not match any variant"),
    ("MODEL_NAME", "ROOT/config broken", "config.json cannot be read (it is not JSON); fetch the model again"),
    ("MODEL_NAME", "ROOT/config a list", "no model_type in config.json"),
    ("MODEL_NAME", "ROOT/config a folder", "config.json cannot be read (Is a directory)"),
    ("SQUAD_DATA", "ROOT/none", "no such folder"),
    ("SQUAD_DATA", "ROOT/two\nlines", "line break"),
    ("SQUAD_DATA", "ROOT/squad/train-v1.1.json", "no such folder"),
    ("SQUAD_DATA", "ROOT/train a folder", "train-v1.1.json cannot be read (Is a directory)"),
    *(("SQUAD_DATA", f"ROOT/{name}", "train-v1.1.json") for name in SQUADS),
]


OTHERS = ("NODE_NAME", "MODULE_NAME", "CHECKPOINT", "SPEED", "MODEL", "EPOCHS", "NUM_NODES", "SEEDS", "RESUME_AT")
MISSPELT = {"NUM_SAMPELS": "NUM_SAMPLES", "CPU_PER_WORKER": "CPUS_PER_WORKER", "WORKERS_PER_TRAIL": "WORKERS_PER_TRIAL",
            "LR_UP": "LR_UPPER", "lr_upper": "LR_UPPER", "WORKERNODES": "WORKER_NODES", "Resume": "RESUME"}  # fmt: skip


@pytest.fixture(scope="module")
def root(demo, tmp_path_factory):
    """The folder that ROOT stands for."""
    root = tmp_path_factory.mktemp("inputs").resolve()
    shutil.copytree(demo / "model", root / "model")
    shutil.copytree(demo / "squad", root / "squad")
    for name in ["two\nlines", *NAMES]:
        shutil.copytree(demo / "model", root / name)
        shutil.copytree(demo / "squad", root / name, dirs_exist_ok=True)
    (root / "link to two lines").symlink_to("two\nlines")
    for name, data in SQUADS.items():
        (root / name).mkdir()
        shutil.copy(demo / "squad/dev-v1.1.json", root / name)
        if data is not None:
            (root / name / "train-v1.1.json").write_bytes(data)
    for name, missing in MODELS.items():
        shutil.copytree(demo / "model", root / name, ignore=shutil.ignore_patterns(*missing))
        if "model.safetensors" in missing:
            (root / name / "pytorch_model.bin").write_bytes(b"x" * 5000)
    for name, file, text in (
        ("git pointer", "model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 902136\n"),
        ("config broken", "config.json", '{"model_type": "bloom",'),
        ("config a list", "config.json", "[]"),
        ("tokenizer broken", "tokenizer.json", "{"),
        ("tokenizer none", "tokenizer.json", '{"version": "1.0", "model": {"type": "none"}}'),
    ):
        shutil.copytree(demo / "model", root / name)
        (root / name / file).write_text(text)
    shutil.copytree(demo / "model", root / "config a folder", ignore=shutil.ignore_patterns("config.json"))
    (root / "config a folder/config.json").mkdir()
    shutil.copytree(demo / "model", root / "dangling link", ignore=shutil.ignore_patterns("model.safetensors"))
    (root / "dangling link/model.safetensors").symlink_to("blobs/none")
    (root / "train a folder/train-v1.1.json").mkdir(parents=True)
    return root


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
        monkeypatch.setattr(os, "environ", environment(root, variables))
        monkeypatch.setattr(sys, "argv", ["check_inputs.py", *options])
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patched:
            for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
                patched.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True))
            status = checks.main()
            out, err = (stream.buffer.getvalue().decode().splitlines() for stream in (sys.stdout, sys.stderr))
        assert not list(tmp_path.iterdir())  # what code in a value would make
        return status, out, err

    return call


@pytest.mark.parametrize("name, value, why", CASES)
def test_bad_input_is_one_line(name, value, why, call, root):
    status, out, errors = call({name: value})
    assert status == 2 and out == [] and len(errors) == 1, errors
    assert errors[0].startswith("ERROR: ") and why in errors[0]
    assert f"{name}={value.replace('ROOT', str(root))!r:.500}" in errors[0]
    assert ";" in errors[0] or "default: " in errors[0] or "must be the smaller" in errors[0]  # what to do
    assert call({name: value}, "--export")[:2] == (2, [])


def test_misspelt_variables_are_told_from_those_of_other_programs(call):
    assert call(dict.fromkeys(OTHERS, "x"))[0] == 0
    status, _, errors = call(dict.fromkeys(MISSPELT, "x"))
    assert status == 2 and len(errors) == len(MISSPELT)
    assert {(line.split()[1].split("=")[0], re.search(r"did you mean (\w+)\?", line)[1]) for line in errors} == {
        *MISSPELT.items()
    }


def test_too_many_processes_are_refused_on_this_machine_and_left_to_worker_capacity_on_slurm(call, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert call({"WORKERS_PER_TRIAL": "16"})[0] == 0
    _, _, (error,) = call({"WORKERS_PER_TRIAL": "17"})
    assert error.endswith("this machine with 4 CPUs; set at most 16, or use sbatch")
    assert call({"ON_SLURM": "yes", "WORKERS_PER_TRIAL": "17"})[0] == 0


def test_a_model_that_brings_its_own_code_is_refused_or_the_code_is_not_run(root, tmp_path, checks):
    model = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "own.py").write_text(f"open({str(model / 'here')!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        text = json.loads((model / name).read_text())
        own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
        (model / name).write_text(json.dumps(text | {"auto_map": own}))
    s = checks.check({"MODEL_NAME": str(model), "SQUAD_DATA": str(root / "squad")})
    assert len(checks.lesson.load_squad(s)[0]) == 1000  # the library's own code for this type of model is used
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    with pytest.raises(checks.InputError, match=f"^MODEL_NAME='{model}': this model needs Python code of its own"):
        checks.check({"MODEL_NAME": str(model), "SQUAD_DATA": str(root / "squad")})
    assert not (model / "here").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_existing_folder_of_any_name_works(name, root, checks, monkeypatch):
    with_bom = b"\xef\xbb\xbf" + (root / "squad/train-v1.1.json").read_bytes()
    (root / name / "train-v1.1.json").write_bytes(with_bom)
    monkeypatch.chdir(root)
    for folder in (f"{root}/{name}", f"./{name}"):
        s = checks.check({"MODEL_NAME": folder, "SQUAD_DATA": folder})
        assert s.MODEL_NAME == s.SQUAD_DATA == f"{root}/{name}"


def test_a_terminal_that_lacks_letters_of_a_path_does_not_matter(root):
    environ = environment(root, {"MODEL_NAME": f"{root}/é 模型", "PYTHONIOENCODING": "ascii"})
    run = subprocess.run([sys.executable, CHECK, "--export"], env=environ, check=True, capture_output=True, timeout=30)
    assert f"{root}/\\xe9 \\u6a21\\u578b\n" in run.stderr.decode()  # the table
    assert f"export MODEL_NAME='{root}/é 模型'\n" in run.stdout.decode()  # the value itself


def test_an_unknown_hyperparameter_is_one_line_with_a_suggestion(call, checks, monkeypatch):
    space = {"train_loop_config": {"lr": None, "warmup_rate": None}}
    monkeypatch.setattr(checks.lesson, "search_space", lambda s: space)
    status, _, (error,) = call({})
    assert status == 2 and "'warmup_rate' is no hyperparameter" in error
    assert error.endswith("did you mean 'warmup_ratio'?")


# ---- Through the head script -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Scripts and exercise copied to a folder whose name is not plain, with a Slurm that only records calls."""
    top = tmp_path_factory.mktemp("copy") / "my course é"
    made_by_runs = shutil.ignore_patterns("runs", "*.out", "__pycache__")
    for folder in ("scripts", "experiments"):
        shutil.copytree(REPO / folder, top / folder, symlinks=True, ignore=made_by_runs)
    (top / ".venv").symlink_to(REPO / ".venv")
    (top / "slurm").mkdir()
    shutil.copy(EXERCISE / HEAD, top / "slurm/slurm_script")  # Slurm runs a copy, of this name
    for command in ("sbatch", "srun", "squeue", "scancel"):
        (top / "slurm" / command).write_text(STUB)
    (top / "slurm/scontrol").write_text(STUB + 'echo "   StdOut=/dev/null"\n')
    for command in (top / "slurm").iterdir():
        command.chmod(0o755)
    return top / EXERCISE.relative_to(REPO)


def refused(course, root, variables, cwd=None):
    """Runs the head script; asserts that it shuts down cleanly with nothing started. -> (all its lines, the errors)"""
    environ = environment(root, variables, f"{course.parents[3]}/slurm:")
    script = f"{course.parents[3]}/slurm/slurm_script" if "SLURM_JOB_ID" in variables else course / HEAD
    run = subprocess.run(["bash", script], cwd=cwd or course, env=environ, text=True, check=False,
                         capture_output=True, timeout=15)  # fmt: skip
    output = run.stdout + run.stderr
    lines = output.splitlines()
    assert run.returncode in (1, 2), output
    assert re.fullmatch(r"===== JOB \S+ START  : .* =====", run.stdout.splitlines()[0])
    assert re.fullmatch(r"===== JOB \S+ FINISH : .* =====", run.stdout.splitlines()[-1])
    assert "Traceback" not in output and "line " not in run.stderr  # "line 7: ...: command not found"
    assert not (course / "runs").exists()
    assert not list(course.parents[3].rglob("here")) and not list(root.glob("here"))  # code in a value would make it
    called = course.parents[3] / "slurm/called"
    assert not called.exists() or set(called.read_text().split("\n")) <= {"scontrol show job 4711", ""}
    return lines, [line for line in lines if "ERROR" in line]


SEVERAL = {"LR_LOWER": "1", "SQUAD_DATA": "/none", "MODEL_NAME": "ROOT/no weights", "BS_CHOICES": "1,2"}
SEVERAL |= {"NUM_SAMPLE": "3", "SEED": "?"}


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


def test_a_run_to_continue_that_is_no_folder_is_one_line(course, root):
    _, (error,) = refused(course, root, SLURM | {"RESUME": "$(touch here)"})
    assert "ERROR: RESUME='$(touch here)': no settings.json of a search in this folder" in error


@pytest.mark.parametrize("script", [EXERCISE / HEAD, REPO / "experiments/manual/bloom_hpo_manual.slurm"])
def test_a_script_that_was_copied_elsewhere_says_where_it_belongs(script, tmp_path):
    shutil.copy(script, tmp_path)
    for beside in (None, "worker_node_raytune_asha_hpo.slurm"):
        if beside:
            shutil.copy(EXERCISE / beside, tmp_path)
        run = subprocess.run(["bash", tmp_path / script.name], cwd=tmp_path, text=True, check=False,
                             capture_output=True, timeout=15)  # fmt: skip
        assert run.returncode == 1 and run.stdout == ""
        told = rf"ERROR: {tmp_path} is not .*; cd experiments/\S+ in the repository, then sbatch\n"
        assert re.fullmatch(told, run.stderr)
    assert {path.name for path in tmp_path.iterdir()} <= {script.name, "worker_node_raytune_asha_hpo.slurm"}
