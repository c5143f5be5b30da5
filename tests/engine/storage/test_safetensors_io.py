import pytest
import torch
from safetensors.torch import save

import tuneforge as tf
from tuneforge.engine.storage.safetensors_io import _DTYPES
from tuneforge.exporting import load_tensors, save_tensors


def tensors_of_every_type():
    values = torch.arange(-3, 12)
    return {f"tensor of {dtype}": values.to(dtype).reshape(3, 5) for dtype in _DTYPES} | {
        "a": torch.randn(4, 3, dtype=torch.float64),
        'ü "quoted"': torch.zeros(0, 2),
        "one number": torch.tensor(3.0),
        "not contiguous": torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last)[:, 1:].transpose(0, 1),
    }


def test_file_equals_that_of_the_safetensors_library_and_reads_back(tmp_path):
    tensors = tensors_of_every_type()
    save_tensors(tensors, tmp_path / "t.safetensors", metadata={"b": 1, "a": [2]})
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    expected = save(plain, metadata={"tuneforge": '{"a": [2], "b": 1}'})
    assert (tmp_path / "t.safetensors").read_bytes() == expected
    read, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {"a": [2], "b": 1}
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), plain[name].reshape(-1).view(torch.uint8))


def test_tensors_that_share_memory_are_stored_separately(tmp_path):
    base = torch.randn(4, 4)
    save_tensors({"base": base, "row": base[1], "conj": torch.view_as_complex(base.view(8, 2)).conj()}, tmp_path / "t")
    read, _ = load_tensors(tmp_path / "t")
    assert torch.equal(read["row"], base[1])
    assert torch.equal(read["conj"], torch.view_as_complex(base.view(8, 2)).conj())


@pytest.mark.parametrize("wrong", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_unsupported_type_is_named_and_the_old_file_stays(tmp_path, wrong):
    save_tensors({"w": torch.ones(2)}, tmp_path / "t")
    with pytest.raises(tf.UsageError, match="'odd' cannot be stored"):
        save_tensors({"w": torch.zeros(2), "odd": wrong}, tmp_path / "t")
    assert torch.equal(load_tensors(tmp_path / "t")[0]["w"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 1
