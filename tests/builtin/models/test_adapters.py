"""Adapters: what they change, what they keep bit-identically, and what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from tuneforge import LayerGroup, Model, PluginError
from tuneforge.builtin.models.adapters import Dropout, Head, InputChannels
from tuneforge.engine.model.freezing import select


def run_of(*labels: str, size: int | None = None, seed: int = 0) -> Any:
    targets = SimpleNamespace(num_outputs=len(labels) if size is None else size, labels=labels)
    return SimpleNamespace(config=SimpleNamespace(seed=seed), data=SimpleNamespace(targets=targets), restoring=False)


def small(labels: str = "abcd", *, head: nn.Module | None = None) -> Model:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU())
    module = nn.Sequential()
    module.add_module("body", body)
    module.add_module("fc", head or nn.Linear(5, len(labels)))
    groups = [LayerGroup("body", ("body",)), LayerGroup("head", ("fc",))]
    return Model(module, groups=groups, head="fc", labels=tuple(labels), pretrained_labels=tuple(labels))


def test_rows_of_shared_names_are_kept_bit_identical_in_any_order() -> None:
    model = small("abcd")
    old = model.module.fc
    adapted = Head().model_adapt(run_of("d", "x", "b"), model)
    new = adapted.module.fc
    assert torch.equal(new.weight[[0, 2]], old.weight[[3, 1]])
    assert torch.equal(new.bias[[0, 2]], old.bias[[3, 1]])
    assert new.bias[1] == 0
    assert 0 < new.weight[1].abs().max() < 0.06
    assert (adapted.labels, adapted.pretrained_labels) == (("d", "x", "b"), ("d", "b"))
    assert adapted.changes == ("head: 4 -> 3 outputs, kept the rows of 'd', 'b'; randomly initialized: 'x'",)


def test_the_sentence_abridges_long_lists() -> None:
    labels = "0123456789ABC"
    adapted = Head().model_adapt(run_of(*"0123456789", "other"), small(labels))
    assert adapted.changes == (
        "head: 13 -> 11 outputs, kept the rows of '0', '1', '2', '3', '4' and 5 more; randomly initialized: 'other'",
    )


def test_a_head_that_fits_by_name_and_size_is_left_alone() -> None:
    model = small("ab")
    adapted = Head().model_adapt(run_of("a", "b"), model)
    assert adapted.module.fc is model.module.fc
    assert adapted.changes == ()


def test_a_head_of_the_right_size_whose_names_are_not_known_is_taken_at_its_word() -> None:
    model = small("", head=nn.Linear(5, 2))
    head = model.module.fc
    adapted = Head().model_adapt(run_of("a", "b"), model)
    assert adapted.module.fc is head
    assert (adapted.labels, adapted.pretrained_labels, adapted.changes) == (("a", "b"), ("a", "b"), ())


def test_the_same_names_in_another_order_are_put_in_order() -> None:
    model = small("ab")
    old = model.module.fc.weight
    adapted = Head().model_adapt(run_of("b", "a"), model)
    assert torch.equal(adapted.module.fc.weight, old.flip(0))
    assert adapted.changes == ("head: 2 -> 2 outputs, kept the rows of 'b', 'a'",)


@pytest.mark.parametrize(("model_labels", "run"), [("xyz", run_of("a", "b")), ("ab", run_of(size=2))])
def test_without_shared_names_every_row_is_randomly_initialized(model_labels: str, run: Any) -> None:
    model = small(model_labels, head=nn.Linear(5, 2))
    old = model.module.fc.weight
    adapted = Head().model_adapt(run, model)
    assert not (adapted.module.fc.weight == old).any()
    assert adapted.pretrained_labels == ()
    assert adapted.changes == ("head: 2 -> 2 outputs, all randomly initialized",)


def test_numbers_without_names_keep_a_head_of_the_same_size() -> None:
    model = small("", head=nn.Linear(5, 2))
    head = model.module.fc
    assert Head().model_adapt(run_of(size=2), model).module.fc is head


def test_keeping_can_be_turned_off() -> None:
    assert Head(keep=False).model_adapt(run_of("a", "x"), small("ab")).pretrained_labels == ()


def test_random_rows_depend_on_the_seed_and_use_no_global_generator() -> None:
    def fresh(seed: int) -> torch.Tensor:
        weight: torch.Tensor = Head().model_adapt(run_of("x", "y", seed=seed), small()).module.fc.weight
        return weight

    state = torch.get_rng_state()
    first = fresh(1)
    small()
    assert torch.equal(fresh(1), first)
    assert not torch.equal(fresh(2), first)
    torch.set_rng_state(state)


def test_a_1x1_convolution_is_a_head_too() -> None:
    conv = nn.Conv2d(5, 4, 1)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), conv)
    model = Model(module, groups=[LayerGroup("0", ("0",)), LayerGroup("head", ("1",))], head="1", labels=tuple("abcd"))
    adapted = Head().model_adapt(run_of("c", "new"), model)
    assert torch.equal(adapted.module[1].weight[0], conv.weight[2])
    assert adapted.module(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 6, 6)


def test_a_head_without_bias_stays_without() -> None:
    adapted = Head().model_adapt(run_of("a", "x"), small("ab", head=nn.Linear(5, 2, bias=False)))
    assert adapted.module.fc.bias is None


@pytest.mark.parametrize("head", [nn.LSTM(5, 2), nn.Conv2d(5, 2, 3)])
def test_another_kind_of_head_is_an_error(head: nn.Module) -> None:
    with pytest.raises(PluginError, match="only a linear layer or a 1x1 convolution can be resized"):
        Head().model_adapt(run_of("x"), small("ab", head=head))


def conv_model(channels: int) -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6 * 16, 2))
    return Model(module, groups=[LayerGroup("conv", ("0",)), LayerGroup("head", ("2",))], head="2")


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4), (4, 3), (1, 5), (3, 2)])
def test_outputs_for_grayscale_images_stay_the_same(old: int, new: int) -> None:
    model = conv_model(old)
    gray = torch.rand(2, 1, 8, 8)
    before = model.module(gray.expand(2, old, 8, 8))
    adapted = InputChannels(channels=new).model_adapt(run_of(), model)
    torch.testing.assert_close(adapted.module(gray.expand(2, new, 8, 8)), before, atol=1e-6, rtol=1e-5)
    assert adapted.changes == (f"input: {old} -> {new} channels ('0')",)
    assert adapted.module[0].stride == (2, 2)


def test_more_channels_keep_the_old_ones_apart() -> None:
    weight = conv_model(3).module[0].weight.detach()
    widened = InputChannels(channels=4).model_adapt(run_of(), conv_model(3)).module[0].weight
    torch.testing.assert_close(widened[:, :3], weight * 0.75)
    torch.testing.assert_close(widened[:, 3], weight.mean(1) * 0.75)


class PaddedConv(nn.Conv2d):
    """A convolution that does more than its options say."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(images, (1, 1, 1, 1)))


