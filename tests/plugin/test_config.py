from pathlib import Path

import pytest

import tuneforge as tf
from tuneforge.plugin.config import config_to_dict, config_to_toml, merge_config, read_config_file, resolve_config


def test_flags_override_the_file_which_overrides_the_defaults():
    file = {"seed": 3, "batch-size": 8, "strategy": {"name": "full", "epochs": 2, "lr": 0.1}}
    config = resolve_config(merge_config(file, {"seed": 4, "strategy": {"name": "full", "epochs": "5"}}))
    assert (config.seed, config.batch_size, config.num_workers) == (4, 8, 0)
    assert config.strategy == tf.use("full", epochs="5", lr=0.1)


def test_another_component_drops_the_files_options():
    config = resolve_config(
        merge_config({"strategy": {"name": "full", "epochs": 2}}, {"strategy": {"name": "head-only"}})
    )
    assert config.strategy == tf.use("head-only")


def test_repeated_components_are_joined_by_name():
    config = resolve_config(
        merge_config(
            {"callback": [{"name": "ema", "decay": 0.9}]},
            {"callback": [{"name": "grad-clip"}, {"name": "ema", "decay": 0.5}]},
        )
    )
    assert config.callbacks == (tf.use("ema", decay=0.5), tf.use("grad-clip"))


def test_a_written_file_reads_back_equal(tmp_path):
    config = resolve_config(
        {
            "seed": 7, "out": "somewhere", "data": {"name": "digits", "other-share": 0.1},
            "strategy": {"name": "full", "patience": None, "lr": 0.5}, "callback": ["ema"], "schedule": "cosine",
        }
    )  # fmt: skip
    path = tmp_path / "run.toml"
    path.write_text(config_to_toml(config))
    again = resolve_config(read_config_file(path))
    assert config_to_dict(again) == config_to_dict(config)
    assert again.out == Path("somewhere")


def test_an_unknown_key_offers_the_nearest(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("batch_sise = 3\n")
    with pytest.raises(tf.UnknownNameError, match="did you mean 'batch-size'"):
        read_config_file(path)


def test_a_file_that_is_not_toml_is_an_error_with_the_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = = 3\n")
    with pytest.raises(tf.UsageError, match="line 1"):
        read_config_file(path)


def test_a_setting_out_of_range_names_its_flag():
    with pytest.raises(tf.OptionError, match="--batch-size"):
        resolve_config({"batch-size": 0})


def test_a_file_may_name_no_component_for_its_options_where_there_is_a_default():
    assert resolve_config({"strategy": {"epochs": 2}}).strategy == tf.use("freeze-then-unfreeze", epochs=2)


def test_options_of_a_component_without_a_name_are_an_error():
    with pytest.raises(tf.UsageError, match="no name"):
        resolve_config({"schedule": {"warmup": 0.1}})
