"""Any line as a Hugging Face folder with its own code, for `AutoModelForCausalLM(…, trust_remote_code=True)`."""

from headwise.io.remote_code.folder import save_with_code

__all__ = ["save_with_code"]
