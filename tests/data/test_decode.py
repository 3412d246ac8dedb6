"""Decoding: bit-equal to TensorFlow where it matters, and every odd file a person may have."""

import concurrent.futures
import hashlib
import io
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data.decode import MAX_PIXELS, BadImageError, decode, load_image, size_of_jpeg
from vit_jax.data.preprocess import Preprocess

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
PHOTOS = sorted((FIXTURES / 'photos').glob('*.jpg'))


@pytest.fixture(scope='module')
def picture() -> np.ndarray:
    """uint8 [48, 64, 3], smooth, so that JPEG keeps it within some grey levels."""
    coarse = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 48), Image.BICUBIC))


def encode(image, format, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(
        file, format, **options
    )
    return file.getvalue()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize('path', PHOTOS, ids=lambda path: path.stem)
def test_jpeg_is_bit_equal_to_tensorflow(path):
    pixels = decode(path.read_bytes(), key=str(path))
    golden = np.load(FIXTURES / 'pixels.npz')[f'{path.stem}/sha256']
    assert pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == str(golden)
    # The golden can tell: Pillow's decoder, another inverse transform, gives other pixels.
    pillow = np.asarray(Image.open(path).convert('RGB'))
    assert not np.array_equal(pixels, pillow) and distance(pixels, pillow) < 2


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'WEBP'])
def test_lossless_formats_are_exact(picture, format):
    options = {'lossless': True} if format == 'WEBP' else {}
    assert np.array_equal(decode(encode(picture, format, **options), key='x'), picture)


def test_grey_images_get_three_equal_channels(picture):
    grey = picture[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(decode(encode(grey, 'PNG'), key='x'), expected)
    jpeg = decode(encode(grey, 'JPEG', quality=95), key='x')
    assert np.array_equal(jpeg[..., 0], jpeg[..., 2]) and distance(jpeg, expected) < 2
    black_white = Image.fromarray(grey > 100)
    white = decode(encode(black_white, 'PNG'), key='x')
    assert np.array_equal(white[..., 1], np.where(grey > 100, 255, 0))


def test_alpha_is_dropped_not_blended(picture):
    alpha = np.linspace(0, 255, 48 * 64).reshape(48, 64, 1).astype(np.uint8)
    assert np.array_equal(decode(encode(np.dstack([picture, alpha]), 'PNG'), key='x'), picture)
    grey = np.dstack([picture[..., :1], alpha])
    assert np.array_equal(decode(encode(grey, 'PNG'), key='x')[..., 0], picture[..., 0])


def test_palette_with_transparency(picture):
    palette = Image.fromarray(picture).quantize(16)
    expected = np.asarray(palette.convert('RGB'))
    assert np.array_equal(decode(encode(palette, 'PNG'), key='x'), expected)
    transparent = encode(palette, 'PNG', transparency=bytes(range(16)))
    assert np.array_equal(decode(transparent, key='x'), expected)


def test_cmyk(picture):
    jpeg = encode(Image.fromarray(picture).convert('CMYK'), 'JPEG', quality=95)
    assert distance(decode(jpeg, key='x'), picture) < 3


def test_16_bit_grey_keeps_the_high_byte():
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(encode(grey, 'PNG'), key='x')
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
def test_exif_orientation(picture, orientation, format):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {'PNG': {}, 'JPEG': {'quality': 95}, 'WEBP': {'lossless': True}}[format]
    image = encode(picture, format, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert('RGB'))
    assert distance(decode(image, key='x', exif=True), upright) < 1.5
    assert distance(decode(image, key='x'), picture) < 4
    assert upright.shape == ((64, 48, 3) if orientation > 4 else (48, 64, 3))


def test_pixels_pass_through(picture):
    assert decode(picture, key='x') is picture


def test_arrays_become_what_their_files_become(picture):
    """Grey, alpha, 16 bits: whether it comes as a PNG file, a PIL image or an array."""
    grey, alpha = picture[..., 0], np.dstack([picture, picture[..., :1]])
    deep = picture[..., 1].astype(np.uint16) * 257
    for array in (grey, alpha, deep):
        expected = decode(encode(array, 'PNG'), key='x')
        assert expected.shape == picture.shape and expected.dtype == np.uint8
        for image in (array, Image.fromarray(array)):
            assert np.array_equal(decode(image, key='x'), expected)
    assert np.array_equal(decode(grey[..., None], key='x'), decode(grey, key='x'))
    assert np.array_equal(decode(np.moveaxis(picture, -1, 0), key='x'), picture)
    floats = decode(picture / 255, key='x')
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, picture, atol=1e-4)
    np.testing.assert_allclose(
        decode(grey.astype(np.float16) / 255, key='x')[..., 2], grey, atol=0.1
    )


