"""What the last bits of results depend on besides the program: versions, threads, the processor and its kernels."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_INSTRUCTION_SETS = re.compile(r"(sse|ssse|avx|fma|f16c|amx|asimd|neon|sve|sme(?!p)|bf16|i8mm|fp16|vsx)\w*")
_KERNEL_VARIABLES = re.compile(r"(ONEDNN|DNNL|MKL|ATEN_CPU|OPENBLAS|BLIS|VECLIB)_(?!.*(NUM_THREADS|VERBOSE)).*")


def describe_numerics(device: torch.device) -> dict[str, str | int]:
    """Return what the last bits of a result on a device depend on, by name."""
    on_cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **_describe_processor(),
        "kernel variables": " ".join(
            f"{name}={value}" for name, value in sorted(os.environ.items()) if _KERNEL_VARIABLES.fullmatch(name)
        ),
        "kernel settings": f"mkldnn {torch.backends.mkldnn.enabled}, deterministic "
        f"{torch.are_deterministic_algorithms_enabled()}, matmul precision {torch.get_float32_matmul_precision()}",
        "device": str(device),
        "gpu": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if on_cuda else "",
    }


def describe_change(name: str, before: str | int | None, now: str | int) -> str:
    """Return what differs between two values of `describe_numerics`; of instruction sets only those of one side."""
    if name != "instruction sets":
        return f"{name} {before} -> {now}"
    had, has = set(str(before).split()), set(str(now).split())
    return " and ".join(
        f"{name} {verb} {' '.join(sorted(names))}" for verb, names in (("lack", had - has), ("add", has - had)) if names
    )


@functools.cache
def _describe_processor() -> dict[str, str]:
    """Return the name of the processor and its instruction sets, as far as the system tells them."""
    text = _CPU_INFO.read_text(errors="replace") if _CPU_INFO.exists() else ""
    found = {}
    for line in text.split("\n\n", 1)[0].splitlines():  # of the first core
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    flags = (found.get("flags") or found.get("Features") or "").split()
    return {
        "processor": found.get("model name") or platform.processor(),
        "instruction sets": " ".join(sorted(filter(_INSTRUCTION_SETS.fullmatch, flags))),
    }
