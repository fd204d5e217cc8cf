// Clipped SGD in two passes over memory: inner products per sequence, then a weighted sum per sequence.
#include <type_traits>

#include "common/clipped_sgd.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

// Products are summed in blocks of this many elements whatever the number of threads, blocks in their
// order, so that the sum's bits depend on neither; ttt_kernels/clipped_sgd/cpu.py sizes the scratch by it.
constexpr int64_t kBlock = 8192;

int64_t blocks_of(int64_t n) {
    return (n + kBlock - 1) / kBlock;
}

// A vector of floats as two vectors of doubles.
struct Doubles {
    vd low, high;
};
inline Doubles widen(vf v) {
    typedef float half __attribute__((vector_size(kVectorBytes / 2)));
    struct Halves {
        half low, high;
    };
    const Halves h = bit_cast<Halves>(v);
    return {__builtin_convertvector(h.low, vd), __builtin_convertvector(h.high, vd)};
}
inline Doubles widen(vd v) {
    return {v, vd{}};
}

constexpr int kDots = 4;
constexpr int kTerms = 4;

// Rows of any type, a stride apart; `at` is null where there are none.
struct Rows {
    const void* at;
    int64_t stride;
};

struct Sum {
    vd low{}, high{};
    void add(const Doubles& a, const Doubles& b) {
        low = add_product(low, a.low, b.low);
        high = add_product(high, a.high, b.high);
    }
    double total() const { return sum_lanes<double>(low + high); }
};

// out[k * apart] = g . g, g . l, g . u and l . u, those that there are.
template <bool has_l, bool has_u, class T>
void dot(const T* g, const T* l, const T* u, int64_t n, double* out, int64_t apart) {
    Sum sums[kDots];
    for_each_vector<compute_t<T>>(0, n, [&](int64_t i, int64_t k) {
        const Doubles of_g = widen(read(g + i, k));
        sums[0].add(of_g, of_g);
        Doubles of_l;
        if constexpr (has_l) {
            of_l = widen(read(l + i, k));
            sums[1].add(of_g, of_l);
        }
        if constexpr (has_u) {
            const Doubles of_u = widen(read(u + i, k));
            sums[2].add(of_g, of_u);
            if constexpr (has_l) sums[3].add(of_l, of_u);
        }
    });
    for (int k = 0; k < kDots; ++k) out[k * apart] = sums[k].total();
}

template <bool has_l, bool has_u, class T>
void dots(const T* g, int64_t g_stride, const T* l, int64_t l_stride, const T* u, int64_t u_stride,
          double* scratch, double* sums, int64_t rows, int64_t n) {
    const int64_t blocks = blocks_of(n);
    parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / blocks, start = task % blocks * kBlock;
            dot<has_l, has_u, T>(g + row * g_stride + start, has_l ? l + row * l_stride + start : nullptr,
                                 has_u ? u + row * u_stride + start : nullptr,
                                 n - start < kBlock ? n - start : kBlock, scratch + task, rows * blocks);
        }
    });
    for (int64_t row = 0; row < kDots * rows; ++row)
        for (int64_t block = 0; block < blocks; ++block) sums[row] += scratch[row * blocks + block];
}

// Elements of a result that are made at a time, in memory that stays in the first cache.
constexpr int64_t kPiece = 1024;

template <class T>
struct Term {
    const T* at;
    compute_t<T> factor;
};

template <int count, class T, class C = compute_t<T>>
void weighted_sum(const Term<T>* terms, T* out, int64_t n) {
    for_each_vector<C>(0, n, [=](int64_t i, int64_t k) {
        vec<C> sum = terms[0].factor * read(terms[0].at + i, k);
        for (int t = 1; t < count; ++t) sum = add_term(sum, terms[t].factor, read(terms[t].at + i, k));
        write(out + i, sum, k);
    });
}

template <class T>
void weighted_sum(const Term<T>* terms, int count, T* out, int64_t n) {
    switch (count) {
        case 1:
            return weighted_sum<1>(terms, out, n);
        case 2:
            return weighted_sum<2>(terms, out, n);
        case 3:
            return weighted_sum<3>(terms, out, n);
        default:
            return weighted_sum<kTerms>(terms, out, n);
    }
}

