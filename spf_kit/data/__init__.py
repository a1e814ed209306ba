"""Pictures and captions: reading, checking, grouping, encoding, and batches that are pure functions."""
