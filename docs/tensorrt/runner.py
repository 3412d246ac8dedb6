"""Says what is on images, by a TensorRT engine; needs tensorrt, cuda-python, numpy and Pillow.

pip install tensorrt cuda-python numpy pillow
python docs/tensorrt/runner.py x16.engine x16.engine.labels.txt photo.jpg another.png

For models that are evaluated by the default, squashed without antialiasing, and whose classes
exclude each other. Reading and resizing are those of docs/serving/classify.py.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'serving'))
from classify import read_image, softmax


class Engine:
    """An engine that build_engine.py made: one input, any number of outputs, a dynamic batch."""

    def __init__(self, path):
        import tensorrt as trt
        from cuda.bindings import runtime

        self.trt, self.cuda = trt, runtime
        logger = trt.Logger(trt.Logger.WARNING)
        engine = trt.Runtime(logger).deserialize_cuda_engine(pathlib.Path(path).read_bytes())
        if engine is None:
            raise SystemExit(f'{path} was built by another version of TensorRT, or for another GPU')
        self.engine, self.context = engine, engine.create_execution_context()
        self.stream = self.call(runtime.cudaStreamCreate())
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        (self.input,) = inputs
        self.outputs = [name for name in names if name != self.input]
        self.shape = tuple(engine.get_tensor_shape(self.input))[1:]
        self.dtype = trt.nptype(engine.get_tensor_dtype(self.input))

    def call(self, result):
        """What a function of CUDA gave besides its status."""
        status, *values = result
        if status != self.cuda.cudaError_t.cudaSuccess:
            raise SystemExit(f'CUDA: {status}')
        return values[0] if values else None

    def __call__(self, images):
        """All outputs, by name, of images [batch, ...] in the layout of the input."""
        cuda, held = self.cuda, []
        images = np.ascontiguousarray(images, self.dtype)
        self.context.set_input_shape(self.input, images.shape)
        arrays = {self.input: images}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            arrays[name] = np.empty(shape, self.trt.nptype(self.engine.get_tensor_dtype(name)))
        try:
            for name, array in arrays.items():
                held.append(self.call(cuda.cudaMalloc(array.nbytes)))
                self.context.set_tensor_address(name, int(held[-1]))
            places = dict(zip(arrays, held, strict=True))
            kind = cuda.cudaMemcpyKind
            self.copy(places[self.input], images.ctypes.data, images, kind.cudaMemcpyHostToDevice)
            if not self.context.execute_async_v3(self.stream):
                raise SystemExit('the engine could not run; what TensorRT said is above')
            for name in self.outputs:
                array = arrays[name]
                self.copy(array.ctypes.data, places[name], array, kind.cudaMemcpyDeviceToHost)
            self.call(cuda.cudaStreamSynchronize(self.stream))
        finally:
            for place in held:
                self.call(cuda.cudaFree(place))
        return {name: arrays[name] for name in self.outputs}

    def copy(self, to, start, array, kind):
        """Copies an array between host and device, in the order of the stream."""
        self.call(self.cuda.cudaMemcpyAsync(to, start, array.nbytes, kind, self.stream))


def main():
    """Runs the command line."""
    engine = Engine(sys.argv[1])
    names = pathlib.Path(sys.argv[2]).read_text(encoding='utf-8').splitlines()
    channels_last = engine.shape[-1] == 3
    height, width = engine.shape[:2] if channels_last else engine.shape[1:]
    settings = {'crop': [height, width]}
    pixels = np.stack([read_image(path, settings) for path in sys.argv[3:]])
    if engine.dtype == np.uint8:
        pixels = np.rint(pixels)
    else:
        pixels = (pixels - 127.5) / 127.5
    outputs = engine(pixels if channels_last else pixels.transpose(0, 3, 1, 2))
    scores = outputs.get('probabilities')
    scores = softmax(outputs['logits']) if scores is None else scores
    for path, probabilities in zip(sys.argv[3:], scores, strict=True):
        print(path)
        for label in np.argsort(-probabilities)[:5]:
            print(f'  {names[label]}  {probabilities[label]:.4f}')


if __name__ == '__main__':
    main()
