import io

import numpy as np
from PIL import Image

from tuneforge.plugin import IMAGE_FORMATS, convert_to_upright, scan_images


def test_scan_yields_a_result_per_file_in_order_with_the_reason_of_unusable_ones(tmp_path):
    Image.new("L", (80, 60), 128).save(tmp_path / "gray.png")
    (tmp_path / "text.png").write_bytes(b"%PDF-1.4")
    names = ["gray.png", "text.png", "missing.png"]
    gray, text, missing = scan_images([str(tmp_path / name) for name in names])
    assert (gray.why, gray.size, gray.format, len(gray.digest)) == ("", (80, 60), "PNG L", 64)
    assert gray.gray_hw is gray.color_hwc is gray.preview is None
    assert (text.why, text.size) == ("it is a PDF", (0, 0))
    assert missing.why == "it cannot be read: No such file or directory"


def test_scan_makes_thumbnails_and_previews_on_request(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "red.jpg")
    (scan,) = scan_images([str(tmp_path / "red.jpg")], thumbnails=True, preview=True)
    assert (scan.gray_hw.shape, scan.gray_hw.dtype) == ((48, 48), np.uint8)
    assert scan.color_hwc.shape == (24, 24, 3)
    assert scan.color_hwc[0, 0, 0] > 200 > scan.color_hwc[0, 0, 1]
    assert scan.preview.startswith("iVBORw0KGgo")


def test_a_file_that_takes_too_long_is_unusable_and_the_next_one_is_scanned(tmp_path):
    Image.new("RGB", (9000, 9000)).save(tmp_path / "slow.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    slow, small = scan_images([str(tmp_path / "slow.png"), str(tmp_path / "small.png")], timeout_s=0.05)
    assert "takes longer" in slow.why
    assert small.why == ""


def test_upright_images_have_8_bits_and_no_transparency():
    wide = Image.fromarray(np.full((2, 3), 65535, np.uint16))
    assert np.asarray(convert_to_upright(wide)).tolist() == [[255] * 3] * 2
    assert convert_to_upright(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert convert_to_upright(Image.open(file)).size == (2, 4)
    assert "JPEG" in IMAGE_FORMATS
