"""Language models: the catalogue, loading, their blocks, and models without values.

For others: `config` (without PyTorch), `catalogue`, `loading`, `blocks`, `fake`.
"""
