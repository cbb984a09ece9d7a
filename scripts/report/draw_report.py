"""Pictures (PNG, matplotlib) and report.html (plotly) of a run. Used by fill_tables.py --plots."""

import base64
import html
import math

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


# ---- Pictures: for paper of A4 width, at least 8 pt, told apart without colour -----------------------------
def set_look():
    """matplotlib without a screen, in the look of all pictures."""
    plt.switch_backend("Agg")
    plt.rcdefaults()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "legend.frameon": False, "figure.constrained_layout.use": True})


def pictures(run, folder):
    """Writes loss.png and slots.png; one without data says so. -> [(path, caption)]"""
    set_look()
    captions = {
        draw_loss: "Loss against epoch, one line a trial. A cross marks the rung at which ASHA stopped it.",
        draw_slots: "Trials on slots over time. Numbers are Combo IDs; white is idle.",
    }
    made = []
    for draw, caption in captions.items():
        figure, axes = plt.subplots(figsize=(7, 4))  # inches: the text width of A4
        if draw(run, axes):
            figure.legend(loc="outside upper left", ncols=4)
        else:
            figure.set_figheight(1)
            axes.set_axis_off()
            axes.text(0.5, 0.5, "nothing to show yet", ha="center")
        path = folder / f"{draw.__name__.removeprefix('draw_')}.png"
        figure.savefig(path)
        plt.close(figure)
        made.append((path, caption))
    return made


def log_axis(axis, losses, label):
    """The axis of losses; logarithmic, with plain numbers at 1, 2, 5, 10, ..., if they span a factor of 8."""
    axis.set_label_text(label)
    if min(losses) > 0 and max(losses) > 8 * min(losses):
        axis.set_label_text(f"{label}, log scale")
        axis.axes.set_yscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def draw_loss(run, axes):
    """Picture (a). -> is there anything to draw?"""
    trials = [trial for trial in run.trials.values() if trial.finite()]
    if not trials:
        return False
    best, few, used, ends = run.best and run.best["trial"], len(trials) <= 40, set(), []
    marks = {"finished": ("o", "ran all epochs"), "stopped by ASHA": ("X", "stopped by ASHA"),
             "diverged": ("^", "diverged"), "FAILED": ("v", "FAILED")}
    log_axis(axes.yaxis, [report.loss for t in trials for report in t.finite()], "Eval Loss")
    max_t = run.max_t()
    for rung in [2**k for k in range(20) if 2**k < max_t and not run.manual]:
        axes.axvline(rung, color="0.7", linewidth=0.8, linestyle=":",
                     label="rung of ASHA" if rung == 1 else None)
    for t in sorted(trials, key=lambda trial: trial is best):
        points = sorted((report.epoch, report.loss) for report in t.finite())
        mark, label = marks.get(t.status, ("s", "running, or cut off"))
        look = {"color": "black", "linewidth": 2.4, "label": f"best: combo {t.id}"} if t is best else {
            "color": "0.55", "linewidth": 1 if few else 0.4}
        axes.plot(*zip(*points), **look)
        axes.plot(*points[-1], mark, color="black" if t is best else "0.35", markeredgecolor="white",
                  markeredgewidth=0.5, markersize=6 if few else 3, label=None if label in used else label)
        used.add(label)
        ends.append((*points[-1], t.id, "bold" if t is best else "normal"))
    axes.set_xlabel("epoch")
    axes.set_xticks(range(1, max_t + 1) if max_t <= 20 else [2**k for k in range(20) if 2**k <= max_t])
    axes.set_xlim(min(0.9, *axes.get_xlim()), max_t + 0.04 * max_t + 0.15)
    axes.margins(y=0.08)
    if few:
        name_ends(axes, ends)
    return True


