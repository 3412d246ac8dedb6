"""docs/extending.md: its blocks are one program, which runs as it stands."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'extending.md'


def test_the_program_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    code = '\n'.join(blocks)
    names = {'__name__': 'extending'}
    exec(compile(code, str(PAGE), 'exec'), names)
    found = [
        json.loads(line) for line in pathlib.Path('run/metrics.jsonl').read_text().splitlines()
    ]
    last = {name: value for line in found for name, value in line.items()}
    assert {'train_loss', 'confidence_train', 'confidence_test', 'loss_test'} <= last.keys()
    assert 0 <= last['stay_test'] <= 1 and last['accuracy_test'] in (0.5, 1.0)
    log = pathlib.Path('run/train.log').read_text()
    assert 'given by the caller: loss_fn smoothed(smoothing=0.1), tx' in log
    assert 'WARNING: no model folder: the model is a Noisy' in log
    # Each of the parts took part.
    assert (
        'Transformer' in names['params']['net']
        and 'Dense_0' in names['whole']['net']['Transformer']
    )
    exported = jax.export.deserialize(bytearray(pathlib.Path('model.stablehlo').read_bytes()))
    image = jnp.full((1, 16, 16, 3), 0.5)
    logits = names['model'].apply({'params': names['whole']}, image, train=False)
    np.testing.assert_allclose(exported.call(image), logits, atol=1e-5)