// `to` = `from` in another type, by way of the type that it is computed in.
template <class T, class U, class C = compute_t<T>>
void convert(const T* from, U* to, int64_t n, bool past_caches) {
    if constexpr (std::is_same_v<C, compute_t<U>>) {
        const bool stream = past_caches && streamable(to);
        for_each_vector<C>(0, n, [=](int64_t i, int64_t k) { write(to + i, read(from + i, k), k, stream); });
    } else {
        for (int64_t i = 0; i < n; ++i)
            to[i] = from_compute<U>(static_cast<compute_t<U>>(to_compute(from[i])));
    }
}

// The terms of one row's sum, those that there are.
template <class T>
int terms_of(const Rows* inputs, const double* factors, int uses, int64_t rows, int64_t row, int64_t start,
             Term<T>* terms) {
    int count = 0;
    for (int k = 0; k < kTerms; ++k)
        if (uses >> k & 1)
            terms[count++] = {static_cast<const T*>(inputs[k].at) + row * inputs[k].stride + start,
                              static_cast<compute_t<T>>(factors[k * rows + row])};
    return count;
}

template <class T, class U>
void combine(const Rows* inputs, const double* factors, int uses, int uses_more, const bool* active, T* out,
             int64_t out_stride, T* more, int64_t more_stride, U* copy, int64_t copy_stride, bool past_caches,
             int64_t rows, int64_t n) {
    const int64_t blocks = blocks_of(n);
    parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / blocks, first = task % blocks * kBlock;
            if (active && !active[row]) continue;
            for (int64_t start = first; start < first + kBlock && start < n; start += kPiece) {
                const int64_t size = n - start < kPiece ? n - start : kPiece;
                Term<T> terms[kTerms];
                T piece[kPiece];
                int count = terms_of<T>(inputs, factors, uses, rows, row, start, terms);
                weighted_sum<T>(terms, count, piece, size);
                convert(piece, out + row * out_stride + start, size, past_caches);
                // A copy is rounded from the weight as it is stored, as a cast of it would be.
                if (copy) convert(piece, copy + row * copy_stride + start, size, past_caches);
                if (!more) continue;
                count = terms_of<T>(inputs, factors + kTerms * rows, uses_more, rows, row, start, terms);
                weighted_sum<T>(terms, count, piece, size);
                convert(piece, more + row * more_stride + start, size, past_caches);
            }
        }
        if (past_caches) end_stream();
    });
}

}  // namespace

void clipped_sgd_dots(Dtype dtype, const void* g, int64_t g_stride, const void* l, int64_t l_stride,
                      const void* u, int64_t u_stride, double* scratch, double* sums, int64_t rows,
                      int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        const auto run = l && u ? dots<true, true, T>
                         : l    ? dots<true, false, T>
                         : u    ? dots<false, true, T>
                                : dots<false, false, T>;
        run(static_cast<const T*>(g), g_stride, static_cast<const T*>(l), l_stride, static_cast<const T*>(u),
            u_stride, scratch, sums, rows, n);
    });
}

void clipped_sgd_clips(const double* squares, double max_norm, double* norm, double* scale, bool* clips,
                       int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const Clip of = clip(squares[row], max_norm);
        norm[row] = of.norm;
        scale[row] = of.scale;
        clips[row] = of.clips;
    }
}

void clipped_sgd_combine(Dtype dtype, const void* w, int64_t w_stride, const void* l, int64_t l_stride,
                         const void* u, int64_t u_stride, const void* g, int64_t g_stride,
                         const double* factors, int uses, int uses_more, const bool* active, void* out,
                         int64_t out_stride, void* more, int64_t more_stride, Dtype copy_dtype, void* copy,
                         int64_t copy_stride, bool past_caches, int64_t rows, int64_t n) {
    const Rows inputs[kTerms] = {{w, w_stride}, {l, l_stride}, {u, u_stride}, {g, g_stride}};
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        dispatch(copy_dtype, [&](auto copied) {
            using U = decltype(copied);
            combine<T, U>(inputs, factors, uses, uses_more, active, static_cast<T*>(out), out_stride,
                          static_cast<T*>(more), more_stride, static_cast<U*>(copy), copy_stride, past_caches,
                          rows, n);
        });
    });
}

}  // namespace ttt::TTT_ISA
