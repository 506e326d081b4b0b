// Element-wise passes over rows, each in one sweep: RMS norm, silu * up, rotary, causal softmax, cross-entropy, 4-bit weights.
//
// Plain pointers and sizes, no torch headers. Every row (or element) is computed alone and in one order, so that a
// result depends neither on its batch-mates nor on the number of threads. Arithmetic is float32; what is stored is
// rounded to nearest even where torch's own formulation rounds. Compiled once per instruction set; see hatch_build.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define MASKED 1
#else
#define MASKED 0
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

Vec all(float x) { return Vec{} + x; }

Vec larger(Vec a, Vec b) { return a > b ? a : b; }

float sum_of(Vec v) {
    float lane[W];
    std::memcpy(lane, &v, sizeof v);
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

// Rounds to bfloat16, to nearest even; a NaN stays a NaN. The value stays in float32. (The processor's own conversion takes
// denormals for zero.)
#ifdef __AVX512BF16__
Halves narrow(Vec x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }

Vec round_to(bf16, Vec x) { return (Vec)(__builtin_convertvector(narrow(x), Bits) << 16); }
#else
Vec round_to(bf16, Vec x) {
    Bits u = (Bits)x;
    Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    return x == x ? (Vec)rounded : (Vec)((u | 0x00400000u) & 0xffff0000u);
}

Halves narrow(Vec x) { return __builtin_convertvector((Bits)round_to(bf16{}, x) >> 16, Halves); }
#endif

Vec round_to(float, Vec x) { return x; }

template <class T>
float round_one(float x) {
    return round_to(T{}, all(x))[0];
}

float widen(float x) { return x; }

float widen(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

Vec load_whole(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

Vec load_whole(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

void store_whole(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

void store_whole(bf16* p, Vec v) {
    Halves h = narrow(v);
    std::memcpy(p, &h, sizeof h);
}

#if MASKED
Vec load_part(const float* p, long count) { return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p); }

Vec load_part(const bf16* p, long count) {
    return (Vec)((Bits)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p)) << 16);
}

void store_part(float* p, long count, Vec v) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v); }

void store_part(bf16* p, long count, Vec v) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)narrow(v));
}
#else
template <class T>
Vec load_part(const T* p, long count) {
    T part[W] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load_whole(part);
}

template <class T>
void store_part(T* p, long count, Vec v) {
    T part[W];
    store_whole(part, v);
    std::memcpy(p, part, count * sizeof(T));
}
#endif

// The first `count` of W values from `p`; zeros after them.
template <class T>
Vec load(const T* p, long count) {
    return count >= W ? load_whole(p) : load_part(p, count);
}

template <class T>
void store(T* p, long count, Vec v) {
    count >= W ? store_whole(p, v) : store_part(p, count, v);
}

// `v` in the first `count` lanes, `fill` in the others.
Vec keep(Vec v, long count, float fill) {
    if (count >= W) return v;
    Bits lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane < (Bits{} + uint32_t(count)) ? v : all(fill);
}

// Calls f(start, count) for each W of n.
template <class F>
void sweep(long n, F f) {
    long i = 0;
    for (; i + W <= n; i += W) f(i, W);
    if (i < n) f(i, n - i);
}

// The sum of f(start, count) over n, in four running sums. f gives zero in lanes past its count.
template <class F>
float total(long n, F f) {
    Vec sums[4] = {};
    long i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int k = 0; k < 4; k++) sums[k] += f(i + k * W, W);
    for (; i + W <= n; i += W) sums[0] += f(i, W);
    if (i < n) sums[1] += f(i, n - i);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The largest of n values; a NaN may be passed over, which the exponentials after it will not do.
template <class T>
float largest(const T* p, long n) {
    Vec most[2] = {all(-INFINITY), all(-INFINITY)};
    long i = 0;
    for (; i + 2 * W <= n; i += 2 * W)
        for (int k = 0; k < 2; k++) most[k] = larger(load_whole(p + i + k * W), most[k]);
    for (; i < n; i += W) most[0] = larger(keep(load(p + i, n - i), n - i, -INFINITY), most[0]);
    most[0] = larger(most[0], most[1]);
    float lane[W];
    std::memcpy(lane, most, sizeof lane);
    for (int width = W / 2; width; width /= 2)
        for (int k = 0; k < width; k++) lane[k] = std::max(lane[k], lane[k + width]);
    return lane[0];
}

