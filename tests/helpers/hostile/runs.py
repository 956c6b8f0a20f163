"""Run files with mistakes, run folders of other programs, and folders that collide."""

from hostile.case import Case, all_of, change, cut, link, remove, words, write

NEEDS = ("tokenizer", "run.toml", "records.jsonl")
# By overrides: what the first line must say.
OVERRIDES = {
    "with an unknown key": (["stepz=3"], "stepz: unknown key; did you mean 'steps'?"),
    "with an unknown nested key": (["data.batchsize=3"], "data.batchsize: unknown key; did you"),
    "with an unknown table": (["nonsense.a=1"], "nonsense: unknown key"),
    "with an unknown model key": (["model.hiden_size=64"], "hiden_size: unknown key"),
    "with steps of text": (["steps=many"], "steps: found 'many' (str)"),
    "with steps of a fraction": (["steps=2.5"], "steps: found 2.5 (float)"),
    "with steps true": (["steps=true"], "steps: found True (bool)"),
    "with steps zero": (["steps=0"], "steps: found 0"),
    "with steps negative": (["steps=-1"], "steps: found -1"),
    "with steps of 30 digits": ([f"steps={'9' * 30}"], "steps: found 9999"),
    "with steps of a list": (["steps=[1]"], "steps: found"),
    "with a seed too large": ([f"seed={2**31}"], "seed: found"),
    "with a rate NaN": (["optimizer.learning_rate=nan"], "optimizer.learning_rate: found nan"),
    "with a rate infinite": (["optimizer.learning_rate=inf"], "optimizer.learning_rate: found inf"),
    "with a rate negative": (["optimizer.learning_rate=-1e-3"], "optimizer.learning_rate: found"),
    "with a rate of text": (["optimizer.learning_rate='1e-3'"], "optimizer.learning_rate: found"),
    "with an unknown optimizer": (["optimizer.name=lion"], "optimizer.name: found 'lion'"),
    "with a decay of one": (["optimizer.b1=1.0"], "optimizer.b1: found 1.0"),
    "with shares above one": (
        ["objective.mlm_share=0.6", "objective.dummy_mlm_share=0.6"],
        "objective: dummy_mlm_share 0.6 + mlm_share 0.6 is above 1",
    ),
    "with a share NaN": (["objective.mlm_share=nan"], "objective.mlm_share: found nan"),
    "with a mask rate of zero": (["objective.mlm_rate=0.0"], "objective.mlm_rate: found 0.0"),
    "with a batch that does not accumulate": (["data.accumulate=3"], "4 is not a multiple of accu"),
    "with a warm-up too long": (["schedule.warmup=100"], "schedule: warmup 100"),
    "with rows too long": (["data.seq_length=9000"], "data.seq_length: found 9000"),
    "with rows too short": (["data.seq_length=3"], "raise data.seq_length, which is 3"),
    "with rows of 10^12": (["data.seq_length=1000000000000"], "data.seq_length: found 10000"),
    "with all rows held out": (["data.validation_rows=1000"], "data.validation_rows = 1000"),
    "with two kinds of validation": (
        ["data.validation_rows=1", 'data.validation_sources=[{path="x", text="a"}]'],
        "data: give validation_rows",
    ),
    "with two starts": (["init_from=model"], "exactly one of init_from"),
    "with sources of text": (["data.sources=x"], "data.sources: found 'x'"),
    "without sources": (["data.sources=[]"], "data.sources names nothing to read"),
    "with two sources of one name": (
        ['data.sources=[{path="a.txt", text="text"}, {path="a.txt", text="text"}]'],
        "two are called 'a.txt'",
    ),
    "with a source of two kinds": (["data.sources.0.text=prompt"], "data.sources.0: give exactly"),
    "with a weight on a negative": (["data.sources.0.weight=-1.0"], "data.sources.0.weight: found"),
    "with a limit of 30 digits": (
        [f"data.sources.0.limit={'9' * 30}"],
        "data.sources.0.limit: found 9999",
    ),
    "with out blank": (["out="], "out is blank"),
    "with rows blank": (["data.rows= "], "data.rows is blank"),
    "with the tokenizer blank": (["tokenizer="], "tokenizer is blank"),
    "with the source blank": (["data.sources.0.path="], "path is blank"),
    "with the tokenizer elsewhere": (["tokenizer=absent"], "absent: has no tokenizer.json"),
    "with a start that is not there": (["init_from=./absent", "model={}"], "there is no such fold"),
    "with an override of nothing": (["=3"], "expected key=value"),
    "with an override into a value": (["steps.a=3"], "steps is a value, not a table"),
    "with an override past a list": (["data.sources.7.path=x"], "below its length 1"),
    "with a mesh too large": (["mesh.fsdp=1024"], "fsdp"),
    "with a mesh of zero": (["mesh.data=0"], "data is 0; expected -1"),
    "with pmap and a mesh": (["parallel=pmap"], "leave [mesh] out"),
    "with an attention unknown": (["attention=flash"], "attention: found 'flash'"),
    "with dropout": (["model.mlp_dropout=0.1"], "training has no dropout"),
    "with a model of odd heads": (["model.num_attention_heads=3"], "num_attention_heads 3"),
    "with a model of nothing": (["model.hidden_size=0"], "hidden_size: found 0"),
    "with a model too small for the tokenizer": (["model.vocab_size=10"], "pad_token_id"),
    "with a null byte in a path": (['out="a\\u0000b"'], "out"),
    "with a name of 300 letters": ([f"out={'x' * 300}"], "File name too long"),
    "with out in brackets": (["out=what[1]"], "under a name with '['"),
    "with out and rows in one folder": (["out=rows"], "data.rows: rows and out = rows"),
    "with out below the rows": (["out=rows/out"], "data.rows: rows and out = rows/out"),
    "with rows among the checkpoints": (["data.rows=out/checkpoints"], "data.rows: out/checkpoint"),
}
NO_TOML = "run.toml: is not valid TOML"
FILES = {
    "that is not there": (remove("run.toml"), "run.toml: cannot be read"),
    "that is a folder": (all_of(remove("run.toml"), write("run.toml/x", "")), "toml: cannot be"),
    "that is empty": (write("run.toml", ""), "run.toml: out is missing"),
    "that is cut short": (change("run.toml", cut(0.95)), "run.toml: "),
    "that is no TOML": (write("run.toml", "out: x\n"), NO_TOML),
    "that is not UTF-8": (write("run.toml", b"out = '\xff'\n"), "run.toml: is not UTF-8 text"),
    "with a key twice": (change("run.toml", lambda data: b"out = 'x'\n" + data), NO_TOML),
    "nested deeply": (write("run.toml", "a = " + "[" * 100_000), NO_TOML),
    "with a NUL": (write("run.toml", "out = 'a\0b'\n"), NO_TOML),
}


