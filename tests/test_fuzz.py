"""Whatever a user types or a file holds, the readers of input give a result or one line of error, never a trace."""

import json
import string

import as_study
import compare_runs
import draw_report
import fill_tables
import read_log
from conftest import REPO, load_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fast = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
capacity = load_module(REPO / "scripts/job/worker_capacity.py")


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
    assert s.CPUS_PER_WORKER >= 1 and 0 <= s.GPUS_PER_WORKER <= 1 and 0 <= s.SEED < 2**31
    assert one_line(s.MODEL_NAME) and one_line(s.SQUAD_DATA)


# ---- Capacity --------------------------------------------------------------------------------------------------------
@settings(max_examples=300, **fast)
@given(W=st.integers(1, 1024), Cw=st.integers(1, 1024), Gw=st.integers(0, 4), Csys=st.integers(0, 64),
       Cnode=st.integers(1, 4096), Gnode=st.integers(0, 64))  # fmt: skip
def test_trials_at_once_is_the_largest_number_that_fits(W, Cw, Gw, Csys, Cnode, Gnode):
    def fits(t):
        return Csys + t * W * Cw <= Cnode and t * W * Gw <= Gnode

    T = capacity.trials_at_once(W, Cw, Gw, Csys, Cnode, Gnode)
    assert T >= 0 and (fits(T) or T == 0) and not fits(T + 1)


# ---- Records and logs ------------------------------------------------------------------------------------------------
RECORD, LOG = ((REPO / "tests/logs" / name).read_text().splitlines() for name in ("events.jsonl", "complete.out"))
odd_text = st.text(max_size=5) | st.just("\ud800\x1b[1m")
values = st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.floats(), odd_text,
                   st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.floats(), max_size=2))


@st.composite
def damaged(draw, lines):
    """Lines some of which are cut, repeated, moved, gone, or have another value where a record has a field."""
    lines = list(lines)
    for _ in range(draw(st.integers(1, 6))):
        at, how = draw(st.integers(0, len(lines) - 1)), draw(st.sampled_from(["cut", "gone", "again", "text", "field"]))
        line = lines.pop(at)
        if how == "field" and line in RECORD:
            event = json.loads(line)
            lines.insert(at, json.dumps(event | {draw(st.sampled_from(sorted(event))): draw(values)}))
        elif how == "text":
            lines.insert(at, draw(st.text(max_size=40) | st.text("+-| \n=:.0123456789", max_size=40)))
        elif how != "gone":
            lines.insert(at, line[: draw(st.integers(0, len(line)))] if how == "cut" else line)
            lines.insert(draw(st.integers(0, len(lines))), line)
    return lines + ["{half"]


@settings(max_examples=300, **fast)
@given(lines=st.one_of(damaged(RECORD), damaged(LOG)))
def test_a_record_or_log_with_any_damage_is_read_or_refused_in_one_line(tmp_path_factory, lines):
    source = tmp_path_factory.getbasetemp() / "damaged"
    source.mkdir(exist_ok=True)
    (source / "events.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    for path in (source, source / "events.jsonl"):  # as a record, and as a log
        try:
            run = read_log.parse(path)
        except read_log.NotALog as error:
            assert one_line(str(error)) and str(error).startswith(f"{path}: ")
            continue
        fill_tables.markdown(fill_tables.sections(run)).encode()
        str([*fill_tables.trial_rows([run]), *fill_tables.run_rows([run])]).encode()
        compare_runs.comparison([run, run])
        draw_report.on_slots(run)
        as_study.compared(run)
