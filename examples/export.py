"""Export a model in Hugging Face format, load it again, and check that it is the same.

    python examples/export.py --model runs/mine/export --out my-model --dtype bfloat16

transformers reads the folder with `AutoModelForMaskedLM.from_pretrained("my-model")`.
"""

import argparse
from pathlib import Path

import numpy as np
from common import load, run

from mlmjax import load_pretrained, save_pretrained

TEXT = "The model and its export give the same logits."


def main() -> None:
    """Export, reload, and print the files and the largest difference between logits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder or a Hub id (default: the packaged model)")
    parser.add_argument("--out", type=Path, default=Path("my-model"))
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or source")
    parser.add_argument("--text", default=TEXT, help="the text that both models read")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    save_pretrained(model, tokenizer, arguments.out, dtype=arguments.dtype)
    again, same_tokenizer = load_pretrained(arguments.out)

    ids = tokenizer.encode_plain(arguments.text)
    assert ids == same_tokenizer.encode_plain(arguments.text)
    batch = np.array([[tokenizer.cls_id, *ids, tokenizer.sep_id]])
    difference = np.abs(np.asarray(again(batch)) - np.asarray(model(batch))).max()
    for file in sorted(arguments.out.iterdir()):
        print(f"{file}: {file.stat().st_size} bytes")
    print(f"largest difference of a logit: {difference:g}")


if __name__ == "__main__":
    run(main)
