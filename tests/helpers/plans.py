"""A run file small enough to plan in seconds."""

from mlmjax.config.run import parse_config

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}

CLASSIFIER = {
    "head": "classification",
    "data": {
        "pack": False,
        "sources": [
            {"path": "s.jsonl", "prompt": "{q}", "answer": "a", "labels": {"x": "X", "y": "Y"}}
        ],
    },
}


def config_of(**changes):
    """Decode the run file; a dict changes a table, any other value replaces a key."""
    table = {
        "out": "runs/x",
        "steps": 5,
        "model": MODEL,
        "data": {"rows": "rows/none", "seq_length": 32, "batch_size": 16},
    }
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(table)
