// Clipped SGD of all sequences' fast weights in place, in two kernels: parts of the norms, then the new
// weights.
//
// Both are bound by memory: of every element the first reads g, the second reads g and w and writes w and its
// copy, 4 + 14 bytes in float32 with copies in 16 bits. A cooperative kernel with a barrier of the grid
// between the passes would move the same bytes and save one launch of two, whose gap a CUDA graph makes
// short, but could not begin with fewer blocks than are resident at once, nor end a block before the slowest
// has come to the barrier. Two kernels need no counter that outlives the call.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common/clipped_sgd.h"
#include "cuda/grid.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace ttt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kScratch = kThreads / kWarp * static_cast<int>(sizeof(double));
// Elements of one tensor that a block has at a time. Its threads read all of them before they use the first,
// so that memory is kept busy: 64 bytes of each operand in float32, 32 in 16 bits.
constexpr int kPiece = 16 * kThreads;
// A sequence has about as many parts of its norm at most, each of the same number of pieces of one tensor.
// That and the order of every sum depend on the tensors' sizes alone: a sequence has the same bits on every
// chip and in every batch.
constexpr int64_t kMostParts = 2048;
// More do not fit into the 4096 bytes that a kernel's arguments may have; they are given to further launches.
constexpr int64_t kMostTensors = 48;

constexpr int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

struct Row {
#define TTT_FIELD(name) int64_t name;
    TTT_CLIPPED_SGD_TENSOR(TTT_FIELD)
#undef TTT_FIELD
};

// A tensor, and how many pieces and parts of a sequence come before its own.
struct Tensor {
    Row row;
    int64_t first_piece, first_part;
};
struct Tuple {
    Tensor tensors[kMostTensors];
    int count;
    int64_t pieces, parts;  // of a sequence in these tensors
    int64_t before_parts;   // in tensors before these
    int64_t all_parts;      // in all tensors
    int64_t pieces_per_part;
};

// The last tensor that begins at `index` or before; one without elements begins where the next does.
template <int64_t Tensor::* first>
__device__ inline const Tensor& tensor_of(const Tuple& tuple, int64_t index) {
    int found = 0;
    for (int i = 1; i < tuple.count; ++i)
        if (tuple.tensors[i].*first <= index) found = i;
    return tuple.tensors[found];
}

template <class T>
__device__ inline T* at(int64_t address, int64_t offset) {
    return reinterpret_cast<T*>(address) + offset;
}

// Vectors of L elements that a thread has of a piece, and which element one begins with; neighbours read
// neighbours.
template <int L>
constexpr int kVectors = kPiece / (kThreads * L);
template <int L>
__device__ inline int element_of(int k) {
    return (k * kThreads + static_cast<int>(threadIdx.x)) * L;
}

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// A sum, and a thread's share of the squares of n elements. The order is the same for vectors and for single
// elements.
template <bool kWhole, class T, int L>
__device__ inline double add_squares(double sum, const T* g, int n) {
    Vector<T, L> values[kVectors<L>];
#pragma unroll
    for (int k = 0; k < kVectors<L>; ++k) {
        const int i = element_of<L>(k);
        values[k] = kWhole ? load<L>(g + i) : load_first<L>(g + i, n - i);
    }
#pragma unroll
    for (int k = 0; k < kVectors<L>; ++k)
#pragma unroll
        for (int lane = 0; lane < L; ++lane) {
            const double value = static_cast<double>(to_compute(values[k].x[lane]));
            sum = add_product(sum, value, value);
        }
    return sum;
}

// scratch (sequences, parts) = sums of squares; a block for each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    square_parts(const __grid_constant__ Tuple tuple, double* __restrict__ scratch) {
    constexpr int L = kLanes<T>;
    const int64_t sequence = blockIdx.x / tuple.parts, part = blockIdx.x % tuple.parts;
    const Tensor& tensor = tensor_of<&Tensor::first_part>(tuple, part);
    const Row& row = tensor.row;
    const int64_t length = tuple.pieces_per_part * kPiece;
    const int64_t begin = (part - tensor.first_part) * length;
    const int64_t end = row.count < begin + length ? row.count : begin + length;
    const T* g = at<const T>(row.g, sequence * row.g_stride);
    const bool vectors = aligned<L>(g);
    double sum = 0;
    for (int64_t start = begin; start < end; start += kPiece) {
        const int n = static_cast<int>(end - start < kPiece ? end - start : kPiece);
        if (vectors && n == kPiece)
            sum = add_squares<true, T, L>(sum, g + start, n);
        else
            sum = add_squares<false, T, L>(sum, g + start, n);
    }
    sum = block_reduce<kThreads>(sum, reinterpret_cast<double*>(dynamic_shared()), 0.0, Sum{});
    if (threadIdx.x == 0) scratch[sequence * tuple.all_parts + tuple.before_parts + part] = sum;
}

