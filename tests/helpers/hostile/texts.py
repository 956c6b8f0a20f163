"""Texts and labels for `classify`."""

import json

from hostile.case import Case, all_of, change, link, update_json, words, write

ODD = (
    "[MASK] [unused0] [SEP][CLS] [PAD]",
    "- A: red\n".strip(),
    "\x01\x02\x0b\x0c\x1c\x85\u2028 control",
    "a\x00b",
    "\U0001f600\u200d\U0001f469 \u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u200b",
    "Z" + "\u0301" * 30,
    "{text} {options} {{",
)
LABELS = {
    "blank": ("", "neither a file nor a comma-separated list"),
    "a comma": (",", "label 1 is blank"),
    "with a comma at the end": ("red,", "label 2 is blank"),
    "with two commas": ("red,,blue", "label 2 is blank"),
    "twice": ("red, red", "appears twice"),
    "one": ("red", "neither a file"),
    "in a file that is not there": ("absent.txt", "neither a file"),
    "in a folder": ("model", "neither a file"),
    "with half a character": ("red,\udcff", "half a character"),
}
LABEL_FILES = {
    "empty": ("", "found none; expected at least two"),
    "blank": ("\n \n\t\n", "labels: found none; expected at least two"),
    "of one label": ("red\n", "labels: found red; expected at least two"),
    "of a label twice": ("red\nblue\nred\n", "labels line 3: the label 'red' is repeated"),
    "of a label twice with a tab": ("red\ta\nred\tb\n", "labels line 2: the label 'red' is"),
    "of a description alone": ("red\ta\n\tblue\n", "labels line 2: the label is blank"),
    "not UTF-8": (b"red\n\xff\n", "labels line 2: is not UTF-8"),
    "in broken UTF-16": ("red\nblue\n".encode("utf-16")[:-1], "labels: byte 19 of the file is not"),
}
TEXT_FILES = {
    "empty": (b"", "texts.txt: is empty"),
    "a blank line": (b"one\n\ntwo\n", "texts.txt line 2: the text is blank"),
    "a line of spaces": (b"one\n \t\ntwo\n", "texts.txt line 2: the text is blank"),
    "a blank line of Windows": (b"one\r\n\r\n", "texts.txt line 2: the text is blank"),
    "white space of other scripts": ("one\n\u3000\u2003\n".encode(), "texts.txt line 2: the text"),
    "a byte order mark alone": (b"\xef\xbb\xbf\n", "texts.txt line 1: the text is blank"),
    "not UTF-8": (b"one\ncaf\xe9\n", "texts.txt line 2: is not UTF-8"),
    "not UTF-8 in the last line": (b"one\n" * 300 + b"\xff", "texts.txt line 301: is not UTF-8"),
    "half a character": (b"one\n\xed\xa0\x80\n", "texts.txt line 2: is not UTF-8"),
    "broken UTF-16": ("one\n".encode("utf-16")[:-1], "texts.txt: byte 9 of the file is not UTF-16"),
}
# By name: the content of a table, and what the first line must say of it with --text text.
TABLES = {
    "t.csv": (b"id,text\n1,one\n2,\n", "t.csv line 3: column 'text' is blank"),
    "short.csv": (b"id,text\n1\n", "short.csv line 2: has 1 fields, the header has 2"),
    "quote.csv": (b'id,text\n1,"one\n', "quote.csv line 2: is not valid CSV"),
    "other.csv": (b"id,body\n1,one\n", "has no column 'text'"),
    "twice.csv": (b"text,text\n1,one\n", "the header has 'text' twice"),
    "utf16.csv": ("id,text\n1,one\n".encode("utf-16")[:-1], "utf16.csv: byte 29 of the file"),
    "t.jsonl": (b'{"text": "one"}\n{"text": 2}\n', "t.jsonl line 2: column 'text' is int"),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl line 1: column 'text' is blank"),
    "list.jsonl": (b'{"text": ["one"]}\n', "list.jsonl line 1: column 'text' is list"),
    "broken.jsonl": (b'{"text": "one"', "broken.jsonl line 1: is not valid JSON"),
    "empty.tsv": (b"", "empty.tsv: is empty"),
    "t.parquet": (b"PAR1 not", "t.parquet: cannot be read"),
    "t.csv.gz": (b"no gzip", "t.csv.gz"),
}
CLASSIFIER = "model/mlmjax_classifier.json"
# By changed keys: what the first line must say.
SAVED = {
    "of another format": ({"format": 2}, "format: found 2"),
    "with an unknown key": ({"code": "x"}, "code: unknown key"),
    "of one label": ({"labels": {"a": ""}}, "expected at least two"),
    "of labels of numbers": ({"labels": {"a": 1}}, "labels"),
    "of a template of nothing": ({"template": "x"}, "template: its fields are none"),
    "of a template that asks for more": (
        {"template": "{text} {password}"},
        "template: its fields are text, password",
    ),
    "of a length negative": ({"max_length": -1}, "max_length: found -1"),
    "of a length of nothing": ({"max_length": 1}, "at most 1 fit"),
    "of a length beyond the model": ({"max_length": 99999}, "is 99999; expected 1 to 512"),
}
HEAD = words("mlmjax classify --model model")
RED = ("--labels", "red,blue")


