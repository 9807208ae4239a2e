// Sparse attention on CPU: the fast path behind backend.py; library.py compiles this file on first use. It computes what
// attention/reference.py computes; DESIGN sections 2-4 define the terms. q, k and v are float32, bfloat16 or float16
// (T below): 16-bit numbers are widened as they are loaded, and everything else, the output too, is float32.
//
// A row's scores over all its keys are computed first, then finish_row() selects, compensates and adds up V rows.
// There are two ways to compute the scores:
//   many rows (prefill): K is packed once per KV head, then tiles of ROWS rows are matrix products in registers;
//   few rows (decode): K is read once, without packing, for all heads of a group; keys are split over threads.
// Only the kept V rows are read (and, for the mean of V, each V row once). With a copy of K in few bits
// (methods/key_copy.py) a decode step first scores all keys by the copy, and then reads K only for those that some head
// of the group may keep.
//
// Without torch headers this compiles in seconds; the threads are those of torch's own OpenMP pool.
// GCC vectors of W floats are used for AVX-512, AVX2 and other CPUs; only compaction and exp2 use intrinsics.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 14;  // ROWS * 2 accumulators, 2 vectors of keys, 1 of queries: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8, ROWS = 6;  // 15 of 16 registers
#else
constexpr int W = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * W;      // keys of one tile
constexpr int SUM_BLOCK = 64;     // keys per stored partial sum of V
constexpr int CHUNK = 256;        // keys of one work item or one partial sum; a multiple of SUM_BLOCK and PANEL
constexpr int ITEM_TILES = 4;     // tiles of one work item of prefill
constexpr int FEW = 4;            // rows whose dot products are computed together in decode
constexpr int FIRST = 4, LAST = 16;  // keys of a row that are read whatever the copy says; key_copy.py has them, too
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef int32_t vi_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int8_t vb_unaligned __attribute__((vector_size(W), aligned(1), may_alias));

enum { TOP_THETA = 0, TOP_K = 1 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { SDC_NONE = 0, SDC_EXACT = 1, SDC_EXP_THRESHOLD = 2, SDC_TABLE = 3 };

}  // namespace

extern "C" {

// One call, with the fields of Call in library.py in the same order; every field is 8 bytes. Strides count elements;
// the last dimension is contiguous everywhere. A null pointer means that this input or output is not used.
struct Call {
  int64_t batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, threads, type;
  const void *q, *k, *v;  // of FLOAT32, BFLOAT16 or FLOAT16, as `type` says
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  const int64_t* n;  // [B, Q]
  const uint8_t *mask, *real, *key_real, *chosen;  // [B, Q, N], [B, Q], [B, N], [B, Q]
  int64_t n_batch, mask_batch, mask_row, real_batch, key_real_batch, chosen_batch;
  int64_t first;  // row i sees no key after first + i; -1: only `mask` decides
  int64_t mode, post_softmax, k_keep, sdc, vmc, capk;
  double sdc_scale, scale;
  const float *theta, *table;  // [H, theta_len], [H, table_len]
  int64_t theta_len, table_len;
  const float* factor;  // [B, H, N], of value-aware thresholds on weights
  int64_t factor_batch, factor_head;
  const void *codes, *steps;  // a copy of K, see KeyCodes in key_codes.py: int8 or two of 4 bits, bfloat16; null: none
  const float* key_mean;      // [B, H_kv, D]
  uint8_t* read;              // [B, H_kv, N], all 0: becomes 1 where K is read
  int64_t code_bits, codes_batch, codes_head, steps_batch, steps_head;
  const float* v_sum;  // [B, H_kv, Q, D], sum of V over each row's visible keys; null: computed here
  float* out;
  int64_t out_batch, out_head, out_row;
  int64_t* attn;       // [B, H]
  int32_t* vrow;       // [B, H_kv, N]
  int32_t* row;        // [B, H, Q]
  int32_t* row_vrows;  // [B, H_kv, Q]: V rows that any head of a group keeps; all 0
  const int64_t* ks;   // calibration: [num_ks], ascending
  int64_t num_ks;
  float *samples, *missing;        // [num_ks, B, H, Q]
  const float* missing_theta;      // [num_ks, H, missing_len]; null: Top-k's R
  int64_t missing_len;
  float *packed, *sums, *scores;  // workspaces, see toptheta_workspace
};

}  // extern "C"

namespace {

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

inline vf load(const bf16* p) {
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi) << 16);
}

inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vi bits = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vi), magnitude = bits & 0x7fff;
  vi wide = (vi)((vf)(magnitude << 13) * 0x1p112f);  // the exponent's bias; denormal numbers become normal
  wide |= (magnitude >= 0x7c00) & 0x7f800000;        // infinity and NaN
  return (vf)(wide | (bits & 0x8000) << 16);
#endif
}

// Two channels of a key: i in the low half of byte i, i + D / 2 in its high half.
struct int4 {
  int8_t two;
};

inline vi load_bytes(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*static_cast<const vb_unaligned*>(p), vi);
#endif
}

// Channels d..d + W of a key of `dim` channels.
template <typename T>
inline vf channels(const T* key, int64_t d, int64_t) { return load(key + d); }
inline vf channels(const int8_t* key, int64_t d, int64_t) { return __builtin_convertvector(load_bytes(key + d), vf); }
inline vf channels(const int4* key, int64_t d, int64_t dim) {
  vi code = d < dim / 2 ? load_bytes(key + d) << 28 : load_bytes(key + d - dim / 2) << 24;
  return __builtin_convertvector(code >> 28, vf);
}

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline float widen(fp16 x) {
  fp16 lanes[W] = {x};
  return load(lanes)[0];
}

inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
inline vf splat(float x) { return vf{} + x; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline vi lane_numbers() {
  vi lanes;
  for (int j = 0; j < W; j++) lanes[j] = j;
  return lanes;
}

inline float sum_lanes(vf x) {
  float sum = 0;
  for (int j = 0; j < W; j++) sum += x[j];
  return sum;
}

// exp(x) for x <= 0 to about 1e-7 relative, denormal results included; -inf gives 0 (Cephes' polynomial).
inline vf exp_nonpositive(vf x) {
  x = vmax(x, splat(-104.0f));
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer, left in the low bits
  vf rounded = x * 1.44269504088896341f + magic;
  vf n = rounded - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  vi power = (vi)rounded - (vi)magic, half = power >> 1;  // in two steps, because 2^-150 is not a float
  return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
#endif
}

inline float exp_one(float x) { return exp_nonpositive(splat(x))[0]; }

// Memory of one thread that only grows; its contents are not initialized.
template <typename T>
struct Buffer {
  T* data = nullptr;
  int64_t room = 0;
  T* get(int64_t wanted) {
    if (wanted > room) {
      std::free(data);
      room = ceil_div(wanted * sizeof(T), 4096) * 4096 / sizeof(T);
      data = static_cast<T*>(std::aligned_alloc(64, room * sizeof(T)));
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

struct Scratch {
  Buffer<float> query, tile, values, candidates, weighed;
  Buffer<int32_t> indices, counts, last_rows;
  int64_t counts_of = -1;  // the (batch, KV head) that `counts` belongs to
};

thread_local Scratch scratch;

// ---- Selection ----

// Append the lanes of x that are above the threshold, and their positions.
inline void append_above(vf x, float threshold, int32_t position, int32_t* indices, float* values, int64_t& count) {
#if defined(__AVX512F__)
  // Compress in registers and store whole vectors: compressing stores are microcode on Zen 4.
  __mmask16 above = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(threshold), _CMP_GT_OQ);
  vi at = lane_numbers() + position;
  _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(above, (__m512)x));
  _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(above, (__m512i)at));
  count += __builtin_popcount(above);
#else
#if defined(__AVX2__)
  unsigned above = _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(threshold), _CMP_GT_OQ));
#else
  unsigned above = 0;
  for (int j = 0; j < W; j++) above |= unsigned(x[j] > threshold) << j;
#endif
  for (; above; above &= above - 1) {
    int j = __builtin_ctz(above);
    values[count] = x[j];
    indices[count++] = position + j;
  }
#endif
}

// Collect the values above the threshold. SUM_DROPPED: return the sum of exp(x - row_max) over the others.
template <bool SUM_DROPPED>
float collect(const float* x, int64_t padded, float threshold, float row_max, int32_t* indices, float* values,
              int64_t& count) {
  vf dropped_sum = {};
  for (int64_t j = 0; j < padded; j += W) {
    vf s = load(x + j);
    append_above(s, threshold, int32_t(j), indices, values, count);
    if (SUM_DROPPED) dropped_sum += s > threshold ? vf{} : exp_nonpositive(s - row_max);
  }
  return SUM_DROPPED ? sum_lanes(dropped_sum) : 0.0f;
}

