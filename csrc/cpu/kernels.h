// Every kernel of the CPU backend, declared once: each instruction set defines all of them in a namespace
// of its own, and the table of the best set that the processor has is what Python calls. An operator's header
// has its declarations and their list; pointers are to the first element, strides and sizes count elements,
// and C is the type computed in (float, or double for double). With past_caches results go to memory without
// staying in a cache, which pays for those that no cache can hold.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "cpu/clipped_sgd.h"
#include "cpu/decode.h"
#include "cpu/linear_ce.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "cpu/swa.h"
#include "cpu/swiglu.h"

#define TTT_DECLARE_KERNELS \
    TTT_DECLARE_RMS_NORM    \
    TTT_DECLARE_ROPE        \
    TTT_DECLARE_SWIGLU      \
    TTT_DECLARE_LINEAR_CE   \
    TTT_DECLARE_CLIPPED_SGD \
    TTT_DECLARE_SWA         \
    TTT_DECLARE_DECODE

#define TTT_KERNELS(X)      \
    TTT_LIST_RMS_NORM(X)    \
    TTT_LIST_ROPE(X)        \
    TTT_LIST_SWIGLU(X)      \
    TTT_LIST_LINEAR_CE(X)   \
    TTT_LIST_CLIPPED_SGD(X) \
    TTT_LIST_SWA(X)         \
    TTT_LIST_DECODE(X)

#ifdef TTT_ISA
namespace ttt::TTT_ISA {
TTT_DECLARE_KERNELS
}
#endif

namespace ttt {
namespace signature {
TTT_DECLARE_KERNELS
}

struct Kernels {
#define TTT_MEMBER(name) decltype(&signature::name) name;
    TTT_KERNELS(TTT_MEMBER)
#undef TTT_MEMBER
};

namespace portable {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
namespace avx512_bf16 {
Kernels kernels();
}
}  // namespace ttt
