"""images -> views -> labels -> shards."""