def metrics(function):
    return change("unfinished/metrics.jsonl", function)


DEEP = b"[" * 100_000
NO_RUN = "out/config.json: is not the configuration of a run"
FIRST = "metrics.jsonl, line 1: is not a line of metrics"
THIRD = "metrics.jsonl, line 3: is not a line of metrics"
# What lies in `out`, or in `unfinished`, the folder of a run to resume.
FOLDERS = {
    "that is a file": (write("out", "precious"), "out: cannot be written"),
    "with somebody's config.json": (write("out/config.json", '{"model_type": "bert"}'), NO_RUN),
    "with a broken config.json": (write("out/config.json", "{"), NO_RUN),
    "with a config.json nested deeply": (write("out/config.json", DEEP), NO_RUN),
    "whose config.json is a folder": (write("out/config.json/x", ""), NO_RUN),
    "that is a link to nowhere": (link("out", "nowhere/at/all"), "out: cannot be written"),
    "that is a link in a circle": (link("out", "out"), "out: cannot be written"),
    "whose checkpoints are a file": (write("out/checkpoints", "x"), "cannot be used for checkpoin"),
}
METRICS = {
    "with metrics of noise": (metrics(lambda data: b"\xff\xfe\n" * 9), FIRST),
    "with somebody's notes for metrics": (metrics(lambda data: b"my notes\n" + data), FIRST),
    "with a broken line of metrics": (metrics(lambda data: data + data[:40] + b"\n" + data), THIRD),
    "with a line of metrics nested deeply": (metrics(lambda data: DEEP + b"\n" + data), FIRST),
}
RESUMED = {
    "of another seed": (["seed=1"], "seed is 1, the run there has 0"),
    "of another model": (["model.hidden_size=32"], "model.hidden_size is 32"),
    "of more steps": (["steps=1", "data.batch_size=8"], "batch_size"),
}
GOOD_METRICS = {
    "with a cut last line of metrics": metrics(lambda data: data + data[:40]),
    "with zeros at the end of its metrics": metrics(lambda data: data + b"\0" * 512 + b"\n"),
}
DEMO = {
    "that is a file": (write("demo", "precious"), "demo"),
    "below a file": (write("demo", "precious"), "demo"),
    "that is a link to nowhere": (link("demo", "nowhere/at/all"), "demo"),
    "with somebody's run file": (write("demo/run.toml", "precious"), "demo/run.toml: already"),
    "with somebody's data": (write("demo/data/train.jsonl", "precious"), "demo/data: already"),
}


def cases():
    train = words("mlmjax train run.toml")
    for name, (overrides, says) in OVERRIDES.items():
        command = (*train, *overrides)
        yield Case(f"run file {name}", command, 2, says, NEEDS, writes=("out", "out/.lock"))
    for name, (spoil, says) in FILES.items():
        yield Case(f"run file {name}", train, 2, says, NEEDS, spoil)
    needs, lock = (*NEEDS, "rows", "unfinished"), ("out/.lock", "unfinished/.lock")
    for name, (spoil, says) in FOLDERS.items():
        yield Case(f"run folder {name}", train, 2, says, needs, spoil, writes=lock)
    command, spoil = (*train, "out=out/below"), write("out", "precious")
    yield Case("run folder below a file", command, 2, "cannot be written", needs, spoil)
    spoil, used = write("out/notes.txt", "precious"), tuple(f"out/{part}" for part in OUT)
    yield Case("run folder with foreign files", train, 0, "export: ", needs, spoil, writes=used)
    train = (*train, 'out="unfinished"')
    for name, (spoil, says) in METRICS.items():
        yield Case(f"run folder {name}", train, 2, says, needs, spoil, writes=lock)
    for name, (overrides, says) in RESUMED.items():
        yield Case(f"run folder {name}", (*train, *overrides), 2, says, needs, writes=lock)
    for name, spoil in GOOD_METRICS.items():
        used = ("unfinished",)
        yield Case(f"run folder {name}", train, 0, "export: ", needs, spoil, writes=used)
    for name, (spoil, says) in DEMO.items():
        out = "demo/below" if "below" in name else "demo"
        yield Case(f"demo folder {name}", words(f"mlmjax demo --out {out}"), 2, says, (), spoil)


OUT = (
    "checkpoints",
    "config.json",
    "export",
    "metrics.jsonl",
    "validation.json",
    ".lock",
    "events.*",
)
