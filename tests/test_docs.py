"""The documents say what the code does: links, paths, commands, tables, quoted log lines, and the fixed names."""

import ast
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from conftest import EXERCISE, HEAD, REPO, SCRIPT, load_module

README, EXERCISE_README = REPO / "README.md", EXERCISE / "README.md"
WORKER = "worker_node_raytune_asha_hpo.slurm"
RAY_JOB = REPO / "scripts/raytune_hpo/ray_job.sh"
OTHER_VARIABLES = {"PYTHON", "NODE_ADDRESS", "MINI_SLURM_DIR", "HF_HUB_OFFLINE", "RESUME"}  # not ours alone, and documented
MADE_LATER = {  # files and folders that the documents name and the code, Slurm or the user makes
    ".venv", ".demo", "runs/", "experiments/raytune/scheduler/asha/runs/", "shutdown.txt",
    "train-v1.1.json", "dev-v1.1.json", "tables.md"}  # fmt: skip


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=REPO, text=True, capture_output=True, check=True).stdout.split("\0")


# Markdown files that git tracks or would: neither those of .venv nor what runs leave behind.
DOCUMENTS = sorted({REPO / name for name in git("ls-files", "-z", "-co", "--exclude-standard", "*.md") if name})
DOCUMENTS = [path for path in DOCUMENTS if path.exists() and not path.relative_to(REPO).as_posix().startswith("shared/")]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(REPO).as_posix())


def blocks(document, language):
    """The fenced blocks of one language, each as its lines without the fence's indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [[line.removeprefix(indent) for line in body.splitlines()] for indent, body in found]


def prose(document):
    """The text without fenced blocks, and with escaped asterisks as they are shown."""
    return re.sub(r"^( *)```.*?^\1```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL).replace("\\*", "*")


def spans(document):
    """What stands in backticks outside fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def table(document, first_cell):
    """The rows of the table whose header begins with first_cell, as lists of cells without backticks."""
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in prose(document).splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == first_cell)
    width, found = len(rows[start]), []
    for line in prose(document).split("| " + " | ".join(rows[start]) + " |\n", 1)[1].splitlines()[1:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip().strip("`") for cell in line.removeprefix("|").removesuffix("|").split("|")]
        assert len(cells) == width, f"{document}: {line}"
        found.append(cells)
    return found


# ---- Links and paths -------------------------------------------------------------------------------------------------
def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_documents():
    assert {README, EXERCISE_README} <= set(DOCUMENTS)


@every_document
def test_relative_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"broken link: {target}"
        assert not anchor or anchor in anchors(path), f"no such heading: {target}"


def exists(name, folder):
    """Whether a quoted path is one of this repository: from the document's folder, the top, or by its bare name."""
    if "*" in name:
        return any(folder.glob(name)) or any(REPO.glob(name))
    bare = [path for path in git("ls-files", "-z", "-co", "--exclude-standard") if path.rsplit("/", 1)[-1] == name]
    return (folder / name).exists() or (REPO / name).exists() or any((REPO / path).exists() for path in bare)


@every_document
def test_quoted_paths_exist(document, hpo):
    hub_ids = {hpo.VARIABLES[name][0] for name in ("MODEL_NAME", "SQUAD_DATA")}
    for span in spans(document):
        looks_like_path = "/" in span or re.fullmatch(r"[\w.-]+\.(py|sh|slurm|json|yml|txt|md)|\.\w+", span)
        if not looks_like_path or re.search(r"[<>$\s=:\"]", span) or span in hub_ids | MADE_LATER or span.startswith("worker "):
            continue
        assert exists(span, document.parent), f"no such path: {span}"


