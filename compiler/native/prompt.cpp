// Causal attention of many tokens, float32: softmax(scale q k^T) v, where the last query is the last
// key's and each sees the keys up to its own.
//
// Blocks of rows of q meet blocks of keys whose scores stay in the nearest cache, with running
// maxima and sums (FlashAttention-2, Dao 2023, algorithm 1). Keys are turned once, so that scores
// lie in registers as the products of a matrix do, and no sum is taken across a register; where the
// processor has matrix units, products are theirs.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "operators.h"
#include "prompt_units.h"
#include "vectors.h"

namespace {

constexpr int64_t kLanes = Vec::size();
constexpr int kWide = kLanes == 16 ? 4 : 2;   // registers of keys at once: sums are in 24, or 12
constexpr int64_t kPanel = kWide * kLanes;    // keys that are turned together
constexpr int64_t kKeys = 256;                // keys of a block
constexpr int64_t kTurns = 4;                 // units for each thread, where heads are few
constexpr float kNone = -std::numeric_limits<float>::infinity();

// R rows of q `[R, dim]` by V registers of turned keys `[dim, kPanel]`: to `[R, kKeys]`.
template <int R, int V>
[[gnu::noinline]] void scores_of(const float* q, const float* keys, int64_t dim, float* to) {
  Vec sums[R * V];
  times<R * V>([&](auto i) __attribute__((always_inline)) { sums[i] = Vec(0.f); });
  for (int64_t d = 0; d < dim; d++) {
    Vec key[V];
    times<V>([&](auto m) __attribute__((always_inline)) {
      key[m] = Vec::loadu(keys + d * kPanel + m * kLanes);
    });
    times<R>([&](auto r) __attribute__((always_inline)) {
      const Vec one(q[r * dim + d]);
      times<V>([&](auto m) __attribute__((always_inline)) {
        sums[r * V + m] = at::vec::fmadd(one, key[m], sums[r * V + m]);
      });
    });
  }
  times<R * V>([&](auto i) __attribute__((always_inline)) {
    sums[i].store(to + i / V * kKeys + i % V * kLanes);
  });
}

// What values are added to, V registers of R rows: to `[R, dim]` += shares `[R, kKeys]` v `[keys, V]`.
template <int R, int V>
[[gnu::noinline]] void add_values(const float* shares, const float* v, int64_t keys, float* to,
                                  int64_t dim) {
  Vec sums[R * V];
  times<R * V>([&](auto i) __attribute__((always_inline)) { sums[i] = Vec(0.f); });
  for (int64_t j = 0; j < keys; j++) {
    Vec value[V];
    times<V>([&](auto m) __attribute__((always_inline)) {
      value[m] = Vec::loadu(v + j * dim + m * kLanes);
    });
    times<R>([&](auto r) __attribute__((always_inline)) {
      const Vec share(shares[r * kKeys + j]);
      times<V>([&](auto m) __attribute__((always_inline)) {
        sums[r * V + m] = at::vec::fmadd(share, value[m], sums[r * V + m]);
      });
    });
  }
  times<R * V>([&](auto i) __attribute__((always_inline)) {
    float* at = to + i / V * dim + i % V * kLanes;
    (Vec::loadu(at) + sums[i]).store(at);
  });
}

// Keys `[keys, dim]`, rows `stride` apart, as panels `[dim, kPanel]` one behind the other.
void turn(const float* k, int64_t stride, int64_t keys, int64_t dim, float* to) {
  for (int64_t j = 0; j < keys; j += kPanel, to += dim * kPanel) {
    const int64_t here = std::min(kPanel, keys - j);
    int64_t m = 0;
    for (; m + kLanes <= here; m += kLanes) {
      const float* from = k + (j + m) * stride;
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes)
        at::vec::transpose_mxn<float>(from + d, stride, to + d * kPanel + m, kPanel, kLanes, kLanes);
      for (; d < dim; d++)
        for (int64_t i = 0; i < kLanes; i++) to[d * kPanel + m + i] = from[i * stride + d];
    }
    for (; m < kPanel; m++)
      for (int64_t d = 0; d < dim; d++) to[d * kPanel + m] = m < here ? k[(j + m) * stride + d] : 0.f;
  }
}

// What a block of rows has, and the room in which it gets it.
struct Block {
  static constexpr int64_t kKeys = ::kKeys, kMost = 32;  // keys, and rows, that there is room for
  std::vector<float> q, scores, out;                     // [rows, dim], [rows, kKeys], [rows, v_dim]
  float tops[kMost], next[kMost], sums[kMost];           // largest scores, those of a block, and sums

  Block(int64_t rows, int64_t dim, int64_t v_dim) : q(rows * dim), scores(rows * kKeys), out(rows * v_dim) {}

