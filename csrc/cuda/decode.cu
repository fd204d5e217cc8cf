// One token of each sequence through the whole stack in one cooperative kernel, a block on each
// multiprocessor.
//
// Decoding reads every weight once and does next to nothing with it, so memory must never wait. At 3b in
// bf16, of 2560 wide layers, a layer is 139 MB: at 4.3 TB/s 32 us, or 6.5 for each of its 5 barriers (2 more
// in a layer with a fast MLP: 176 in all, and the 5.8 GB of a step last 1.35 ms). From the last sum of one
// product to the first of the next it takes a barrier, which is two ways to the second cache and back, a
// third to read what other blocks have written, and norms. A kernel for each stage would leave memory idle
// for that long; so would a kernel that reads weights when it can use them. Here rings in shared memory
// (decode_weights.h) of up to 192 KB on each of 132 multiprocessors hold the next 26 MB, which take memory
// 6 us. Attention is the longest way between two products, but needs no ring: keys and values are known
// beforehand but for the newest, and a full window of 8192 is 84 MB more a layer, which all blocks share.
//
// A sixth barrier a layer is spared by having all blocks join the pieces of attention; norms, residual sums
// and rotations are computed wherever they are needed rather than once. What all blocks read for it is small:
// at 3b 5 KB of a product that is d wide, 11 KB of the gates and 41 KB of pieces, where a block's share of a
// layer's weights is 1 MB.
//
// Nothing that is summed is divided by the number of blocks: results are the same on every GPU.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common/decode_math.h"
#include "cuda/decode_attention.h"
#include "cuda/decode_octet.h"
#include "cuda/decode_weights.h"
#include "cuda/grid.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace ttt::cuda {
namespace {

constexpr int64_t kLine = 128;
constexpr int64_t kMostSequences = 8;
constexpr int64_t kWidest = kThreads * kOctet, kWidestHead = kWarp * kOctet;
constexpr int kSlots[] = {16, 12, 8, 6, 4, 2};

// Rows that a warp multiplies at once: more sequences leave room for fewer, but want their operands read less
// often.
template <int N>
constexpr int kRows = N <= 2 ? 2 : 4;

template <class T>
struct Step {
    const Layer* layers;
    const int64_t* visible;
    const T* x;
    const float* cos;
    const float* sin;
    const float* final_norm;
    const T* head;
    T* prefix_output;
    T* hidden;
    float* logits;
    int n_layers, n_prefix, batch, d, heads, intermediate, vocab;
    float eps;
    int slots;
    // In scratch: the barrier's counter, results of products, and what pieces of attention leave: (batch,
    // heads, pieces) of softmax and of values (D).
    unsigned* counter;
    T* qkv;
    T* out;
    T* gated;
    Softmax* softmax;
    float* values;
};

// Where a block's shared memory has what.
struct Layout {
    int visible, sums, x, operand, ring, bytes;

    __host__ __device__ Layout(int n_layers, int sequences, int d, int heads, int intermediate, int element,
                               int ring_bytes) {
        const int row = (d > intermediate ? d : intermediate) * element * sequences;
        const int attention = attention_floats(d / heads) * static_cast<int>(sizeof(float));
        visible = n_layers * static_cast<int>(sizeof(Layer));
        sums = visible + n_layers * 2 * static_cast<int>(sizeof(int64_t));
        x = sums + 2 * sequences * kWarps * static_cast<int>(sizeof(float));
        operand = x + sequences * d * element;
        ring = operand + divide_up(row > attention ? row : attention, 16) * 16;
        bytes = ring + ring_bytes;
    }
};

template <class T, int N>
class Block {
  public:
    __device__ Block(const Step<T>& step, unsigned char* shared, const Layout& layout)
        : s(step),
          shape_{reinterpret_cast<const Layer*>(shared),
                 step.head,
                 step.n_layers,
                 step.batch,
                 step.d,
                 step.intermediate,
                 step.vocab},
          visible_(reinterpret_cast<const int64_t*>(shared + layout.visible)),
          sums_(reinterpret_cast<float*>(shared + layout.sums)),
          x_(reinterpret_cast<T*>(shared + layout.x)),
          operand_(reinterpret_cast<T*>(shared + layout.operand)),
          ring_(shared + layout.ring),
          mine_(static_cast<int>(threadIdx.x) * kOctet) {}