@every_document
def test_quoted_trees_exist(document):
    """A text block whose first line is a file name alone is a tree: two spaces a level, a comment after the name."""
    for tree in blocks(document, "text"):
        if tree[0] != "README.md":
            continue
        parents = [document.parent]
        for line in tree:
            indent, name = re.match(r"( *)(\S+)", line).groups()
            parents[len(indent) // 2 + 1 :] = []
            path = parents[-1] / name
            assert path.is_dir() if name.endswith("/") else path.is_file(), f"no such path: {line}"
            parents.append(path)


def test_the_layout_leaves_no_file_out():
    """All of scripts/ and experiments/, and the rest but the tests."""
    (tree,) = [block for block in blocks(README, "text") if block[0] == "README.md"]
    named = {line.split()[0].rstrip("/") for line in tree}
    for name in filter(None, git("ls-files", "-z", "-co", "--exclude-standard")):
        top, last = name.split("/")[0], Path(name).name
        if (top in ("scripts", "experiments") or name.startswith("tests/benchmarks/") or "/" not in name) and last not in (".gitkeep", ".gitignore"):
            assert last in named or Path(name).parent.name == "pictures" or last.endswith("_demo.json"), f"not in the layout: {name}"


def test_paths_that_other_texts_rely_on_exist():
    for name in (
        "scripts/raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py",
        "scripts/raytune_hpo/worker_capacity.py",
        "scripts/ds_config.json",
        "scripts/quickstart.sh",
        "scripts/setup_env.sh",
        "scripts/demo_assets.py",
        "requirements.txt",
        "environment.yml",
        "experiments/raytune/scheduler/asha/head_node_raytune_asha_hpo.slurm",
        "experiments/raytune/scheduler/asha/worker_node_raytune_asha_hpo.slurm",
        "experiments/raytune_hpo/raytune_asha_scheduler/logs/.gitkeep",
        "tests/run.sh",
        "tests/mini_slurm.sh",
    ):
        assert (REPO / name).is_file(), name
    link = REPO / "experiments/raytune_hpo/raytune_asha_scheduler"
    assert link.is_symlink() and link.readlink() == Path("../raytune/scheduler/asha")
    assert link.resolve() == EXERCISE


def test_the_log_folder_is_in_git():
    """Slurm does not start a job whose output folder is missing."""
    assert git("ls-files", "-z", "experiments/raytune/scheduler/asha/logs")[0].endswith("logs/.gitkeep")


# ---- Commands --------------------------------------------------------------------------------------------------------
TOOLS = [
    "scripts/raytune_hpo/worker_capacity.py",
    "scripts/raytune_hpo/fill_tables.py",
    "scripts/manual_hpo/bloom_hpo_manual.py",
    "scripts/raytune_hpo/raytune_asha_scheduler/raytune_asha_hpo.py",
    "scripts/demo_assets.py",
    "scripts/setup_env.sh",
    "scripts/prefetch.sh",
    "scripts/prefetch.py",
    "scripts/quickstart.sh",
    "scripts/check_site.sh",
    "tests/mini_slurm.sh",
    "tests/soak.sh",
    "tests/benchmarks/bringup.py",
    "tests/benchmarks/training_step.py",
    "tests/benchmarks/turnover.py",
    "tests/benchmarks/asha_savings.py",
    "tests/benchmarks/scale.py",
    "tests/benchmarks/utilisation.py",
]


def help_of(tool):
    return subprocess.run(
        [sys.executable if tool.suffix == ".py" else "bash", tool, "--help"],
        check=False, text=True, capture_output=True, timeout=60,
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_answers_help(tool):
    answer = help_of(REPO / tool)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) > 2 and not answer.stderr


def commands(document):
    """(line, words, folder) of each command in a bash block or in backticks; folder follows the block's cd."""
    for block in blocks(document, "bash"):
        folder = document.parent
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            bare = re.sub(r"(^|\s)#.*", "", line).replace("$(", " ").replace(")", " ")
            for part in re.split(r"&&|\|\||[|;]", bare):
                words = shlex.split(part)
                if words[:1] == ["cd"]:
                    folder = (folder / words[1]).resolve()
                    assert folder.is_dir(), f"no such folder: {line}"
                elif words:
                    yield line, words, folder
    for span in spans(document):
        if re.match(r"([A-Z_]+=\S* )*(bash|sbatch|python3?|\.venv/bin/python|conda|tail|grep) ", span):
            yield span, shlex.split(span), None


@every_document
def test_commands_name_existing_files(document):
    for line, words, folder in commands(document):
        for word in words:
            if not re.search(r"\.(py|sh|slurm|yml)$", word):
                continue
            if folder is None:
                assert exists(word, document.parent), line
            else:
                assert any(folder.glob(word)) if "*" in word else (folder / word).is_file(), line


@every_document
def test_commands_set_known_variables_to_values_that_are_taken(document, hpo):
    for line, words, _ in commands(document):
        set_here = {}
        for word in words:
            if match := re.match(r"([A-Z][A-Z0-9_]*)=(.*)", word):
                set_here[match[1]] = match[2]
        assert set(set_here) <= set(hpo.VARIABLES) | OTHER_VARIABLES, line
        hpo.read_settings({name: value for name, value in set_here.items() if name in hpo.VARIABLES})
    for span in spans(document):  # `NAME=value` and `NAME` in the text
        if match := re.fullmatch(r"([A-Z][A-Z0-9]*_[A-Z0-9_]*|SEED|PYTHON)(?:=(.*))?", span):
            known = set(hpo.VARIABLES) | OTHER_VARIABLES | {"VARIABLES"}
            assert match[1] in known, span
            if match[2] is not None and match[1] in hpo.VARIABLES:
                hpo.read_settings({match[1]: match[2]})


@every_document
def test_commands_use_options_that_the_tool_has(document):
    tools = {Path(tool).name: REPO / tool for tool in TOOLS}
    for line, words, _ in commands(document):
        tool = next((tools[Path(word).name] for word in words if Path(word).name in tools), None)
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        if tool and options:
            listed = set(re.findall(r"--[\w-]+", help_of(tool).stdout)) | {"--help"}
            assert set(options) <= listed, line


@every_document
def test_quoted_settings_of_the_mini_slurm_exist(document):
    for line, words, _ in commands(document):
        if "tests/mini_slurm.sh" in words:
            assert words[words.index("tests/mini_slurm.sh") + 1] in ("up", "down", "status", "--help"), line


@every_document
def test_commands_are_what_bash_can_read(document):
    texts = ["\n".join(block) for block in blocks(document, "bash")]
    texts += [span for span in spans(document) if re.match(r"([A-Z_]+=\S* )*(bash|sbatch|srun|squeue|sinfo|scontrol|scancel|tail|grep|curl|df|ls|less) ", span)]
    for text in texts:
        text = re.sub(r"<\w+>", "12345", text)
        said = subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True).stderr
        assert not said, f"{text}\n{said}"


