"""Says what is on an image: every class of a model with its probability, most probable first.

Examples:
    python scripts/predict.py --model runs/b16-tf_flowers/model photo.jpg photos/
    python scripts/predict.py --model runs/b16-tf_flowers/model --top_k 3 photo.jpg
"""

import argparse
import signal
import sys


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--model',
        required=True,
        metavar='DIR',
        help='model folder (WORKDIR/model of a training run), or a released .npz file',
    )
    parser.add_argument(
        '--variant',
        default='',
        help='architecture of a .npz file, such as ViT-B_16, where its arrays do not tell',
    )
    parser.add_argument(
        '--top_k',
        type=int,
        default=0,
        metavar='K',
        help='show the K most probable classes only (default: all)',
    )
    parser.add_argument('--batch', type=int, default=32, help='images at once (default: 32)')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file, or folder of them')
    args = parser.parse_args()
    if args.top_k < 0:
        parser.error(f'--top_k: expected a number of classes, or 0 for all; got {args.top_k}')
    if hasattr(signal, 'SIGPIPE'):  # `predict.py ... | head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    # Not at the top: they take seconds, and --help should not.
    from vit_jax import model_folder, predict
    from vit_jax.errors import UserError

    status = 0
    unreadable = []
    try:
        images = predict.find_images(args.images)
        model = model_folder.load(args.model, variant=args.variant)
        results = predict.predict(model, images, batch=args.batch, on_error=unreadable.append)
        for path, probabilities in results:
            print(predict.format_prediction(path, probabilities, model.class_names, args.top_k))
    except UserError as error:
        print(f'predict.py: {error}', file=sys.stderr)
        status = 1
    if unreadable:
        sys.stdout.flush()
        print(f'{len(unreadable)} of {len(images)} images could not be read:', file=sys.stderr)
        for error in unreadable:
            print(f'  {error.key}: {error.reason}', file=sys.stderr)
        status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
