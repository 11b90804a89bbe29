"""Recipes: presets, --set, unknown keys, values out of range."""

import subprocess
import sys

import pytest

from trivium.runtime.errors import ConfigError
from trivium.train.recipe import keys, load_recipe, presets


@pytest.mark.parametrize("name", ["demo", "fashion-mnist", "imagefolder", "renditions"])
def test_presets_are_valid(name):
    assert name in presets()
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.heads.names == ["clean", "robust", "combined"]


def test_set_reaches_nested_keys_and_takes_yaml_values():
    recipe = load_recipe(
        "demo",
        ["student.schedule.epochs=7", "student.schedule.lr=1e-2", "heads.names=[combined]", "teacher=null", "seed=3"],
    )
    assert recipe.student is not None
    assert recipe.student.schedule.epochs == 7
    assert recipe.student.schedule.lr == 0.01
    assert recipe.heads.names == ["combined"]
    assert recipe.teacher is None
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("student.schedule.epoch=3", "student.schedule.epochs"),
        ("head.depth=1", "heads"),
        ("student.schedule.epochs=0", "student.schedule.epochs"),
        ("student.uncertainty=entropie", "student.uncertainty"),
        ("heads.dropout.rate=1", "heads.dropout.rate"),
        ("heads.names=[clean, clean]", "differ"),
        ("shifts.augmix=0.9", "sum to 1"),
        ("original.schedule=null", "needs a schedule"),
        ("data.limit.trian=3", "data.limit.train"),
        ("seed", "key=value"),
        ("seed.x=1", "seed"),
        ("seed=[", "YAML"),
    ],
)
def test_wrong_settings_are_one_line_with_the_key(setting, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("demo", [setting])
    assert "\n" not in str(caught.value)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'student.temperature'; nearest: \S+"):
        load_recipe("demo", ["student.temperature=2"])
    assert "student.tau" in set(keys())


def test_wrong_files_are_one_line(tmp_path):
    for content in ("- a\n- b\n", "a: [", "\xff"):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ConfigError) as caught:
            load_recipe(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="nearest: demo"):
        load_recipe("dem")
    with pytest.raises(ConfigError, match="unreadable"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_command_prints_the_recipe_and_one_line_for_a_mistake():
    command = [sys.executable, "-m", "trivium", "train"]
    wrong = subprocess.run([*command, "demo", "--set", "sed=1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines() == [wrong.stderr.strip()]
    assert "nearest: seed" in wrong.stderr


def test_a_recipe_has_one_method():
    assert load_recipe("demo").method == "student"
    with pytest.raises(ConfigError, match=r"give one method out of student.*; there are none$"):
        load_recipe("demo", ["student=null"])


def test_sources_name_heads_that_are_there_and_leave_one_to_train():
    for settings, reason in (
        (["heads.sources={other: run}"], "no head 'other'"),
        (["heads.sources={robust: run}", "heads.tail=shared"], "needs tail: copied"),
        (["heads.names=[robust]", "heads.sources={robust: run}"], "no head is left to train"),
        (["heads.names=[loud]"], "heads.names"),
        (["student.detach_clean=true"], r"student.detach_clean is for heads.tail: shared"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_recipe("demo", settings)


def test_a_date_that_is_none_is_one_line():
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_recipe("demo", ["name=2001-99-99"])