// e^(x - whole ln 2), for |x - whole ln 2| <= ln 2 / 2 (the polynomial of Cephes).
Vec exponential_fraction(Vec x, Vec whole) {
    Vec r = x - whole * 0.693145752f;
    r = r - whole * 1.42860677e-6f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
}

// e^x within 2 units of the last place (without AVX-512, zero below -87.3, where float32 turns denormal). A NaN stays a NaN.
#if MASKED
Vec exponential(Vec x) {
    __m512 clipped = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));  // the second if NaN
    Vec c = (Vec)clipped;
    Vec whole = (c * 1.44269504f + 12582912.0f) - 12582912.0f;
    return (Vec)_mm512_scalef_ps((__m512)exponential_fraction(c, whole), (__m512)whole);
}
#else
Vec exponential(Vec x) {
    Vec clipped = x < -87.3f ? all(-87.3f) : x;
    clipped = clipped > 89.0f ? all(89.0f) : clipped;
    Vec shifted = clipped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    Vec whole = shifted - 12582912.0f;
    Vec y = (Vec)((Bits)exponential_fraction(clipped, whole) + ((Bits)shifted << 23));
    y = x < -87.3f ? Vec{} : y;
    y = x > 88.7228f ? all(INFINITY) : y;
    return x == x ? y : x;
}
#endif

// torch's own OpenMP runtime, handed in by pointer: a second one would fight it for the cores.
void (*run_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*thread_number)() = nullptr;
int (*thread_count)() = nullptr;

template <class F>
struct Job {
    F& f;
    long n;
};

// Calls f(from, to) over parts of n, one for each thread; `cost` is how many values one of the n touches.
template <class F>
void split(long n, long cost, int threads, F f) {
    long most = std::min<long>({threads, n, n * cost / 16384});
    if (most < 2 || !run_parallel) return f(0, n);
    Job<F> job{f, n};
    run_parallel(
        [](void* data) {
            auto& job = *static_cast<Job<F>*>(data);
            long number = thread_number(), count = thread_count();
            job.f(job.n * number / count, job.n * (number + 1) / count);
        },
        &job, unsigned(most), 0);
}

// ---------------------------------------------------------------------------------------------- RMS norm

template <class T>
Vec effective_weight(const T* weight, long i, long m, float offset, bool round_first) {
    Vec w = load(weight + i, m);
    if (offset == 0.0f) return w;
    return round_first ? round_to(T{}, w + offset) : w + offset;
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* scales, long rows, long dim, float eps, float offset, bool round_first,
              int threads) {
    split(rows, dim, threads, [=](long from, long to) {
        for (long row = from; row < to; row++) {
            const T* in = x + row * dim;
            T* out = y + row * dim;
            float squares = total(dim, [=](long i, long m) {
                Vec v = load(in + i, m);
                return v * v;
            });
            float scale = 1.0f / std::sqrt(squares / float(dim) + eps);
            scales[row] = scale;
            sweep(dim, [=](long i, long m) {
                Vec normal = load(in + i, m) * scale;
                if (round_first) normal = round_to(T{}, normal);
                store(out + i, m, normal * effective_weight(weight, i, m, offset, round_first));
            });
        }
    });
}

constexpr long ROWS_AT_ONCE = 32;  // whose gradient of the weight is summed together: fixed, so that threads change no sum

