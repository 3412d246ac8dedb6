"""Readers of workdirs, ONNX files and files of names; and how these are made and damaged."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable

import numpy as np

from fuzzing import mutate
from vit_jax.analysis import report, report_data, report_settings, report_tables, run_files
from vit_jax.configs import common
from vit_jax.errors import UserError
from vit_jax.inference import labels, model_folder
from vit_jax.run import resume, telemetry

Read = Callable[[], object]
MAGIC = ('1e308', '-1e308', '9007199254740991', '1' * 5000, '1e-320', 'NaN', 'null', '"x"', '[]')


def make(root: pathlib.Path, model: pathlib.Path) -> None:
    """Writes `runs/run`, `labels` and, where the packages are there, `onnx` below `root`.

    Args:
      root: folder of the corpus.
      model: a model folder.
    """
    _make_run(root / 'runs' / 'run', model)
    (root / 'labels').mkdir()
    (root / 'labels/names.txt').write_text('a rose\nGänseblümchen\nx/y\n', encoding='utf-8')
    (root / 'labels/list.json').write_text('["a", "b", "c"]')
    (root / 'labels/numbers.json').write_text('{"0": "a", "1": "b", "2": "c"}')
    (root / 'labels/names.json').write_text('{"a": 0, "b": 1, "c": 2}')
    try:
        import onnxruntime  # noqa: F401

        from vit_jax.export import onnx, options
    except ImportError:
        return
    (root / 'onnx').mkdir()
    opened = model_folder.load(model)
    for name, chosen in (
        ('plain', {}),
        ('bytes', {'preprocessing': True, 'layout': 'NCHW'}),
        ('probabilities', {'probabilities': True, 'opset': 17}),
    ):
        onnx.save(onnx.build(opened, options.Options(**chosen)), root / 'onnx' / f'{name}.onnx')


def _make_run(workdir: pathlib.Path, model: pathlib.Path) -> None:
    config = common.get_defaults().to_dict()
    config |= {'dataset': 'digits', 'batch': 8, 'total_steps': 30, 'accum_steps': 1}
    description = json.loads((model / 'model.json').read_text())
    config['model'] = description['architecture']['config']
    config['pp'] |= {'crop': description['image_size']}
    split = {'split': 'train', 'examples': 8, 'fingerprint': 'x'}
    data = {'class_names': description['class_names'], 'train': split, 'test': split}
    workdir.mkdir(parents=True)
    for name, value in (
        ('config', config),
        ('data', data),
        ('versions', {'command': 'python x', 'python': '3.11', 'packages': {'jax': '1'}}),
    ):
        (workdir / f'{name}.json').write_text(json.dumps(value))
    with telemetry.Telemetry(workdir, total_steps=30) as log:
        log.start(0)
        log.info('model', 'started', dtype='float32', devices=2, kind='cpu', processes=1)
        log.info('compiled', 'compiled', parameters=2**20, total=2**21)
        log.info('resumed', 'resumed', step=10)
        log.info('WARNING: cannot use x.png', 'unreadable', image='x.png')
        log.info('stopped', 'stopped', step=20, signal='SIGTERM')
        for step in (1, 10, 20, 30):
            log.metrics(step, train_loss=1 / step, lr=0.1, accuracy_train=0.5, gradient_norm=1.0)
            log.timing(step, img_sec_core_train=100.0, data_wait=0.1, first_step_s=3.0)
        log.metrics(30, accuracy_test=0.5, loss_test=1.0, unreadable_test=1)
    for file in workdir.glob('events.out.*'):
        file.unlink()
    shutil.copytree(model, workdir / 'model')


def read_undamaged(corpus: pathlib.Path) -> None:
    """Reads what `make` wrote."""
    run = run_files.read(corpus / 'runs/run')
    assert 'What happened' in report.render([run], images=0) and run.resumes() == [10]
    for path in (corpus / 'labels').iterdir():
        assert len(labels.read(path)) == 3
    for path in (corpus / 'onnx').glob('*.onnx'):
        _classify(path)


def _classify(path: pathlib.Path) -> None:
    """Opens an ONNX file and scores two black images."""
    from vit_jax.inference import onnx

    model = onnx.OnnxClassifier(path, threads=1)
    assert ''.join(model.class_names).isprintable()
    side = model.preprocess.crop
    if side > 64:  # allowed, and of no use here
        raise UserError('large images')
    scores = model.logits(np.zeros((2, side, side, 3), np.float32))
    assert scores.shape == (2, len(model.class_names))


def workdirs(rng: random.Random, corpus: pathlib.Path, case: pathlib.Path) -> Read:
    """A run of which some files are damaged: its report, and going on with it."""
    workdir = case / 'run'
    shutil.copytree(corpus / 'runs/run', workdir)
    names = ['metrics.jsonl', 'timing.jsonl', 'events.jsonl', 'config.json', 'data.json']
    for name in rng.choices([*names, 'versions.json', 'model/model.json'], k=rng.choice((1, 1, 3))):
        _damage_text(rng, workdir / name)
    settings = common.get_defaults().to_dict()
    action = rng.randrange(20)

    def going_on():
        resume.check_config(workdir / 'config.json', settings)

    def data():
        resume.check_data(workdir / 'data.json', {'class_names': ['a']})

    def writing():
        with telemetry.Telemetry(workdir, total_steps=30) as log:
            log.start(10)
        telemetry.read_metric(workdir, 'accuracy_test')

    def page():
        html = report.render([run_files.read(workdir)], images=0)
        assert '\x1b' not in html

    def examples():
        report_data.open_data(run_files.read(workdir))

    def tables():
        run = run_files.read(workdir)
        shown = [report_tables.state(run), *map(str, report_tables.events(run))]
        for table in (
            report_tables.summary([run]), report_settings.differences([run, run]),
            *report_settings.configuration(run), report_settings.architecture(run),
            report_settings.environment(run), report_settings.packages(run),
            report_tables.costs(run), report_tables.happened(run),
        ):  # fmt: skip
            shown += [str(cell) for row in table.rows for cell in row]
        assert max(map(len, shown)) < 2000

    others = {0: page, 1: going_on, 2: data, 3: writing, 4: examples}
    return others.get(action, tables)


def _damage_text(rng: random.Random, path: pathlib.Path) -> None:
    """Damages JSON, or lines of it; rarely puts a pipe, a folder or a device in its place."""
    if not path.is_file():
        return  # done before
    if rng.random() < 0.05:
        path.unlink()
        rng.choice(
            (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to('/dev/zero'), lambda: 0)
        )()
        return
    data = path.read_bytes()
    if rng.random() < 0.15:
        path.write_bytes(mutate.damage(rng, data))
        return
    lines = data.splitlines() if path.suffix == '.jsonl' else [data]
    for _ in range(rng.choice((1, 1, 4))):
        place = rng.randrange(len(lines)) if lines else 0
        try:
            lines[place] = mutate.damage_json(rng, json.loads(lines[place]))
        except (ValueError, RecursionError, IndexError):  # it was damaged before
            continue
        if rng.random() < 0.3:
            found = [part for part in lines[place].split(b':') if part[:2].strip()[:1].isdigit()]
            old = rng.choice(found)[:4].split(b',')[0].rstrip(b'}') if found else b'1'
            lines[place] = lines[place].replace(old, rng.choice(MAGIC).encode(), 1)
    path.write_bytes(b'\n'.join(lines) + b'\n')


def names(rng: random.Random, corpus: pathlib.Path, case: pathlib.Path) -> Read:
    """A file of class names."""
    source = rng.choice(sorted((corpus / 'labels').iterdir()))
    data = source.read_bytes()
    if source.suffix == '.json' and rng.random() < 0.7:
        data = mutate.damage_json(rng, json.loads(data))
    elif rng.random() < 0.4:
        data = data.replace(b'a', rng.choice(mutate.TEXTS).encode('utf-8', 'surrogatepass'), 1)
    else:
        data = mutate.damage(rng, data)
    path = case / 'names'
    path.write_bytes(data)
    if rng.random() < 0.03:  # a pipe may be named: `--labels <(sort names)`
        path.unlink()
        rng.choice((path.mkdir, lambda: path.symlink_to('/dev/zero')))()

    def read():
        found = labels.read(path)
        assert found and ''.join(found).isprintable()

    return read


def graphs(rng: random.Random, corpus: pathlib.Path, case: pathlib.Path) -> Read:
    """An ONNX file: its description, its shapes, its weights, its bytes."""
    source = rng.choice(sorted((corpus / 'onnx').iterdir()))
    path = case / 'model.onnx'
    path.write_bytes(_damage_graph(rng, source.read_bytes()))
    return lambda: _classify(path)


def _damage_graph(rng: random.Random, data: bytes) -> bytes:
    import onnx

    if rng.random() < 0.1:
        return mutate.damage(rng, data)
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 3))):
        action = rng.randrange(8)
        if action < 5:  # what the metadata say
            entry = rng.choice(model.metadata_props)
            try:
                changed = mutate.damage_json(rng, json.loads(entry.value))
            except (ValueError, RecursionError):  # no JSON, or damaged before
                changed = rng.choice(mutate.TEXTS).encode('utf-8', 'replace')
            entry.value = changed.decode('utf-8', 'replace')
            if rng.random() < 0.1:
                entry.key = rng.choice(('source', 'layout', 'x', 'output'))
        elif action == 5:  # shapes and types of inputs and outputs
            value = rng.choice([*model.graph.input, *model.graph.output])
            kind = value.type.tensor_type
            if rng.random() < 0.3:
                kind.elem_type = rng.choice((0, 1, 2, 7, 8, 9, 10, 11, 16))
            elif kind.shape.dim:
                dim = rng.choice(kind.shape.dim)
                dim.dim_value = rng.choice((0, 1, 2, -1, 3, 2**31, 2**62))
        elif action == 6:  # a weight that is not finite, or large
            weight = rng.choice(model.graph.initializer)
            array = onnx.numpy_helper.to_array(weight).copy()
            if array.dtype.kind == 'f' and array.size:
                array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, 1e38))
                weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        else:
            node = rng.choice(model.graph.node)
            node.name = rng.choice(mutate.TEXTS).encode('utf-8', 'replace').decode()
            if node.input and rng.random() < 0.5:
                node.input[0] = rng.choice(('image', '', node.output[0] if node.output else 'x'))
    return model.SerializeToString()
