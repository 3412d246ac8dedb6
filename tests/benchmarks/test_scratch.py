"""Recipes from scratch: which are tested, and what the table says of them."""

import pathlib

from benchmarks import flowers, scratch

FLOWERS = scratch.TASKS[0]


def row(stage, name, seed, accuracy):
    split = 'val' if stage == 'choice' else 'test'
    return {
        'stage': stage, 'name': name, 'seed': seed, f'accuracy_{split}': accuracy,
        f'loss_{split}': 0.5, 'steps': 50, 'images': 367, 'cpu_seconds': 600.0,
        'hardware': {'processor': 'a processor', 'cores': 2},
    }  # fmt: skip


def records(gain):
    """Plain runs of 50, 52 and 51 %, with a spread of 2; and better ones."""
    found = [row('choice', name, 0, 0.4) for name in FLOWERS.candidates]
    for known in found:
        known['accuracy_val'] += 0.1 * (known['name'] in ('muon', 'plain, rate 0.001'))
    for seed, share in enumerate((0.50, 0.52, 0.51)):
        found.append(row('test', 'plain, rate 0.001', seed, share))
        found.append(row('test', 'muon', seed, share + gain))
    return found


def test_the_best_of_both_and_the_plain_one_are_tested_in_turns():
    runs = list(FLOWERS.tested(records(0.0), 2))
    names = ['muon', 'plain, rate 0.001', 'plain']
    assert [(run.name, run.seed) for run in runs] == [(n, s) for s in (0, 1) for n in names]
    for run in (*runs, *FLOWERS.tried()):
        words = dict(word.split('=', 1) for word in run.words())
        images = int(words['--config.batch']) * int(words['--config.total_steps'])
        assert images == (FLOWERS.images if run.stage.name == 'test' else FLOWERS.tried_on)
        assert ('--config.pp.val' in words) == (run.stage.name == 'choice')


def test_the_table_compares_the_gain_with_the_spread():
    for gain, verdict in ((0.03, '+3.0 over'), (0.01, '+1.0 over')):
        choice, tested = scratch.tables({'tf_flowers': records(gain)})
        assert ['tf_flowers', 'muon', '50.0 %', '0.500', '367'] in choice.rows
        name = ['tf_flowers', 'plain, rate 0.001', '50.0, 52.0, 51.0', '51.0 %', '2.0']
        assert tested.rows[0] == name and verdict in tested.notes[0]
        assert ('not more than' in tested.notes[0]) == (gain < 0.02)
    (note,) = scratch.tables({'tf_flowers': records(0.0)[1:]})[1].notes
    assert 'gains' not in note  # a candidate was not tried


def test_the_results_are_of_these_settings():
    folder = pathlib.Path(__file__).parents[2] / scratch.RESULTS
    for task in scratch.TASKS:
        found = flowers.read(folder / f'scratch_{task.name}.json')
        known = {(run.stage.name, run.name, run.seed): run for run in task.tried()}
        for seed in range(scratch.SEEDS):
            for name, recipe in task.candidates.items():
                known['test', name, seed] = scratch.Run(task.test, name, recipe, seed)
        for each in found:
            assert each['words'] == known[each['stage'], each['name'], each['seed']].words()
