#include "cpu/kernels.h"

namespace ttt::TTT_ISA {

Kernels kernels() {
    return Kernels{
#define TTT_ENTRY(name) &name,
        TTT_KERNELS(TTT_ENTRY)
#undef TTT_ENTRY
    };
}

}  // namespace ttt::TTT_ISA
