"""Adapter folders: PEFT opens what is written, and what PEFT writes is merged."""

import dataclasses
import json

import jax
import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoint import adapt, npz, tensors
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import adapters, pytorch
from vit_jax.inference import model_folder
from vit_jax.models import lora

# What peft of now asks transformers of now.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing.*:FutureWarning')

VIT = {
    'patches': {'size': (8, 8)}, 'hidden_size': 16, 'model_name': None,
    'transformer': {
        'mlp_dim': 32, 'num_heads': 2, 'num_layers': 2, 'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}  # fmt: skip
MIXER = {
    'patches': {'size': (8, 8)}, 'num_blocks': 2, 'hidden_dim': 16, 'tokens_mlp_dim': 8,
    'channels_mlp_dim': 32, 'model_name': None,
}  # fmt: skip
EVERY = tuple(name for names in lora.GROUPS.values() for name in names)
NAMES = ('cat', 'dog', 'cow')
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


def made(config, settings, seed=0):
    """A base without a head, and a model with adapters that were trained beside it."""
    module = models.from_config(config, num_classes=3, lora=settings)
    params = modules.params_of(module, IMAGES, seed=seed, train=False)
    plain = lora.without(params)
    told = config, NAMES, Preprocess(16), {'weights': 'a base'}
    whole = model_folder.Model(models.from_config(config, num_classes=3), plain, *told)
    headless = {name: leaf for name, leaf in plain.items() if name != 'head'}
    base = dataclasses.replace(
        whole, model=models.from_config(config, num_classes=0), params=headless, class_names=()
    )
    return base, whole, module, params


def logits(module, params):
    return np.asarray(modules.apply(module, params, IMAGES))


@pytest.fixture(scope='module', params=['LoRA', 'DoRA'])
def written(request, tmp_path_factory):
    settings = lora.Lora(4, EVERY, alpha=6.0, dropout=0.1, dora=request.param == 'DoRA')
    base, whole, module, params = made(VIT, settings)
    folder = tmp_path_factory.mktemp(request.param) / 'adapter'
    assert adapters.write(folder, params, settings, whole, 'x.npz') == 'ViTForImageClassification'
    return folder, base, whole, module, params


def test_an_adapter_is_merged_as_it_was_trained(written):
    folder, base, _, module, params = written
    found = adapters.merged(base, folder)
    np.testing.assert_allclose(logits(found.model, found.params), logits(module, params), atol=2e-6)
    assert found.class_names == NAMES and found.source['adapter'] == str(folder)
    expected = npz.flatten(lora.merge(params, module.lora))
    for name, array in npz.flatten(found.params).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)


def test_peft_opens_it_and_computes_the_same(written, tmp_path):
    """Logits, gradients (of DoRA too, where a length is no constant), and merged weights."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    peft = pytest.importorskip('peft')
    folder, _, whole, module, params = written
    pytorch.write(tmp_path / 'base', whole, to='huggingface')
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'base').eval()
    base.classifier.weight.data.zero_()  # which the adapter brings
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    pixels = torch.tensor(IMAGES.transpose(0, 3, 1, 2))
    found = model(pixel_values=pixels).logits
    np.testing.assert_allclose(found.detach().numpy(), logits(module, params), atol=1e-5, rtol=1e-5)
    (found * torch.arange(1.0, 4.0)).sum().backward()

    def loss(params):
        logits = module.apply({'params': params}, IMAGES, train=False)
        return (logits * np.arange(1.0, 4.0)[None]).sum()

    gradients = jax.device_get(jax.jit(jax.grad(loss))(params))
    adapters.write(tmp_path / 'gradients', gradients, module.lora, whole, '')
    theirs = {
        name.replace('.modules_to_save.default', '').replace('.default', ''): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    ours = tensors.open_tensors(tmp_path / 'gradients/adapter_model.safetensors')[0]
    assert len(ours) == len(theirs)
    for name, array in ours.items():
        name = name.replace('magnitude_vector', 'magnitude_vector.weight')
        np.testing.assert_allclose(theirs[name], np.asarray(array), atol=2e-4, err_msg=name)
    with torch.no_grad():
        merged = model.merge_and_unload()(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(merged, logits(module, params), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dora', [False, True])
def test_what_peft_trained_is_merged(dora, tmp_path):
    """In both of its spellings of keys, with a rank and a factor of its own."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    peft = pytest.importorskip('peft')
    _, whole, _, _ = made(VIT, None)
    pytorch.write(tmp_path / 'base', whole, to='huggingface')
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'base')
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, use_rslora=True, modules_to_save=['classifier'],
        target_modules=['q_proj', 'fc1', 'o_proj'], alpha_pattern={'fc1': 7},
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        expected = model(pixel_values=torch.tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()
    model.save_pretrained(tmp_path / 'adapter')
    found = adapters.merged(whole, tmp_path / 'adapter')
    np.testing.assert_allclose(logits(found.model, found.params), expected, atol=1e-5, rtol=1e-5)
    assert found.class_names == NAMES
    state = {
        name: np.asarray(array)
        for name, array in tensors.open_tensors(tmp_path / 'adapter/adapter_model.safetensors')[0]
        .items()
    }  # fmt: skip
    renamed = {
        name.replace('.lora_A.', '.lora_A.default.').replace('.lora_B.', '.lora_B.default.')
        .replace('_vector', '_vector.default.weight')
        .replace('classifier.', 'classifier.modules_to_save.default.'): array
        for name, array in state.items()
    }  # fmt: skip
    assert not renamed.keys() & state.keys()
    tensors.save_safetensors(tmp_path / 'adapter/adapter_model.safetensors', renamed, {})
    again = adapters.merged(whole, tmp_path / 'adapter')
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_a_base_of_another_size_and_other_classes_is_fitted_as_in_training(tmp_path):
    settings = lora.Lora(2, ('query',))
    base, whole, module, params = made(VIT, settings)
    whole = dataclasses.replace(whole, preprocess=Preprocess(32))
    resized = adapt.adapt(
        base.params,
        jax.eval_shape(
            lambda: base.model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False)
        )['params'],
        source='x',
    )[0]
    trained = {**params, 'Transformer': {
        **params['Transformer'], 'posembed_input': resized['Transformer']['posembed_input']}
    }  # fmt: skip
    adapters.write(tmp_path / 'adapter', trained, settings, whole, 'x')
    found = adapters.merged(base, tmp_path / 'adapter')
    assert found.image_size == 32
    expected = npz.flatten(lora.merge(trained, settings))
    for name, array in npz.flatten(found.params).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)


