"""The same functions without the compiler: Python's own integers and doubles, which nothing fuses or reorders."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pipeline.views import draws, geometry, mixing, policies


@contextmanager
def uncompiled() -> Iterator[pytest.MonkeyPatch]:
    """Within it, every compiled function of the parameter modules is its source: call them through their modules, and
    patch them further with what it gives."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore"):
        for module in (draws, geometry, policies, mixing):
            for name, value in list(vars(module).items()):
                if hasattr(value, "py_func"):
                    patch.setattr(module, name, value.py_func)
        yield patch
