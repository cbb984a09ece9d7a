"""Pictures (PNG, matplotlib) and report.html (plotly) of a run. Used by fill_tables.py --plots."""

import base64
import html
import math
from statistics import median

from read_run import TITLES, finite_or_none, further_names, number_or, show


# ============================================================================================================
# Pictures: for paper of A4 width, at least 8 pt, told apart without colour
# ============================================================================================================
def best_losses(run):
    """[(trial, lowest loss)] of the trials that have one."""
    return [(trial, trial.best()) for trial in run.trials.values() if trial.finite()]


def pictures(run, folder):
    """Writes loss.png, slots.png and learning_rate.png; one without data says so. -> [(path, caption)]"""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "legend.frameon": False, "figure.constrained_layout.use": True})
    captions = {
        draw_loss: "Loss against epoch, one line a trial. A cross marks the rung at which ASHA stopped it.",
        draw_slots: "Trials on slots over time. Numbers are Combo IDs; white is idle.",
        draw_learning_rate: "Learning rate against the lowest loss of each trial. Numbers are Combo IDs.",
    }
    made = []
    for draw, caption in captions.items():
        figure, axes = plt.subplots(figsize=(7, 4))  # inches: the text width of A4
        if draw(run, axes):
            figure.legend(loc="outside upper left", ncols=2 if draw is draw_learning_rate else 4)
        else:
            figure.set_figheight(1)
            axes.set_axis_off()
            axes.text(0.5, 0.5, "nothing to show yet: the log does not have these values", ha="center")
        path = folder / f"{draw.__name__.removeprefix('draw_')}.png"
        figure.savefig(path)
        plt.close(figure)
        made.append((path, caption))
    return made


def loss_axis(axes, losses):
    """The loss upwards; logarithmic if the values span a factor of 8."""
    axes.set_ylabel("Eval Loss")
    if min(losses) > 0 and max(losses) > 8 * min(losses):
        log_axis(axes.yaxis, "Eval Loss, log scale")


def log_axis(axis, label):
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_label_text(label)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_loss(run, axes):
    """Picture (a). -> is there anything to draw?"""
    trials = best_losses(run)
    if not trials:
        return False
    best, few, used, ends = run.best and run.best.get("trial"), len(trials) <= 40, set(), []
    marks = {"finished": ("o", "ran all epochs"), "stopped by ASHA": ("X", "stopped by ASHA"),
             "diverged": ("^", "diverged"), "FAILED": ("v", "FAILED")}
    loss_axis(axes, [loss for t, _ in trials for loss, _ in t.finite()])
    max_t = run.number("NUM_EPOCHS", max(t.epochs for t, _ in trials))
    for rung in [2**k for k in range(20) if 2**k < max_t and not run.manual]:
        axes.axvline(rung, color="0.7", linewidth=0.8, linestyle=":",
                     label="rung of ASHA" if rung == 1 else None)
    for t, _ in sorted(trials, key=lambda pair: pair[0] is best):
        points = sorted((epoch, loss) for loss, epoch in t.finite())
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
    """Bars (slot, trial, start, end), and the second from which on each slot is there; times in s from START.

    The log does not say on which slot a trial ran: each takes the first that is free.
    """
    since = [joined for joined, _, slots, _ in run.nodes for _ in range(slots)]
    since = since or [run.cluster_at] * int(run.slots or 0)
    free, bars = list(since), []
    timed = [(t.start, run.now if t.end is None else t.end, t)
             for t in run.trials.values() if t.start is not None]
    for start, end, trial in sorted(timed, key=lambda bar: bar[0]):
        # the clock has whole seconds
        slot = next((i for i, moment in enumerate(free) if moment <= start + 1.5), len(free))
        if slot == len(free):
            free.append(0)
            since.append(start)
        free[slot] = end
        bars.append((slot, trial, start, end))
    return bars, since


