"""Load training images: decoding, keeping in memory, augmented views, batches."""
