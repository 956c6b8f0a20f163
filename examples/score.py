"""Score texts with your own prompt: print the probability of each answer.

python examples/score.py --model answerdotai/ModernBERT-Large-Instruct "A wonderful film."
"""

import argparse

import numpy as np
from common import load, run

from mlmjax import Scorer, Template, Verbalizer

PROMPT = "Is the review positive or negative?\nREVIEW: {text}\nCHOICES:\n{options}ANSWER:"


def main() -> None:
    """Print one line per text: each option with its probability."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="*", default=["A wonderful film.", "A wasted evening."])
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    parser.add_argument("--prompt", default=PROMPT, help="with {text} and {options}")
    parser.add_argument("--options", default="positive,negative")
    arguments = parser.parse_args()
    options = [option.strip() for option in arguments.options.split(",")]

    model, tokenizer = load(arguments.model)
    # Truncate the end of a long text, so that the options and the slot always fit.
    template = Template(arguments.prompt, shorten={"text": "tail"})
    # " A" is the first option, " B" the second. Or use Verbalizer({"positive": [" yes"], ...}).
    scorer = Scorer(model, tokenizer, template, Verbalizer.letters(options))
    rows = [{"text": text, "options": options} for text in arguments.texts]
    for text, probabilities in zip(arguments.texts, np.exp(scorer.log_probs(rows)), strict=True):
        line = ", ".join(f"{o} {p:.4f}" for o, p in zip(options, probabilities, strict=True))
        print(f"{line}: {text}")


if __name__ == "__main__":
    run(main)
