"""Pictures (PNG, matplotlib) and report.html (plotly) of a run, or one of several. Used by fill_tables.py --plots."""

import base64
import html
import math

import as_study
import matplotlib.pyplot as plt
from compare_runs import holdings, lowest_so_far, minutes, title, trials_at_once
from matplotlib.ticker import LogLocator
from optuna import visualization

# ---- Pictures: for paper of A4 width, at least 8 pt, told apart without colour -----------------------------
plt.switch_backend("Agg")  # without a screen
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "savefig.dpi": 200, "legend.frameon": False, "figure.constrained_layout.use": True})


def log_axis(axis, losses, label):
    """The axis of losses; logarithmic, with plain numbers at 1, 2, 5, 10, ..., if they span a factor of 8."""
    axis.set_label_text(label)
    if min(losses) > 0 and max(losses) > 8 * min(losses):
        axis.set_label_text(f"{label}, log scale")
        axis.axes.set_yscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def draw_loss(run, axes, trials):
    best, few, max_t, ends, above = run.best and run.best["trial"], len(trials) <= 40, run.max_t, [], {}
    marks = {"finished": ("o", "ran all epochs"), "stopped by ASHA": ("X", "stopped by ASHA"),
             "diverged": ("^", "diverged"), "FAILED": ("v", "FAILED")}
    log_axis(axes.yaxis, [report.loss for t in trials for report in t.finite()], "Eval Loss")
    powers = [2**k for k in range(20) if 2**k <= max_t]
    for rung in [power for power in powers if power < max_t and not run.manual]:
        axes.axvline(rung, color="0.7", linewidth=0.8, linestyle=":", label="rung of ASHA")
    for t in sorted(trials, key=lambda trial: trial is best):
        points = sorted((report.epoch, report.loss) for report in t.finite())
        mark, label = marks.get(t.status, ("s", "running, or cut off"))
        look = {"color": "black", "linewidth": 2.4, "label": f"best: combo {t.id}"} if t is best else {
            "color": "0.55", "linewidth": 1 if few else 0.4}
        axes.plot(*zip(*points), **look)
        axes.plot(*points[-1], mark, color="black" if t is best else "0.35", markeredgecolor="white",
                  markeredgewidth=0.5, markersize=6 if few else 3, label=label)
        ends.append((*points[-1], t.id, "bold" if t is best else "normal"))
    axes.margins(y=0.08)
    axes.set(xlabel="epoch", xlim=(min(0.9, *axes.get_xlim()), max_t + 0.04 * max_t + 0.15),
             xticks=range(1, max_t + 1) if max_t <= 20 else powers)  # fmt: skip
    axes.figure.draw_without_rendering()  # so that heights on paper are known
    for x, y, text, weight in sorted(ends) if few else ():  # each at least a line above the one below it
        height = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        above[x] = max(height, above.get(x, -math.inf) + 9)
        axes.annotate(text, (x, y), xytext=(10, above[x] - height), textcoords="offset points", va="center",
                      fontsize=8, weight=weight, arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5})


def on_slots(run):
    """[(row, trial, from, to)], in s: each trial on the first slot that is free; the record does not say on which."""
    free, bars = [], []
    spans = [(*span, trial) for trial in run.trials.values() for span in trial.spans]
    for start, end, trial in sorted(spans, key=lambda span: span[0]):
        # half a second: a trial's start may be recorded before the end of the one whose place it takes
        row = next((row for row, until in enumerate(free) if until <= start + 0.5), len(free))
        free[row : row + 1] = [end]
        bars.append((row + 1, trial, start, end))
    return bars


