"""What every result says about where it was measured."""

from __future__ import annotations

import os

import torch

from pi0rl.machine import processor_name


def describe_machine() -> dict[str, str | int]:
    """Processor, cores, memory, torch and its threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }
