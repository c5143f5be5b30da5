"""Foreign weights: good ones become safetensors, and 60 made malicious ones are refused with nothing executed.

`TUNEFORGE_MALICIOUS=all` puts every one of them through the command itself, a process each (about five minutes).
"""

import io
import json
import os
import random
import zipfile

import malicious_weights as malicious
import pytest
import torch

from tuneforge import DataError, UnsafeFileError
from tuneforge.__main__ import main
from tuneforge.exporting import load_tensors, save_tensors
from tuneforge.plugin import Sandbox

BY_COMMAND = ("os.system", "fifo", "device", "folder", "loop", "nowhere")


@pytest.fixture
def planted(tmp_path):
    (tmp_path / "in").mkdir()
    return malicious.plant(tmp_path / "in", tmp_path / "marker")


def saved(path, content, **options):
    torch.save(content, path, **options)  # noqa: TID251 - a foreign file, made as others make them
    return path


def test_every_malicious_file_is_refused_and_none_is_executed(planted, tmp_path):
    assert len(planted) >= 60
    out = tmp_path / "out.safetensors"
    target = "tuneforge.convert.restricted_unpickler:unpack"
    with Sandbox(target, memory_mb=1500, timeout_s=20.0, writable_path=out, max_file_bytes=2**26) as process:
        for name, path in planted.items():
            if path.is_file():  # the others are refused before a process starts
                assert _refused(process, path, out), name
            assert not (tmp_path / "marker").exists(), name
        assert not out.exists()
        (tmp_path / "good.pth").write_bytes(malicious.good())
        assert not _refused(process, tmp_path / "good.pth", out)


def _refused(process, path, out):
    try:
        process.call(path=str(path), out=str(out), key=None, max_bytes=2**26)
    except (UnsafeFileError, DataError):
        return True
    return False


def test_the_command_refuses_with_its_exit_codes_and_writes_nothing(planted, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    names = planted if os.environ.get("TUNEFORGE_MALICIOUS") == "all" else BY_COMMAND
    codes = {name: main(["import", str(planted[name]), "--out", str(out), "--max-mb", "64"]) for name in names}
    assert set(codes.values()) <= {65, 77}, codes
    assert codes["os.system"] == 77
    assert codes["folder"] == 65
    errors = capsys.readouterr().err
    assert errors.count("error: ") == len(codes)
    assert "weights_only" not in errors  # torch's advice is to read the file unsafely
    assert os.listdir(tmp_path) == ["in"]


def test_the_refused_files_would_execute_code_in_an_unsafe_reader(tmp_path):
    """What the other tests prove nothing without: the payloads work."""
    planted = malicious.plant(tmp_path, tmp_path / "marker")
    for name in ("os.system", "exec", "stack-global", "legacy-os.system"):
        torch.load(planted[name], weights_only=False)  # noqa: TID251 - to see that it does harm
        assert (tmp_path / "marker").exists(), name
        (tmp_path / "marker").unlink()


def test_weights_of_every_container_are_converted_to_safetensors(tmp_path, capsys):
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    path = saved(tmp_path / "a.pth", {"epoch": 3, "state_dict": state}, _use_new_zipfile_serialization=False)
    assert main(["import", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors, _ = load_tensors(tmp_path / "a.safetensors")
    assert told["state_dict_key"] == "state_dict"
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_a_shared_tensor_is_written_once_and_the_target_of_a_link_is_not_changed(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "precious")
    weight = torch.randn(4, 4)
    path = saved(tmp_path / "a.pth", {"in.w": weight, "out.w": weight, "part": weight[:2].T, "epoch": 7})
    assert main(["import", str(path), "--out", str(tmp_path / "b.safetensors"), "--json", "--force"]) == 0
    told = json.loads(capsys.readouterr().out)
    tensors, metadata = load_tensors(tmp_path / "b.safetensors")
    assert told["shared_tensors"] == {"out.w": "in.w"} == metadata["shared_tensors"]
    assert told["skipped_names"] == ["epoch"]
    assert set(tensors) == {"in.w", "part"}
    assert torch.equal(tensors["part"], weight[:2].T)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "b.safetensors").is_symlink()


def test_an_existing_file_is_overwritten_only_with_force(tmp_path, capsys):
    path, out = saved(tmp_path / "a.pth", {"w": torch.zeros(3)}), tmp_path / "a.safetensors"
    out.write_text("mine")
    assert main(["import", str(path)]) == 73
    assert "give --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["import", str(path), "--force"]) == 0
    assert set(load_tensors(out)[0]) == {"w"}


def test_safetensors_need_no_import(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_tensors({"w": torch.zeros(3)}, path)
    before = path.read_bytes()
    assert main(["import", str(path)]) == 2
    said = capsys.readouterr().err
    assert "is safetensors already" in said
    assert f"--model.weights {path}" in said
    assert path.read_bytes() == before


def test_other_files_are_bad_data_and_files_with_code_are_unsafe(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("photo.txt", "x" * 999)
    command = b"cos\nsystem\n(S'touch x'\ntR."
    content = {
        "random": (random.Random(0).randbytes(5000), DataError),
        "words": (b"hello\n", DataError),
        "stop": (b"....", DataError),
        "zip": (archive.getvalue(), DataError),
        "text-pickle": (command, UnsafeFileError),
        "pickle-in-archive": (malicious.archive(malicious.weights(command[:-1])), UnsafeFileError),
    }
    out = tmp_path / "out.safetensors"
    target = "tuneforge.convert.restricted_unpickler:unpack"
    with Sandbox(target, memory_mb=1500, timeout_s=20.0, writable_path=out, max_file_bytes=2**26) as process:
        for name, (data, error) in content.items():
            (tmp_path / name).write_bytes(data)
            with pytest.raises(error):
                process.call(path=str(tmp_path / name), out=str(out), key=None, max_bytes=2**26)
    assert (DataError.exit_code, UnsafeFileError.exit_code) == (65, 77)
    assert not out.exists()
