"""Show the figures of an evaluation on a terminal, and hand them to a model card."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmjax.errors import InputError, counted
from mlmjax.reporting.markdown import METRIC_NAMES, score, visible
from mlmjax.storage import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from mlmjax.decisions.decider import Decider

LEVELS = {
    "rps": "ranked probability score; 0 is best",
    "mae": "mean distance of the expected level",
    "within_one": "share of rows at most one level away",
    "quadratic_kappa": "agreement with quadratic weights",
}


FEW = 30
"""Below this number of rows an interval is too wide to say much."""


def warn_of_few(count: int, noun: str = "row") -> list[str]:
    """Return a warning if so few rows are tested that figures may be chance, else nothing.

    >>> warn_of_few(3), warn_of_few(30)
    (['warning: only 3 rows are tested, so the figures may be chance'], [])
    """
    are = "is" if count == 1 else "are"
    text = f"warning: only {counted(count, noun)} {are} tested, so the figures may be chance"
    return [text] if count < FEW else []


def warn_of_shortened(decider: "Decider") -> list[str]:
    """Return a warning of prompts that lack a part of their state, with the limit; else nothing."""
    from mlmjax.scoring.engine import describe_limit  # loads JAX

    if not decider.shortened:
        return []
    limit = describe_limit(
        decider.buckets[-1], decider.model.config.max_position_embeddings, "the decider"
    )
    did = "prompt did" if decider.shortened == 1 else "prompts did"
    return [
        f"warning: {decider.shortened:,} {did} not fit, and their states were truncated: question "
        f"and state together have at most {limit}"
    ]


def summary_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a short table of the figures that `run_evaluation` returned."""
    yield f"{visible(results['task'])}, protocol {visible(results['protocol'])}: {_rows(results)}"
    rows = [("", "value", "95 % interval")]
    shown = dict.fromkeys(["accuracy", results["metric"], "macro_f1"])
    for name in shown:
        low, high = map(score, results[f"{name}_ci95"])
        rows.append((METRIC_NAMES[name], score(results[name]), f"{low} to {high}"))
        if name == "accuracy":
            rows.append(("majority", score(results["majority"]), "always the most common answer"))
    rows.append(("calibration error", score(results["calibration"]["ece"]), _sureness(results)))
    for name, meaning in LEVELS.items() if results.get("levels") else ():
        value = results["levels"][name]  # None for a kappa that is not defined
        rows.append((name.replace("_", " "), "" if value is None else score(value), meaning))
    divergence = (results.get("likelihood") or {}).get("js_divergence")
    if divergence is not None:
        low, high = map(score, results["likelihood"]["js_divergence_ci95"])
        rows.append(("JS divergence", score(divergence), f"{low} to {high}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, more in rows:
        yield f"{name:<{widths[0]}}  {value:>{widths[1]}}  {more}".rstrip()
    yield f"{'contamination':<{widths[0]}}  {results['contamination']}"
    for line in results["trained_on"]:
        yield f"  {visible(line)}"


def _rows(results: Mapping[str, Any]) -> str:
    """Describe the rows scored, and what was done to some of them."""
    reasons = {
        "shortened": f"truncated to the {results['max_length']:,} tokens that the model reads",
        "dropped": "left out by their label",
        "blank": "blank after cleaning",
    }
    notes = [f"{results[key]:,} {text}" for key, text in reasons.items() if results[key]]
    return counted(results["n"], "row") + (f" ({', '.join(notes)})" if notes else "")


def _sureness(results: Mapping[str, Any]) -> str:
    """Say by how much the mean probability of the answers differs from their accuracy."""
    gap = results["calibration"]["confidence"] - results["accuracy"]
    points = f"{100 * abs(gap):.0f}"
    if points == "0":
        return "confidence equals accuracy"
    noun = "point" if points == "1" else "points"
    return f"confidence is {points} {noun} {'above' if gap > 0 else 'below'} accuracy"


RESULTS = "results.json"


def read_measured(folder: Path) -> "list[EvalResult]":
    """Return what an evaluation wrote into its folder, as results for a model card.

    Raises `InputError` if the folder holds no results of `mlmjax evaluate --out`.
    """
    from mlmjax.weights.cards import measured  # loads the model's code

    results = read_json(folder, RESULTS)
    try:
        if "questions" in results:  # a task of several questions
            return [
                one
                for key, figures in results["questions"].items()
                for one in measured(figures, f"{results['task']}: {key}", contamination="unknown")
            ]
        found = measured(results, results["task"], contamination=results["contamination"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / RESULTS}: is not the result of mlmjax evaluate --out ({error}); give its "
            "folder"
        ) from error
    return found