@every_document
def test_commands_of_slurm_have_their_options(document, tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")  # without one they do not even help
    environ = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    lines = [line for block in blocks(document, "bash") for line in block] + spans(document)
    for line in lines:
        for tool, rest in re.findall(r"(?:^|[\s(|])(sbatch|squeue|sinfo|scontrol|scancel|srun) ([^|;)]*)", line):
            before_script = re.split(r"\S+\.slurm|\.venv", rest)[0]
            options = re.findall(r"(?:^| )--([a-z-]+)", before_script)
            listed = subprocess.run([tool, "--help"], env=environ, text=True, check=False, capture_output=True).stdout if options else ""
            for option in options:
                assert f"--{option}" in listed or (tool, option) == ("squeue", "me"), line  # its help does not tell of it


@every_document
def test_python_code_shown_is_that_of_the_script(document):
    source = SCRIPT.read_text()
    for block in blocks(document, "python"):
        for line in block:
            assert line in source, f"not in {SCRIPT.name}: {line}"


def test_every_program_is_among_the_tools():
    """Those whose --help and quoted options are checked here."""
    parts = {"scripts/raytune_hpo/read_run.py", "scripts/raytune_hpo/draw_report.py", "scripts/raytune_hpo/ray_job.sh", "tests/run.sh"}  # no --help
    programs = [name for name in git("ls-files", "-z", "-co", "--exclude-standard") if re.fullmatch(r"(scripts|tests/benchmarks)/.*\.(py|sh)|tests/[^/]*\.sh", name)]
    assert set(programs) - parts == set(TOOLS)


# ---- Tables and numbers ----------------------------------------------------------------------------------------------
def test_the_table_of_variables_is_that_of_the_code(hpo):
    expected = [[name, default, meaning] for name, (default, _, meaning) in hpo.VARIABLES.items()]
    assert table(README, "variable") == expected


def test_the_quickstart_defaults_in_the_text_are_those_of_the_script(hpo):
    script = (REPO / "scripts/quickstart.sh").read_text()
    set_there = dict(re.findall(r"([A-Z_]+)=\$\{\1:-([^}]*)\}", script))
    assert set(set_there) <= set(hpo.VARIABLES)
    paragraph = next(p for p in prose(README).split("\n\n") if p.startswith("`scripts/quickstart.sh` sets other defaults"))
    for name, value in set_there.items():
        assert (f"`{name}`" if value.startswith("$REPO") else f"`{name}={value}`") in paragraph, name
    assert len(re.findall(r"`[A-Z_]+(?:=[^`]+)?`", paragraph)) == len(set_there)


def test_the_search_space_in_the_exercise_is_that_of_the_code(hpo):
    default = {name: entry[0] for name, entry in hpo.VARIABLES.items()}
    assert [row[1:] for row in table(EXERCISE_README, "hyperparameter")] == [
        ["lr", f"{default['LR_LOWER']} to {default['LR_UPPER']}, log-uniform", "LR_LOWER`, `LR_UPPER"],
        ["per_device_bs", default["BS_CHOICES"].replace(" ", " or "), "BS_CHOICES"],
        ["wd", default["WD_CHOICES"].replace(" ", " or "), "WD_CHOICES"],
    ]
    source = SCRIPT.read_text()  # the comments beside the entries too
    assert f"# {default['LR_LOWER']} .. {default['LR_UPPER']}:" in source
    assert f"# {default['BS_CHOICES'].replace(' ', ', ')}:" in source
    assert f"# {default['WD_CHOICES'].replace(' ', ', ')}:" in source
    assert f"draws {default['TRAIN_SAMPLES']} training and {default['EVAL_SAMPLES']} validation questions" in " ".join(
        prose(EXERCISE_README).split()
    )


def scheduler_arguments():
    """The constants that the script gives ASHA."""
    tree = ast.parse(SCRIPT.read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "ASHA")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if isinstance(k.value, ast.Constant)}


