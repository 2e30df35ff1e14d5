"""Any line as a Hugging Face folder with its own code, for transformers' automatic classes and `trust_remote_code`."""

from headwise.io.remote_code.folder import save_with_code

__all__ = ["save_with_code"]
