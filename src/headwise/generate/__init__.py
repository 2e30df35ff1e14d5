"""Floor 7: text from a trained model."""

from headwise.generate.decode import generate, stream_ids
from headwise.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "stream_ids"]
