"""Continue pretraining on your own text, with words of your field as tokens.

    python examples/continue_pretraining.py --model answerdotai/ModernBERT-base \
        --text "corpus/*.jsonl" --words words.txt steps=2000 data.seq_length=1024

Further arguments override keys of the run file, as `mlmjax train` does.
"""

import argparse
from pathlib import Path

from common import HERE, load, read_text, run

from mlmjax import (
    load_config,
    load_pretrained,
    resize_token_embeddings,
    run_training,
    save_pretrained,
)


def main() -> None:
    """Add the words, save the larger model, train it on the text, and show the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=HERE / "continue_pretraining.toml", type=Path)
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    parser.add_argument("--text", default=str(HERE / "notes.jsonl"), help="a file or a glob")
    parser.add_argument("--words", default=HERE / "words.txt", type=Path, help="one per line")
    parser.add_argument("--out", default=Path("continued"), type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()

    words = read_text(arguments.words).splitlines()
    model, tokenizer = load(arguments.model)
    before = [len(tokenizer.encode_plain(f" {word}")) for word in words]
    # A new word starts at the mean of the tokens it was split into.
    model, tokenizer = resize_token_embeddings(model, tokenizer, words)
    start = arguments.out / "start"
    save_pretrained(model, tokenizer, start)
    print(f"{start}: {len(words)} new words, which were {sum(before)} tokens")

    config = load_config(
        arguments.config,
        [
            f"init_from={start}",
            f"out={arguments.out / 'run'}",
            f"data.rows={arguments.out / 'rows'}",
            f"data.sources.0.path={arguments.text}",
            *arguments.overrides,
        ],
    )
    run_training(config)
    export = Path(config.out) / "export"
    _, tokenizer = load_pretrained(export)
    ids = tokenizer.encode_plain(f"a case of {words[0]}")
    print(f"{export}: 'a case of {words[0]}' is {[tokenizer.decode([i]) for i in ids]}")


if __name__ == "__main__":
    run(main)
