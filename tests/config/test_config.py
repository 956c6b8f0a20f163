"""The run configuration: strict, complete, and every shipped file parses."""

import re
from pathlib import Path

import pytest

from mlmjax.classification.settings import Settings
from mlmjax.config.data import SelectConfig
from mlmjax.config.run import RunConfig, load_config, parse_config
from mlmjax.config.suite import Suite
from mlmjax.config.tables import decode
from mlmjax.config.task import load_task
from mlmjax.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"

MINIMAL = """
out = "runs/x"
steps = 20_000
init_from = "some/model"
[data]
rows = "rows/x"
[[data.sources]]
path = "x.parquet"
prompt = "{inputs}"
answer = "targets"
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_shipped_configs_parse_and_cover_the_ways_of_training():
    found = {path.stem: load_config(path) for path in CONFIGS.glob("*.toml")}
    assert all(config.data.sources for config in found.values())
    sizes = {"atp_tiny", "atp_base", "atp_large"}
    assert found.keys() >= sizes | {"finetune", "mlm_pretrain", "continue_mlm"}


def test_overrides_are_toml_values_and_reach_into_lists(minimal):
    changes = ["data.batch_size=64", "out=runs/b", "optimizer.learning_rate=1e-5"]
    config = load_config(minimal, [*changes, "data.sources.0.path=y.jsonl"])
    assert (config.data.batch_size, config.out) == (64, "runs/b")
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.sources[0].path == "y.jsonl"


def test_a_run_file_and_a_task_file_are_not_taken_for_each_other(minimal, tmp_path):
    with pytest.raises(InputError, match=r"run\.toml: is a run file, as `mlmjax train` reads it"):
        load_task(minimal)
    task = tmp_path / "task.toml"
    task.write_text('name = "a"\ndata = "a.csv"\nprompt = "{text}"\nanswer = "label"\n')
    with pytest.raises(InputError, match=r"task\.toml: is a task file, as `mlmjax evaluate"):
        load_config(task)


def test_an_empty_model_makes_way_for_a_start(minimal):
    changes = ["model={hidden_size=4}", "init_from=start"]
    table = load_config(minimal, [*changes, "model={}"])
    assert (table.init_from, not table.model) == ("start", True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1e-3", r"optimizer\.lr: unknown key; known here: name, learning_rate"),
        ("data.sources.0.promt='x'", r"data\.sources\.0\.promt: unknown key; did you mean"),
        ("data.sources.0.shorten={inputs='end'}", r"0\.shorten\.inputs: found 'end'"),
        ("data.sources.x.path=3", "found 'x'; expected an index .* length 1"),
        ("data.sources.0=3", r"data\.sources\.0"),
        ("adapter.kind='dora'", r"adapter\.kind: found 'dora'"),
        ("adapter.targets=['Wqvk']", "adapter: targets: found 'Wqvk'; did you mean 'Wqkv'. expec"),
        ("adapter.targets=[]", "targets: found ''; expected names of attn.Wqkv"),
        ("adapter.rank=0", r"adapter\.rank: found 0"),
        ("adapter.dropout=0.1", r"adapter\.dropout: found 0\.1"),
        ("optimizer.train=[]", r"optimizer\.train: found \(\)"),
        ("optimizer={train=['*bias'], layer_decay=0.9}", "leave one of them out"),
    ],
)
def test_refusals_name_the_key(minimal, override, message):
    with pytest.raises(InputError, match=message):
        load_config(minimal, [override])


def test_an_adapter_goes_with_a_start_and_without_chosen_parameters(minimal):
    config = load_config(minimal, ["adapter.rank=4", "adapter.alpha=2.0"])
    assert (config.adapter.scale, config.adapter.kind) == (0.5, "lora")
    assert load_config(minimal, ["optimizer.train=['*bias']"]).optimizer.train == ("*bias",)
    for changes, says in (
        (["adapter.rank=4", "optimizer.train=['*bias']"], "leave out either it or optimizer.train"),
        (["adapter.rank=4", "init_from=nothing", "model={hidden_size=4}"], "found both init_from"),
    ):
        with pytest.raises(InputError, match=says):
            load_config(minimal, changes)
    table = config.model_dump(mode="json")
    del table["init_from"]
    with pytest.raises(InputError, match="changes a model that has learned; give init_from"):
        parse_config({**table, "model": {"hidden_size": 4}})


def test_every_wrong_value_is_one_message():
    start = {"init_from": "x", "out": "x", "steps": 1, "data": {"rows": "x"}}
    for table_type, values, message, count in (
        (Suite, {"heads": ["foo"], "entries": [{"task": 3}]}, r"heads\.0: found 'foo'", 4),
        (RunConfig, start | {"model": {"a": 1}}, r"^x: found both init_from and \[model\]", 1),
        (RunConfig, start | {"init_from": None}, r"^x: found neither init_from nor \[model\]", 1),
        (SelectConfig, {"sizes": [2, 1]}, "at most 100 sizes, in ascending order", 1),
        (Settings, {"labels": {}, "template": "", "orders": 0}, "orders: .* to 1, or 'all'", 1),
    ):
        with pytest.raises(InputError) as caught:
            decode(table_type, values, "x")
        lines = str(caught.value).splitlines()
        assert len(lines) == count, lines
        assert any(re.search(message, line) for line in lines)


def test_a_path_or_a_number_that_no_toml_has_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="is not valid TOML"):
        load_config("a\0b")
    (tmp_path / "run.toml").write_text(f"steps = {'9' * 5000}\n")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_config(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("int=1", "int: unknown key"),
        ("data.str=1", "data.str: unknown key"),
        ("steps[0]=1", "steps[0]: unknown key; did you mean 'steps'?"),
        ("[x]=1", "[x]: unknown key"),
        ("a\nb\x1b[2J=1", r"a\nb\x1b[2J: unknown key"),
        ("out=\udcff", r"out: found '\udcff', which holds half a character"),
        ("\udcff=1", r": \udcff: found '\udcff', which holds half a character"),
        (".".join("a" * 5000) + "=1", "expected names between the dots of the key, at most 30"),
        ("..=1", "override '..=1': expected names between the dots"),
        ("model={a=" + "[" * 200 + "]" * 200 + "}", "model.a.0.0... is nested more than 30"),
        ("data.sources." + "9" * 5000 + ".path=x", "expected an index of the list"),
        (f"steps={2**62}", f"steps: found {2**62} (int); input should be less than 2147483648"),
        (f"data.batch_size={2**40}", f"data.batch_size: found {2**40} (int); input should be"),
        (f"data.workers={2**40}", f"data.workers: found {2**40} (int)"),
        (f"mesh.tensor={2**62}", f"mesh.tensor: found {2**62} (int)"),
        ("out=~nobody-here/x", "out: ~nobody-here/x: the home directory that"),
    ],
)
def test_odd_overrides_are_answered_by_their_dotted_path(minimal, override, message):
    with pytest.raises(InputError) as caught:
        load_config(minimal, [override])
    assert message in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


def test_a_leading_tilde_is_the_home_directory(minimal, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(minimal, ["out=~/run"]).out == str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~a").mkdir()
    assert load_config(minimal, ["out=~a/run"]).out == "~a/run"