  // With `there` rows of q, scaled, and zeros for the others.
  void begin(const float* from, int64_t stride, int64_t there, int64_t dim, float scale) {
    std::fill(q.begin(), q.end(), 0.f);
    for (int64_t r = 0; r < there; r++)
      for (int64_t d = 0; d < dim; d++) q[r * dim + d] = scale * from[r * stride + d];
    for (float* x : {tops, next}) std::fill_n(x, kMost, kNone);
    std::fill_n(sums, kMost, 0.f);
    std::fill(out.begin(), out.end(), 0.f);
  }
};

// A key/value head: its keys turned, its values one behind the other.
struct Head {
  static constexpr int64_t kRows = 24;       // rows of q that meet a block of keys
  static constexpr int64_t kStep = kLanes;   // what scores of keys are rounded up to
  static constexpr bool kLosesInfinity = false;

  struct Room {
    Room(int64_t, int64_t) {}
  };

  std::vector<float> keys, values;
  int64_t dim, v_dim;

  Head(int64_t keys, int64_t dim, int64_t v_dim)
      : keys((keys + kPanel - 1) / kPanel * kPanel * dim), values(keys * v_dim), dim(dim), v_dim(v_dim) {}

  void read(const float* k, int64_t k_stride, const float* v, int64_t v_stride, int64_t count) {
    turn(k, k_stride, count, dim, keys.data());
    for (int64_t j = 0; j < count; j++) std::copy_n(v + j * v_stride, v_dim, &values[j * v_dim]);
  }

  void begin(const Block&, Room&) const {}

  // Scores of `count` keys from `at` on.
  void score(Block& of, Room&, int64_t at, int64_t count) const {
    int64_t j = 0;
    for (; j + kPanel <= count; j += kPanel)
      for (int64_t r = 0; r < kRows; r += 6)
        scores_of<6, kWide>(&of.q[r * dim], &keys[(at + j) * dim], dim, &of.scores[r * kKeys + j]);
    const float* last = keys.data() + (at + j) * dim - j;
    for (; j < count; j += kLanes)
      for (int64_t r = 0; r < kRows; r += 12)
        scores_of<12, 1>(&of.q[r * dim], last + j, dim, &of.scores[r * kKeys + j]);
  }

  // What the values of `count` keys from `at` on add.
  void add(Block& of, Room&, int64_t at, int64_t count) const {
    const float* v = values.data() + at * v_dim;
    int64_t d = 0;
    auto columns = [&]<int R, int V>(std::integral_constant<int, R>, std::integral_constant<int, V>) {
      for (; d + V * kLanes <= v_dim; d += V * kLanes)
        for (int64_t r = 0; r < kRows; r += R)
          add_values<R, V>(&of.scores[r * kKeys], v + d, count, &of.out[r * v_dim + d], v_dim);
    };
    if constexpr (kLanes == 16) {
      columns(std::integral_constant<int, 6>(), std::integral_constant<int, 4>());
      columns(std::integral_constant<int, 12>(), std::integral_constant<int, 2>());
      columns(std::integral_constant<int, 12>(), std::integral_constant<int, 1>());
    } else {
      columns(std::integral_constant<int, 6>(), std::integral_constant<int, 2>());
      columns(std::integral_constant<int, 6>(), std::integral_constant<int, 1>());
    }
    for (; d < v_dim; d++)
      for (int64_t r = 0; r < kRows; r++)
        for (int64_t j = 0; j < count; j++)
          of.out[r * v_dim + d] += of.scores[r * kKeys + j] * v[j * v_dim + d];
  }
};

// The largest score of row r, which sees `seen` of the block's keys; those up to `end` become -inf.
float largest_of(Block& of, int64_t r, int64_t seen, int64_t end) {
  float* row = &of.scores[r * kKeys];
  std::fill(row + seen, row + end, kNone);
  Vec most(kNone);
  for (int64_t j = 0; j < seen; j += kLanes) most = larger(most, Vec::loadu(row + j));
  return largest(most);
}

// What rows have is scaled to their new tops.
void rise(Block& of, int64_t rows, int64_t v_dim) {
  float less[Block::kMost];
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec before = Vec::loadu(of.tops + r), top = larger(before, Vec::loadu(of.next + r));
    const Vec rises = Vec::blendv(Vec(0.f), before - top, top > before);  // -inf less -inf is no number
    const Vec share = exponential(rises);
    share.store(less + r);
    (Vec::loadu(of.sums + r) * share).store(of.sums + r);
    top.store(of.tops + r);
  }
  for (int64_t r = 0; r < rows; r++)
    if (less[r] != 1.f)
      for (int64_t d = 0; d < v_dim; d++) of.out[r * v_dim + d] *= less[r];
}

// Scores of row r up to `end` become its shares.
void weigh(Block& of, int64_t r, int64_t end) {
  float* row = &of.scores[r * kKeys];
  Vec sum(0.f);
  const Vec top(of.tops[r] == kNone ? 0.f : of.tops[r]);  // -inf less -inf is no number
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec share = exponential(Vec::loadu(row + j) - top);
    share.store(row + j);
    sum = sum + share;
  }
  of.sums[r] += total(sum);
}

