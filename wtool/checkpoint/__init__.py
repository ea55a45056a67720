"""A checkpoint as a mapping from names to lazily read tensors; one file a source.

base         the nouns: Checkpoint, TensorFile, TensorInfo
safetensors  safetensors files, mapped
torch_bin    torch .bin files, mapped, weights only
gguf         GGUF files, dequantized on reading (gguf_families: names, layouts and settings)
folder       a local folder: index, shards, config and the files beside them
adapter      a base with a LoRA adapter added on reading
hub          the Hub: downloads into the shared cache
hub_files    the Hub: which of a repository's files are needed
hub_headers  the Hub: headers by range requests, nothing else downloaded
hub_stream   the Hub: shards that come when they are read, and go
hub_push     the Hub: a folder uploaded
hub_errors   the Hub: what can go wrong, in one line
float8       weights of 8-bit floats with scales: decoded on reading
quantized    packed weights: decoded on reading, or told from plain ones
tied         output heads that are the embedding again
resolve      from what a user writes to one of the above
"""

from wtool.checkpoint.base import Checkpoint as Checkpoint
from wtool.checkpoint.base import TensorInfo as TensorInfo
from wtool.checkpoint.resolve import open_checkpoint as open_checkpoint
