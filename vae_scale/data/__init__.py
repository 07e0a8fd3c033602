"""Images as shards, shards as arrays, arrays as an endless stream of batches."""