def test_a_subclass_of_convolution_keeps_its_behavior() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(PaddedConv(3, 6, 3, stride=2), nn.Flatten(), nn.Linear(6 * 16, 2))
    model = Model(module, groups=[LayerGroup("conv", ("0",)), LayerGroup("head", ("2",))], head="2")
    gray = torch.rand(2, 1, 8, 8)
    before = module(gray.expand(2, 3, 8, 8))
    adapted = InputChannels(channels=1).model_adapt(run_of(), model)
    torch.testing.assert_close(adapted.module(gray), before, atol=1e-6, rtol=1e-5)
    assert adapted.module[0].in_channels == 1


def test_a_fitting_input_is_left_alone() -> None:
    model = conv_model(3)
    assert InputChannels(channels=3).model_adapt(run_of(), model) is model


def test_a_model_that_rescales_its_input_by_itself_is_an_error() -> None:
    module = models.googlenet(aux_logits=False, init_weights=False, transform_input=True)
    with pytest.raises(PluginError, match="needs three channels"):
        InputChannels().model_adapt(run_of(), Model.from_module(module, head="fc"))


def test_a_model_without_convolution_is_an_error() -> None:
    with pytest.raises(PluginError, match="has no convolution"):
        InputChannels().model_adapt(run_of(), small())


def test_dropout_stands_before_the_head_and_its_group_keeps_the_parameters() -> None:
    model = small("ab")
    adapted = Dropout(p=0.25).model_adapt(run_of(), model)
    assert adapted.head == "fc.1"
    assert select(adapted, ["head"]) == ["fc.1.weight", "fc.1.bias"]
    assert adapted.changes == ("dropout: 0.25 of the features before 'fc'",)
    inputs = torch.rand(3, 6)
    assert torch.equal(adapted.module.eval()(inputs), small("ab").module.eval()(inputs))
    assert not torch.equal(adapted.module.train()(inputs), adapted.module.eval()(inputs))


def test_a_head_behind_dropout_can_still_be_resized() -> None:
    adapted = Head().model_adapt(run_of("b", "x", "y"), Dropout().model_adapt(run_of(), small("ab")))
    assert adapted.module(torch.rand(1, 6)).shape == (1, 3)
    assert isinstance(adapted.module.fc[0], nn.Dropout)
    assert len(adapted.changes) == 2


@pytest.mark.parametrize("adapter", [Head(), InputChannels(), Dropout()], ids=repr)
def test_an_adapter_without_a_model_is_an_error(adapter: Any) -> None:
    with pytest.raises(PluginError, match="got no model"):
        adapter.model_adapt(run_of("a", "b"), None)