    __device__ void run() {
        Weights<T, kRows<N>> weights(shape_, ring_, s.slots);
        int layer = 0, kind = kQkv;
#pragma unroll 1
        do {
            const Product product = shape_.product(layer, kind);
            const bool normalizes = kind == kQkv || kind == kFastGates || kind == kGates;
            // Of constants, memory may as well be read before the barrier.
            float post[kOctet], norm[kOctet];
            if (normalizes && mine_ < s.d) read_norms(layer, kind, post, norm);
            const bool is_first = layer == 0 && kind == kQkv;
            if (!is_first) grid_barrier(s.counter);
            if (kind == kOut) {
                attention(layer);
                grid_barrier(s.counter);
                join_attention(layer);
            } else if (normalizes) {
                if (is_first)
                    begin();
                else
                    add_normalized(post);
                if (kind == kQkv && layer == s.n_prefix) keep(x_, s.prefix_output);
                normalize(norm);
                if (layer == s.n_layers) keep(operand_, s.hidden);
            } else {
                read_gated();
            }
            __syncthreads();
            const auto emit = [&](int b, int row, float sum, float other) {
                write(layer, kind, product, b, row, sum, other);
            };
            // A matrix of its own has every sequence, or the only one.
            if (N == 1 || kind == kFastGates || kind == kFastDown)
                weights.template multiply<1>(product, operand_, 1, emit);
            else
                weights.template multiply<N>(product, operand_, s.batch, emit);
        } while (shape_.next(layer, kind));
    }

  private:
    // A sum of a product with its row, rounded as the tensor would be that a separate operator returns.
    __device__ void write(int layer, int kind, const Product& product, int b, int row, float sum,
                          float other) {
        const int64_t i = static_cast<int64_t>(b) * product.rows + row;
        if (layer == s.n_layers)
            s.logits[i] = sum;
        else if (product.second)
            s.gated[i] = from_compute<T>(silu_times(rounded<T>(sum), rounded<T>(other)));
        else
            (kind == kQkv ? s.qkv : s.out)[i] = from_compute<T>(sum);
    }

    // Weights of the norms in front of a product: that of what is added to x, if anything is, and that of x.
    __device__ void read_norms(int layer, int kind, float (&post)[kOctet], float (&norm)[kOctet]) const {
        const Layer& own = shape_.layers[layer < s.n_layers ? layer : 0];
        const Layer& before = shape_.layers[layer > 0 ? layer - 1 : 0];
        int64_t added = before.mlp_post_norm, next = own.seq_norm;
        if (layer == s.n_layers) next = static_cast<int64_t>(reinterpret_cast<uintptr_t>(s.final_norm));
        if (kind == kFastGates) added = own.seq_post_norm, next = own.fast_norm;
        if (kind == kGates)
            added = own.fast_gate ? own.fast_post_norm : own.seq_post_norm, next = own.mlp_norm;
        widen(load_octet<kShared>(at<const float>(added) + mine_), post);
        widen(load_octet<kShared>(at<const float>(next) + mine_), norm);
    }

    // The elements of a row that begin with mine_ are this thread's, in all that follows.

    __device__ void begin() {
#pragma unroll
        for (int b = 0; b < N; ++b) {
            squares_[b] = 0;
            if (b >= s.batch || mine_ >= s.d) continue;
            const Octet<T> own = load_octet<kStreamed>(s.x + b * s.d + mine_);
            store_octet(x_ + b * s.d + mine_, own);
            add_squares(own, b);
        }
    }

    // x += rms_norm(out). In the meantime out is where the operand will be.
    __device__ void add_normalized(const float (&weight)[kOctet]) {
#pragma unroll
        for (int b = 0; b < N; ++b) {
            squares_[b] = 0;
            if (b >= s.batch || mine_ >= s.d) continue;
            const Octet<T> change = load_octet<kWritten>(s.out + b * s.d + mine_);
            store_octet(operand_ + b * s.d + mine_, change);
            add_squares(change, b);
        }
        sum_squares();
#pragma unroll
        for (int b = 0; b < N; ++b) {
            const float r = inverse_rms(squares_[b], s.d, s.eps);
            squares_[b] = 0;
            if (b >= s.batch || mine_ >= s.d) continue;
            float sum[kOctet], added[kOctet];
            widen(load_octet<kShared>(x_ + b * s.d + mine_), sum);
            widen(load_octet<kShared>(operand_ + b * s.d + mine_), added);
#pragma unroll
            for (int e = 0; e < kOctet; ++e) sum[e] += normalized<T>(added[e], r, weight[e]);
            const Octet<T> own = narrow<T>(sum);
            store_octet(x_ + b * s.d + mine_, own);
            add_squares(own, b);
        }
    }

