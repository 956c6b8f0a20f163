"""Tables to read and to prepare rows from, what is read of them, and the bytes of results."""

import json

from mlmjax.config.data import DataConfig, SourceConfig
from mlmjax.data.reading.examples import Counts, read_examples
from mlmjax.data.rows import open_rows

ANSWERS = ["yes", "no", "Paris", "entailment", " "]
HOSTILE = [
    "```\n# heading\n````",
    "<script>alert(1)</script>",
    "a|b`c`|\n| --- |",
    "$x_1$ \\frac $ ![x](y)",
    "\x1b[31m\u202etxt\x07\u200b\r\n",
    "中文 ☃ 🤖 \U000f0000 \ufdd0",
    "word " * 300,
    "_underscore",
    "~~~\n~~~",
]


def write_table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source, tokenizer, seq_length=64, **options):
    """Return the examples of a source, and the counts of its records."""
    counts = Counts()
    return list(read_examples(source, tokenizer, seq_length, counts, **options)), counts


def answers_of(examples, tokenizer):
    return [tokenizer.decode([one.ids[one.answer_position]]) for one in examples]


def stored(folder, split, **options):
    """Return the examples of a split of a rows folder in order, each with its source."""
    sources = open_rows(folder, split, **options)
    return [(one, example) for one in sources for i in range(len(one)) for example in one[i]]


def make_rows(count, salt=0):
    return [
        {
            "input": f"Question {salt}-{i % (count - count // 10)}: " + "words " * (i * 7 % 40),
            "answer": ANSWERS[i % len(ANSWERS)],
            "task": f"task{i % 3}",
        }
        for i in range(count)
    ]


def two_sources(folder):
    """Write tables of prompts and of plain text into `folder`; return their configuration."""
    path = write_table(folder / "a.jsonl", make_rows(300))
    text = write_table(folder / "b.jsonl", [{"text": f"Document {i}. " * 40} for i in range(20)])
    return DataConfig(
        rows=str(folder / "rows"),
        seq_length=64,
        validation_rows=8,
        sources=(
            SourceConfig(path=path, prompt="{input}", answer="answer", task="task", name="qa"),
            SourceConfig(path=text, text="text", name="text"),
        ),
    )


def change(config, **update):
    return DataConfig.model_validate({**config.model_dump(), **update})


def change_source(config, **update):
    first = SourceConfig.model_validate({**config.sources[0].model_dump(), **update})
    return change(config, sources=(first, *config.sources[1:]))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