def draw_slots(run, axes, bars):
    best, few = run.best and run.best["trial"], len(bars) <= 60
    rows = max(trials_at_once(run), *(row for row, *_ in bars))
    looks = {"finished": ("0.6", ""), "stopped by ASHA": ("0.88", ""), "best": ("0.1", ""),
             "diverged": ("white", "...."), "FAILED": ("white", "xxxx")}
    axes.figure.set_figheight(min(9, 1.5 + 0.4 * rows))
    for row, trial, start, end in bars:
        label = "best" if trial is best else trial.status if trial.status in looks else "running, or cut off"
        colour, hatch = looks.get(label, ("0.75", "////"))
        axes.barh(row, (end - start) / 60, left=start / 60, color=colour, hatch=hatch, edgecolor="black",
                  linewidth=0.6 if few else 0.2, label=label)
        if few and end - start > run.now * 0.014 * len(trial.id):
            axes.text((start + end) / 120, row, trial.id, ha="center", va="center", fontsize=8,
                      color="white" if trial is best else "black",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None)
    axes.set(xlim=(0, max(run.now, 1) / 60), xlabel=f"minutes from START to {'FINISH' if run.finished else 'now'}",
             ylim=(rows + 0.6, 0.4), ylabel="slot", yticks=range(1, rows + 1, 1 + rows // 20))  # fmt: skip


def compare(runs, path):
    """Best loss so far against time and against cost, all runs in both panels."""
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(7, 3.2 + 0.17 * len(runs)))  # inches: A4's text width
    losses = []
    for number, run in enumerate(runs):
        (_, held), lowest = holdings(run), lowest_so_far(run)
        if not lowest:
            continue  # its label would have no line; the table tells that it has no loss
        seconds, y = zip(*lowest, (max(run.now, lowest[-1][0]), lowest[-1][1]))
        look = {"drawstyle": "steps-post", "linestyle": ("-", "--", ":", "-.")[number % 4],
                "marker": "os^Dv*X"[number % 7], "markevery": range(len(lowest))}  # none at the run's end: no report
        losses += y
        panels[0].plot([s / 60 for s in seconds], y, **look, label=f"{title(run)}: {y[-1]:.4g}")
        panels[1].plot([minutes(held, s) for s in seconds], y, **look)
    panels[0].set(xlabel="minutes from START", xlim=0)
    panels[1].set(xlabel="GPU-minutes (on CPUs: slot-minutes)", xlim=0)
    if losses:
        log_axis(panels[0].yaxis, losses, "lowest eval loss so far")
        figure.legend(loc="outside upper left", handlelength=4)
    figure.savefig(path)
    plt.close(figure)


# ---- report.html -------------------------------------------------------------------------------------------
REPORT_STYLE = """
body{font:16px/1.45 sans-serif;max-width:1160px;margin:2em auto;padding:0 1em;color:#111;background:#fff}
table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #999;padding:.25em .7em;text-align:left}
th{background:#eee}td{font-variant-numeric:tabular-nums;overflow-wrap:break-word;max-width:22em}
figure{margin:1.2em 0}figure img{width:100%;max-width:900px}.wide{overflow-x:auto}"""


def body(run, folder):
    """Writes loss.png and slots.png, each if there is something to show. -> what report.html shows below the tables"""
    parts = ["<h2>Pictures</h2>"]
    pictures = {
        "loss.png": (draw_loss, [trial for trial in run.trials.values() if trial.finite()],
                     "Loss against epoch, one line a trial. A cross marks the rung at which ASHA stopped it."),
        "slots.png": (draw_slots, on_slots(run),
                      "Trials on slots over time. Numbers are Combo IDs; white is idle."),
    }
    for name, (draw, data, caption) in pictures.items():
        if data:
            figure, axes = plt.subplots(figsize=(7, 4))  # inches: the text width of A4
            draw(run, axes, data)
            handles = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each label once
            figure.legend(handles.values(), handles, loc="outside upper left", ncols=4)
            figure.savefig(folder / name)
            plt.close(figure)
            image = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{image}">'
                         f"<figcaption>{caption}</figcaption></figure>")
    study = as_study.compared(run)
    if study.trials and study.trials[0].params:
        chart = visualization.plot_slice(study, target_name="Lowest Eval Loss")
        chart.update_layout(title=None, height=420, margin={"l": 70, "r": 20, "t": 40, "b": 40})
        page = chart.to_html(full_html=False, config={"displayModeBar": False})
        parts.append(f"<h2>Each hyperparameter against the loss</h2>{page}")
    return "\n".join(parts)


def page(run, tables, body):
    """report.html as text. The browser refuses any request that a page with this policy makes."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    title, top = f"Search {html.escape(run.job)}", []
    reload = "" if run.finished else '<meta http-equiv="refresh" content="60">'
    for name, header, rows, below in tables:
        cells = "".join("<tr>" + "".join(f"<{tag}>{html.escape(text)}" for text in row)
                        for tag, row in [("th", header), *(("td", row) for row in rows)])
        top += [f"<h2>{html.escape(name)}</h2>", f"<div class=wide><table>{cells}</table></div>" if header else ""]
        top += [f"<p>{html.escape(line)}</p>" for line in below]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'{reload}<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{REPORT_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "\n".join(top) + f"\n{body}\n</body></html>\n")
