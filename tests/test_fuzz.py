"""Whatever a user types or a file holds, the readers of input give a result or one line of error, never a trace."""

import json
import shutil
import string
from types import SimpleNamespace

import fill_tables
import pytest
import read_run
from conftest import REPO, load_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fast = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
capacity = load_module(REPO / "scripts/job/worker_capacity.py")
LOG = (REPO / "tests/logs/complete.out").read_text().splitlines()


def one_line(text):
    return text.isprintable() and text.strip() != ""


# ---- Variables -------------------------------------------------------------------------------------------------------
ours = ["LR_LOWER", "LR_UPPER", "BS_CHOICES", "WD_CHOICES", "WORKER_NODES", "NUM_SAMPLES", "NUM_EPOCHS", "MODEL_NAME",
        "SQUAD_DATA", "TRAIN_SAMPLES", "EVAL_SAMPLES", "WORKERS_PER_TRIAL", "CPUS_PER_WORKER", "GPUS_PER_WORKER",
        "WORKER_DEADLINE", "SEED"]  # fmt: skip
letters = st.characters(exclude_characters="=\0")  # of the name of a variable
nearly_ours = st.builds(lambda name, i, text: name[:i] + text + name[i + 1 :],
                        st.sampled_from(ours), st.integers(0, 15), st.text(letters, max_size=2))  # fmt: skip
odd = ["9" * 400, "9" * 5000, "1e999", "nan", "-inf", "1\r", "~x/y", ".", "/", "../..", "a/b", "\0"]
word = st.one_of(st.sampled_from(["1", "2", "8", "0.5", "1e-5"]), st.integers().map(str), st.floats().map(str),
                 st.text(string.digits + "-+._e, ", max_size=8), st.text(max_size=8), st.sampled_from(odd))  # fmt: skip
value = st.one_of(word, st.lists(word, max_size=3).map(" ".join))
name = st.one_of(st.sampled_from(ours), nearly_ours, st.text(letters, max_size=6))


@settings(max_examples=500, **fast)
@given(environ=st.dictionaries(name, value, max_size=5))
def test_variables_of_any_text(checks, environ):
    try:
        s = checks.check(environ, look_inside=False)
    except checks.InputError as error:
        lines = str(error).split("\n")
        assert all(one_line(line) and line.split("=")[0] in {*ours, *environ} for line in lines)
        assert len({line.split("=")[0] for line in lines}) == len(lines)  # one for each variable
        assert str(error).splitlines() == lines  # what main() prints
        return
    assert 0 < s.LR_LOWER < s.LR_UPPER <= 10
    assert s.BS_CHOICES and all(1 <= n and isinstance(n, int) for n in s.BS_CHOICES)
    assert len(set(s.BS_CHOICES)) == len(s.BS_CHOICES)
    assert s.WD_CHOICES and all(0 <= n <= 10 for n in s.WD_CHOICES)
    assert all(getattr(s, name) >= 1 for name in ours if name.endswith(("_SAMPLES", "_EPOCHS", "_NODES", "_TRIAL")))
    assert s.CPUS_PER_WORKER >= 1 and s.GPUS_PER_WORKER in (0, 1) and 0 <= s.SEED < 2**31
    assert one_line(s.MODEL_NAME) and one_line(s.SQUAD_DATA)


# ---- SQuAD files -----------------------------------------------------------------------------------------------------
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                  st.sampled_from(["\ud800", "\x1b[1m", "\u2028"]))  # fmt: skip
keys = st.sampled_from(["data", "paragraphs", "qas", "context", "question", "answers", "text", "id"])
containers = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
any_json = st.recursive(plain, containers, max_leaves=12)


def maybe(right):
    """Mostly what is right, sometimes anything."""
    return st.integers(0, 25).flatmap(lambda n: any_json if n == 25 else right)


def a_list(inner):
    return maybe(st.lists(inner, min_size=1, max_size=3) | st.lists(inner, max_size=1))


