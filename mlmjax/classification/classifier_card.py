"""The model card of a saved classifier: how it is loaded, its labels and its prompt."""

from importlib import resources
from string import Template

from mlmjax.classification.settings import Settings
from mlmjax.reporting.markdown import fenced, number
from mlmjax.weights.pretrained import Model, parameters

LABELS = 100
"""Labels shown; all of them stand in the settings beside the card."""


def classifier_card(model: Model, settings: Settings) -> str:
    """Return the text of README.md for a model and the settings of the classifier it belongs to.

    Labels and prompt may be a stranger's: they stand in code blocks that they cannot end.
    """
    text = (resources.files("mlmjax") / "assets" / "classifier_card.md").read_text(encoding="utf-8")
    shown = [_one_line(label) for label in settings.shown[:LABELS]]
    if more := len(settings.shown) - len(shown):
        shown.append(f"... and {number(more)} more")
    return Template(text).substitute(
        name=type(model).__name__,
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        parameters=number(sum(leaf.size for leaf in parameters(model).values())),
        labels=fenced("\n".join(shown)),
        applies=(
            "Several may apply to a text, or none."
            if settings.multi_label
            else "One of them applies to a text."
        ),
        prompt=fenced(settings.template),
    )


def _one_line(label: str) -> str:
    """Write out line ends, so that one label cannot look like two."""
    return label.replace("\n", "⟨U+000A⟩")
