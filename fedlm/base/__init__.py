"""The ground floor: errors, whole files, named random streams, settings, downloads.

For everyone above: `errors`, `allocator`, `files`, `randomness`, `settings`, `downloads`.
"""
