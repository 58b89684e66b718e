"""Is the arithmetic right on the device? Each check against float64 on the CPU, or against the CPU where equality is
what is promised."""

from gpu_stages.numerics import layers, networks, soft_labels, training
from gpu_stages.stage import Check, Setting


def checks(setting: Setting) -> list[Check]:
    parts = (networks, soft_labels, training, layers)
    return [check for part in parts for check in part.checks(setting)]
