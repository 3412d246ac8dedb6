"""Images with captions: tables, TFDS sets, digits; one caption at a time in training."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from vit_jax.data import captions, sources, text
from vit_jax.data.loader import BatchLoader
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

FIXTURE = pathlib.Path(__file__).parents[1] / 'fixtures/data/made_captions'
ROWS = [(f'{i}.png', f'text {i} {count}') for i in range(6) for count in range(i % 3 + 1)]
SPLIT = [*((*row, 'train') for row in ROWS), ('0.png', 'x', 'test')]


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (7, 5), (grey, grey, grey)).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for image in range(6):
        (tmp_path / f'{image}.png').write_bytes(png(10 * image))
    return tmp_path


@pytest.fixture
def tokenizer(tmp_path):
    file = tmp_path / 'vocab.txt'
    file.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', 'text', 'grey', *map(str, range(6))]))
    return text.BertTokenizer(file, 5)


def csv(rows, header='image,caption'):
    return '\n'.join([header, *(','.join(row) for row in rows)])


def read_all(data, split='train'):
    """Captions by the image's grey level."""
    part = data.select(split)
    examples = [part[i] for i in range(len(part))]
    found = {Image.open(io.BytesIO(e.image)).getpixel((0, 0))[0] // 10: e.label for e in examples}
    assert len(found) == len(examples) and part.captions() == [e.label for e in examples]
    return found


EXPECTED = {image: tuple(t for n, t in ROWS if n == f'{image}.png') for image in range(6)}


@pytest.mark.parametrize('form', ['csv', 'jsonl', 'lists', 'metadata'])
def test_a_table_has_several_captions_of_an_image(folder, form):
    if form == 'csv':
        (folder / 'captions.csv').write_text(csv(ROWS))
    elif form == 'metadata':
        (folder / 'metadata.csv').write_text(csv(ROWS, 'file_name,text'))
    else:
        rows = [{'image': name, 'caption': caption} for name, caption in ROWS]
        if form == 'lists':
            rows = [{'image': f'{i}.png', 'caption': EXPECTED[i]} for i in EXPECTED]
        (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    data = sources.open_dataset(str(folder), columns='caption=')
    assert read_all(data) == EXPECTED and data.class_names == ()
    train, test = sources.open_sources(str(folder), columns='caption=')
    assert len(train) + len(test) == 6 and train.overlap(test) == 0


def test_columns_splits_and_groups(folder, caplog):
    rows = [(*row, 'train' if int(row[0][0]) < 4 else 'test', f'g{row[0][0]}') for row in ROWS]
    file = folder / 'x.csv'
    file.write_text(csv(rows, 'file,says,part,group'))
    data = sources.open_dataset(str(file), columns='image=file,caption=says,split=part')
    assert 'captions from says, split from part, group from group' in caplog.text
    assert read_all(data) == {i: EXPECTED[i] for i in range(4)}
    assert read_all(data, 'test') == {i: EXPECTED[i] for i in (4, 5)}
    assert set(data.select('test').groups()) == {'g4', 'g5'}
    before = data.select('train').fingerprint()
    file.write_text(csv(rows, 'file,says,part,group').replace('text 2 1', 'text 2 X'))
    data = sources.open_dataset(str(file), columns='image=file,caption=says,split=part')
    assert data.select('train').fingerprint() != before


@pytest.mark.parametrize(
    ('table', 'columns', 'words'),
    [
        (csv(ROWS, 'image,words'), 'caption=', 'no column .* like one of the captions .*caption='),
        (csv(ROWS), 'caption=words', 'no column words'),
        (csv(ROWS), 'caption=caption,label=caption', 'label and caption exclude each other'),
        (csv(ROWS), 'caption=,weight=caption', 'captions have no weight'),
        (csv([*ROWS, ('0.png', ' ')]), 'caption=', 'row 14: its caption is empty'),
        (csv([*ROWS, ('0.png', 'x' * 100_001)]), 'caption=', 'its caption has 100,001 characters'),
        (csv([*ROWS, ('9.png', 'x')]), 'caption=', 'there is no file 9.png'),
        (
            csv(SPLIT, 'image,caption,split'),
            'caption=',
            'row 14: its image is in train already',
        ),
        (csv([]), 'caption=', 'has no rows'),
        (csv([('0.png', '')]), 'caption=', '1 of 1 rows cannot be used'),
    ],
)
def test_what_is_wrong_with_a_table_is_said(folder, table, columns, words):
    (folder / 'captions.csv').write_text(table)
    with pytest.raises(UserError, match=words):
        sources.open_dataset(str(folder), columns=columns, max_unreadable=0.0)


@pytest.mark.parametrize(
    ('dataset', 'words'),
    [
        ('', r'has no captions: expected captions.csv, .* with the columns image and caption'),
        ('digits', 'digits_captions has the same images in colours'),
        ('nothing.csv', 'there is no table'),
        ('/no/where', 'there is no folder /no/where'),
    ],
)
def test_data_without_captions(folder, dataset, words):
    with pytest.raises(UserError, match=words):
        sources.open_dataset(dataset or str(folder), columns='caption=')


@pytest.fixture
def tfds_set(tmp_path):
    """A set with the features of coco_captions, as TFDS 4.9.10 prepared it; the records are ours.

    Image 1 has an empty caption.
    """
    folder = tmp_path / 'tfds/made_captions/1.0.0'
    shutil.copytree(FIXTURE, folder)
    name = 'made_captions-train.array_record-00000-of-00001'
    writer = ArrayRecordWriter(str(folder / name), 'group_size:1')
    for index in range(4):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature['image'].bytes_list.value.append(png(10 * index))
        feature['image/filename'].bytes_list.value.append(b'x')
        texts = [f'grey {index} text {count}' for count in range(index % 3 + 1)]
        if index == 1:
            texts[1] = ''
        feature['captions/text'].bytes_list.value.extend(text.encode() for text in texts)
        feature['captions/id'].int64_list.value.extend(range(len(texts)))
        writer.write(example.SerializeToString())
    writer.close()
    return {'tfds_data_dir': str(tmp_path / 'tfds'), 'columns': 'caption='}


def test_a_tfds_set_of_captions(tfds_set, tokenizer):
    data = sources.open_dataset('made_captions', **tfds_set)
    part = data.select('train')
    assert part.captions() is None  # they stand in the records
    assert part[2].label == ('grey 2 text 0', 'grey 2 text 1', 'grey 2 text 2')
    assert part[3].image == png(30)
    told = captions.tokenized(data, tokenizer).select('train')
    assert told.label_dtype == np.dtype((np.int32, (5,)))
    assert told[0].label.tolist() == [[2, 4, 5, 3, 5]]
    with pytest.raises(UserError, match='made_captions:train/1.*its caption is empty'):
        told[1]
    tokens = captions.Tokens.of(told, tokenizer)
    assert tokens.image.tolist() == [0, 2, 2, 2, 3] and tokens.ids.shape == (5, 5)
    with pytest.raises(UserError, match='not a set for image classification'):
        sources.open_dataset('made_captions', tfds_data_dir=tfds_set['tfds_data_dir'])


def test_one_caption_of_an_image_at_a_time(folder, tokenizer):
    """By seed and place alone; over the epochs, all of them; also from memory, on two processes."""
    (folder / 'captions.csv').write_text(csv(ROWS))
    data = sources.open_dataset(str(folder), columns='caption=')
    source = captions.tokenized(data, tokenizer).select('train')
    expected = {i: {tuple(ids) for ids in source[i].label.tolist()} for i in range(6)}

    def loader(**processes):
        preprocess = Preprocess(4, inception_crop=False)
        return BatchLoader(source, preprocess, batch=6, seed=1, **processes)

    seen = {index: set() for index in expected}
    whole = loader()
    for step in range(20):
        batch = whole[step]
        assert sorted(batch['example']) == list(range(6)) and batch['label'].shape == (6, 5)
        for index, ids in zip(batch['example'].tolist(), batch['label'].tolist(), strict=True):
            seen[index].add(tuple(ids))
        halves = [loader(process_index=i, process_count=2)[step]['label'] for i in range(2)]
        assert np.array_equal(np.concatenate(halves), batch['label'])
    assert seen == expected
    tokens = captions.Tokens.of(source, tokenizer)
    assert tokens.image.tolist() == [i for i in range(6) for _ in source.captions()[i]]


def test_digits_are_those_of_the_dataset_digits():
    pairs = sources.open_dataset('digits_captions', columns='caption=').select('train')
    digits = sources.open_dataset('digits').select('train')
    assert len(pairs) == len(digits) == 1797
    for index in range(0, 1797, 100):
        pair, digit = pairs[index], digits[index]
        assert pair.label[1].startswith(f'the digit {digit.label} in ')
        assert np.array_equal(pair.image.max(-1) > 0, digit.image.max(-1) > 0)
        colour = pair.label[0].split()[1]
        brightest = pair.image.reshape(-1, 3)[pair.image.max(-1).argmax()]
        assert brightest.tolist() == list(captions._COLOURS[colour])
