// Compiles a file of kernels once per instruction set (simd.h), in namespaces base, v3 and v4 of where it is included:
//
//   #define PAAMOPS_KERNELS "scale_kernels.h"
//   #include "every_instruction_set.h"
//
// The kernels find what they are compiled for in PAAMOPS_TARGET (a function attribute) and PAAMOPS_BYTES (the vector).
namespace base {
#define PAAMOPS_TARGET
#define PAAMOPS_BYTES 16
#include PAAMOPS_KERNELS
#undef PAAMOPS_TARGET
#undef PAAMOPS_BYTES
}  // namespace base
#if PAAMOPS_X86
namespace v3 {
#define PAAMOPS_TARGET PAAMOPS_V3
#define PAAMOPS_BYTES 32
#include PAAMOPS_KERNELS
#undef PAAMOPS_TARGET
#undef PAAMOPS_BYTES
}  // namespace v3
namespace v4 {
#define PAAMOPS_TARGET PAAMOPS_V4
#define PAAMOPS_BYTES 64
#include PAAMOPS_KERNELS
#undef PAAMOPS_TARGET
#undef PAAMOPS_BYTES
}  // namespace v4
#endif
#undef PAAMOPS_KERNELS
