// Products of a matrix with a few vectors, at the speed at which memory gives the matrix.
#pragma once

#include "common/vec.h"
#include "cpu/decode_rows.h"

namespace ttt::TTT_ISA {
namespace {

// A processor fetches ahead best on a few streams that are pages apart: two cores read 41 GB/s so, 27 along
// one stream, and 16 along the rows of four neighbours.
constexpr int kStreams = 4;
// How many elements ahead of its use memory is asked for.
constexpr int64_t kAhead = 256;
// Rows of each stream that make one task.
constexpr int64_t kRun = 16;

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Some rows of a matrix: `streams` runs of `count` rows, each `apart` rows after the one before.
struct Rows {
    int64_t first, apart, streams, count;
};

// One worker's share of a matrix: as many successive rows as any other's, in streams that its tasks go along,
// and the few that are left over.
class Share {
  public:
    Share(int64_t rows, int64_t owner, int64_t owners)
        : first_(owner * rows / owners),
          apart_(((owner + 1) * rows / owners - first_) / kStreams),
          left_((owner + 1) * rows / owners - first_ - kStreams * apart_) {}
    int64_t tasks() const { return divide_up(apart_, kRun) + (left_ > 0); }
    Rows task(int64_t i) const {
        const int64_t done = i * kRun;
        if (done < apart_) return {first_ + done, apart_, kStreams, smaller(kRun, apart_ - done)};
        return {first_ + kStreams * apart_, 0, 1, left_};
    }

  private:
    int64_t first_, apart_, left_;
};

// y[s * y_apart + b * y_stride] = <w[s], x[b]> for S rows w_apart apart and N vectors x_stride apart. Each
// sum runs in the same order for every S and N, so that results do not depend on who shares the work or the
// batch.
template <int S, int N, class T>
inline void dots(const T* w, int64_t w_apart, const float* x, int64_t x_stride, int64_t n, float* y,
                 int64_t y_apart, int64_t y_stride) {
    vf sum[S][N] = {};
    const auto add = [&](int64_t i, auto&& fetch) {
        vf v[N];
        for (int b = 0; b < N; ++b) v[b] = fetch(x + b * x_stride + i);
        for (int s = 0; s < S; ++s) {
            const T* weights = w + s * w_apart + i;
            __builtin_prefetch(weights + kAhead);
            const vf weight = fetch(weights);
            for (int b = 0; b < N; ++b) sum[s][b] = multiply_add(weight, v[b], sum[s][b]);
        }
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add(i, [](const auto* p) { return load(p); });
    if (i < n) add(i, [&](const auto* p) { return load_first(p, n - i); });
    for (int s = 0; s < S; ++s)
        for (int b = 0; b < N; ++b) y[s * y_apart + b * y_stride] = sum_lanes<float>(sum[s][b]);
}

// y (batch, kStreams, kRun) = x (batch, n) w (rows, n)^T, each row read from memory once.
template <class T>
inline void product(const T* w, const Rows& rows, int64_t n, const float* x, int64_t batch, float* y) {
    constexpr int64_t y_stride = kStreams * kRun;
    const int64_t apart = rows.apart * n;
    for (int64_t i = 0; i < rows.count; ++i) {
        const T* row = w + (rows.first + i) * n;
        int64_t b = 0;
        const auto xb = [&] { return x + b * n; };
        const auto yb = [&] { return y + b * y_stride + i; };
        if (rows.streams < kStreams) {
            for (; b < batch; ++b) dots<1, 1>(row, 0, xb(), n, n, yb(), kRun, y_stride);
            continue;
        }
        // As many sums at a time as there are registers for.
        for (; b + 4 <= batch; b += 4) {
            dots<2, 4>(row, apart, xb(), n, n, yb(), kRun, y_stride);
            dots<2, 4>(row + 2 * apart, apart, xb(), n, n, yb() + 2 * kRun, kRun, y_stride);
        }
        for (; b + 2 <= batch; b += 2) dots<4, 2>(row, apart, xb(), n, n, yb(), kRun, y_stride);
        if (b < batch) dots<4, 1>(row, apart, xb(), n, n, yb(), kRun, y_stride);
    }
}

}  // namespace
}  // namespace ttt::TTT_ISA
