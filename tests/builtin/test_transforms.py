"""Augmentation: what each part does to a sample, and that it depends on the sample alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from scipy.stats import beta as scipy_beta
from torch import Tensor

from tuneforge import Batch, SampleRNG, UsageError
from tuneforge.builtin.photo_transforms import ColorJitter, Photo, RandomResizedCrop
from tuneforge.builtin.transforms import Erase, Flip, MixUp, Rotate, Shift, uniform_to_beta

RUN = SimpleNamespace(data=SimpleNamespace(targets=SimpleNamespace(num_outputs=4)))
ROWS = torch.arange(64)
IMAGES = torch.rand(64, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def batch_of(rows: Tensor, *, images: Tensor = IMAGES, epoch: int = 0, seed: int = 1) -> Batch:
    return Batch(images[rows], rows % 4, rows, None, SampleRNG(seed, epoch, rows))


class Fixed:
    """Noise of one given number, in every stream."""

    def __init__(self, number: float) -> None:
        self.number = number

    def uniform(self, stream: str, *shape: int) -> Tensor:
        return torch.full((1, *shape), self.number)


def one_with(noise: Any, image_chw: Tensor) -> Batch:
    return Batch(image_chw[None], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), None, noise)


PARTS = [
    Flip(),
    Flip(axis="vertical"),
    Rotate(degrees=30),
    Shift(share=0.3),
    Erase(p=0.8),
    RandomResizedCrop(),
    ColorJitter(),
    Photo(),
]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_augmentation_of_a_sample_is_bit_identical_in_any_batch(part: Any) -> None:
    whole = part.augment(RUN, batch_of(ROWS)).inputs
    few = torch.tensor([40, 3, 17])
    assert torch.equal(part.augment(RUN, batch_of(few)).inputs, whole[few])
    assert torch.equal(part.augment(RUN, batch_of(few[:1])).inputs, whole[few[:1]])


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_epoch_and_seed_change_the_draw_and_nothing_else_does(part: Any) -> None:
    torch.manual_seed(0)
    first = part.augment(RUN, batch_of(ROWS)).inputs
    torch.manual_seed(1)
    assert torch.equal(part.augment(RUN, batch_of(ROWS)).inputs, first)
    assert not torch.equal(part.augment(RUN, batch_of(ROWS, epoch=1)).inputs, first)
    assert not torch.equal(part.augment(RUN, batch_of(ROWS, seed=2)).inputs, first)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_the_stored_images_are_not_written_to(part: Any) -> None:
    before = IMAGES.clone()
    part.augment(RUN, batch_of(ROWS))
    assert torch.equal(IMAGES, before)


def test_flip_mirrors_samples_with_its_probability() -> None:
    flipped = Flip(p=0.25).augment(RUN, batch_of(ROWS)).inputs
    mirrored = (flipped == IMAGES.flip(-1)).flatten(1).all(1)
    kept = (flipped == IMAGES).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 8 <= int(mirrored.sum()) <= 26


def test_flip_vertical_swaps_top_and_bottom() -> None:
    image = IMAGES[0]
    assert torch.equal(Flip(p=1.0, axis="vertical").augment(RUN, one_with(Fixed(0.5), image)).inputs[0], image.flip(-2))


def test_rotation_by_a_right_angle_turns_a_square_image() -> None:
    image = IMAGES[0, :, :12, :12]
    turned = Rotate(degrees=90).augment(RUN, one_with(Fixed(1.0), image)).inputs[0]
    torch.testing.assert_close(turned, torch.rot90(image, 1, (1, 2)), atol=1e-5, rtol=0)


def test_rotation_keeps_a_disc_round_in_a_wide_image() -> None:
    y, x = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(41.0) - 20, indexing="ij")
    disc = torch.exp(-(x**2 + y**2) / 12)[None]
    turned = Rotate(degrees=40).augment(RUN, one_with(Fixed(1.0), disc)).inputs[0]
    torch.testing.assert_close(turned, disc, atol=0.03, rtol=0)


def test_half_a_draw_neither_turns_nor_moves() -> None:
    for part in (Rotate(degrees=40), Shift(share=0.4)):
        torch.testing.assert_close(part.augment(RUN, one_with(Fixed(0.5), IMAGES[0])).inputs[0], IMAGES[0])


def test_shift_moves_by_a_share_of_each_side_and_continues_the_border() -> None:
    moved = Shift(share=0.25).augment(RUN, one_with(Fixed(1.0), IMAGES[0])).inputs[0]
    torch.testing.assert_close(moved[:, 3:, 5:], IMAGES[0, :, :-3, :-5], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, 3:, :5], IMAGES[0, :, :-3, :1].expand(-1, -1, 5), atol=1e-5, rtol=0)


def test_erase_paints_one_rectangle_of_the_asked_area_with_the_samples_mean() -> None:
    erased = Erase(p=1.0, low=0.1, high=0.3).augment(RUN, batch_of(ROWS)).inputs
    changed = (erased != IMAGES).all(1)
    for image, before, inside in zip(erased, IMAGES, changed, strict=True):
        rows, columns = inside.any(1), inside.any(0)
        assert int(inside.sum()) == int(rows.sum()) * int(columns.sum())
        assert 0.05 < int(inside.sum()) / 240 < 0.4
        torch.testing.assert_close(image[:, inside], before.mean((1, 2))[:, None].expand(-1, int(inside.sum())))


def test_erase_leaves_about_three_in_four_alone_by_default() -> None:
    erased = Erase().augment(RUN, batch_of(ROWS)).inputs
    assert 6 <= int((erased != IMAGES).flatten(1).any(1).sum()) <= 26


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.0, 4.0])
def test_mixing_shares_follow_the_beta_distribution(alpha: float) -> None:
    uniform = torch.linspace(0, 0.9999, 999)
    expected = torch.from_numpy(scipy_beta.ppf(uniform.double().numpy(), alpha, alpha)).float()
    torch.testing.assert_close(uniform_to_beta(uniform, alpha=alpha), expected, atol=2e-4, rtol=0)


def test_mix_up_mixes_images_and_classes_with_the_next_row() -> None:
    batch = batch_of(torch.tensor([5, 10, 23]))
    own = uniform_to_beta(batch.rng.uniform("mix-up"), alpha=0.4)
    mixed = MixUp(alpha=0.4).augment(RUN, batch)
    for place, (row, partner) in enumerate([(5, 10), (10, 23), (23, 5)]):
        share = own[place]
        torch.testing.assert_close(mixed.inputs[place], share * IMAGES[row] + (1 - share) * IMAGES[partner])
        expected = torch.zeros(4)
        expected[row % 4] += share
        expected[partner % 4] += 1 - share
        torch.testing.assert_close(mixed.targets[place], expected)


def test_mix_up_with_weights_gives_the_loss_of_the_paper() -> None:
    rows, weights = torch.tensor([5, 10, 23]), torch.tensor([0.5, 1.0, 1.5])
    batch = attrs.evolve(batch_of(rows), weights=weights)
    own = uniform_to_beta(batch.rng.uniform("mix-up"), alpha=0.4)
    mixed = MixUp(alpha=0.4).augment(RUN, batch)
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy
    expected = own * weights * loss(logits, rows % 4, reduction="none")
    expected += (1 - own) * weights.roll(-1) * loss(logits, (rows % 4).roll(-1), reduction="none")
    torch.testing.assert_close(mixed.weights * loss(logits, mixed.targets, reduction="none"), expected)


def test_mix_up_mixes_numbers_as_numbers_on_any_float_inputs() -> None:
    rows = torch.tensor([0, 1])
    batch = Batch(torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [20.0]]), rows, None, SampleRNG(0, 0, rows))
    mixed = MixUp(alpha=1.0).augment(RUN, batch)
    torch.testing.assert_close(mixed.targets, 10 + 10 * mixed.inputs)


def test_mix_up_needs_the_inputs_so_features_are_not_cached() -> None:
    assert MixUp.needs_inputs is True


def test_the_image_of_a_mapping_is_changed_and_the_rest_is_kept() -> None:
    mask = torch.ones(3, 5, dtype=torch.int64)
    rows = torch.tensor([0, 1, 2])
    for name in ("image", "pixel_values"):
        batch = attrs.evolve(batch_of(rows), inputs={name: IMAGES[rows], "mask": mask})
        for part in (Flip(p=1.0), MixUp()):
            inputs = part.augment(RUN, batch).inputs
            assert inputs["mask"] is mask
            assert torch.equal(inputs[name], part.augment(RUN, batch_of(rows)).inputs)


@pytest.mark.parametrize("part", [*PARTS, MixUp()], ids=repr)
@pytest.mark.parametrize(
    "inputs", [{"ids": torch.zeros(2, 5)}, torch.zeros(2, 5, dtype=torch.int64), (torch.zeros(2, 3, 4, 4),)], ids=str
)
def test_inputs_without_images_are_an_error_at_once(part: Any, inputs: Any) -> None:
    batch = attrs.evolve(batch_of(torch.tensor([0, 1])), inputs=inputs)
    with pytest.raises(UsageError, match="needs images, and the inputs are"):
        part.augment(RUN, batch)


def test_the_whole_area_leaves_a_square_image_as_it_is() -> None:
    image = torch.rand(3, 8, 8)
    out = RandomResizedCrop(low=1).augment(RUN, one_with(Fixed(0.5), image))
    torch.testing.assert_close(out.inputs[0], image, atol=1e-5, rtol=1e-5)


def test_a_quarter_of_the_area_is_enlarged_to_the_size() -> None:
    image = torch.arange(8.0).repeat(8, 1)[None]
    out = RandomResizedCrop(low=0.25).augment(RUN, one_with(Fixed(0.0), image)).inputs[0]
    height, width = (0.25 * 4 / 3) ** 0.5, (0.25 * 3 / 4) ** 0.5
    columns = ((torch.arange(8) * 2 + 1) / 8 - 1) * width - (1 - width)
    torch.testing.assert_close(out[0, 0], ((columns + 1) * 8 - 1).div(2).clamp(min=0), atol=1e-4, rtol=1e-4)
    assert height <= 1


@pytest.mark.parametrize(("number", "factor"), [(0.0, 0.5), (1.0, 1.5)])
def test_brightness_of_a_gray_image_is_multiplied_on_the_scale_of_pixels(number: float, factor: float) -> None:
    inputs = SimpleNamespace(mean=(0.5,), std=(0.25,))
    run = SimpleNamespace(data=SimpleNamespace(inputs=inputs))
    image = torch.full((3, 4, 4), (0.4 - 0.5) / 0.25)
    out = ColorJitter(strength=0.5).augment(run, one_with(Fixed(number), image)).inputs
    torch.testing.assert_close(out * 0.25 + 0.5, torch.full((1, 3, 4, 4), 0.4 * factor))


def test_no_saturation_makes_an_image_gray() -> None:
    class OnlySaturation:
        def uniform(self, stream: str, *shape: int) -> Tensor:
            return torch.tensor([[0.5, 0.5, 0.0]])

    image = torch.rand(3, 5, 5)
    out = ColorJitter(strength=1).augment(RUN, one_with(OnlySaturation(), image)).inputs[0]
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    torch.testing.assert_close(out, luma.expand(3, 5, 5))
