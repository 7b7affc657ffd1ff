"""The foundation: errors, files written whole or not at all, random streams, settings, checked downloads.

For everyone above: `errors`, `files`, `randomness`, `settings`, `downloads`.
"""
