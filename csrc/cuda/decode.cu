// One token of each sequence through the whole stack in one cooperative kernel, a block on each
// multiprocessor.
//
// Decoding reads every weight once and does next to nothing with it, so memory must never wait. At 3b in
// bf16, of 2560 wide layers, a layer is 139 MB: at 4.3 TB/s 32 us, or 6.5 for each of its 5 barriers (2 more
// in a layer with a fast MLP: 176 in all, and the 5.8 GB of a step last 1.35 ms). From the last sum of one
// product to the first of the next it takes a barrier, which is two ways to the second cache and back, a
// third to read what other blocks have written, and norms. A kernel for each stage would leave memory idle
// for that long; so would a kernel that reads weights when it can use them. Here rings in shared memory
// (decode_weights.h) of up to 192 KB on each of 132 multiprocessors hold the next 21 MB or more, which take
// memory 5 us. From sm_90 on they are filled by the unit that copies in bulk, so that neither a fence nor
// what a block reads behind a barrier waits for them in line. Keys and values, of a full window of 8192
// another 84 MB a layer, are read when the queries are there, by as many blocks as there are pieces of them.
//
// A sixth barrier a layer is spared by having all blocks join the pieces of attention; norms, residual sums
// and rotations are computed wherever they are needed rather than once. What all blocks read for it is small:
// at 3b 5 KB of a product that is d wide, 11 KB of the gates and 41 KB of pieces, where a block's share of a
// layer's weights is 1 MB.
//
// Nothing that is summed is divided by the number of blocks: results are the same on every GPU.
#include <stdexcept>
#include <type_traits>

#include "cuda/decode_block.h"
#include "cuda/decode_step.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace ttt::cuda {
namespace {

constexpr int64_t kMostSequences = 8;
constexpr int64_t kWidest = kThreads * kOctet, kWidestHead = kWarp * kOctet;
// Bytes of a row that are copied at once: the most of which there is room for four slots a warp, or two of
// the fewest. They are multiples of what a warp takes of a row in a turn, so that no sum depends on them.
constexpr int kSegments[] = {2048, 1024, 512}, kSlots = 4, kFewestSlots = 2;

template <class T, int N>
__global__ void __launch_bounds__(kAllThreads, 1) decode(const __grid_constant__ Step<T> step) {
    unsigned char* const shared = dynamic_shared();
    const Layout layout(step.n_layers, N, step.d, step.heads, step.intermediate, sizeof(T), 0);
    // The tables are read again and again, by who should not wait.
    const auto copy = [&](const void* from, int to, int bytes) {
        for (int i = static_cast<int>(threadIdx.x) * 8; i < bytes; i += kAllThreads * 8)
            *reinterpret_cast<int64_t*>(shared + to + i) =
                *reinterpret_cast<const int64_t*>(static_cast<const unsigned char*>(from) + i);
    };
    copy(step.layers, 0, layout.visible);
    copy(step.visible, layout.visible, layout.sums - layout.visible);
    const Rings<kRows<N>> rings(shared + layout.rings, step.slots, step.segment);
    if (threadIdx.x == 0) rings.make();
    __syncthreads();
    const Shape shape{reinterpret_cast<const Layer*>(shared),
                      step.head,
                      step.n_layers,
                      step.batch,
                      step.d,
                      step.intermediate,
                      step.vocab};
    if (threadIdx.x < kThreads)
        Block<T, N>(step, shape, shared, layout).run(rings);
    else
        Asking<T, kRows<N>>(shape, rings).run();
}

// Slots of a warp's ring and bytes of a row that one has; no slots if there is no room for them.
struct RingSize {
    int slots, segment;
};
template <class T, int N>
RingSize ring_size(int64_t n_layers, int64_t d, int64_t heads, int64_t intermediate) {
    const Layout layout(static_cast<int>(n_layers), N, static_cast<int>(d), static_cast<int>(heads),
                        static_cast<int>(intermediate), sizeof(T), 0);
    const int room = most_shared("decode") - layout.bytes;
    for (const int segment : kSegments) {
        const int slots = room / Rings<kRows<N>>::bytes(1, segment);
        if (slots >= (segment == kSegments[2] ? kFewestSlots : kSlots)) return {slots, segment};
    }
    return {0, 0};
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

}  // namespace

int64_t decode_scratch_bytes(Dtype dtype, int64_t n_layers, int64_t batch, int64_t d, int64_t heads,
                             int64_t intermediate) {
    int64_t bytes = 0;
    if (batch > kMostSequences || d > kWidest || d / heads > kWidestHead) return bytes;
    dispatch_step(dtype, batch, [&](auto element, auto sequences) {
        using T = decltype(element);
        if (!ring_size<T, sequences>(n_layers, d, heads, intermediate).slots) return;
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
        const RingSize ring = ring_size<T, N>(n_layers, d, heads, intermediate);
        step.slots = ring.slots;
        step.segment = ring.segment;
        place(step, scratch);
        const Layout layout(step.n_layers, N, step.d, step.heads, step.intermediate, sizeof(T),
                            Rings<kRows<N>>::bytes(ring.slots, ring.segment));
        const size_t shared = static_cast<size_t>(layout.bytes);
        const int blocks = resident_blocks("decode", decode<T, N>, kAllThreads, shared);
        launch("decode", decode<T, N>, {static_cast<unsigned>(blocks), kAllThreads, shared, true}, stream,
               step);
    });
}

}  // namespace ttt::cuda
