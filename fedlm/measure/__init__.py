"""The instruments: peak memory, FLOPs and bytes. They know tensors and labels, but no methods.

For others: `memory`, `flops`, `instruments`, `ledger`.
"""
