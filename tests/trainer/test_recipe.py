"""The train recipe's keys."""

from pathlib import Path

import pytest
from helpers.small_runs import train_recipe

from softshard.pipeline.runtime.errors import RecipeError


def test_the_error_for_a_former_key_names_the_new_one(tmp_path: Path) -> None:
    """All of them at once, among other errors."""
    changes = ("student.expand", "{kinds: [dense], scale: false, branches_as: auto, zoo: 2}"), ("watch.updates", "7")
    with pytest.raises(RecipeError) as error:
        train_recipe(tmp_path, *changes)
    assert str(error.value).splitlines() == [
        f'{tmp_path}/train.yaml: student.expand.kinds: renamed; write student.expand.conv_types (got ["dense"])',
        f"{tmp_path}/train.yaml: student.expand.scale: renamed; write student.expand.scale_branch (got false)",
        f'{tmp_path}/train.yaml: student.expand.branches_as: renamed; write student.expand.implementation (got "auto")',
        f"{tmp_path}/train.yaml: student.expand.zoo: unknown key (got 2)",
        '--watch.updates: renamed; write logging.updates (got {"updates": 7})',
    ]
