"""Recipes are strict: a key that nobody reads is an error that says where it belongs (case A27)."""

import subprocess
import sys
from pathlib import Path

import pytest

from ditkit.cli import main as cli
from ditkit.cli.train import split_settings, with_settings
from ditkit.core.errors import ConfigError, DitkitError
from ditkit.train.recipe import Recipe, differences, dump_recipe, load_recipe, recipes

A27 = "learning_rate: 1e-3\ntrain:\n  num-epochs: 2\nlora:\n  ranl: 4\nbackbone: {name: dit}\n"


@pytest.mark.parametrize(
    "text", [A27, A27.replace("train:\n  num-epochs: 2", "train.num-epochs: 2").replace("lora:\n  ranl: 4", "lora.ranl: 4")]
)
def test_a27_each_key_is_named_with_its_section_and_the_nearest_name(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "'learning_rate' (it belongs in section 'trainer'" in message
    assert "'train.num-epochs' (section 'trainer': did you mean 'steps'?" in message
    assert "'lora.ranl' (the config of 'lora': did you mean 'rank'?" in message
    assert not (tmp_path / "run").exists()


def test_a27_numbers_in_exponent_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("backbone: {name: dit}\ntrainer: {learning_rate: 1e-3}\n")
    assert load_recipe(path).trainer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"trainer": {"learning-rate": 1e-3}}, ("trainer.learning-rate", "'learning_rate'")),
        ({"trainer": {"stpes": 3}}, ("trainer.stpes", "'steps'")),
        ({"trainer": {"steps": "many"}}, ("trainer.steps", "many")),
        ({"trainer": {"batch_size": 10, "accumulation": 3}}, ("batch_size 10", "accumulation 3")),
        ({"trainer": {"compile": "step", "activation_checkpointing": "full"}}, ("block by block",)),
        ({"trainer": {"keep": 1}}, ("trainer.keep", "2")),
        ({"base": "runs/digits"}, ("base", "backbone")),
        ({"batch": 3}, ("'batch'", "trainer.batch_size")),
    ],
)
def test_mistakes_are_named(values: dict, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.parse({"backbone": {"name": "dit"}, **values})
    assert all(name in str(error.value) for name in names)


def test_the_process_comes_with_the_base() -> None:
    with pytest.raises(ConfigError, match="process comes with the base"):
        Recipe.parse({"base": "runs/digits", "process": {"name": "flow"}})


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_recipe("digit")


@pytest.mark.parametrize("name", recipes())
def test_recipes_of_the_package_survive_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.claim
    path = tmp_path / "again.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_values_on_the_command_line() -> None:
    plain, settings = split_settings(
        ["digits", "--trainer.steps", "20", "--trainer.batch-size=4", "--no-resume", "--backbone.config.depth", "1", "--out", "x"]
        + ["--trainer.betas", "[0.8, 0.9]", "--trainer.learning_rate", "1e-3"]
    )
    recipe = with_settings(load_recipe("digits"), settings)
    assert plain == ["digits", "--no-resume", "--out", "x"]
    assert (recipe.trainer.steps, recipe.trainer.batch_size, recipe.trainer.betas) == (20, 4, (0.8, 0.9))
    assert recipe.trainer.learning_rate == 1e-3
    assert recipe.backbone is not None
    assert recipe.backbone.config["depth"] == 1
    assert recipe.backbone.config["dim"] == load_recipe("digits").backbone.config["dim"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.stpes", "5"], "did you mean 'steps'"),
        (["--steps", "5"], "trainer.steps"),
        (["--trainer.steps"], "no value"),
        (["--trainer.steps.more", "5"], "no section"),
        (["--trainer.betas", "[1"], "--trainer.betas"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(DitkitError, match=message):
        with_settings(load_recipe("digits"), split_settings(["digits", *argv])[1])


def test_differences_are_dotted() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "e": 1}) == ["a.c", "d", "e"]


def test_recipes_and_the_help_need_no_torch() -> None:
    code = "import sys, ditkit.cli.train as t; t.describe(); t.load_recipe('digits'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
