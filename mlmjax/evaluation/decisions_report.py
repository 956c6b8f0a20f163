"""Write the page of an evaluation of several questions, with a reliability diagram by type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlmjax.config.decisions import DecisionTask
from mlmjax.data.contamination import Contamination
from mlmjax.evaluation.report import DIAGRAM, REPORT, diagram
from mlmjax.evaluation.summary import LEVELS
from mlmjax.reporting import charts
from mlmjax.reporting.pages import render
from mlmjax.statistics.reliability import confidence
from mlmjax.storage import write_whole


def write_decisions_report(
    folder: Path,
    task: DecisionTask,
    results: Mapping[str, Any],
    scored: Mapping[str, tuple[np.ndarray, np.ndarray]],
    known: Contamination,
) -> None:
    """Write `report.md` and `reliability_TYPE.svg` of an evaluation into its folder.

    `results` were computed from `scored`: log probabilities `[rows, options]` and right answers by
    the ids of the questions.
    """
    pictures = {}
    for kind in results["types"]:
        ids = [one.id for one in task.questions if one.type == kind]
        pairs = [confidence(*scored[key]) for key in ids if len(scored[key][1])]
        sure, right = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        pictures[kind] = f"reliability_{kind}.svg"
        charts.save(diagram(sure, right), folder / pictures[kind], DIAGRAM)
    page = render(
        "evaluation/decisions_report.md.j2",
        task=task,
        results=results,
        LEVELS=LEVELS,
        known=known,
        pictures=pictures,
        picture_shows=DIAGRAM,
    )
    write_whole(folder / REPORT, page.encode())
