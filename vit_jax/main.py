"""`vit_jax train --config b16`, or `python -m vit_jax.main --config configs/b16.py`.

Fine-tunes the model of a config and writes a model folder. Every knob (`configs/common.py`) is a
flag: `--config.base_lr=0.003`, `--config.pp.crop=384`. Run again with the same --workdir, a run
goes on where it stopped.

Several machines run the same command each; Slurm, Open MPI and Kubernetes tell them of each other,
elsewhere --coordinator_address, --num_processes and --process_id do.
"""

import difflib
import errno
import inspect
import os
import pathlib
import re
import signal
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vit_jax import cli
from vit_jax.errors import UserError
from vit_jax.run import preemption, streams

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'Config: one of ours by name, or a file; with an argument if it takes one. b16, '
    'vit:b16,cifar10, my/config.py.',
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Folder of the run: checkpoints, metrics, logs, model. Default: runs/<config>-<dataset>.',
)

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    'coordinator_address', '', 'Several processes: HOST:PORT of process 0, the same for all.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', 0, 'Several processes: how many.', lower_bound=0
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', -1, 'Several processes: index of this one, from 0.', lower_bound=-1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    'heartbeat_timeout_seconds',
    30,
    'Several processes: after so long without a sign of life of one, the others end.',
    lower_bound=1,
)

_CONFIGS = pathlib.Path(__file__).with_name('configs')  # in a checkout, a link to configs/
_FLAGS = ('config', 'workdir', 'coordinator_address', 'num_processes', 'process_id',
          'heartbeat_timeout_seconds')  # fmt: skip

# What the system says when a disk does not take a file.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)

# Knobs of the original release and of earlier versions that have no counterpart, and why.
_RETIRED = {
    'shuffle_buffer': 'the whole training set is shuffled again in every epoch',
    'prefetch': 'batches are always read ahead, as far as memory allows',
    'data_processes': 'threads read as fast; config.data_threads says how many',
    'trainer': 'training is `python -m vit_jax.main`',
    'model_type': 'the model is told by config.model.model_name',
}
# What other libraries call our settings.
_ELSEWHERE = {
    '--config.base_lr': 'lr learning_rate',
    '--config.total_steps': 'steps max_steps num_steps',
    '--config.epochs': 'epochs num_epochs num_train_epochs',
    '--config.label_smoothing': 'smoothing',
    '--config.cooldown_steps': 'cooldown cooldown_epochs',
    '--config.batch': 'batch_size bs train_batch_size per_device_train_batch_size',
    '--config.batch_eval': 'eval_batch_size per_device_eval_batch_size',
    '--config.pp.crop': 'image_size img_size input_size resolution crop_size',
    '--config.weight_decay': 'wd',
    '--config.warmup_steps': 'warmup warmup_epochs num_warmup_steps',
    '--config.accum_steps': 'gradient_accumulation_steps grad_accum_steps accumulation_steps',
    '--config.grad_norm_clip': 'clip_grad max_grad_norm grad_clip',
    '--config.optimizer': 'opt optim',
    '--config.dataset': 'data data_dir data_path dataset_name train_dir',
    '--config.data_threads': 'workers num_workers',
    '--config.dtype': 'precision amp fp16 bf16 mixed_precision',
    '--config.pretrained': 'weights checkpoint model_name_or_path finetune',
    '--workdir': 'output output_dir out_dir save_dir logdir log_dir',
    '--config configs/b16.py': 'model arch model_name',
}
_RULES = {
    'num_classes': 'the number of classes comes from the data',
    'resume': 'the same command with the same --workdir goes on where the run stopped',
}


def main(argv: Sequence[str]) -> None:
    """Runs the training that the parsed flags ask for."""
    del argv
    # Here, so that --help and mistakes on the command line are quick.
    import jax

    from vit_jax import config as config_lib
    from vit_jax import train
    from vit_jax.run import distributed

    asked = config_flags.get_override_values(flags.FLAGS['config'])
    config = config_lib.resolve(_CONFIG.value, asked)
    if config.deterministic:
        config_lib.use_deterministic_operations()
    use_compile_cache(config.compile_cache, asked='compile_cache' in asked)
    distributed.start(
        _COORDINATOR_ADDRESS.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )
    workdir = _WORKDIR.value or config_lib.default_workdir(config_file(), config.dataset)
    try:
        train.train_and_evaluate(config, workdir)
    except preemption.PreemptedError as stopped:
        sys.exit(128 + stopped.signum)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        explained = error if isinstance(error, UserError) else distributed.explain(error)
        if explained is None:
            raise
        if jax.process_count() == 1:
            raise explained from error
        # At once: an orderly end would wait for the others, who may be waiting for this one.
        print(f'error: process {jax.process_index()}: {explained}', file=sys.stderr, flush=True)
        os._exit(1)