def name_ends(axes, ends):
    """Combo IDs at the ends of lines, pushed apart where they would overlap. ends: (x, y, text, weight)"""
    axes.figure.draw_without_rendering()  # so that heights on paper are known
    points = 72 / axes.figure.dpi
    for x in {end[0] for end in ends}:
        column = sorted(end for end in ends if end[0] == x)
        true = [axes.transData.transform(end[:2])[1] * points for end in column]
        place = list(true)
        for _ in range(200):  # neighbours nearer than a line's height push each other away
            for i in range(len(place) - 1):
                push = max(0, 9.5 - place[i + 1] + place[i]) / 2
                place[i], place[i + 1] = place[i] - push, place[i + 1] + push
        for (_, y, text, weight), old, new in zip(column, true, place):
            line = None
            if abs(new - old) > 2:
                line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
            axes.annotate(text, (x, y), xytext=(13 if line else 7, new - old), textcoords="offset points",
                          va="center", fontsize=8, weight=weight, arrowprops=line)


def on_slots(run):
    """Bars (row, trial, from, to), and places (row, from, to): a slot of a worker as long as it was there. In s.

    The record does not say on which slot a trial ran: each takes the first that is free.
    """
    taken, places, bars = [], [], []  # taken: until when each row is some worker's
    for worker in sorted(run.workers.values(), key=lambda worker: worker.since):
        for _ in range(worker.slots):
            row = next((row for row, until in enumerate(taken) if until <= worker.since), len(taken))
            taken[row : row + 1] = [worker.until]
            places.append((row, worker.since, worker.until))
    free = [since for _, since, _ in places]
    spans = [(*span, trial) for trial in run.trials.values() for span in trial.spans]
    for start, end, trial in sorted(spans, key=lambda span: span[0]):
        # half a second: a trial's start may be recorded before the end of the one whose place it takes
        i = next((i for i, (_, _, until) in enumerate(places) if free[i] <= start + 0.5 and start < until), len(places))
        if i == len(places):  # the record knows of no such place
            places.append((1 + max((row for row, *_ in places), default=-1), start, end))
            free.append(start)
        free[i] = end
        bars.append((places[i][0], trial, start, end))
    return bars, places


def draw_slots(run, axes):
    """Picture (b). -> is there anything to draw?"""
    bars, places = on_slots(run)
    if not bars:
        return False
    best, few, used = run.best and run.best["trial"], len(bars) <= 60, set()
    rows = 1 + max(row for row, *_ in places)
    looks = {"finished": ("0.6", ""), "stopped by ASHA": ("0.88", ""),
             "diverged": ("white", "...."), "FAILED": ("white", "xxxx")}
    axes.figure.set_figheight(min(9, 1.5 + 0.4 * rows))
    for row, since, until in places:
        axes.barh(row, (until - since) / 60, left=since / 60, color="white", edgecolor="0.5",
                  linewidth=0.6, linestyle=":")
    for row, trial, start, end in bars:
        label = "best" if trial is best else trial.status if trial.status in looks else "running, or cut off"
        colour, hatch = {**looks, "best": ("0.1", "")}.get(label, ("0.75", "////"))
        axes.barh(row, (end - start) / 60, left=start / 60, color=colour, hatch=hatch, edgecolor="black",
                  linewidth=0.6 if few else 0.2, label=None if label in used else label)
        used.add(label)
        if few and end - start > run.now * 0.014 * len(trial.id):
            axes.text((start + end) / 120, row, trial.id, ha="center", va="center", fontsize=8,
                      color="white" if trial is best else "black",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None)
    axes.set_xlim(0, max(run.now, 1) / 60)
    axes.set_ylim(rows - 0.4, -0.6)
    step = 1 + rows // 20
    axes.set_yticks(range(0, rows, step), range(1, rows + 1, step))
    axes.set_ylabel("slot")
    axes.set_xlabel(f"minutes from START to {'FINISH' if run.finished else 'now'}")
    return True