def draw_slots(run, axes):
    """Picture (b). -> is there anything to draw?"""
    bars, since = on_slots(run)
    if not bars:
        return False
    best, few, used = run.best and run.best.get("trial"), len(bars) <= 60, set()
    looks = {"finished": ("0.6", ""), "stopped by ASHA": ("0.88", ""),
             "diverged": ("white", "...."), "FAILED": ("white", "xxxx")}
    axes.figure.set_figheight(min(9, 1.5 + 0.4 * len(since)))
    for slot, moment in enumerate(since):
        axes.barh(slot, (run.now - moment) / 60, left=moment / 60, color="white", edgecolor="0.5",
                  linewidth=0.6, linestyle=":")
    for slot, trial, start, end in bars:
        label = "best" if trial is best else trial.status if trial.status in looks else "running, or cut off"
        colour, hatch = {**looks, "best": ("0.1", "")}.get(label, ("0.75", "////"))
        axes.barh(slot, (end - start) / 60, left=start / 60, color=colour, hatch=hatch, edgecolor="black",
                  linewidth=0.6 if few else 0.2, label=None if label in used else label)
        used.add(label)
        if few and end - start > run.now * 0.014 * len(trial.id):
            axes.text((start + end) / 120, slot, trial.id, ha="center", va="center", fontsize=8,
                      color="white" if trial is best else "black",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch else None)
    axes.set_xlim(0, max(run.now, 1) / 60)
    axes.set_ylim(len(since) - 0.4, -0.6)
    step = 1 + len(since) // 20
    axes.set_yticks(range(0, len(since), step), range(1, len(since) + 1, step))
    axes.set_ylabel("slot")
    axes.set_xlabel(f"minutes from START to {'FINISH' if run.finish else 'the last line of the log'}")
    return True


def classes(values, most):
    """Sorts values into at most `most` classes -> (class of each value, name of each class)."""
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    if len(distinct) <= most:
        return [distinct.index(v) for v in values], [show(v) for v in distinct]
    middle = len(distinct) // 2
    name = show(distinct[middle])
    return [int(distinct.index(v) >= middle) for v in values], [f"below {name}", f"from {name}"]


def draw_learning_rate(run, axes):
    """Picture (c). -> is there anything to draw?"""
    points = [(t, loss) for t, loss in best_losses(run) if number_or(t.params.get("lr")) is not None]
    if not points:
        return False
    loss_axis(axes, [loss for _, loss in points])
    axes.set_xlabel(TITLES["lr"])
    if min(t.params["lr"] for t, _ in points) > 0:
        log_axis(axes.xaxis, f"{TITLES['lr']}, log scale")
    shape, shapes = classes([number_or(t.params.get("per_device_bs"), "-") for t, _ in points], 6)
    fill, fills = classes([number_or(t.params.get("wd"), "-") for t, _ in points], 3)
    few, best = len(points) <= 60, run.best and run.best.get("trial")
    for i, j in sorted(set(zip(shape, fill))):
        here = [point for point, *ij in zip(points, shape, fill) if ij == [i, j]]
        axes.plot([t.params["lr"] for t, _ in here], [loss for _, loss in here], "os^Dv*"[i],
                  fillstyle=("none", "full", "left")[j], color="black",
                  markerfacecoloralt="white", markersize=8 if few else 4,
                  label=f"bs {shapes[i]}, wd {fills[j]}")
        for t, loss in here if few else []:
            axes.annotate(t.id + (" (best)" if t is best else ""), (t.params["lr"], loss), xytext=(6, 4),
                          textcoords="offset points", fontsize=8)
    return True


# ============================================================================================================
# report.html
# ============================================================================================================
def share_explained(losses, group):
    """The share of the variance of the losses' ranks between the groups, and how often chance gives as much.

    losses: [n], equal ones share a rank. group: [n] of 0, 1, ... -> (share, p). (n - 1) * share is H of the
    Kruskal-Wallis test, but p is counted in 2,000 shuffles: the usual formula holds for many trials only.
    """
    import numpy

    _, place, number = numpy.unique(losses, return_inverse=True, return_counts=True)
    ranks = (numpy.cumsum(number) - number / 2)[place]
    ranks -= ranks.mean()

    def share(ranks):
        return float((numpy.bincount(group, ranks) ** 2 / numpy.bincount(group)).sum() / (ranks**2).sum())

    found, chance = share(ranks), numpy.random.default_rng(0)
    as_much = sum(share(chance.permutation(ranks)) >= found - 1e-9 for _ in range(2000))  # but for rounding
    return found, (1 + as_much) / 2001  # what was found is one of the possible orders, too


