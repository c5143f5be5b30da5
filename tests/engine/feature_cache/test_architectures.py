"""Freeze-then-unfreeze on twelve families of torchvision; the run's own freeze check verifies the frozen tensors."""

import pytest
import torch

import tuneforge as tf
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.engine.feature_cache import build as feature_cache_build

FAMILIES = {
    "resnet18": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "convnext_tiny": 64, "swin_t": 64,
    "densenet121": 64, "regnet_y_400mf": 64, "googlenet": 64, "squeezenet1_1": 64, "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64, "vit_b_32": 224,
}  # fmt: skip


def noise(count, side, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return tf.Split(pictures, torch.arange(count) % 3)


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_freeze_then_unfreeze_runs_on(arch, tmp_path, monkeypatch):
    free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)  # six images are not worth a trace
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)
    side = FAMILIES[arch]
    data = tf.Data(
        train=noise(6, side, 0), val=noise(3, side, 1), test=noise(3, side, 2),
        inputs=ImageInputs(ops=(f"resize {side}",)), targets=ClassTargets(names=("a", "b", "c")),
    )  # fmt: skip
    kept, said = {}, []

    class Keeps:
        @tf.hookimpl
        def phase_started(self, run):
            kept[run.phase.name] = {name: tensor.clone() for name, tensor in run.model.module.state_dict().items()}

    result = tf.Engine(
        data=data, model=tf.use("torchvision", arch=arch, weights="none"),
        strategy=tf.use("freeze-then-unfreeze", head_epochs=2, epochs=1, average=False), refit=False,
        batch_size=3, callbacks=[Keeps()], page=False, out=tmp_path / "run", log=said.append,
    ).run()  # fmt: skip
    (_, head), (_, both) = result.strategy_steps
    moved = [name for name, tensor in kept["all"].items() if not torch.equal(tensor, kept["head"][name])]
    assert moved
    assert [line for line in said if line.strip().startswith("feature cache: on")], said
    assert set(moved) <= set(result.model.group_infos()[-1].parameter_names)
    assert head.num_frozen > 100 * head.num_trainable
    assert both.num_frozen == 0
    assert result.model.head_module().weight.shape[0] == 3
