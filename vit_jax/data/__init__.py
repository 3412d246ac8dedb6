"""From files on disk to batches of pixels: sources, decoding, preprocessing, Grain pipeline."""
