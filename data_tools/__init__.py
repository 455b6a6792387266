"""Commands that make, check and show shard sets: shard, annotate, verify, show."""
