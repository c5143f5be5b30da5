"""Bad input is one four-part message and the documented exit code, and loses nothing."""

import pytest
from PIL import Image

from tuneforge.__main__ import main


def folder(path, classes):
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (32, 32), 7 * number % 255).save(path / name / f"{number}.png")
    return path


CASES = {
    "no such folder": (lambda path: path / "nowhere", 65),
    "an empty folder": (lambda path: folder(path / "f", {}), 65),
    "an empty class": (lambda path: folder(path / "f", {"a": 5, "b": 0}), 65),
    "one class": (lambda path: folder(path / "f", {"a": 5}), 65),
    "a class with one image": (lambda path: folder(path / "f", {"a": 5, "b": 1}), 65),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_cannot_be_used_exits_65(case, tmp_path, capsys):
    make, code = CASES[case]
    path = make(tmp_path)
    path.mkdir(exist_ok=True) if case == "an empty folder" else None
    assert main(["run", "--data", "image-folder", "--data.path", str(path), "--out", str(tmp_path / "r")]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    for part in ("where:", "why:", "do:"):
        assert part in err, err
    assert "Traceback" not in err


def test_a_broken_picture_is_named(tmp_path, capsys):
    path = folder(tmp_path / "f", {"a": 6, "b": 6})
    (path / "a" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    assert main(["run", "--data", "image-folder", "--data.path", str(path), "--out", str(tmp_path / "r")]) == 65
    assert "3.png" in capsys.readouterr().err


def test_more_pictures_than_memory_are_streamed_and_give_the_same_figures(tmp_path, capsys):
    path = folder(tmp_path / "f", {"a": 12, "b": 12})
    common = ["run", "--data", "image-folder", "--data.path", str(path), "--strategy.epochs", "1", "--no-page"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    assert main([*common, "--data.memory-mb", "0", "--num-workers", "1", "--out", str(tmp_path / "streamed")]) == 0
    assert "memory" in capsys.readouterr().out
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "streamed"))
    assert one == two


def test_a_run_that_fails_says_so_in_its_folder(tmp_path):
    main(["run", "--data", "image-folder", "--data.path", str(tmp_path / "none"), "--out", str(tmp_path / "r")])
    assert '"state": "failed"' in (tmp_path / "r" / "status.json").read_text()
    assert "Traceback" in (tmp_path / "r" / "log.txt").read_text()