def what_mattered(run):
    """Do trials with different values of a hyperparameter differ in loss? -> (rows, number of trials, epoch)

    All trials are compared at the first epoch, which all have trained. A row for each hyperparameter: name,
    groups [(values, number of trials, median loss)], the share explained, the share that chance gives on
    average, and p (see share_explained). A group is one value, or a third of the trials sorted by a
    hyperparameter with many values, so that a best value in the middle shows too. A diverged trial counts as
    the worst. Needs 5 trials.
    """
    first = [(t, min(t.reports)) for t in run.trials.values() if t.reports and t.status != "FAILED"]
    epoch = min((epoch for _, (epoch, _) in first), default=1)
    first = [(t, loss if math.isfinite(loss) else math.inf)
             for t, (e, loss) in first if e == epoch or not math.isfinite(loss)]
    n, rows = len(first), []
    if n < 5 or len({loss for _, loss in first}) < 2:
        return rows, n, epoch
    for name in [*TITLES, *further_names([run])]:
        if not any(name in t.params for t, _ in first):
            continue
        numeric = all(finite_or_none(t.params.get(name)) is not None for t, _ in first)
        pairs = [(t.params[name] if numeric else show(t.params.get(name)), loss) for t, loss in first]
        distinct = sorted({value for value, _ in pairs})
        if numeric and len(distinct) > 4:
            # the smallest value of the middle third and of the upper one
            cuts = [distinct[len(distinct) * third // 3] for third in (1, 2)]
            group = [sum(value >= cut for cut in cuts) for value, _ in pairs]
        else:
            group = [distinct.index(value) for value, _ in pairs]
        members = [[pair for pair, g in zip(pairs, group) if g == wanted] for wanted in range(max(group) + 1)]
        if not 2 <= len(members) <= n / 2:
            continue
        share, p = share_explained([loss for _, loss in pairs], group)
        summary = []
        for pairs in members:
            ends = (f"{v:.3g}" if isinstance(v, float) else show(v) for v in (min(pairs)[0], max(pairs)[0]))
            summary.append((" .. ".join(dict.fromkeys(ends)), len(pairs), median(loss for _, loss in pairs)))
        rows.append((name, summary, share, (len(members) - 1) / (n - 1), p))
    return sorted(rows, key=lambda row: row[-1]), n, epoch


def parallel_coordinates(run):
    """A chart of all trials with a loss as HTML (plotly, its JavaScript inside), or "" if there is none.

    Drawn as lines in SVG: unlike plotly's Parcoords, that needs no WebGL, shows values on hover and prints.
    """
    import plotly.graph_objects as go

    trials = best_losses(run)
    names = [name for name in [*TITLES, *further_names([run])] if any(name in t.params for t, _ in trials)]
    if not trials:
        return ""
    columns = {TITLES.get(name, name): [t.params.get(name) for t, _ in trials] for name in names}
    columns |= {"Epochs": [t.epochs for t, _ in trials], "Lowest Eval Loss": [loss for _, loss in trials]}
    figure, heights = go.Figure(), []
    for place, (name, values) in enumerate(columns.items()):
        numeric = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        distinct = sorted(set(values if numeric else map(str, values)))
        if numeric and len(distinct) > 6:
            log = min(values) > 0 and max(values) > 8 * min(values)
            scale = math.log10 if log else float
            low, high = scale(min(values)), scale(max(values))
            height = [(scale(v) - low) / (high - low) for v in values]
            marks = [low + (high - low) * i / 4 for i in range(5)]
            if log:
                decades = range(math.floor(low), math.ceil(high))
                marks = [float(f"{m}e{k}") for k in decades for m in (1, 2, 5)]
            ticks = [((scale(v) - low) / (high - low), f"{v:.3g}") for v in marks if low <= scale(v) <= high]
            name += ", log" if log else ""
        else:  # few values: lines are spread a little around each
            step = max(1, len(distinct) - 1)
            index = [distinct.index(v if numeric else str(v)) for v in values]
            spread = 0.16 / max(1, len(values) - 1) if len(distinct) > 1 else 0
            height = [(i + spread * (k - (len(values) - 1) / 2)) / step for k, i in enumerate(index)]
            ticks = [(i / step, show(v)[:24]) for i, v in enumerate(distinct)][:: max(1, len(distinct) // 12)]
        heights.append(height)
        figure.add_shape(type="line", x0=place, x1=place, y0=-0.08, y1=1.08,
                         line={"color": "#888", "width": 1})
        for y, text in ticks:
            figure.add_annotation(x=place, y=y, text=html.escape(text), showarrow=False, xanchor="right",
                                  xshift=-9, bgcolor="white", font={"size": 12})
        figure.add_annotation(x=place, y=1.17, text=f"<b>{html.escape(name)}</b>", showarrow=False)
    best = run.best and run.best.get("trial")
    groups = {"stopped by ASHA": ("#999", 1.5, "dash"), "diverged": ("#c60", 1.5, "dot"),
              "FAILED": ("#c60", 1.5, "dashdot"), "other": ("#777", 1.5, "longdash"),
              "finished": ("#05a", 2, "solid"), "best": ("#000", 4, "solid")}
    for group, (colour, width, dash) in groups.items():
        x, y, text = [], [], []
        for k, (t, _) in enumerate(trials):
            if group != ("best" if t is best else t.status if t.status in groups else "other"):
                continue
            words = [f"{name}: {show(values[k])}" for name, values in columns.items()]
            words.insert(0, f"combo {t.id}: {t.status}")
            x += [*range(len(columns)), None]
            y += [*(height[k] for height in heights), None]
            text += ["<br>".join(map(html.escape, words))] * len(columns) + [""]
        if x:
            figure.add_trace(go.Scatter(x=x, y=y, text=text, hoverinfo="text", mode="lines+markers",
                                        name=group, marker={"size": 5},
                                        line={"color": colour, "width": width, "dash": dash}))
    figure.update_layout(template="none", height=430, margin={"l": 70, "r": 20, "t": 20, "b": 20},
                         legend={"orientation": "h", "y": -0.05}, showlegend=True,
                         font={"family": "sans-serif", "size": 13}, hovermode="closest", dragmode=False)
    figure.update_xaxes(visible=False, range=[-0.45, len(columns) - 0.7], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.1, 1.24], fixedrange=True)
    return figure.to_html(full_html=False, include_plotlyjs=True, div_id="parallel",
                          config={"displayModeBar": False, "responsive": True})


REPORT_STYLE = """
body{font:16px/1.45 sans-serif;max-width:1160px;margin:2em auto;padding:0 1em;color:#111;background:#fff}
table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #999;padding:.25em .7em;text-align:left}
th{background:#eee}td{font-variant-numeric:tabular-nums;overflow-wrap:break-word;max-width:22em}
figure{margin:1.2em 0}figure img{width:100%;max-width:900px}.wide{overflow-x:auto}
@media print{body{font-size:10pt;max-width:none;margin:0}h2{break-after:avoid}
figure,tr,#parallel{break-inside:avoid}#parallel{zoom:.6}}"""


def table(header, rows):
    """A table as HTML."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    lines = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows)
    rest = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rest}</tbody></table></div>"


def body(run, images):
    """What report.html shows below the tables, as HTML: pictures, parallel coordinates, what mattered."""
    body = ["<h2>Pictures</h2>"]
    for path, caption in images:
        data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
        body.append(f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{text}</figcaption></figure>")
    chart = parallel_coordinates(run) or "<p>No trial has reported a loss.</p>"
    body += ["<h2>Parallel coordinates</h2>", chart, "<h2>Which hyperparameter mattered</h2>"]
    rows, n, epoch = what_mattered(run)
    if not rows:
        return "\n".join([*body, "<p>Fewer than five trials with different losses: too few to tell.</p>"])
    header = ["Hyperparameter", "Values: Median Eval Loss (Trials)", "Share Explained", "By Chance", "p"]
    shown = [[TITLES.get(name, name),
              "; ".join(f"{values}: {loss:.4g} ({count})" for values, count, loss in groups),
              f"{100 * share:.0f} %", f"{100 * chance:.0f} %", f"{p:.3f}" if p >= 0.001 else "< 0.001"]
             for name, groups, share, chance, p in rows]
    weak = f"{n} trials are weak evidence. " if n < 50 else ""
    body += [table(header, shown), (
        f"<p>Each hyperparameter on its own, {n} trials, all compared at epoch {epoch:g}, which all have "
        "trained. Share Explained: how much of the variance of the losses' ranks lies between the groups. By "
        "Chance: the average share for so many groups if the hyperparameter does nothing. p: how often "
        "chance gives as much, in 2,000 shuffles of the losses (a permutation test).</p>"
        f"<p>{weak}A p above 0.05 means: not shown to matter, which is not the same as does not matter. And "
        "what matters at an early epoch need not matter at the last.</p>")]
    return "\n".join(body)


def page(run, tables, body):
    """report.html as text. The browser refuses any request that a page with this policy makes."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    title, top = f"Search {html.escape(run.job)}", []
    for name, header, rows, below in tables:
        top += [f"<h2>{html.escape(name)}</h2>", table(header, rows) if header else ""]
        top += [f"<p>{html.escape(line)}</p>" for line in below]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f"<style>{REPORT_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
            + "\n".join(top) + f"\n{body}\n</body></html>\n")