def cases():
    needs = ("model", "texts.txt")
    for name, (labels, says) in LABELS.items():
        command = (*HEAD, "--labels", labels, "texts.txt")
        yield Case(f"labels {name}", command, 2, says, needs)
    for name, (content, says) in LABEL_FILES.items():
        command = (*HEAD, *words("--labels labels texts.txt"))
        yield Case(f"labels file {name}", command, 2, says, needs, write("labels", content))
    for name, (content, says) in TEXT_FILES.items():
        spoil = write("texts.txt", content)
        yield Case(f"texts {name}", (*HEAD, *RED, "texts.txt"), 2, says, needs, spoil)
    for name, (content, says) in TABLES.items():
        spoil, command = write(name, content), (*HEAD, *RED, "--text", "text", name)
        yield Case(f"table {name}", command, 2, says, ("model",), spoil)
        says = f"{name}: is a table, so its lines are not the texts"
        yield Case(f"table {name} as lines", (*HEAD, *RED, name), 2, says, ("model",), spoil)
    for name, (changes, says) in SAVED.items():
        table = {"labels": {"A": "", "B": ""}, "template": "{text}"} | changes
        spoil = write(CLASSIFIER, json.dumps(table))
        yield Case(f"classifier {name}", (*HEAD, "texts.txt"), 2, says, needs, spoil)
    says, spoil = "mlmjax_classifier.json: is not valid JSON", write(CLASSIFIER, "{")
    yield Case("classifier no JSON", (*HEAD, "texts.txt"), 2, says, needs, spoil)
    spoil = all_of(write("elsewhere.json", "{}"), link(CLASSIFIER, "../elsewhere.json"))
    says = "outside its folder"
    yield Case("classifier linked from outside", (*HEAD, "texts.txt"), 2, says, needs, spoil)
    yield Case("texts absent", (*HEAD, *RED, "absent.txt"), 2, "absent.txt: cannot be", needs)
    yield Case("texts a folder", (*HEAD, *RED, "model"), 2, "model: cannot be read", needs)
    yield Case("texts none", (*HEAD, *RED), 2, "standard input: is empty", needs)
    yield Case("texts without labels", (*HEAD, "texts.txt"), 2, "the classifier has no", needs)
    command = (*HEAD, *RED, "texts.txt")
    spoil = link("texts.txt", "/dev/null")
    yield Case("texts a link to a device", command, 2, "texts.txt: is empty", needs, spoil)
    says = "ModernBertForSequenceClassification"
    spoil = update_json("model/config.json", architectures=[says])
    yield Case("texts for a classification head", command, 2, says, needs, spoil)
    odd = "\n".join([*ODD, "sun " * 50_000])
    says = "warning: 1 of the texts did not fit and were truncated"
    labels = ("--labels", "[MASK],[unused0],\U0001f600")
    yield Case("texts odd", (*HEAD, *labels), 0, says, needs, stdin=odd)
    spoil = change("texts.txt", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    spoil = all_of(spoil, write("labels", b"\xef\xbb\xbfred\ta warm one\r\n\r\nblue\r\n"))
    command = (*HEAD, *words("--labels labels texts.txt"))
    yield Case("texts of Windows", command, 0, '"label": ', needs, spoil)
