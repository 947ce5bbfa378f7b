// Attention of one token to the keys of a cache: softmax(scale q k^T) v, in float32 or 16 bits, whose
// products and sums are float32.
//
// The rows of q that share a key/value head are attended together, so that keys and values are
// read once. A unit of work is a part of the keys of one head; parts are merged by their maxima and
// sums (FlashDecoding, Dao et al. 2023), so that few heads still occupy all threads. What is read
// next is fetched while the last that was read is computed with: a thread waits for memory otherwise.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "operators.h"
#include "vectors.h"

namespace {

constexpr int64_t kBlock = 64;      // keys whose scores are in memory at a time
constexpr int64_t kPart = 256;      // the fewest keys that are worth a unit of their own
constexpr int kRows = Vec::size() == 16 ? 4 : 2;  // rows at once, whose sums are in 32 or 16 registers
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Rows of memory, `n` elements wide and `stride` apart.
template <typename T>
struct Rows {
  const T* at;
  int64_t stride, n;

  Rows from(int64_t row) const { return {at + row * stride, stride, n}; }
};

// Rows to fetch, `step` of them for every four that are computed with.
template <typename T>
struct Fetch {
  Rows<T> rows;
  int64_t left, step;

  // The share of rows `0` to `count` that the turn `turn` of `turns` fetches.
  Fetch(const Rows<T>& of, int64_t count, int64_t turn, int64_t turns)
      : rows(of.from(count * turn / turns)),
        left(count * (turn + 1) / turns - count * turn / turns),
        step(std::max<int64_t>(1, (4 + turns - 1) / turns)) {}

