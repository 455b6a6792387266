"""Commands that make and check shard sets: shard, verify."""
