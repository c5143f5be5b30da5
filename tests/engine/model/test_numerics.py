"""What the last bits depend on is recorded: another machine gets its own cached features, and a resume says it."""

import json

import pytest
import torch
from simulated_kill import run_and_kill
from tiny import tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.engine.model import numerics

CPU = torch.device("cpu")
X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: smep avx2 fma avx512f sse4_1\n\nprocessor\t: 1\nflags\t: x\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve bf16 crc32\n\n"


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
    def write(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(numerics, "_CPU_INFO", tmp_path / "cpuinfo")
        numerics._describe_processor.cache_clear()

    yield write
    numerics._describe_processor.cache_clear()


@pytest.mark.parametrize(
    ("text", "processor", "instruction_sets"),
    [(X86, "Some CPU", "avx2 avx512f fma sse4_1"), (ARM, None, "asimd bf16 sve"), ("", None, "")],
)
def test_processor_and_instruction_sets_are_read_where_the_system_tells_them(
    cpu_info, text, processor, instruction_sets
):
    cpu_info(text)
    described = numerics.describe_numerics(CPU)
    assert described["instruction sets"] == instruction_sets
    if processor is not None:
        assert described["processor"] == processor


def test_variables_of_kernel_libraries_are_read_but_for_those_without_effect_on_results(monkeypatch):
    plain = numerics.describe_numerics(CPU)
    for name in ("MKL_NUM_THREADS", "ONEDNN_VERBOSE", "TUNEFORGE_CACHE"):
        monkeypatch.setenv(name, "1")
    assert numerics.describe_numerics(CPU) == plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in numerics.describe_numerics(CPU)["kernel variables"]


def test_changes_are_described_briefly():
    assert numerics.describe_change("threads", 2, 4) == "threads 2 -> 4"
    assert numerics.describe_change("instruction sets", "avx avx2 fma", "avx fma sve") == (
        "instruction sets lack avx2 and instruction sets add sve"
    )


class Deep(nn.Module):
    """A backbone whose features are worth a place on disk."""

    def __init__(self):
        super().__init__()
        layers = [each for _ in range(6) for each in (nn.Linear(512, 512), nn.ReLU())]
        self.body = nn.Sequential(nn.Linear(8, 512), *layers, nn.Linear(512, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def test_another_machine_finds_no_features_of_this_one(tmp_path, tune, monkeypatch):
    def run():
        lines = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Deep()
        tune([tf.Phase("head", train="head", epochs=2)], model=model, log=lines.append, cache_dir=tmp_path / "cache")
        return next(line for line in lines if "feature cache" in line)

    assert "runs once per sample" in run()
    assert "features computed earlier are reused" in run()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert "runs once per sample" in run()
    assert "features computed earlier are reused" in run()


def test_resume_where_the_last_bits_may_differ_says_so(tmp_path):
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": [tf.Phase("all", epochs=1)]}
    run_and_kill(tf.Engine(**objects, page=False, checkpoint_s=0.0, out=tmp_path / "r").run, 2, only="step-saved")
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    record["environment"]["instruction sets"] += " amx_tile"
    record["environment"]["kernel variables"] = "MKL_CBWR=AVX2"
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    lines = []
    tf.Engine.resume(tmp_path / "r", log=lines.append, **{**objects, "model": tiny_net()}).run()
    warnings = [line for line in lines if line.startswith("warning")]
    assert warnings == [
        "warning: results may differ in the last bits, because the environment changed: "
        "instruction sets lack amx_tile, kernel variables MKL_CBWR=AVX2 -> "
    ]
