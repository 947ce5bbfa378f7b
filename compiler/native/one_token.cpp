// Attention of one token to the keys of a cache, in float32: softmax(scale q k^T) v.
//
// The rows of q that share a key/value head are attended together, so that keys and values are
// read once. A unit of work is a part of the keys of one head; parts are merged by their maxima and
// sums (FlashDecoding, Dao et al. 2023), so that few heads still occupy all threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "total.h"

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBlock = 64;      // keys whose scores are in memory at a time
constexpr int64_t kPart = 256;      // the fewest keys that are worth a unit of their own
constexpr float kNone = -std::numeric_limits<float>::infinity();

void prefetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}

float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.f);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size())
    sum = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum);
  float made = total(sum);
  for (; i < n; i++) made += a[i] * b[i];
  return made;
}

// q k^T of one row and `keys` keys; rows of `next`, as many, are fetched for what follows.
void dots(const float* q, const float* k, int64_t k_row, int64_t n, int64_t keys, float* to,
          const float* next, int64_t next_row, int64_t next_n) {
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    const float* row = k + j * k_row;
    Vec a(0.f), b(0.f), c(0.f), d(0.f);
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) {
      const Vec x = Vec::loadu(q + i);
      a = at::vec::fmadd(x, Vec::loadu(row + i), a);
      b = at::vec::fmadd(x, Vec::loadu(row + k_row + i), b);
      c = at::vec::fmadd(x, Vec::loadu(row + 2 * k_row + i), c);
      d = at::vec::fmadd(x, Vec::loadu(row + 3 * k_row + i), d);
    }
    totals(a, b, c, d, to + j);
    for (; i < n; i++)
      for (int64_t m = 0; m < 4; m++) to[j + m] += q[i] * row[m * k_row + i];
    if (next != nullptr)
      for (int64_t m = j; m < j + 4; m++) prefetch(next + m * next_row, next_n);
  }
  for (; j < keys; j++) {
    to[j] = dot(q, k + j * k_row, n);
    if (next != nullptr) prefetch(next + j * next_row, next_n);
  }
}

// kVecs vectors of to += shares v, over `keys` rows of v.
template <int kVecs>
void add_columns(float* to, const float* v, int64_t v_row, const float* shares, int64_t keys) {
  Vec even[kVecs], odd[kVecs];
  for (int m = 0; m < kVecs; m++) even[m] = Vec::loadu(to + m * Vec::size()), odd[m] = Vec(0.f);
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
    const Vec one(shares[j]), two(shares[j + 1]);
    const float* row = v + j * v_row;
    for (int m = 0; m < kVecs; m++) {
      even[m] = at::vec::fmadd(one, Vec::loadu(row + m * Vec::size()), even[m]);
      odd[m] = at::vec::fmadd(two, Vec::loadu(row + v_row + m * Vec::size()), odd[m]);
    }
  }
  if (j < keys) {
    const Vec one(shares[j]);
    for (int m = 0; m < kVecs; m++)
      even[m] = at::vec::fmadd(one, Vec::loadu(v + j * v_row + m * Vec::size()), even[m]);
  }
  for (int m = 0; m < kVecs; m++) (even[m] + odd[m]).store(to + m * Vec::size());
}

// to += shares v, over `keys` rows of v.
void add_rows(float* to, const float* v, int64_t v_row, const float* shares, int64_t keys,
              int64_t n) {
  int64_t i = 0;
  for (; i + 4 * Vec::size() <= n; i += 4 * Vec::size())
    add_columns<4>(to + i, v + i, v_row, shares, keys);
  for (; i + 2 * Vec::size() <= n; i += 2 * Vec::size())
    add_columns<2>(to + i, v + i, v_row, shares, keys);
  for (; i + Vec::size() <= n; i += Vec::size())
    add_columns<1>(to + i, v + i, v_row, shares, keys);
  for (; i < n; i++)
    for (int64_t j = 0; j < keys; j++) to[i] += shares[j] * v[j * v_row + i];
}

void add_scaled(float* to, const float* of, float by, int64_t n) {
  const Vec scale(by);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size())
    at::vec::fmadd(scale, Vec::loadu(of + i), Vec::loadu(to + i)).store(to + i);
  for (; i < n; i++) to[i] += by * of[i];
}

void multiply(float* at, float by, int64_t n) {
  at::vec::map<float>([by](Vec x) { return x * Vec(by); }, at, at, n);
}

struct Head {  // one key/value head of one sequence
  const float *q, *k, *v;
  int64_t q_row, k_row, v_row;  // strides of rows
};

struct Sizes {
  int64_t rows, dim, v_dim;
};