def test_the_rungs_in_the_text_are_those_of_the_scheduler(hpo):
    asha, epochs = scheduler_arguments(), int(hpo.VARIABLES["NUM_EPOCHS"][0])
    rungs, rung = [], asha["grace_period"]
    while rung <= epochs:
        rungs.append(rung)
        rung *= asha["reduction_factor"]
    text = " ".join(prose(EXERCISE_README).split())
    assert f"rungs are epochs {', '.join(map(str, rungs[:-1]))} and {rungs[-1]}." in text
    assert f"`grace_period={asha['grace_period']}`" in text and f"`reduction_factor={asha['reduction_factor']}`" in text
    assert f"limit of {epochs} epochs" in text
    assert len(table(EXERCISE_README, "combo id")) == int(hpo.VARIABLES["NUM_SAMPLES"][0])


def test_the_worked_example_follows_the_rule():
    """A trial is stopped at a rung if its loss is above the median of those recorded there before it."""
    recorded, epochs = {1: [], 2: [], 4: []}, 0
    rows = table(EXERCISE_README, "trial")
    for number, (trial, *cells, verdict) in enumerate(rows):
        assert int(trial) == number
        end = 5
        for rung, cell in zip(recorded, cells, strict=True):
            if end < 5:
                assert cell == "", f"trial {trial} was stopped before epoch {rung}"
                continue
            loss, median = re.fullmatch(r"(\d\.\d{3}) \((\d\.\d{3}|none)\)", cell).groups()
            if recorded[rung]:
                assert float(median) == pytest.approx(statistics.median(recorded[rung]), abs=0.0011), f"trial {trial}, epoch {rung}"
                if float(loss) > statistics.median(recorded[rung]):
                    end = rung
            else:
                assert median == "none"
            recorded[rung].append(float(loss))
        assert verdict == ("to epoch 5" if end == 5 else f"stopped after epoch {end}"), f"trial {trial}"
        epochs += end
    assert f"{epochs} epochs were trained instead of {5 * len(rows)}." in prose(EXERCISE_README)
    text = " ".join(prose(EXERCISE_README).split())
    last = re.search(r"trial (\d+): had it come last, it would have met a median of (\S+) at epoch 1", text)
    losses = [float(row[1].split()[0]) for row in rows]
    loss = losses.pop(int(last[1]))
    assert last[2] == f"{statistics.median(losses):.3f}"
    assert loss > statistics.median(losses) and rows[int(last[1])][2], "it went on past epoch 1, and would not have"


def test_the_capacity_table_is_what_the_tool_computes():
    trials_at_once = load_module(REPO / "scripts/raytune_hpo/worker_capacity.py").trials_at_once
    rows = table(EXERCISE_README, "Cnode")
    assert len(rows) >= 5
    for *numbers, limit in rows:
        Cnode, Gnode, Gw, T, cpus, gpus = map(int, numbers)
        assert trials_at_once(2, 2, Gw, 2, Cnode, Gnode) == T, numbers
        assert (cpus, gpus) == (2 + T * 2 * 2, T * 2 * Gw), numbers
        broken = [name for name, over in (("CPUs", cpus + 4 > Cnode), ("GPUs", gpus + 2 * Gw > Gnode)) if over]
        assert limit == ("both" if len(broken) == 2 else broken[0]), numbers
    text = " ".join(prose(EXERCISE_README).split())
    assert rows[0][:4] == ["20", "8", "1", "4"] and "gives T=4: 2 + 4*2*2 = 18 <= 20, and 4*2*1 = 8 <= 8." in text


def test_the_quoted_capacity_output_is_what_the_command_prints():
    quoted = next(block for block in blocks(EXERCISE_README, "text") if block[0].startswith("capacity:"))
    line, words, folder = next(c for c in commands(EXERCISE_README) if "worker_capacity.py" in c[0])
    printed = subprocess.run([sys.executable, *words[1:]], cwd=folder, text=True, capture_output=True, check=True).stdout
    assert quoted == printed.splitlines(), line


