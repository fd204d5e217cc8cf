// The weights of the whole stack as one stream for each warp, which runs ahead of what is computed.
//
// A product waits for the one before it, its weights do not. So every warp has a ring in shared memory of the
// weights that it needs next, whichever products they belong to, and other warps, which compute nothing, ask
// for more whenever it has used some: while the grid waits at a barrier, memory fills the rings.
#pragma once

#include <cuda_runtime.h>

#include "common/decode_layer.h"
#include "common/decode_math.h"
#include "cuda/async_copy.h"
#include "cuda/decode_octet.h"
#include "cuda/grid.h"

namespace ttt::cuda {
namespace {

// Threads that compute, and behind them warps that ask for weights: one for each of a multiprocessor's four
// schedulers, because a warp begins its lanes' copies one after the other.
constexpr int kThreads = 384, kWarps = kThreads / kWarp;
constexpr int kAskingWarps = 4, kAllThreads = kThreads + kAskingWarps * kWarp;

// Of the threads that compute.
struct Together {
    __device__ void operator()() const { barrier_of_some(1, kThreads); }
};

struct Layer {
#define TTT_FIELD(name) int64_t name;
    TTT_DECODE_LAYER(TTT_FIELD)
#undef TTT_FIELD
};
static_assert(sizeof(Layer) % 16 == 0, "what follows the table in shared memory is aligned");

template <class T>
__device__ inline T* at(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

__host__ __device__ constexpr int divide_up(int a, int b) {
    return (a + b - 1) / b;
}

// The products of a layer in their order. Those after the last layer's are the head, in place of kQkv.
enum Kind { kQkv, kOut, kFastGates, kFastDown, kGates, kDown, kKinds };

// A product's matrices: (rows, n) each, one for all sequences or one for each; for gates there are two.
struct Product {
    const char* first;
    const char* second;
    int rows, n, matrices;
};

struct Shape {
    const Layer* layers;
    const void* head;
    int n_layers, batch, d, intermediate, vocab;

    __device__ Product product(int layer, int kind) const {
        if (layer == n_layers) return {static_cast<const char*>(head), nullptr, vocab, d, 1};
        const Layer& l = layers[layer];
        switch (kind) {
            case kQkv:
                return {at<const char>(l.w_qkv), nullptr, 3 * d, d, 1};
            case kOut:
                return {at<const char>(l.w_o), nullptr, d, d, 1};
            case kFastGates:
                return {at<const char>(l.fast_gate), at<const char>(l.fast_up), intermediate, d, batch};
            case kFastDown:
                return {at<const char>(l.fast_down), nullptr, d, intermediate, batch};
            case kGates:
                return {at<const char>(l.w_gate), at<const char>(l.w_up), intermediate, d, 1};
            default:
                return {at<const char>(l.w_down), nullptr, d, intermediate, 1};
        }
    }

    // Goes on to the next product; false after the head.
    __device__ bool next(int& layer, int& kind) const {
        if (layer == n_layers) return false;
        ++kind;
        if (kind == kFastGates && !layers[layer].fast_gate) kind = kGates;
        if (kind == kKinds) {
            kind = kQkv;
            ++layer;
        }
        return true;
    }
};

// The units of R rows, of one matrix or half of each of two, that a warp of the grid has. They go round all
// warps of the grid, block by block, and go on with the next product where they ended with the one before:
// the multiprocessors' shares of all bytes differ by one unit however few a product has.
template <int R>
class Share {
  public:
    __device__ explicit Share(int warp)
        : warp_(warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
          warps_(kWarps * static_cast<int>(gridDim.x)) {}

    // The first unit of a product, and how far it is to the next.
    __device__ int first() const { return warp_ - turn_ + (warp_ < turn_ ? warps_ : 0); }
    __device__ int apart() const { return warps_; }
    __device__ void end(const Product& product) { turn_ = (turn_ + units(product)) % warps_; }

    __device__ static int rows_of_unit(const Product& product) { return product.second ? R / 2 : R; }
    // By numbers that the compiler knows: a division by another takes long, and every unit waits for it.
    __device__ static int units_of_matrix(const Product& product) {
        return product.second ? divide_up(product.rows, R / 2) : divide_up(product.rows, R);
    }
    __device__ static int matrix_of(const Product& product, int unit) {
        return product.matrices == 1 ? 0 : unit / units_of_matrix(product);
    }
    __device__ static int units(const Product& product) {
        return units_of_matrix(product) * product.matrices;
    }

  private:
    const int warp_, warps_;
    int turn_ = 0;
};

// Slots that weights come to, in turn, and for each warp of the block a barrier of each that ends a phase
// when they have come, and one that does when they have been used. A slot has up to `segment` bytes of each
// of R rows.
template <int R>
struct Rings {
    unsigned char* memory;
    PhaseBarrier* barriers;
    int slots, segment;

    __host__ __device__ static constexpr int bytes(int slots, int segment) {
        return kWarps * slots * (2 * static_cast<int>(sizeof(PhaseBarrier)) + R * segment);
    }
    __device__ Rings(unsigned char* shared, int slots, int segment)
        : memory(shared),
          barriers(reinterpret_cast<PhaseBarrier*>(shared + kWarps * slots * R * segment)),
          slots(slots),
          segment(segment) {}

    __device__ PhaseBarrier* come(int warp, int slot) const { return barriers + 2 * (warp * slots + slot); }
    __device__ PhaseBarrier* used(int warp, int slot) const { return come(warp, slot) + 1; }
    __device__ unsigned char* slot(int warp, int slot) const {
        return memory + (warp * slots + slot) * R * segment;
    }
    // By one thread, before a barrier of the block.
    __device__ void make() const {
        for (int i = 0; i < kWarps * slots; ++i) {
            make_barrier(come(0, i), arrivals_of_copies());
            make_barrier(used(0, i), 1);
        }
        show_barriers_to_copies();
    }
};

// The slot whose turn it is, and the parity of its phase.
struct Turn {
    int slot = 0;
    unsigned parity = 0;

    __device__ void next(int slots) {
        if (++slot < slots) return;
        slot = 0;
        parity ^= 1;
    }
};

// Asks for the weights of the whole stack, each of a warp's first lanes for one other warp's.
template <class T, int R>
class Asking {
  public:
    __device__ Asking(const Shape& shape, const Rings<R>& rings)
        : shape_(shape),
          rings_(rings),
          more_(static_cast<int>(threadIdx.x) % kWarp < kWarps / kAskingWarps),
          warp_(more_ ? (static_cast<int>(threadIdx.x) - kThreads) / kWarp +
                            static_cast<int>(threadIdx.x) % kWarp * kAskingWarps
                      : 0),
          share_(warp_) {
        begin_product();
        if (more_) find_unit();
    }

    __device__ void run() {
        while (__any_sync(kWholeWarp, more_)) {
            const bool ready = more_ && has_ended(rings_.used(warp_, turn_.slot), turn_.parity ^ 1);
            if (!__any_sync(kWholeWarp, ready)) {
                // Much less than the rings last, and not in the way of who computes.
                __nanosleep(32);
                continue;
            }
            const int left = row_bytes_ - done_;
            Copies<R> copies{rings_.slot(warp_, turn_.slot),
                             {},
                             rings_.come(warp_, turn_.slot),
                             rings_.segment,
                             left < rings_.segment ? left : rings_.segment};
#pragma unroll
            for (int r = 0; r < R; ++r) copies.from[r] = from_[r] + done_;
            begin_copies(ready, copies);
            if (ready) go_on(copies.bytes);
        }
    }

  private:
    __device__ void go_on(int bytes) {
        turn_.next(rings_.slots);
        done_ += bytes;
        if (done_ < row_bytes_) return;
        unit_ += share_.apart();
        find_unit();
    }

    __device__ void begin_product() {
        product_ = shape_.product(layer_, kind_);
        units_ = Share<R>::units(product_);
        row_bytes_ = product_.n * static_cast<int>(sizeof(T));
        unit_ = share_.first();
    }
    // unit_, or the first of a later product.
    __device__ void find_unit() {
#pragma unroll 1
        while (unit_ >= units_) {
            share_.end(product_);
            more_ = shape_.next(layer_, kind_);
            if (!more_) return;
            begin_product();
        }
        begin_unit();
    }

    __device__ void begin_unit() {
        const int rows = Share<R>::rows_of_unit(product_), matrix = Share<R>::matrix_of(product_, unit_);
        const int row = (unit_ - matrix * Share<R>::units_of_matrix(product_)) * rows;
        done_ = 0;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // Rows behind the last are not used.
            const int own = row + r % rows < product_.rows ? row + r % rows : product_.rows - 1;
            from_[r] = (r < rows ? product_.first : product_.second) +
                       (static_cast<int64_t>(matrix) * product_.rows + own) * row_bytes_;
        }
    }

    const Shape& shape_;
    const Rings<R>& rings_;
    bool more_;
    const int warp_;
    Share<R> share_;
    Turn turn_;
    Product product_{};
    int layer_ = 0, kind_ = kQkv, unit_ = 0, units_ = 0, row_bytes_ = 0, done_ = 0;
    const char* from_[R] = {};
};

// Products of a warp with the weights that come to its ring.
template <class T, int R>
class Weights {
  public:
    __device__ explicit Weights(const Rings<R>& rings)
        : rings_(rings), warp_(static_cast<int>(threadIdx.x) / kWarp), share_(warp_) {}

    // Calls emit(sequence, row, sum, sum of the second matrix's row) on one lane for every row that the warp
    // has of the next product: sums of products with x (N, n) in shared memory, where N sequences share a
    // matrix, of which the first `sequences` are there. Their order depends on n alone.
    template <int N, class F>
    __device__ __forceinline__ void multiply(const Product& product, const T* x, int sequences, F&& emit) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const int of_matrix = Share<R>::units_of_matrix(product), rows = Share<R>::rows_of_unit(product);
#pragma unroll 1
        for (int unit = share_.first(); unit < of_matrix * product.matrices; unit += share_.apart()) {
            const int matrix = N > 1 ? 0 : Share<R>::matrix_of(product, unit);
            float sums[R * N] = {};
            add_unit<N>(x + matrix * product.n, product.n, sums);
            // Gates and what they are for are in different halves of the rows, and so of the lanes.
            const float own = warp_sums(sums), other = __shfl_xor_sync(kWholeWarp, own, kWarp / 2);
            constexpr int kLanes = kWarp / (R * N);
            const int row = (unit - matrix * of_matrix) * rows, r = lane / kLanes / N, b = lane / kLanes % N;
            if (lane % kLanes == 0 && r < rows && row + r < product.rows && b < sequences)
                emit(matrix + b, row + r, own, other);
        }
        share_.end(product);
    }

  private:
    // A lane's part of the products of a unit's rows, segment by segment.
    template <int N>
    __device__ __forceinline__ void add_unit(const T* x, int n, float (&sums)[R * N]) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const int row_bytes = n * static_cast<int>(sizeof(T));
#pragma unroll 1
        for (int done = 0; done < row_bytes; done += rings_.segment) {
            const int left = row_bytes - done, bytes = left < rings_.segment ? left : rings_.segment;
            const unsigned char* const slot = rings_.slot(warp_, turn_.slot);
            const T* const operand = x + done / static_cast<int>(sizeof(T));
            wait_for_phase(rings_.come(warp_, turn_.slot), turn_.parity);
#pragma unroll 1
            for (int i = lane * kChunk; i < bytes; i += kWarp * kChunk) {
                uint4 w[R];
#pragma unroll
                for (int r = 0; r < R; ++r)
                    w[r] = *reinterpret_cast<const uint4*>(slot + r * rings_.segment + i);
                add_products<N>(w, operand + i / static_cast<int>(sizeof(T)), n, sums);
            }
            __syncwarp();
            if (lane == 0) arrive(rings_.used(warp_, turn_.slot));
            turn_.next(rings_.slots);
        }
    }

    // In halves, of which all that is wide is in registers at once: of 8 sequences that is as much as there
    // is.
    template <int N>
    __device__ __forceinline__ static void add_products(const uint4 (&w)[R], const T* x, int n,
                                                        float (&sums)[R * N]) {
        constexpr int kHalf = kElements<T> / 2;
#pragma unroll(N < 8 ? 2 : 1)
        for (int half = 0; half < 2; ++half) {
            float wide[R][kHalf];
#pragma unroll
            for (int r = 0; r < R; ++r) widen_half<T>(half ? upper(w[r]) : lower(w[r]), wide[r]);
#pragma unroll
            for (int b = 0; b < N; ++b) {
                const T* const own = x + b * n + half * kHalf;
                float v[kHalf];
                widen_half<T>(*reinterpret_cast<const uint2*>(own), v);
#pragma unroll
                for (int i = 0; i < kHalf; ++i)
#pragma unroll
                    for (int r = 0; r < R; ++r)
                        sums[r * N + b] = multiply_add(wide[r][i], v[i], sums[r * N + b]);
            }
        }
    }

    const Rings<R>& rings_;
    const int warp_;
    Share<R> share_;
    Turn turn_;
};

}  // namespace
}  // namespace ttt::cuda