    // operand = rms_norm(x)
    __device__ void normalize(const float (&weight)[kOctet]) {
        sum_squares();
#pragma unroll
        for (int b = 0; b < N; ++b) {
            if (b >= s.batch || mine_ >= s.d) continue;
            const float r = inverse_rms(squares_[b], s.d, s.eps);
            float v[kOctet];
            widen(load_octet<kShared>(x_ + b * s.d + mine_), v);
#pragma unroll
            for (int e = 0; e < kOctet; ++e) v[e] = normalized<T>(v[e], r, weight[e]);
            store_octet(operand_ + b * s.d + mine_, narrow<T>(v));
        }
    }

    __device__ void keep(const T* rows, T* to) const {
        if (blockIdx.x != 0 || mine_ >= s.d) return;
        for (int b = 0; b < s.batch; ++b)
            store_octet(to + b * s.d + mine_, load_octet<kShared>(rows + b * s.d + mine_));
    }

    // operand = silu(gate) * up
    __device__ void read_gated() {
        for (int i = mine_; i < s.batch * s.intermediate; i += kThreads * kOctet)
            store_octet(operand_ + i, load_octet<kWritten>(s.gated + i));
    }

    __device__ void add_squares(const Octet<T>& v, int b) {
        float wide[kOctet];
        widen(v, wide);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) squares_[b] = multiply_add(wide[e], wide[e], squares_[b]);
    }

    // Over the block. Two places for what warps leave, by turns: who writes the one again has passed the
    // barrier behind which all have read it.
    __device__ void sum_squares() {
        const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
        float* const of_warps = sums_ + (sums_made_++ % 2) * N * kWarps;
#pragma unroll
        for (int b = 0; b < N; ++b) {
            squares_[b] = warp_reduce(squares_[b], Sum{});
            if (lane == 0) of_warps[b * kWarps + warp] = squares_[b];
        }
        __syncthreads();
#pragma unroll
        for (int b = 0; b < N; ++b)
            squares_[b] = warp_reduce(lane < kWarps ? of_warps[b * kWarps + lane] : 0.0f, Sum{});
    }

    // Every piece of every head's keys, by some block. The newest key and value are written by who has them.
    __device__ void attention(int layer) {
        const Layer& l = shape_.layers[layer];
        const int head_dim = s.d / s.heads, warp = static_cast<int>(threadIdx.x) / kWarp;
        const int64_t row = visible_[2 * layer];
        const int count = static_cast<int>(visible_[2 * layer + 1]);
        const int step = keys_per_piece(count, s.heads), pieces = divide_up(count, step);
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        float* const shared = reinterpret_cast<float*>(operand_);
#pragma unroll 1
        for (int task = static_cast<int>(blockIdx.x); task < s.batch * s.heads * pieces;
             task += static_cast<int>(gridDim.x)) {
            const int piece = task % pieces, h = task / pieces % s.heads, b = task / pieces / s.heads;
            const int first = piece * step;
            const T* qkv = s.qkv + (static_cast<int64_t>(b) * 3 * s.heads + h) * head_dim;
            const float *cos = s.cos + b * (head_dim / 2), *sin = s.sin + b * (head_dim / 2);
            T* k = at<T>(l.k_cache) + b * l.k_batch_stride + row * l.k_key_stride + h * head_dim;
            T* v = at<T>(l.v_cache) + b * l.v_batch_stride + row * l.v_key_stride + h * head_dim;
            const bool newest = first + step >= count;
            if (warp == 0)
                normalize_and_rotate(qkv, at<const float>(l.q_norm), cos, sin, head_dim, s.eps, shared);
            if (warp == 1 && newest)
                normalize_and_rotate(qkv + s.d, at<const float>(l.k_norm), cos, sin, head_dim, s.eps, k);
            if (warp == 2 && newest && mine_ - 2 * kWarp * kOctet < head_dim) {
                const int i = mine_ - 2 * kWarp * kOctet;
                store_octet(v + i, load_octet<kWritten>(qkv + 2 * s.d + i));
            }
            __syncthreads();
            const int64_t back = count - 1 - first;
            const Keys<T> keys{k - back * l.k_key_stride, v - back * l.v_key_stride, l.k_key_stride,
                               l.v_key_stride, newest ? count - first : step};
            const int64_t place = (static_cast<int64_t>(b) * s.heads + h) * pieces + piece;
            attend_piece(keys, head_dim, scale, shared, s.softmax + place, s.values + place * head_dim);
        }
    }