def test_the_capacity_of_the_sandbox_in_the_text_is_right(hpo):
    trials_at_once = load_module(REPO / "scripts/raytune_hpo/worker_capacity.py").trials_at_once
    node = re.search(r"worker=\"CPUs=(\d+) .*Gres=gpu:v100:(\d+)", (REPO / "tests/mini_slurm.sh").read_text())
    text = " ".join(prose(README).split())
    assert f"has {node[1]} CPUs and {node[2]} GPUs in name only" in text
    assert "`CPUS_PER_WORKER=4` makes that two trials at once (2 + 2*2*4 = 18 of 20 CPUs)" in text
    assert trials_at_once(2, 4, 0, 2, int(node[1]), 0) == trials_at_once(2, 4, 1, 2, int(node[1]), int(node[2])) == 2


def test_deepspeed_settings_are_as_described():
    config = json.loads((REPO / "scripts/ds_config.json").read_text())
    assert "optimizer" not in config and "scheduler" not in config  # such a block would make knobs dead
    assert config["zero_optimization"]["stage"] == 2 and '`"stage": 2`' in prose(EXERCISE_README)
    assert config["gradient_clipping"] == config["fp16"]["enabled"] == config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["zero_optimization"]["overlap_comm"] is True


# ---- Log lines -------------------------------------------------------------------------------------------------------
def pattern_of(node, named):
    """A regular expression for what a Python string expression prints."""
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value))
    if isinstance(node, ast.IfExp):
        return f"(?:{pattern_of(node.body, named)}|{pattern_of(node.orelse, named)})"
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern_of(value, named) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        if isinstance(node.value, ast.Name) and node.value.id in named:
            return named[node.value.id]
        spec = ast.unparse(node.format_spec)[2:-1] if node.format_spec else ""
        if match := re.fullmatch(r"\.(\d)f", spec):
            return rf"-?\d+\.\d{{{match[1]}}}"
        if spec == "g":
            return r"[\d.e+-]+"
        if isinstance(node.value, ast.IfExp):
            return pattern_of(node.value, named)
    return r"\S(?:.*\S)?"


def search_patterns():
    """Regular expressions for the lines that say() prints in the search script."""
    tree = ast.parse(SCRIPT.read_text())
    ends = [n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "end"]
    ends = [e for e in ends if isinstance(e, (ast.Constant, ast.JoinedStr, ast.IfExp))]
    name = next(k.value.body for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "trial_name_creator")
    named = {"trial": pattern_of(name, {}).replace(r"\S(?:.*\S)?", r"\w+")}
    named["end"] = f"(?:{'|'.join(pattern_of(e, named) for e in ends)})"
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "say"]
    assert ends and len(calls) > 4
    return [pattern_of(call.args[0], named) for call in calls]


def shell_patterns(path):
    """Regular expressions for the lines that say "..." prints in a shell script."""
    found = re.findall(r'\bsay "((?:\\.|\$\((?:[^()]|\([^()]*\))*\)|[^"\\])*)"', path.read_text())
    parts = [re.split(r"\$\(\([^)]*\)+|\$\(.*\)|\$\{[^}]*\}|\$\w+", text) for text in found]
    return [".+".join(map(re.escape, part)) for part in parts]


def log_lines():
    """(document, line) of each quoted line that a log would hold with time and role."""
    for document in DOCUMENTS:
        for block in blocks(document, "text"):
            yield from ((document, line) for line in block if re.match(r"\d\d:\d\d:\d\d ", line))


def test_quoted_log_lines_have_the_form_that_the_code_prints():
    search = search_patterns()
    jobs = {"head": [*shell_patterns(EXERCISE / HEAD), *shell_patterns(RAY_JOB)],
            "worker": [*shell_patterns(EXERCISE / WORKER), *shell_patterns(RAY_JOB)]}  # fmt: skip
    seen = 0
    for document, line in log_lines():
        if match := re.fullmatch(r"\S{8} search \| (.*)", line):
            patterns, text = search, match[1]
        else:
            match = re.fullmatch(r"\S{8} (head|worker) \S+ \| (.*)", line)
            assert match, f"{document}: {line}"
            patterns, text = jobs[match[1]], match[2]
        assert any(re.fullmatch(pattern, text) for pattern in patterns), f"{document}: {line}"
        seen += 1
    assert seen > 15


def test_the_kinds_of_line_that_a_reader_needs_are_quoted_and_still_printed():
    search = search_patterns()
    for document in (README, EXERCISE_README):
        text = "\n".join(line for d, line in log_lines() if d == document)
        for kind in (
            r"TorchTrainer_\w+  started    lr [\d.e-]+  per_device_bs \d+  wd [\d.e-]+",
            r"TorchTrainer_\w+  epoch 1/5  eval_loss \d+\.\d{5}",
            r"TorchTrainer_\w+  stopped    by ASHA after epoch \d",
            r"TorchTrainer_\w+  finished   all epochs",
        ):
            match = re.search(rf"^\S{{8}} search \| ({kind})$", text, re.MULTILINE)
            assert match, f"{document}: {kind}"
            assert any(re.fullmatch(pattern, match[1]) for pattern in search), kind
    joined = "worker 1/1 joined"  # quoted in the text: the beginning of a line of the head
    assert all(f"`{joined}`" in prose(document) for document in (README, EXERCISE_README))
    assert any(re.fullmatch(p, f"{joined}: job 7 on n1, 4 trial(s) at once") for p in shell_patterns(EXERCISE / HEAD))


