// Kernels of decode.
#pragma once

#define TTT_DECLARE_DECODE

#define TTT_LIST_DECODE(X)