    // operand = what the pieces of each head give together
    __device__ void join_attention(int layer) {
        const int head_dim = s.d / s.heads, count = static_cast<int>(visible_[2 * layer + 1]);
        const int pieces = divide_up(count, keys_per_piece(count, s.heads));
        if (mine_ >= s.d) return;
#pragma unroll 1
        for (int b = 0; b < s.batch; ++b) {
            const int h = mine_ / head_dim;
            const int64_t place = (static_cast<int64_t>(b) * s.heads + h) * pieces;
            const float* values = s.values + place * head_dim + (mine_ - h * head_dim);
            float now = -HUGE_VALF, total = 0, sum[kOctet] = {};
#pragma unroll 4
            for (int p = 0; p < pieces; ++p) now = Max{}(__ldcg(s.softmax + place + p).x, now);
#pragma unroll 2
            for (int p = 0; p < pieces; ++p) {
                const Softmax of_piece = __ldcg(s.softmax + place + p);
                const float left = shrinkage(of_piece.x, now);
                float value[kOctet];
                widen(load_octet<kWritten>(values + static_cast<int64_t>(p) * head_dim), value);
                total = multiply_add(left, of_piece.y, total);
#pragma unroll
                for (int e = 0; e < kOctet; ++e) sum[e] = multiply_add(left, value[e], sum[e]);
            }
#pragma unroll
            for (int e = 0; e < kOctet; ++e) sum[e] /= total;
            store_octet(operand_ + b * s.d + mine_, narrow<T>(sum));
        }
    }

    const Step<T>& s;
    const Shape shape_;
    const int64_t* const visible_;
    float* const sums_;
    T* const x_;
    T* const operand_;
    unsigned char* const ring_;
    const int mine_;
    float squares_[N];
    int sums_made_ = 0;
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 1) decode(const __grid_constant__ Step<T> step) {
    unsigned char* const shared = dynamic_shared();
    const Layout layout(step.n_layers, N, step.d, step.heads, step.intermediate, sizeof(T), 0);
    // The tables are read again and again, by who should not wait.
    const auto copy = [&](const void* from, int to, int bytes) {
        for (int i = static_cast<int>(threadIdx.x) * 8; i < bytes; i += kThreads * 8)
            *reinterpret_cast<int64_t*>(shared + to + i) =
                *reinterpret_cast<const int64_t*>(static_cast<const unsigned char*>(from) + i);
    };
    copy(step.layers, 0, layout.visible);
    copy(step.visible, layout.visible, layout.sums - layout.visible);
    __syncthreads();
    Block<T, N>(step, shared, layout).run();
}

int most_shared() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "decode");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "decode");
    return bytes;
}

// How many slots the rings have, or 0 if there is no room for two.
template <class T, int N>
int slots_of(int64_t n_layers, int64_t d, int64_t heads, int64_t intermediate) {
    const Layout layout(static_cast<int>(n_layers), N, static_cast<int>(d), static_cast<int>(heads),
                        static_cast<int>(intermediate), sizeof(T), 0);
    const int most = most_shared();
    for (const int slots : kSlots)
        if (layout.bytes + slots * Weights<T, kRows<N>>::kSlotBytes <= most) return slots;
    return 0;
}

