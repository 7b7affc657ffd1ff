"""fedlm-bench: federated fine-tuning of language models, weighed on one scale."""

__version__ = "0.1.0"
