"""fedlm-bench: federated fine-tuning of language models, weighed on one scale."""
