"""From files, arrays and other people's datasets to batches of pixels.

`from_arrays` and `from_sequence` make a source of your own data; `BatchStream` takes batches that
another library makes; `open_sources` opens datasets by name or path.
"""

from vit_jax.data.own import from_arrays, from_sequence
from vit_jax.data.sources import open_sources
from vit_jax.data.stream import BatchStream

__all__ = ['BatchStream', 'from_arrays', 'from_sequence', 'open_sources']