// What is the same for all sequences: the learning rate, in memory or as it is, and the threshold.
struct Rate {
    double value;
    const void* at;
    Dtype dtype;
    double max_norm;
};

__device__ inline double learning_rate(const Rate& rate) {
    if (!rate.at) return rate.value;
    switch (rate.dtype) {
        case Dtype::f32:
            return *static_cast<const float*>(rate.at);
        case Dtype::bf16:
            return to_compute(*static_cast<const bf16*>(rate.at));
        case Dtype::f16:
            return to_compute(*static_cast<const f16*>(rate.at));
        case Dtype::f64:
            return *static_cast<const double*>(rate.at);
    }
    return rate.value;
}

// New weights of n elements, and copies of them where `copy` is not null. A copy is rounded from the weight
// as it is stored, as a cast of it would be. The gradient and the weights are not read again soon, copies
// are.
template <bool kWhole, class T, class U, int L>
__device__ inline void update(T* w, const T* g, U* copy, float factor, int n) {
    Vector<T, L> weights[kVectors<L>], grads[kVectors<L>];
#pragma unroll
    for (int k = 0; k < kVectors<L>; ++k) {
        const int i = element_of<L>(k);
        grads[k] = kWhole ? load_once<L>(g + i) : load_first<L>(g + i, n - i);
        weights[k] = kWhole ? load_once<L>(w + i) : load_first<L>(w + i, n - i);
    }
#pragma unroll
    for (int k = 0; k < kVectors<L>; ++k) {
        const int i = element_of<L>(k);
        Vector<U, L> rounded;
#pragma unroll
        for (int lane = 0; lane < L; ++lane) {
            weights[k].x[lane] = from_compute<T>(
                add_term(to_compute(weights[k].x[lane]), factor, to_compute(grads[k].x[lane])));
            rounded.x[lane] = from_compute<U>(to_compute(weights[k].x[lane]));
        }
        if constexpr (kWhole) {
            store_once<L>(w + i, weights[k]);
            if (copy) store<L>(copy + i, rounded);
        } else {
            store_first<L>(w + i, weights[k], n - i);
            if (copy) store_first<L>(copy + i, rounded, n - i);
        }
    }
}

// Blocks take pieces in turn, the last first: of g they find in the cache what square_parts has read last.
// Each adds up the parts of a sequence's norm for itself, which is a few thousand bytes against the megabytes
// of its pieces; `norms` (null in launches after the first) is written by who has the sequence's first piece.
template <class T, class U>
__global__ void __launch_bounds__(kThreads)
    update_pieces(const __grid_constant__ Tuple tuple, const __grid_constant__ Rate rate, int64_t sequences,
                  const bool* __restrict__ active, int64_t active_stride, const double* __restrict__ scratch,
                  float* __restrict__ norms) {
    constexpr int L = kLanes<T> < kLanes<U> ? kLanes<T> : kLanes<U>;
    int64_t sequence = -1;
    Clip of{};
    bool moves = false;
    for (int64_t turn = sequences * tuple.pieces - 1 - blockIdx.x; turn >= 0; turn -= gridDim.x) {
        const int64_t piece = turn % tuple.pieces;
        if (turn / tuple.pieces != sequence) {
            sequence = turn / tuple.pieces;
            moves = !active || active[sequence * active_stride];
            double square = 0;
            for (int64_t part = threadIdx.x; part < tuple.all_parts; part += kThreads)
                square += scratch[sequence * tuple.all_parts + part];
            double* sums = reinterpret_cast<double*>(dynamic_shared());
            of = clip(block_reduce<kThreads>(square, sums, 0.0, Sum{}), rate.max_norm);
        }
        if (norms && piece == 0 && threadIdx.x == 0) norms[sequence] = static_cast<float>(of.norm);
        if (!moves) continue;
        const float factor = static_cast<float>(-learning_rate(rate) * of.scale);
        const Tensor& tensor = tensor_of<&Tensor::first_piece>(tuple, piece);
        const Row& row = tensor.row;
        const int64_t start = (piece - tensor.first_piece) * kPiece;
        const int n = static_cast<int>(row.count - start < kPiece ? row.count - start : kPiece);
        const T* g = at<const T>(row.g, sequence * row.g_stride + start);
        T* w = at<T>(row.w, sequence * row.w_stride + start);
        U* copy = row.copy ? at<U>(row.copy, sequence * row.copy_stride + start) : nullptr;
        if (n == kPiece && aligned<L>(g) && aligned<L>(w) && aligned<L>(copy))
            update<true, T, U, L>(w, g, copy, factor, n);
        else
            update<false, T, U, L>(w, g, copy, factor, n);
    }
}

