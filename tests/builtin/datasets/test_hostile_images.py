"""300 made hostile or odd files: a verdict on each, no crash, no hang, little memory."""

import json
import os
import time

from hostile_images import BAD, FINE, encoded, named, picture, plant, special

from tuneforge.__main__ import main
from tuneforge.errors import DataError, escape_name
from tuneforge.plugin import Sandbox

MEMORY_MB, HANG_S = 300, 5.0


def test_each_of_300_files_gets_a_verdict_in_time_and_memory(tmp_path):
    expected = plant(tmp_path / "files")
    assert len(expected) == 300
    slowest = 0.0
    with Sandbox("tuneforge.builtin.datasets.images.scan:inspect_image", memory_mb=MEMORY_MB, timeout_s=4.0) as process:
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


def test_the_command_says_a_line_for_every_entry_and_its_page_holds_no_markup_of_theirs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    expected = plant(root / "class a", [*named(), *special()])
    (root / "class b").mkdir()
    (root / "class b" / "one.png").write_bytes(encoded(picture(50)))
    assert main(["data", "check", "data", "--all"]) == 65
    lines = capsys.readouterr().out.splitlines()
    for name in expected:
        assert sum(line.startswith(f"class a/{escape_name(name)}: ") for line in lines) >= 1, name
    assert all(line.isprintable() for line in lines)
    assert "class a/fifo.png: it is a FIFO, not a file; exclude" in lines
    assert json.loads((tmp_path / "data-check" / "issues.json").read_text())["files"] == len(expected) + 1
    page = (tmp_path / "data-check" / "issues.html").read_text()
    assert "<script" not in page
    assert '"onerror=' not in page
    assert "49.png" not in page
    assert set(os.listdir(tmp_path)) == {"data", "data-check"}
