"""Which records are outdated: made with other settings than the study gives their runs now."""

import json
from collections.abc import Iterator
from typing import Any

from fedlm.base.errors import UserError
from fedlm.base.files import sha256
from fedlm.jobs import tuning
from fedlm.jobs.folders import Folders
from fedlm.study.reading import of_record
from fedlm.study.study import Run, RunConfig, Study


def settings_hash(config: RunConfig) -> str:
    """Return the SHA-256 of a run's settings, `config_sha256` of its record."""
    return sha256(json.dumps(config.resolved(), sort_keys=True).encode())


def is_outdated(study: Study, run: Run, folders: Folders) -> bool:
    """Return whether a run has a record, but one with other settings than the study gives it now.

    One that cannot be read is not outdated: whoever reads it next says what is wrong with it. Nor is one that
    was made with other code: the pipeline makes it again, unless git tracks it.
    """
    try:
        found = json.loads(folders.record(run).read_text())
        if found["provenance"]["config_sha256"] == settings_hash(tuning.configuration(study, run, folders)):
            return False
        return any(True for _ in other_settings(found, study, run, folders))
    except (OSError, UserError, ValueError, KeyError, TypeError):
        return False


def other_settings(record: dict[str, Any], study: Study, run: Run, folders: Folders) -> Iterator[str]:
    """Yield a line for each setting of a record that is not what the study gives its run.

    Raises UserError if the record's settings cannot be read, or the study's are not yet chosen.
    """
    # Read again as a study, since a setting that is younger than the record has its default there.
    own = of_record(record).run(run.task, run.partition, run.method, run.seed).resolved()
    for section, values in tuning.configuration(study, run, folders).resolved().items():
        given = own[section]
        for key in values | given:
            if given.get(key) != values.get(key):
                yield f"{section}.{key} is {given.get(key)!r}; the study says {values.get(key)!r}"
