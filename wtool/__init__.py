"""wtool: merge, quantize, prune and distil Hugging Face checkpoints, streamed tensor by tensor."""

__version__ = "0.1.0"