// Undefined where a result is no number, and products that lose infinite operands may be why.
template <typename Head>
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, float scale) {
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), dim = q.size(3);
  const int64_t kv_heads = k.size(1), keys = k.size(2), v_dim = v.size(3);
  constexpr int64_t kRows = Head::kRows;
  const int64_t group = heads / kv_heads, units = batch * kv_heads, threads = at::get_num_threads();
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t parts = units % threads == 0 || units == 0
      ? 1 : std::min((kTurns * threads + units - 1) / units, std::max<int64_t>(blocks, 1));
  at::Tensor out = at::empty({batch, rows, heads, v_dim}, q.options());
  if (out.numel() == 0) return out.transpose(1, 2);
  const float* queries = q.const_data_ptr<float>();
  float* made = out.data_ptr<float>();
  const int64_t row_stride = q.stride(2);
  auto read = [&](int64_t unit, Head& head) {
    const int64_t n = unit / kv_heads, h = unit % kv_heads;
    head.read(k.const_data_ptr<float>() + n * k.stride(0) + h * k.stride(1), k.stride(2),
              v.const_data_ptr<float>() + n * v.stride(0) + h * v.stride(1), v.stride(2), keys);
  };
  // Threads that share a head read it once for all; others keep theirs near.
  std::vector<Head> shared;
  for (int64_t i = 0; parts > 1 && i < units; i++) shared.emplace_back(keys, dim, v_dim);
  at::parallel_for(0, shared.size(), 1, [&](int64_t a, int64_t b) {
    for (int64_t unit = a; unit < b; unit++) read(unit, shared[unit]);
  });
  std::atomic<bool> odd = false;
  at::parallel_for(0, units * parts, 1, [&](int64_t a, int64_t b) {
    Head own(parts > 1 ? 0 : keys, dim, v_dim);
    Block of(kRows, dim, v_dim);
    typename Head::Room room(kKeys, dim);
    for (int64_t i = a; i < b; i++) {
      const int64_t n = i / parts / kv_heads, head = i / parts % kv_heads;
      if (parts == 1) read(i, own);
      const Head& kv = parts > 1 ? shared[i / parts] : own;
      for (int64_t h = head * group; h < (head + 1) * group; h++)
        for (int64_t first = i % parts * kRows; first < rows; first += parts * kRows) {
          const int64_t now = std::min(kRows, rows - first), before = keys - rows + first;
          of.begin(queries + n * q.stride(0) + h * q.stride(1) + first * row_stride, row_stride, now,
                   dim, scale);
          kv.begin(of, room);
          for (int64_t at = 0; at < before + now; at += kKeys) {
            const int64_t here = std::min(kKeys, before + now - at);
            kv.score(of, room, at, here);
            const int64_t end = (here + Head::kStep - 1) / Head::kStep * Head::kStep;
            for (int64_t r = 0; r < kRows; r++)
              of.next[r] = largest_of(of, r, std::clamp<int64_t>(before + r + 1 - at, 0, here), end);
            rise(of, kRows, v_dim);
            for (int64_t r = 0; r < kRows; r++) weigh(of, r, end);
            kv.add(of, room, at, here);
          }
          float* to = made + ((n * rows + first) * heads + h) * v_dim;
          for (int64_t r = 0; r < now; r++, to += heads * v_dim) {
            const float share = 1.f / of.sums[r];
            int nones = 0;
            for (int64_t d = 0; d < v_dim; d++) {
              to[d] = share * of.out[r * v_dim + d];
              nones += to[d] != to[d];
            }
            if (nones > 0) odd = true;
          }
        }
    }
  });
  if (Head::kLosesInfinity && odd) return {};
  return out.transpose(1, 2);
}

}  // namespace

at::Tensor attnopt::prompt(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           double scale) {
  for (const at::Tensor* x : {&q_in, &k_in, &v_in})
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == at::kFloat,
                "prompt: q, k and v are float32 [batch, heads, tokens, dim]");
  TORCH_CHECK(k_in.sizes().slice(0, 3) == v_in.sizes().slice(0, 3) &&
                  q_in.size(0) == k_in.size(0) && q_in.size(3) == k_in.size(3) &&
                  k_in.size(1) > 0 && q_in.size(1) % k_in.size(1) == 0 &&
                  q_in.size(2) <= k_in.size(2),
              "prompt: q ", q_in.sizes(), ", k ", k_in.sizes(), " and v ", v_in.sizes(),
              " do not fit");
  auto rowed = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor q = rowed(q_in), k = rowed(k_in), v = rowed(v_in);
  at::Tensor made;
#ifdef HAS_MATRIX_UNITS
  if (matrix_units() && q.size(2) >= kSide) made = attention<UnitsHead>(q, k, v, static_cast<float>(scale));
#endif
  return made.defined() ? made : attention<Head>(q, k, v, static_cast<float>(scale));
}