def test_quoted_banners_have_the_form_that_the_code_prints():
    source = RAY_JOB.read_text()
    form = re.search(r"printf '(===== .*)\\n' \"\$JOB\" \"\$1\" \"\$\(date '\+([^']+)'\)\"", source)
    time = form[2].replace("%Y-%m-%d", r"\d{4}-\d\d-\d\d").replace("%H:%M:%S", r"\d\d:\d\d:\d\d").replace("%Z", r"\S+")
    assert form[1] == "===== JOB %s %-6s : %s ====="
    expected = re.compile(rf"===== JOB \S+ (START |FINISH) : {time} =====")
    for document in (README, EXERCISE_README):
        banners = [line for block in blocks(document, "text") for line in block if line.startswith("=====")]
        assert [expected.fullmatch(line)[1].strip() for line in banners] == ["START", "FINISH"], document
    for script in (HEAD, WORKER):
        assert re.findall(r"banner (\w+)", (EXERCISE / script).read_text()).count("START") == 1


def test_the_quoted_best_result_parses_and_has_the_keys_of_the_code():
    tree = ast.parse(SCRIPT.read_text())
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "best_report")
    keys = next(ast.literal_eval(n.generators[0].iter) for n in ast.walk(function) if isinstance(n, ast.DictComp))
    assert 'print(f"Best Trial Result:\\n{best}"' in SCRIPT.read_text()
    for document in (README, EXERCISE_README):
        lines = next(block for block in blocks(document, "text") if "Best Trial Result:" in block)
        best = ast.literal_eval(lines[lines.index("Best Trial Result:") + 1])
        assert tuple(best) == (*keys, "config")
        assert set(best["config"]["train_loop_config"]) == {"lr", "per_device_bs", "wd"}


@every_document
def test_quoted_settings_lines_have_the_form_that_the_code_prints(document, hpo):
    assert 'print(f"  {name:<18} {' in SCRIPT.read_text()
    for block in blocks(document, "text"):
        for line in block:
            if match := re.match(r"  ([A-Z]+_[A-Z_]+|SEED) ", line):
                assert match[1] in hpo.VARIABLES and re.match(rf"  {match[1]:<18} \S", line), line


@every_document
def test_quoted_boxes_have_as_many_cells_in_each_row(document):
    for block in blocks(document, "text"):
        widths = {len(line) for line in block if line.startswith(("+--", "|"))}
        assert len(widths) <= 1, document


def test_the_quoted_error_messages_are_those_of_the_code(hpo):
    (quoted,) = [block for block in blocks(README, "text") if block[0].startswith("ERROR: LR_LOWER")]
    with pytest.raises(hpo.InputError) as error:
        hpo.read_settings({"LR_LOWER": "abc", "BS_CHOICES": "1,2", "NUM_SAMPLE": "3"})
    assert quoted == [f"ERROR: {line}" for line in str(error.value).splitlines()]
    for message, script in (
        ("no worker joined and none is queued", EXERCISE / HEAD),
        ("does not fit on a node", None),
        ("waited 120 s for Ray to join the head; giving up", None),
    ):
        assert message in " ".join(prose(README).split()), message
        assert script is None or message in script.read_text()
    capacity = (REPO / "scripts/raytune_hpo/worker_capacity.py").read_text()
    assert "ERROR: one trial (" in capacity and "does not fit on a " in capacity
    assert 'wait_until 120 "Ray to join the head"' in (EXERCISE / WORKER).read_text()
    assert 'fail "waited $limit s for $what; giving up"' in RAY_JOB.read_text()


# ---- Troubleshooting -------------------------------------------------------------------------------------------------
SOURCES = [EXERCISE / HEAD, EXERCISE / WORKER, RAY_JOB, SCRIPT] + [REPO / "scripts" / name for name in (
    "check_site.sh", "setup_env.sh", "raytune_hpo/worker_capacity.py", "raytune_hpo/fill_tables.py", "raytune_hpo/read_run.py")]  # fmt: skip