def test_what_transformers_does_not_have_keeps_our_names(tmp_path):
    settings = lora.Lora(2, EVERY)
    base, whole, module, params = made(MIXER, settings)
    assert adapters.write(tmp_path / 'adapter', params, settings, whole, 'x') == ''
    config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    assert config['target_modules'] == ['Dense_0', 'Dense_1']
    found = adapters.merged(base, tmp_path / 'adapter')
    np.testing.assert_allclose(logits(found.model, found.params), logits(module, params), atol=2e-6)


def rewrite(folder, to, change=lambda tensors: None, **config):
    """A copy of an adapter folder that is not as it should be."""
    told = json.loads((folder / 'adapter_config.json').read_text()) | config
    arrays = tensors.open_tensors(folder / 'adapter_model.safetensors')[0]
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    change(arrays)
    to.mkdir()
    (to / 'adapter_config.json').write_text(json.dumps(told))
    tensors.save_safetensors(to / 'adapter_model.safetensors', arrays, {})
    return to


QUERY = 'base_model.model.vit.layers.0.attention.q_proj'


def test_bad_folders_are_refused(written, tmp_path):
    folder, base, whole, _, _ = written
    if 'DoRA' in str(folder):
        return

    def other_layer(arrays):
        for name in [name for name in arrays if name.startswith(QUERY)]:
            arrays[name.replace('q_proj', 'w_proj')] = arrays.pop(name)

    cases = [
        (lambda a: a.pop(f'{QUERY}.lora_B.weight'), {}, 'q_proj has lora_A, and adapter_config'),
        (lambda a: None, {'use_dora': True}, 'asks for lora_A, lora_B, lora_magnitude_vector'),
        (lambda a: None, {'peft_type': 'IA3'}, "peft_type='IA3' is not read here"),
        (lambda a: None, {'lora_alpha': 'x'}, 'have to be numbers'),
        (lambda a: a.update({f'{QUERY}.lora_embedding_A': np.zeros((2, 2), np.float32)}), {},
         'is no part of LoRA or DoRA'),
        (lambda a: a.update({f'{QUERY}.lora_A.weight': np.full((4, 16), np.nan, np.float32)}), {},
         'NaN or infinite'),
        (lambda a: a.update({f'{QUERY}.lora_A.weight': np.zeros((3, 16), np.float32)}), {},
         'are no .rank, inputs. and'),
        (lambda a: a.update({f'{QUERY}.lora_A.weight': np.zeros((4, 9), np.float32)}), {},
         'of rank 4, does not fit Transformer/encoderblock_0/MultiHead'),
        (other_layer, {}, 'the adapter is of another model'),
        (lambda a: a.clear(), {}, 'holds no adapter'),
    ]  # fmt: skip
    for index, (change, config, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            adapters.merged(whole, rewrite(folder, tmp_path / str(index), change, **config))
    flat = npz.flatten(base.params)
    positions = flat[adapt.POSITION_EMBEDDING][:, 1:]
    flat = {name: leaf for name, leaf in flat.items() if name != 'cls'}
    tokenless = npz.nest(flat | {adapt.POSITION_EMBEDDING: positions}, tmp_path)
    with pytest.raises(UserError, match='the base has no cls: other weights'):
        adapters.merged(dataclasses.replace(base, params=tokenless), folder)
    with pytest.raises(UserError, match='is no folder of an adapter'):
        adapters.merged(base, tmp_path)
    (tmp_path / '0/adapter_model.safetensors').unlink()
    with pytest.raises(UserError, match='has no adapter_model.safetensors'):
        adapters.merged(base, tmp_path / '0')
    with pytest.raises(UserError, match='is not the folder of an adapter'):
        adapters.write(tmp_path, {}, lora.Lora(1), whole, '')
