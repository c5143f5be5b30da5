from pathlib import Path
from typing import Literal

import attrs
import pytest

import tuneforge as tf
from tuneforge.plugin.declaration import (
    build_component,
    build_json_schema,
    get_option_values,
    get_options,
    parse_option,
)


@tf.component(api=1)
class Every:
    """One option of every type."""

    count: int = tf.option(default=1, help="A count.", check=tf.ge(1))
    rate: float = tf.option(default=0.5, help="A rate.", check=tf.between(0, 1))
    word: str = tf.option(default="x", help="A word.")
    flag: bool = tf.option(default=False, help="A flag.")
    path: Path | None = tf.option(default=None, help="A path.")
    choice: Literal["red", "blue"] = tf.option(default="red", help="A colour.")
    many: tuple[int, ...] = tf.option(default=(), help="Numbers.")
    table: dict[str, float] = tf.option(default={}, help="Numbers by name.")


@tf.component(api=1)
class Needs:
    """One option without a default."""

    path: Path = tf.option(help="Where.")


def test_text_is_parsed_to_the_type_of_the_option():
    texts = {
        "count": "3", "rate": "0.25", "word": "7", "flag": "yes", "path": "/a", "choice": "blue", "many": "1,2",
        "table": "a=1,b=2.5",
    }  # fmt: skip
    assert get_option_values(build_component(Every, texts, where="--x")) == {
        "count": 3, "rate": 0.25, "word": "7", "flag": True, "path": "/a", "choice": "blue", "many": (1, 2),
        "table": {"a": 1.0, "b": 2.5},
    }  # fmt: skip


def test_dashes_and_underscores_name_the_same_option():
    @tf.component(api=1)
    class Two:
        head_epochs: int = tf.option(default=1, help="Epochs.")

    assert (
        build_component(Two, {"head-epochs": 2}, where="--x").head_epochs
        == build_component(Two, {"head_epochs": 2}, where="--x").head_epochs
        == 2
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "x"),
        ("count", 1.5),
        ("count", True),
        ("rate", "nan"),
        ("flag", "maybe"),
        ("flag", 1),
        ("choice", "green"),
        ("many", "1,b"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_quotes_it(name, value):
    with pytest.raises(tf.OptionError) as caught:
        parse_option(get_options(Every)[name], value, where=f"--x.{name}")
    assert repr(value) in str(caught.value)
    assert f"--x.{name}" in str(caught.value)


def test_python_constructors_check_the_same_rules():
    with pytest.raises(tf.OptionError, match="out of range"):
        Every(count=0)
    with pytest.raises(tf.OptionError, match="must be of type: number"):
        Every(rate="fast")
    assert Every(many=[1, 2]).many == (1, 2)


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(tf.UnknownNameError, match="did you mean 'count'"):
        build_component(Every, {"cuont": 1}, where="--x")


def test_a_missing_required_option_says_how_to_give_it():
    with pytest.raises(tf.OptionError, match="give --data.path VALUE"):
        build_component(Needs, {}, where="--data")


def test_options_are_read_only_and_instances_compare_by_identity():
    one = Every()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.count = 2
    assert one != Every()
    assert len({one, Every()}) == 2


def test_the_schema_holds_types_checks_and_defaults():
    schema = build_json_schema(Every)
    assert schema["properties"]["count"] == {"description": "A count.", "type": "integer", "minimum": 1, "default": 1}
    assert schema["properties"]["choice"]["enum"] == ["red", "blue"]
    assert schema["required"] == []
    assert build_json_schema(Needs)["required"] == ["path"]


def test_a_field_without_option_is_refused_by_the_decorator():
    with pytest.raises(tf.OptionError, match="option"):

        @tf.component(api=1)
        class Bad:
            x: int = 3


def test_the_name_option_is_reserved_for_files():
    with pytest.raises(tf.OptionError, match="reserved"):

        @tf.component(api=1)
        class Bad:
            name: str = tf.option(default="a", help="A name.")
