"""Floor 7: text from a trained model."""

from headwise.generate.batch import complete_batch
from headwise.generate.decode import complete, generate, stream_ids
from headwise.generate.request import Generation, Request, TokenLogprob
from headwise.generate.sampling import History, Sampling
from headwise.generate.session import Session

__all__ = [
    "Generation",
    "History",
    "Request",
    "Sampling",
    "Session",
    "TokenLogprob",
    "complete",
    "complete_batch",
    "generate",
    "stream_ids",
]
