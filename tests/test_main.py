"""The command line: mistakes become one line and a non-zero exit, before anything is made."""

import pytest

from vit_jax import main
from vit_jax.errors import UserError

MAIN = ('-m', 'vit_jax.main')


@pytest.fixture
def mistake(command, tmp_path):
    """Runs main with mistaken words; returns the one line it must print."""

    def run(*words):
        result = command(*MAIN, *words)
        assert result.returncode not in (0, None), result.stdout
        assert 'Traceback' not in result.stderr, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith('error: '), result.stderr
        assert not (tmp_path / 'run').exists()
        return last

    return run


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ([], 'no config given: add --config b16'),
        (['--config'], 'no config given'),
        (['--config', 'configs/b61.py'], 'did you mean configs/b16.py?'),
        (['--config', 'my/configs/b16.py'], 'did you mean configs/b16.py?'),
        (['--config', 'nowhere/zzz.py'], 'ours are augreg, b16, '),
        (['--config=vit_jax/configs/b16.py', '--lr=1'], '--config.base_lr'),  # as the original's
        (['--config', 'b61'], 'did you mean configs/b16.py?'),
        (['--config=b16:cifar10', '--config.batch=many'], '--config.batch=many'),
        (['--config', 'b16', '--lr=1'], 'it is called --config.base_lr here'),
        (['--config', 'b16', '--config.learning_rate=1'], 'it is called --config.base_lr here'),
        (['--config', 'b16', '--config.num_epochs=1'], 'it is called --config.epochs here'),
        (['--config', 'b16', '--warmup_epochs=1'], '--config.warmup_steps here (in steps, not'),
        (['--config', 'b16', '--batch-size', '8'], 'it is called --config.batch here'),
        (['--config', 'b16', '--config.image_size=8'], 'it is called --config.pp.crop here'),
        (['--config', 'b16', '--wd=1'], 'it is called --config.weight_decay here'),
        (['--config', 'b16', '--num_classes=3'], 'the number of classes comes from the data'),
        (['--config=configs/b16.py', '--config.base_lrr=1'], 'did you mean --config.base_lr?'),
        (['--config=configs/b16.py', '--config.pp.crpo', '3'], 'did you mean --config.pp.crop?'),
        (['--config=configs/b16.py', '--config.batch=many'], '--config.batch=many'),
        (['--config=configs/b16.py', '--wrkdir=x'], 'did you mean --workdir?'),
        (['--config=configs/b16.py', 'workdir=x'], "unexpected 'workdir=x'"),
        (
            ['--config=configs/b16.py', '--config.shuffle_buffer=9'],
            'this knob is not needed: the whole training set is shuffled',
        ),
        (['--config', 'b16', '--config.data_processes=4'], 'not needed: threads read as fast'),
        (['--config=configs/vit.py'], 'configs/vit.py: it needs an argument after a colon'),
        (['--config=configs/vit.py:b61,cifar10'], "unknown model 'b61'"),
        (['--config=configs/vit.py:b16,cifar11'], "unknown dataset 'cifar11'"),
    ],
)
def test_mistakes_in_the_words(mistake, words, message):
    assert message in mistake(*words)


def test_help_is_quick_and_helpful(command):
    result = command(*MAIN, '--help', fresh=True)
    assert result.returncode == 0 and not result.stderr
    assert '--workdir' in result.stdout
    assert '  augreg, b16, b16_mlp_head,' in result.stdout
    for knob in ('--config.base_lr=0.03', '--config.pp.crop=224', '# Mirror half of the training'):
        assert knob in result.stdout


def test_a_misspelt_flag_imports_no_jax(command):
    code = """
import atexit, sys
from vit_jax import main
sys.argv = ['main', '--config', 'b16', '--config.base_lrr=1']
atexit.register(lambda: print({'jax', 'flax', 'grain', 'orbax'} & set(sys.modules)))
main.run()
"""
    result = command('-c', code, fresh=True)
    assert result.stdout.strip() == 'set()' and 'did you mean' in result.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.pp.crop=33'], 'use --config.pp.crop=32 or 36'),
        (['--config.batch=9', '--config.accum_steps=2'], 'Use --config.batch='),
        (['--config.pp.train=trian'], "split 'trian' of digits cannot be used: Unknown split"),
        (['--config.dataset=./nowhere'], 'there is no folder ./nowhere'),
        (['--config.dataset=tf_flwers'], 'did you mean tf_flowers?'),
        (['--config.pretrained=nowhere.npz'], "'nowhere.npz' is neither a file here nor a"),
        (['--config.pretrained=README.md'], 'README.md is not a readable .npz file'),
        (['--config.pretrained=imagenet21k/ViT-B_17.npz'], 'imagenet21k/ViT-B_16.npz'),
    ],
)
def test_mistakes_in_the_settings(mistake, tmp_path, flags, message):
    words = ['--config=configs/digits.py', f'--workdir={tmp_path / "run"}', *flags]
    assert message in mistake(*words)


def test_weights_that_cannot_be_downloaded(mistake, tmp_path):
    """The address, the place to put the file, and the flag to use."""
    line = mistake(
        '--config=configs/b16.py',
        '--config.dataset=digits',
        '--config.check_memory=False',
        f'--workdir={tmp_path / "run"}',
    )
    assert 'https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz' in line
    assert str(tmp_path / 'cache/vit_models/imagenet21k/ViT-B_16.npz') in line
    assert '--config.pretrained=FILE' in line


def test_a_cache_that_cannot_be_written_ends_only_what_asked_for_it(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    folder = str(tmp_path / 'file' / 'cache')
    main.use_compile_cache(folder, asked=False)
    assert f'programs are not kept: {folder} cannot be written' in capsys.readouterr().err
    with pytest.raises(UserError, match='compile_cache=.* cannot be written'):
        main.use_compile_cache(folder, asked=True)


@pytest.mark.parametrize(
    'line', ['def get_config(:', 'import nothing_of_that_name', 'x = undefined']
)
def test_a_config_file_that_fails_is_one_line(mistake, tmp_path, line):
    (tmp_path / 'mine.py').write_text(f'{line}\ndef get_config(): pass\n')
    last = mistake('--config', tmp_path / 'mine.py')
    assert 'the file fails: ' in last or 'mine.py: ' in last
