"""The documents say what is there: links, paths, commands with their options, variables, computed numbers."""

import functools
import re
import shlex
import statistics
import subprocess
from pathlib import Path

from conftest import EXERCISE, REPO, call, load_module

README, EXERCISE_README = REPO / "README.md", EXERCISE / "README.md"
MADE_LATER = {  # named in the documents; the code, Slurm or the user makes them
    ".venv", ".demo", "runs/", "experiments/raytune/scheduler/asha/runs/", "experiments/manual/runs/", "shutdown.txt",
    "train-v1.1.json", "dev-v1.1.json", "train.jsonl", "dev.jsonl", "tables.md", "compare.png",
    "events.jsonl"}  # fmt: skip
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
    header = rf"^\| {re.escape(first_cell)} \|.*\n\|[-| :]+\n"
    (body,) = re.findall(rf"{header}((?:\|.*\n)+)", prose(document), re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in body.splitlines()]


# ---- Links and paths -------------------------------------------------------------------------------------------------
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
            like_a_path = "/" in span or re.fullmatch(r"[\w.-]+\.(py|sh|slurm|jsonl?|yml|txt|md)|\.\w+", span)
            if like_a_path and not re.search(r"[<>$\s=:\"]", span):
                assert exists(span, document.parent), f"{document}: no such path: {span}"
    for tree in [block for block in blocks(README, "text") if block[0].startswith("README.md")]:
        parents = [REPO]  # two spaces a level, a comment after the name
        for line in tree:
            indent, name = re.match(r"( *)(\S+)", line).groups()
            parents[len(indent) // 2 + 1 :] = []
            parents.append(parents[-1] / name)
            assert parents[-1].exists(), f"no such path: {line}"


def test_the_courses_paths_to_the_logs_exist():
    """Slurm starts no job whose log folder is missing. That of the files: links in the exercise."""
    assert EXERCISE / "logs/.gitkeep" in files()
    assert (REPO / "experiments/raytune_hpo/raytune_asha_scheduler/logs").samefile(EXERCISE / "logs")


# ---- Commands --------------------------------------------------------------------------------------------------------
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


ALL_COMMANDS = [(document, *command) for document in DOCUMENTS for command in commands(document)]


def test_commands_name_existing_files_and_options_that_help_tells():
    told = {}  # by each tool's name, what its --help prints
    for tool in files("scripts/*.py", "scripts/*.sh", "experiments/*.sh", "tests/*.sh", "tests/benchmarks/*.py"):
        if "argparse" in tool.read_text():
            run = call(load_module(tool), "--help")
        elif tool.suffix == ".sh" and "--help" in tool.read_text():
            run = subprocess.run(["bash", tool, "--help"], text=True, capture_output=True, check=False, timeout=60)
        else:
            continue
        assert run.returncode == 0 and len(run.stdout.splitlines()) > 2, tool
        told[tool.name] = run.stdout
    for document, line, words, folder in ALL_COMMANDS:
        for word in words:
            if re.search(r"\.(py|sh|slurm|yml)$", word):
                path = re.sub(r"^\w+=", "", word)  # or the value of a variable
                there = any(folder.glob(path)) if folder else exists(path, document.parent)
                assert there, f"{document}: no such file: {line}"
        ours = next((i for i, word in enumerate(words) if Path(word).name in told), len(words))
        for option in {word.split("=")[0] for word in words[ours:] if word.startswith("--")} - {"--help"}:
            assert re.search(rf"{option}\b", told[Path(words[ours]).name]), f"{document}: no {option}: {line}"


# ---- Tables and numbers ----------------------------------------------------------------------------------------------
def test_the_table_of_variables_is_that_of_the_code(hpo):
    assert table(README, "variable") == [[name, entry[0], entry[-1]] for name, entry in hpo.VARIABLES.items()]


KEPT_LOG = (EXERCISE / "pictures/quickstart.out").read_text().replace("/home/student/course/", "")


def test_the_worked_example_follows_the_rule():
    """A trial is stopped at a rung if its loss is above the median of those recorded there before it."""
    recorded, rows = {1: [], 2: [], 4: []}, {n: [str(n), "", "", "", "to epoch 5"] for n in range(12)}
    for n, epoch, loss in re.findall(r"_(\d{5})  epoch ([124])/5  eval_loss (\S+)", KEPT_LOG):  # as they arrived
        row, loss, before = rows[int(n)], float(loss), recorded[int(epoch)]
        median = statistics.median(before) if before else None
        row[1 + list(recorded).index(int(epoch))] = f"{loss:.3f} ({f'{median:.3f}' if before else 'none'})"
        if before and loss > median:
            row[-1] = f"stopped after epoch {epoch}"
        before.append(loss)
    assert table(EXERCISE_README, "trial") == list(rows.values())


def test_a_quoted_log_is_that_of_the_run_that_is_kept():
    quoted = [line for page in (README, EXERCISE_README) for block in blocks(page, "text") for line in block]
    lines = [line for line in quoted if re.match(r"=====|\d\d:\d\d:\d\d |\| TorchTrainer|{'eval_loss", line)]
    assert len(lines) > 15 and not set(lines) - set(KEPT_LOG.splitlines())


def test_each_question_has_its_answer():
    asked, answered = (set(re.findall(r"\*\*((?:Quiz |[RQ])\d+)\b", page.read_text()))
                       for page in (EXERCISE_README, EXERCISE / "ANSWERS.md"))  # fmt: skip
    assert asked and asked == answered
