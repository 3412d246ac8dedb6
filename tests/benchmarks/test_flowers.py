"""The command that fills tables: a true run that is stopped, and tables of known numbers."""

import pathlib

import pytest

from benchmarks import flowers, flowers_rows, flowers_tables
from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.run import preemption

ROOT = pathlib.Path(__file__).parents[2]
TINY = (
    '--config=digits', '--config.model.hidden_size=16', '--config.model.transformer.mlp_dim=32',
    '--config.model.transformer.num_layers=1', '--config.model.transformer.num_heads=2',
)  # fmt: skip
# Patches of 4 x 4 x 3, 16 positions; a block with norms, attention and MLP; norm and head.
COUNT = (48 + 1 + 16) * 16 + (64 + 4 * 17 * 16 + 17 * 32 + 33 * 16) + 32 + 17 * 10
STAGE = flowers_rows.Stage(
    'choice', 192, 16, (*flowers_rows.CHOICE.words, '--config.checkpoint_every=1')
)


def test_a_run_that_is_stopped_goes_on_and_is_done_once(tmp_path, monkeypatch):
    results, said = tmp_path / 'results.json', []
    table = flowers.Table(results, tmp_path / 'runs', flowers_rows.Start(TINY), said.append)
    run = flowers_rows.Run(STAGE, 'a name, with 0.1', flowers_rows.Recipe(batch=16, averaged=True))
    monkeypatch.setattr(flowers, '_SAMPLE_SECONDS', 0.01)
    with preemption.StopSignals() as signals:
        metrics = tmp_path / 'runs/choice/a_name__with_0.1-0/metrics.jsonl'
        sample = flowers.Cost.sample

        def stop(cost):
            if metrics.exists() and metrics.read_text():
                signals.received = 15
            return sample(cost)

        monkeypatch.setattr(flowers.Cost, 'sample', stop)
        with pytest.raises(preemption.PreemptedError, match='the same command goes on'):
            table.fill(run, signals)
        assert not results.exists() and 'accuracy_val' not in metrics.read_text()
    monkeypatch.setattr(flowers.Cost, 'sample', sample)
    before = files.read_json(metrics.parents[1] / 'a_name__with_0.1-0.cost.json')
    with preemption.StopSignals() as signals:
        table.fill(run, signals)
        (row,) = flowers.read(results)
        log = (metrics.parent / 'train.log').read_text()
        assert 'resumed from step' in log and row['steps'] == 12
        assert row['trainable_parameters'] == COUNT
        assert row['images'] == 575 and 0 <= row['accuracy_val'] <= 1
        assert row['seconds'] > before['seconds'] and row['cpu_seconds'] > before['cpu_seconds']
        assert row['peak_memory'] > 2**26 and row['hardware']['cores'] >= 1
        assert '--config.ema_warmup_steps=6' in row['command'] and str(tmp_path) not in str(row)
        assert not (metrics.parent / 'checkpoints').exists()
        table.fill(run, signals)
        assert len(said) == 3 and said[-1].startswith('choice: a name, with 0.1, seed 0, val ')
        other = flowers_rows.Run(STAGE, run.name, flowers_rows.Recipe(batch=32))
        with pytest.raises(UserError, match='is of other settings'):
            table.fill(other, signals)


def test_probes_are_one_record(tmp_path):
    start = flowers_rows.Start((), ('--model', 'm', '--dataset', 'photos'))
    command = flowers_rows.Folds().command(start)
    assert command[:5] == ['-m', 'vit_jax', 'probe', '--model', 'm'] and command[-1] == '10'
    files.write_json(tmp_path / 'metrics.json', {
        'features': 192, 'classes': 5, 'images': 367, 'probes': [], 'few_shot': {}, 'model': 'm',
    })  # fmt: skip
    assert flowers_rows.Probes().measured(tmp_path) == {
        'images': 367, 'probes': [], 'few_shot': {}, 'trainable_parameters': 965,
    }  # fmt: skip
    # One that was left by a kill before its record: the command refuses to replace it.
    assert flowers_rows.Probes().where(tmp_path)[1] == str(tmp_path / 'metrics.json')
    assert not (tmp_path / 'metrics.json').exists()


def row(stage, name, seed, accuracy, loss=0.5):
    split = 'val' if stage == 'choice' else 'test'
    return {
        'stage': stage, 'name': name, 'seed': seed, f'accuracy_{split}': accuracy,
        f'loss_{split}': loss, 'steps': 50, 'images': 367, 'seconds': 700.0, 'cpu_seconds': 600.0,
        'peak_memory': 2**31, 'trainable_parameters': 5_497_157,
        'hardware': {'processor': 'a processor', 'cores': 2},
    }  # fmt: skip


