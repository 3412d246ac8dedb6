"""The tables of a report that tell what a run was given: settings, model, environment."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from vit_jax.analysis.run_files import Run
from vit_jax.analysis.tables import Table
from vit_jax.configs import common

NONE = '–'
_MAX_TEXT = 500  # characters of an event or a setting


def differences(runs: Sequence[Run]) -> Table | None:
    """The settings in which runs differ; None for a single run."""
    if len(runs) < 2:
        return None
    flat = [_flatten(run.config) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    rows = []
    for name in names:
        values = [_setting(settings[name]) if name in settings else NONE for settings in flat]
        if len(set(values)) > 1:
            rows.append((cut(name), *values))
    notes = () if rows else ('All settings are the same.',)
    columns = ('Setting', *(f'{run.name}>' for run in runs))
    return Table('Settings that differ between the runs', columns, rows, notes)


def configuration(run: Run) -> tuple[Table, Table]:
    """The settings that are not the defaults of `configs/common.py`, and the others."""
    defaults = _flatten(common.get_defaults().to_dict())
    changed, same = [], []
    settings = _flatten({key: value for key, value in run.config.items() if key != 'model'})
    known = [name for name in defaults if name in settings]
    for name in known + sorted(settings.keys() - defaults):
        value = settings[name]
        if name in defaults and defaults[name] == value:
            same.append((cut(name), _setting(value)))
        else:
            default = _setting(defaults[name]) if name in defaults else 'no such setting now'
            changed.append((cut(name), _setting(value), default))
    return (
        Table('Other than the defaults', ('Setting', 'This run', 'Default'), changed),
        Table('As the defaults', ('Setting', 'Value'), same),
    )


def architecture(run: Run) -> Table:
    """The model's own settings."""
    model = run.config.get('model')
    settings = _flatten(model) if isinstance(model, Mapping) else {}
    rows = [(cut(name), _setting(value)) for name, value in settings.items()]
    return Table('Model', ('Setting', 'Value'), rows)


def environment(run: Run) -> Table:
    """Where and from what the run was made."""
    names = {'command': 'Command', 'git_revision': 'Revision of the code (git)',
             'python': 'Python', 'platform': 'Platform'}  # fmt: skip
    rows = [
        (shown, _setting(run.versions[name]))
        for name, shown in names.items()
        if run.versions.get(name) is not None
    ]
    if run.device:
        rows.append(('Devices', cut(f'{run.device["devices"]} x {run.device["kind"]}')))
        rows.append(('Type of activations', cut(run.device['dtype'])))
    return Table('Environment', ('', ''), rows)


def packages(run: Run) -> Table:
    """The packages that were installed."""
    found = run.versions.get('packages')
    found = found if isinstance(found, Mapping) else {}
    rows = [(cut(name), _setting(version)) for name, version in found.items()]
    return Table('Packages', ('Package', 'Version'), rows)


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value."""
    return traverse_util.flatten_dict(settings, sep='.')


def _setting(value: Any) -> str:
    if value == '':
        return '(empty)'
    return cut(value if isinstance(value, str) else json.dumps(value))


def cut(text: str) -> str:
    """A text of bounded length: files of a run may come from anywhere."""
    return text if len(text) <= _MAX_TEXT else f'{text[: _MAX_TEXT - 1]}…'
