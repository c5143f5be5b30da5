"""Errors in Python speak of Python, errors of the command line of flags."""

import pytest

import tuneforge as tf
from tuneforge.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": "image-folder"}, 'use("image-folder", path=...) is required'),
        ({"data": tf.use("image-folder", path="x", size="huge")}, 'use("image-folder", size=...)'),
        ({"strategy": tf.use("head-only", epochs=0)}, 'use("head-only", epochs=...)'),
        ({"callbacks": [tf.use("ema", speed=1)]}, 'use("ema", speed=...)'),
        ({"model": "digit-cn"}, "Engine(model=...)"),
        ({"callbacks": ["emu"]}, "Engine(callbacks=...)"),
    ],
)
def test_error_shows_how_python_gives_the_value(arguments, words):
    with pytest.raises(tf.TuneforgeError) as caught:
        tf.Engine(**arguments)
    assert words in str(caught.value)
    assert "--" not in str(caught.value)


def test_error_of_the_command_line_names_the_flag(capsys):
    assert main(["run", "--data", "image-folder"]) == 2
    assert "--data.path is required" in capsys.readouterr().err
