"""From stored examples to batches on devices: decoding, sets in memory and in streams, order."""
