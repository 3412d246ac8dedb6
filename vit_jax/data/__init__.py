"""From files on disk to batches of pixels: sources, decoding, preprocessing, and the Grain pipeline that joins them."""
