"""What the machine does, under the names that MLflow's page of system metrics reads."""

from __future__ import annotations

import psutil

from pi0rl.machine import nvidia_smi

_QUERY = "utilization.gpu,memory.used,memory.total,power.draw"


def system_metrics() -> dict[str, float]:
    """``system/*`` of this machine: cores (mean since the last call, 0 to 100), memory, and each NVIDIA GPU."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        **gpu_metrics(nvidia_smi(_QUERY)),
    }


def gpu_metrics(table: str) -> dict[str, float]:
    """The lines of ``nvidia-smi --query-gpu``, one per GPU, as metrics; a cell without a number is left out."""
    metrics: dict[str, float] = {}
    for gpu, line in enumerate(table.splitlines()):
        busy, used, total, power = map(_number, line.split(","))
        values = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * 1.048576,  # from MiB
            "memory_usage_percentage": None if used is None or not total else 100 * used / total,
            "power_usage_watts": power,
        }
        metrics |= {f"system/gpu_{gpu}_{name}": value for name, value in values.items() if value is not None}
    return metrics


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A]
        return None
