"""300 made hostile or odd files: a verdict on each, no crash, no hang, little memory."""

import os
import time

from hostile_images import BAD, FINE, plant

from tuneforge.errors import DataError
from tuneforge.plugin import Sandbox

MEMORY_MB, HANG_S = 300, 5.0


def test_each_of_300_files_gets_a_verdict_in_time_and_memory(tmp_path):
    expected = plant(tmp_path / "files")
    assert len(expected) == 300
    slowest = 0.0
    with Sandbox("tuneforge.plugin.image_scan:inspect_image", memory_mb=MEMORY_MB, timeout_s=4.0) as process:
        for name, wanted in expected.items():
            began = time.monotonic()
            try:
                process.call(path=os.path.join(tmp_path, "files", name), thumbnails=True)
                got = FINE
            except DataError as error:
                got = BAD if error.what else "nothing"
            slowest = max(slowest, time.monotonic() - began)
            assert wanted in (got, "either"), f"{name}: {got}"
        assert 0 < process.peak_mb < MEMORY_MB
    assert slowest < HANG_S
    print(f"\n300 verdicts, the slowest in {slowest:.2f} s, at most {process.peak_mb:.0f} MB")
