// A device that is the CPU under another name: its memory is the host's, its kernels are the CPU's.
// It tells what a GPU would: a kernel that is given tensors of two devices, or one of the CPU where
// it should have its own, raises. Only what CUDA allows is allowed: copies, scalars without
// dimensions, and indices.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto TWIN = c10::DeviceType::PrivateUse1;
const c10::Device HERE(TWIN, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* made = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {made, made, &std::free, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(TWIN, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TWIN;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return TWIN; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Draws are the CPU's, by a generator of its own inside.
struct Generator final : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl() {
    device_ = HERE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  void set_current_seed(uint64_t seed) override { inside.set_current_seed(seed); }
  at::Generator inside = at::detail::createCPUGenerator();
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
};

bool is_twin(const at::Tensor& x) { return x.device().type() == TWIN; }

// The same memory as a storage of another device; it keeps the first one alive.
c10::Storage shared(const c10::Storage& storage, c10::Device device) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), kept,
                    [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                      c10::GetAllocator(device.type()), true);
}

at::Tensor shaped(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return made;
}

at::Tensor on_cpu(const at::Tensor& x) {
  return shaped(x, shared(x.storage(), c10::Device(c10::kCPU)), c10::DispatchKey::CPU);
}

struct Pair {
  at::Tensor twin, cpu;
};

// What a kernel made, on the device: a view of an argument where it is one.
at::Tensor on_twin(const at::Tensor& made, const std::vector<Pair>& pairs) {
  if (!made.defined() || is_twin(made)) return made;
  for (const auto& pair : pairs) {
    if (made.unsafeGetTensorImpl() == pair.cpu.unsafeGetTensorImpl()) return pair.twin;
    if (made.storage().unsafeGetStorageImpl() == pair.cpu.storage().unsafeGetStorageImpl())
      return shaped(made, pair.twin.storage(), c10::DispatchKey::PrivateUse1);
  }
  return shaped(made, shared(made.storage(), HERE), c10::DispatchKey::PrivateUse1);
}

// Whether an operator may be given CPU tensors with dimensions beside those of the device.
bool mixes(const std::string& name) {
  static const std::set<std::string> allowed = {
      "aten::_copy_from", "aten::_copy_from_and_resize", "aten::copy_", "aten::index",
      "aten::_index_put_impl_", "aten::index_put", "aten::index_put_", "aten::set_"};
  return allowed.count(name) > 0;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0 || name.rfind("prims::", 0) == 0,
                              "no kernel of ", name, " for the device twin");
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  std::vector<Pair> pairs;
  bool strangers = false;
  auto given = [&](const at::Tensor& x) -> at::Tensor {
    if (!x.defined()) return x;
    if (!is_twin(x)) {
      strangers |= x.dim() > 0;
      return x;
    }
    for (const auto& pair : pairs)
      if (pair.twin.unsafeGetTensorImpl() == x.unsafeGetTensorImpl()) return pair.cpu;
    pairs.push_back({x, on_cpu(x)});
    return pairs.back().cpu;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = given(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> made;
      for (const at::Tensor& x : value.toTensorList()) made.push_back(given(x));
      value = made;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
        made.push_back(x ? std::optional<at::Tensor>(given(*x)) : std::nullopt);
      value = made;
    } else if (value.isStorage()) {
      value = shared(value.toStorage(), c10::Device(c10::kCPU));
    } else if (value.isGenerator() && value.toGenerator().device() == HERE) {
      value = static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl())->inside;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(!strangers || pairs.empty() || mixes(name),
              "Expected all tensors to be on the same device: ", name,
              " was given tensors of twin:0 and of cpu");
  op.callBoxed(stack);
  for (const auto& pair : pairs) {  // what a kernel resized, or gave other memory
    auto* impl = pair.twin.unsafeGetTensorImpl();
    const bool resized = pair.cpu.sizes() != pair.twin.sizes() ||
                         pair.cpu.strides() != pair.twin.strides() ||
                         pair.cpu.storage_offset() != pair.twin.storage_offset();
    if (pair.cpu.storage().data() != pair.twin.storage().data())
      impl->set_storage_keep_dtype(shared(pair.cpu.storage(), HERE));
    if (resized)
      impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(),
                                  pair.cpu.storage_offset());
  }
  const bool leaves = name == "aten::_copy_from" && !pairs.empty();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      if (!leaves || value.toTensor().defined()) value = on_twin(value.toTensor(), pairs);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> made;
      for (const at::Tensor& x : value.toTensorList()) made.push_back(on_twin(x, pairs));
      value = made;
    }
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  auto a = is_twin(from) ? on_cpu(from) : from;
  auto b = is_twin(to) ? on_cpu(to) : to;
  b.copy_(a);
  return to;
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(is_twin(x) && is_twin(weight) && (!bias || is_twin(*bias)),
              "Expected all tensors to be on the same device: aten::convolution");
  const auto added = bias ? std::optional<at::Tensor>(on_cpu(*bias)) : std::nullopt;
  return on_twin(at::convolution(on_cpu(x), on_cpu(weight), added, stride, padding, dilation,
                                 transposed, output_padding, groups), {});
}

const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("convolution_overrideable", convolution);
}

// Copies resolve what is conjugated or negated themselves, as CUDA's do.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
