// The weights of the whole stack as one stream for each warp, which runs ahead of what is computed.
//
// A product waits for the one before it, its weights do not. So every thread keeps a ring in shared memory of
// the weights that it needs next, whichever products they belong to, and asks for more whenever it takes
// some: while the grid waits at a barrier, memory fills the rings.
#pragma once

#include <cuda_runtime.h>

#include "common/decode_layer.h"
#include "common/decode_math.h"
#include "cuda/async_copy.h"
#include "cuda/decode_octet.h"
#include "cuda/grid.h"

namespace ttt::cuda {
namespace {

constexpr int kThreads = 384, kWarps = kThreads / kWarp;

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
    __device__ Share()
        : warp_(static_cast<int>(threadIdx.x) / kWarp * static_cast<int>(gridDim.x) +
                static_cast<int>(blockIdx.x)),
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

template <class T, int R>
class Weights {
  public:
    static constexpr int kSlotBytes = R * kThreads * kChunk;

    // `ring`: `slots` of kSlotBytes in shared memory, as many as `wait` knows.
    __device__ Weights(const Shape& shape, unsigned char* ring, int slots)
        : shape_(shape), ring_(ring + threadIdx.x * kChunk), slots_(slots) {
        open();
#pragma unroll 1
        for (int i = 1; i < slots; ++i) ask();
    }

    // Calls emit(sequence, row, sum, sum of the second matrix's row) on one lane for every row that the warp
    // has of the next product: sums of products with x (sequences, n) in shared memory. N of them share a
    // matrix, `sequences` of which are there. Their order depends on n alone.
    template <int N, class F>
    __device__ __forceinline__ void multiply(const Product& product, const T* x, int sequences, F&& emit) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const int of_matrix = Share<R>::units_of_matrix(product), rows = Share<R>::rows_of_unit(product);
        const int chunks = product.n / kElements<T>;
#pragma unroll 1
        for (int unit = taken_.first(); unit < of_matrix * product.matrices; unit += taken_.apart()) {
            const int matrix = Share<R>::matrix_of(product, unit);
            const T* operand = x + matrix * product.n;
            float sums[R][N] = {};
#pragma unroll 1
            for (int first = 0; first < chunks; first += kWarp) {
                uint4 w[R];
                take(w);
                if (first + lane < chunks)
                    add_products(w, operand + (first + lane) * kElements<T>, product.n, sequences, sums);
            }
            const int row = (unit - matrix * of_matrix) * rows;
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
                for (int b = 0; b < N; ++b) sums[r][b] = warp_reduce(sums[r][b], Sum{});
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
                for (int b = 0; b < N; ++b)
                    if (lane == r * N + b && r < rows && row + r < product.rows && b < sequences)
                        emit(matrix + b, row + r, sums[r][b], sums[(r + R / 2) % R][b]);
        }
        taken_.end(product);
    }

  private:
    template <int N>
    __device__ __forceinline__ static void add_products(const uint4 (&w)[R], const T* x, int n, int sequences,
                                                        float (&sums)[R][N]) {
        float wide[R][kElements<T>];
#pragma unroll
        for (int r = 0; r < R; ++r) widen_chunk<T>(w[r], wide[r]);
#pragma unroll
        for (int b = 0; b < N; ++b) {
            float v[kElements<T>];
            widen_chunk<T>(*reinterpret_cast<const uint4*>(x + (b < sequences ? b : 0) * n), v);
#pragma unroll
            for (int i = 0; i < kElements<T>; ++i)
#pragma unroll
                for (int r = 0; r < R; ++r) sums[r][b] = multiply_add(wide[r][i], v[i], sums[r][b]);
        }
    }

    // The oldest slot, in whose predecessor the next chunks are asked for: what was there has been used.
    __device__ __forceinline__ void take(uint4 (&w)[R]) {
        wait();
        ask();
#pragma unroll
        for (int r = 0; r < R; ++r)
            w[r] = *reinterpret_cast<const uint4*>(ring_ + read_ * kSlotBytes + r * kRowBytes);
        read_ = read_ + 1 == slots_ ? 0 : read_ + 1;
    }

    // One group of copies is asked for in every slot, the last of them empty, so that their number tells what
    // has come.
    __device__ __forceinline__ void ask() {
        if (more_) {
            if (chunk_ < chunks_) {
#pragma unroll
                for (int r = 0; r < R; ++r)
                    copies_.copy(ring_ + write_ * kSlotBytes + r * kRowBytes, from_[r]);
            }
            advance();
        }
        copies_.end_group();
        write_ = write_ + 1 == slots_ ? 0 : write_ + 1;
    }

    __device__ __forceinline__ void wait() {
        switch (slots_) {
            case 16:
                return copies_.template wait<14>();
            case 14:
                return copies_.template wait<12>();
            case 12:
                return copies_.template wait<10>();
            case 10:
                return copies_.template wait<8>();
            case 8:
                return copies_.template wait<6>();
            case 7:
                return copies_.template wait<5>();
            case 6:
                return copies_.template wait<4>();
            case 5:
                return copies_.template wait<3>();
            case 4:
                return copies_.template wait<2>();
            case 3:
                return copies_.template wait<1>();
            default:
                return copies_.template wait<0>();
        }
    }

    __device__ __forceinline__ void advance() {
        chunk_ += kWarp;
#pragma unroll
        for (int r = 0; r < R; ++r) from_[r] += kWarp * kChunk;
        if (chunk_ - static_cast<int>(threadIdx.x) % kWarp < chunks_) return;
        unit_ += asked_.apart();
        start_unit();
    }

    __device__ void open() {
        unit_ = asked_.first();
        start_unit();
    }

    // Finds the rows of unit_, or of the first unit of a later product.
    __device__ void start_unit() {
        Product product = shape_.product(layer_, kind_);
        while (unit_ >= Share<R>::units(product)) {
            asked_.end(product);
            more_ = shape_.next(layer_, kind_);
            if (!more_) return;
            product = shape_.product(layer_, kind_);
            unit_ = asked_.first();
        }
        const int of_matrix = Share<R>::units_of_matrix(product), rows = Share<R>::rows_of_unit(product);
        const int matrix = Share<R>::matrix_of(product, unit_), row = (unit_ - matrix * of_matrix) * rows;
        const int64_t row_bytes = static_cast<int64_t>(product.n) * static_cast<int64_t>(sizeof(T));
        chunk_ = static_cast<int>(threadIdx.x) % kWarp;
        chunks_ = product.n / kElements<T>;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // Rows behind the last are not used.
            const int own = row + r % rows < product.rows ? row + r % rows : product.rows - 1;
            const char* base = r < rows ? product.first : product.second;
            from_[r] = base + (static_cast<int64_t>(matrix) * product.rows + own) * row_bytes +
                       static_cast<int64_t>(chunk_) * kChunk;
        }
    }

    static constexpr int kRowBytes = kThreads * kChunk;

    const Shape& shape_;
    unsigned char* const ring_;
    const int slots_;
    int read_ = 0, write_ = 0;
    AsyncCopies copies_;
    Share<R> taken_, asked_;
    // What is asked for next.
    bool more_ = true;
    int layer_ = 0, kind_ = kQkv, unit_ = 0, chunk_ = 0, chunks_ = 0;
    const char* from_[R];
};

}  // namespace
}  // namespace ttt::cuda