# ---- report.html -------------------------------------------------------------------------------------------
def first_losses(run):
    """(epoch, {trial: loss}): the losses at the first epoch, which all trials have trained; diverged, the worst."""
    trials = [trial for trial in run.trials.values() if trial.reports and trial.status != "FAILED"]
    reports = {trial.name: trial.reports[min(trial.reports)] for trial in trials}
    first = min((r.epoch for r in reports.values()), default=1)
    losses = {name: r.loss for name, r in reports.items() if r.epoch == first or not math.isfinite(r.loss)}
    worst = max(filter(math.isfinite, losses.values()), default=0)
    return first, {name: loss if math.isfinite(loss) else worst for name, loss in losses.items()}


def charts(run):
    """Optuna's charts as HTML, with hover and zoom (plotly, its JavaScript inside)."""
    import as_study
    from optuna import visualization

    lowest, name = as_study.compared(run, lambda trial: trial.best()), "Lowest Eval Loss"
    epoch, first = first_losses(run)
    at_first = as_study.compared(run, lambda trial: first.get(trial.name))
    made = []
    if lowest.trials and lowest.trials[0].params:
        made += [("Each hyperparameter against the loss", visualization.plot_slice(lowest, target_name=name), ""),
                 ("Parallel coordinates", visualization.plot_parallel_coordinate(lowest, target_name=name), "")]
    if len(at_first.trials) >= 5 and len(set(first.values())) > 1:
        n = len(at_first.trials)
        weak = f"{n} trials are weak evidence: another draw can turn the order round. " if n < 50 else ""
        made.append(("Which hyperparameter mattered", visualization.plot_param_importances(at_first), (
            f"Optuna's importance (PED-ANOVA): do the better trials have other values than all of them? {n} trials, "
            f"compared at epoch {epoch:g}, which all have trained. {weak}A small share means: not shown to matter, "
            "which is not the same as does not matter. And what matters at an early epoch need not at the last.")))
    parts, script = [], True
    for title, figure, words in made:
        figure.update_layout(title=None, height=420, margin={"l": 70, "r": 20, "t": 40, "b": 40})
        chart = figure.to_html(full_html=False, include_plotlyjs=script, config={"displayModeBar": False})
        parts += [f"<h2>{title}</h2><div class=chart>{chart}</div>", f"<p>{words}</p>" if words else ""]
        script = False
    return "\n".join(parts) or "<p>No trial has reported a loss.</p>"


REPORT_STYLE = """
body{font:16px/1.45 sans-serif;max-width:1160px;margin:2em auto;padding:0 1em;color:#111;background:#fff}
table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #999;padding:.25em .7em;text-align:left}
th{background:#eee}td{font-variant-numeric:tabular-nums;overflow-wrap:break-word;max-width:22em}
figure{margin:1.2em 0}figure img{width:100%;max-width:900px}.wide{overflow-x:auto}
@media print{body{font-size:10pt;max-width:none;margin:0}h2{break-after:avoid}
figure,tr,.chart{break-inside:avoid}.chart{zoom:.7}}"""


def table(header, rows):
    """A table as HTML."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows)
    rest = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rest}</tbody></table></div>"


def body(run, images):
    """What report.html shows below the tables, as HTML: pictures and charts."""
    parts = ["<h2>Pictures</h2>"]
    for path, caption in images:
        data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
        parts.append(f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
                     f"<figcaption>{text}</figcaption></figure>")
    return "\n".join([*parts, charts(run)])


def page(run, tables, body):
    """report.html as text. The browser refuses any request that a page with this policy makes."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    title, top = f"Search {html.escape(run.job)}", []
    reload = "" if run.finished else '<meta http-equiv="refresh" content="60">'
    for name, header, rows, below in tables:
        top += [f"<h2>{html.escape(name)}</h2>", table(header, rows) if header else ""]
        top += [f"<p>{html.escape(line)}</p>" for line in below]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'{reload}<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{REPORT_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "\n".join(top) + f"\n{body}\n</body></html>\n")
