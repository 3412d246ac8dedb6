"""Every knob there is, with its default and what it does.

A config file starts from `get_config()`, which has every knob *unset*, and sets what it is about.
After the command line is parsed, `vit_jax.config.resolve` fills what is still unset. Precedence,
weakest first: the default here; the dataset's preset (`datasets.py`); the file's own table for that
dataset (`config.dataset_presets`); what the file sets; flags (`--config.base_lr=0.01`). "Off" is 0
or an empty string.
"""

from collections.abc import Callable
from typing import Any

import ml_collections
from ml_collections import config_dict

from vit_jax import variants


def get_defaults() -> ml_collections.ConfigDict:
    """All knobs with their defaults."""
    config = ml_collections.ConfigDict()

    # --- Data
    # A folder of images, or a table (.csv, .tsv, .jsonl, .parquet); where there is none of this
    # name, a TFDS set or 'digits'.
    config.dataset = 'tf_flowers'
    # Which column of a table is what: 'image=file,label=species', with the roles image, label,
    # labels, target, split, group, weight. Empty: found by their names.
    config.columns = ''
    # The folder that the paths in a table start from. Empty: that of the table.
    config.image_root = ''
    # What an image of a folder belongs to (a patient, a scene): a regular expression for its path,
    # 'patient_([0-9]+)'. A group is on one side of every split. Tables have a column for it.
    config.group = ''
    # Cross-validation: '2/5' tests on the second of five folds of pp.train, and trains on the rest.
    config.fold = ''
    # Where TFDS keeps prepared sets. Empty: TFDS's own place, ~/tensorflow_datasets.
    config.tfds_data_dir = ''
    # Where archives lie that TFDS cannot download itself (imagenet2012).
    config.tfds_manual_dir = ''
    config.pp = ml_collections.ConfigDict()
    # Splits to train and evaluate on, in TFDS's notation ('train[:90%]'). Empty: the dataset's own.
    config.pp.train = ''
    config.pp.test = ''
    # Validation: a split, or a share such as '10%' that is held out of pp.train, of each class with
    # two images one at least. Evaluated on the way, so that the test images are not, but once, at
    # the end. Empty: where something is chosen, the split 'validation' or 10 %; else none.
    config.pp.val = ''
    # What the model sees, pixels: the side of a square, or (height, width).
    config.pp.crop = config_dict.FieldReference(224, field_type=object)
    # Channels of the images: 3 (RGB), 1 (grey), or, for .npy files in folders, any number. Weights
    # of another number are adapted: to 1 by the sum over channels, else repeated and scaled.
    config.pp.channels = 3
    # Train on random crops of 5 to 100 % of the area. Off: on the whole image.
    config.pp.inception_crop = True
    # Train on random crops of images whose short side is resized to this, as big_vision's
    # resize_small(256)|random_crop(224); then inception_crop is off. 0: not done so.
    config.pp.resize_small = 0
    # Resize to this side, or (height, width), before the crop: with inception_crop off, and in
    # evaluation with another pp.eval than 'squash'. 0: straight to crop.
    config.pp.resize = config_dict.FieldReference(0, field_type=object)
    # What evaluation and prediction see. 'squash': the whole image, whatever its aspect ratio, as
    # the original. 'resize_crop': the centre of the image with its short side at pp.resize, as timm
    # and Hugging Face. 'squash_crop': the centre of the image squashed to pp.resize.
    config.pp.eval = 'squash'
    # How evaluation resizes: 'bilinear', 'bicubic', 'nearest', 'lanczos', 'box' or 'hamming'.
    config.pp.interpolation = 'bilinear'
    # Evaluation resizes, and decodes JPEG, as Pillow does, and so timm and Hugging Face.
    config.pp.antialias = False
    # Mirror half of the training images; turn half of them upside down, which is for images without
    # an above, as from a microscope.
    config.pp.flip = True
    config.pp.flip_vertical = False
    # Pixels of training images to the bit as the original's. Off: JPEG files are decoded to a
    # smaller size where the crop has enough pixels left, and images travel as 8 bits, which is
    # faster; the crops are the same. Evaluation is always exact.
    config.pp.exact = True
    # Threads that read and decode. 0: one per core, at most 16.
    config.data_threads = 0
    # GiB of this machine's memory in which decoded images stay, as many as fit, for small sets.
    # 0.0: none.
    config.cache = 0.0
    # Largest share of unreadable images to put up with; training puts others in their place.
    config.max_unreadable = 0.01

    # --- Weights to start from
    # `pretrained` beats `model_or_filename` beats `pretrained_dir`; but a flag beats a file.
    # A file, a released name ('imagenet21k/ViT-B_16.npz') or an address. Empty: none.
    config.pretrained = ''
    # AugReg: 'B_16' for its best checkpoint, or a file name of its index.csv.
    config.model_or_filename = ''
    # A folder or bucket that holds <model name>.npz.
    config.pretrained_dir = ''
    # Start from the checkpoint's head where it fits, instead of from zeros.
    config.keep_head = False
    # New weights begin with the sine-cosine positions of MoCo v3; they are fixed with
    # config.frozen='Transformer/posembed_input/.*'.
    config.sincos_positions = False
    # Of a model of images and texts: the vocabulary of a new text tower, a file of BERT (vocab.txt)
    # or SentencePiece, or 'digits' for that of digits_captions; and weights for it, a folder of
    # BERT. Both empty: both towers come from `pretrained`, a folder of LiT, CLIP or SigLIP.
    config.vocabulary = ''
    config.pretrained_text = ''
    # How weights of another patch size are fitted: 'pseudo-inverse' (FlexiViT's rule: a resized
    # patch gives what the patch gave) or 'bilinear'.
    config.patch_resize = 'pseudo-inverse'

    # --- Training
    # Images per step, over all devices, in training and in evaluation.
    config.batch = 512
    config.batch_eval = 512
    # Micro-batches into which a device splits its share, to save memory. 0 or 1: no splitting.
    config.accum_steps = 8
    config.total_steps = 500
    # In place of total_steps: passes over the training set, or images. 0: not in place of it.
    config.epochs = 0.0
    config.total_examples = 0
    # Linear from 0 to base_lr. Where the duration is set without it (--config.total_steps=50), the
    # same share of it: 10 of 50 for 100 of 500.
    config.warmup_steps = 100
    config.base_lr = 0.03
    # After warm-up: 'cosine' to 0, 'linear' to 1e-5, 'rsqrt' (1 / sqrt(1 + steps / timescale)) or
    # 'constant'; and times a linear fall to 0 over the last `cooldown_steps`.
    config.decay_type = 'cosine'
    config.cooldown_steps = 0
    config.rsqrt_timescale = 10_000
    # Largest global norm of the gradient. 0: no clipping.
    config.grad_norm_clip = 1.0
    # 'sgd', 'adamw', 'lion', 'lamb', 'muon' or 'adafactor' (big_vision's).
    config.optimizer = 'sgd'
    # Of sgd and adafactor; the others have their papers'.
    config.momentum = 0.9
    # Times the factor of `wd_mults`. sgd: added to the gradient; the others: decoupled.
    config.weight_decay = 0.0
    # Factors of weight decay and learning rate: pairs of a regular expression that fits the whole
    # name of a parameter ('head/kernel') and a number; the first that fits counts, and where none
    # does, weight decay is off and the rate as it is.
    config.wd_mults = (('(.*/)?kernel', 1.0),)
    config.lr_mults = ()
    # Each block's rate is that of the next one times this, usually 0.75. 0.0: all alike.
    config.layer_decay = 0.0
    # Regular expression: parameters of these names stay as they are ('(?!head/).*': all but the
    # head). Empty: none.
    config.frozen = ''
    # The same from the other side, what is trained: 'head', 'last:3' (the last three blocks and all
    # that follows), 'bias' or 'norm' (those parameters, and the head), or a regular expression.
    config.train_only = ''
    # LoRA: train matrices of this rank beside the layers, usually 8, and the head. 0: off. Which
    # layers: 'attention', 'mlp', or their names, with commas ('query,value'). What they give is
    # times alpha / rank (alpha 0.0: times 1); dropout of what they see; DoRA trains the lengths of
    # the columns, too.
    config.lora_rank = 0
    config.lora_targets = 'attention'
    config.lora_alpha = 0.0
    config.lora_dropout = 0.0
    config.dora = False
    # SAM: take the gradient at parameters that are moved uphill by this, 0.05 to 0.6; two passes
    # per step. 0.0: off. GSAM, beside it: the share (0.6) of its second term, and the radius where
    # the rate is 0 (0.0: the same as sam_rho at any rate).
    config.sam_rho = 0.0
    config.gsam_alpha = 0.0
    config.gsam_rho_min = 0.0
    # How momentum, or the first moment, is stored: 'bfloat16' or 'float32'.
    config.optim_dtype = 'bfloat16'
    # AugReg's augmentation: 'none', 'light1', 'light2', 'medium1', 'medium2', 'strong1', 'strong2'.
    # It gives randaug and mixup, where they are not set. Empty: not given.
    config.augreg = ''
    # RandAugment: 'LAYERS,MAGNITUDE' ('2,15') as big_vision, or timm's ('rand-m9-mstd0.5-inc1').
    config.randaug = ''
    # Make each image grey, solarize or blur it: 3-Augment (DeiT III), with color_jitter=0.3.
    config.three_augment = False
    # Brightness, contrast and saturation times random factors between 1 - this and 1 + this.
    config.color_jitter = 0.0
    # How often an image is in its batch, each time augmented anew: 3 in DeiT. 0: once.
    config.repeated_augmentation = 0
    # Draw all classes equally often, whatever their sizes.
    config.balanced_sampling = False
    # Share of the images of which a random box is filled with noise, usually 0.25.
    config.random_erasing = 0.0
    # Mix images and labels: mixup blends, cutmix puts a box of one into another. The number is
    # that of the Beta distribution of the shares; 0.0: not done. With both, one or the other.
    config.mixup = 0.0
    config.cutmix = 0.0
    # Draw shares and boxes for each image, in place of once a batch.
    config.mix_per_example = False
    # Share of the images for which a branch of the last block is left out; linear from 0 for the
    # first block. 0.0: none.
    config.stochastic_depth = 0.0
    # Exponential moving average of the parameters, which is evaluated and becomes the model: 0.9999
    # for long training, 0.99 for some hundred steps. 0.0: none. Until the end of its warm-up, it is
    # the parameters themselves.
    config.ema_decay = 0.0
    config.ema_warmup_steps = 0
    # Of classes: 'softmax' (cross-entropy), or 'sigmoid': each class on its own, summed over
    # classes. Of numbers: 'mse' or 'huber'. Empty: by the labels: 'softmax' where each image has
    # one class, 'sigmoid' where it may have several, 'mse' for numbers. Of images and texts:
    # 'contrastive' (CLIP, LiT; also where it is empty) or 'pairwise_sigmoid' (SigLIP).
    config.loss = ''
    # Of huber: the error, in the scale of `standardize_targets`, up to which it is squared; beyond
    # it the loss is linear.
    config.huber_delta = 1.0
    # Learn from a teacher: any weights with a head that predict takes, for the same classes. How:
    # 'hard' or 'soft' (DeiT, for models with a distillation token), or 'patient' (big_vision: the
    # teacher instead of the labels). Empty: from the labels alone.
    config.teacher = ''
    config.distillation = ''
    # Of hard and soft: the teacher's share of the loss. Of soft and patient: what logits are
    # divided by.
    config.distillation_alpha = 0.5
    config.distillation_temperature = 1.0
    # Share of a label's probability that is spread evenly over all classes.
    config.label_smoothing = 0.0
    # How much an example counts, by its class: 'balanced' for all classes alike, or a number for
    # each in their order ('1,2,0.5'). Empty: all examples alike.
    config.class_weights = ''
    # How much a class counts where it is there, beside 1 where it is not, of images that may have
    # several: 'balanced' (negatives / positives), or a number for each. Empty: 1 each.
    config.positive_weights = ''
    # Bring numbers to mean 0 and deviation 1 for training; the model folder undoes it.
    config.standardize_targets = True
    # Of images and texts: embed each training image once, where all of the image tower is frozen
    # ('img/.*'), and train the text tower on that. The images are those of evaluation.
    config.cache_features = False
    # Of initialisation, shuffle, augmentation and dropout.
    config.seed = 0

    # --- Computation
    # Of activations: 'float32' or 'bfloat16'. Empty: bfloat16 on GPU, float32 on CPU.
    config.dtype = ''
    # 'auto', 'xla' or 'cudnn', see `models.attention`.
    config.attention = 'auto'
    # Recompute activations to save memory: 'dots', 'full', or empty for not at all.
    config.remat = ''
    # Compile one encoder block and loop over it: sooner compiled, but more memory. No Mixers.
    config.scan_layers = False
    # Devices that share one copy of parameters and optimizer state. 1: data parallel; -1: all.
    config.fsdp = 1
    # Same bits in every run, on GPU too, at some speed: XLA's deterministic operations.
    config.deterministic = False
    # Refuse to start where the estimated need of memory is more than there is.
    config.check_memory = True
    # Where compiled programs are kept. Empty: nowhere.
    config.compile_cache = '~/.cache/vit_jax/jax'

    # --- Reports and checkpoints
    # Steps between lines of metrics, evaluations, checkpoints; the last step always has all three.
    config.progress_every = 10
    config.eval_every = 100
    config.checkpoint_every = 1_000
    # How many checkpoints stay. With 1, there is none to fall back to if the newest gets damaged.
    config.keep_checkpoints = 2
    # Save and keep the step of the best validation accuracy, too; it ends up in model_best/.
    config.keep_best = False
    # End the run after so many evaluations in a row without a better one. 0: at total_steps.
    config.patience = 0
    # With validation images, predict the test images once, at the end. Off: not at all, as in the
    # trials of a sweep, which are chosen among on validation images.
    config.test_at_end = True
    # Write a trace of these steps, '20:30' for 20 to 30, for xprof and TensorBoard. Empty: none.
    config.profile = ''
    # Show the run elsewhere, beside TensorBoard: 'mlflow' or 'wandb'. Empty: nowhere.
    config.tracker = ''
    # Write report.html when the run is finished (`vit_jax report WORKDIR` does it at any time).
    config.report = True
    # When loss or gradient is not finite: 'stop', or 'skip' the update and count it.
    config.nan_policy = 'stop'
    return config