SOURCES.append(REPO / "tests/mini_slurm.sh")
FOREIGN = {  # what others print and the page quotes
    "JobState=FAILED", "ExitCode=0:53", "StdOut=",  # scontrol show job, provoked on the sandbox
    "PENDING", "RUNNING", "JobState=OUT_OF_MEMORY",  # states of Slurm
    "Invalid feature specification",  # sbatch, provoked on the sandbox
    "No such file or directory",  # ls
    "HTTP/2 200",  # curl
    "AF_UNIX path too long",  # Python, provoked in test_check_site.py
    "no kernel image is available for execution on the device", "OutOfMemoryError: CUDA out of memory",  # PyTorch
    "64M",  # df
}  # fmt: skip


def messages():
    """What our own programs print, one text each, with NUL where a value stands."""
    for path in SOURCES:
        text = path.read_text()
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
            continue
        text = text.replace("$EDIT", re.search(r'^EDIT="(.*)"', (REPO / "scripts/check_site.sh").read_text(), re.MULTILINE)[1])
        quoted = r'"((?:\\.|\$\((?:[^()]|\([^()]*\))*\)|[^"\\])*)"'
        found = re.findall(rf"\b(say|fail|failed|warning|ok|die|echo) {quoted}", text)
        found += [("failed", what) for what in re.findall(rf"\bwhat={quoted}", text)]
        found += [("failed", f"Slurm refuses it: ; fix: {fix}") for fix in re.findall(rf"\bfix={quoted}", text)]
        found += [("fail", f"waited {limit} s for {what}; giving up") for limit, what in re.findall(rf'\bwait_until "?([^\s"]+)"? {quoted}', text)]
        found += [("printf", text.replace("%s", "\0")) for text in re.findall(r"\bprintf '([^']*)'", text)]
        mark = {"fail": "ERROR: ", "failed": "FAILED \0", "warning": "warning \0"}
        for how, message in found:
            yield mark.get(how, "") + re.sub(r"\$\(\([^)]*\)+|\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}|\$\w+", "\0", message).replace('\\"', '"')


def is_printed(quote, printed):
    """Whether a quote is part of one of these messages; "..." in it stands for anything."""
    quote = re.sub(r"^ERROR: ((LR_LOWER|RESUME|MODEL_NAME)=)?", "ERROR: ", quote)
    parts = re.compile(".*".join(re.escape(part.strip()) for part in quote.removeprefix("ERROR: ").split("...")), re.DOTALL)
    return any(parts.search(message) for message in printed)


def symptoms():
    """{symptom: {part: its text}} of the section Troubleshooting."""
    section = README.read_text().split("\n## Troubleshooting\n")[1].split("\n## ")[0]
    found = {}
    for text in re.split(r"^(?=\*\*)", section, flags=re.MULTILINE)[1:]:
        title, *parts = re.split(r"^- (Run|Shows|Fix): ", text.split("\n### ")[0], flags=re.MULTILINE)
        found[title] = dict(zip(parts[::2], parts[1::2], strict=True))
    return found


def code_in(text):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL))]


def test_each_symptom_says_what_to_run_what_that_shows_and_the_fix():
    found = symptoms()
    assert len(found) >= 25
    for title, parts in found.items():
        assert list(parts) == ["Run", "Shows", "Fix"] and all(part.strip() for part in parts.values()), title
        assert code_in(parts["Run"]), f"no command: {title}"
    titles = " ".join(" ".join(found).split())
    for topic in ("PENDING", "no worker joined", "no kernel image", "CUDA out of memory", "died; out of memory", "cannot be loaded", "AF_UNIX", "ulimit -u", "/dev/shm",
                  "firewall", "wrong network interface", "quota", "NaN", "log folder is missing", "time limit", "cut off", "misspelt", "is not continued", "dashboard"):
        assert topic in titles, topic
    reasons = " ".join(row[0] for row in table(README, "reason"))
    for reason in ("Resources", "Priority", "PartitionTimeLimit", "QOSMax", "AssocGrp", "ReqNodeNotAvail"):
        assert reason in reasons, reason


def test_each_line_quoted_there_is_one_that_our_programs_print_or_named_as_another_s():
    printed, seen = list(messages()), 0
    for title, parts in symptoms().items():
        for span in code_in(title + parts["Shows"]):
            if " " not in span and not span.startswith("FAILED") and re.fullmatch(r"[\w./$-]+", span) and span not in FOREIGN:
                continue  # a path, a variable, a word of the log: checked as such
            if span in FOREIGN or span == "ulimit -u":
                continue
            assert is_printed(span, printed), f"{title.strip()}: nothing prints {span}"
            seen += 1
    assert seen > 25
    assert not is_printed("ERROR: waited ... s for Godot; giving up", printed)


# ---- The quoted run --------------------------------------------------------------------------------------------------
PICTURES = EXERCISE / "pictures"


