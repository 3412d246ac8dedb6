"""Layer tables: of the real modules, and as torchsummary prints them."""

import csv

import pytest

from vit_jax import models, variants
from vit_jax.analysis import counts, summary, tables
from vit_jax.errors import UserError

from_config = models.from_config


def small(name, **changes):
    config = variants.get_config(name).to_dict()
    if 'transformer' in config:
        config['transformer']['num_layers'] = 3
    else:
        config['num_blocks'] = 3
    return config | changes


@pytest.mark.parametrize(
    'name', ['ViT-Ti_16', 'R26+ViT-S_32', 'Mixer-S_32', 'DeiT-Ti_16', 'ViT-B_16-mlp-head']
)
def test_layers_add_up_to_the_formulas(name):
    config = small(name)
    found = summary.layers(from_config(config, num_classes=7), 96)
    whole = found[0]
    assert whole.path == ()
    assert whole.output == (1, 7)
    assert whole.parameters == counts.parameters(config, 7, 96)
    assert whole.flops == 2 * counts.forward_macs(config, 7, 96)
    for layer in found:
        children = [c for c in found if c.path and c.path[:-1] == layer.path]
        if children:
            assert layer.parameters == sum(c.parameters for c in children)
            assert layer.flops >= sum(c.flops for c in children)
    assert len({layer.path for layer in found}) == len(found)


def test_a_block_in_detail():
    found = {x.path: x for x in summary.layers(from_config(small('ViT-Ti_16'), num_classes=7), 96)}
    block = ('Transformer', 'encoderblock_1')
    assert found[block].parameters == 12 * 192**2 + 13 * 192
    assert found[block].output == (1, 37, 192)
    hidden = found[*block, 'MlpBlock_0', 'Dense_0']
    assert (hidden.output, hidden.flops) == ((1, 37, 768), 2 * 37 * 192 * 768)
    assert found[('cls',)].kind == 'parameter'
    # The products are the attention module's, its children hold the weights.
    attention = found[*block, 'MultiHeadDotProductAttention_0']
    assert attention.flops == 2 * (4 * 37 * 192**2 + 2 * 37**2 * 192)
    assert found[*attention.path, 'query'].parameters == 192**2 + 192


def test_equal_blocks_are_one_line_unless_expanded():
    found = summary.layers(from_config(small('ViT-Ti_16'), num_classes=7), 96)
    brief = summary.table(found, title='x')
    names = [row[0].strip() for row in brief.rows]
    assert 'encoderblock_1 to encoderblock_2' in names
    assert names.count('LayerNorm_0') == 1
    assert not any('Dropout' in name for name in names)
    expanded = [row[0].strip() for row in summary.table(found, title='x', expand=True).rows]
    assert expanded.count('LayerNorm_0') == 3
    assert len(expanded) == len(found)


def test_an_impossible_image():
    with pytest.raises(UserError, match='whole number of 16 x 16 patches'):
        summary.layers(from_config(small('ViT-Ti_16'), num_classes=7), 100)


# Published: forward/backward, parameters, total; parameters counted; lines.
TORCHSUMMARY = {
    'ViT-B_16': ('408.54', '326.73', '735.84', 85_650_437, 199),
    'ViT-B_32': ('95.61', '333.48', '429.66', 87_419_909, 199),
    'ViT-L_32': ('253.01', '1165.25', '1418.84', 305_463_301, 391),
    'ViT-H_14': ('2358.66', '2404.94', '4764.17', 630_440_965, 519),
}


def torchsummary(config, style='csv'):
    return summary.torchsummary(config, 5, 224, title='x', style=style)


@pytest.mark.parametrize('name', TORCHSUMMARY)
def test_published_torchsummary_totals(name):
    passes, params, total, count, lines = TORCHSUMMARY[name]
    config = variants.get_config(name)
    found = torchsummary(config, 'terminal')
    assert found.notes[:5] == (
        f'Total params: {count:,}',
        'Input size (MB): 0.57',
        f'Forward/backward pass size (MB): {passes}',
        f'Params size (MB): {params}',
        f'Estimated Total Size (MB): {total}',
    )
    assert len(found.rows) == lines
    assert f'the model has {counts.parameters(config, 5, 224):,} parameters' in found.notes[5]


def test_torchsummary_lines():
    config = variants.get_config('ViT-B_16')
    lines = {name: (output, parameters) for name, output, parameters in torchsummary(config).rows}
    assert lines['Conv2d-1'] == ('[-1,768,14,14]', '590592')
    assert lines['Linear-6'] == ('[-1,197,2304]', '1771776')
    assert lines['Dropout-7'] == ('[-1,12,197,197]', '0')
    assert lines['Block-196'] == ('[-1,197,768]', '0')
    assert lines['Linear-199'] == ('[-1,5]', '3845')
    text = tables.render(torchsummary(config, 'terminal'), 'terminal')
    assert 'Total params: 85,650,437' in text
    assert 'class token (768), position embedding (151,296)' in text
    assert '85,802,501' in text


def test_torchsummary_with_a_representation_layer():
    config = small('ViT-Ti_16', representation_size=64)
    rows = torchsummary(config).rows
    assert [name.split('-')[0] for name, *_ in rows[-3:]] == ['Linear', 'Tanh', 'Linear']
    total = f'{counts.parameters(config, 5, 224):,} parameters'
    assert total in torchsummary(config, 'terminal').notes[5]


@pytest.mark.parametrize('patch', [16, 32])
def test_torchsummary_tables_that_were_published(shared_dir, patch):
    path = shared_dir / 'reference' / f'torchsummary_b{patch}_5classes.csv'
    with open(path, newline='', encoding='utf-8') as f:
        published = list(csv.reader(f))
    text = tables.render(torchsummary(variants.get_config(f'ViT-B_{patch}')), 'csv')
    assert list(csv.reader(text.splitlines())) == published


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('Mixer-B_16', 'MLP-Mixer'),
        ('R50+ViT-B_16', 'ResNet'),
        ('DeiT-B_16', 'distillation token'),
        ('ViT-B_16-mlp-head', 'hidden layer'),
        ('ViT-B_16-gap-norep', 'class token'),
        ('vit_small_patch14_reg4_dinov2', 'LayerScale'),
    ],
)
def test_what_torchsummary_never_showed(name, why):
    with pytest.raises(UserError, match=f'{why}.*--style jax'):
        torchsummary(variants.get_config(name))


def test_formats():
    table = tables.Table('Sizes', ('Name', 'Count>'), [('a, b', '1,000'), ('c', '2')], ('Note.',))
    assert tables.render(table, 'csv') == 'Name,Count\n"a, b","1,000"\nc,2\n'
    markdown = tables.render(table, 'markdown').splitlines()
    assert markdown[0] == '**Sizes**'
    assert markdown[2] == '| Name | Count |'
    assert markdown[-1] == 'Note.'
    terminal = tables.render(table, 'terminal')
    assert terminal.startswith('Sizes\n') and terminal.endswith('Note.\n')
