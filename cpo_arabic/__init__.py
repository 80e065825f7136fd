"""Fine-tune Qwen-family language models for Arabic by Contrastive Preference Optimization."""

__version__ = "0.1.0"
