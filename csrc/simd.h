// Vectors of 64 bytes in GCC's and Clang's own notation, and the choice of an instruction set at run time.
//
// The kernels (*_kernels.h) are compiled once per instruction set, each time in a namespace of its own
// (every_instruction_set.h), and PAAMOPS_CALL picks one by what the machine can do: one binary serves every machine of an architecture.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define PAAMOPS_X86 1
#define PAAMOPS_V4 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define PAAMOPS_V3 __attribute__((target("avx2,fma,f16c")))
#define PAAMOPS_CALL(...)                                      \
  (::paamops::instruction_set() == 4   ? ::paamops::v4::__VA_ARGS__ \
   : ::paamops::instruction_set() == 3 ? ::paamops::v3::__VA_ARGS__ \
                                       : ::paamops::base::__VA_ARGS__)
#else
#define PAAMOPS_X86 0
#define PAAMOPS_CALL(...) ::paamops::base::__VA_ARGS__
#endif

namespace paamops {

// 4: AVX-512, 3: AVX2 and FMA, 2: what every x86-64 has. The best that the machine can do is detected once; tests set a
// lower one, to run what such machines run.
inline int detected_instruction_set() {
#if PAAMOPS_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return v4 ? 4 : v3 ? 3 : 2;
#else
  return 2;
#endif
}

inline int& instruction_set() {
  static int set = detected_instruction_set();
  return set;
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What a dtype is accumulated in: the number A, the integer I of the same size, and the vectors of both.
template <class A_, class I_, int64_t kMagnitude_, int64_t kInfinity_, int64_t kOne_>
struct Vectors {
  using A = A_;
  using I = I_;
  typedef A V __attribute__((vector_size(64)));
  typedef I IV __attribute__((vector_size(64)));
  static constexpr int64_t kLanes = 64 / sizeof(A);
  static constexpr I kMagnitude = static_cast<I>(kMagnitude_), kInfinity = static_cast<I>(kInfinity_);
  static constexpr I kOne = static_cast<I>(kOne_);
};
using FloatVectors = Vectors<float, int32_t, 0x7fffffff, 0x7f800000, 0x3f800000>;
using DoubleVectors = Vectors<double, int64_t, 0x7fffffffffffffff, 0x7ff0000000000000, 0x3ff0000000000000>;
template <class T>
struct Traits : FloatVectors {};
template <>
struct Traits<double> : DoubleVectors {};

}  // namespace paamops
