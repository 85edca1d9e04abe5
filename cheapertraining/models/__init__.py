"""Models: a Hugging Face causal language model as a Composer model."""

from cheapertraining.models.causal_lm import CausalLM, TokenCrossEntropy, build_causal_lm

__all__ = ["CausalLM", "TokenCrossEntropy", "build_causal_lm"]
