"""From stored examples to batches on devices: sets in memory, sets in streams of records."""
