"""What of a model is kept, how it is cut into shards, and how one shard is made."""
