// Kernels of rope.
#pragma once

#define TTT_DECLARE_ROPE

#define TTT_LIST_ROPE(X)