def get_config() -> ml_collections.ConfigDict:
    """All knobs, unset; plus `model` (the architecture) and `dataset_presets`, both empty.

    Returns:
      A `ConfigDict` whose leaves are typed placeholders: reading one gives None, setting one checks
      the type.
    """
    config = _unset(get_defaults())
    config.model = ml_collections.ConfigDict()
    config.dataset_presets = ml_collections.ConfigDict()
    return config


def fine_tuning(
    variant: str, pretrained: str, **knobs: Any
) -> Callable[..., ml_collections.ConfigDict]:
    """The `get_config` of a file that fine-tunes released weights, such as `configs/b16.py`.

    Args:
      variant: the model, a key of `variants.VARIANTS`.
      pretrained: its weights, see `config.pretrained`; empty for none.
      **knobs: what differs from the defaults above: `base_lr=0.01, pp=dict(crop=384)`.

    Returns:
      A function of `config.dataset`, whose splits and steps are those of its preset in
      `datasets.py`.
    """

    def of_dataset(dataset: str = 'tf_flowers') -> ml_collections.ConfigDict:
        config = get_config()
        config.model = variants.get_config(variant)
        config.update(pretrained=pretrained, dataset=dataset, **knobs)
        return config

    return of_dataset


def pretraining(variant: str, dataset: str, **knobs: Any) -> ml_collections.ConfigDict:
    """A config that trains a model from nothing, as big_vision's: AdamW, no dropout, warm-up.

    Args:
      variant: the model, a key of `variants.VARIANTS`.
      dataset: `config.dataset`.
      **knobs: what differs.
    """
    config = get_config()
    config.dataset = dataset
    config.model = variants.get_config(variant)
    config.model.transformer.dropout_rate = 0.0
    config.pp.update(eval='resize_crop', resize=256, interpolation='box', antialias=True)
    config.update(accum_steps=1, warmup_steps=10_000, optimizer='adamw', base_lr=0.001)
    config.weight_decay = 0.1  # big_vision's 0.0001, which is not times the rate
    config.update(knobs)
    return config


def _unset(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same knobs as placeholders of their types."""
    return ml_collections.ConfigDict(
        {
            key: _unset(value)
            if isinstance(value, ml_collections.ConfigDict)
            else config_dict.placeholder(config.get_type(key))
            for key, value in config.items()
        }
    )