// What the keys `from` to `to` give each row: the sum of exp(score - top) v, the sum, and the top.
void attend(const Head& head, const Sizes& size, int64_t from, int64_t to, float scale, float* out,
            float* sums, float* tops) {
  std::fill_n(out, size.rows * size.v_dim, 0.f);
  std::fill_n(sums, size.rows, 0.f);
  std::fill_n(tops, size.rows, kNone);
  float scores[kBlock];
  for (int64_t at = from; at < to; at += kBlock) {
    const int64_t keys = std::min(kBlock, to - at), after = std::min(kBlock, to - at - keys);
    const float *k = head.k + at * head.k_row, *v = head.v + at * head.v_row;
    for (int64_t r = 0; r < size.rows; r++) {
      dots(head.q + r * head.q_row, k, head.k_row, size.dim, keys, scores, r == 0 ? v : nullptr,
           head.v_row, size.v_dim);
      multiply(scores, scale, keys);
      std::fill(scores + keys, scores + kBlock, kNone);
      Vec most(kNone), sum(0.f);
      for (int64_t j = 0; j < keys; j += Vec::size())
        most = at::vec::maximum(most, Vec::loadu(scores + j));
      float lanes[Vec::size()];
      most.store(lanes);
      float top = tops[r];
      for (const float lane : lanes)
        if (!(lane <= top)) top = lane;  // a NaN stays one, and reaches the result
      if (r + 1 == size.rows)
        for (int64_t j = 0; j < after; j++)
          prefetch(k + (kBlock + j) * head.k_row, size.dim);
      if (top == kNone) continue;  // exp(-inf + inf) is no number
      float* row = out + r * size.v_dim;
      if (top > tops[r] && tops[r] != kNone) {
        const float less = std::exp(tops[r] - top);
        multiply(row, less, size.v_dim);
        sums[r] *= less;
      }
      tops[r] = top;
      for (int64_t j = 0; j < keys; j += Vec::size()) {
        const Vec share = (Vec::loadu(scores + j) - Vec(top)).exp();
        share.store(scores + j);
        sum = sum + share;
      }
      sums[r] += total(sum);
      add_rows(row, v, head.v_row, scores, keys, size.v_dim);
    }
  }
}

at::Tensor one_token(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                     double scale) {
  for (const at::Tensor* x : {&q_in, &k_in, &v_in})
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == at::kFloat,
                "one_token: q, k and v are float32 [batch, kv_heads, rows or keys, dim]");
  TORCH_CHECK(k_in.sizes().slice(0, 3) == v_in.sizes().slice(0, 3) &&
                  q_in.sizes().slice(0, 2) == k_in.sizes().slice(0, 2) &&
                  q_in.size(3) == k_in.size(3) && k_in.size(2) > 0,
              "one_token: q ", q_in.sizes(), ", k ", k_in.sizes(), " and v ", v_in.sizes(),
              " do not fit");
  auto rowed = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor q = rowed(q_in), k = rowed(k_in), v = rowed(v_in);
  const int64_t heads = q.size(1), units = q.size(0) * heads, keys = k.size(2);
  const Sizes size{q.size(2), q.size(3), v.size(3)};
  const int64_t threads = at::get_num_threads();
  const int64_t parts =
      units % threads == 0 ? 1 : std::clamp<int64_t>(keys / kPart, 1, (2 * threads + units - 1) / units);
  at::Tensor out = at::empty({q.size(0), heads, size.rows, size.v_dim}, q.options());
  std::vector<float> apart(parts > 1 ? units * parts * size.rows * size.v_dim : 0);
  std::vector<float> sums(units * parts * size.rows), tops(sums.size());
  float* made = out.data_ptr<float>();
  auto head = [&](int64_t unit) {
    const int64_t b = unit / heads, h = unit % heads;
    return Head{q.const_data_ptr<float>() + b * q.stride(0) + h * q.stride(1),
                k.const_data_ptr<float>() + b * k.stride(0) + h * k.stride(1),
                v.const_data_ptr<float>() + b * v.stride(0) + h * v.stride(1),
                q.stride(2), k.stride(2), v.stride(2)};
  };
  const int64_t wide = size.rows * size.v_dim;
  at::parallel_for(0, units * parts, 1, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t part = i % parts;
      attend(head(i / parts), size, keys * part / parts, keys * (part + 1) / parts,
             static_cast<float>(scale), (parts > 1 ? apart.data() : made) + i * wide,
             sums.data() + i * size.rows, tops.data() + i * size.rows);
    }
  });
  for (int64_t unit = 0; unit < units; unit++) {
    for (int64_t r = 0; r < size.rows; r++) {
      float* row = made + unit * wide + r * size.v_dim;
      if (parts == 1) {
        multiply(row, 1.f / sums[unit * size.rows + r], size.v_dim);
        continue;
      }
      float top = kNone, sum = 0.f;
      for (int64_t p = 0; p < parts; p++)
        top = std::max(top, tops[(unit * parts + p) * size.rows + r]);
      std::fill_n(row, size.v_dim, 0.f);
      for (int64_t p = 0; p < parts; p++) {
        const int64_t at = (unit * parts + p) * size.rows + r;
        const float share = std::exp(tops[at] - top);
        sum += share * sums[at];
        add_scaled(row, apart.data() + at * size.v_dim, share, size.v_dim);
      }
      multiply(row, 1.f / sum, size.v_dim);
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(attnopt, m) {
  m.def("one_token(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(attnopt, CPU, m) { m.impl("one_token", one_token); }
