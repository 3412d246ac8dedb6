"""The summary over the folds of a cross-validation."""

import json

import numpy as np
import pytest
from scipy import stats

from vit_jax.analysis import report, report_charts, report_tables, run_files
from vit_jax.errors import UserError

ACCURACY = (0.8, 0.9, 0.85, 0.7, 0.95)


@pytest.fixture
def runs(tmp_path):
    """Five runs, given from the last fold to the first."""

    def make(folds=(5, 4, 3, 2, 1), number=5, **more):
        found = []
        for fold in folds:
            workdir = tmp_path / f'run{len(list(tmp_path.iterdir()))}'
            workdir.mkdir()
            config = {'fold': f'{fold}/{number}', 'total_steps': 3}
            (workdir / 'config.json').write_text(json.dumps(config))
            line = {'step': 3, 'accuracy_test': ACCURACY[fold - 1], 'loss_test': 0.5 * fold}
            (workdir / 'metrics.jsonl').write_text(json.dumps(line | more) + '\n')
            (workdir / 'model').mkdir()
            (workdir / 'model/model.json').write_text('{}')
            found.append(run_files.read(workdir))
        return found

    return make


def test_mean_deviation_and_interval_are_students(runs):
    table = report_tables.folds(runs())
    assert table.columns[4:] == tuple(f'Fold {k}/5>' for k in range(1, 6))
    accuracy, loss = table.rows
    values = 100 * np.array(ACCURACY)
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert accuracy == (
        'Test accuracy', '84.00 %', f'{values.std(ddof=1):.2f} %', f'{low:.2f} % to {high:.2f} %',
        '80.00 %', '90.00 %', '85.00 %', '70.00 %', '95.00 %',
    )  # fmt: skip
    assert loss[:2] == ('Test loss', '1.5000')
    assert len(table.notes) == 1 and 'share training images' in table.notes[0]


def test_what_is_missing_is_said(runs):
    table = report_tables.folds(runs((1, 4), r2_test=None, mae_test=2.5))
    assert 'Folds that are not here: 2, 3, 5.' in table.notes
    assert [row[0] for row in table.rows] == ['Test accuracy', 'Mean absolute error', 'Test loss']
    assert table.rows[1][1:4] == ('2.5', '0', '2.5 to 2.5')
    assert 'more than once' in report_tables.folds(runs((1, 1))).notes[2]


def test_other_runs_have_no_such_table(runs):
    assert report_tables.folds(runs((1,))) is None
    assert report_tables.folds([*runs((1, 2)), *runs((1,), number=3)]) is None
    plain = runs((1, 2))
    for wrong in ('', 'x', 3, '9/5', None):
        config = {'fold': wrong}
        (plain[0].workdir / 'config.json').write_text(json.dumps(config))
        assert report_tables.folds([run_files.read(plain[0].workdir), plain[1]]) is None


def test_the_page_has_it(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report_charts, 'curves', lambda runs: [])
    workdirs = [run.workdir for run in runs()]
    page = report.write(workdirs, tmp_path / 'folds.html', images=0).read_text()
    assert 'Cross-validation' in page and '84.00 %' in page


def test_ten_folds_have_no_curves_but_a_page(runs, tmp_path):
    ten = runs((1, 2, 3, 4, 5), number=10) + runs((1, 2, 3, 4, 5), number=10)
    workdirs = [run.workdir for run in ten]
    page = report.write(workdirs, tmp_path / 'folds.html', images=0).read_text()
    assert 'Left out: 10 runs.' in page and 'Folds that are not here: 6, 7, 8, 9, 10.' in page
    (workdirs[0] / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='10 runs have too many colours'):
        report.write(workdirs, tmp_path / 'folds.html', images=0)
