"""Compares what a page said of photos, `web_page.mjs`, with ONNX Runtime on the same file.

python -m benchmarks.web_page site/model.onnx browser.json
"""

import json
import pathlib
import statistics
import sys

import numpy as np

from vit_jax.inference import classifier, predict


def main() -> None:
    """The command line; see the top of the file."""
    model, told = sys.argv[1:]
    found = json.loads(pathlib.Path(told).read_text())
    seconds = sorted(found['seconds'])
    print(f'Chromium {found["version"]}, one thread')
    print(
        f'first answer after {statistics.median(seconds):.2f} s '
        f'(median of {len(seconds)}: {seconds[0]:.2f} to {seconds[-1]:.2f})'
    )
    browser = found['probabilities']
    if not browser:
        return
    native = dict(predict.predict(classifier.open_classifier(model), list(browser), batch=1))
    same = [np.argmax(browser[photo]) == np.argmax(native[photo]) for photo in browser]
    largest = [np.abs(np.array(browser[photo]) - native[photo]).max() for photo in browser]
    print(
        f'{len(browser)} photos: the same most probable class for {100 * np.mean(same):.1f} %; '
        f'probabilities differ by {np.mean(largest):.2g} (mean of the largest of each photo), '
        f'{np.max(largest):.2g} at most'
    )


if __name__ == '__main__':
    main()
