"""Which work there is: the views that a launch was asked for, and the units of them that a store still lacks.

A unit is labeled and committed as one: one block of one view or, with a tail template, one block of all the views that
make the template, since they come from one decode and their mean is the template.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.runtime.errors import RecipeError
from softshard.pipeline.store.store import Store
from softshard.pipeline.views.selection import check_view


class WorkUnit(NamedTuple):
    """A block in some successive views."""

    views: range
    block: int


def wanted_views(recipe: LabelRecipe, views: Sequence[int] | None) -> Sequence[int]:
    """The numbers of the views that a launch labels, ascending, each once.

    Args:
        recipe: what the store is made by.
        views: what it was asked for; None: all of the recipe's.

    Raises:
        RecipeError: for views that the recipe does not have, and for some but not all of those that make the template.
    """
    if views is None:
        return range(recipe.views.count)
    wanted = sorted(set(views))
    check_view(wanted[-1], recipe.views.count)
    of_template = range(recipe.template.views if recipe.template else 0)
    found = [view for view in wanted if view in of_template]
    if found and len(found) < len(of_template):
        raise RecipeError(
            f"--views: expected all of the views 0-{of_template[-1]}, which make the tail template, or none of them, "
            f"found {', '.join(map(str, found))}; add the others, or leave these out"
        )
    return wanted


def plan_work(manifest: StoreManifest, views: Sequence[int], store: Store | None) -> list[WorkUnit]:
    """What some views of a store lack.

    First the template's views together, where one of them or the template is missing, then view by view.

    Args:
        manifest: of the finished store.
        views: the views to be labeled, ascending.
        store: None where there is none yet. One that has room for fewer views than the manifest lacks the others.
    """
    missing, without_template = _missing_blocks(manifest, store)
    of_template = range(manifest.template.views if manifest.template else 0)
    units = []
    if of_template and 0 in views:
        open_blocks = missing[of_template].any(axis=0) | without_template
        units = [WorkUnit(of_template, int(block)) for block in np.flatnonzero(open_blocks)]
    others = (view for view in views if view not in of_template)
    return units + [
        WorkUnit(range(view, view + 1), int(block)) for view in others for block in np.flatnonzero(missing[view])
    ]


def count_views(store: Store, units: Sequence[WorkUnit]) -> int:
    """How many views of one image the units are."""
    return sum(len(views) * len(rows_of_block(store, block)) for views, block in units)


def rows_of_block(store: Store, block: int) -> NDArray[np.int64]:
    """The rows of a block, in their order."""
    rows = store.rows(block)
    return np.arange(rows.start, rows.stop)


def _missing_blocks(manifest: StoreManifest, store: Store | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each block is not labeled yet, [V, blocks], and whether it has no template yet, [blocks]."""
    blocks = -(-manifest.samples // manifest.block_rows)
    missing, without_template = np.ones((manifest.views.count, blocks), np.bool_), np.ones(blocks, np.bool_)
    if store:
        digests = store.digests()
        missing[: len(digests)] = digests == 0
        if manifest.template:
            without_template = store.template_digests() == 0
    return missing, without_template
