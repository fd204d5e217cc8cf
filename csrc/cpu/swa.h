// Kernels of swa.
#pragma once

#define TTT_DECLARE_SWA

#define TTT_LIST_SWA(X)
