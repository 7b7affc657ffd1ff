"""Studies: a study file read, checked and described, and the methods and tasks found for it.

For others: `study`, `tuning`, `reading`, `check`, `schema`, `plugins`, `yaml_files`.
"""
