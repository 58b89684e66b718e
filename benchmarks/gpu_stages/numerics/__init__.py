"""Is the arithmetic right on the device? Each check against float64 on the CPU, or against the CPU where equality is
what is promised."""

from gpu_stages.numerics import layers, networks, soft_labels, training
from gpu_stages.stage import Check, Setting


def checks(setting: Setting) -> list[Check]:
    parts = (
        networks.checks,
        soft_labels.checks,
        training.resume_checks,
        layers.checks,
        training.learning_checks,
    )
    return [check for part in parts for check in part(setting)]
