"""The augmentation that suits the data is used unless the user names another."""

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf


@tf.component(api=1)
class JitteredData:
    """Tiny data that suggests an augmentation."""

    @tf.hookimpl
    def data_prepare(self):
        return attrs.evolve(tiny_data(), augment=(tf.use("tiny:GaussianJitter"),))


def weights_and_lines(out, data, **given):
    lines = []
    plan = [tf.Phase("all", epochs=2)]
    result = tf.Engine(data=data, model=tiny_net(), strategy=plan, out=out, page=False, log=lines.append, **given).run()
    return torch.cat([each.detach().flatten() for each in result.model.module.parameters()]), lines


def test_data_says_which_augmentation_is_used_and_the_user_overrides_it(tmp_path):
    by_default, lines = weights_and_lines(tmp_path / "default", JitteredData())
    named, named_lines = weights_and_lines(tmp_path / "named", tiny_data(), augment=["tiny:GaussianJitter"])
    off, off_lines = weights_and_lines(tmp_path / "off", JitteredData(), augment=["none"])
    plain, _ = weights_and_lines(tmp_path / "plain", tiny_data())
    assert torch.equal(by_default, named)
    assert torch.equal(off, plain)
    assert not torch.equal(named, plain)
    said = "augmentation: tiny:GaussianJitter (the default of this data; --augment none trains without)"
    assert said in lines
    assert not any(line.startswith("augmentation") for line in named_lines + off_lines)


def test_no_augmentation_and_another_contradict(tmp_path):
    with pytest.raises(tf.UsageError, match="--augment none is given together"):
        tf.Engine(data=tiny_data(), augment=["none", "flip"])


def test_digits_are_augmented_by_slight_rotations_and_shifts():
    from tiny import StubRun

    from tuneforge.builtin.datasets.demo.digits import Digits

    assert [spec.name for spec in Digits().data_prepare(StubRun).augment] == ["rotate", "shift"]
