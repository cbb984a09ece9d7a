"""The documents say what is there: links, paths, commands with their options, variables, computed numbers."""

import functools
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXERCISE, REPO, load_module

README, EXERCISE_README = REPO / "README.md", EXERCISE / "README.md"
MADE_LATER = {  # named in the documents; the code, Slurm or the user makes them
    ".venv", ".demo", "runs/", "experiments/raytune/scheduler/asha/runs/", "shutdown.txt",
    "train-v1.1.json", "dev-v1.1.json", "tables.md", "compare.png"}  # fmt: skip
THE_COURSES_OTHER_NAMES = {"bloom_ray_tune.py", "ray_head_bloom.slurm", "worker_node_v100.slurm"}


@functools.cache
def files(*patterns):
    """What git tracks or would: neither .venv nor what runs leave behind."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=True).stdout
    return sorted({REPO / name for name in listed.split("\0") if name and (REPO / name).is_file()})


DOCUMENTS = [path for path in files("*.md") if path.relative_to(REPO).parts[0] != "shared"]


def blocks(document, language):
    """The fenced blocks of one language, each as its lines without the fence's indentation."""
    fences = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(fences, document.read_text(), re.MULTILINE | re.DOTALL)
    return [[line.removeprefix(indent) for line in body.splitlines()] for indent, body in found]


