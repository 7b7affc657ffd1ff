"""The ground floor: errors, whole files, named random streams, settings, checked downloads.

For everyone above: `errors`, `files`, `randomness`, `settings`, `downloads`.
"""