def test_the_sample_log_is_from_the_log_that_is_kept():
    log = (PICTURES / "quickstart.out").read_text().splitlines()
    sample = next(block for block in blocks(README, "text") if block[0].startswith("====="))
    at = 0
    for line in sample:
        if line != "...":
            assert line in log[at:], f"not in the log, or not in this order: {line}"
            at = log.index(line, at) + 1
    seconds = [int(h) * 3600 + int(m) * 60 + int(s) for line in (log[0], log[-1]) for h, m, s in [re.search(r" (\d\d):(\d\d):(\d\d) ", line).groups()]]
    minutes, rest = divmod((seconds[1] - seconds[0]) % 86400, 60)
    took = f"{minutes} min {rest} s"
    assert f"It took {took}." in prose(README)
    assert ["the run, from START to FINISH", took] in table(README, "step")


def test_the_pictures_are_of_that_log_and_small(tmp_path):
    import matplotlib.image

    shown = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", README.read_text())
    assert len(shown) == 2 and {(REPO / name).resolve() for name in shown} == set(PICTURES.glob("*.png"))
    assert all(path.stat().st_size < 100_000 for path in PICTURES.glob("*.png"))
    command = next(words for _, words, _ in commands(README) if "--plots" in words and any("quickstart.out" in word for word in words))
    command[0], command[command.index("--plots") + 1] = sys.executable, str(tmp_path)
    subprocess.run(command, cwd=REPO, check=True, capture_output=True, timeout=120)
    kept, drawn = (matplotlib.image.imread(folder / "loss.png") for folder in (PICTURES, tmp_path))
    assert kept.shape == drawn.shape and abs(kept - drawn).mean() < 0.01  # another font or version moves some pixels


# ---- Slurm directives ------------------------------------------------------------------------------------------------
def directives(script):
    """The #SBATCH options of a script as Slurm reads them: exactly that word, and before the first command."""
    found = {}
    for line in (EXERCISE / script).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if match := re.match(r"#SBATCH --([\w-]+)=(\S+)(\s+#.*)?$", line):
            assert match[1] not in found, line
            found[match[1]] = match[2]
    return found


def test_head_directives():
    assert directives(HEAD) == {
        "job-name": "ray_head_bloom_5epochs",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": "4",
        "time": "04:00:00",
        "output": "logs/ray_head_bloom_5epochs-%j.out",
        "open-mode": "append",
        "signal": "B:TERM@120",
    }


def test_worker_directives():
    assert directives(WORKER) == {
        "job-name": "ray_worker_bloom_5epochs",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": "20",
        "gpus-per-node": "8",
        "constraint": "v100",
        "time": "04:00:00",
        "output": "logs/ray_worker_bloom_5epochs-%j.out",
    }


@pytest.mark.parametrize("script", [path.relative_to(REPO).as_posix() for path in sorted(REPO.glob("experiments/**/*.slurm"))])
def test_no_directive_is_misspelt(script):
    """Slurm ignores '# SBATCH' and '#SBACTH' without a word."""
    lines, commands_begun = (REPO / script).read_text().splitlines(), False
    for line in lines:
        commands_begun |= bool(line.strip()) and not line.startswith("#")
        word = re.match(r"(#+\s*)(\w+)", line)
        if not word or SequenceMatcher(None, word[2].upper(), "SBATCH").ratio() < 0.7:
            continue
        if line.startswith("#   sbatch "):  # usage in the head comment
            continue
        assert re.match(r"##?SBATCH --[a-z-]+=\S+(\s+#.*)?$", line), f"Slurm would not read: {line}"
        assert not commands_begun, f"after the first command: {line}"
    assert any(line.startswith("#SBATCH ") for line in lines)
    output = next(line for line in lines if line.startswith("#SBATCH --output=")).split("=")[1].split()[0]
    assert ((REPO / script).parent / output).parent.is_dir()


def test_the_log_names_in_the_text_are_those_of_the_directives():
    for script in (HEAD, WORKER):
        name = directives(script)["output"].replace("%j", "<jobid>")
        for document in (README, EXERCISE_README):
            assert f"`{name}`" in prose(document), f"{document}: {name}"


# ---- Versions --------------------------------------------------------------------------------------------------------
def test_conda_and_pip_install_the_same_torch():
    conda = re.search(r"- torch==([\d.]+)(\+\w+)?$", (REPO / "environment.yml").read_text(), re.MULTILINE)
    pip = re.search(r"^torch==([\d.]+)$", (REPO / "requirements.txt").read_text(), re.MULTILINE)
    assert conda[1] == pip[1] and conda[2] == "+cu126"
    assert "https://download.pytorch.org/whl/cu126" in (REPO / "environment.yml").read_text()
    assert "- -r requirements.txt" in (REPO / "environment.yml").read_text()
