"""A report anyone can open: one HTML file, its pictures inside it, no script and no network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlmjax.reporting.charts import ACCENT, INK, OTHER, WARN, WIDTH, _figure, plain


@dataclass(frozen=True)
class Method:
    """One bar of the accuracy picture: its name, its accuracy, and its 95 % interval if any."""

    name: str
    accuracy: float
    interval: tuple[float, float] | None = None
    is_ours: bool = False


@dataclass(frozen=True)
class Answer:
    """One text and the probability of every label; `gold` is None where nobody knows."""

    text: str
    probabilities: Mapping[str, float]
    gold: str | None = None

    @property
    def prediction(self) -> str:
        """The most probable label."""
        return max(self.probabilities, key=lambda label: self.probabilities[label])


@dataclass(frozen=True)
class Report:
    """Everything the page shows. `curve` is the run's metrics.jsonl; `confusion` counts texts,
    `[gold label, predicted label]`.
    """

    title: str
    summary: str
    prompt: str
    methods: Sequence[Method]
    curve: Sequence[Mapping[str, Any]]
    labels: Sequence[str]
    confusion: np.ndarray
    answers: Sequence[Answer]
    sentences: Sequence[Answer]
    facts: Mapping[str, str]
    commands: Sequence[tuple[str, str]]


def write_report(report: Report, path: Path) -> None:
    """Write the page; the folder must exist."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """Return the page as HTML; every text in it is escaped."""
    facts = "".join(f"<tr><th>{_(k)}</th><td>{_(v)}</td></tr>" for k, v in report.facts.items())
    commands = "".join(
        f"<p>{_(what)}</p><pre>{_(command)}</pre>" for what, command in report.commands
    )
    prompt = _(report.prompt).replace("[MASK]", '<mark class="slot">[MASK]</mark>')
    body = f"""
<h1>{_(report.title)}</h1>
<p class="summary">{_(report.summary)}</p>
<h2>How the model is asked</h2>
<p>Every text is put into this prompt. The model predicts the one word at
<mark class="slot">[MASK]</mark>, exactly as a masked language model does; the probabilities of the
subjects' names at that place are the answer. Training shows the same prompt with the right word as
the target.</p>
<pre>{prompt}</pre>
<h2>How well it answers</h2>
{_picture(accuracy_figure(report.methods), "accuracy of each method on the test texts")}
<p class="note">Share of test texts put under the right subject; lines are 95 % intervals. No text
comes from a page that was trained on.</p>
<h2>How it learned</h2>
{_picture(curve_figure(report.curve), "loss and accuracy over the training updates")}
<p class="note">The held-out texts come from pages of their own, and choose nothing. But the model
has read the rest of these books before, so expect a little less on texts from elsewhere.</p>
<h2>What it mixes up</h2>
{_picture(confusion_figure(report.labels, report.confusion), "confusion matrix")}
<h2>Test paragraphs, one per subject</h2>
{"".join(map(_answer, report.answers))}
<h2>Sentences of our own</h2>
{"".join(map(_answer, report.sentences))}
<h2>The run</h2>
<table class="facts">{facts}</table>
<h2>What to do next</h2>
{commands}
"""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_(report.title)}</title><style>{STYLE}</style></head>
<body><main>{body}</main></body></html>
"""


def accuracy_figure(methods: Sequence[Method]) -> Figure:
    """Draw one horizontal bar per method, best last."""
    figure, axes = _figure(0.42 * len(methods) + 0.7)
    for row, method in enumerate(methods):
        axes.barh(row, method.accuracy, color=ACCENT if method.is_ours else OTHER, height=0.62)
        end = method.accuracy
        if method.interval is not None:
            low, high = method.interval
            axes.plot([low, high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
            end = high
        axes.text(end + 0.012, row, f"{method.accuracy:.1%}", va="center", color=INK)
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.45, -0.55)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def curve_figure(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy of the training and the held-out texts over the updates."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in (
        (panels[0], "loss_atp", "loss at the answer"),
        (panels[1], "answer_accuracy", "answers right"),
    ):
        plain(axes)
        for split, name, style in (
            ("train", "training texts", {"color": OTHER}),
            ("validation", "held-out texts", {"color": ACCENT, "marker": "o", "markersize": 4}),
        ):
            points = [
                (line["step"], line[key])
                for line in curve
                if line["split"] == split and line.get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, **style)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("updates", color=INK)
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.02)
    panels[1].set_yticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    if panels[0].lines:
        panels[0].legend(frameon=False, fontsize=9)
    return figure


def confusion_figure(labels: Sequence[str], confusion: np.ndarray) -> Figure:
    """Draw the table of right subject (rows) and predicted subject (columns), with counts."""
    figure = Figure(figsize=(WIDTH, WIDTH * 0.82), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion > 0):
        axes.text(
            column,
            row,
            str(confusion[row, column]),
            ha="center",
            va="center",
            color="white" if shares[row, column] > 0.6 else INK,
        )
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("right subject", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return figure


def _picture(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{_(description)}" src="data:image/png;base64,{data}">'


def _answer(answer: Answer) -> str:
    """One text, its three most probable labels as bars, and whether the first is right."""
    best = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:3]
    bars = "".join(
        f'<div class="bar"><span class="name">{_(label)}</span>'
        f'<span class="rail"><span style="width:{100 * share:.1f}%"></span></span>'
        f'<span class="share">{share:.0%}</span></div>'
        for label, share in best
    )
    verdict = ""
    if answer.gold is not None:
        right = answer.prediction == answer.gold
        verdict = (
            f'<p class="verdict {"right" if right else "wrong"}">'
            f"{'✓ right' if right else '✗ the book says'}: {_(answer.gold)}</p>"
        )
    return f'<div class="answer"><blockquote>{_(answer.text)}</blockquote>{bars}{verdict}</div>'


def _(text: str) -> str:
    return html.escape(str(text))


STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f5f7fa; color: {INK};
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 46rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; background: #fff; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .6rem; }}
.summary {{ font-size: 1.1rem; }}
.note {{ color: #52606d; font-size: .9rem; margin-top: .3rem; }}
img {{ width: 100%; height: auto; }}
pre {{ background: #f5f7fa; padding: .7rem .9rem; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; font-size: .88rem; }}
mark.slot {{ background: #ccfbf1; color: {ACCENT}; font-weight: 600; padding: 0 .15em; }}
.answer {{ margin: 0 0 1.5rem; }}
blockquote {{ margin: 0 0 .5rem; padding-left: .9rem; border-left: 3px solid #cbd2d9; }}
.bar {{ display: flex; align-items: center; gap: .6rem; font-size: .9rem; }}
.bar .name {{ width: 7.5rem; text-align: right; }}
.bar .rail {{ flex: 1; background: #eef1f4; border-radius: 3px; height: .7rem; }}
.bar .rail span {{ display: block; height: 100%; background: {ACCENT}; border-radius: 3px; }}
.bar .share {{ width: 3rem; }}
.verdict {{ margin: .2rem 0 0 8.1rem; font-size: .9rem; }}
.right {{ color: {ACCENT}; }} .wrong {{ color: {WARN}; }}
.facts th {{ text-align: left; font-weight: 500; padding-right: 1.5rem; color: #52606d;
  white-space: nowrap; vertical-align: top; }}
"""
