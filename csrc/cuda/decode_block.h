// A block's way through the whole stack, from product to product.
#pragma once

#include "common/decode_math.h"
#include "cuda/decode_attention.h"
#include "cuda/decode_octet.h"
#include "cuda/decode_step.h"
#include "cuda/decode_weights.h"
#include "cuda/grid.h"

namespace ttt::cuda {
namespace {

// Rows that a warp multiplies at once: more sequences leave room for fewer, but want their operands read less
// often.
template <int N>
constexpr int kRows = N <= 2 ? 2 : 4;

template <class T, int N>
class Block {
  public:
    __device__ Block(const Step<T>& step, const Shape& shape, unsigned char* shared, const Layout& layout)
        : s(step),
          shape_(shape),
          visible_(reinterpret_cast<const int64_t*>(shared + layout.visible)),
          sums_(reinterpret_cast<float*>(shared + layout.sums)),
          x_(reinterpret_cast<T*>(shared + layout.x)),
          operand_(reinterpret_cast<T*>(shared + layout.operand)),
          mine_(static_cast<int>(threadIdx.x) * kOctet) {}

    __device__ void run(const Rings<kRows<N>>& rings) {
        Weights<T, kRows<N>> weights(rings);
        int layer = 0, kind = kQkv;
#pragma unroll 1
        do {
            const bool normalizes = kind == kQkv || kind == kFastGates || kind == kGates;
            // Of constants, memory may as well be read before the barrier.
            float post[kOctet], norm[kOctet];
            if (normalizes && mine_ < s.d) read_norms(layer, kind, post, norm);
            const bool is_first = layer == 0 && kind == kQkv;
            if (!is_first) grid_barrier(s.counter, Together{});
            if (kind == kOut) {
                attention(layer);
                grid_barrier(s.counter, Together{});
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
            Together{}();
            const Product product = shape_.product(layer, kind);
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
#pragma unroll 2
        for (int b = 0; b < N; ++b) {
            if (b >= s.batch) continue;
            Octet<T> own{};
            if (mine_ < s.d) {
                own = load_octet<kStreamed>(s.x + b * s.d + mine_);
                store_octet(x_ + b * s.d + mine_, own);
            }
            leave_squares(b, own);
        }
    }

    // x += rms_norm(out). In the meantime out is where the operand will be.
    __device__ void add_normalized(const float (&weight)[kOctet]) {
#pragma unroll 2
        for (int b = 0; b < N; ++b) {
            if (b >= s.batch) continue;
            Octet<T> change{};
            if (mine_ < s.d) {
                change = load_octet<kWritten>(s.out + b * s.d + mine_);
                store_octet(operand_ + b * s.d + mine_, change);
            }
            leave_squares(b, change);
        }
        const float* const squares = squares_of_warps();
#pragma unroll 2
        for (int b = 0; b < N; ++b) {
            if (b >= s.batch) continue;
            const float r = inverse_rms(sum_of_squares(squares, b), s.d, s.eps);
            Octet<T> own{};
            if (mine_ < s.d) {
                float sum[kOctet], added[kOctet];
                widen(load_octet<kShared>(x_ + b * s.d + mine_), sum);
                widen(load_octet<kShared>(operand_ + b * s.d + mine_), added);
#pragma unroll
                for (int e = 0; e < kOctet; ++e) sum[e] += normalized<T>(added[e], r, weight[e]);
                own = narrow<T>(sum);
                store_octet(x_ + b * s.d + mine_, own);
            }
            leave_squares(b, own);
        }
    }

    // operand = rms_norm(x)
    __device__ void normalize(const float (&weight)[kOctet]) {
        const float* const squares = squares_of_warps();
#pragma unroll 2
        for (int b = 0; b < N; ++b) {
            if (b >= s.batch) continue;
            const float r = inverse_rms(sum_of_squares(squares, b), s.d, s.eps);
            if (mine_ >= s.d) continue;
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

    // Sums of squares of rows. There are two places for those of the warps, by turns: who writes the one
    // again has passed the barrier behind which all have read it.
    __device__ void leave_squares(int b, const Octet<T>& v) {
        float wide[kOctet], squares = 0;
        widen(v, wide);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) squares = multiply_add(wide[e], wide[e], squares);
        squares = warp_reduce(squares, Sum{});
        const int thread = static_cast<int>(threadIdx.x);
        if (thread % kWarp == 0) sums_[(place_ * N + b) * kWarps + thread / kWarp] = squares;
    }
    __device__ const float* squares_of_warps() {
        Together{}();
        const float* const squares = sums_ + place_ * N * kWarps;
        place_ ^= 1;
        return squares;
    }
    __device__ static float sum_of_squares(const float* squares, int b) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        return warp_reduce(lane < kWarps ? squares[b * kWarps + lane] : 0.0f, Sum{});
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
            Together{}();
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
            const float inverse = 1.0f / total;
#pragma unroll
            for (int e = 0; e < kOctet; ++e) sum[e] *= inverse;
            store_octet(operand_ + b * s.d + mine_, narrow<T>(sum));
        }
    }

    const Step<T>& s;
    const Shape& shape_;
    const int64_t* const visible_;
    float* const sums_;
    T* const x_;
    T* const operand_;
    const int mine_;
    int place_ = 0;
};

}  // namespace
}  // namespace ttt::cuda