  void next() {
    const int64_t now = std::min(step, left);
    for (int64_t j = 0; j < now; j++)
      for (int64_t i = 0; i < rows.n; i += 64 / sizeof(T))
        __builtin_prefetch(rows.at + j * rows.stride + i, 0, 2);  // the first cache has no room
    rows = rows.from(now);
    left -= now;
  }
};

// K products with each of R rows of q: to[r * kBlock + m] = q_r k_m.
template <int R, int K, typename T>
void dots(const Rows<float>& q, const Rows<T>& k, float* to) {
  std::array<Vec, 4 * R> sums;
  times<4 * R>([&](auto i) __attribute__((always_inline)) { sums[i] = Vec(0.f); });
  int64_t i = 0;
  for (; i + Vec::size() <= q.n; i += Vec::size()) {
    std::array<Vec, K> keys;
    times<K>([&](auto m) __attribute__((always_inline)) {
      keys[m] = loaded(k.at + m * k.stride + i);
    });
    times<R>([&](auto r) __attribute__((always_inline)) {
      const Vec row = Vec::loadu(q.at + r * q.stride + i);
      times<K>([&](auto m) __attribute__((always_inline)) {
        sums[4 * r + m] = at::vec::fmadd(row, keys[m], sums[4 * r + m]);
      });
    });
  }
  float made[4 * R];
  times<R>([&](auto r) __attribute__((always_inline)) {
    totals(sums[4 * r], sums[4 * r + 1], sums[4 * r + 2], sums[4 * r + 3], made + 4 * r);
  });
  for (; i < q.n; i++)
    for (int r = 0; r < R; r++)
      for (int m = 0; m < K; m++)
        made[4 * r + m] += q.at[r * q.stride + i] * static_cast<float>(k.at[m * k.stride + i]);
  for (int r = 0; r < R; r++) std::copy_n(made + 4 * r, K, to + r * kBlock);
}

// V vectors of R rows: to_r += sum_j shares[r * kBlock + j] v_j over `keys` rows of v.
template <int R, int V, typename T, typename U>
void add_columns(float* to, const Rows<T>& v, const float* shares, int64_t keys, Fetch<U>& fetch) {
  std::array<Vec, R * V> sums;
  times<R * V>([&](auto i) __attribute__((always_inline)) {
    sums[i] = Vec::loadu(to + i / V * v.n + i % V * Vec::size());
  });
  for (int64_t j = 0; j < keys; j++) {
    const T* row = v.at + j * v.stride;
    std::array<Vec, V> values;
    times<V>([&](auto m) __attribute__((always_inline)) {
      values[m] = loaded(row + m * Vec::size());
    });
    times<R>([&](auto r) __attribute__((always_inline)) {
      const Vec share(shares[r * kBlock + j]);
      times<V>([&](auto m) __attribute__((always_inline)) {
        sums[r * V + m] = at::vec::fmadd(share, values[m], sums[r * V + m]);
      });
    });
    if (j % 4 == 3) fetch.next();
  }
  times<R * V>([&](auto i) __attribute__((always_inline)) {
    sums[i].store(to + i / V * v.n + i % V * Vec::size());
  });
}

template <int R, typename T, typename U>
void add_rows(float* to, const Rows<T>& v, const float* shares, int64_t keys, Fetch<U> fetch) {
  int64_t i = 0;
  auto columns = [&]<int V>(std::integral_constant<int, V>) {
    for (; i + V * Vec::size() <= v.n; i += V * Vec::size())
      add_columns<R, V>(to + i, Rows<T>{v.at + i, v.stride, v.n}, shares, keys, fetch);
  };
  columns(std::integral_constant<int, 4>());
  columns(std::integral_constant<int, 2>());
  columns(std::integral_constant<int, 1>());
  for (; i < v.n; i++)
    for (int r = 0; r < R; r++)
      for (int64_t j = 0; j < keys; j++)
        to[r * v.n + i] += shares[r * kBlock + j] * static_cast<float>(v.at[j * v.stride + i]);
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

// What the keys so far gave each row: the sum of exp(score - top) v, the sum of these, and the top.
struct Result {
  float *out, *sums, *tops;

  Result from(int64_t row, int64_t v_dim) const { return {out + row * v_dim, sums + row, tops + row}; }
};

// Scores of a row and `keys` keys become its shares; what it has is scaled to its new top.
void weigh(float* scores, int64_t keys, const Result& row, int64_t v_dim) {
  std::fill(scores + keys, scores + kBlock, kNone);
  Vec most(kNone), sum(0.f);
  for (int64_t j = 0; j < keys; j += Vec::size())
    most = at::vec::maximum(most, Vec::loadu(scores + j));
  float lanes[Vec::size()];
  most.store(lanes);
  float& top = *row.tops;
  const float before = top;
  for (const float lane : lanes)
    if (top == top && !(lane <= top)) top = lane;  // a NaN stays one, and reaches the result
  if (top == kNone) {                // exp(-inf + inf) is no number
    std::fill_n(scores, keys, 0.f);
    return;
  }
  if (top > before && before != kNone) {
    const float less = std::exp(before - top);
    multiply(row.out, less, v_dim);
    *row.sums *= less;
  }
  for (int64_t j = 0; j < keys; j += Vec::size()) {
    const Vec share = (Vec::loadu(scores + j) - Vec(top)).exp();
    share.store(scores + j);
    sum = sum + share;
  }
  *row.sums += total(sum);
}

// A block of at most `kBlock` keys with their values, and the keys behind it.
template <typename T>
struct Block {
  Rows<T> k, v;
  int64_t keys, behind;
};

// What a block gives rows `row` to `row + R` of `rows`.
template <int R, typename T>
void attend_block(const Rows<float>& q, const Block<T>& of, int64_t row, int64_t rows,
                  const Result& all) {
  const Rows<float> some = q.from(row);
  const Result result = all.from(row, of.v.n);
  const int64_t turn = row / kRows, turns = (rows + kRows - 1) / kRows;
  float scores[R * kBlock];
  Fetch<T> fetch(of.v, of.keys, turn, turns);
  int64_t j = 0;
  for (; j + 4 <= of.keys; j += 4, fetch.next()) dots<R, 4>(some, of.k.from(j), scores + j);
  for (; j < of.keys; j++, fetch.next()) dots<R, 1>(some, of.k.from(j), scores + j);
  for (int r = 0; r < R; r++) weigh(scores + r * kBlock, of.keys, result.from(r, of.v.n), of.v.n);
  add_rows<R>(result.out, of.v, scores, of.keys,
              Fetch<T>(of.k.from(of.keys), of.behind, turn, turns));
}

// What the keys `from` to `to` give all rows.
template <typename T>
void attend(const Rows<float>& q, const Rows<T>& k, const Rows<T>& v, int64_t rows, int64_t from,
            int64_t to, const Result& result) {
  std::fill_n(result.out, rows * v.n, 0.f);
  std::fill_n(result.sums, rows, 0.f);
  std::fill_n(result.tops, rows, kNone);
  for (int64_t at = from; at < to; at += kBlock) {
    const int64_t keys = std::min(kBlock, to - at);
    const Block<T> block{k.from(at), v.from(at), keys, std::min(kBlock, to - at - keys)};
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) attend_block<kRows>(q, block, row, rows, result);
    for (; row + 2 <= rows; row += 2) attend_block<2>(q, block, row, rows, result);
    for (; row < rows; row++) attend_block<1>(q, block, row, rows, result);
  }
}

// The result of one row from those of all parts of the keys: the first part's becomes it.
void merge(const Result& first, int64_t parts, int64_t rows, int64_t v_dim) {
  float top = kNone, sum = 0.f;
  auto part = [&](int64_t p) { return first.from(p * rows, v_dim); };
  for (int64_t p = 0; p < parts; p++) top = std::max(top, *part(p).tops);
  for (int64_t p = 0; p < parts; p++) {
    const Result of = part(p);
    const float share = parts == 1 ? 1.f : std::exp(*of.tops - top);
    sum += share * *of.sums;
    if (p > 0)
      add_scaled(first.out, of.out, share, v_dim);
    else if (share != 1.f)
      multiply(first.out, share, v_dim);
  }
  multiply(first.out, 1.f / sum, v_dim);
}

// The rows of q one behind the other, in float32 and scaled, as they are read for every key.
template <typename T>
std::vector<float> scaled(const at::Tensor& q, float scale) {
  const int64_t heads = q.size(1), rows = q.size(2), dim = q.size(3);
  std::vector<float> made(q.numel());
  float* to = made.data();
  for (int64_t i = 0; i < q.size(0) * heads * rows; i++) {
    const T* from = q.const_data_ptr<T>() + i / rows / heads * q.stride(0) +
                    i / rows % heads * q.stride(1) + i % rows * q.stride(2);
    for (int64_t d = 0; d < dim; d++) *to++ = scale * static_cast<float>(from[d * q.stride(3)]);
  }
  return made;
}

template <typename T>
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), dim = q.size(3);
  const int64_t v_dim = v.size(3);
  const int64_t units = batch * heads, keys = k.size(2), threads = at::get_num_threads();
  const int64_t parts =
      units % threads == 0 ? 1 : std::clamp<int64_t>(keys / kPart, 1, (2 * threads + units - 1) / units);
  const std::vector<float> queries = scaled<T>(q, static_cast<float>(scale));
  at::Tensor out = at::empty({batch, heads, rows, v_dim}, q.options().dtype(at::kFloat));
  std::vector<float> apart(parts > 1 ? units * parts * rows * v_dim : 0);
  std::vector<float> sums(units * parts * rows), tops(sums.size());
  const Result all{parts > 1 ? apart.data() : out.data_ptr<float>(), sums.data(), tops.data()};
  auto rows_of = [&](const at::Tensor& x, int64_t unit) {
    const T* at = x.const_data_ptr<T>() + unit / heads * x.stride(0) + unit % heads * x.stride(1);
    return Rows<T>{at, x.stride(2), x.size(3)};
  };
  at::parallel_for(0, units * parts, 1, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i++) {
      const int64_t unit = i / parts, part = i % parts;
      const Rows<float> of{queries.data() + unit * rows * dim, dim, dim};
      attend(of, rows_of(k, unit), rows_of(v, unit), rows, keys * part / parts,
             keys * (part + 1) / parts, all.from(i * rows, v_dim));
    }
  });
  for (int64_t unit = 0; unit < units; unit++)
    for (int64_t r = 0; r < rows; r++) {
      const Result first = all.from(unit * parts * rows + r, v_dim);
      merge(first, parts, rows, v_dim);
      if (parts > 1)
        std::copy_n(first.out, v_dim, out.data_ptr<float>() + (unit * rows + r) * v_dim);
    }
  return out.to(q.scalar_type());
}

}  // namespace

at::Tensor attnopt::one_token(const at::Tensor& q, const at::Tensor& k_in, const at::Tensor& v_in,
                              double scale) {
  const at::ScalarType type = q.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "one_token: q is float32, bfloat16 or float16, not ", type);
  for (const at::Tensor* x : {&q, &k_in, &v_in})
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == type,
                "one_token: q, k and v are [batch, kv_heads, rows or keys, dim] of one dtype");
  TORCH_CHECK(k_in.sizes().slice(0, 3) == v_in.sizes().slice(0, 3) &&
                  q.sizes().slice(0, 2) == k_in.sizes().slice(0, 2) &&
                  q.size(3) == k_in.size(3) && k_in.size(2) > 0,
              "one_token: q ", q.sizes(), ", k ", k_in.sizes(), " and v ", v_in.sizes(),
              " do not fit");
  auto rowed = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor k = rowed(k_in), v = rowed(v_in);
  switch (type) {
    case at::kHalf: return attention<at::Half>(q, k, v, scale);
    case at::kBFloat16: return attention<at::BFloat16>(q, k, v, scale);
    default: return attention<float>(q, k, v, scale);
  }
}