template <class T>
void rms_norm_rows_backward(const T* x, const T* weight, const float* scales, const T* grad, T* grad_x, float* grad_weight, long from,
                            long to, long dim, float offset, bool round_first) {
    for (long row = from; row < to; row++) {
        const T *in = x + row * dim, *g = grad + row * dim;
        T* out = grad_x + row * dim;
        float scale = scales[row];
        float dot = total(dim, [=](long i, long m) {
            return load(in + i, m) * (load(g + i, m) * effective_weight(weight, i, m, offset, round_first));
        });
        float pull = dot * scale * scale * scale / float(dim);
        sweep(dim, [=](long i, long m) {
            Vec v = load(in + i, m), dy = load(g + i, m);
            if (grad_weight) {
                Vec normal = v * scale;
                if (round_first) normal = round_to(T{}, normal);
                store(grad_weight + i, m, load(grad_weight + i, m) + dy * normal);
            }
            store(out + i, m, dy * effective_weight(weight, i, m, offset, round_first) * scale - v * pull);
        });
    }
}

template <class T>
int rms_norm_backward(const T* x, const T* weight, const float* scales, const T* grad, T* grad_x, T* grad_weight, long rows, long dim,
                      float offset, bool round_first, int threads) {
    long blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    float* partial = nullptr;
    if (grad_weight && !(partial = static_cast<float*>(std::calloc(std::max(blocks * dim, 1L), sizeof(float))))) return 1;
    split(blocks, ROWS_AT_ONCE * dim, threads, [=](long from, long to) {
        for (long block = from; block < to; block++)
            rms_norm_rows_backward(x, weight, scales, grad, grad_x, partial ? partial + block * dim : nullptr, block * ROWS_AT_ONCE,
                                   std::min(rows, (block + 1) * ROWS_AT_ONCE), dim, offset, round_first);
    });
    if (grad_weight)
        sweep(dim, [=](long i, long m) {
            Vec sum = {};
            for (long block = 0; block < blocks; block++) sum += load(partial + block * dim + i, m);
            store(grad_weight + i, m, sum);
        });
    std::free(partial);
    return 0;
}

// ---------------------------------------------------------------------------------------------- silu(gate) * up

template <class T>
void silu_times(const T* gate, const T* up, T* out, long n, int threads) {
    split((n + W - 1) / W, W, threads, [=](long from, long to) {
        long base = from * W;
        sweep(std::min(n, to * W) - base, [=](long i, long m) {
            Vec g = load(gate + base + i, m);
            Vec silu = round_to(T{}, g / (exponential(-g) + 1.0f));
            store(out + base + i, m, silu * load(up + base + i, m));
        });
    });
}

template <class T>
void silu_times_backward(const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up, long n, int threads) {
    split((n + W - 1) / W, W, threads, [=](long from, long to) {
        long base = from * W;
        sweep(std::min(n, to * W) - base, [=](long i, long m) {
            Vec g = load(gate + base + i, m), dy = load(grad + base + i, m);
            Vec sigmoid = 1.0f / (exponential(-g) + 1.0f);
            store(grad_up + base + i, m, g * sigmoid * dy);
            store(grad_gate + base + i, m, dy * load(up + base + i, m) * (sigmoid * (1.0f + g * (1.0f - sigmoid))));
        });
    });
}

// ---------------------------------------------------------------------------------------------- rotary

struct Strides {
    long batch, head, time;  // in elements; channels lie side by side
};

