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
        (b'\xff\xfe\x00\xd8', 'cannot read .* codec can'),
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
        (('a', 'b'), ('a', 'a', 'b'), 'or could be several: a'),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_matched(data, model, message):
    with pytest.raises(UserError, match=message):
        labels.remap(data, model, 'flowers')


def imagenet():
    """(WordNet ids, our names)."""
    return tuple(zip(*labels._imagenet1k(), strict=True))


ALL = tuple(range(1000))


@pytest.mark.parametrize(
    'spell',
    [
        lambda number, id, name: name.replace(' ', '_'),
        lambda number, id, name: f'{id}_{name}',
        lambda number, id, name: f'{number:04} {id} {name}',
        lambda number, id, name: id,
        lambda number, id, name: str(number),
        lambda number, id, name: f'{number:03}',
        lambda number, id, name: f'{name}, {name.upper()} L., a kind of {name}',
        lambda number, id, name: name if name == 'Cardigan' else name.title().replace(' ', '-'),
    ],
)
def test_imagenet_is_known_by_many_spellings(spell):
    ids, names = imagenet()
    data = [spell(i, *pair) for i, pair in enumerate(zip(ids, names, strict=True))]
    data = ['cardigan' if name == 'Cardigan' and ids[i] == 'n02963159' else name
            for i, name in enumerate(data)]  # fmt: skip
    assert labels.remap(data[::-1], names, 'x') == ALL[::-1]
    if not data[0].isdecimal():
        assert labels.remap(names[::-1], data, 'x') == ALL[::-1]


def test_a_list_that_has_names_twice_is_known_by_its_order(caplog):
    ids, names = imagenet()
    own = tuple({'crane bird': 'crane', 'maillot tank suit': 'maillot'}.get(n, n) for n in names)
    assert labels.remap(ids, own, 'x') == ALL
    assert labels.remap(names, own, 'x') == ALL
    assert '2 of the 1,000 classes are matched by other spellings' in caplog.text


def test_spellings_of_ones_own_classes(caplog):
    model = ('Red Rose', 'tulip', 'lily of the valley')
    assert labels.remap(('lily_of_the_valley', 'red-rose', 'tulip'), model, 'x') == (2, 0, 1)
    assert '2 of the 3 classes are matched by other spellings, such as lily_of' in caplog.text
    assert labels.remap(('02', '00'), model, 'x') == (2, 0)
    assert labels.remap(('0', '1', '2'), model, 'x') == (0, 1, 2)
    assert 'numbers, 02, 00, ..., which are taken for the labels of the model' in caplog.text
    assert labels.remap(('0', '10', '2'), labels.numbered(11), 'x') == (0, 10, 2)
    with pytest.raises(UserError, match='red_rose and Red Rose are both Red Rose'):
        labels.remap(('red_rose', 'Red Rose'), model, 'x')
    with pytest.raises(UserError, match='or could be several: A b'):
        labels.remap(('A b',), ('a b', 'a_b'), 'x')


KERAS = '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n2", "rose"]}'


@pytest.mark.parametrize(
    ('content', 'data', 'expected'),
    [
        ('rose\tflower c\nfish\t0\n', ('fish', 'rose', 'flower_b'), (0, 2, 1)),
        ('{"rose": "flower c", "fish": 0}', ('fish', 'rose', 'flower b'), (0, 2, 1)),
        ('fish\nrose\nbird', ('bird', 'fish'), (2, 0)),
        ('["fish", "rose"]', ('rose',), (1,)),
        (KERAS, ('n01443537', 'rose'), (1, 2)),
        ('{"0": "flower b", "1": "flower a"}', ('0', '1'), (1, 0)),
        ('{"0": "x", "1": "y"}', ('y', 'x'), (1, 0)),
        ('x\t0\ny\t0', ('y', 'x'), (0, 0)),
    ],
)
def test_class_map(tmp_path, content, data, expected):
    (tmp_path / 'map').write_text(content)
    class_map = labels.read_class_map(tmp_path / 'map', data)
    model = ('flower a', 'flower b', 'flower c')
    assert labels.remap(data, model, 'x', class_map) == expected


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('other\t0', 'has none of the classes of the data'),
        ('rose\tflower z', "--class_map has 'flower z' for rose"),
        ('rose\t9', '--class_map has 9 for rose'),
        ('{"rose": [1]}', 'rose has .1., expected a class'),
        ('{"rose": ', 'cannot be read'),
    ],
)
def test_class_maps_that_do_not_fit(tmp_path, content, message):
    (tmp_path / 'map').write_text(content)
    with pytest.raises(UserError, match=message):
        class_map = labels.read_class_map(tmp_path / 'map', ('rose',))
        labels.remap(('rose',), ('flower a', 'flower b'), 'x', class_map)
    with pytest.raises(UserError, match='cannot read'):
        labels.read_class_map(tmp_path / 'none', ('rose',))


def test_names_of_keras(tmp_path):
    (tmp_path / 'names').write_text(
        '{"0": ["n1", "crane"], "1": ["n2", "crane"], "2": ["n3", "x"]}'
    )
    assert labels.read(tmp_path / 'names') == ('crane (n1)', 'crane (n2)', 'x')


def test_json_of_the_names_can_be_read_back(tmp_path):
    (tmp_path / 'names.json').write_text(json.dumps(labels.imagenet1k()))
    assert labels.read(tmp_path / 'names.json') == labels.imagenet1k()


def test_classes_of_a_command_line(tmp_path):
    (tmp_path / 'pets.txt').write_text('cat\ndog\n')
    assert labels.listed(str(tmp_path / 'pets.txt')) == labels.listed('cat, dog') == ('cat', 'dog')
    assert labels.listed('imagenet1k') == labels.imagenet1k() and labels.listed('') == ()
    for other in ('imagenet', 'ImageNet-1k', 'imagenet21k'):
        with pytest.raises(UserError, match=f'--classes {other}: .* --classes imagenet1k'):
            labels.listed(other)