def prose(document):
    """The text without fenced blocks, and with escaped asterisks as they are shown."""
    text = re.sub(r"^( *)```.*?^\1```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return text.replace("\\*", "*")


def spans(document):
    """What stands in backticks outside fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def table(document, first_cell):
    """The rows of the table whose header begins with first_cell, as lists of cells without backticks."""
    (body,) = re.findall(
        rf"^\| {re.escape(first_cell)} \|.*\n\|[-| :]+\n((?:\|.*\n)+)", prose(document), re.MULTILINE
    )
    return [
        [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in body.splitlines()
    ]


# ---- Links and paths ---------------------------------------------------------------------------------------
def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_relative_links_resolve():
    link = r"\]\((?![a-z]+:)([^)\s]+)\)"
    links = [(document, target) for document in DOCUMENTS for target in re.findall(link, prose(document))]
    assert len(links) > 10
    for document, target in links:
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document}: broken link: {target}"
        assert not anchor or anchor in anchors(path), f"{document}: no such heading: {target}"


def exists(name, folder):
    """Whether it is a path of this repository: from the document's folder, the top, or by its bare name."""
    if "*" in name:
        return any(folder.glob(name)) or any(REPO.glob(name))
    return (folder / name).exists() or (REPO / name).exists() or any(path.name == name for path in files())


def test_quoted_paths_exist(hpo):
    hub_ids = {hpo.VARIABLES[name][0] for name in ("MODEL_NAME", "SQUAD_DATA")}
    for document in DOCUMENTS:
        for span in set(spans(document)) - hub_ids - MADE_LATER - THE_COURSES_OTHER_NAMES:
            like_a_path = "/" in span or re.fullmatch(r"[\w.-]+\.(py|sh|slurm|json|yml|txt|md)|\.\w+", span)
            if like_a_path and not re.search(r"[<>$\s=:\"]", span):
                assert exists(span, document.parent), f"{document}: no such path: {span}"


def test_quoted_trees_exist():
    """A text block whose first line is README.md is a tree: two spaces a level, a comment after the name."""
    for document, tree in [(each, block) for each in DOCUMENTS for block in blocks(each, "text")]:
        parents = [document.parent]
        for line in tree if tree[0] == "README.md" else ():
            indent, name = re.match(r"( *)(\S+)", line).groups()
            parents[len(indent) // 2 + 1 :] = []
            path = parents[-1] / name
            there = path.is_dir() if name.endswith("/") else path.is_file()
            assert there, f"{document}: no such path: {line}"
            parents.append(path)


def test_the_courses_paths_to_the_logs_exist():
    """Slurm starts no job whose log folder is missing. That of the files: links in the exercise."""
    assert EXERCISE / "logs/.gitkeep" in files()
    assert (REPO / "experiments/raytune_hpo/raytune_asha_scheduler/logs").samefile(EXERCISE / "logs")


# ---- Commands ----------------------------------------------------------------------------------------------
def commands(document):
    """(line, words, folder) of each command in a bash block or in backticks; folder follows its cd."""
    for block in blocks(document, "bash"):
        folder = document.parent
        for line in "\n".join(block).replace("\\\n", " ").splitlines():
            bare = re.sub(r"(^|\s)#.*", "", line).replace("$(", " ").replace(")", " ")
            for part in re.split(r"&&|\|\||[|;]", bare):
                words = shlex.split(part)
                if words[:1] == ["cd"]:
                    folder = (folder / words[1]).resolve()
                    assert folder.is_dir(), f"{document}: no such folder: {line}"
                elif words:
                    yield line, words, folder
    for span in spans(document):
        if re.match(r"([A-Z_]+=\S* )*(bash|sbatch|python3?|\.venv/bin/python|conda|tail|grep) ", span):
            yield span, shlex.split(span), None


def all_commands():
    return [(document, *command) for document in DOCUMENTS for command in commands(document)]


HELP_OF_ALL = """
import contextlib, io, json, os, runpy, sys
found = {}
for tool in sys.argv[1:]:
    sys.argv, sys.path[0], said, status = [tool, "--help"], os.path.dirname(tool), io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(tool, run_name="__main__")
        except SystemExit as end:
            status = end.code
    found[tool] = [status or 0, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps():
    """{program: [exit status, what its --help prints]}; Python's in one process, since imports take time."""
    programs = files("scripts/*.py", "scripts/*.sh", "tests/*.sh", "tests/benchmarks/*.py")
    texts = {path: path.read_text() for path in programs}
    python = [path for path in programs if "argparse" in texts[path]]
    command = [sys.executable, "-c", HELP_OF_ALL, *python]
    found = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    told = {Path(tool): answer for tool, answer in json.loads(found).items()}
    for path in programs:
        if path.suffix == ".sh" and "--help" in texts[path]:
            command = ["bash", path, "--help"]
            run = subprocess.run(command, check=False, text=True, capture_output=True, timeout=60)
            told[path] = [run.returncode, run.stdout]
    assert len(told) > 10
    return told


def test_each_tool_answers_help(helps):
    for tool, (status, said) in helps.items():
        assert status == 0 and len(said.splitlines()) > 2, tool


def test_commands_name_existing_files_and_options(helps):
    by_name = {tool.name: said for tool, (_, said) in helps.items()}
    for document, line, words, folder in all_commands():
        for word in words:
            if re.search(r"\.(py|sh|slurm|yml)$", word):
                path = re.sub(r"^\w+=", "", word)  # or the value of a variable
                there = any(folder.glob(path)) if folder else exists(path, document.parent)
                assert there, f"{document}: no such file: {line}"
        ours = next((i for i, word in enumerate(words) if Path(word).name in by_name), len(words))
        told = by_name.get(Path(words[ours]).name) if words[ours:] else None
        for option in {word.split("=")[0] for word in words[ours:] if word.startswith("--")} - {"--help"}:
            assert re.search(rf"{option}\b", told), f"{document}: no {option}: {line}"
        if "tests/mini_slurm.sh" in words:
            assert words[words.index("tests/mini_slurm.sh") + 1] in ("up", "down", "status", "--help"), line


def test_commands_set_variables_that_a_program_reads(hpo):
    code = files("scripts/*", "experiments/*.slurm", "tests/*.sh")
    known = set(hpo.VARIABLES).union(*(re.findall(r"[A-Z][A-Z0-9_]+", path.read_text()) for path in code))
    known.add("WANDB_MODE")  # that package reads it
    for document, line, words, _ in all_commands():
        for name in filter(None, (re.match(r"([A-Z][A-Z0-9_]*)=", word) for word in words)):
            assert name[1] in known, f"{document}: nothing reads {name[1]}: {line}"
    for document in DOCUMENTS:
        for span in spans(document):  # `NAME=value` and `NAME` in the text
            if name := re.fullmatch(r"([A-Z][A-Z0-9]*_[A-Z0-9_]*)(?:=.*)?", span):
                assert name[1] in known, f"{document}: nothing reads {span}"


def test_commands_are_what_bash_can_read():
    starts = r"([A-Z_]+=\S* )*(bash|sbatch|srun|squeue|sinfo|scontrol|scancel|tail|grep|curl|df|ls|less) "
    for document in DOCUMENTS:
        texts = ["\n".join(block) for block in blocks(document, "bash")]
        for text in texts + [span for span in spans(document) if re.match(starts, span)]:
            text = re.sub(r"<\w+>", "12345", text)
            run = subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True)
            assert not run.stderr, f"{document}: {text}\n{run.stderr}"


def test_commands_of_slurm_have_their_options(slurm):
    @functools.cache
    def help_of(tool):
        return subprocess.run([tool, "--help"], env=slurm, text=True, check=True, capture_output=True).stdout

    call = r"(?:^|[\s(|])(sbatch|squeue|sinfo|scontrol|scancel|srun) ([^|;)]*)"
    for document in DOCUMENTS:
        for line in [line for block in blocks(document, "bash") for line in block] + spans(document):
            for tool, rest in re.findall(call, line):
                for option in re.findall(r"(?:^| )(--[a-z-]+)", re.split(r"\S+\.slurm|\.venv", rest)[0]):
                    hidden = (tool, option) == ("squeue", "--me")  # its help does not tell of it
                    assert hidden or option in help_of(tool), f"{document}: {line}"


# ---- Tables and numbers ------------------------------------------------------------------------------------
def test_the_table_of_variables_is_that_of_the_code(hpo):
    assert table(README, "variable") == [[name, entry[0], entry[-1]] for name, entry in hpo.VARIABLES.items()]


KEPT_LOG = (EXERCISE / "pictures/quickstart.out").read_text().replace("/home/student/course/", "")


def test_the_worked_example_follows_the_rule():
    """A trial is stopped at a rung if its loss is above the median of those recorded there before it."""
    kept = {(int(n), int(epoch)): float(loss)
            for n, epoch, loss in re.findall(r"_(\d{5})  epoch (\d)/5  eval_loss (\S+)", KEPT_LOG)}  # fmt: skip
    recorded, rows = {1: [], 2: [], 4: []}, []
    for trial in range(12):
        cells, end = [], 5
        for rung, before in recorded.items():
            loss = kept.get((trial, rung))
            cells.append(loss and f"{loss:.3f} ({f'{statistics.median(before):.3f}' if before else 'none'})")
            end = rung if loss and before and loss > statistics.median(before) else end
            before += [loss] if loss else []
        verdict = "to epoch 5" if end == 5 else f"stopped after epoch {end}"
        rows.append([str(trial), *(cell or "" for cell in cells), verdict])
    assert table(EXERCISE_README, "trial") == rows
    assert f"{len(kept)} epochs were trained instead of {5 * len(rows)}." in prose(EXERCISE_README)


def test_the_capacity_table_is_what_the_tool_computes():
    trials_at_once = load_module(REPO / "scripts/job/worker_capacity.py").trials_at_once
    rows = table(EXERCISE_README, "Cnode")
    assert len(rows) >= 5
    for *numbers, limit in rows:
        Cnode, Gnode, Gw, T, cpus, gpus = map(int, numbers)
        assert trials_at_once(2, 2, Gw, 2, Cnode, Gnode) == T, numbers
        assert (cpus, gpus) == (2 + T * 2 * 2, T * 2 * Gw), numbers
        over = (cpus + 4 > Cnode, gpus + 2 * Gw > Gnode)  # with one trial more
        assert limit == {(True, True): "both", (True, False): "CPUs", (False, True): "GPUs"}[over], numbers


def test_the_quoted_capacity_output_is_what_the_command_prints():
    (quoted,) = [block for block in blocks(EXERCISE_README, "text") if block[0].startswith("capacity:")]
    words, folder = next(c[2:] for c in all_commands() if "worker_capacity.py" in c[1] and c[3])
    run = subprocess.run([sys.executable, *words[1:]], cwd=folder, text=True, capture_output=True, check=True)
    assert quoted == run.stdout.splitlines()


def test_a_quoted_log_is_that_of_the_run_that_is_kept():
    quoted = [line for page in (README, EXERCISE_README) for block in blocks(page, "text") for line in block]
    lines = [line for line in quoted if re.match(r"=====|\d\d:\d\d:\d\d |\| TorchTrainer|{'eval_loss", line)]
    assert len(lines) > 15 and not set(lines) - set(KEPT_LOG.splitlines())


def test_the_slides_show_what_the_exercise_says():
    """Rows of tables, commands and the quiz's choices."""
    text = EXERCISE_README.read_text()
    slides = (EXERCISE / "SLIDES.md").read_text()
    rows = re.findall(r"^(?:\| .*|- \[ \] .*)$", slides, re.MULTILINE)
    assert len(rows) > 25 and not [row for row in rows if row not in text]
    assert blocks(EXERCISE / "SLIDES.md", "bash")[0] == blocks(EXERCISE_README, "bash")[1]


# ---- What each document holds ------------------------------------------------------------------------------
def test_the_readme_is_a_page():
    assert len(README.read_text().splitlines()) <= 200


def test_the_exercise_holds_what_the_course_does():
    """Columns and ids of its three tables, its launch, ASHA's arguments, the symbols, the two questions."""
    text = EXERCISE_README.read_text()
    trial = ["Learning Rate (lr)", "Batch Size (bs)", "Weight Decay (wd)", "Eval Loss"]
    best = [*(f"Best {column}" for column in trial), "Total Runtime (s)", "Epochs"]
    job = ["Job Start Time", "Job Finish Time", "Total Job Time"]
    for columns in (job, ["Combo ID", *trial, "Runtime (s)"], best):
        assert f"\n| {' | '.join(columns)} |\n" in text
    assert [row[0] for row in table(EXERCISE_README, "Combo ID")] == [str(n) for n in range(1, 13)]
    launch = 'LR_LOWER=1e-5 LR_UPPER=2e-4 BS_CHOICES="1 2" WD_CHOICES="0.0 0.01" sbatch head_node_raytune_asha'
    assert launch in text.replace("\\\n", "")
    arguments = ["metric", "mode", "grace_period", "max_t", "reduction_factor"]
    assert [row[0] for row in table(EXERCISE_README, "argument")] == arguments
    symbols = ["W", "Cw", "Gw", "Csys", "Tnode", "Cnode", "Gnode"]
    assert [row[0] for row in table(EXERCISE_README, "symbol")] == symbols
    assert all(name in text for name in THE_COURSES_OTHER_NAMES)
    quiz = text.split("\n**Quiz ")[1:]
    assert [re.findall(r"^- \[ \] ([A-D])\. \S", question, re.MULTILINE) for question in quiz] == [[*"ABCD"]] * 2


def test_each_question_has_its_answer():
    asked, answered = (set(re.findall(r"\*\*((?:Quiz |[RQ])\d+)\b", page.read_text()))
                       for page in (EXERCISE_README, EXERCISE / "ANSWERS.md"))  # fmt: skip
    assert len(asked) == 18 and asked == answered
