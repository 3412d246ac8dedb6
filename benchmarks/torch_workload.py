"""The contestants of benchmark.py that compute with PyTorch.

Plain ViTs of timm, transformers and torchvision with random weights, the tanh form of GELU and the
LayerNorm epsilon of ours, so that all compute the same function. Training: SGD with momentum,
clipping to norm 1, cross-entropy. bfloat16: autocast in training (parameters stay float32), a
bfloat16 model in inference. With `+compile` through torch.compile.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import batches, torchvision_import, turns

MATMUL_SIDE = {'cpu': 2048, 'cuda': 8192}


def build(setup: Mapping[str, Any]) -> turns.Workload:
    """Makes the workload of a setup, run once."""
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
    facts = {
        'import_s': time.perf_counter() - turns.BEGAN,
        'platform': 'gpu' if device == 'cuda' else 'cpu',
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'threads': torch.get_num_threads(),
    }
    if model is None:
        return Matmul(setup, facts, device)
    return Model(model, setup, facts, device)


def _peak_memory() -> int:
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return used or turns.process_memory()


class Matmul:
    """A square matrix product."""

    def __init__(self, setup: Mapping[str, Any], facts: Mapping[str, Any], device: str):
        side, dtype = MATMUL_SIDE[device], getattr(torch, setup['dtype'])
        if device == 'cpu' and dtype == torch.bfloat16:
            side //= 4  # processors that have no instructions for it take a minute
        self._factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        self.facts = {**facts, 'flops': 2 * side**3}
        self.run(1)

    def run(self, steps: int) -> None:
        """See `turns.Workload.run`."""
        for _ in range(steps):
            product = self._factors[0] @ self._factors[1]
        _wait(product)

    def peak_memory(self) -> int:
        """See `turns.Workload.peak_memory`."""
        return _peak_memory()


class Model:
    """Training or inference with a model [B, 3, S, S] -> logits."""

    def __init__(self, model: Any, setup: Mapping[str, Any], facts: Mapping[str, Any], device: str):
        start = time.perf_counter()
        self._device, self._low = device, setup['dtype'] == 'bfloat16'
        self._training = setup['mode'] == 'training'
        model = model.to(device).train(self._training)
        self.facts = {**facts, 'parameters': sum(p.numel() for p in model.parameters())}
        if self._training:
            self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        elif self._low:
            model = model.to(torch.bfloat16)
        self._parameters = list(model.parameters())

        def forward(pixels):
            # NHWC in [0, 255] to NCHW in [-1, 1]; on the device, as our step does.
            images = (pixels.permute(0, 3, 1, 2) - 127.5) / 127.5
            return model(images.to(torch.bfloat16) if self._low else images)

        def put(batch):
            image, label = torch.from_numpy(batch['image']), torch.from_numpy(batch['label'])
            return image.to(device), label.long().to(device)

        compiled = setup['contestant'].endswith('+compile')
        self._forward = torch.compile(forward) if compiled else forward
        self._batches = batches.on_device(setup, put)
        self.facts['init_s'] = time.perf_counter() - start
        self.facts['first_step_s'] = self._steps(1)
        if compiled:  # it compiles at the first call
            self.facts['compile_s'] = self.facts['first_step_s']

    def run(self, steps: int) -> dict[str, float]:
        """See `turns.Workload.run`."""
        if self._device == 'cpu':
            return {'seconds': self._steps(steps)}
        # Contestants share the GPU: what this one holds beside its parameters goes when it waits,
        # and comes back in a step that is not timed.
        self._steps(1)
        seconds = self._steps(steps)
        torch.cuda.empty_cache()
        return {'seconds': seconds}

    def peak_memory(self) -> int:
        """See `turns.Workload.peak_memory`."""
        return _peak_memory()

    def _steps(self, count: int) -> float:
        """Seconds that `count` steps take."""
        start = time.perf_counter()
        for _ in range(count):
            pixels, labels = next(self._batches)
            if self._training:
                result = self._train(pixels, labels)
            else:
                with torch.inference_mode():
                    result = self._forward(pixels)
        _wait(result)
        return time.perf_counter() - start

    def _train(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._low):
            logits = self._forward(pixels)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return loss


def _wait(tensor: torch.Tensor) -> None:
    """Until the device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _timm(setup: Mapping[str, Any]) -> Any:
    torchvision_import.load()  # timm imports it
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
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(  # type: ignore[call-arg]  # num_labels goes to its parent
            hidden_size=config['hidden_size'],
            num_hidden_layers=transformer['num_layers'],
            num_attention_heads=transformer['num_heads'],
            intermediate_size=transformer['mlp_dim'],
            hidden_act='gelu_pytorch_tanh',
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-6,
            image_size=setup['image_size'],
            patch_size=config['patches']['size'][0],
            num_labels=setup['num_classes'],
        )
    )

    return torch_onnx.Logits(model)


def _torchvision_vit(setup: Mapping[str, Any]) -> Any:
    torchvision = torchvision_import.load()
    config = setup['model_config']
    transformer = config['transformer']
    model = torchvision.models.VisionTransformer(
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
