import json

import pytest

from vit_jax.errors import UserError
from vit_jax.inference import labels


def test_imagenet1k_is_the_official_list():
    ids, names = zip(*labels._imagenet1k(), strict=True)
    assert names == labels.imagenet1k()
    assert len(names) == len(set(names)) == len(set(ids)) == 1000
    assert list(ids) == sorted(ids), 'labels of ILSVRC 2012 follow the WordNet ids'
    assert all(len(one) == 9 and one[0] == 'n' and one[1:].isdigit() for one in ids)
    some = {0: 'tench', 1: 'goldfish', 134: 'crane bird', 207: 'golden retriever', 517: 'crane',
            281: 'tabby', 638: 'maillot', 639: 'maillot tank suit', 985: 'daisy',
            999: 'toilet tissue'}  # fmt: skip
    assert {i: names[i] for i in some} == some
    assert (ids[0], ids[985], ids[999]) == ('n01440764', 'n11939491', 'n15075141')


def test_own_names_are_kept_and_missing_ones_said(caplog):
    assert labels.choose(('a', 'b'), '', 'm') == ('a', 'b')
    assert labels.choose(labels.numbered(3), '', 'm') == ('class 0', 'class 1', 'class 2')
    assert not caplog.records
    assert labels.choose(labels.numbered(1000), '', 'm.npz') == labels.imagenet1k()
    assert 'm.npz has 1,000 classes without names' in caplog.text
    assert labels.choose(labels.numbered(1000), 'none', 'm') == labels.numbered(1000)
    own = tuple(f'dog {i}' for i in range(1000))
    assert labels.choose(own, '', 'm') == own
    assert labels.choose(own, 'imagenet1k', 'm') == labels.imagenet1k()


@pytest.mark.parametrize(
    'text',
    ['rose\nTulpe à fleurs\n', '\ufeffrose\r\nTulpe à fleurs', '["rose", "Tulpe à fleurs"]',
     '{"1": "Tulpe à fleurs", "0": "rose"}', '{"Tulpe à fleurs": 1, "rose": 0}\n'],
)  # fmt: skip
def test_files(tmp_path, text):
    (tmp_path / 'names').write_bytes(text.encode())
    assert labels.read(tmp_path / 'names') == ('rose', 'Tulpe à fleurs')
    assert labels.choose(('x', 'y'), str(tmp_path / 'names'), 'm') == ('rose', 'Tulpe à fleurs')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'a\n\nb\n', 'line 2 of .* is empty'),
        (b'\xff\xfe\x00\xd8', 'cannot be read as text'),
        (b'{"0": "a", "2": "b"}', 'KeyError: 1'),
        (b'["a", 3]', 'must be names'),
        (b'[', 'JSON'),
        (b'a\nb\nc\n', r'has 3 names, but model\.npz has 2 classes'),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    (tmp_path / 'names').write_bytes(content)
    with pytest.raises(UserError, match=message):
        labels.choose(('x', 'y'), str(tmp_path / 'names'), 'model.npz')


def test_remap_by_name(caplog):
    data = ('dandelion', 'daisy', 'tulips', 'sunflowers', 'roses')
    assert labels.remap(data, tuple(sorted(data)), 'tf_flowers') == (1, 0, 4, 3, 2)
    assert labels.remap(data, data, 'tf_flowers') == (0, 1, 2, 3, 4)
    assert labels.remap(('b',), ('a', 'b'), 'x') == (1,), 'fewer classes than the model'
    ids = tuple(wordnet_id for wordnet_id, _ in labels._imagenet1k())
    assert labels.remap(ids[:9:-1], labels.imagenet1k(), 'x') == tuple(range(999, 9, -1))
    assert labels.remap(labels.imagenet1k()[5:8], ids, 'x') == (5, 6, 7)
    assert not caplog.records
    assert labels.remap(data, labels.numbered(5), 'x') == (0, 1, 2, 3, 4)
    assert 'the model has no class names' in caplog.text


@pytest.mark.parametrize(
    'data, model, message',
    [
        (('rose', 'tulip'), ('roses', 'tulips', 'x'), r'2 of the 2 classes of flowers .*nearest to '
         'rose is roses'),
        (('a', 'b'), labels.numbered(3), 'cannot be matched'),
        (('a', 'b'), ('a', 'a', 'b'), 'more than one class called a'),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_matched(data, model, message):
    with pytest.raises(UserError, match=message):
        labels.remap(data, model, 'flowers')


def test_json_of_the_names_can_be_read_back(tmp_path):
    (tmp_path / 'names.json').write_text(json.dumps(labels.imagenet1k()))
    assert labels.read(tmp_path / 'names.json') == labels.imagenet1k()
