"""Task files with mistakes, rows that do not fit them, and folders for results."""

import json

from hostile.case import Case, all_of, jsonl, link, remove, words, write
from hostile.good import ROW, TASK

NO_LABELS = {"labels": None, "options": '"two"', "answer": '"index"'}
HALF = json.dumps(ROW).replace("the sun", "\\ud800")
NOT_SHOWN = "the prompt has no {options}"


def task(changes):
    keys = {key: value for key, value in (TASK | changes).items() if value is not None}
    return write("task.toml", "".join(f"{key} = {value}\n" for key, value in keys.items()))


# By changed keys: what the first line must say.
TASKS = {
    "with an unknown key": ({"promt": '"x"'}, "task.toml: promt: unknown key; did you mean 'pro"),
    "without a prompt": ({"prompt": None}, "task.toml: prompt is missing"),
    "with a blank prompt": ({"prompt": '""'}, "prompt names no field of the row"),
    "with a prompt of options alone": ({"prompt": '"{options}"'}, "prompt names no field of the r"),
    "with an open brace": ({"prompt": '"{text"'}, "task.toml: template: single '{'"),
    "with a format in a field": ({"prompt": '"{text:>9}"'}, "is not a field"),
    "with two slots": ({"prompt": '"{text} [unused0] [MASK] [unused0] [MASK]"'}, "has 2 [MASK]"),
    "with letters for labels that are not shown": ({"prompt": '"Q: {text}"'}, NOT_SHOWN),
    "with rows' own options that are not shown": (NO_LABELS | {"prompt": '"{text}"'}, NOT_SHOWN),
    "with labels that look the same": (
        {"labels": '["bad", "bad ", "good"]'},
        "'bad' and 'bad ' dif",
    ),
    "with a label twice": ({"labels": '["bad", "bad", "good"]'}, "labels repeats a label"),
    "with one label": ({"labels": '["red"]'}, "labels needs at least two"),
    "with a blank label": ({"labels": '["red", " "]'}, "labels holds a blank label"),
    "with labels of numbers": ({"labels": "[1, 2]"}, "labels"),
    "with 5000 labels": (
        {"labels": json.dumps([f"l{i}" for i in range(5000)]), "answer": '"index"'},
        "give at most",
    ),
    "with words of many tokens": (
        {"labels": '{ red = "red sun", blue = "x" }', "verbalizer": '"words"'},
        "form ' red sun' is",
    ),
    "with a verbalizer of other labels": (
        {"verbalizer": '{ red = [" A"], green = [" B"] }'},
        "verbalizer names red, green",
    ),
    "with one word for two labels": ({"verbalizer": '{ red = [" A"], blue = [" A"] }'}, "A"),
    "with a special token for a word": (
        {"verbalizer": '{ red = ["[MASK]"], blue = [" A"] }'},
        "'[MASK]'",
    ),
    "with labels and options": ({"options": '"two"'}, "exactly one of options"),
    "with neither": ({"labels": None}, "exactly one of options"),
    "without an answer": ({"answer": "[]"}, "answer"),
    "with an answer in open braces": ({"answer": '"{label"'}, "unpaired braces"),
    "with an answer of a number": ({"answer": '"{number}"'}, "data.jsonl line 1: column 'number':"),
    "with an answer of nothing": ({"answer": '"{nothing}"'}, "data.jsonl line 1: column 'nothing'"),
    "with an answer of null": ({"answer": '"nothing"'}, "line 1: the answer None is not one of"),
    "with an answer out of range": ({"answer": '"number"'}, "line 1: the answer 5 is not one of"),
    "with an answer of a list": ({"answer": '"two"'}, "line 1: the answer ['a', 'b'] is not one"),
    "with an answer that is not there": ({"answer": '"lable"'}, "line 1: has no column 'lable'"),
    "with a column of braces": ({"columns": '{text = "{}"}'}, "without a plain column name"),
    "with a column and a format": ({"columns": '{text = "{label!r}"}'}, "a plain column name"),
    "with a column of no field": ({"columns": '{txet = "label"}'}, "of the prompt; its fields: te"),
    "with a field of a number": ({"columns": '{text = "number"}'}, "line 1: field 'text'"),
    "with a field of null": ({"columns": '{text = "nothing"}'}, "line 1: field 'text'"),
    "with a field of a list": ({"columns": '{text = "two"}'}, "line 1: field 'text'"),
    "that strips no field": ({"strip": '["txet"]'}, "'txet' is not a field of the prompt"),
    "that shortens no field": ({"shorten": '{ txet = "tail" }'}, "txet"),
    "that shortens nowhere": ({"shorten": '{ text = "left" }'}, "shorten.text: found 'left'"),
    "with a group of null": ({"group": '"nothing"'}, "the row's group, is null"),
    "with options of one column": ({**NO_LABELS, "options": '["text"]'}, "options"),
    "with options of text": ({**NO_LABELS, "options": '"text"'}, "column 'text' is 'the sun'"),
    "with one option": ({**NO_LABELS, "options": '"one"'}, "expected a list of two or more"),
    "with options of numbers": ({**NO_LABELS, "options": '["number", "index"]'}, "1: option 1"),
    "with names of a number": ({**NO_LABELS, "option_names": '"number"'}, "column 'number' is 5;"),
    "with names of text": ({**NO_LABELS, "option_names": '"text"'}, "column 'text' is 'the sun';"),
    "with names of one": ({**NO_LABELS, "option_names": '"one"'}, "expected a list of two or more"),
    "that drops every row": ({"drop_labels": '["red"]'}, "task colors: no row is left to answer"),
    "with an unknown metric": ({"metric": '"bleu"'}, "metric: found 'bleu'"),
    "with data that is not there": ({"data": '"absent.jsonl"'}, "absent.jsonl: no file matches"),
    "with data that has a NUL in its name": ({"data": '"a\\u0000b"'}, "task.toml: data: holds a N"),
    "with blank data": ({"data": '""'}, "task.toml: data is blank"),
    "with neither data nor hub": ({"data": None}, "has neither data nor hub"),
    "of a hub that is not there": ({"data": None, "hub": '"x/y"'}, "x/y"),
}
# By the content of data.jsonl.
ROWS = {
    "empty": ("", "data.jsonl: is empty"),
    "blank": ("\n\n", "no row is left to answer"),
    "cut short": (json.dumps(ROW)[:-5], "data.jsonl line 1: is not valid JSON"),
    "with a blank text": (jsonl([ROW, ROW | {"text": " "}]), "data.jsonl line 2: field "),
    "with half a character": (HALF + "\n", "data.jsonl line 1: field 'text': holds half a char"),
    "with a label of half a character": (HALF.replace("red", "\\udfff"), "data.jsonl line 1: "),
    "with 30 wrong labels": (
        jsonl([ROW | {"label": f"no{i}"} for i in range(30)]),
        "data.jsonl line 1: the answer 'no0' is not one of 'red', 'blue'",
    ),
    "with a text that does not fit": (jsonl([ROW | {"text": "sun " * 900}]), "data.jsonl line 1: "),
}
EVALUATE = words("mlmjax evaluate --model model --task task.toml")
PLACES = {
    "out a file": (write("file", "precious"), ("--out", "file"), "folder for the results"),
    "out below a file": (write("file", "x"), ("--out", "file/below"), "folder for the results"),
    "out blank": (remove(), ("--out", ""), "folder for the results"),
    "out a link to nowhere": (link("out", "no/where"), ("--out", "out"), "folder for the results"),
    "data a folder": (remove(), ("--data", "model"), "model: is a folder"),
    "data absent": (remove(), ("--data", "./absent.csv"), "absent.csv: no file matches"),
    "an unknown protocol": (remove(), ("--protocol", "secret"), "has no protocol 'secret'"),
    "a protocol the task has not": (remove(), ("--protocol", "published"), "has no protocol"),
    "a limit of zero": (remove(), ("--limit", "0"), "'--limit': 0 is not in the range"),
    "an unknown option": (remove(), ("--nonsense",), "No such option"),
    "a missing model": (remove("model"), (), "model: is not a local folder"),
    "a revision of a folder": (remove(), ("--revision", "main"), "leave the revision out"),
    "a batch of text": (remove(), ("--batch-size", "many"), "'many' is not a valid integer"),
}
FILES = {
    "absent": (remove("task.toml"), "task.toml: cannot be read"),
    "no TOML": (write("task.toml", "{}"), "task.toml: is not valid TOML"),
    "nested deeply": (write("task.toml", "a = " + "[" * 100_000), "task.toml: is not valid TOML"),
    "not UTF-8": (write("task.toml", b"name = '\xff'"), "task.toml: is not UTF-8 text"),
}
GOOD = {
    "letters for labels that the prompt spells out": task({"prompt": '"Q: {text} A: red B: blue"'}),
    "letters for columns that the prompt spells out": all_of(
        task({**NO_LABELS, "options": '["x", "y"]', "prompt": '"Q: {text} A: {x} B: {y}"'}),
        write("data.jsonl", jsonl([ROW | {"x": "a", "y": "b"}])),
    ),
    "a limit of 30 digits": remove(),
    "results in a folder with other files": write("results/notes.txt", "precious"),
    "a row that imitates the template": write(
        "data.jsonl", jsonl([ROW | {"text": "- A: x\nANSWER: [unused0] [MASK]{options}"}])
    ),
    "words for labels that are not shown": task({"prompt": '"Q: {text}"', "verbalizer": '"words"'}),
}


def cases():
    def case(name, spoil, *more, says, code=2, **options):
        begin = all_of(task({}), write("data.jsonl", jsonl([ROW])), spoil)
        return Case(name, (*EVALUATE, *more), code, says, ("model",), begin, **options)

    for name, (changes, says) in TASKS.items():
        yield case(f"task {name}", task(changes), says=says)
    for name, (content, says) in ROWS.items():
        yield case(f"rows to answer {name}", write("data.jsonl", content), says=says)
    for name, (spoil, says) in FILES.items():
        yield case(f"task file {name}", spoil, says=says)
    for name, (spoil, more, says) in PLACES.items():
        yield case(f"evaluate {name}", spoil, *more, says=says)
    writes = ("results/*.json*", "results/report.md", "results/reliability.svg")
    for name, spoil in GOOD.items():
        more = ("--json", "--limit", "9" * 30, *(("--out", "results") if "results" in name else ()))
        yield case(f"evaluate {name}", spoil, *more, says='"n": 1', code=0, writes=writes)
