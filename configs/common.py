"""Every knob there is, with its default and what it does.

A config file starts from `get_config()`, which has every knob *unset*, and sets what it is about. After the command
line is parsed, `vit_jax.config.resolve` fills what is still unset. Precedence, weakest first: the default here; the
dataset's preset (`datasets.py`); the file's own table for that dataset (`config.dataset_presets`); what the file sets;
flags (`--config.base_lr=0.01`). "Off" is 0 or an empty string.
"""

import ml_collections
from ml_collections import config_dict


def get_defaults() -> ml_collections.ConfigDict:
    """All knobs with their defaults."""
    config = ml_collections.ConfigDict()

    # Data.
    config.dataset = 'tf_flowers'  # a TFDS name, a folder of images, or 'digits'
    config.tfds_data_dir = (
        ''  # where TFDS keeps prepared sets; empty: TFDS's own (~/tensorflow_datasets)
    )
    config.tfds_manual_dir = (
        ''  # where archives lie that TFDS cannot download itself (imagenet2012)
    )
    config.pp = ml_collections.ConfigDict()
    config.pp.train = (
        ''  # split to train on, in TFDS's notation: 'train[:90%]'; empty: the dataset's own
    )
    config.pp.test = ''  # split to evaluate on
    config.pp.crop = 224  # side of the images the model sees, pixels
    config.pp.inception_crop = (
        True  # train on random crops of 5 to 100 % of the area; off: the whole image
    )
    config.pp.resize = 0  # with inception_crop off: resize to this side first, then crop at random; 0: straight to crop
    config.pp.flip = True  # mirror half of the training images
    config.data_threads = 0  # threads that read and decode; 0: one per core, 16 at most

    # Weights to start from. `pretrained` beats `model_or_filename` beats `pretrained_dir`; a flag beats a file.
    config.pretrained = ''  # a file, a folder, a released name ('imagenet21k/ViT-B_16.npz') or an address; empty: none
    config.model_or_filename = (
        ''  # AugReg: 'B_16' (its best checkpoint) or a file name of index.csv
    )
    config.pretrained_dir = ''  # a folder that holds <model name>.npz, or AugReg's files
    config.keep_head = (
        False  # start from the checkpoint's head where it fits, instead of from zeros
    )

    # Training.
    config.batch = 512  # images per step, over all devices
    config.batch_eval = 512  # images per evaluation step
    config.accum_steps = (
        8  # micro-batches a device splits its share into, to save memory; 0 or 1: no splitting
    )
    config.total_steps = 500
    config.warmup_steps = 100  # linear from 0 to base_lr
    config.base_lr = 0.03
    config.decay_type = 'cosine'  # after warm-up: 'cosine' to 0, or 'linear' to 1e-5
    config.grad_norm_clip = 1.0  # largest global norm of the gradient; 0: no clipping
    config.optimizer = 'sgd'  # 'sgd' (with momentum) or 'adamw'
    config.momentum = 0.9  # of sgd
    config.weight_decay = 0.0  # on kernels; adamw: decoupled, sgd: added to the gradient
    config.optim_dtype = (
        'bfloat16'  # how momentum (sgd) or the first moment (adamw) is stored, or 'float32'
    )
    config.seed = 0  # initialisation, shuffle, augmentation, dropout

    # Computation.
    config.dtype = (
        ''  # activations: 'float32' or 'bfloat16'; empty: bfloat16 on GPU, float32 on CPU
    )
    config.attention = 'auto'  # 'auto', 'xla' or 'cudnn'
    config.remat = ''  # recompute activations to save memory: 'dots', 'full', or empty
    config.fsdp = 1  # devices that share one copy of parameters and optimizer state; 1: data parallel, -1: all
    config.compile_cache = '~/.cache/vit_jax/jax'  # compiled programs are kept here; empty: nowhere

    # Reports and checkpoints.
    config.progress_every = 10  # steps between lines of metrics
    config.eval_every = 100  # steps between evaluations; the last step is always evaluated
    config.checkpoint_every = 1_000  # steps between checkpoints; the last step is always saved
    config.keep_checkpoints = 1  # how many checkpoints stay
    return config


def get_config() -> ml_collections.ConfigDict:
    """All knobs, unset; plus `model` (the architecture) and `dataset_presets` (a file's own table), empty.

    Returns:
      A `ConfigDict` whose leaves are typed placeholders: reading one gives None, setting one checks the type.
    """

    def unset(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        return ml_collections.ConfigDict(
            {
                key: unset(value)
                if isinstance(value, ml_collections.ConfigDict)
                else config_dict.placeholder(type(value))
                for key, value in config.items()
            }
        )

    config = unset(get_defaults())
    config.model = ml_collections.ConfigDict()
    config.dataset_presets = ml_collections.ConfigDict()
    return config