text = st.integers(0, 40).flatmap(lambda n: st.just("\ud800") if n == 40 else st.text(max_size=5))
answer = maybe(st.fixed_dictionaries({"text": maybe(text)}))
question = maybe(st.fixed_dictionaries({"question": maybe(text), "answers": a_list(answer)}, optional={"id": plain}))
paragraph = maybe(st.fixed_dictionaries({"context": maybe(text), "qas": a_list(question)}))
article = maybe(st.fixed_dictionaries({"paragraphs": a_list(paragraph)}))
document = maybe(st.fixed_dictionaries({"data": a_list(article)}))
documents = st.one_of(document, any_json).map(lambda value: json.dumps(value).encode())


def check_rows(checks, path):
    """read_squad(path) gives rows of the documented form, or an error that becomes one line. -> rows or None"""
    try:
        rows = checks.read_squad(path)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    assert rows
    for row in rows:
        assert set(row) == {"context", "question", "answers"} and set(row["answers"]) == {"text"}
        assert row["answers"]["text"]
        for text in (row["context"], row["question"], *row["answers"]["text"]):
            text.encode()  # a tokenizer takes it
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz").resolve()


one_question = b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}'
cut_squad = st.builds(lambda mark, begin, end: mark + one_question[begin:end],
                      st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
                      st.sampled_from([0, 0, 1, 30]), st.integers(0, 120))  # fmt: skip
any_bytes = st.one_of(st.binary(max_size=60), st.text(string.printable, max_size=60).map(str.encode), cut_squad)


@settings(max_examples=400, **fast)
@given(data=st.one_of(documents, any_bytes))
def test_squad_of_any_content(checks, folder, data):
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (folder / name).write_bytes(data)
    rows = check_rows(checks, folder / "train-v1.1.json")
    try:
        found = checks.count_questions(folder)
    except checks.InputError as error:
        assert rows is None and one_line(str(error))
        assert str(error).startswith("train-v1.1.json is not SQuAD v1.1 JSON (")
    else:
        assert set(found.values()) == {(name, len(rows)) for name in ("train-v1.1.json", "dev-v1.1.json")}


# ---- Folders ---------------------------------------------------------------------------------------------------------
right = {
    "config.json": b'{"model_type": "bloom"}', "model.safetensors": b"x" * 2000,
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}',
    "train-v1.1.json": one_question, "dev-v1.1.json": one_question,
}  # fmt: skip
content = st.one_of(st.none(), st.binary(max_size=20), documents, st.just(b"x" * 2000), st.just(b"[" * 50_000))


def mostly(data):
    return st.integers(0, 3).flatmap(lambda n: content if n == 3 else st.just(data))


files = st.fixed_dictionaries({name: mostly(data) for name, data in right.items()})


@settings(max_examples=150, **fast)
@given(files=files, count=st.one_of(st.none(), st.integers(1, 5)))
def test_folders_of_any_files(checks, folder, files, count):
    both = folder / "both"
    shutil.rmtree(both, ignore_errors=True)
    both.mkdir()
    for name, data in files.items():
        if data is not None:
            (both / name).write_bytes(data)
    s = SimpleNamespace(MODEL_NAME=str(both), SQUAD_DATA=str(both), TRAIN_SAMPLES=count, EVAL_SAMPLES=count)
    s.CHAT_TEMPLATE = 0
    problems = checks.model_and_data_problems(s)
    variables = ("MODEL_NAME=", "SQUAD_DATA=", "TRAIN_SAMPLES=", "EVAL_SAMPLES=")
    assert all(one_line(line) and line.startswith(variables) for line in problems)
    assert s.MODEL_NAME == s.SQUAD_DATA == str(both)
    model_is_right = all(files[name] == right[name] for name in ("config.json", "tokenizer.json"))
    model_is_right = model_is_right and len(files["model.safetensors"] or b"") > 1000
    assert sum(line.startswith("MODEL_NAME=") for line in problems) == (not model_is_right)
    names = ("train-v1.1.json", "dev-v1.1.json")
    rows = [files[name] is not None and check_rows(checks, both / name) for name in names]
    too_few = any(not found or len(found) < (count or 0) for found in rows)
    assert any(not line.startswith("MODEL_NAME=") for line in problems) == too_few


