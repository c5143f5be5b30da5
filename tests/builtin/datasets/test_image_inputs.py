"""Images: what is read, how it is stored, what a model takes, and what is refused."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tuneforge import DataError, OptionError
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.images.image_sources import ImageArraySource, ImageFileSource
from tuneforge.builtin.datasets.images.preprocess import ImageOp, choose_jpeg_scale, compute_output_size
from tuneforge.plugin.declaration import build_component, get_option_values

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)  # height 6, width 5


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def image(path: Path) -> Path:
    path.write_bytes(encoded(Image.fromarray(COLORS), "PNG"))
    return path


def chw(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(array).transpose(2, 0, 1)))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_very_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    stored = ImageInputs().decode(encoded(Image.fromarray(COLORS), kind, **options))
    assert torch.equal(stored, chw(COLORS))


def test_path_text_bytes_image_and_array_give_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(COLORS)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image, "PNG"))
    raws = [path, str(path), path.read_bytes(), image, COLORS]
    assert all(torch.equal(ImageInputs().decode(raw), chw(COLORS)) for raw in raws)


def test_a_jpeg_comes_out_as_pil_decodes_it() -> None:
    data = encoded(Image.fromarray(COLORS), "JPEG", quality=95)
    assert torch.equal(ImageInputs().decode(data), chw(np.array(Image.open(io.BytesIO(data)))))


def test_a_far_larger_jpeg_is_shrunk_alike_each_time_and_to_nearly_the_same() -> None:
    smooth = np.linspace(0, 255, 512 * 384 * 3).reshape(512, 384, 3).astype(np.uint8)
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    inputs = ImageInputs(ops=("resize 32x32",))
    stored, whole = inputs.decode(data), inputs.decode(np.array(Image.open(io.BytesIO(data))))
    assert torch.equal(stored, inputs.decode(data))
    assert (stored.float() - whole.float()).abs().max() <= 4


def test_an_image_handed_over_is_left_as_it_was() -> None:
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (512, 512)), "JPEG")))
    ImageInputs(ops=("grayscale", "resize 8")).decode(image)
    assert (image.size, image.mode) == ((512, 512), "RGB")


def test_the_first_frame_of_a_gif_is_taken() -> None:
    frames = [Image.new("P", (4, 4), value) for value in (0, 1)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 200, 100, 50])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert ImageInputs().decode(data)[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.kron(np.array([[0, 255], [128, 60], [200, 30]], np.uint8), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    stored = ImageInputs(ops=("grayscale",)).decode(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert stored.shape[1:] == ((32, 48) if orientation > 4 else (48, 32))
    assert torch.equal(stored[0], torch.from_numpy(np.array(upright)))


def test_transparent_parts_are_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    assert ImageInputs().decode(encoded(Image.fromarray(pixels), "PNG"))[:, 0].T.tolist() == [[10, 20, 30], [255] * 3]
    gray = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8))
    assert ImageInputs(ops=("grayscale",)).decode(encoded(gray, "PNG"))[0, 0].tolist() == [0, 255]


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 90, 90, 90])
    data = encoded(image, "PNG", transparency=bytes([0, 255]))
    assert ImageInputs().decode(data)[:, 0].T.tolist() == [[255] * 3, [90] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    assert ImageInputs(ops=("grayscale",)).decode(encoded(image, kind))[0, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_and_cmyk_images_are_read() -> None:
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert ImageInputs(ops=("grayscale",)).decode(encoded(bits, "PNG"))[0, 0].tolist() == [0, 255]
    white = Image.new("CMYK", (16, 16))
    assert ImageInputs().decode(encoded(white, "JPEG")).unique().tolist() == [255]


def test_gray_stores_one_channel_and_colors_three() -> None:
    gray = Image.fromarray(COLORS[..., 0])
    assert ImageInputs().decode(gray).shape == (3, 6, 5)
    assert torch.equal(ImageInputs(ops=("grayscale",)).decode(gray), chw(COLORS[..., 0]))
    luma = ImageInputs(ops=("grayscale",)).decode(COLORS)[0].double()
    expected = torch.from_numpy(COLORS @ np.array([0.2989, 0.587, 0.114]))
    assert (luma - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("ops", "shape"),
    [
        (("resize 8",), (3, 9, 8)),
        (("resize 8x16",), (3, 8, 16)),
        (("pad-to-square",), (3, 6, 6)),
        (("pad-to-square", "resize 32"), (3, 32, 32)),
        (("resize 64", "center-crop 32"), (3, 32, 32)),
        (("center-crop 2x3",), (3, 2, 3)),
        (("grayscale", "invert", "pad-to-square", "resize 8", "resize 32"), (1, 32, 32)),
    ],
)
def test_operations_give_the_shape_they_announce(ops: tuple[str, ...], shape: tuple[int, ...]) -> None:
    inputs = ImageInputs(ops=ops)
    assert inputs.decode(COLORS).shape == shape
    assert inputs.shape in (None, shape)
    assert (inputs.size is None) == (ops in [("resize 8",), ("pad-to-square",)])


def test_invert_swaps_dark_and_light() -> None:
    assert torch.equal(ImageInputs(ops=("invert",)).decode(COLORS), 255 - chw(COLORS))


def test_square_fills_up_with_the_borders_median() -> None:
    image = np.full((4, 2), 7, np.uint8)
    image[1:3, 0] = 200
    stored = ImageInputs(ops=("grayscale", "pad-to-square")).decode(image)[0]
    assert torch.equal(stored[:, 1:3], torch.from_numpy(image))
    assert stored[:, [0, 3]].unique().tolist() == [7]


def test_a_batch_is_prepared_as_each_image_alone() -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (9, 3, 20, 31), dtype=np.uint8))
    inputs = ImageInputs(ops=("grayscale", "pad-to-square", "resize 8", "resize 32"))
    together = inputs.apply_ops(images)
    alone = [inputs.decode(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.equal(together, torch.stack(alone))


def test_ready_normalizes_each_channel() -> None:
    inputs = ImageInputs(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    stored = chw(COLORS)[None]
    ready = inputs.preprocess(stored)
    mean, std = torch.tensor(inputs.mean).double(), torch.tensor(inputs.std).double()
    expected = (stored.double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert ready.dtype == torch.float32
    torch.testing.assert_close(ready.double(), expected, rtol=0, atol=1e-6)


def test_ready_repeats_gray_and_averages_colors() -> None:
    gray = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert ImageInputs(channels=3).preprocess(gray).tolist() == [[[[0, 1]]] * 3]
    colors = torch.tensor([0, 30, 60], dtype=torch.uint8).reshape(1, 3, 1, 1)
    torch.testing.assert_close(ImageInputs(channels=1).preprocess(colors), torch.full((1, 1, 1, 1), 30 / 255))


def test_ready_does_not_depend_on_the_batch() -> None:
    stored = torch.from_numpy(RNG.integers(0, 256, (7, 1, 13, 17), dtype=np.uint8))
    inputs = ImageInputs(mean=(0.13,), std=(0.31,))
    assert torch.equal(inputs.preprocess(stored)[5:6], inputs.preprocess(stored[5:6]))


def test_options_are_plain_data_that_build_the_same_inputs() -> None:
    inputs = ImageInputs(ops=("grayscale", "resize 32x32"), mean=(0.1,), std=(0.3,))
    again = build_component(ImageInputs, get_option_values(inputs), where="model.json")
    assert get_option_values(again) == get_option_values(inputs)


@pytest.mark.parametrize(
    "op", ["gray", "resize", "resize 0", "resize x8", "invert 3", "crop 3", "resize 8x", "resize -1"]
)
def test_an_unknown_operation_is_refused_with_the_vocabulary(op: str) -> None:
    with pytest.raises(OptionError, match="center-crop HxW"):
        ImageInputs(ops=(op,))


def test_a_mean_for_the_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(DataError, match="2 values of mean or std for 3 channel"):
        ImageInputs(mean=(0.1, 0.2)).preprocess(chw(COLORS)[None])


def test_a_wrong_format_is_refused_though_pil_knows_it() -> None:
    with pytest.raises(DataError, match="cannot decode the image; not an image of a supported format"):
        ImageInputs().decode(encoded(Image.fromarray(COLORS), "TGA"))


def test_a_truncated_file_names_itself_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(encoded(Image.fromarray(np.tile(COLORS, (9, 9, 1))), "PNG")[:200])
    with pytest.raises(DataError) as caught:
        ImageInputs().decode(path)
    assert caught.value.what == f"cannot decode '{path}'"
    assert caught.value.why
    assert "repair or remove it" in caught.value.fix


def test_bounds_hold_before_anything_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(Image.new("1", (4000, 4000)), "PNG"))
    with pytest.raises(DataError, match=r"too large or too long: 4000x4000 pixels"):
        ImageInputs(max_pixels=1000).decode(path)
    with pytest.raises(DataError, match="the limit is 100 bytes"):
        ImageInputs(max_bytes=100).decode(path)


def test_a_decompression_bomb_is_an_error() -> None:
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(DataError, match=r"decompression bomb"):
        ImageInputs().decode(bomb)


def test_a_long_thin_image_cannot_become_a_huge_one() -> None:
    thin = np.zeros((1, 60_000), np.uint8)
    for op in ("pad-to-square", "resize 64"):
        with pytest.raises(DataError, match="too large or too long: 60000x1"):
            ImageInputs(ops=(op,), max_pixels=1_000_000).decode(thin)


@pytest.mark.parametrize("raw", [np.zeros((2, 2)), np.zeros((0, 2), np.uint8), np.zeros((2, 2, 2), np.uint8), 7, [[1]]])
def test_what_is_no_image_is_refused(raw: Any) -> None:
    with pytest.raises(DataError):
        ImageInputs().decode(raw)


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in [
        ("none.png", "cannot read"),
        ("", "is not a file"),
        ("pipe.png", "is not a file"),
        ("\0", "cannot read"),
    ]:
        with pytest.raises(DataError, match=message):
            ImageInputs().decode(str(tmp_path / path))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]), st.data())
def test_any_bytes_decode_to_an_image_or_raise_a_data_error(kind: str, data: st.DataObject) -> None:
    raw = bytearray(encoded(Image.fromarray(COLORS), kind))
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=8)):
        raw[place] = data.draw(st.integers(0, 255))
    try:
        stored = ImageInputs(ops=("grayscale", "resize 8x8"), max_pixels=10_000).decode(bytes(raw))
    except DataError:
        return
    assert stored.shape == (1, 8, 8)


def test_a_image_for_people_is_enlarged_without_smoothing() -> None:
    stored = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    shown = np.array(Image.open(io.BytesIO(ImageInputs().render_image(stored))))
    assert shown.shape == (96, 96)
    assert np.array_equal(shown, np.kron(stored[0].numpy(), np.ones((48, 48), np.uint8)))
    assert Image.open(io.BytesIO(ImageInputs().render_image(chw(np.tile(COLORS, (40, 40, 1)))))).size == (200, 240)


def test_text_tells_kind_and_size() -> None:
    assert ImageInputs().render_text(torch.zeros(1, 8, 9, dtype=torch.uint8)) == "grayscale image, 9x8"
    assert ImageInputs().render_text(torch.zeros(3, 8, 9, dtype=torch.uint8)) == "color image, 9x8"


def test_files_are_fetched_in_the_order_that_is_asked(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(Image.new("L", (3, 3), number), "PNG"))
    source = ImageFileSource(ImageInputs(ops=("grayscale", "resize 3x3")), paths)
    assert source.fetch(torch.tensor([4, 0, 4]))[:, 0, 0, 0].tolist() == [4, 0, 4]
    assert source.select(torch.tensor([5, 2])).fetch(torch.tensor([1]))[0, 0, 0, 0] == 2


def test_many_large_files_decode_the_same_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.bmp" for number in range(12)]
    for path in paths:
        path.write_bytes(encoded(Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)), "BMP"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    inputs = ImageInputs(ops=("resize 16x16",))
    fetched = ImageFileSource(inputs, paths).fetch(torch.arange(12))
    assert torch.equal(fetched, torch.stack([inputs.decode(path) for path in paths]))


def test_broken_files_are_named_and_counted(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(Image.new("L", (3, 3)), "PNG") if number in (0, 2) else b"broken")
    source = ImageFileSource(ImageInputs(ops=("grayscale", "resize 3x3")), paths)
    for act in (lambda: source.fetch(torch.arange(5)), source.check_files):
        with pytest.raises(DataError, match=r"cannot decode '.*1\.png', and 2 more fail"):
            act()


def test_images_of_different_sizes_are_refused_where_no_operation_evens_them_out(tmp_path: Path) -> None:
    for name, size in (("a.png", (3, 3)), ("b.png", (4, 3))):
        (tmp_path / name).write_bytes(encoded(Image.new("L", size), "PNG"))
    with pytest.raises(DataError, match=r"b\.png' is a color image, 4x3, others are 3x3"):
        ImageFileSource(ImageInputs(), [tmp_path / "a.png", tmp_path / "b.png"]).fetch(torch.arange(2))


def test_arrays_are_prepared_when_asked_and_chosen_without_a_copy() -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous()
    source = ImageArraySource(ImageInputs(ops=("resize 8x8",)), images)
    chosen = source.select(torch.tensor([3, 1])).select(torch.tensor([1]))
    assert chosen.images_nchw.data_ptr() == images.data_ptr()
    assert chosen.fetch(torch.tensor([0])).unique().tolist() == [1]
    assert (len(source), len(chosen)) == (5, 1)


def test_the_final_size_is_known_only_where_it_is_the_same_for_all() -> None:
    assert compute_output_size([ImageOp.parse("resize 32")]) is None
    assert compute_output_size([ImageOp.parse("pad-to-square")]) is None
    assert compute_output_size([]) is None
    assert compute_output_size([ImageOp.parse("resize 32"), ImageOp.parse("center-crop 24x16")]) == (24, 16)


def test_ink_is_the_same_whatever_its_ground_margin_and_place() -> None:
    stroke = torch.zeros(40, 20, dtype=torch.uint8)
    stroke[:, 5:12] = 255
    stroke[30:, :] = 200
    inputs = ImageInputs(ops=("grayscale", "crop-to-ink", "resize 8", "resize 32"))
    stored = []
    for ground, ink, place in ((0, 1, (3, 4)), (0, 1, (50, 30)), (255, -1, (20, 60))):
        paper = torch.full((1, 120, 100), ground, dtype=torch.uint8)
        top, left = place
        paper[0, top : top + 40, left : left + 20] = stroke if ink > 0 else 255 - stroke
        stored.append(inputs.apply_ops(paper[None])[0])
    assert stored[0].shape == (1, 32, 32)
    assert torch.equal(stored[0], stored[1])
    assert torch.equal(stored[0], stored[2])


def test_ink_leaves_small_images_and_empty_paper_alone() -> None:
    small = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(ImageInputs(ops=("crop-to-ink",)).apply_ops(small), small)
    assert ImageInputs(ops=("crop-to-ink", "resize 8")).apply_ops(
        torch.zeros(1, 1, 30, 40, dtype=torch.uint8)
    ).shape == (
        1,
        1,
        8,
        8,
    )


@pytest.mark.parametrize(
    ("ops", "height", "width", "margin", "scale"),
    [
        (("resize 224", "center-crop 224"), 750, 1000, 2, 1),
        (("resize 224", "center-crop 224"), 750, 1000, 1, 2),
        (("resize 224", "center-crop 224"), 1800, 1792, 1, 8),
        (("resize 224", "center-crop 224"), 1791, 5000, 1, 8),
        (("resize 224", "center-crop 224"), 1784, 5000, 1, 4),
        (("resize 224", "center-crop 224"), 3000, 4000, 2, 4),
        (("resize 224", "center-crop 224"), 3000, 4000, 0, 1),
        (("resize 100x200",), 1600, 800, 1, 4),
        (("resize 100x200",), 800, 1600, 1, 4),
        (("grayscale", "pad-to-square", "resize 32"), 16, 512, 2, 8),
        (("grayscale", "crop-to-ink", "resize 8", "resize 32"), 2000, 2000, 2, 1),
        (("center-crop 64", "resize 8"), 2000, 2000, 2, 1),
        (("grayscale",), 2000, 2000, 2, 1),
        (("resize 8",), 5, 3000, 1, 1),
    ],
)
def test_a_jpeg_is_reduced_only_where_enough_is_left(
    ops: tuple[str, ...], height: int, width: int, margin: int, scale: int
) -> None:
    assert choose_jpeg_scale(tuple(map(ImageOp.parse, ops)), height, width, margin=margin) == scale


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0, 1, 2]), st.sampled_from([0, 6]))
def test_a_reduced_jpeg_comes_out_at_the_size_of_a_whole_one(height: int, width: int, margin: int, turn: int) -> None:
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    data = encoded(Image.new("RGB", (width, height), (90, 120, 30)), "JPEG", exif=exif)
    for ops in (("resize 8", "center-crop 8"), ("pad-to-square", "resize 8"), ("resize 6x9",)):
        stored, whole = (ImageInputs(ops=ops, jpeg_margin=each).decode(data) for each in (margin, 0))
        assert stored.shape == whole.shape == ImageInputs(ops=ops).apply_ops(whole[None]).shape[1:]
        assert (stored.int() - whole.int()).abs().max() <= 2


def test_the_margin_of_jpegs_is_an_option_that_goes_with_the_model() -> None:
    assert (
        get_option_values(ImageInputs(ops=("resize 8x8",), jpeg_margin=1).with_normalization((0.5,), (0.2,)))[
            "jpeg_margin"
        ]
        == 1
    )


def test_a_check_reads_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(np.tile(COLORS, (60, 60, 1))), "PNG")[:200])
    ImageInputs().check_file(path)
    with pytest.raises(DataError):
        ImageInputs().decode(path)


def test_files_have_a_fingerprint_of_paths_sizes_times_and_operations(tmp_path: Path) -> None:
    paths = [image(tmp_path / f"{number}.png") for number in range(3)]
    inputs = ImageInputs(ops=("resize 8x8",))
    before = ImageFileSource(inputs, paths).fingerprint()
    assert ImageFileSource(inputs, list(map(str, paths))).fingerprint() == before
    assert ImageFileSource(inputs, paths).select(torch.arange(3)).fingerprint() == before
    assert ImageFileSource(inputs, paths[::-1]).fingerprint() != before
    assert ImageFileSource(ImageInputs(ops=("resize 9x9",)), paths).fingerprint() != before
    assert ImageFileSource(ImageInputs(ops=("resize 8x8",), jpeg_margin=1), paths).fingerprint() != before
    status = paths[1].stat()
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ImageFileSource(inputs, paths).fingerprint() != before
    paths[1].unlink()
    with pytest.raises(DataError, match=r"cannot read '.*1\.png'; No such file"):
        ImageFileSource(inputs, paths).fingerprint()


def test_arrays_have_a_fingerprint_of_what_is_chosen() -> None:
    images = torch.from_numpy(RNG.integers(0, 256, (5, 1, 4, 4), dtype=np.uint8))
    source = ImageArraySource(ImageInputs(ops=("resize 8x8",)), images)
    some = source.select(torch.tensor([3, 1])).fingerprint()
    assert some == ImageArraySource(ImageInputs(ops=("resize 8x8",)), images[[3, 1]]).fingerprint()
    assert len({some, source.fingerprint(), ImageArraySource(ImageInputs(), images).fingerprint()}) == 3
