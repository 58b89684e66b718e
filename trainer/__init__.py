"""shards -> folded student."""
