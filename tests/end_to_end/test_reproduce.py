"""docs/reproduce.md: its commands parse, and what they name exists and loads."""

import pytest
from pages import ROOT, blocks, commands

from mlmjax.cli.commands import cli
from mlmjax.config.run import load_config
from mlmjax.config.suite import load_suite
from mlmjax.config.task import load_task
from mlmjax.text.prompts import Template

PAGE = (ROOT / "docs" / "reproduce.md").read_text()


def parse(command):
    name, *rest = command.arguments
    return name, cli.commands[name].make_context(name, rest).params


def test_commands_parse_and_name_what_is_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    trained, seen = set(), []
    for command in commands("\n".join(blocks("bash", PAGE))):
        name, given = parse(command)
        seen.append(name)
        if name == "evaluate":
            if given["suite"]:
                assert load_suite(given["suite"], given["overrides"])
                continue
            load_task(given["task"]).under(given["protocol"])
            (model,) = given["models"]
            if model.startswith("runs/"):
                assert model.removesuffix("/export") in trained
        else:
            config = load_config(given["config"], given["overrides"])
            if name == "train":
                assert config.out not in trained
                trained.add(config.out)
    assert (seen.count("train"), seen.count("prepare"), seen.count("evaluate")) == (3, 1, 14)


def test_a_wrong_command_would_be_found():
    with pytest.raises(Exception, match="--protocl"):
        parse(commands("mlmjax evaluate --model m --task mmlu --protocl p")[0])
    assert commands("for i in 1 2; do\n  echo in $i | mlmjax train a.toml x=$i\ndone") == [
        ("mlmjax", ["train", "a.toml", "x=1"], "in 1\n"),
        ("mlmjax", ["train", "a.toml", "x=2"], "in 2\n"),
    ]


def test_the_published_figures_are_there():
    for figure in ("43.06", "17.16", "53.31", "85.53", "20.62", "84.67", "61.13", "41.83", "37.07"):
        assert figure in PAGE


ROWS = {
    "sst2": ({"sentence": "a fine film "}, "a fine film "),
    "sst5": ({"text": "a fine film"}, "a fine film"),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is wet."},
        "sentence 1: It rains.\nsentence 2: It is wet.",
    ),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_model_is_fine_tuned_on_the_question_it_is_then_asked(name, tokenizer):
    config, task = load_config(ROOT / "configs" / f"finetune_{name}.toml", []), load_task(name)
    row, text = ROWS[name]
    for source in (*config.data.sources, *config.data.validation_sources):
        assert (source.hub, source.subset, source.revision) == (
            task.hub,
            task.subset,
            task.revision,
        )
        assert source.labels == task.labels
        assert source.answer == task.answer
        trained = Template(source.prompt).encode(tokenizer, {**row, "options": task.labels}, 512)
        asked = Template(task.prompt).encode(tokenizer, {"text": text, "options": task.labels}, 512)
        assert trained == asked
    assert config.data.sources[0].split == "train"
    assert all(source.split != task.split for source in config.data.validation_sources)
