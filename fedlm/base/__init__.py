"""What all packages use: errors, atomic files, named random streams, settings, checked downloads.

For all others: `errors`, `files`, `processor`, `randomness`, `settings`, `downloads`.
"""
