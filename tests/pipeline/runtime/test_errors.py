"""What messages are made of."""

import pytest

from softshard.pipeline.runtime.documents import flatten
from softshard.pipeline.runtime.errors import DataError, FormatError, RecipeError, SoftshardError, error_context, near


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FormatError("expected a, found b"), "labels.zarr: expected a, found b; label again"),
        (DataError("expected a, found b; make room"), "labels.zarr: expected a, found b; make room"),
        (RecipeError("seed: expected a, found b"), "seed: expected a, found b"),
    ],
)
def test_context_is_added_where_it_is_known(error: SoftshardError, message: str) -> None:
    with pytest.raises(type(error)) as caught, error_context("labels.zarr", "label again"):
        raise error
    assert str(caught.value) == message


def test_names_like_a_wrong_one() -> None:
    known = (name for name in ("adamw", "lamb", "lambw", "lars", "sgd"))
    assert near("lambb", known) == "near: lamb, lambw"
    assert near("?", ["adamw"]) == ""


def test_nested_documents_become_dotted_keys() -> None:
    document = {"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}, "empty": {}}
    assert flatten(document) == {"a": 1, "b.c": None, "b.d.e": [1, 2]}
    assert flatten(document["b"], "recipe") == {"recipe.c": None, "recipe.d.e": [1, 2]}
    assert flatten(None, "template") == {"template": None}
