// Says what is on a photo: the five most probable classes of a TensorRT engine made from an ONNX
// file of vit_jax export (with any of its options; docs/tensorrt.md shows how to build both).
//
//     ./classify flowers.engine flowers.engine.labels.txt photo.jpg
//
// TensorRT 10 or 11, CUDA 12 or 13, OpenCV 4 or later, C++17.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>
#include <string>
#include <vector>

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", message);
  }
};

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

void check(cudaError_t status) { require(status == cudaSuccess, cudaGetErrorString(status)); }

// Memory on the GPU, freed with the object.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, bytes)); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// The pixels the model was trained on: RGB, the whole photo squashed to a square, bilinear and
// *without* antialiasing, in float (in 8 bits OpenCV would round).
cv::Mat readImage(const std::string& path, int side) {
  cv::Mat image = cv::imread(path, cv::IMREAD_COLOR);  // upright, as EXIF says
  require(!image.empty(), "cannot read the image " + path);
  cv::cvtColor(image, image, cv::COLOR_BGR2RGB);
  image.convertTo(image, CV_32F);
  cv::resize(image, image, cv::Size(side, side), 0, 0, cv::INTER_LINEAR);
  return image;  // [side, side, 3] in [0, 255]
}

// The bytes of the engine's input, in its layout and type.
std::vector<uint8_t> toInput(cv::Mat image, bool channelsFirst, nvinfer1::DataType type) {
  if (type == nvinfer1::DataType::kUINT8) {
    image.convertTo(image, CV_8U);  // rounds; the engine normalises
  } else {
    require(type == nvinfer1::DataType::kFLOAT, "expected an input of float32 or uint8");
    image = (image - cv::Scalar::all(127.5)) / 127.5;  // [-1, 1]
  }
  std::vector<cv::Mat> planes{image};
  if (channelsFirst) cv::split(image, planes);
  std::vector<uint8_t> bytes;
  for (const cv::Mat& plane : planes) bytes.insert(bytes.end(), plane.datastart, plane.dataend);
  return bytes;
}

int classify(const std::string& enginePath, const std::string& labelsPath,
             const std::string& imagePath) {
  std::ifstream file(enginePath, std::ios::binary);
  require(file.good(), "cannot read the engine " + enginePath);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
  std::ifstream labelsFile(labelsPath);
  require(labelsFile.good(), "cannot read the labels " + labelsPath);
  std::vector<std::string> labels;
  for (std::string line; std::getline(labelsFile, line);) labels.push_back(line);

  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  require(runtime != nullptr, "TensorRT does not start");
  std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(plan.data(), plan.size()));
  require(engine != nullptr, "not an engine of this TensorRT and this GPU: build it again");
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  require(context != nullptr, "no memory on the GPU");

  const char* input = "image";
  nvinfer1::Dims shape = engine->getTensorShape(input);  // [-1, side, side, 3] or [-1, 3, ...]
  require(shape.nbDims == 4, "the engine has no input 'image' of four dimensions");
  const bool channelsFirst = shape.d[1] == 3;
  const std::vector<uint8_t> pixels = toInput(readImage(imagePath, static_cast<int>(shape.d[2])),
                                              channelsFirst, engine->getTensorDataType(input));
  shape.d[0] = 1;
  require(context->setInputShape(input, shape), "the engine was built without batch 1");

  // Every input and output needs memory, also those that are not looked at.
  std::vector<std::unique_ptr<Buffer>> buffers;
  const Buffer* scores = nullptr;
  bool isLogits = false;
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    const std::string name = engine->getIOTensorName(i);
    const nvinfer1::Dims dims = context->getTensorShape(name.c_str());
    size_t bytes = engine->getTensorDataType(name.c_str()) == nvinfer1::DataType::kUINT8 ? 1 : 4;
    for (int k = 0; k < dims.nbDims; ++k) bytes *= dims.d[k];
    buffers.push_back(std::make_unique<Buffer>(bytes));
    require(context->setTensorAddress(name.c_str(), buffers.back()->data()), "no tensor " + name);
    if (name == input) {
      require(bytes == pixels.size(), "the input has another size than the image");
      check(cudaMemcpy(buffers.back()->data(), pixels.data(), bytes, cudaMemcpyHostToDevice));
    } else if (name == "logits" || name == "probabilities") {
      scores = buffers.back().get();
      isLogits = name == "logits";
    }
  }
  require(scores != nullptr, "the engine has no output 'logits' or 'probabilities'");

  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  require(context->enqueueV3(stream), "the engine could not be run");
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));

  std::vector<float> p(scores->bytes() / sizeof(float));
  check(cudaMemcpy(p.data(), scores->data(), scores->bytes(), cudaMemcpyDeviceToHost));
  require(p.size() == labels.size(), std::to_string(labels.size()) + " labels for " +
                                         std::to_string(p.size()) + " classes");
  if (isLogits) {
    const float largest = *std::max_element(p.begin(), p.end());
    for (float& x : p) x = std::exp(x - largest);
    const float sum = std::accumulate(p.begin(), p.end(), 0.0f);
    for (float& x : p) x /= sum;
  }
  std::vector<size_t> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
  order.resize(std::min<size_t>(order.size(), 5));
  for (size_t i : order) std::printf("%-30s %.4f\n", labels[i].c_str(), p[i]);
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s ENGINE LABELS IMAGE\n", argv[0]);
    return 2;
  }
  try {
    return classify(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return 1;
  }
}