def config_file() -> str:
    """The file that the parsed --config names."""
    return config_flags.get_config_filename(flags.FLAGS['config'])


def check_settings(words: Sequence[str], settings: Sequence[Mapping[str, str]]) -> list[ConfigDict]:
    """Checks a command line of training with several settings, as far as no data are needed.

    Once in a process, because flags are parsed once.

    Args:
      words: the command line, without the program.
      settings: values of knobs by name (`config.base_lr`), the same knobs in each; at least one.

    Returns:
      The resolved config of each.

    Raises:
      UserError: what is wrong.
    """
    from vit_jax import config as config_lib

    first = [f'--{name}={value}' for name, value in settings[0].items()]
    before = sys.argv
    sys.argv = [before[0], *words, *first]  # where overrides of a config are looked for
    try:
        _parse(sys.argv)
    finally:
        sys.argv = before
    asked = config_flags.get_override_values(flags.FLAGS['config'])
    resolved = []
    for each in settings:
        for name, value in each.items():
            try:
                flags.FLAGS[name].parse(value)
            except (flags.Error, ValueError, TypeError) as error:
                raise UserError(f'--{name}={value}: {error}') from error
        resolved.append(config_lib.resolve(_CONFIG.value, asked))
    return resolved


def run() -> None:
    """The entry point: parses flags, runs `main`, turns the user's mistakes into one line each."""
    streams.guard(go_on=True)
    logging.get_absl_handler().addFilter(streams.printable_record)
    preemption.keep_interrupts()
    try:
        argv = _parse(sys.argv)
        logging.set_verbosity(logging.WARNING)  # absl shows what any library calls INFO
        app.run(main, argv=argv, flags_parser=lambda args: args)
    except UserError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        if reason := cli.lack_of_memory(error):
            sys.exit(f'error: {reason}')
        if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
            raise
        sys.exit(
            f'error: {error.filename or "a file"} cannot be written ({error.strerror}). Earlier '
            'checkpoints are intact: make room or set the permissions, and run the same command '
            'again to go on'
        )
    except KeyboardInterrupt:  # before the first step, or a second one
        sys.exit(128 + signal.SIGINT)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; every mistake becomes a `UserError` that names the nearest right spelling."""
    if any(re.fullmatch(r'--?h(elp(full|short|xml)?)?', word) for word in argv[1:]):
        print(_help())
        sys.exit(0)
    argv = _with_config_file(argv)
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(error.flagname)) from error
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(_one_line(error, argv)) from error
    except Exception as error:  # of the config file, which is a program
        raise UserError(f'--config: the file fails: {type(error).__name__}: {error}') from error
    if len(rest) > 1:
        word = rest[1]
        raise UserError(
            f'unexpected {word!r} on the command line: flags look like --config.base_lr=0.01 '
            f'(did you mean --{word.lstrip("-")}?)'
        )
    return rest


def _help() -> str:
    """What --help prints: the first lines of this file, the flags, and every knob."""
    from vit_jax.configs import common

    own = '\n'.join(f'  --{name}: {flags.FLAGS[name].help}' for name in _FLAGS)
    source = inspect.getsource(common.get_defaults).split('ml_collections.ConfigDict()\n', 1)[1]
    knobs = [line.strip() for line in source.splitlines() if 'ConfigDict()' not in line]
    knobs = [re.sub(r'^config\.(\S+) = ', r'  --config.\1=', line) for line in knobs[:-1]]
    knobs = [re.sub(r'\w+\.FieldReference\((\w+), .*\)', r'\1', line) for line in knobs]
    configs = textwrap.fill(', '.join(_names()), 98, initial_indent='  ', subsequent_indent='  ')
    shown = f'{__doc__}\nFlags:\n{own}\n\nConfigs, by name:\n{configs}\n'
    return f'{shown}\nKnobs, with their defaults:\n' + '\n'.join(knobs)


def _names() -> list[str]:
    """Our configs."""
    return sorted({file.stem for file in _CONFIGS.glob('*.py')} - {'common', 'datasets'})


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """The words with the config file's path: `--config b16` means ours of that name, anywhere.

    Raises:
      UserError: `--config` is missing or names no file.
    """
    words, spec, place = list(argv), '', 0
    for i, word in enumerate(words[1:], 1):
        name, equals, value = word.lstrip('-').partition('=')
        if word.startswith('-') and name == 'config':
            spec = value if equals else ''.join(words[i + 1 : i + 2])
            place = i if equals else i + 1
    if not spec or spec.startswith('-'):
        raise UserError('no config given: add --config b16, another name, or a file')
    if named := re.fullmatch(r'(\w+)(:.*)?', spec):
        file = _CONFIGS / f'{named[1]}.py'
        if file.is_file():
            spec = f'{file}{named[2] or ""}'
            words[place] = f'--config={spec}' if words[place].startswith('-') else spec
    path = pathlib.Path(re.sub(r'(\.py):.*$', r'\1', spec))
    if path.is_file() and path.suffix == '.py':
        return words
    known = {name: name for name in _names()}
    for folder in (pathlib.Path('configs'), path.parent):
        known |= {file.stem: str(file) for file in folder.glob('*.py')}
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f'did you mean {known[near[0]]}?' if near else f'ours are {", ".join(_names())}'
    raise UserError(f'no config {spec} (seen from {os.getcwd()}): {hint}')


def _unknown_flag(name: str) -> str:
    if name.startswith('config.'):
        return f'--{name}: {_unknown_knob(name)}'
    if hint := _hint_from_elsewhere(name):
        return f'unknown flag --{name}: {hint}'
    near = difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.4)
    hint = (
        f'did you mean --{near[0]}?'
        if near
        else f'known: --config.KNOB=VALUE, --{", --".join(_FLAGS)}'
    )
    return f'unknown flag --{name}: {hint}'


def _unknown_knob(name: str) -> str:
    from vit_jax.configs import common

    knobs = [*_knobs(common.get_defaults())]
    short = name.removeprefix('config.')
    if short in _RETIRED:
        return f'this knob is not needed: {_RETIRED[short]}'
    near = difflib.get_close_matches(short, knobs, n=1, cutoff=0.5)
    hint = f'did you mean --config.{near[0]}?' if near else '--help lists them'
    return f'there is no such knob; {_hint_from_elsewhere(short) or hint}'


def _hint_from_elsewhere(name: str) -> str:
    """The hint for a name that another library has for one of our settings; '' for others."""
    name = name.replace('-', '_')
    if name in _RULES:
        return _RULES[name]
    ours = [ours for ours, theirs in _ELSEWHERE.items() if name in theirs.split()]
    if not ours:
        return ''
    in_steps = ' (in steps, not epochs)' if 'epochs' in name and '_steps' in ours[0] else ''
    return f'it is called {ours[0]} here{in_steps}'


def _knobs(config, prefix='') -> list[str]:
    """Paths of all leaves of a config: 'batch', 'pp.crop'."""
    paths: list[str] = []
    for key, value in config.items():
        paths += _knobs(value, f'{prefix}{key}.') if hasattr(value, 'items') else [prefix + key]
    return paths


def _one_line(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with a flag, without the traceback that absl puts into its message."""
    text = str(error)
    if isinstance(error, AttributeError | KeyError):  # `--config.base_lrr=1`: the flag is not named
        defined = set(flags.FLAGS)
        for word in argv[1:]:
            name = word.lstrip('-').partition('=')[0]
            if name.startswith('config.') and name not in defined:
                return f'--{name}: {_unknown_knob(name)}'
        return text.strip('\'"\\n')
    if 'Error whilst parsing config file' not in text:
        return text
    spec = text.removeprefix('flag --config=').split(': Error whilst')[0]
    last = text.strip().splitlines()[-1]
    kind, _, reason = last.partition(': ')
    if kind == 'TypeError' and 'required positional argument' in reason:
        reason = 'it needs an argument after a colon; its first lines say which'
    elif kind == 'TypeError' and 'positional argument' in reason:
        reason = 'it takes no argument after a colon'
    elif kind != 'ValueError':
        reason = last
    return f'--config {spec}: {reason}'


def use_compile_cache(folder: str, *, asked: bool) -> None:
    """Keeps compiled programs on disk, so that a second run starts sooner.

    Args:
      folder: where; '' for nowhere.
      asked: whether a flag said so; else a folder that cannot be written is only noted.
    """
    if not folder:
        return
    import jax

    path = pathlib.Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if not asked:
            print(
                f'Note: compiled programs are not kept: {folder} cannot be written '
                f'({error.strerror})',
                file=sys.stderr,
            )
            return
        raise UserError(
            f'config.compile_cache={folder} cannot be written ({error.strerror}): use another '
            'folder, or --config.compile_cache= for none'
        ) from error
    jax.config.update('jax_compilation_cache_dir', str(path))
    # Also the small programs of the start: by default only what took a second is kept.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


if __name__ == '__main__':
    run()
