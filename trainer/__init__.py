"""soft labels -> folded student."""
