"""images -> views -> labels -> store and shards."""
