"""The instruments: peak memory, FLOPs and bytes. They know tensors and labels, and no method.

For others: `memory`, `flops`, `instruments`, `ledger`.
"""
