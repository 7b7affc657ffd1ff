"""Language models: the catalogue, loading, their blocks, and models without values.

For others: `config` (without PyTorch), `catalogue`, `places`, `loading`, `blocks`, `fake`.
Only for this package: `embedded` (weights that come with a Python package), `quiet`.
"""
