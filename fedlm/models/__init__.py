"""Language models: the catalogue, loading, their blocks, and models without values.

For others: `config` (without PyTorch), `catalogue`, `places`, `loading`, `blocks`, `parts`,
`narrow`, `readout`, `fake`.
Only for this package: `embedded` (weights that come with a Python package), `quiet`.
"""