// Calls f with a value of the element type and the number of sequences that a kernel is made for.
template <class F>
auto dispatch_batch(int64_t batch, F&& f) {
    if (batch == 1) return f(std::integral_constant<int, 1>{});
    if (batch == 2) return f(std::integral_constant<int, 2>{});
    if (batch <= 4) return f(std::integral_constant<int, 4>{});
    return f(std::integral_constant<int, static_cast<int>(kMostSequences)>{});
}
template <class F>
void dispatch_step(Dtype dtype, int64_t batch, F&& f) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        if constexpr (std::is_same_v<T, double>)
            throw std::invalid_argument("decode_step is not for double");
        else
            dispatch_batch(batch, [&](auto sequences) { f(element, sequences); });
    });
}

// Hands out parts of scratch, each beginning on a line.
class Scratch {
  public:
    explicit Scratch(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
    template <class E>
    E* take(int64_t n) {
        E* const part = reinterpret_cast<E*>(memory_ + bytes_);
        bytes_ += (n * static_cast<int64_t>(sizeof(E)) + kLine - 1) / kLine * kLine;
        return part;
    }
    int64_t bytes() const { return bytes_; }

  private:
    unsigned char* const memory_;
    int64_t bytes_ = 0;
};

template <class T>
int64_t place(Step<T>& step, void* memory) {
    Scratch scratch(memory);
    const int64_t d = step.d, batch = step.batch, pieces = batch * step.heads * most_pieces(step.heads);
    step.counter = scratch.take<unsigned>(1);
    step.qkv = scratch.take<T>(batch * 3 * d);
    step.out = scratch.take<T>(batch * d);
    step.gated = scratch.take<T>(batch * step.intermediate);
    step.softmax = scratch.take<Softmax>(pieces);
    step.values = scratch.take<float>(pieces * (d / step.heads));
    return scratch.bytes();
}

}  // namespace

int64_t decode_scratch_bytes(Dtype dtype, int64_t n_layers, int64_t batch, int64_t d, int64_t heads,
                             int64_t intermediate) {
    int64_t bytes = 0;
    if (batch > kMostSequences || d > kWidest || d / heads > kWidestHead) return bytes;
    dispatch_step(dtype, batch, [&](auto element, auto sequences) {
        using T = decltype(element);
        if (!slots_of<T, sequences>(n_layers, d, heads, intermediate)) return;
        Step<T> step{};
        step.batch = static_cast<int>(batch);
        step.d = static_cast<int>(d);
        step.heads = static_cast<int>(heads);
        step.intermediate = static_cast<int>(intermediate);
        bytes = place(step, nullptr);
    });
    return bytes;
}

void decode_step(Dtype dtype, const int64_t* layers, const int64_t* visible, int64_t n_layers,
                 int64_t n_prefix, const void* x, const float* cos, const float* sin, const float* final_norm,
                 const void* head, void* prefix_output, void* hidden, float* logits, void* scratch,
                 int64_t batch, int64_t d, int64_t heads, int64_t intermediate, int64_t vocab, double eps,
                 void* stream) {
    dispatch_step(dtype, batch, [&](auto element, auto sequences) {
        using T = decltype(element);
        constexpr int N = sequences;
        Step<T> step{};
        step.layers = reinterpret_cast<const Layer*>(layers);
        step.visible = visible;
        step.x = static_cast<const T*>(x);
        step.cos = cos;
        step.sin = sin;
        step.final_norm = final_norm;
        step.head = static_cast<const T*>(head);
        step.prefix_output = static_cast<T*>(prefix_output);
        step.hidden = static_cast<T*>(hidden);
        step.logits = logits;
        step.n_layers = static_cast<int>(n_layers);
        step.n_prefix = static_cast<int>(n_prefix);
        step.batch = static_cast<int>(batch);
        step.d = static_cast<int>(d);
        step.heads = static_cast<int>(heads);
        step.intermediate = static_cast<int>(intermediate);
        step.vocab = static_cast<int>(vocab);
        step.eps = static_cast<float>(eps);
        step.slots = slots_of<T, N>(n_layers, d, heads, intermediate);
        place(step, scratch);
        const Layout layout(step.n_layers, N, step.d, step.heads, step.intermediate, sizeof(T),
                            step.slots * Weights<T, kRows<N>>::kSlotBytes);
        const size_t shared = static_cast<size_t>(layout.bytes);
        const int blocks = resident_blocks("decode", decode<T, N>, kThreads, shared);
        launch("decode", decode<T, N>, {static_cast<unsigned>(blocks), kThreads, shared, true}, stream, step);
    });
}

}  // namespace ttt::cuda