// Floats as integers of the same order.
inline vi ordered(vf x) {
  vi bits = (vi)x;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest of `count` values, which are overwritten: bisection on their bits, counting whole vectors. It ends
// as soon as exactly k values are at or above a cut; only with ties does it run through all bits.
float bisect_kth(float* values, int64_t count, int64_t k) {
  int64_t padded = ceil_div(count, W) * W;
  for (int64_t j = count; j < padded; j++) values[j] = -INF;
  vi low = vi{} + INT32_MAX, high = vi{} + INT32_MIN;
  int32_t* keys = reinterpret_cast<int32_t*>(values);
  for (int64_t j = 0; j < padded; j += W) {
    vi key = ordered(load(values + j));
    *reinterpret_cast<vi_unaligned*>(keys + j) = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  int32_t lower = INT32_MAX, upper = INT32_MIN;
  for (int j = 0; j < W; j++) lower = std::min(lower, low[j]), upper = std::max(upper, high[j]);
  while (lower < upper) {  // at least k keys are >= lower, fewer than k are > upper
    int32_t cut = int32_t((int64_t(lower) + upper + 1) >> 1);
    vi above = {}, smallest = vi{} + INT32_MAX;
    for (int64_t j = 0; j < padded; j += W) {
      vi key = *reinterpret_cast<const vi_unaligned*>(keys + j);
      vi in = key >= cut;
      above -= in;
      vi candidate = in ? key : vi{} + INT32_MAX;
      smallest = candidate < smallest ? candidate : smallest;
    }
    int64_t num_above = 0;
    for (int j = 0; j < W; j++) num_above += above[j];
    if (num_above < k) {
      upper = cut - 1;
      continue;
    }
    lower = cut;
    if (num_above == k) {
      lower = smallest[0];
      for (int j = 1; j < W; j++) lower = std::min(lower, smallest[j]);
      break;
    }
  }
  int32_t bits = lower ^ ((lower >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The k-th largest values of one row, for k <= largest_k. The row is cut into disjoint groups, at least twice
// largest_k of them: the largest_k-th largest of the groups' maxima is a lower bound of the row's largest_k-th largest
// value, and few other values of the row are above it.
struct Ranking {
  const float* all;
  int64_t num;
  float* work;

  Ranking(const float* x, int64_t padded, int64_t largest_k, Scratch& w) : all(x), num(padded) {
    work = w.candidates.get(2 * (padded + W));
    int64_t groups = ceil_div(2 * largest_k, W) * W;
    if (padded < 2 * groups) return;
    std::memcpy(work, x, groups * sizeof(float));
    for (int64_t from = groups; from + groups <= padded; from += groups)
      for (int64_t j = 0; j < groups; j += W) store(work + j, vmax(load(work + j), load(x + from + j)));
    float bound = std::nextafter(bisect_kth(work, groups, largest_k), -INF);
    float* kept = work + padded + W;
    num = 0;
    collect<false>(x, padded, bound, 0, w.indices.get(padded + W), kept, num);
    all = kept;
  }

  float kth(int64_t k) {
    std::memcpy(work, all, num * sizeof(float));
    return bisect_kth(work, num, k);
  }
};

// Sum of exp(x - row_max) over x <= threshold, and how many visible values that are.
float sum_exps_up_to(const float* x, int64_t padded, float threshold, float row_max, int64_t* num_summed) {
  vf sum = {};
  vi count = {};
  for (int64_t j = 0; j < padded; j += W) {
    vf s = load(x + j);
    sum += s > threshold ? vf{} : exp_nonpositive(s - row_max);
    count -= (s <= threshold) & (s > -INF);
  }
  *num_summed = 0;
  for (int j = 0; j < W; j++) *num_summed += count[j];
  return sum_lanes(sum);
}

// ---- V ----

// out[0..NV*W) += sum over j < count of weight(j) * row key(j) of v.
template <int NV, typename T, typename Key, typename Weight>
void add_columns(const T* v, int64_t v_row, int64_t count, Key key, Weight weight, float* out) {
  vf sum[NV] = {};
  for (int64_t j = 0; j < count; j++) {
    const T* row = v + key(j) * v_row;
    vf factor = splat(weight(j));
    for (int c = 0; c < NV; c++) sum[c] += factor * load(row + c * W);
  }
  for (int c = 0; c < NV; c++) store(out + c * W, load(out + c * W) + sum[c]);
}

template <typename T, typename Key, typename Weight>
void add_rows(const T* v, int64_t v_row, int64_t count, Key key, Weight weight, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 8 * W <= dim; d += 8 * W) add_columns<8>(v + d, v_row, count, key, weight, out + d);
  for (; d + 4 * W <= dim; d += 4 * W) add_columns<4>(v + d, v_row, count, key, weight, out + d);
  for (; d < dim; d += W) add_columns<1>(v + d, v_row, count, key, weight, out + d);
}

template <typename T>
inline const T* k_of(const Call& c, int64_t b, int64_t g) {
  return static_cast<const T*>(c.k) + b * c.k_batch + g * c.k_head;
}

template <typename T>
inline const T* v_of(const Call& c, int64_t b, int64_t g) {
  return static_cast<const T*>(c.v) + b * c.v_batch + g * c.v_head;
}

// out += the V rows of keys from..to that are not padding.
template <typename T>
void add_key_range(const Call& c, int64_t b, int64_t g, int64_t from, int64_t to, float* out) {
  const T* v = v_of<T>(c, b, g);
  const uint8_t* real = c.key_real == nullptr ? nullptr : c.key_real + b * c.key_real_batch;
  auto key = [&](int64_t j) { return from + j; };
  auto one = [&](int64_t) { return 1.0f; };
  auto one_if_real = [&](int64_t j) { return real[from + j] ? 1.0f : 0.0f; };
  if (real == nullptr) add_rows(v, c.v_row, to - from, key, one, c.head_dim, out);
  else add_rows(v, c.v_row, to - from, key, one_if_real, c.head_dim, out);
}

inline int64_t sum_blocks(const Call& c) { return ceil_div(c.kv_len, SUM_BLOCK); }

// Partial sums of V, one per SUM_BLOCK keys.
template <typename T>
void sum_v(const Call& c, int64_t bg, int64_t from, int64_t to) {
  for (int64_t key = from; key < to; key += SUM_BLOCK) {
    float* sum = c.sums + (bg * sum_blocks(c) + key / SUM_BLOCK) * c.head_dim;
    std::memset(sum, 0, c.head_dim * sizeof(float));
    add_key_range<T>(c, bg / c.num_kv_heads, bg % c.num_kv_heads, key, std::min(key + SUM_BLOCK, to), sum);
  }
}

// Replace each block's sum of V by the sum over all blocks before it, added in double.
void accumulate_sums(const Call& c, int64_t bg) {
  for (int64_t d = 0; d < c.head_dim; d++) {
    double before = 0;
    for (int64_t block = 0; block < sum_blocks(c); block++) {
      float& sum = c.sums[(bg * sum_blocks(c) + block) * c.head_dim + d];
      double own = sum;
      sum = float(before);
      before += own;
    }
  }
}

// ---- Rows ----

struct Row {
  int64_t b, h, g, i, end;  // sequence, query head, KV head, query row, number of leading keys it may see
};

inline Row row_at(const Call& c, int64_t bg, int64_t m) {  // row m of a group: the heads of one position are adjacent
  int64_t group = c.num_heads / c.num_kv_heads, b = bg / c.num_kv_heads, g = bg % c.num_kv_heads, i = m / group;
  int64_t end = c.first < 0 ? c.kv_len : std::min(c.kv_len, c.first + i + 1);
  return Row{b, g * group + m % group, g, i, end};
}

template <typename T>
inline const T* q_of(const Call& c, const Row& row) {
  return static_cast<const T*>(c.q) + row.b * c.q_batch + row.h * c.q_head + row.i * c.q_row;
}

// out += factor * mean of V over the row's visible keys.
template <typename T>
void add_v_mean(const Call& c, const Row& row, float factor, int64_t n, float* out) {
  alignas(64) float own[1024];  // MAX_HEAD_DIM of backend.py
  int64_t bg = row.b * c.num_kv_heads + row.g, block = (row.end - 1) / SUM_BLOCK;
  const float* sum = own;
  if (c.v_sum != nullptr) {
    sum = c.v_sum + (bg * c.q_len + row.i) * c.head_dim;
  } else {
    std::memcpy(own, c.sums + (bg * sum_blocks(c) + block) * c.head_dim, c.head_dim * sizeof(float));
    add_key_range<T>(c, row.b, row.g, block * SUM_BLOCK, row.end, own);
  }
  factor /= float(n);
  for (int64_t d = 0; d < c.head_dim; d += W) store(out + d, load(out + d) + factor * load(sum + d));
}

inline float at_length(const float* table, int64_t length, int64_t head, int64_t n) {
  return table[head * length + std::min(n, length - 1)];
}

void calibrate_row(const Call& c, const Row& row, const float* x, int64_t padded, int64_t n, float row_max,
                   Ranking& ranking) {
  int64_t rows = c.batch * c.num_heads * c.q_len, at = (row.b * c.num_heads + row.h) * c.q_len + row.i;
  for (int64_t which = 0; which < c.num_ks; which++) {
    int64_t k = c.ks[which];
    if (n <= k) continue;
    float sample = ranking.kth(k + 1);
    if (c.samples != nullptr) c.samples[which * rows + at] = sample;
    if (c.missing == nullptr) continue;
    float threshold = sample;
    if (c.missing_theta != nullptr) {
      float theta = at_length(c.missing_theta, c.missing_len, which * c.num_heads + row.h, n);
      threshold = std::min(theta, std::nextafter(row_max, -INF));
    }
    int64_t num_dropped;
    float missing = sum_exps_up_to(x, padded, threshold, row_max, &num_dropped);
    // Top-k drops n - k keys, so of the keys that tie for place k it keeps some.
    if (c.missing_theta == nullptr) missing -= float(num_dropped - (n - k)) * exp_one(threshold - row_max);
    c.missing[which * rows + at] = missing;
  }
}

float max_of_row(const float* x, int64_t padded) {
  vf maxima = splat(-INF);
  for (int64_t j = 0; j < padded; j += W) maxima = vmax(maxima, load(x + j));
  float row_max = maxima[0];
  for (int j = 1; j < W; j++) row_max = std::max(row_max, maxima[j]);
  return row_max;
}

// Scores become weights, in place; keys that are not visible become -inf, which is above no threshold.
void softmax(float* x, int64_t padded, float row_max) {
  vf sum = {};
  for (int64_t j = 0; j < padded; j += W) {
    vf s = load(x + j), e = exp_nonpositive(s - row_max);
    sum += e;
    store(x + j, s == -INF ? s : e);
  }
  float inverse = 1.0f / sum_lanes(sum);
  for (int64_t j = 0; j < padded; j += W) store(x + j, load(x + j) * inverse);
}

// The kept keys of a row, in order. values: scores, then weights. dropped_sum: the sum of exp(x - row_max) over the
// other visible keys, for SDC 'exact'.
struct Kept {
  int32_t* indices;
  float* values;
  int64_t count;
  float dropped_sum;
};

Kept select_row(const Call& c, const float* x, int64_t padded, float threshold, float row_max, bool sparse,
                Scratch& w) {
  Kept kept{w.indices.get(padded + W), w.values.get(padded + W), 0, 0};
  bool exact = c.sdc == SDC_EXACT && sparse && !c.post_softmax;
  kept.dropped_sum = exact ? collect<true>(x, padded, threshold, row_max, kept.indices, kept.values, kept.count)
                           : collect<false>(x, padded, threshold, row_max, kept.indices, kept.values, kept.count);
  if (!sparse || kept.count <= c.k_keep) return kept;
  if (c.mode == TOP_K) {  // of the keys that tie for place k, drop the last ones
    float tied = *std::min_element(kept.values, kept.values + kept.count);
    for (int64_t j = kept.count - 1; kept.count > c.k_keep; j--) {
      if (kept.values[j] != tied) continue;
      std::memmove(kept.values + j, kept.values + j + 1, (kept.count - j - 1) * sizeof(float));
      std::memmove(kept.indices + j, kept.indices + j + 1, (kept.count - j - 1) * sizeof(int32_t));
      kept.count--;
      if (exact) kept.dropped_sum += exp_one(tied - row_max);
    }
  } else if (c.capk) {
    int64_t older = kept.count - c.k_keep;
    for (int64_t j = 0; exact && j < older; j++) kept.dropped_sum += exp_one(kept.values[j] - row_max);
    kept.values += older, kept.indices += older, kept.count -= older;
  }
  return kept;
}

// Values become final weights; returns their sum.
float weigh(const Call& c, int64_t head, int64_t n, float row_max, bool sparse, Kept& kept) {
  for (int64_t j = kept.count; j % W; j++) kept.values[j] = c.post_softmax ? 0.0f : -INF;  // up to a whole vector
  vf sum = {};
  for (int64_t j = 0; j < kept.count; j += W) {
    vf weight = c.post_softmax ? load(kept.values + j) : exp_nonpositive(load(kept.values + j) - row_max);
    store(kept.values + j, weight);
    sum += weight;
  }
  if (c.post_softmax) return sum_lanes(sum);
  float missing = kept.dropped_sum;
  if (c.sdc == SDC_EXP_THRESHOLD && sparse)
    missing = float(n - kept.count) * std::exp(at_length(c.theta, c.theta_len, head, n) - row_max);
  if (c.sdc == SDC_TABLE && sparse) missing = at_length(c.table, c.table_len, head, n);
  float denominator = sum_lanes(sum) + float(c.sdc_scale) * missing;
  float inverse = 1.0f / std::max(denominator, std::numeric_limits<float>::min());
  for (int64_t j = 0; j < kept.count; j += W) store(kept.values + j, load(kept.values + j) * inverse);
  return sum_lanes(sum) * inverse;
}

// own: this thread's counts of V rows, or null. last_rows: the last row for which a head of the group kept each key.
void count_row(const Call& c, const Row& row, const Kept& kept, int32_t* own, int32_t* last_rows) {
  if (c.attn == nullptr || (c.real != nullptr && !c.real[row.b * c.real_batch + row.i])) return;
  __atomic_fetch_add(c.attn + row.b * c.num_heads + row.h, kept.count, __ATOMIC_RELAXED);
  if (c.row != nullptr) c.row[(row.b * c.num_heads + row.h) * c.q_len + row.i] = int32_t(kept.count);
  int64_t bg = row.b * c.num_kv_heads + row.g;
  if (c.row_vrows != nullptr) {  // one thread computes all heads of a group's row, so nobody else adds to it
    int32_t found = 0;
    for (int64_t j = 0; j < kept.count; j++) {
      int32_t& last = last_rows[kept.indices[j]];
      found += last != row.i;
      last = int32_t(row.i);
    }
    c.row_vrows[bg * c.q_len + row.i] += found;
  }
  int32_t* shared = c.vrow + bg * c.kv_len;
  for (int64_t j = 0; j < kept.count; j++) {
    if (own != nullptr) own[kept.indices[j]]++;
    else __atomic_fetch_add(shared + kept.indices[j], 1, __ATOMIC_RELAXED);
  }
}

// Keys that the row does not see become -inf, up to a whole last vector.
void hide(const Call& c, const Row& row, float* x, int64_t padded) {
  if (c.mask != nullptr) {
    const uint8_t* visible = c.mask + row.b * c.mask_batch + row.i * c.mask_row;
    for (int64_t j = 0; j < row.end; j++) x[j] = visible[j] ? x[j] : -INF;
  }
  for (int64_t j = row.end; j < padded; j++) x[j] = -INF;
}

// out = x, times how much each key's value counts where that is given.
void weigh_values(const Call& c, const Row& row, const float* x, int64_t padded, float* out) {
  const float* factor = c.factor + row.b * c.factor_batch + row.h * c.factor_head;
  for (int64_t j = 0; j < row.end; j++) out[j] = x[j] > -INF ? x[j] * factor[j] : -INF;
  for (int64_t j = row.end; j < padded; j++) out[j] = -INF;
}

inline uint8_t* read_of(const Call& c, const Row& row) { return c.read + (row.b * c.num_kv_heads + row.g) * c.kv_len; }

// Mark the keys that K is read for because of a row whose scores by the copy are x: those above its threshold, and its
// first and last ones. Other heads of its group may mark keys at the same time.
void mark_keys(const Call& c, const Row& row, float* x, Scratch& w) {
  int64_t n = c.n[row.b * c.n_batch + row.i], padded = ceil_div(row.end, W) * W, count = 0;
  if (n == 0) return;
  hide(c, row, x, padded);
  uint8_t* read = read_of(c, row);
  auto mark = [&](int64_t j) { __atomic_store_n(read + j, 1, __ATOMIC_RELAXED); };
  for (int64_t j = 0, seen = 0; j < row.end && seen < FIRST; j++)
    if (x[j] > -INF) mark(j), seen++;
  for (int64_t j = row.end - 1, seen = 0; j >= 0 && seen < LAST; j--)
    if (x[j] > -INF) mark(j), seen++;

  float* compared = x;
  if (c.post_softmax) {
    compared = w.weighed.get(padded);
    std::memcpy(compared, x, padded * sizeof(float));
    softmax(compared, padded, max_of_row(compared, padded));
    if (c.factor != nullptr) weigh_values(c, row, compared, padded, compared);
  }
  int32_t* indices = w.indices.get(padded + W);
  collect<false>(compared, padded, at_length(c.theta, c.theta_len, row.h, n), 0, indices, w.values.get(padded + W),
                 count);
  for (int64_t j = 0; j < count; j++) mark(indices[j]);
}

// Compute the output of one row from its scores x, which are overwritten; x has room for a whole last vector. With
// may_defer, a row that keeps most of its keys is left to the caller, whose matrix product is faster: this returns
// true, x holds the final weights, and their product with V is still to be added to the output.
template <typename T>
bool finish_row(const Call& c, const Row& row, float* x, Scratch& w, int32_t* own, bool may_defer) {
  int64_t n = c.n[row.b * c.n_batch + row.i], padded = ceil_div(row.end, W) * W;
  float* out = c.out == nullptr ? nullptr : c.out + row.b * c.out_batch + row.h * c.out_head + row.i * c.out_row;
  if (out != nullptr) std::memset(out, 0, c.head_dim * sizeof(float));
  bool chosen = c.num_ks > 0 && (c.chosen == nullptr || c.chosen[row.b * c.chosen_batch + row.i]);
  if (n == 0 || (out == nullptr && !chosen)) return false;

  hide(c, row, x, padded);
  float row_max = max_of_row(x, padded);
  if (c.post_softmax) {
    softmax(x, padded, row_max);
    row_max = max_of_row(x, padded);
  }

  // What is compared: scores or weights, or with `factor` weights times it; with a copy of K, only of keys that were
  // read.
  bool sparse = (c.mode == TOP_THETA || c.mode == TOP_K) && n > c.k_keep;
  const uint8_t* read = c.codes != nullptr && sparse ? read_of(c, row) : nullptr;
  const float* compared = x;
  float largest = row_max;
  if (sparse && (c.factor != nullptr || read != nullptr)) {
    float* changed = w.weighed.get(padded);
    if (c.factor != nullptr) weigh_values(c, row, x, padded, changed);
    else std::memcpy(changed, x, padded * sizeof(float));
    for (int64_t j = 0; read != nullptr && j < row.end; j++) changed[j] = read[j] ? changed[j] : -INF;
    compared = changed;
    largest = max_of_row(compared, padded);
  }
  bool top_k = c.mode == TOP_K && sparse && out != nullptr;
  float threshold = -INF;  // keys above it are kept: at least the row's largest
  if (c.mode == TOP_THETA && out != nullptr)
    threshold = std::min(at_length(c.theta, c.theta_len, row.h, n), std::nextafter(largest, -INF));
  int64_t largest_k = top_k ? c.k_keep : 0;
  for (int64_t which = 0; chosen && which < c.num_ks; which++)
    if (c.ks[which] < n) largest_k = std::max(largest_k, c.ks[which] + 1);
  if (largest_k > 0) {
    Ranking ranking(x, padded, largest_k, w);
    if (chosen) calibrate_row(c, row, x, padded, n, row_max, ranking);
    if (top_k) threshold = std::nextafter(ranking.kth(c.k_keep), -INF);
  }
  if (out == nullptr) return false;

  Kept kept = select_row(c, compared, padded, threshold, row_max, sparse, w);
  if (compared != x)
    for (int64_t j = 0; j < kept.count; j++) kept.values[j] = x[kept.indices[j]];
  if (read != nullptr && c.sdc == SDC_EXACT && !c.post_softmax) {  // the estimates of keys that were not read
    vf sum = {};
    for (int64_t j = 0; j < padded; j += W)
      sum += load(compared + j) > -INF ? vf{} : exp_nonpositive(load(x + j) - row_max);
    kept.dropped_sum += sum_lanes(sum);
  }
  float sum = weigh(c, row.h, n, row_max, sparse, kept);
  count_row(c, row, kept, own, w.last_rows.data);
  if (c.vmc && sparse) add_v_mean<T>(c, row, 1.0f - sum, n, out);
  if (may_defer && 2 * kept.count > row.end) {
    std::memset(x, 0, padded * sizeof(float));
    for (int64_t j = 0; j < kept.count; j++) x[kept.indices[j]] = kept.values[j];
    return true;
  }
  const T* v = v_of<T>(c, row.b, row.g);
  for (int64_t from = 0; from < kept.count; from += CHUNK) {  // in parts: one long sum loses digits
    auto key = [&](int64_t j) { return int64_t(kept.indices[from + j]); };
    auto weight = [&](int64_t j) { return kept.values[from + j]; };
    add_rows(v, c.v_row, std::min<int64_t>(CHUNK, kept.count - from), key, weight, c.head_dim, out);
  }
  return false;
}

// ---- Many rows ----

// out (ROWS rows, NV * W columns) = a * b. a: ROWS rows by `depth`, at a[row * a_row + d * a_col].
template <int NV, typename T>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t depth,
                          float* out, int64_t out_row) {
  vf sum[ROWS][NV] = {};
  for (int64_t d = 0; d < depth; d++) {
    vf columns[NV];
    for (int c = 0; c < NV; c++) columns[c] = load(b + d * b_row + c * W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < NV; c++) sum[r][c] += a[r * a_row + d * a_col] * columns[c];
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < NV; c++) store(out + r * out_row + c * W, sum[r][c]);
}

inline int64_t panels(const Call& c) { return ceil_div(c.kv_len, PANEL); }

// K of one KV head, keys from..to, as panels [D, PANEL]: vector lanes are keys.
template <typename T>
void pack_k(const Call& c, int64_t bg, int64_t from, int64_t to) {
  const T* k = k_of<T>(c, bg / c.num_kv_heads, bg % c.num_kv_heads);
  for (int64_t key = from; key < to; key += PANEL) {
    float* panel = c.packed + (bg * panels(c) + key / PANEL) * c.head_dim * PANEL;
    int64_t here = std::min<int64_t>(PANEL, to - key);
    for (int64_t d = 0; d < c.head_dim; d++) {
      for (int64_t j = 0; j < here; j++) panel[d * PANEL + j] = widen(k[(key + j) * c.k_row + d]);
      for (int64_t j = here; j < PANEL; j++) panel[d * PANEL + j] = 0;
    }
  }
}

template <typename T>
void run_tile(const Call& c, int64_t bg, int64_t first_row, int64_t num_rows, Scratch& w, int32_t* own) {
  int64_t dim = c.head_dim;
  // One vector more than whole panels: with a row length that is a multiple of 4096 bytes, all rows would compete for
  // the same cache sets.
  int64_t x_row = panels(c) * PANEL + W;
  float* query = w.query.get(dim * ROWS);
  float* tile = w.tile.get(x_row * ROWS);
  Row rows[ROWS];
  int64_t end = 0;
  for (int r = 0; r < ROWS; r++) {
    rows[r] = row_at(c, bg, first_row + std::min<int64_t>(r, num_rows - 1));
    const T* q = q_of<T>(c, rows[r]);
    for (int64_t d = 0; d < dim; d++) query[d * ROWS + r] = widen(q[d]) * float(c.scale);
    end = std::max(end, rows[r].end);
  }
  const float* packed = c.packed + bg * panels(c) * dim * PANEL;
  for (int64_t key = 0; key < end; key += PANEL)
    multiply_tile<2>(query, 1, ROWS, packed + key * dim, PANEL, dim, tile + key, x_row);

  bool deferred[ROWS] = {}, any = false;
  for (int r = 0; r < num_rows; r++) {
    float* x = tile + r * x_row;
    deferred[r] = finish_row<T>(c, rows[r], x, w, own, true);
    int64_t padded = ceil_div(rows[r].end, W) * W;
    if (deferred[r] && padded < end) std::memset(x + padded, 0, (end - padded) * sizeof(float));
    any |= deferred[r];
  }
  if (!any) return;
  const T* v = v_of<T>(c, rows[0].b, rows[0].g);
  alignas(64) float part[ROWS * PANEL];
  for (int64_t key = 0; key < end; key += CHUNK) {  // in parts: one long sum loses digits
    int64_t depth = std::min<int64_t>(CHUNK, end - key);
    for (int64_t d = 0; d < dim; d += PANEL) {
      int64_t width = std::min<int64_t>(PANEL, dim - d);
      const T* b = v + key * c.v_row + d;
      if (width == PANEL) multiply_tile<2>(tile + key, x_row, 1, b, c.v_row, depth, part, PANEL);
      else multiply_tile<1>(tile + key, x_row, 1, b, c.v_row, depth, part, PANEL);
      for (int r = 0; r < num_rows; r++) {
        if (!deferred[r]) continue;
        float* out = c.out + rows[r].b * c.out_batch + rows[r].h * c.out_head + rows[r].i * c.out_row + d;
        for (int64_t e = 0; e < width; e += W) store(out + e, load(out + e) + load(part + r * PANEL + e));
      }
    }
  }
}

void flush_counts(const Call& c, Scratch& w) {
  if (c.vrow == nullptr || w.counts_of < 0) return;
  int32_t* shared = c.vrow + w.counts_of * c.kv_len;
  for (int64_t j = 0; j < c.kv_len; j++)
    if (w.counts.data[j]) __atomic_fetch_add(shared + j, w.counts.data[j], __ATOMIC_RELAXED);
  w.counts_of = -1;
}

// This thread's own counts of the V rows of one KV head: shared counts would need an atomic operation per kept key.
int32_t* own_counts(const Call& c, int64_t bg, Scratch& w) {
  if (c.vrow == nullptr) return nullptr;
  if (w.counts_of != bg) {
    flush_counts(c, w);
    std::memset(w.counts.get(c.kv_len), 0, c.kv_len * sizeof(int32_t));
    if (c.row_vrows != nullptr) std::fill_n(w.last_rows.get(c.kv_len), c.kv_len, -1);
    w.counts_of = bg;
  }
  return w.counts.data;
}

// ---- Few rows ----

// parts[0] becomes a vector whose lane j is the sum of the lanes of parts[j]: halves of two vectors are shuffled and
// added until one vector is left.
template <int H>
inline void sum_parts(vf* parts) {
  vi low, high;
  for (int j = 0; j < W; j++) low[j] = j & H ? W + j : j, high[j] = j & H ? W + (j ^ H) : (j ^ H);
  for (int j = 0; j < H; j++) parts[j] = __builtin_shuffle(parts[j], parts[j + H], low) +
                                         __builtin_shuffle(parts[j], parts[j + H], high);
  if constexpr (H > 1) sum_parts<H / 2>(parts);
}

// Scores of R rows against the keys key_at(from), .., key_at(to - 1) of one KV head. q: R rows of D, already scaled.
template <int R, typename T, typename Key>
void dot_rows(const float* q, const T* k, int64_t k_row, int64_t dim, Key key_at, int64_t from, int64_t to, float* x,
              int64_t x_row) {
  for (int64_t key = from; key < to; key += W) {
    vf parts[R][W];
    for (int j = 0; j < W; j++) {
      const T* row = k + key_at(std::min(key + j, to - 1)) * k_row;
      vf sum[R] = {};
      for (int64_t d = 0; d < dim; d += W) {
        vf of_key = channels(row, d, dim);
        for (int r = 0; r < R; r++) sum[r] += load(q + r * dim + d) * of_key;
      }
      for (int r = 0; r < R; r++) parts[r][j] = sum[r];
    }
    for (int r = 0; r < R; r++) {
      sum_parts<W / 2>(parts[r]);
      store(x + r * x_row + key, parts[r][0]);
    }
  }
}

inline int64_t few_row_stride(const Call& c) { return ceil_div(c.kv_len, W) * W; }

// Scores of rows m..m + count of a group, at most FEW, against such keys; returns the scaled queries of the rows.
template <typename T, typename K, typename Key>
const float* score_rows(const Call& c, int64_t bg, int64_t m, int64_t count, const K* k, int64_t k_row, Key key_at,
                        int64_t from, int64_t to, float* x, int64_t x_row, Scratch& w) {
  int64_t dim = c.head_dim;
  float* query = w.query.get(dim * FEW);
  for (int64_t r = 0; r < count; r++) {
    const T* q = q_of<T>(c, row_at(c, bg, m + r));
    for (int64_t d = 0; d < dim; d++) query[r * dim + d] = widen(q[d]) * float(c.scale);
  }
  if (count == 4) dot_rows<4>(query, k, k_row, dim, key_at, from, to, x, x_row);
  if (count == 3) dot_rows<3>(query, k, k_row, dim, key_at, from, to, x, x_row);
  if (count == 2) dot_rows<2>(query, k, k_row, dim, key_at, from, to, x, x_row);
  if (count == 1) dot_rows<1>(query, k, k_row, dim, key_at, from, to, x, x_row);
  return query;
}

constexpr auto every_key = [](int64_t key) { return key; };

template <typename T>
void score_chunk(const Call& c, int64_t bg, int64_t from, int64_t to, Scratch& w) {
  int64_t num_rows = c.q_len * (c.num_heads / c.num_kv_heads), x_row = few_row_stride(c);
  const T* k = k_of<T>(c, bg / c.num_kv_heads, bg % c.num_kv_heads);
  for (int64_t m = 0; m < num_rows; m += FEW)
    score_rows<T>(c, bg, m, std::min<int64_t>(FEW, num_rows - m), k, c.k_row, every_key, from, to,
                  c.scores + (bg * num_rows + m) * x_row, x_row, w);
}

// The same by the copy of K: q * mean + step * (q * code).
template <typename T, typename Code>
void estimate_chunk(const Call& c, int64_t bg, int64_t from, int64_t to, Scratch& w) {
  int64_t num_rows = c.num_heads / c.num_kv_heads, dim = c.head_dim, x_row = few_row_stride(c);
  int64_t b = bg / c.num_kv_heads, g = bg % c.num_kv_heads;
  to = std::min(to, row_at(c, bg, 0).end);  // the copy has no keys behind it
  if (from >= to) return;
  const Code* codes = static_cast<const Code*>(c.codes) + b * c.codes_batch + g * c.codes_head;
  const bf16* steps = static_cast<const bf16*>(c.steps) + b * c.steps_batch + g * c.steps_head;
  for (int64_t m = 0; m < num_rows; m += FEW) {
    int64_t count = std::min<int64_t>(FEW, num_rows - m);
    float* x = c.scores + (bg * num_rows + m) * x_row;
    const float* query = score_rows<T>(c, bg, m, count, codes, dim * c.code_bits / 8, every_key, from, to, x, x_row, w);
    for (int64_t r = 0; r < count; r++, x += x_row) {
      vf of_mean = {};
      for (int64_t d = 0; d < dim; d += W) of_mean += load(query + r * dim + d) * load(c.key_mean + bg * dim + d);
      float shift = sum_lanes(of_mean);
      for (int64_t j = from; j < to; j++) x[j] = x[j] * widen(steps[j]) + shift;
    }
  }
}

// The scores themselves of the keys that are marked, in place of those by the copy.
template <typename T>
void read_chunk(const Call& c, int64_t bg, int64_t from, int64_t to, Scratch& w) {
  int64_t num_rows = c.num_heads / c.num_kv_heads, x_row = few_row_stride(c), num_read = 0;
  int32_t* keys = w.indices.get(CHUNK);
  for (int64_t j = from; j < to; j++)
    if (c.read[bg * c.kv_len + j]) keys[num_read++] = int32_t(j);
  if (num_read == 0) return;
  const T* k = k_of<T>(c, bg / c.num_kv_heads, bg % c.num_kv_heads);
  float* tile = w.tile.get(FEW * CHUNK);
  for (int64_t m = 0; m < num_rows; m += FEW) {
    int64_t count = std::min<int64_t>(FEW, num_rows - m);
    score_rows<T>(c, bg, m, count, k, c.k_row, [=](int64_t j) { return keys[j]; }, 0, num_read, tile, CHUNK, w);
    for (int64_t r = 0; r < count; r++)
      for (int64_t j = 0; j < num_read; j++) c.scores[(bg * num_rows + m + r) * x_row + keys[j]] = tile[r * CHUNK + j];
  }
}

// Each thread starts the next item when it finishes one, because causal items differ in size and other processes may
// use the cores too.
template <typename Work>
void share(std::atomic<int64_t>& next, int64_t items, const Work& work) {
  for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
}

template <typename T>
void run(const Call& c) {
  int64_t groups = c.batch * c.num_kv_heads, num_rows = c.q_len * (c.num_heads / c.num_kv_heads);
  int64_t chunks = ceil_div(c.kv_len, CHUNK), tiles = ceil_div(num_rows, ROWS), item_tiles = ITEM_TILES;
  if (c.row_vrows != nullptr)  // the heads of a row belong to one item
    while (item_tiles * ROWS % (c.num_heads / c.num_kv_heads)) item_tiles++;
  int64_t blocks = ceil_div(tiles, item_tiles);
  // Waking the other threads costs some microseconds, which small calls do not earn back.
  bool tiny = groups * num_rows * c.kv_len * c.head_dim < (1 << 18);
  std::atomic<int64_t> prepared{0}, marked{0}, read{0}, summed{0}, finished{0};
#pragma omp parallel num_threads(int(c.threads)) if (!tiny)
  {
    Scratch& w = scratch;
    share(prepared, groups * chunks, [&](int64_t item) {
      int64_t bg = item / chunks, from = item % chunks * CHUNK, to = std::min(from + CHUNK, c.kv_len);
      if (c.packed != nullptr) pack_k<T>(c, bg, from, to);
      else if (c.codes == nullptr) score_chunk<T>(c, bg, from, to, w);
      else if (c.code_bits == 8) estimate_chunk<T, int8_t>(c, bg, from, to, w);
      else estimate_chunk<T, int4>(c, bg, from, to, w);
      if (c.sums != nullptr) sum_v<T>(c, bg, from, to);
    });
#pragma omp barrier
    if (c.codes != nullptr) {
      share(marked, groups * num_rows, [&](int64_t item) {
        mark_keys(c, row_at(c, item / num_rows, item % num_rows), c.scores + item * few_row_stride(c), w);
      });
#pragma omp barrier
      share(read, groups * chunks, [&](int64_t item) {
        int64_t from = item % chunks * CHUNK;
        read_chunk<T>(c, item / chunks, from, std::min(from + CHUNK, c.kv_len), w);
      });
#pragma omp barrier
    }
    if (c.sums != nullptr) {
      share(summed, groups, [&](int64_t bg) { accumulate_sums(c, bg); });
#pragma omp barrier
    }
    if (c.packed != nullptr) {
      share(finished, groups * blocks, [&](int64_t item) {
        int64_t bg = item / blocks, block = blocks - 1 - item % blocks;  // the longest rows first
        for (int64_t t = block * item_tiles; t < std::min(tiles, (block + 1) * item_tiles); t++)
          run_tile<T>(c, bg, t * ROWS, std::min<int64_t>(ROWS, num_rows - t * ROWS), w, own_counts(c, bg, w));
      });
      flush_counts(c, w);
    } else {
      share(finished, groups * num_rows, [&](int64_t item) {
        int64_t bg = item / num_rows;
        finish_row<T>(c, row_at(c, bg, item % num_rows), c.scores + item * few_row_stride(c), w, nullptr, false);
      });
    }
  }
}

}  // namespace

extern "C" {

int64_t toptheta_vector_width() { return W; }

// How many floats `packed`, `sums` and `scores` of a call must hold (0: pass null). The scores are computed as for many
// rows if packed is given, else as for few. A call with a copy of K has one row for each head.
void toptheta_workspace(const Call* call, int64_t* sizes) {
  const Call& c = *call;
  int64_t groups = c.batch * c.num_kv_heads, num_rows = c.q_len * (c.num_heads / c.num_kv_heads);
  bool many = (num_rows > 2 * ROWS || c.row_vrows != nullptr) && c.codes == nullptr;
  sizes[0] = many ? groups * panels(c) * PANEL * c.head_dim : 0;
  sizes[1] = c.vmc && c.v_sum == nullptr ? groups * sum_blocks(c) * c.head_dim : 0;
  sizes[2] = many ? 0 : groups * num_rows * few_row_stride(c);
}

void toptheta_run(const Call* call) {
  if (call->type == BFLOAT16) run<bf16>(*call);
  else if (call->type == FLOAT16) run<fp16>(*call);
  else run<float>(*call);
}

}  // extern "C"
