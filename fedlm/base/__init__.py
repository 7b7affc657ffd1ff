"""The ground floor: errors, files written whole or not at all, named random streams, settings, checked downloads.

For everyone above: `errors`, `files`, `randomness`, `settings`, `downloads`.
"""