int64_t pieces_per_part(const Row* rows, int64_t tensors) {
    int64_t count = 0;
    for (int64_t i = 0; i < tensors; ++i) count += rows[i].count;
    return std::max<int64_t>(1, divide_up(count, kPiece * kMostParts));
}
int64_t parts_of(const Row& row, int64_t pieces) {
    return divide_up(row.count, kPiece * pieces);
}

// Tensors [begin, end) of all.
Tuple tuple_of(const Row* rows, int64_t tensors, int64_t begin, int64_t end) {
    Tuple tuple{};
    tuple.pieces_per_part = pieces_per_part(rows, tensors);
    for (int64_t i = 0; i < tensors; ++i) {
        const int64_t parts = parts_of(rows[i], tuple.pieces_per_part);
        tuple.all_parts += parts;
        if (i < begin) tuple.before_parts += parts;
        if (i < begin || i >= end) continue;
        tuple.tensors[tuple.count++] = {rows[i], tuple.pieces, tuple.parts};
        tuple.pieces += divide_up(rows[i].count, kPiece);
        tuple.parts += parts;
    }
    // Even a sequence without elements has its norm written.
    tuple.pieces = std::max<int64_t>(1, tuple.pieces);
    return tuple;
}

template <class T, class U>
void run(const Row* rows, int64_t tensors, int64_t sequences, const Rate& rate, const bool* active,
         int64_t active_stride, double* scratch, float* norm, void* stream) {
    const int64_t groups = divide_up(tensors, kMostTensors);
    const auto group = [&](int64_t i) {
        return tuple_of(rows, tensors, i * kMostTensors, std::min(tensors, (i + 1) * kMostTensors));
    };
    for (int64_t i = 0; i < groups; ++i) {
        const Tuple tuple = group(i);
        const int64_t blocks = sequences * tuple.parts;
        if (blocks)
            launch("clipped_sgd.square_parts", square_parts<T>,
                   {static_cast<unsigned>(blocks), kThreads, kScratch}, stream, tuple, scratch);
    }
    const int64_t resident =
        resident_blocks("clipped_sgd.update_pieces", update_pieces<T, U>, kThreads, kScratch);
    for (int64_t i = 0; i < groups; ++i) {
        const Tuple tuple = group(i);
        const unsigned blocks = static_cast<unsigned>(std::min(resident, sequences * tuple.pieces));
        launch("clipped_sgd.update_pieces", update_pieces<T, U>, {blocks, kThreads, kScratch}, stream, tuple,
               rate, sequences, active, active_stride, static_cast<const double*>(scratch),
               i == 0 ? norm : nullptr);
    }
}

// As `dispatch`, without double.
template <class F>
void dispatch_single(Dtype dtype, F&& f) {
    dispatch(dtype, [&](auto element) {
        if constexpr (std::is_same_v<decltype(element), double>)
            throw std::invalid_argument("clipped_sgd_update is not for double");
        else
            f(element);
    });
}

const Row* rows_of(const int64_t* tensors) {
    static_assert(sizeof(Row) == 7 * sizeof(int64_t), "rows are as wide as the table's");
    return reinterpret_cast<const Row*>(tensors);
}

}  // namespace

int64_t clipped_sgd_parts(const int64_t* tensors, int64_t n_tensors) {
    return tuple_of(rows_of(tensors), n_tensors, 0, 0).all_parts;
}

void clipped_sgd_update(Dtype dtype, Dtype copy_dtype, const int64_t* tensors, int64_t n_tensors,
                        int64_t sequences, double lr, Dtype lr_dtype, const void* lr_at, double max_norm,
                        const bool* active, int64_t active_stride, double* scratch, float* norm,
                        void* stream) {
    if (!sequences) return;
    const Rate rate{lr, lr_at, lr_dtype, max_norm};
    dispatch_single(dtype, [&](auto element) {
        dispatch_single(copy_dtype, [&](auto copied) {
            run<decltype(element), decltype(copied)>(rows_of(tensors), n_tensors, sequences, rate, active,
                                                     active_stride, scratch, norm, stream);
        });
    });
}

}  // namespace ttt::cuda