def test_arrays_of_other_numbers_of_channels_stay_as_they_are():
    for channels in (1, 2, 4, 13):
        image = np.random.RandomState(0).randint(0, 256, (5, 6, channels)).astype(np.uint8)
        assert np.array_equal(decode(image, key='x', channels=channels), image)
        first = np.moveaxis(image, -1, 0) / np.float32(255)
        np.testing.assert_allclose(decode(first, key='x', channels=channels), image, atol=1e-4)
    with pytest.raises(BadImageError, match='13 channels has to be an array'):
        decode(encode(np.zeros((4, 4), np.uint8), 'PNG'), key='x', channels=13)


@pytest.mark.parametrize(
    ('image', 'words'),
    [
        (np.zeros((5, 6, 7), np.uint8), r'\[height, width, 3\], got \[5, 6, 7\] \(channels=C'),
        (np.zeros((0, 6, 3), np.uint8), r'got \[0, 6, 3\]'),
        (np.zeros((2, 5, 6, 3), np.uint8), r'got \[2, 5, 6, 3\]'),
        (np.full((5, 6, 3), 200.0), r'floats must be in \[0, 1\].* in \[200, 200\]'),
        (np.full((5, 6, 3), -0.5), r'in \[-0.5, -0.5\]'),
        (np.full((5, 6, 3), np.nan), 'nan'),
        (np.full((5, 6, 3), 200), 'uint8, uint16 or floats.*got int64'),
        (np.full((5, 6, 3), 200, np.uint16), '16 bits.*make it uint8'),
    ],
)
def test_doubtful_arrays_are_refused(image, words):
    with pytest.raises(BadImageError, match=f'digits:train/3: .*{words}'):
        decode(image, key='digits:train/3')


def test_a_pil_image_is_upright_unchanged_and_read_by_any_thread(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / 'turned.png', exif=exif)
    palette = Image.fromarray(picture).quantize(16)
    palette.save(tmp_path / 'palette.png', transparency=bytes(range(16)))
    for name in ('turned.png', 'palette.png'):
        expected = decode((tmp_path / name).read_bytes(), key='x', exif=True)
        with Image.open(tmp_path / name) as image:  # not read before the threads do
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda i: decode(image, key='x', exif=True), range(16)))
            assert all(np.array_equal(pixels, expected) for pixels in found)
            assert ('transparency' in image.info) == (name == 'palette.png')


