"""Converts weights between libraries: from any format that is read to any that is written.

SRC is a model folder, a .npz, .safetensors or .pth file, a folder of Hugging Face or timm, or the
name of a released checkpoint. DST is a .npz file or, for the other formats, a folder; it must not
exist. --to model writes a model folder. Arrays are read and written one by one. What a format
cannot express is refused by name.

Of a model of images and texts (CLIP, SigLIP) the image tower is converted. --to two_towers converts
both towers, with the tokenizer, into a folder of this package; such a folder, or a .npz with
--vocabulary, becomes one of transformers by --to huggingface.

--adapter merges an adapter of PEFT, LoRA or DoRA, into SRC: the folder `adapter/` of a run with
config.lora_rank, whose classes and image size then count, or one that was trained elsewhere.

(This turns files into files, of any size, without running the model. For a model that is verified
in the library it is for, and for ONNX and StableHLO: vit_jax export.)

Examples:
    vit_jax convert runs/b16-tf_flowers/model flowers_hf --to huggingface
    vit_jax convert ViT-B_16.npz b16_timm --to timm --drop pre_logits
    vit_jax convert jx_vit_base_p16_224-80ecf9dd.pth ViT-B_16.npz --to npz
    vit_jax convert ViT-B_16.npz flowers --to model --adapter runs/b16-tf_flowers/adapter
    vit_jax convert siglip.npz siglip_hf --to huggingface --vocabulary sentencepiece.model
"""

import argparse

from vit_jax import cli

TARGETS = ('model', 'npz', 'timm', 'huggingface', 'torchvision', 'two_towers')


def main() -> int:
    """Runs the command line; returns the exit status, 1 if the conversion failed."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('source', metavar='SRC', help='what to convert')
    parser.add_argument('destination', metavar='DST', help='file (npz) or folder to write')
    parser.add_argument('--to', required=True, choices=TARGETS, help='the format of DST')
    parser.add_argument(
        '--drop',
        nargs='+',
        default=[],
        metavar='LAYER',
        help='leave this layer out where DST has no place for it: pre_logits',
    )
    parser.add_argument(
        '--variant',
        default='',
        help='architecture of SRC, such as ViT-B_16, where its arrays do not tell',
    )
    parser.add_argument(
        '--vocabulary',
        default='',
        metavar='FILE',
        help="the tokenizer of a .npz of SigLIP: a SentencePiece model, or Gemma's tokenizer.json",
    )
    parser.add_argument(
        '--adapter', default='', metavar='FOLDER', help='merge this adapter of PEFT into SRC'
    )
    cli.add_input(parser)
    args = parser.parse_args()
    return cli.run(lambda: _convert(args), go_on=True)


def _convert(args: argparse.Namespace) -> None:
    # Not at the top: they take seconds, and --help should not.
    from vit_jax.checkpoint import npz
    from vit_jax.errors import UserError, printable
    from vit_jax.export import adapters, pytorch
    from vit_jax.inference import model_folder, two_tower

    if args.to == 'two_towers' or args.vocabulary or two_tower.is_folder(args.source):
        if args.adapter:
            raise UserError('--adapter is merged into a classifier, not into two towers')
        _convert_two_towers(args)
        return
    model = model_folder.open_model(args.source, variant=args.variant, **cli.input_of(args))
    arrays = npz.flatten(model.params)
    count = sum(array.size for array in arrays.values())
    name = model.model_config.get('model_name') or 'a model of no known variant'
    kind = model.source.get('format', 'vit_jax model folder')
    what = f'{model.source.get("file", args.source)}: {name}, {kind}, {len(arrays)} arrays, '
    print(printable(f'{what}{count:,} parameters'))
    known = model.source.get('notes')
    for note in known if isinstance(known, list) else ():
        print(f'  {printable(note)}')
    model_folder.check(model)
    if args.adapter:
        model = adapters.merged(model, args.adapter)
        print(printable(f'{args.adapter}: merged'))
    model, notes = pytorch.drop_layers(model, args.drop)
    if args.to == 'model':
        model_folder.save_new(args.destination, model)
    else:
        notes += pytorch.write(args.destination, model, to=args.to)
    print(printable(f'{args.destination}: written for {args.to}'))
    for note in notes:
        print(f'  {printable(note)}')


def _convert_two_towers(args: argparse.Namespace) -> None:
    from vit_jax.errors import UserError, printable
    from vit_jax.export import two_towers
    from vit_jax.inference import two_tower

    if args.to not in ('two_towers', 'huggingface'):
        raise UserError(
            f'both towers are written as two_towers or huggingface, not as {args.to}; the image '
            'tower alone comes from the folder or file that the model was made from'
        )
    towers = two_tower.load(args.source, args.vocabulary)
    notes = towers.source.get('notes')
    for note in notes if isinstance(notes, list) else ():
        print(f'  {printable(note)}')
    if args.to == 'huggingface':
        notes = two_towers.write(args.destination, towers)
    else:
        two_tower.save(args.destination, towers)
        notes = []
    print(printable(f'{args.destination}: written for {args.to}'))
    for note in notes:
        print(f'  {printable(note)}')