template <class T>
void rotate(const T* x, const T* cosine, const T* sine, T* y, long batch, long heads, long time, long dim, Strides in, Strides out,
            long table_stride, float sign, int threads) {
    long half = dim / 2;
    split(batch * time, heads * dim, threads, [=](long from, long to) {
        for (long place = from; place < to; place++) {
            long b = place / time, t = place % time;
            const T *c = cosine + b * table_stride + t * half, *s = sine + b * table_stride + t * half;
            for (long h = 0; h < heads; h++) {
                const T* p = x + b * in.batch + h * in.head + t * in.time;
                T* q = y + b * out.batch + h * out.head + t * out.time;
                sweep(half, [=](long i, long m) {
                    Vec first = load(p + i, m), second = load(p + half + i, m), turn = load(c + i, m), side = load(s + i, m) * sign;
                    store(q + i, m, round_to(T{}, first * turn) - round_to(T{}, second * side));
                    store(q + half + i, m, round_to(T{}, second * turn) + round_to(T{}, first * side));
                });
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------- causal softmax

// In place over [rows, time]: row r sees its first r % time + 1 places; the others become zero. scale > 0.
template <class T>
int causal_softmax(T* scores, long rows, long time, float scale, int threads) {
    int failed = 0;
    split(rows, time, threads, [=, &failed](long from, long to) {
        float* powers = static_cast<float*>(std::malloc(time * sizeof(float)));
        if (!powers) {
            failed = 1;
            return;
        }
        for (long row = from; row < to; row++) {
            T* p = scores + row * time;
            long n = row % time + 1;
            float most = largest(p, n);
            float sum = total(n, [=](long i, long m) {
                // The difference first: were the product contracted into it, huge scores would exceed their own maximum.
                Vec e = keep(exponential((load(p + i, m) - most) * scale), m, 0.0f);
                store(powers + i, m, e);
                return e;
            });
            float share = 1.0f / sum;
            sweep(n, [=](long i, long m) { store(p + i, m, load(powers + i, m) * share); });
            std::memset(p + n, 0, (time - n) * sizeof(T));
        }
        std::free(powers);
    });
    return failed;
}

// In place over `grad`: from the gradient of the weights to that of the unscaled scores.
template <class T>
void causal_softmax_backward(const T* weights, T* grad, long rows, long time, float scale, int threads) {
    split(rows, time, threads, [=](long from, long to) {
        for (long row = from; row < to; row++) {
            const T* w = weights + row * time;
            T* g = grad + row * time;
            long n = row % time + 1;
            float dot = total(n, [=](long i, long m) { return load(w + i, m) * load(g + i, m); });
            sweep(n, [=](long i, long m) { store(g + i, m, load(w + i, m) * (load(g + i, m) - dot) * scale); });
            std::memset(g + n, 0, (time - n) * sizeof(T));
        }
    });
}

// ---------------------------------------------------------------------------------------------- cross-entropy

// losses[r] = -(1 - smoothing) log p(label) - smoothing / vocab * sum log p; `grad`, if given, its gradient (may be `logits`).
template <class T>
void cross_entropy(const T* logits, const int64_t* labels, T* grad, float* losses, long rows, long vocab, float smoothing, int threads) {
    split(rows, vocab, threads, [=](long from, long to) {
        for (long row = from; row < to; row++) {
            const T* p = logits + row * vocab;
            float most = largest(p, vocab);
            float sum = total(vocab, [=](long i, long m) {
                return keep(exponential(load(p + i, m) - most), m, 0.0f);
            });
            float norm = std::log(sum), target = widen(p[labels[row]]) - most;
            float loss = (1.0f - smoothing) * (norm - target);
            if (smoothing != 0.0f) {
                float shifted = total(vocab, [=](long i, long m) {
                    return keep(load(p + i, m) - most, m, 0.0f);
                });
                loss += smoothing * (norm - shifted / float(vocab));
            }
            losses[row] = loss;
            if (!grad) continue;
            T* g = grad + row * vocab;
            float share = 1.0f / sum, spread = smoothing / float(vocab);
            float chance = exponential(all(target))[0] * share;
            sweep(vocab, [=](long i, long m) { store(g + i, m, exponential(load(p + i, m) - most) * share - spread); });
            T label[W];
            store_whole(label, all(chance - (1.0f - smoothing) - spread));
            g[labels[row]] = label[0];
        }
    });
}

// ---------------------------------------------------------------------------------------------- 4-bit weights

// The values of `table` that the first `count` of W codes name; two codes to a byte, the first in its high half.
Vec look_up(const uint8_t* codes, const float* table, long count) {
#if MASKED
    uint64_t bytes = 0;
    std::memcpy(&bytes, codes, count >= W ? W / 2 : (count + 1) / 2);
    __m512i wide = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(int64_t(bytes)));
    __m512i places = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));  // only their low four bits are read
    return (Vec)_mm512_permutexvar_ps(places, _mm512_loadu_ps(table));
#else
    Vec v = {};
    for (long i = 0; i < std::min<long>(count, W); i++) v[i] = table[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
    return v;
#endif
}

// out[i] = table[code i] * scales[i / block]; `block` is a multiple of W.
template <class T>
void nf4(T* out, const uint8_t* codes, const float* table, const float* scales, long n, long block, int threads) {
    split((n + block - 1) / block, block, threads, [=](long from, long to) {
        for (long b = from; b < to; b++) {
            T* place = out + b * block;
            const uint8_t* own = codes + b * block / 2;
            float scale = scales[b];
            sweep(std::min(block, n - b * block), [=](long i, long m) { store(place + i, m, look_up(own + i / 2, table, m) * scale); });
        }
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------- what Python calls
// `half`: bfloat16 rather than float32. A result other than zero: no memory.

#define BY_TYPE(half, call)      \
    do {                         \
        if (half) {              \
            using T = bf16;      \
            call;                \
        } else {                 \
            using T = float;     \
            call;                \
        }                        \
    } while (0)
#define IN(p) static_cast<const T*>(p)
#define OUT(p) static_cast<T*>(p)

extern "C" {

void trivium_threads(void* parallel, void* number, void* count) {
    run_parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
    thread_number = reinterpret_cast<int (*)()>(number);
    thread_count = reinterpret_cast<int (*)()>(count);
}

void trivium_rms_norm(int half, const void* x, const void* weight, void* y, float* scales, long rows, long dim, float eps, float offset,
                      int round_first, int threads) {
    BY_TYPE(half, rms_norm<T>(IN(x), IN(weight), OUT(y), scales, rows, dim, eps, offset, round_first, threads));
}

int trivium_rms_norm_backward(int half, const void* x, const void* weight, const float* scales, const void* grad, void* grad_x,
                              void* grad_weight, long rows, long dim, float offset, int round_first, int threads) {
    BY_TYPE(half, return rms_norm_backward<T>(IN(x), IN(weight), scales, IN(grad), OUT(grad_x), OUT(grad_weight), rows, dim, offset,
                                              round_first, threads));
}

void trivium_silu_times(int half, const void* gate, const void* up, void* out, long n, int threads) {
    BY_TYPE(half, silu_times<T>(IN(gate), IN(up), OUT(out), n, threads));
}

void trivium_silu_times_backward(int half, const void* gate, const void* up, const void* grad, void* grad_gate, void* grad_up, long n,
                                 int threads) {
    BY_TYPE(half, silu_times_backward<T>(IN(gate), IN(up), IN(grad), OUT(grad_gate), OUT(grad_up), n, threads));
}

void trivium_rotate(int half, const void* x, const void* cosine, const void* sine, void* y, long batch, long heads, long time, long dim,
                    long in_batch, long in_head, long in_time, long out_batch, long out_head, long out_time, long table_stride, float sign,
                    int threads) {
    BY_TYPE(half, rotate<T>(IN(x), IN(cosine), IN(sine), OUT(y), batch, heads, time, dim, {in_batch, in_head, in_time},
                            {out_batch, out_head, out_time}, table_stride, sign, threads));
}

int trivium_causal_softmax(int half, void* scores, long rows, long time, float scale, int threads) {
    BY_TYPE(half, return causal_softmax<T>(OUT(scores), rows, time, scale, threads));
}

void trivium_causal_softmax_backward(int half, const void* weights, void* grad, long rows, long time, float scale, int threads) {
    BY_TYPE(half, causal_softmax_backward<T>(IN(weights), OUT(grad), rows, time, scale, threads));
}

void trivium_cross_entropy(int half, const void* logits, const int64_t* labels, void* grad, float* losses, long rows, long vocab,
                           float smoothing, int threads) {
    BY_TYPE(half, cross_entropy<T>(IN(logits), labels, OUT(grad), losses, rows, vocab, smoothing, threads));
}

void trivium_nf4(int half, void* out, const uint8_t* codes, const float* table, const float* scales, long n, long block, int threads) {
    BY_TYPE(half, nf4<T>(OUT(out), codes, table, scales, n, block, threads));
}
}