def test_bad_files_are_named(picture):
    jpeg, png = encode(picture, 'JPEG'), encode(picture, 'PNG')
    bad = {
        'empty': b'',
        'text': b'this is no image at all',
        'half jpeg': jpeg[: len(jpeg) // 2],
        'jpeg without its last pixels': jpeg[:-12],
        'jpeg header': jpeg[:20],
        'half png': png[: len(png) // 2],
        'corrupt png': png[:60] + bytes(20) + png[80:],
        'html': b'<html><body>404</body></html>',
    }
    for name, image in bad.items():
        with pytest.raises(BadImageError, match='my photos/ä b.jpg') as caught:
            decode(image, key='my photos/ä b.jpg')
        assert caught.value.key == 'my photos/ä b.jpg', name


def test_harmless_damage_is_accepted_as_by_tensorflow(picture):
    jpeg = encode(picture, 'JPEG')
    whole = decode(jpeg, key='x')
    assert np.array_equal(decode(jpeg + b'trailing', key='x'), whole)
    assert np.array_equal(decode(jpeg[:-2] + b'\1\2\3' + jpeg[-2:], key='x'), whole)
    # TensorFlow refuses this one, but not a pixel is missing.
    assert np.array_equal(decode(jpeg[:-2], key='x'), whole)


def test_decompression_bombs_are_refused():
    side = int(MAX_PIXELS**0.5) + 100
    png = encode(Image.new('1', (side, side)), 'PNG')
    assert len(png) < 1_000_000
    with pytest.raises(BadImageError, match='more than'):
        decode(png, key='bomb.png')
    jpeg = bytearray(encode(np.zeros((8, 8, 3), np.uint8), 'JPEG'))
    frame = jpeg.index(b'\xff\xc0')
    jpeg[frame + 5 : frame + 9] = b'\xfd\xe8\xfd\xe8'  # 65000 x 65000 by its header
    with pytest.raises(BadImageError, match='65000 x 65000 is more than'):
        decode(bytes(jpeg), key='bomb.jpg')


@pytest.mark.parametrize('k', [1, 2, 4, 8])
def test_a_smaller_size_of_a_jpeg_file(k):
    image = np.zeros((53, 38, 3), np.uint8)
    image[:26] = 200
    file = encode(image, 'JPEG')
    assert size_of_jpeg(file) == (53, 38, 8)
    small = decode(file, key='', reduction=k)
    assert small.shape == (-(-53 // k), -(-38 // k), 3)
    assert abs(float(small[0, 0, 0]) - 200) < 9 and small[-1, 0, 0] < 9
    for broken in (file[: len(file) // 2], file[:30]):
        with pytest.raises(BadImageError):
            decode(broken, key='', reduction=k)
    assert size_of_jpeg(file[:30]) is None and size_of_jpeg(image) is None
    assert size_of_jpeg(encode(image, 'PNG')) is None


def test_the_size_of_a_turned_jpeg_file(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encode(picture, 'JPEG', exif=exif)
    assert size_of_jpeg(file) == (48, 64, 8) and size_of_jpeg(file, exif=True) == (64, 48, 8)
    assert decode(file, key='', exif=True, reduction=2).shape == (32, 24, 3)


@pytest.mark.parametrize('between', [b'', b'\xff\xff', b'\xff\xfe\x00\x06Exif'])
def test_exif_data_wherever_they_are_before_the_picture(picture, between):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = encode(picture, 'JPEG', exif=exif), encode(picture, 'JPEG')
    place = turned.index(b'\xff\xe1')
    file = turned[:place] + between + turned[place:]
    assert decode(file, key='', exif=True).shape == (64, 48, 3)
    # A file without, whose picture or comment has the letters.
    place = plain.index(b'\xff\xdb')
    comment = b'\xff\xfe\x00\x08Exif\x00\x00'
    file = plain[:place] + between + comment + plain[place:]
    assert decode(file, key='', exif=True).shape == (48, 64, 3)


def stray_at(file: bytes):
    """Where a segment of a JPEG file begins, up to that of the picture."""
    place = 2
    while True:
        yield place
        if file[place + 1] == 0xDA:
            return
        place += 2 + int.from_bytes(file[place + 2 : place + 4], 'big')


@pytest.mark.parametrize('stray', [b'\0', b'abcd', b'\xff\x00\xff\x00', b'x' * 70_000])
def test_stray_bytes_between_segments_of_a_jpeg_header_are_skipped(picture, stray):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encode(picture, 'JPEG', exif=exif)
    expected = decode(file, key='', exif=True)
    for place in stray_at(file):
        odd = file[:place] + stray + file[place:]
        assert np.array_equal(decode(odd, key='', exif=True), expected), place
        assert size_of_jpeg(odd, exif=True) == (64, 48, 8)
        assert decode(odd, key='', exif=True, reduction=4).shape == (16, 12, 3)
    for cut in (40, len(odd) - 200):  # what is missing is still missed
        with pytest.raises(BadImageError):
            decode(odd[:cut], key='')


def test_stray_bytes_of_a_file_from_the_web(shared_dir):
    """Whose pixels TensorFlow gives to the bit."""
    pixels = decode((shared_dir / 'cases/images/extraneous_before_dqt.jpg').read_bytes(), key='')
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == 'c2fdd70e7ed6183e'


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_undone_once_in_every_format(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(Image.open(
        io.BytesIO(encode(picture, 'PNG', exif=exif)))))  # fmt: skip
    for format, options in (
        ('PNG', {}), ('TIFF', {}), ('TIFF', {'compression': 'tiff_lzw'}),
        ('WEBP', {'quality': 95}), ('JPEG', {'quality': 95}), ('AVIF', {'quality': 95}),
    ):  # fmt: skip
        file = encode(picture, format, exif=exif, **options)
        loaded = Image.open(io.BytesIO(file))
        loaded.load()
        for image in (file, Image.open(io.BytesIO(file)), loaded):
            assert distance(decode(image, key='', exif=True), upright) < 5, (format, type(image))


def test_one_image_from_path_bytes_and_pixels(tmp_path):
    path, pp = tmp_path / 'a.png', Preprocess(crop=5)
    pixels = np.random.RandomState(0).randint(0, 256, (9, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    expected = pp.evaluate(pixels)
    for image in (path, str(path), path.read_bytes(), pixels):
        assert np.array_equal(load_image(image, pp), expected)
    out = np.zeros((5, 5, 3), np.float32)
    assert load_image(path, pp, out=out) is out and np.array_equal(out, expected)
    with pytest.raises(BadImageError, match=r'cannot use image .*none\.png'):
        load_image(tmp_path / 'none.png', pp)