def test_the_best_candidate_is_chosen_and_all_of_them_are_needed():
    names = [run.name for run in flowers_rows.choice('recipe')]
    records = [row('choice', name, 0, 0.8) for name in names]
    records[2] |= {'accuracy_val': 0.9}
    records[3] |= {'accuracy_val': 0.9, 'loss_val': 0.4}
    assert flowers_rows.chosen(records, 'recipe').name == names[3]
    runs = list(flowers_rows.tested(records, 'recipe', 2))
    assert [(run.name, run.seed) for run in runs] == [
        ('recipe', 0), ('plain', 0), ('recipe', 1), ('plain', 1)
    ]  # fmt: skip
    assert runs[0].recipe == flowers_rows.CANDIDATES['recipe'][names[3]]
    assert all('--config.pp.val=40%' not in run.words() for run in runs)
    with pytest.raises(UserError, match=f'to be tried: {names[0]}'):
        flowers_rows.chosen(records[1:], 'recipe')
    with pytest.raises(UserError, match='LoRA is not chosen yet; to be tried: LoRA, rate 0.001,'):
        flowers_rows.chosen(records, 'LoRA')
    records += [row('choice', run.name, 0, 0.7) for run in flowers_rows.choice('LoRA')]
    (run,) = flowers_rows.tested(records, 'LoRA', 1)
    assert '--config.lora_rank=8' in run.words() and '--config.base_lr=0.001' in run.words()


def test_every_run_sees_as_many_images():
    for recipe in [one for row in flowers_rows.CANDIDATES.values() for one in row.values()]:
        words = dict(word.split('=', 1) for word in recipe.words(9600, 224))
        assert int(words['--config.batch']) * int(words['--config.total_steps']) == 9600


def test_plain_is_the_command_of_the_readme():
    words = flowers_rows.Run(flowers_rows.TEST, 'plain', flowers_rows.PLAIN).words()
    text = (ROOT / 'README.md').read_text().replace('\n   ', ' ')
    for name in ('batch', 'accum_steps', 'total_steps', 'warmup_steps'):
        (word,) = [word for word in words if word.startswith(f'--config.{name}=')]
        assert f'{word} ' in text
    assert not any('base_lr' in word or 'optimizer' in word for word in words)


def test_tables_of_known_numbers(tmp_path):
    """Differences of 1, 2, 3, 4, 5: mean 3, deviation 1.5811; t(0.975, 4) is 2.7764 in tables."""
    plain = [0.93, 0.94, 0.92, 0.91, 0.90]
    records = [row('test', 'plain', seed, share) for seed, share in enumerate(plain)]
    records += [row('choice', 'adamw', 0, 0.875)]
    assert flowers_tables.line(records) == 'no seed was run yet'
    for seed in (4, 0, 1, 2, 3):
        records.append(row('test', 'recipe', seed, plain[seed] + (seed + 1) / 100))
    half = 2.7764 * 1.5811 / 5**0.5
    line = (
        'means of 5 seeds 95.00 and 92.00 % of 367 test images; difference +3.00 (95 % interval, '
        f'paired by seed: +{3 - half:.2f} to +{3 + half:.2f})'
    )
    assert flowers_tables.line(records) == line
    text = flowers_tables.render(records)
    assert '| full ' in text
    for part in ('92.0 ± 1.6', '5,497,157', '2.00'):
        assert part in text
    for part in ('adamw', '87.50 %', '5 of 5 seeds', '| 4', '+5.00', '| deviation', '1.58', '10.0'):
        assert part in text
    probed = row('test', 'probes', 0, 0.0)
    del probed['accuracy_test']
    probed['probes'] = [{'name': 'logistic', 'setting': 'C=0.1', 'accuracy_test': 0.899}]
    probed['few_shot'] = {'5': [0.5, 0.6, 0.7]}
    probed['folds'] = {'ridge': {'right': [1, 3], 'images': [4, 4]}}
    text = flowers_tables.render([*records, probed])
    for part in ('logistic C=0.1', '89.9', '60.0 ± 10.0', '50.0, 60.0, 70.0', '50.0 ± 35.4'):
        assert part in text
    document = tmp_path / 'page.md'
    document.write_text(f'a\n\n{flowers_tables.LINE[0]}\nold\n{flowers_tables.LINE[1]}\nb\n')
    flowers_tables.update(str(document), records)
    marks = flowers_tables.LINE
    assert (
        document.read_text() == f'a\n\n{marks[0]}\n\nRecipe and plain: {line}.\n\n{marks[1]}\nb\n'
    )
    (tmp_path / 'other.md').write_text('nothing\n')
    with pytest.raises(UserError, match='expected a line <!-- flowers -->'):
        flowers_tables.update(str(tmp_path / 'other.md'), records)
    # Of an unfinished table, what is there.
    assert '1 of 5 seeds' in flowers_tables.render([*records[:5], records[7]])


def test_the_results_are_of_these_settings():
    records = flowers.read(ROOT / flowers.RESULTS)
    runs = [flowers_rows.Probes(), flowers_rows.Folds()]
    for name, seeds in {'recipe': flowers.SEEDS, **flowers_rows.LESS}.items():
        runs += flowers_rows.choice(name)
        if any(known['name'] == name for known in records if known['stage'] == 'test'):
            runs += flowers_rows.tested(records, name, seeds)
    words = {(run.stage.name, run.name, run.seed): run.words() for run in runs}
    for known in records:
        assert known['words'] == words[known['stage'], known['name'], known['seed']]
