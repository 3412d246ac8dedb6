"""The contestants of benchmark.py that compute with PyTorch.

Plain ViTs of timm, transformers and torchvision with random weights, the tanh form of GELU and the
LayerNorm epsilon of ours, so that all compute the same function. Training: SGD with momentum,
clipping to norm 1, cross-entropy. bfloat16: autocast in training (parameters stay float32), a
bfloat16 model in inference. With `+compile` through torch.compile.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import batches, turns

MATMUL_SIDE = {'cpu': 2048, 'cuda': 8192}
_operators: list[Any] = []  # as long as the process lives, or the declarations go with it


def build(setup: Mapping[str, Any]) -> turns.Workload:
    """Makes the workload of a setup (see `contestants`), run once."""
    if setup.get('cores'):
        torch.set_num_threads(setup['cores'])
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cuda':
        # TensorFloat-32 for float32, which is what JAX does on a GPU; on a CPU both are exact.
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.allow_tf32 = True
    name = setup['contestant'].removesuffix('+compile')
    model = None if name == 'torch-matmul' else _MODELS[name](setup)
    step, facts = _matmul(setup, device) if model is None else _model(model, setup, device)
    workload = Steps(step, device)
    workload.facts = facts | {
        'platform': 'gpu' if device == 'cuda' else 'cpu',
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
    }
    first = workload.time(1)
    if setup['contestant'].endswith('+compile'):  # it compiles at the first call
        workload.facts['compile_s'] = first
    return workload


class Steps:
    """Steps that are all the same.

    Args:
      step: does one.
      device: 'cuda' or 'cpu'.
    """

    def __init__(self, step: Callable[[], torch.Tensor], device: str):
        self._step, self._device = step, device
        self.facts: dict[str, Any] = {}

    def run(self, steps: int) -> dict[str, float]:
        """See `turns.Workload.run`."""
        if self._device == 'cpu':
            return {'seconds': self.time(steps)}
        # Contestants share the GPU: what this one holds beside its parameters goes when it waits,
        # and comes back in a step that is not timed.
        self.time(1)
        seconds = self.time(steps)
        torch.cuda.empty_cache()
        return {'seconds': seconds}

    def time(self, count: int) -> float:
        """Seconds that `count` steps take."""
        start = time.perf_counter()
        for _ in range(count):
            self._step()
        if self._device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """See `turns.Workload.peak_memory`."""
        used = torch.cuda.max_memory_allocated() if self._device == 'cuda' else 0
        return used or turns.process_memory()


Step = tuple[Callable[[], torch.Tensor], dict[str, Any]]


def _matmul(setup: Mapping[str, Any], device: str) -> Step:
    """A square matrix product, and its FLOPs."""
    side, dtype = MATMUL_SIDE[device], getattr(torch, setup['dtype'])
    if device == 'cpu' and dtype == torch.bfloat16:
        side //= 4  # processors that have no instructions for it take a minute
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, {'flops': 2 * side**3}


def _model(model: Any, setup: Mapping[str, Any], device: str) -> Step:
    """A step of training or inference of a model [B, 3, S, S] -> logits, and its parameters."""
    low, training = setup['dtype'] == 'bfloat16', setup['mode'] == 'training'
    model = model.to(device).train(training)
    if low and not training:
        model = model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def forward(pixels):
        # NHWC in [0, 255] to NCHW in [-1, 1]; on the device, as our step does.
        images = (pixels.permute(0, 3, 1, 2) - 127.5) / 127.5
        return model(images.to(torch.bfloat16) if low else images)

    def put(batch):
        image, label = torch.from_numpy(batch['image']), torch.from_numpy(batch['label'])
        return image.to(device), label.long().to(device)

    if setup['contestant'].endswith('+compile'):
        forward = torch.compile(forward)
    data = batches.on_device(setup, put)

    def predict() -> torch.Tensor:
        pixels, _ = next(data)
        with torch.inference_mode():
            return forward(pixels)

    def train() -> torch.Tensor:
        pixels, labels = next(data)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            logits = forward(pixels)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    return train if training else predict, {'parameters': sum(p.numel() for p in parameters)}


def import_torchvision() -> Any:
    """torchvision, also where its compiled operators do not fit PyTorch's build.

    They are for object detection; declared, they need not work.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        for name in [n for n in sys.modules if n.split('.')[0] == 'torchvision']:
            del sys.modules[name]
        _operators.append(torch.library.Library('torchvision', 'DEF'))
        for name in ('nms', 'qnms'):
            _operators[0].define(f'{name}(Tensor a) -> Tensor')
        import torchvision
    return torchvision


def _timm(setup: Mapping[str, Any]) -> Any:
    import_torchvision()  # timm imports it
    from timm.models import vision_transformer

    config = setup['model_config']
    transformer = config['transformer']
    return vision_transformer.VisionTransformer(
        img_size=setup['image_size'],
        patch_size=config['patches']['size'][0],
        num_classes=setup['num_classes'],
        embed_dim=config['hidden_size'],
        depth=transformer['num_layers'],
        num_heads=transformer['num_heads'],
        mlp_ratio=transformer['mlp_dim'] / config['hidden_size'],
        act_layer='gelu_tanh',
    )


def _transformers(setup: Mapping[str, Any]) -> Any:
    import transformers

    from benchmarks import torch_onnx

    config = setup['model_config']
    transformer = config['transformer']
    described = transformers.ViTConfig(  # type: ignore[call-arg]  # num_labels goes to its parent
        hidden_act='gelu_pytorch_tanh',
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        hidden_size=config['hidden_size'],
        num_hidden_layers=transformer['num_layers'],
        num_attention_heads=transformer['num_heads'],
        intermediate_size=transformer['mlp_dim'],
        image_size=setup['image_size'],
        patch_size=config['patches']['size'][0],
        num_labels=setup['num_classes'],
    )
    return torch_onnx.Logits(transformers.ViTForImageClassification(described))


def _torchvision_vit(setup: Mapping[str, Any]) -> Any:
    config = setup['model_config']
    transformer = config['transformer']
    model = import_torchvision().models.VisionTransformer(
        image_size=setup['image_size'],
        patch_size=config['patches']['size'][0],
        num_layers=transformer['num_layers'],
        num_heads=transformer['num_heads'],
        hidden_dim=config['hidden_size'],
        mlp_dim=transformer['mlp_dim'],
        num_classes=setup['num_classes'],
    )
    for layer in model.encoder.layers:
        layer.mlp[1] = torch.nn.GELU(approximate='tanh')
    return model


_MODELS = {'timm': _timm, 'transformers': _transformers, 'torchvision': _torchvision_vit}