# ---- Capacity --------------------------------------------------------------------------------------------------------
@settings(max_examples=300, **fast)
@given(W=st.integers(1, 1024), Cw=st.integers(1, 1024), Gw=st.integers(0, 4), Csys=st.integers(0, 64),
       Cnode=st.integers(1, 4096), Gnode=st.integers(0, 64))  # fmt: skip
def test_trials_at_once_is_the_largest_number_that_fits(W, Cw, Gw, Csys, Cnode, Gnode):
    def fits(t):
        return Csys + t * W * Cw <= Cnode and t * W * Gw <= Gnode

    T = capacity.trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode)
    assert T >= 0 and (fits(T) or T == 0) and not fits(T + 1)


# ---- Logs ------------------------------------------------------------------------------------------------------------
lines = [
    "===== JOB 1 START  : 2026-11-24 02:15:55 UTC =====", "===== JOB 1 FINISH : 2026-13-24 99:99:99 =====",
    "Best Trial Result:", "{'eval_loss': 1}", "{" * 500, "12:00:00 search | x  epoch 1/5  eval_loss nan",
    "99:99:99 search | x  epoch 1e9/5  eval_loss", "lr,per_device_bs,wd,eval_loss,epoch,runtime_s",
    "1e-5,1,0.0,0.5,1,2.0", "RESULT lr=1 eval_loss=0.5 epoch=1 runtime_s=1", "FAILED lr=x : no", "GPUs: 0",
    "00:00:00 manual | lr=1 bs=2  epoch 1/5  eval_loss 0.1", "+---+---+", "| Trial name | status | lr |",
    "  NUM_EPOCHS  0", "  NUM_SAMPLES  0", "12:00:00 head h | ended with exit status 143",
]  # fmt: skip
inserted = st.one_of(st.text(max_size=40), st.text("+-| \n=:.0123456789", max_size=40), st.sampled_from(lines))
change = st.one_of(
    st.tuples(st.just("delete"), st.integers(0, 199), st.integers(1, 40)),
    st.tuples(st.just("repeat"), st.integers(0, 199), st.integers(1, 40)),
    st.tuples(st.just("cut line"), st.integers(0, 199), st.integers(0, 120)),
    st.tuples(st.just("cut log"), st.integers(0, 199), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 199), st.integers(0, 199)),
    st.tuples(st.just("insert"), st.integers(0, 199), inserted),
    st.tuples(st.just("in line"), st.integers(0, 199), inserted),
)


def mutated(lines, changes):
    lines = list(lines)
    for what, at, more in changes:
        at = at % len(lines) if lines else 0
        if what == "delete":
            del lines[at : at + more]
        elif what == "repeat":
            lines[at:at] = lines[at : at + more]
        elif what == "insert":
            lines.insert(at, more)
        elif what == "cut log":
            del lines[at:]
        elif lines and what == "cut line":
            lines[at] = lines[at][:more]
        elif lines and what == "in line":
            middle = len(lines[at]) // 2
            lines[at] = lines[at][:middle] + more + lines[at][middle:]
        elif lines:
            lines.insert(more % len(lines), lines.pop(at))
    return lines


@settings(max_examples=300, **fast)
@given(changes=st.lists(change, min_size=1, max_size=6))
def test_a_log_with_any_damage_is_read_or_refused(folder, changes):
    log = folder / "log.out"
    log.write_text("\n".join(mutated(LOG, changes)), encoding="utf-8", errors="surrogatepass")
    try:
        run = read_run.parse(log)
    except read_run.NotALog as error:
        assert one_line(str(error)) and str(error).startswith(f"{log}: ")
        return
    assert "### Table 2" in fill_tables.markdown(fill_tables.sections(run))
    json.dumps(fill_tables.as_json(run), allow_nan=False)
