"""softshard VERB: pack images, label views, train a student from the labels, fold and export it."""

import sys
from collections.abc import Sequence

from softshard.pipeline.__main__ import add_verbs as add_pipeline_verbs
from softshard.pipeline.cli import make_parser, run
from softshard.trainer.__main__ import add_verbs as add_trainer_verbs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `softshard` command and return its exit status."""
    return run(make_parser("softshard", __doc__, [add_pipeline_verbs, add_trainer_verbs]), arguments)


if __name__ == "__main__":
    sys.exit(main())
