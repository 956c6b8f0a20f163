"""List what is compared with what, and by how much ours should be better."""

from typing import NamedTuple


class Case(NamedTuple):
    """Describe one row of the table: `ours` and `theirs` are functions of `ours.py`, `theirs.py`.

    `figure` names the compared figure. The ratio is theirs divided by ours. For peak memory it is
    ours divided by theirs, and should be small.
    """

    title: str
    ours: str
    theirs: str
    goal: float
    stretch: float
    figure: str = "seconds"


QUESTIONS = "{questions} MMLU questions, float32, vs transformers "

CASES = {
    "padded": Case(QUESTIONS + "in padded batches of 8", "questions", "padded", 1.6, 1.9),
    "strongest": Case(
        QUESTIONS + "sorted by length, best budget of tokens", "questions", "strongest", 1.15, 1.3
    ),
    "one_by_one": Case(
        QUESTIONS + "one by one, full softmax", "questions_vocabulary", "one_by_one", 1.6, 2.0
    ),
    "bfloat16": Case(
        "the same, ours in bfloat16, vs float32 in padded batches of 8",
        "questions_bfloat16",
        "padded",
        4.0,
        5.0,
    ),
    "bfloat16_both": Case(
        "{few} of them, both in bfloat16", "few_bfloat16", "few_bfloat16", 1.6, 2.0
    ),
    "local_attention": Case(
        "local attention at 8192 vs torch sdpa with a mask",
        "local_attention",
        "local_attention",
        8.0,
        12.0,
    ),
    "encode_long": Case("encoder at 8192", "encode_long", "encode_long", 2.0, 2.5),
    "training": Case("update of 8 x 128, full head", "training", "training", 1.1, 1.3),
    "training_sparse": Case(
        "update of 8 x 128, sparse_prediction", "training", "training_sparse", 0.95, 1.05
    ),
    "instruct": Case(
        "training on instruction rows vs each padded to 512", "instruct", "instruct", 3.0, 4.0
    ),
    "fresh": Case("fresh process classifies one text", "fresh", "fresh", 1.5, 3.0, "process"),
    "memory": Case(
        "peak memory of scoring at 8192", "score_long", "score_long", 0.5, 0.25, "peak_mib"
    ),
}
STREAM = "stream"
"""Ours only: recompilations in a stream of texts; the goal is 0."""
GROWTH = ("local_attention", "local_attention_512")
"""Ours only: local attention at 8192 keeps at least 0.6 of its tokens/s at 512."""
KEPT = 0.6
